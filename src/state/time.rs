//! Time as the state machine knows it: what the leader's stamps say, never a clock.

use std::fmt;
use std::time::Duration;

/// A moment of cluster time, in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// This moment and `duration`, saturating.
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(millis(duration)))
    }

    /// How long before this moment `earlier` was; zero if it was not before.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", self.0)
    }
}

/// Whole milliseconds of `duration`, saturating.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The leader's time when it proposed an entry.
///
/// Two clocks, so that a jump is felt by one and not by the other: `time` includes the leaps made
/// after the whole cluster was down, `steady` does not. Sessions live by `time`; leases, whose
/// owners must get their chance to renew, live by `steady`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Cluster time.
    pub time: Timestamp,
    /// Cluster time less the sum of all jumps.
    pub steady: Timestamp,
}

impl Stamp {
    /// The later of two stamps, clock by clock.
    pub fn max(self, other: Self) -> Self {
        Self { time: self.time.max(other.time), steady: self.steady.max(other.steady) }
    }
}

/// When the first record is due, on each clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deadlines {
    /// Of what lives by cluster time: sessions and tombstones. `None` if nothing ever is.
    pub time: Option<Timestamp>,
    /// Of what lives by the steady clock: leases, those that wait for locks, lock-delays.
    pub steady: Option<Timestamp>,
}

impl Deadlines {
    /// How long it is from `now` until the first of them passes; zero if one has.
    pub fn remaining(&self, now: Stamp) -> Option<Duration> {
        let time = self.time.map(|deadline| deadline.since(now.time));
        let steady = self.steady.map(|deadline| deadline.since(now.steady));
        time.into_iter().chain(steady).min()
    }
}

/// A timeout that may be "never": a type, so that no sentinel can be taken for a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeout {
    /// There is none.
    Never,
    /// Its length.
    After(Duration),
}

impl Timeout {
    /// When it ends, counted from `start`; `None` for never.
    pub fn deadline(self, start: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Never => None,
            Self::After(length) => Some(start.plus(length)),
        }
    }
}
