//! A claim on a lock: one holder or waiter, and a record of its own.
//!
//! A lock is nothing but its claims. Each is a record by itself, so that a queue of ten thousand is
//! never rewritten: a hand-over changes the two claims that it is about. A claim is named by its
//! lock and its order, which is the revision of the Acquire that made it: unique, and the order of
//! the queue. What identifies it to its owner is (lock, lease, request id), so an Acquire that is
//! sent again, to whichever node or leader, finds the claim that it made before.
//!
//! ```text
//!            Acquire                  its turn has come
//!   (none) ─────────────▶ Waiting ─────────────────────▶ Held ──▶ released, cancelled, broken,
//!      │                     │                           ▲  │     lease revoked: gone
//!      │                     └▶ cancelled, timed out,    │  │
//!      │                        lease ended: gone        │  └───▶ lease expired, lock-delay:
//!      └─────────────────────────────────────────────────┘        Delayed ──▶ delay over: gone
//! ```
//!
//! A holder that was lost may not know yet that it was, and still be at work. If it asked for a
//! lock-delay its claim stays for that long and goes on taking its share, and no more than that: a
//! lost reader keeps a writer out, but not another reader.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::command::{Namespace, Request, Revision};
use super::digest;
use super::lease::LeaseId;
use super::time::{Timestamp, millis};
use crate::limits::LOCK_PERMITS_MAX;

/// Names a lock.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockKey {
    /// The namespace.
    pub namespace: Namespace,
    /// 1 to 256 bytes of UTF-8.
    pub name: Arc<str>,
}

impl fmt::Display for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Names a claim.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimKey {
    /// The lock.
    pub lock: LockKey,
    /// Revision of the Acquire that made it.
    pub order: Revision,
}

impl fmt::Display for ClaimKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.lock, self.order)
    }
}

/// How much of a lock a claim wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// All of it.
    Exclusive,
    /// Beside others who share it.
    Shared,
    /// Some permits of a number that all who use the lock must agree on.
    Permits {
        /// How many the lock has: 1 to 1,000,000.
        of: u32,
        /// How many the claim takes: 1 to `of`.
        take: u32,
    },
}

/// What kind of lock it is. It keeps its kind for as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Exclusive or shared.
    ReadWrite,
    /// With permits to take.
    Counted {
        /// How many it has.
        permits: u32,
    },
}

/// What a claim that is exclusive takes of a lock, and each that shares takes one of. No lock has
/// so many claims.
const ALL_OF_A_LOCK: u64 = u32::MAX as u64;

impl LockMode {
    /// The kind of lock that it can be used with.
    pub fn kind(self) -> LockKind {
        match self {
            Self::Exclusive | Self::Shared => LockKind::ReadWrite,
            Self::Permits { of, .. } => LockKind::Counted { permits: of },
        }
    }

    /// How much of the lock's capacity it takes.
    pub(super) fn share(self) -> u64 {
        match self {
            Self::Exclusive => ALL_OF_A_LOCK,
            Self::Shared => 1,
            Self::Permits { take, .. } => u64::from(take),
        }
    }

    /// Whether its numbers are within their ranges.
    pub(super) fn is_valid(self) -> bool {
        match self {
            Self::Exclusive | Self::Shared => true,
            Self::Permits { of, take } => 1 <= take && take <= of && of <= LOCK_PERMITS_MAX,
        }
    }
}

impl LockKind {
    pub(super) fn capacity(self) -> u64 {
        match self {
            Self::ReadWrite => ALL_OF_A_LOCK,
            Self::Counted { permits } => u64::from(permits),
        }
    }
}

impl fmt::Display for LockKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReadWrite => f.write_str("exclusive or shared"),
            Self::Counted { permits } => write!(f, "{permits} permits"),
        }
    }
}

/// How far a claim has come. Deadlines are on the steady clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimState {
    /// It waits for its turn.
    Waiting {
        /// When it gives up.
        deadline: Timestamp,
    },
    /// It holds its share of the lock.
    Held {
        /// The fencing token: revision of the grant.
        token: Revision,
        /// Cluster time of the grant.
        time: Timestamp,
    },
    /// It was lost, and nobody else gets its share yet.
    Delayed {
        /// The token that it had, which is worth nothing any more.
        token: Revision,
        /// When the lock-delay is over.
        until: Timestamp,
    },
}

/// A claim as stored. It never changes; what happens to it makes another in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Of key and content; the claim's share in the digest of the state.
    pub(super) hash: u64,
    /// The lease that it hangs from; one that has ended where the claim is `Delayed`.
    pub lease: LeaseId,
    /// What it wants or has.
    pub mode: LockMode,
    /// The Acquire that made it.
    pub request: Request,
    /// Whether that was a resend, so that the first sending may still come.
    pub resend: bool,
    /// Cluster time of that Acquire.
    pub enqueued_time: Timestamp,
    /// How long its share is kept back after it is lost; at most a minute.
    pub lock_delay: Duration,
    /// How far it has come.
    pub state: ClaimState,
}

impl Claim {
    /// The same claim with the hash that it has under `key`. Whoever makes one ends with this.
    pub(super) fn sealed(mut self, key: &ClaimKey) -> Self {
        let (mode_tag, of, take) = match self.mode {
            LockMode::Exclusive => (0, 0, 0),
            LockMode::Shared => (1, 0, 0),
            LockMode::Permits { of, take } => (2, of, take),
        };
        let (state_tag, state_token, state_time) = match self.state {
            ClaimState::Waiting { deadline } => (0, 0, deadline.0),
            ClaimState::Held { token, time } => (1, token.0, time.0),
            ClaimState::Delayed { token, until } => (2, token.0, until.0),
        };
        let tags = u64::from(self.resend) << 16 | mode_tag << 8 | state_tag;
        let fields = [
            self.request.id,
            self.request.first_sent.0,
            self.request.expires.0,
            tags,
            u64::from(of) << 32 | u64::from(take),
            millis(self.lock_delay),
            self.enqueued_time.0,
            state_token,
            state_time,
        ];
        let id = digest::of_name(&key.lock.name, key.order);
        let namespace = &key.lock.namespace;
        self.hash = digest::of_parts(digest::CLAIM, namespace, id, &fields, &self.lease.0);
        self
    }

    /// The same claim in another state.
    pub(super) fn with_state(&self, key: &ClaimKey, state: ClaimState) -> Self {
        Self { state, ..self.clone() }.sealed(key)
    }

    /// The fencing token, if it holds the lock.
    pub fn token(&self) -> Option<Revision> {
        match self.state {
            ClaimState::Held { token, .. } => Some(token),
            ClaimState::Waiting { .. } | ClaimState::Delayed { .. } => None,
        }
    }

    /// The token of a claim that takes its share, whether it is held or lost.
    pub(super) fn taken_token(&self) -> Option<Revision> {
        match self.state {
            ClaimState::Held { token, .. } | ClaimState::Delayed { token, .. } => Some(token),
            ClaimState::Waiting { .. } => None,
        }
    }

    /// When something happens to it by itself, on the steady clock.
    pub(super) fn deadline(&self) -> Option<Timestamp> {
        match self.state {
            ClaimState::Waiting { deadline } => Some(deadline),
            ClaimState::Held { .. } => None,
            ClaimState::Delayed { until, .. } => Some(until),
        }
    }

    /// Whether it goes when its lease does.
    pub(super) fn is_tied(&self) -> bool {
        !matches!(self.state, ClaimState::Delayed { .. })
    }
}
