//! The core: the session store as a pure, total, deterministic state machine, in memory.
//!
//! Every node feeds the same entries, in the same order, to a [`State`] of its own and arrives at
//! the same state, the same replies and the same changes. So nothing in here may depend on anything
//! but the entries: there is no clock, no randomness, no iteration in hash order, no I/O and
//! nothing asynchronous. [`State::apply`] cannot fail either. A command that asks for what cannot
//! be done is refused with a [`Rejection`], on every node alike; only bytes that do not decode are
//! an error, and they are turned away by `codec` before they come here.
//!
//! # An entry
//!
//! A log entry carries a [`Stamp`] and the commands that were queued together. The shell around
//! the core calls [`State::advance`] with the stamp and [`State::apply`] with each command; for
//! each it gets a [`Reply`] and, appended to its vector, the [`Change`]s. Those go on to the
//! checkpoint; they share the records with the state.
//!
//! # Time
//!
//! Time is what stamps say. A record whose deadline has come is gone at once, for readers and
//! commands alike, because both compare its deadline with the clock; removing it is work that can
//! wait. It is done by `Tick`, in bounded steps, or by the first command that meets the record, and
//! is an event of its own either way (`expiry`). Where there is no leader there are no stamps, so
//! nothing can expire while nobody could have renewed it.
//!
//! # Where things are
//!
//! ```text
//! command    what goes in and comes out          apply       what commands do to sessions,
//! time       clocks and timeouts                 apply_lease   to leases,
//! session    the record, the sliding deadline    apply_lock    to locks
//! tombstone  what remains of a session           apply_ring    to rings
//! lease      the record, and what remains        settle      who is lost, and who is next
//! claim      a holder or waiter of a lock        expiry      deadlines and the sweep
//! lock       its claims and their queue          query       reads of sessions,
//! ring       its members                         query_lock    of leases and locks,
//! retry      remembered requests                 query_ring    of rings
//! records    all records and their indexes       codec       bytes ⇄ all of these
//! namespace  those of one namespace              codec_coordination  those of leases and locks
//! coordination  its leases, locks and rings      codec_ring  those of rings
//! void       Acquires cancelled before they came restore     a state from its records
//! level      what different builds agree on      digest      a digest of it all
//! attributes, packing: how records are made small
//! ```
//!
//! # Caveats
//!
//! A list steps over sessions that are due but have not been swept: right after a great many
//! expired at once it takes longer. So does one of locks whose leases have ended in great numbers,
//! and of a long queue those count until they are swept. The default timeouts are the same for all
//! namespaces, as there are no stored policies yet.

mod apply;
mod apply_lease;
mod apply_lock;
mod apply_ring;
mod attributes;
mod claim;
mod codec;
mod codec_coordination;
mod codec_ring;
mod command;
mod coordination;
mod digest;
mod expiry;
mod lease;
mod level;
mod lock;
mod namespace;
mod packing;
mod query;
mod query_lock;
mod query_ring;
mod records;
mod restore;
mod retry;
mod ring;
mod session;
mod settle;
mod table;
mod time;
mod tombstone;
mod void;

#[cfg(test)]
mod codec_coordination_test;
#[cfg(test)]
mod codec_test;
#[cfg(test)]
mod coordination_bulk_test;
#[cfg(test)]
mod coordination_steps_test;
#[cfg(test)]
mod coordination_test;
#[cfg(test)]
mod expiry_test;
#[cfg(test)]
mod level_test;
#[cfg(test)]
mod model;
#[cfg(test)]
mod model_test;
#[cfg(test)]
mod script_lock_test;
#[cfg(test)]
mod script_test;

use std::sync::Arc;

use bytes::Bytes;

pub use attributes::Attributes;
pub use claim::{Claim, ClaimKey, ClaimState, LockKey, LockKind, LockMode};
pub use codec::*;
pub use command::*;
pub use digest::StateDigest;
pub use lease::{Lease, LeaseEnd, LeaseId, LeaseKey, LeaseTombstone};
pub use level::{FEATURE_LEVEL, FEATURE_LEVEL_BASE};
pub use namespace::NamespacePolicy;
pub use query::Page;
pub use query_lock::{ClaimView, LeaseView, LockView};
pub use query_ring::{MemberView, RingView};
pub use restore::{Restore, StateHeader};
pub use ring::{Member, MemberData, MemberKey, Ring, RingKey};
pub use session::{Session, TOUCH_GRANULARITY_MAX, TouchNeed, touch_granularity};
pub use time::*;
pub use tombstone::Tombstone;

use records::Records;

/// The replicated state.
///
/// - The clock never goes back, and nothing but `advance` moves it.
/// - The feature level is raised by a command and never goes down.
/// - The revision is raised by one by every command that changes anything, by every sweep step that
///   removes anything, by every expiry of a record that a command meets, and by every grant of a
///   lock, whose token it is; all changes of one revision come out of one call of `apply`.
/// - A command that is refused changes nothing, except that what it met may have expired before.
/// - States that were fed the same entries are equal, and so is one that was restored from
///   another's header and records: it answers everything alike from then on.
/// - No call does work in proportion to the number of records, except reading them all.
#[derive(Debug)]
pub struct State {
    feature_level: u32,
    clock: Stamp,
    revision: Revision,
    records: Records,
    policy: NamespacePolicy,
    /// Where session bodies are put together; kept for its allocation only.
    scratch: Vec<u8>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            feature_level: FEATURE_LEVEL_BASE,
            clock: Stamp::default(),
            revision: Revision::default(),
            records: Records::default(),
            policy: NamespacePolicy::default(),
            scratch: Vec::new(),
        }
    }
}

impl State {
    /// An empty state, at revision and time zero and at the lowest feature level.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins an entry: moves each clock forward to the stamp, never back. Whatever is due then is
    /// gone for every reader and every command at once, swept or not.
    pub fn advance(&mut self, stamp: Stamp) {
        self.clock = self.clock.max(stamp);
    }

    /// Applies one command at the current clock, and appends what it changed to `changes`, in order
    /// of revision. `resend` says that this may not be the first sending of it.
    ///
    /// Total and deterministic: what cannot be done is answered with a `Rejection`.
    pub fn apply(&mut self, command: &Command, resend: bool, changes: &mut Vec<Change>) -> Reply {
        let answer = match command {
            Command::CreateSession { .. } => self.create_session(command, resend, changes),
            Command::UpdateSession { .. } => self.update_session(command, resend, changes),
            Command::TouchSession { request, key } => self.touch_session(request, key, changes),
            Command::DeleteSession { .. } => self.delete_session(command, resend, changes),
            Command::GrantLease { .. }
            | Command::RenewLeases { .. }
            | Command::RevokeLease { .. }
            | Command::AcquireLock { .. }
            | Command::ReleaseLock { .. }
            | Command::CancelAcquire { .. }
            | Command::BreakLock { .. }
            | Command::JoinRing { .. }
            | Command::LeaveRing { .. } => self.coordinate(command, resend, changes),
            Command::Tick => Ok(self.sweep(changes)),
            Command::RaiseFeatureLevel { to } => self.raise_feature_level(*to),
        };
        answer.unwrap_or_else(|rejection| self.reject(rejection))
    }

    /// Has the processor fetch what these commands are about to look at, all at once: records lie
    /// all over the memory, and one after the other each would be waited for. Changes nothing.
    pub fn fetch<'a>(&self, commands: impl Iterator<Item = &'a Command>) {
        let keys: Vec<&SessionKey> = commands.filter_map(Command::key).collect();
        for run in keys.chunk_by(|a, b| a.namespace == b.namespace) {
            if let Some(records) = self.records.namespace(&run[0].namespace) {
                let digests: Vec<_> = run.iter().map(|key| key.digest).collect();
                records.sessions.fetch(&digests);
            }
        }
    }

    /// The answer to a command that did not decode.
    pub fn reject_malformed(&self) -> Reply {
        self.reject(Rejection::MalformedCommand)
    }

    /// The latest stamp.
    pub fn clock(&self) -> Stamp {
        self.clock
    }

    /// The revision of the last change.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// How many sessions are stored, including those that are due and have not been swept.
    pub fn sessions(&self) -> u64 {
        self.records.sessions()
    }

    /// How many tombstones are stored, including those that are due and have not been swept.
    pub fn tombstones(&self) -> u64 {
        self.records.tombstones()
    }

    /// How many leases are stored, including those that are due and have not been swept.
    pub fn leases(&self) -> u64 {
        self.records.leases()
    }

    /// How many claims on locks are stored, including those that are over and have not been swept.
    pub fn claims(&self) -> u64 {
        self.records.claims()
    }

    /// How many members of rings are stored, including those whose leases are due and have not been
    /// swept.
    pub fn members(&self) -> u64 {
        self.records.members()
    }

    /// Digest of feature level, revision and records. Costs nothing: it is kept up to date.
    pub fn digest(&self) -> StateDigest {
        digest::of_state(self.feature_level, self.revision, self.records.sum())
    }

    /// What the state is besides its records, encoded: see [`StateHeader::decode`].
    pub fn header(&self) -> Bytes {
        self.state_header().encode()
    }

    fn state_header(&self) -> StateHeader {
        StateHeader {
            feature_level: self.feature_level,
            clock: self.clock,
            revision: self.revision,
            sum: self.records.sum(),
            records: self.records.count(),
        }
    }

    /// All records, by namespace, kind and key.
    pub fn records(&self) -> impl Iterator<Item = (RecordKey, Record)> {
        self.records.iter()
    }

    fn reject(&self, rejection: Rejection) -> Reply {
        Reply { revision: self.revision, outcome: Outcome::Rejected(rejection) }
    }

    /// The revision of the next change.
    fn next_revision(&self) -> Revision {
        Revision(self.revision.0 + 1)
    }

    /// Puts a session in its place, at the current revision.
    fn put_session(
        &mut self,
        key: &SessionKey,
        after: Option<Session>,
        cause: Cause,
        changes: &mut Vec<Change>,
    ) {
        let after = after.map(Arc::new);
        let before = self.records.replace_session(key, after.clone());
        changes.push(Change {
            revision: self.revision,
            key: RecordKey::Session(self.records.shared_key(key)),
            before: before.map(Record::Session),
            after: after.map(Record::Session),
            cause,
        });
    }

    /// The same for a tombstone.
    fn put_tombstone(
        &mut self,
        key: &SessionKey,
        after: Option<Tombstone>,
        cause: Cause,
        changes: &mut Vec<Change>,
    ) {
        let after = after.map(Arc::new);
        let before = self.records.replace_tombstone(key, after.clone());
        changes.push(Change {
            revision: self.revision,
            key: RecordKey::Tombstone(self.records.shared_key(key)),
            before: before.map(Record::Tombstone),
            after: after.map(Record::Tombstone),
            cause,
        });
    }
}
