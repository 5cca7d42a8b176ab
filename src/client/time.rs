//! Times and timeouts: cluster time as a client estimates it, and the protobuf forms.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use crate::clock::Clock;

/// A timeout that may be "never".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeout {
    /// There is none.
    Never,
    /// Its length, at least a second.
    After(Duration),
}

impl Timeout {
    pub(super) fn into_proto(self) -> crate::proto::v1::Timeout {
        use crate::proto::v1::timeout::Timeout as Proto;
        let timeout = match self {
            Self::Never => Proto::Never(true),
            Self::After(length) => Proto::After(duration_to_proto(length)),
        };
        crate::proto::v1::Timeout { timeout: Some(timeout) }
    }
}

impl From<Duration> for Timeout {
    fn from(length: Duration) -> Self {
        Self::After(length)
    }
}

/// The cluster's time, estimated from what a node said last and this machine's monotonic clock
/// since then. It lags by the time that the node's message was on its way, which is the safe side:
/// a request seems older than it is, never younger.
pub(super) struct ClusterTime {
    clock: Arc<dyn Clock>,
    /// Cluster time less the monotonic clock, in milliseconds; `UNKNOWN` before the first message.
    offset: AtomicI64,
}

const UNKNOWN: i64 = i64::MIN;

impl ClusterTime {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, offset: AtomicI64::new(UNKNOWN) }
    }

    /// Takes what a node has just said.
    pub(super) fn learn(&self, time: &prost_types::Timestamp) {
        // A node that belongs to no cluster has no time to tell.
        let Some(time) = millis_from_proto(time).filter(|time| *time > 0) else { return };
        self.offset.store(time.saturating_sub(self.monotonic()), Ordering::Relaxed);
    }

    /// Now, in milliseconds since the Unix epoch; `None` while no node has said anything.
    pub(super) fn now(&self) -> Option<i64> {
        let offset = self.offset.load(Ordering::Relaxed);
        (offset != UNKNOWN).then(|| offset.saturating_add(self.monotonic()))
    }

    /// The clock that it runs on.
    pub(super) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    fn monotonic(&self) -> i64 {
        i64::try_from(self.clock.monotonic().as_millis()).unwrap_or(i64::MAX)
    }
}

/// Milliseconds since the epoch as protobuf has them.
pub(super) fn millis_to_proto(millis: i64) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: millis.div_euclid(1_000),
        // 0 to 999 ms: fits.
        nanos: (millis.rem_euclid(1_000) as i32) * 1_000_000,
    }
}

/// `None` when the server sent something that is no time between 1970 and the far future.
pub(super) fn millis_from_proto(time: &prost_types::Timestamp) -> Option<i64> {
    let millis = time.seconds.checked_mul(1_000)?.checked_add(i64::from(time.nanos) / 1_000_000)?;
    (millis >= 0).then_some(millis)
}

/// A time of the server as the standard library has it; absent when it makes no sense.
pub(super) fn system_time(time: Option<prost_types::Timestamp>) -> Option<SystemTime> {
    let millis = millis_from_proto(&time?)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(u64::try_from(millis).ok()?))
}

/// A length as protobuf has it; one beyond its range becomes the longest that it has.
pub(super) fn duration_to_proto(length: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(length.as_secs()).unwrap_or(i64::MAX),
        // Below 1,000,000,000: fits.
        nanos: length.subsec_nanos() as i32,
    }
}

/// A length that the server sent; absent when it is negative or otherwise broken.
pub(super) fn duration_from_proto(length: Option<prost_types::Duration>) -> Option<Duration> {
    let length = length?;
    let nanos = u32::try_from(length.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(u64::try_from(length.seconds).ok()?, nanos))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Manual(Mutex<Duration>);

    impl Clock for Manual {
        fn monotonic(&self) -> Duration {
            *self.0.lock().unwrap()
        }

        fn wall(&self) -> u64 {
            0
        }
    }

    #[test]
    fn cluster_time_runs_on_the_monotonic_clock() {
        let clock = Arc::new(Manual(Mutex::new(Duration::from_secs(5))));
        let time = ClusterTime::new(clock.clone());
        assert_eq!(time.now(), None);
        time.learn(&millis_to_proto(1_700_000_000_123));
        assert_eq!(time.now(), Some(1_700_000_000_123));
        *clock.0.lock().unwrap() += Duration::from_millis(877);
        assert_eq!(time.now(), Some(1_700_000_001_000));
    }

    #[test]
    fn nonsense_of_a_server_is_ignored() {
        let time = ClusterTime::new(Arc::new(Manual(Mutex::new(Duration::ZERO))));
        time.learn(&prost_types::Timestamp { seconds: i64::MAX, nanos: 0 });
        time.learn(&prost_types::Timestamp { seconds: -1, nanos: 0 });
        time.learn(&prost_types::Timestamp::default());
        assert_eq!(time.now(), None);
        assert_eq!(system_time(Some(prost_types::Timestamp { seconds: i64::MIN, nanos: 1 })), None);
        let broken = prost_types::Duration { seconds: -3, nanos: 0 };
        assert_eq!(duration_from_proto(Some(broken)), None);
    }

    #[test]
    fn durations_and_times_survive_the_round_trip() {
        let length = Duration::new(90, 5_000_000);
        assert_eq!(duration_from_proto(Some(duration_to_proto(length))), Some(length));
        let moment = 1_763_870_722_042;
        assert_eq!(millis_from_proto(&millis_to_proto(moment)), Some(moment));
    }
}
