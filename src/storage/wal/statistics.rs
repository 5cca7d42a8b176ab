//! Counters of the log, and how long its syncs take.

use std::time::Duration;

use super::WalStatistics;

/// Syncs whose times are remembered.
const TIMES_MAX: usize = 1024;

#[derive(Default)]
pub(super) struct Counters {
    pub(super) records: u64,
    pub(super) bytes: u64,
    pub(super) segment_waits: u64,
    syncs: u64,
    /// The slowest since it was last asked for.
    slowest: Duration,
    /// The last [`TIMES_MAX`], in no order.
    times: Vec<Duration>,
}

impl Counters {
    /// Counts one sync.
    pub(super) fn synced(&mut self, time: Duration) {
        let slot = (self.syncs % TIMES_MAX as u64) as usize;
        match self.times.get_mut(slot) {
            Some(oldest) => *oldest = time,
            None => self.times.push(time),
        }
        self.syncs += 1;
        self.slowest = self.slowest.max(time);
    }

    /// The slowest since the last call.
    pub(super) fn take_slowest(&mut self) -> Duration {
        std::mem::take(&mut self.slowest)
    }

    pub(super) fn statistics(&self) -> WalStatistics {
        let mut times = self.times.clone();
        times.sort_unstable();
        let rank = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100).max(1) - 1;
            times.get(rank).copied().unwrap_or_default()
        };
        WalStatistics {
            syncs: self.syncs,
            records: self.records,
            bytes: self.bytes,
            sync_p50: rank(50),
            sync_p99: rank(99),
            segment_waits: self.segment_waits,
            ..WalStatistics::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_last_syncs() {
        let mut counters = Counters::default();
        assert_eq!(counters.statistics().sync_p99, Duration::ZERO);
        for _ in 0..5000 {
            counters.synced(Duration::from_secs(1));
        }
        for micros in 1..=1024 {
            counters.synced(Duration::from_micros(micros));
        }
        let statistics = counters.statistics();
        assert_eq!(statistics.syncs, 6024);
        assert_eq!(statistics.sync_p50, Duration::from_micros(512));
        assert_eq!(statistics.sync_p99, Duration::from_micros(1014));
        assert_eq!(counters.take_slowest(), Duration::from_secs(1));
        assert_eq!(counters.take_slowest(), Duration::ZERO);
    }
}
