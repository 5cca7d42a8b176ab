//! What comes with every request: who asks, until when, and what makes it happen once.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::admission::Share;
use super::caller::{Caller, Presence};
use super::error::Error;
use crate::limits::{
    LOCK_WAIT_MAX, REQUEST_LIFETIME_MAX, REQUEST_SKEW_MAX, REQUEST_TIMEOUT_DEFAULT,
};
use crate::raft::{Node, ReadError};
use crate::state::{Request, State, Timestamp, millis};

/// Longest that a caller may wait. Leaves room, below the lifetime of a request, for the clocks of
/// client and cluster to differ.
const CALL_TIMEOUT_MAX: Duration = Duration::from_secs(50);

/// A moment of the node's monotonic time by which a caller wants an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Duration);

/// One call.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// Who asks.
    pub caller: Caller,
    /// Where room for the answer comes from.
    pub share: &'a Arc<Share>,
    /// Whether the answer is still waited for; `None` where it is made in any case.
    pub presence: Option<&'a Presence>,
    /// Until when.
    pub deadline: Deadline,
}

impl<'a> Call<'a> {
    /// A call that may take `timeout`, or the default.
    pub fn within(
        node: &Node,
        caller: Caller,
        share: &'a Arc<Share>,
        timeout: Option<Duration>,
    ) -> Self {
        let timeout = timeout.unwrap_or(REQUEST_TIMEOUT_DEFAULT).min(CALL_TIMEOUT_MAX);
        Self { caller, share, presence: None, deadline: Deadline(node.monotonic() + timeout) }
    }

    /// A call that waits for a lock, for `wait` at most: it may take that much longer.
    pub fn waiting(
        node: &Node,
        caller: Caller,
        share: &'a Arc<Share>,
        timeout: Option<Duration>,
        wait: Duration,
    ) -> Self {
        let wait = wait.min(LOCK_WAIT_MAX);
        let timeout = timeout.unwrap_or(wait + REQUEST_TIMEOUT_DEFAULT);
        let timeout = timeout.min(wait + CALL_TIMEOUT_MAX);
        Self { caller, share, presence: None, deadline: Deadline(node.monotonic() + timeout) }
    }

    /// The same call, whose reads are made only while somebody waits for them.
    pub fn while_present(self, presence: &'a Presence) -> Self {
        Self { presence: Some(presence), ..self }
    }

    /// The same call, as far as its command has to be answered.
    pub(super) fn proposing(self, node: &Node) -> Self {
        let latest = Deadline(node.monotonic() + CALL_TIMEOUT_MAX);
        Self { deadline: self.deadline.min(latest), ..self }
    }
}

/// How fresh a read has to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consistency {
    /// Reflects everything acknowledged before it began.
    #[default]
    Linearizable,
    /// What this node has applied, at least up to a revision, and at most so old.
    Local {
        /// Wait for this one; 0 for none.
        min_revision: u64,
        /// Refuse what can be older; `None` for whatever age.
        max_staleness: Option<Duration>,
    },
}

impl Consistency {
    /// How old the state may be when a read that has waited for room looks at it. What was applied,
    /// or confirmed by a barrier, stays so; age does not stop while a read waits.
    fn max_staleness(self) -> Option<Duration> {
        match self {
            Self::Linearizable => None,
            Self::Local { max_staleness, .. } => max_staleness,
        }
    }
}

/// A look at the state, where the room for what it finds comes from, and for whom it is.
struct Look<F> {
    look: F,
    share: Arc<Share>,
    presence: Option<Presence>,
}

impl<T, F: FnOnce(&State) -> T> Look<F> {
    fn is_for_nobody(&self) -> bool {
        self.presence.as_ref().is_some_and(Presence::is_over)
    }

    /// Looks, if there is room.
    fn attempt(self, state: &State) -> Result<Result<T, Error>, Self> {
        if self.is_for_nobody() || self.share.admits() { Ok(self.take(state)) } else { Err(self) }
    }

    /// Looks, unless nobody waits for it any more: a client that goes leaves thousands behind, and
    /// as nothing of theirs is held there would be room for all of them. A panic ends this read,
    /// and not whoever else waits for the same barrier.
    fn take(self, state: &State) -> Result<T, Error> {
        if self.is_for_nobody() {
            // Nobody hears it.
            return Err(Error::deadline_exceeded(false));
        }
        catch_unwind(AssertUnwindSafe(|| (self.look)(state))).map_err(|_| {
            self.share.admission().note_panic();
            Error::panicked()
        })
    }
}

/// Looks at the state of a node, as fresh as is asked and once there is room for what is found.
pub(super) fn read<T: 'static>(
    node: &Arc<Node>,
    call: &Call<'_>,
    consistency: Consistency,
    look: impl FnOnce(&State) -> T + Send + 'static,
    done: impl FnOnce(Result<T, Error>) + Send + 'static,
) {
    let (deadline, again) = (call.deadline.0, node.clone());
    let look = Look { look, share: call.share.clone(), presence: call.presence.cloned() };
    let attempt = move |state: &State| look.attempt(state);
    let done = move |looked: Result<Result<Result<T, Error>, Look<_>>, ReadError>| match looked {
        Ok(Ok(found)) => done(found),
        // The revision has been reached and the barrier passed, which stays so.
        Ok(Err(look)) => look.share.clone().park(deadline, move |admitted| match admitted {
            Ok(()) => {
                let take = move |state: &State| look.take(state);
                again.read_local(0, consistency.max_staleness(), deadline, take, |found| {
                    done(found.map_err(Error::from).flatten());
                });
            }
            Err(error) => done(Err(error)),
        }),
        Err(error) => done(Err(error.into())),
    };
    match consistency {
        Consistency::Linearizable => node.read(deadline, attempt, done),
        Consistency::Local { min_revision, max_staleness } => {
            node.read_local(min_revision, max_staleness, deadline, attempt, done);
        }
    }
}

/// What a caller said about its request's identity; all optional.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestContext {
    /// 0 for none.
    pub request_id: u64,
    /// Whether it was sent before.
    pub resend: bool,
    /// Cluster time.
    pub first_sent: Option<Timestamp>,
    /// Cluster time.
    pub expires: Option<Timestamp>,
}

/// Names requests whose callers did not: unique, not secret.
#[derive(Debug)]
pub(super) struct RequestIds(AtomicU64);

impl RequestIds {
    pub(super) fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// The next of a sequence that visits every number once (SplitMix64), from a random start.
    pub(super) fn next(&self) -> u64 {
        let mut id = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        id = (id ^ (id >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        id = (id ^ (id >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (id ^ (id >> 31)).max(1)
    }

    /// Fills in what the caller left open.
    ///
    /// # Errors
    ///
    /// If the context contradicts itself.
    pub(super) fn complete(
        &self,
        node: &Node,
        call: &Call<'_>,
        context: &RequestContext,
    ) -> Result<Request, Error> {
        let named = context.request_id != 0;
        if context.resend && !(named && context.first_sent.is_some()) {
            return Err(Error::invalid(
                "context.resend",
                "INVALID_REQUEST_CONTEXT",
                "a resend needs the request_id and first_sent_time of the first sending",
            ));
        }
        let now = node.cluster_time().ok_or_else(|| Error::from(node.unavailable()))?.time;
        let first_sent = context.first_sent.unwrap_or(now);
        if first_sent > now.plus(REQUEST_SKEW_MAX) {
            return Err(Error::clock_ahead());
        }
        let remaining = call.deadline.0.saturating_sub(node.monotonic());
        let expires = context.expires.unwrap_or_else(|| now.plus(remaining));
        if expires.0 > first_sent.0.saturating_add(millis(REQUEST_LIFETIME_MAX)) {
            return Err(Error::invalid(
                "context.expire_time",
                "INVALID_REQUEST_CONTEXT",
                "context.expire_time is more than 60 s after context.first_sent_time",
            ));
        }
        let id = if named { context.request_id } else { self.next() };
        Ok(Request { id, first_sent, expires })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{Admission, Count, Present};

    #[test]
    fn nothing_is_looked_up_for_who_has_gone() {
        let share = Admission::new().share(|| {});
        let looks = AtomicU64::new(0);
        let present = Present::new();
        let look = || Look {
            look: |_: &State| looks.fetch_add(1, Ordering::Relaxed),
            share: share.clone(),
            presence: Some(present.presence()),
        };
        let state = State::default();
        assert!(matches!(look().attempt(&state), Ok(Ok(0))));
        // Of two that come while there is no room, one looks before its client goes.
        share.hold(Count::answers(usize::MAX / 2));
        let waiting = [look(), look()].map(|look| look.attempt(&state).err().unwrap());
        let late = look();
        let [first, second] = waiting;
        assert!(matches!(first.take(&state), Ok(1)));
        drop(present);
        assert!(second.take(&state).is_err());
        assert!(matches!(late.attempt(&state), Ok(Err(_))));
        assert_eq!(looks.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_read_that_waits_for_room_may_not_become_staler_than_it_was_asked_to_be() {
        let bound = Some(Duration::from_secs(2));
        let local = |max_staleness| Consistency::Local { min_revision: 7, max_staleness };
        assert_eq!(local(bound).max_staleness(), bound);
        assert_eq!(local(None).max_staleness(), None);
        assert_eq!(Consistency::Linearizable.max_staleness(), None);
    }
}
