//! Whether a lease is still to be relied on, by the clock of its owner.
//!
//! The owner counts from when it *sent* what was acknowledged, on a clock that goes on while the
//! machine sleeps, and gives up at 0.95 of the time to live: the cluster counts from later, and in
//! full. So whoever asks is told "lost" before the cluster can give to somebody else what hung from
//! the lease, also when the network has gone and nobody says anything any more.
//!
//! Lost is final. A renewal that is acknowledged after the deadline changes nothing, as somebody
//! may have been told already.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::Clock;

/// How often the clock is read while a deadline is waited for: the runtime's timers stand still
/// while the machine sleeps. So long after waking up it may be until `lost()` returns; `is_lost()`
/// is never late.
pub(super) const CLOCK_CHECK: Duration = Duration::from_millis(250);

/// Why a lease was lost, and with it all that hung from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Loss {
    /// The cluster says that it has ended: it ran out there, or somebody revoked it.
    Ended,
    /// No renewal was acknowledged in time. It ends soon, or has ended already.
    NotRenewed,
    /// Its owner gave it up, in this process.
    GivenUp,
}

impl Loss {
    /// In words, to follow "the lease".
    pub fn describe(self) -> &'static str {
        match self {
            Self::Ended => "has ended: it ran out or was revoked",
            Self::NotRenewed => "could not be renewed in time",
            Self::GivenUp => "was given up by its owner",
        }
    }
}

/// Until when a lease is to be relied on.
pub(super) struct Liveness {
    clock: Arc<dyn Clock>,
    vital: Mutex<Vital>,
    /// Told when it is lost by other means than time.
    ended: Notify,
}

struct Vital {
    /// On the monotonic clock.
    deadline: Duration,
    loss: Option<Loss>,
}

impl Liveness {
    /// That of a lease of which a grant, sent at `sent`, was acknowledged.
    pub(super) fn new(clock: Arc<dyn Clock>, sent: Duration, ttl: Duration) -> Self {
        let vital = Mutex::new(Vital { deadline: sent + reliable(ttl), loss: None });
        Self { clock, vital, ended: Notify::new() }
    }

    /// Why it is lost, if it is.
    pub(super) fn loss(&self) -> Option<Loss> {
        let mut vital = self.lock();
        self.judge(&mut vital)
    }

    /// What is left by the clock; zero once it is lost.
    pub(super) fn remaining(&self) -> Duration {
        let mut vital = self.lock();
        match self.judge(&mut vital) {
            Some(_) => Duration::ZERO,
            None => vital.deadline.saturating_sub(self.clock.monotonic()),
        }
    }

    /// A renewal that was sent at `sent` has been acknowledged.
    pub(super) fn extend(&self, sent: Duration, ttl: Duration) {
        let mut vital = self.lock();
        if self.judge(&mut vital).is_none() {
            vital.deadline = vital.deadline.max(sent + reliable(ttl));
        }
    }

    /// It is lost, unless it was already.
    pub(super) fn lose(&self, loss: Loss) {
        let mut vital = self.lock();
        if self.judge(&mut vital).is_none() {
            vital.loss = Some(loss);
        }
        drop(vital);
        self.ended.notify_waiters();
    }

    /// Returns when it is lost.
    pub(super) async fn lost(self: Arc<Self>) -> Loss {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            // From here on no end is missed.
            ended.as_mut().enable();
            if let Some(loss) = self.loss() {
                return loss;
            }
            let nap = self.remaining().min(CLOCK_CHECK);
            // Either way it is looked at again.
            let _ = tokio::time::timeout(nap, ended).await;
        }
    }

    fn judge(&self, vital: &mut Vital) -> Option<Loss> {
        if vital.loss.is_none() && self.clock.monotonic() >= vital.deadline {
            vital.loss = Some(Loss::NotRenewed);
        }
        vital.loss
    }

    fn lock(&self) -> MutexGuard<'_, Vital> {
        // Nothing panics while it holds the lock.
        self.vital.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much of a time to live its owner relies on.
fn reliable(ttl: Duration) -> Duration {
    ttl * 19 / 20
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that is set by hand.
    struct Manual(Mutex<Duration>);

    impl Manual {
        fn set(&self, seconds: f64) {
            *self.0.lock().unwrap() = Duration::from_secs_f64(seconds);
        }
    }

    impl Clock for Manual {
        fn monotonic(&self) -> Duration {
            *self.0.lock().unwrap()
        }

        fn wall(&self) -> u64 {
            0
        }
    }

    fn started() -> (Arc<Manual>, Arc<Liveness>) {
        let clock = Arc::new(Manual(Mutex::new(Duration::from_secs(100))));
        let ttl = Duration::from_secs(10);
        let liveness = Liveness::new(clock.clone(), Duration::from_secs(100), ttl);
        (clock, Arc::new(liveness))
    }

    #[test]
    fn it_is_lost_at_0_95_of_the_ttl_after_the_last_acknowledged_sending() {
        let (clock, liveness) = started();
        clock.set(109.49);
        assert_eq!(liveness.loss(), None);
        // Sent at 105, acknowledged just now: 114.5 is the end of it.
        liveness.extend(Duration::from_secs(105), Duration::from_secs(10));
        clock.set(114.49);
        assert_eq!(liveness.loss(), None);
        assert_eq!(liveness.remaining(), Duration::from_millis(10));
        clock.set(114.5);
        assert_eq!(liveness.loss(), Some(Loss::NotRenewed));
    }

    #[test]
    fn an_old_acknowledgement_takes_nothing_away() {
        let (clock, liveness) = started();
        liveness.extend(Duration::from_secs(105), Duration::from_secs(10));
        liveness.extend(Duration::from_secs(101), Duration::from_secs(10));
        clock.set(114.0);
        assert_eq!(liveness.loss(), None);
    }

    #[test]
    fn what_is_lost_stays_lost() {
        let (clock, liveness) = started();
        clock.set(109.5);
        // Nobody has asked; the acknowledgement came too late all the same.
        liveness.extend(Duration::from_secs(109), Duration::from_secs(10));
        assert_eq!(liveness.loss(), Some(Loss::NotRenewed));
        liveness.lose(Loss::Ended);
        assert_eq!(liveness.loss(), Some(Loss::NotRenewed));
        assert_eq!(liveness.remaining(), Duration::ZERO);
    }

    #[tokio::test]
    async fn who_waits_is_told_by_the_clock_and_by_the_cluster() {
        let (clock, liveness) = started();
        let waiting = tokio::spawn(liveness.clone().lost());
        clock.set(200.0);
        assert_eq!(waiting.await.unwrap(), Loss::NotRenewed);
        let (_clock, liveness) = started();
        let waiting = tokio::spawn(liveness.clone().lost());
        tokio::task::yield_now().await;
        liveness.lose(Loss::Ended);
        assert_eq!(waiting.await.unwrap(), Loss::Ended);
    }
}
