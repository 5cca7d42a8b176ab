//! One namespace's records, and the indexes over them.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;

use super::command::Digest;
use super::coordination::Coordination;
use super::session::Session;
use super::table::SessionTable;
use super::time::{Timeout, Timestamp};
use super::tombstone::Tombstone;
use crate::limits::IDLE_TIMEOUT_DEFAULT;

/// What holds for the sessions of a namespace unless a command says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespacePolicy {
    /// For a Create without an idle timeout.
    pub idle_timeout: Timeout,
    /// For a Create without an absolute timeout.
    pub absolute_timeout: Timeout,
}

impl Default for NamespacePolicy {
    fn default() -> Self {
        Self {
            idle_timeout: Timeout::After(IDLE_TIMEOUT_DEFAULT),
            absolute_timeout: Timeout::Never,
        }
    }
}

/// Which record of a namespace; in this order where deadlines are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Session,
    Tombstone,
    LeaseTombstone,
}

/// The records of one namespace.
///
/// - `principals` holds exactly the sessions that have a principal.
/// - `deadlines` holds exactly the sessions that have a deadline, and all tombstones.
/// - A key has a session or a tombstone or neither, never both.
#[derive(Debug, Default)]
pub(super) struct NamespaceRecords {
    pub(super) sessions: SessionTable,
    tombstones: BTreeMap<Digest, Arc<Tombstone>>,
    /// One flat set: a set for each principal would cost its own node, some 200 bytes, and most
    /// users have a session or two.
    principals: BTreeSet<(Arc<str>, Digest)>,
    /// By kind, which keeps entries at 24 bytes.
    session_deadlines: BTreeSet<(Timestamp, Digest)>,
    tombstone_deadlines: BTreeSet<(Timestamp, Digest)>,
    /// Leases and locks.
    pub(super) coordination: Coordination,
}

impl NamespaceRecords {
    /// Fills an empty namespace at once, much faster than record by record.
    ///
    /// `None` if a key occurs twice.
    pub(super) fn build(
        mut sessions: Vec<(Digest, Arc<Session>)>,
        mut tombstones: Vec<(Digest, Arc<Tombstone>)>,
    ) -> Option<Self> {
        sessions.sort_unstable_by_key(|(digest, _)| *digest);
        tombstones.sort_unstable_by_key(|(digest, _)| *digest);
        let is_alone = |(digest, _): &(Digest, _)| {
            tombstones.binary_search_by_key(digest, |(digest, _)| *digest).is_err()
        };
        let is_distinct = sessions.is_sorted_by(|a, b| a.0 < b.0)
            && tombstones.is_sorted_by(|a, b| a.0 < b.0)
            && (tombstones.is_empty() || sessions.iter().all(is_alone));
        if !is_distinct {
            return None;
        }
        let deadline = |(digest, session): &(Digest, Arc<Session>)| {
            session.deadline().map(|deadline| (deadline, *digest))
        };
        let session_deadlines = sessions.iter().filter_map(deadline).collect();
        let deadline =
            |(digest, tombstone): &(Digest, Arc<Tombstone>)| (tombstone.deadline(), *digest);
        let tombstone_deadlines = tombstones.iter().map(deadline).collect();
        let principal = |(digest, session): &(Digest, Arc<Session>)| {
            session.principal().map(|principal| (Arc::from(principal), *digest))
        };
        let principals = sessions.iter().filter_map(principal).collect();
        Some(Self {
            sessions: SessionTable::build(sessions),
            tombstones: tombstones.into_iter().collect(),
            principals,
            session_deadlines,
            tombstone_deadlines,
            coordination: Coordination::default(),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sessions.is_empty() && self.tombstones.is_empty() && self.coordination.is_empty()
    }

    pub(super) fn tombstone(&self, digest: &Digest) -> Option<&Arc<Tombstone>> {
        self.tombstones.get(digest)
    }

    pub(super) fn tombstones(&self) -> impl Iterator<Item = (&Digest, &Arc<Tombstone>)> {
        self.tombstones.iter()
    }

    /// The sessions of a principal behind `after`, or all of them, ordered by digest.
    pub(super) fn of_principal(
        &self,
        principal: &Arc<str>,
        after: Option<Digest>,
    ) -> impl Iterator<Item = Digest> {
        let start = match after {
            None => Bound::Included((principal.clone(), Digest([0; 16]))),
            Some(after) => Bound::Excluded((principal.clone(), after)),
        };
        let range = self.principals.range((start, Bound::Unbounded));
        range.take_while(move |(other, _)| other == principal).map(|(_, digest)| *digest)
    }

    /// The record that is due first in cluster time.
    pub(super) fn first_deadline(&self) -> Option<(Timestamp, Kind, Digest)> {
        let session = self.session_deadlines.first();
        let tombstone = self.tombstone_deadlines.first();
        let session = session.map(|(deadline, digest)| (*deadline, Kind::Session, *digest));
        let tombstone = tombstone.map(|(deadline, digest)| (*deadline, Kind::Tombstone, *digest));
        let lease = self.coordination.first_tombstone();
        let lease = lease.map(|(deadline, id)| (deadline, Kind::LeaseTombstone, Digest(id.0)));
        session.into_iter().chain(tombstone).chain(lease).min()
    }

    /// Puts a session in the place of what was there, or removes it. Returns what was there.
    pub(super) fn replace_session(
        &mut self,
        digest: Digest,
        after: Option<Arc<Session>>,
    ) -> Option<Arc<Session>> {
        let before = match &after {
            Some(session) => self.sessions.insert(digest, session.clone()),
            None => self.sessions.remove(&digest),
        };
        let old = before.as_deref().and_then(Session::deadline);
        let new = after.as_deref().and_then(Session::deadline);
        reindex(&mut self.session_deadlines, digest, old, new);

        let old = before.as_deref().and_then(Session::principal);
        let new = after.as_deref().and_then(Session::principal);
        if old != new {
            if let Some(principal) = old {
                assert!(self.principals.remove(&(Arc::from(principal), digest)));
            }
            if let Some(principal) = new {
                let principal = self.shared_name(principal);
                assert!(self.principals.insert((principal, digest)));
            }
        }
        before
    }

    /// The same for a tombstone.
    pub(super) fn replace_tombstone(
        &mut self,
        digest: Digest,
        after: Option<Arc<Tombstone>>,
    ) -> Option<Arc<Tombstone>> {
        let before = match &after {
            Some(tombstone) => self.tombstones.insert(digest, tombstone.clone()),
            None => self.tombstones.remove(&digest),
        };
        let old = before.as_deref().map(Tombstone::deadline);
        let new = after.as_deref().map(Tombstone::deadline);
        reindex(&mut self.tombstone_deadlines, digest, old, new);
        before
    }

    /// A principal's name, shared with the index if it is in there.
    fn shared_name(&self, principal: &str) -> Arc<str> {
        let principal: Arc<str> = Arc::from(principal);
        let start = Bound::Included((principal.clone(), Digest([0; 16])));
        match self.principals.range((start, Bound::Unbounded)).next() {
            Some((name, _)) if *name == principal => name.clone(),
            _ => principal,
        }
    }
}

/// Moves one entry of a deadline index.
fn reindex(
    index: &mut BTreeSet<(Timestamp, Digest)>,
    digest: Digest,
    old: Option<Timestamp>,
    new: Option<Timestamp>,
) {
    if old == new {
        return;
    }
    if let Some(deadline) = old {
        assert!(index.remove(&(deadline, digest)), "each deadline is in the index");
    }
    if let Some(deadline) = new {
        assert!(index.insert((deadline, digest)), "no deadline is in the index twice");
    }
}

#[cfg(test)]
impl NamespaceRecords {
    /// Compares the indexes with a scan of the records.
    pub(super) fn check(&self) {
        self.sessions.check();
        let deadline = |(digest, session): (&Digest, &Arc<Session>)| {
            session.deadline().map(|deadline| (deadline, *digest))
        };
        let deadlines: BTreeSet<_> = self.sessions.range(None).filter_map(deadline).collect();
        assert_eq!(self.session_deadlines, deadlines);
        let deadline = |(digest, tombstone): (&Digest, &Arc<Tombstone>)| {
            assert!(self.sessions.get(digest).is_none(), "{digest} is both alive and gone");
            (tombstone.deadline(), *digest)
        };
        let deadlines: BTreeSet<_> = self.tombstones().map(deadline).collect();
        assert_eq!(self.tombstone_deadlines, deadlines);
        let principal = |(digest, session): (&Digest, &Arc<Session>)| {
            session.principal().map(|principal| (Arc::from(principal), *digest))
        };
        let principals: BTreeSet<_> = self.sessions.range(None).filter_map(principal).collect();
        assert_eq!(self.principals, principals);
        self.coordination.check();
    }
}
