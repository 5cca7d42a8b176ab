//! All records, by namespace, and what is derived from all of them: which is due first, how many
//! there are, and the sum of their hashes. Nothing else writes a record, so nothing can forget an
//! index.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::command::{Digest, Namespace, Record, RecordKey, SessionKey};
use super::namespace::{Kind, NamespaceRecords};
use super::session::Session;
use super::time::Timestamp;
use super::tombstone::Tombstone;

/// All records.
///
/// - A namespace without records does not exist, so names that came and went leave nothing behind.
/// - `first_deadlines` holds the earliest deadline of each namespace that has one, and each
///   namespace knows its own entry.
/// - Everything here follows from the records alone, whatever the order in which they came: a
///   restored copy sweeps in the same order and has the same digest.
#[derive(Debug, Default)]
pub(super) struct Records {
    namespaces: BTreeMap<Namespace, Place>,
    first_deadlines: BTreeSet<(Timestamp, Namespace)>,
    sum: u64,
    sessions: u64,
    tombstones: u64,
}

/// A namespace in its place.
#[derive(Debug, Default)]
struct Place {
    records: NamespaceRecords,
    /// Its entry in `first_deadlines`.
    first_deadline: Option<Timestamp>,
}

impl Records {
    pub(super) fn namespace(&self, name: &Namespace) -> Option<&NamespaceRecords> {
        self.namespaces.get(name).map(|place| &place.records)
    }

    pub(super) fn session(&self, key: &SessionKey) -> Option<&Arc<Session>> {
        self.namespace(&key.namespace)?.sessions.get(&key.digest)
    }

    pub(super) fn tombstone(&self, key: &SessionKey) -> Option<&Arc<Tombstone>> {
        self.namespace(&key.namespace)?.tombstone(&key.digest)
    }

    /// `key`, with the name of its namespace shared with this state rather than with the command
    /// that it came in.
    pub(super) fn shared_key(&self, key: &SessionKey) -> SessionKey {
        match self.namespaces.get_key_value(&key.namespace) {
            Some((namespace, _)) => SessionKey { namespace: namespace.clone(), digest: key.digest },
            None => key.clone(),
        }
    }

    /// The record that is due first, and when. Equal deadlines are ordered by namespace, kind and
    /// digest.
    pub(super) fn first_deadline(&self) -> Option<(Timestamp, RecordKey)> {
        let (deadline, namespace) = self.first_deadlines.first()?;
        let records = self.namespace(namespace).expect("only what exists has a deadline");
        let (first, kind, digest) = records.first_deadline().expect("it has a deadline");
        assert_eq!(first, *deadline, "a namespace's entry is its earliest deadline");
        let key = SessionKey { namespace: namespace.clone(), digest };
        let key = match kind {
            Kind::Session => RecordKey::Session(key),
            Kind::Tombstone => RecordKey::Tombstone(key),
        };
        Some((first, key))
    }

    /// When the first record is due.
    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        self.first_deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Puts a session in the place of what was there, or removes it. Returns what was there.
    pub(super) fn replace_session(
        &mut self,
        key: &SessionKey,
        after: Option<Arc<Session>>,
    ) -> Option<Arc<Session>> {
        let new = after.as_deref().map(Session::hash);
        let before =
            self.change(&key.namespace, |records| records.replace_session(key.digest, after));
        let old = before.as_deref().map(Session::hash);
        account(&mut self.sum, &mut self.sessions, old, new);
        before
    }

    /// The same for a tombstone.
    pub(super) fn replace_tombstone(
        &mut self,
        key: &SessionKey,
        after: Option<Arc<Tombstone>>,
    ) -> Option<Arc<Tombstone>> {
        let new = after.as_deref().map(Tombstone::hash);
        let before =
            self.change(&key.namespace, |records| records.replace_tombstone(key.digest, after));
        let old = before.as_deref().map(Tombstone::hash);
        account(&mut self.sum, &mut self.tombstones, old, new);
        before
    }

    /// Adds a whole namespace to those that are there. `false` if it is there already.
    pub(super) fn add_namespace(&mut self, name: Namespace, records: NamespaceRecords) -> bool {
        if records.is_empty() {
            return true;
        }
        if self.namespaces.contains_key(&name) {
            return false;
        }
        for (_, session) in records.sessions.range(None) {
            account(&mut self.sum, &mut self.sessions, None, Some(session.hash()));
        }
        for (_, tombstone) in records.tombstones() {
            account(&mut self.sum, &mut self.tombstones, None, Some(tombstone.hash()));
        }
        self.change(&name, |place| *place = records);
        true
    }

    pub(super) fn sessions(&self) -> u64 {
        self.sessions
    }

    pub(super) fn tombstones(&self) -> u64 {
        self.tombstones
    }

    /// Sum of the hashes of all records, modulo 2^64.
    pub(super) fn sum(&self) -> u64 {
        self.sum
    }

    /// All records, by namespace, kind and digest.
    pub(super) fn iter(&self) -> impl Iterator<Item = (RecordKey, Record)> {
        self.namespaces.iter().flat_map(|(namespace, place)| {
            let key =
                |digest: &Digest| SessionKey { namespace: namespace.clone(), digest: *digest };
            let sessions = place.records.sessions.range(None).map(move |(digest, session)| {
                (RecordKey::Session(key(digest)), Record::Session(session.clone()))
            });
            let tombstones = place.records.tombstones().map(move |(digest, tombstone)| {
                (RecordKey::Tombstone(key(digest)), Record::Tombstone(tombstone.clone()))
            });
            sessions.chain(tombstones)
        })
    }

    /// Changes records of one namespace, and brings its place among the others up to date.
    fn change<T>(
        &mut self,
        name: &Namespace,
        change: impl FnOnce(&mut NamespaceRecords) -> T,
    ) -> T {
        if !self.namespaces.contains_key(name) {
            self.namespaces.insert(name.clone(), Place::default());
        }
        let place = self.namespaces.get_mut(name).expect("it is there, or was made");
        let changed = change(&mut place.records);
        let first = place.records.first_deadline().map(|(deadline, ..)| deadline);
        if first != place.first_deadline {
            if let Some(deadline) = place.first_deadline {
                assert!(self.first_deadlines.remove(&(deadline, name.clone())));
            }
            if let Some(deadline) = first {
                assert!(self.first_deadlines.insert((deadline, name.clone())));
            }
            place.first_deadline = first;
        }
        if place.records.is_empty() {
            self.namespaces.remove(name);
        }
        changed
    }
}

/// Takes one record's hash out of the sum, puts one in, and counts.
fn account(sum: &mut u64, count: &mut u64, old: Option<u64>, new: Option<u64>) {
    *sum = sum.wrapping_sub(old.unwrap_or(0)).wrapping_add(new.unwrap_or(0));
    *count = *count + u64::from(new.is_some()) - u64::from(old.is_some());
}

#[cfg(test)]
impl Records {
    /// Compares everything that is derived with what it is derived from.
    pub(super) fn check(&self) {
        let mut firsts = BTreeSet::new();
        let (mut sum, mut sessions, mut tombstones) = (0, 0, 0);
        for (name, place) in &self.namespaces {
            assert!(!place.records.is_empty(), "{name} is empty");
            place.records.check();
            let first = place.records.first_deadline().map(|(deadline, ..)| deadline);
            assert_eq!(place.first_deadline, first, "{name}");
            firsts.extend(first.map(|deadline| (deadline, name.clone())));
            for (_, session) in place.records.sessions.range(None) {
                account(&mut sum, &mut sessions, None, Some(session.hash()));
            }
            for (_, tombstone) in place.records.tombstones() {
                account(&mut sum, &mut tombstones, None, Some(tombstone.hash()));
            }
        }
        assert_eq!(self.first_deadlines, firsts);
        let found = (self.sum, self.sessions, self.tombstones);
        assert_eq!(found, (sum, sessions, tombstones));
    }
}
