//! Who waits for a lock is told by his own node's state machine.
//!
//! An Acquire whose lock is not free is answered at once: its claim waits. What the caller wants is
//! the claim's end, which comes with some later entry, on every node. So the caller's node follows
//! the claim in its own state: no message is sent for it, no timer runs, nobody polls, and it is
//! the same whether this node leads, follows, or sees three leaders come and go meanwhile.
//!
//! - A caller is registered before its Acquire is proposed. Until the answer has come, what happens
//!   to the claim is noted; so nothing is missed, whichever of the two is known here first.
//! - A snapshot that is installed replaces the state without telling what changed. Then all claims
//!   are looked up again; one that is gone by then has ended, and how is not known.
//! - Nobody is called while the state or the registry is locked: what is to be told is returned.
//! - When no call waits for a lock, applying costs one look at a counter.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::limits::ACQUIRES_WAITING_MAX;
use crate::state::{
    Cause, Change, Claim, ClaimKey, ClaimState, LeaseId, LeaseKey, LockKey, Record, RecordKey,
    Revision, State, Timestamp,
};

/// What makes a claim the caller's own, and the same on every node and in every sending.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ClaimName {
    pub(crate) lock: LockKey,
    pub(crate) lease: LeaseId,
    /// Request id of the Acquire.
    pub(crate) request: u64,
}

/// What became of a claim that waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimEnd {
    /// It holds the lock.
    Granted {
        /// The fencing token.
        token: Revision,
        /// Cluster time of the grant.
        time: Timestamp,
        /// When the lease ends unless it is renewed, on the steady clock.
        lease_deadline: Timestamp,
    },
    /// It is over, for this reason where that is known.
    Over(Option<Cause>),
    /// The caller's time came first. The claim stays in line.
    StillWaiting,
    /// The node is stopping. The claim stays in line.
    Stopping,
}

pub(crate) type Told = Box<dyn FnOnce(ClaimEnd) + Send>;

/// Calls to be made once nothing is locked.
#[derive(Default)]
pub(crate) struct Calls(Vec<(Told, ClaimEnd)>);

impl Calls {
    pub(crate) fn make(self) {
        for (told, end) in self.0 {
            told(end);
        }
    }
}

/// Names one registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ticket(u64);

struct Follower {
    name: ClaimName,
    /// Once the Acquire was answered.
    waiting: Option<Waiting>,
    /// What happened before that, and to the claim of which order.
    noted: Option<(Revision, ClaimEnd)>,
    /// How many snapshots had been installed when it was registered.
    installs: u64,
}

struct Waiting {
    /// The claim's.
    order: Revision,
    /// Local monotonic time.
    deadline: Duration,
    told: Told,
}

#[derive(Default)]
struct Registry {
    followers: HashMap<Ticket, Follower>,
    by_name: HashMap<ClaimName, Vec<Ticket>>,
    deadlines: BTreeSet<(Duration, Ticket)>,
    last_ticket: u64,
    installs: u64,
    is_closed: bool,
}

impl Registry {
    fn remove(&mut self, ticket: Ticket) -> Option<Follower> {
        let follower = self.followers.remove(&ticket)?;
        if let Some(tickets) = self.by_name.get_mut(&follower.name) {
            tickets.retain(|other| *other != ticket);
            if tickets.is_empty() {
                self.by_name.remove(&follower.name);
            }
        }
        if let Some(waiting) = &follower.waiting {
            self.deadlines.remove(&(waiting.deadline, ticket));
        }
        Some(follower)
    }

    /// Removes one that waits, and has it told.
    fn end(&mut self, ticket: Ticket, end: ClaimEnd, calls: &mut Calls) {
        if let Some(waiting) = self.remove(ticket).and_then(|follower| follower.waiting) {
            calls.0.push((waiting.told, end));
        }
    }
}

/// The calls on this node that wait for locks.
///
/// - `count` is the number of followers, for those who have nothing to tell.
#[derive(Default)]
pub(crate) struct Following {
    registry: Mutex<Registry>,
    count: AtomicUsize,
}

impl Following {
    fn with<T>(&self, work: impl FnOnce(&mut Registry) -> T) -> T {
        let mut registry: MutexGuard<'_, Registry> =
            self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let result = work(&mut registry);
        self.count.store(registry.followers.len(), Ordering::Release);
        result
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Registers a caller, before its Acquire is proposed. `None` if there are too many.
    pub(crate) fn register(&self, name: ClaimName) -> Option<Ticket> {
        self.with(|registry| {
            if registry.followers.len() >= ACQUIRES_WAITING_MAX {
                return None;
            }
            registry.last_ticket += 1;
            let ticket = Ticket(registry.last_ticket);
            registry.by_name.entry(name.clone()).or_default().push(ticket);
            let installs = registry.installs;
            let follower = Follower { name, waiting: None, noted: None, installs };
            registry.followers.insert(ticket, follower);
            Some(ticket)
        })
    }

    /// Forgets a caller whose Acquire was answered otherwise. Returns what was noted of its claim.
    pub(crate) fn forget(&self, ticket: Ticket) -> Option<ClaimEnd> {
        self.with(|registry| Some(registry.remove(ticket)?.noted?.1))
    }

    /// The Acquire was answered: its claim waits. `told` is called once, by the deadline (local
    /// monotonic time). `state` is this node's, which may be behind that answer or ahead of it.
    pub(crate) fn wait(
        &self,
        ticket: Ticket,
        order: Revision,
        deadline: Duration,
        state: &State,
        told: Told,
    ) -> Calls {
        self.with(|registry| {
            let is_closed = registry.is_closed;
            let installs = registry.installs;
            let Some(follower) = registry.followers.get_mut(&ticket) else {
                return Calls(vec![(told, ClaimEnd::Over(None))]);
            };
            let noted = follower.noted.filter(|(of, _)| *of == order).map(|(_, end)| end);
            let is_blind = follower.installs != installs;
            let found = || is_blind.then(|| look(state, &follower.name.lock, order)).flatten();
            let stopping = || is_closed.then_some(ClaimEnd::Stopping);
            follower.waiting = Some(Waiting { order, deadline, told });
            let mut calls = Calls::default();
            match noted.or_else(found).or_else(stopping) {
                Some(end) => registry.end(ticket, end, &mut calls),
                None => _ = registry.deadlines.insert((deadline, ticket)),
            }
            calls
        })
    }

    /// Takes note of what an entry changed. `state` is the one after it.
    pub(crate) fn observe<'a>(
        &self,
        changes: impl Iterator<Item = &'a Change>,
        state: &State,
        calls: &mut Calls,
    ) {
        let ends = changes.filter_map(|change| claim_end(change, state));
        self.with(|registry| {
            for (name, order, end) in ends {
                let Some(tickets) = registry.by_name.get(&name) else { continue };
                for ticket in tickets.clone() {
                    let follower = registry.followers.get_mut(&ticket);
                    match follower {
                        Some(Follower { waiting: Some(waiting), .. }) if waiting.order == order => {
                            registry.end(ticket, end, calls);
                        }
                        Some(follower) => follower.noted = Some((order, end)),
                        None => {}
                    }
                }
            }
        });
    }

    /// Another state has taken the place of the one before.
    pub(crate) fn installed(&self, state: &State, calls: &mut Calls) {
        self.with(|registry| {
            registry.installs += 1;
            let waiting = registry.followers.iter().filter_map(|(ticket, follower)| {
                let order = follower.waiting.as_ref()?.order;
                Some((*ticket, look(state, &follower.name.lock, order)?))
            });
            let ended: Vec<_> = waiting.collect();
            for (ticket, end) in ended {
                registry.end(ticket, end, calls);
            }
        });
    }

    /// Tells whoever has waited until the deadline. Returns whether anybody waits.
    pub(crate) fn expire(&self, now: Duration) -> bool {
        if self.is_empty() {
            return false;
        }
        let mut calls = Calls::default();
        let pending = self.with(|registry| {
            while let Some((deadline, ticket)) = registry.deadlines.first().copied()
                && deadline <= now
            {
                registry.end(ticket, ClaimEnd::StillWaiting, &mut calls);
            }
            !registry.deadlines.is_empty()
        });
        calls.make();
        pending
    }

    /// Tells all who wait, and who will come, that the node is stopping.
    pub(crate) fn close(&self) {
        let mut calls = Calls::default();
        self.with(|registry| {
            registry.is_closed = true;
            while let Some((_, ticket)) = registry.deadlines.first().copied() {
                registry.end(ticket, ClaimEnd::Stopping, &mut calls);
            }
        });
        calls.make();
    }
}

/// What a change means for those who follow the claim that it is about.
fn claim_end(change: &Change, state: &State) -> Option<(ClaimName, Revision, ClaimEnd)> {
    let RecordKey::Claim(key) = &change.key else { return None };
    let (claim, end) = match (&change.before, &change.after) {
        (_, Some(Record::Claim(claim))) => match claim.state {
            ClaimState::Waiting { .. } => return None,
            ClaimState::Held { token, time } => (claim, granted(state, key, claim, token, time)),
            ClaimState::Delayed { .. } => (claim, ClaimEnd::Over(Some(change.cause))),
        },
        (Some(Record::Claim(claim)), _) => (claim, ClaimEnd::Over(Some(change.cause))),
        _ => return None,
    };
    let (lock, lease) = (key.lock.clone(), claim.lease);
    Some((ClaimName { lock, lease, request: claim.request.id }, key.order, end))
}

/// What became of a claim, if that can be seen in a state that may not have come as far.
fn look(state: &State, lock: &LockKey, order: Revision) -> Option<ClaimEnd> {
    if state.revision() < order {
        return None;
    }
    let key = ClaimKey { lock: lock.clone(), order };
    match state.claim(&key) {
        None => Some(ClaimEnd::Over(None)),
        Some(claim) => match claim.state {
            ClaimState::Waiting { .. } => None,
            ClaimState::Held { token, time } => Some(granted(state, &key, &claim, token, time)),
            ClaimState::Delayed { .. } => Some(ClaimEnd::Over(None)),
        },
    }
}

fn granted(
    state: &State,
    key: &ClaimKey,
    claim: &Claim,
    token: Revision,
    time: Timestamp,
) -> ClaimEnd {
    let lease = LeaseKey { namespace: key.lock.namespace.clone(), id: claim.lease };
    let lease = state.lease(&lease).map(|view| view.lease.deadline());
    // It may have been granted and lost in one entry: then nothing of the lease is left.
    let lease_deadline = lease.unwrap_or(state.clock().steady);
    ClaimEnd::Granted { token, time, lease_deadline }
}
