//! How old what a node has applied can be, for local reads that bound it.
//!
//! A leader's heartbeat names what is committed, and says how long ago a majority confirmed that it
//! leads: before that moment nobody else can have committed anything. So whoever has applied as
//! much has everything that was acknowledged until then. A leader that was cut off goes on sending
//! heartbeats to those who are cut off with it, and says in each that its majority is silent.
//!
//! When a majority last confirmed is openraft's to say, which dates an answer by the newest empty
//! append under way: a leader that was stopped and goes on may overrate itself for one round. So
//! this bounds ages well enough for a cache, and is no barrier.
//!
//! Ages are told by the clock of the node that reads, from when it took the heartbeat; the time
//! that one was on its way, or lay unread while the node was stopped, is not known to it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Heartbeats that are kept until what they name is applied. With more, the node is behind by so
/// many intervals, and the oldest of them tells as much.
const PENDING_MAX: usize = 64;

type QuorumSilence = Box<dyn Fn() -> Option<Duration> + Send + Sync>;

/// What heartbeats have told.
///
/// - `known` is a moment of local monotonic time; everything acknowledged before it is applied.
/// - `pending` ascends in both; none of it was applied when it was last looked at.
#[derive(Default)]
pub(crate) struct Freshness {
    heard: Mutex<Heard>,
    quorum_silence: OnceLock<QuorumSilence>,
}

#[derive(Default)]
struct Heard {
    known: Option<Duration>,
    /// Log index behind what was committed, and as of when.
    pending: VecDeque<(u64, Duration)>,
}

impl Freshness {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a leader reads how long its majority has been silent.
    pub(crate) fn watch_quorum(&self, silence: QuorumSilence) {
        // A replica does it once.
        let _ = self.quorum_silence.set(silence);
    }

    /// On a leader, how long ago a majority last confirmed that it leads.
    pub(crate) fn quorum_silence(&self) -> Option<Duration> {
        self.quorum_silence.get().and_then(|silence| silence())
    }

    /// Takes a heartbeat at `now` (local monotonic time): everything below `next_index` was
    /// committed, by a leader whose majority confirmed it `silence` before.
    pub(crate) fn hear(&self, now: Duration, next_index: u64, silence: Duration) {
        let as_of = now.saturating_sub(silence);
        let mut heard = self.lock();
        if let Some((index, at)) = heard.pending.back_mut()
            && (*index >= next_index || *at >= as_of)
        {
            // The same commit, confirmed later; one that tells less is of no use.
            if *index == next_index {
                *at = (*at).max(as_of);
            }
            return;
        }
        if heard.pending.len() < PENDING_MAX {
            heard.pending.push_back((next_index, as_of));
        }
    }

    /// The moment of local monotonic time before which everything acknowledged is below
    /// `applied_next`; `None` while that is not known.
    pub(crate) fn as_of(&self, applied_next: u64) -> Option<Duration> {
        let mut heard = self.lock();
        while let Some((index, at)) = heard.pending.front().copied()
            && index <= applied_next
        {
            heard.known = heard.known.max(Some(at));
            heard.pending.pop_front();
        }
        heard.known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn what_was_heard_counts_once_it_is_applied() {
        let freshness = Freshness::default();
        assert_eq!(freshness.as_of(9), None);
        freshness.hear(at(1_000), 10, at(30));
        assert_eq!(freshness.as_of(9), None);
        freshness.hear(at(1_100), 20, at(20));
        assert_eq!(freshness.as_of(10), Some(at(970)));
        assert_eq!(freshness.as_of(19), Some(at(970)));
        assert_eq!(freshness.as_of(20), Some(at(1_080)));
        // Nothing new is committed, and that is news, too.
        freshness.hear(at(1_200), 20, at(10));
        assert_eq!(freshness.as_of(20), Some(at(1_190)));
    }

    #[test]
    fn a_leader_without_its_majority_keeps_nobody_fresh() {
        let freshness = Freshness::default();
        freshness.hear(at(1_000), 10, at(0));
        for passed in 1..50 {
            freshness.hear(at(1_000 + 100 * passed), 10, at(100 * passed));
        }
        assert_eq!(freshness.as_of(10), Some(at(1_000)));
    }

    #[test]
    fn a_node_that_falls_behind_keeps_the_oldest() {
        let freshness = Freshness::default();
        for number in 0..1_000 {
            freshness.hear(at(100 * number), number, at(0));
        }
        assert_eq!(freshness.lock().pending.len(), PENDING_MAX);
        assert_eq!(freshness.as_of(10), Some(at(1_000)));
        // Once there is room again, later ones count.
        freshness.hear(at(200_000), 1_000, at(0));
        assert_eq!(freshness.as_of(1_000), Some(at(200_000)));
    }
}
