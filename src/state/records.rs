//! All records, by namespace, and what is derived from all of them: which is due first, how many
//! there are, and the sum of their hashes. Nothing else writes a record, so nothing can forget an
//! index.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::claim::{Claim, ClaimKey, LockKey};
use super::command::{Digest, Namespace, Record, RecordKey, SessionKey};
use super::coordination::{Backlog, Coordination, SteadyDue};
use super::lease::{Lease, LeaseId, LeaseKey, LeaseTombstone};
use super::lock::Lock;
use super::namespace::{Kind, NamespaceRecords};
use super::session::Session;
use super::time::Timestamp;
use super::tombstone::Tombstone;

/// All records.
///
/// - A namespace without records does not exist, so names that came and went leave nothing behind.
/// - `first_deadlines` and `first_steady_deadlines` hold the earliest deadline of each namespace
///   that has one, by clock, `backlogs` the namespaces where work was left over; and each namespace
///   knows its own entries.
/// - Everything here follows from the records alone, whatever the order in which they came: a
///   restored copy sweeps in the same order and has the same digest.
#[derive(Debug, Default)]
pub(super) struct Records {
    namespaces: BTreeMap<Namespace, Place>,
    first_deadlines: BTreeSet<(Timestamp, Namespace)>,
    first_steady_deadlines: BTreeSet<(Timestamp, Namespace)>,
    backlogs: BTreeSet<Namespace>,
    sum: u64,
    sessions: u64,
    tombstones: u64,
    leases: u64,
    lease_tombstones: u64,
    claims: u64,
}

/// A namespace in its place.
#[derive(Debug, Default)]
struct Place {
    records: NamespaceRecords,
    /// Its entry in `first_deadlines`.
    first_deadline: Option<Timestamp>,
    /// Its entry in `first_steady_deadlines`.
    first_steady_deadline: Option<Timestamp>,
    /// Whether it is in `backlogs`.
    has_backlog: bool,
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

    pub(super) fn coordination(&self, name: &Namespace) -> Option<&Coordination> {
        self.namespace(name).map(|records| &records.coordination)
    }

    pub(super) fn lease(&self, key: &LeaseKey) -> Option<&Arc<Lease>> {
        self.coordination(&key.namespace)?.lease(key.id)
    }

    pub(super) fn lease_tombstone(&self, key: &LeaseKey) -> Option<&Arc<LeaseTombstone>> {
        self.coordination(&key.namespace)?.tombstone(key.id)
    }

    pub(super) fn lock(&self, key: &LockKey) -> Option<&Lock> {
        self.coordination(&key.namespace)?.lock(&key.name)
    }

    pub(super) fn claim(&self, key: &ClaimKey) -> Option<&Arc<Claim>> {
        self.lock(&key.lock)?.claim(key.order)
    }

    /// `key`, with its names shared with this state rather than with the command that it came in.
    pub(super) fn shared_lock_key(&self, key: &LockKey) -> LockKey {
        match self.namespaces.get_key_value(&key.namespace) {
            Some((namespace, place)) => LockKey {
                namespace: namespace.clone(),
                name: place.records.coordination.shared_name(&key.name),
            },
            None => key.clone(),
        }
    }

    /// The same for a lease's key.
    pub(super) fn shared_lease_key(&self, key: &LeaseKey) -> LeaseKey {
        match self.namespaces.get_key_value(&key.namespace) {
            Some((namespace, _)) => LeaseKey { namespace: namespace.clone(), id: key.id },
            None => key.clone(),
        }
    }

    /// `key`, with the name of its namespace shared with this state rather than with the command
    /// that it came in.
    pub(super) fn shared_key(&self, key: &SessionKey) -> SessionKey {
        match self.namespaces.get_key_value(&key.namespace) {
            Some((namespace, _)) => SessionKey { namespace: namespace.clone(), digest: key.digest },
            None => key.clone(),
        }
    }

    /// The record that is due first in cluster time, and when. Equal deadlines are ordered by
    /// namespace, kind and digest.
    pub(super) fn first_deadline(&self) -> Option<(Timestamp, RecordKey)> {
        let (deadline, namespace) = self.first_deadlines.first()?;
        let records = self.namespace(namespace).expect("only what exists has a deadline");
        let (first, kind, digest) = records.first_deadline().expect("it has a deadline");
        assert_eq!(first, *deadline, "a namespace's entry is its earliest deadline");
        let namespace = namespace.clone();
        let key = match kind {
            Kind::Session => RecordKey::Session(SessionKey { namespace, digest }),
            Kind::Tombstone => RecordKey::Tombstone(SessionKey { namespace, digest }),
            Kind::LeaseTombstone => {
                RecordKey::LeaseTombstone(LeaseKey { namespace, id: LeaseId(digest.0) })
            }
        };
        Some((first, key))
    }

    /// What is due first on the steady clock, and when. Equal deadlines are ordered by namespace,
    /// leases before claims, and name.
    pub(super) fn first_steady(&self) -> Option<(Timestamp, RecordKey)> {
        let (_, namespace) = self.first_steady_deadlines.first()?;
        let (deadline, due) = self.coordination(namespace)?.first_steady()?;
        let namespace = namespace.clone();
        let key = match due {
            SteadyDue::Lease(id) => RecordKey::Lease(LeaseKey { namespace, id }),
            SteadyDue::Claim(name, order) => {
                RecordKey::Claim(ClaimKey { lock: LockKey { namespace, name }, order })
            }
        };
        Some((deadline, key))
    }

    /// Work that was left over, and where.
    pub(super) fn first_backlog(&self) -> Option<(Namespace, Backlog)> {
        let namespace = self.backlogs.first()?;
        Some((namespace.clone(), self.coordination(namespace)?.first_backlog()?))
    }

    pub(super) fn has_backlog(&self) -> bool {
        !self.backlogs.is_empty()
    }

    /// When the first of what lives by the steady clock is due.
    pub(super) fn next_steady_deadline(&self) -> Option<Timestamp> {
        self.first_steady_deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// When the first of what lives by cluster time is due.
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

    /// The same for a lease.
    pub(super) fn replace_lease(
        &mut self,
        key: &LeaseKey,
        after: Option<Arc<Lease>>,
    ) -> Option<Arc<Lease>> {
        let new = after.as_deref().map(Lease::hash);
        let replace =
            |records: &mut NamespaceRecords| records.coordination.replace_lease(key.id, after);
        let before = self.change(&key.namespace, replace);
        let old = before.as_deref().map(Lease::hash);
        account(&mut self.sum, &mut self.leases, old, new);
        before
    }

    /// The same for what remains of a lease.
    pub(super) fn replace_lease_tombstone(
        &mut self,
        key: &LeaseKey,
        after: Option<Arc<LeaseTombstone>>,
    ) -> Option<Arc<LeaseTombstone>> {
        let new = after.as_deref().map(LeaseTombstone::hash);
        let replace =
            |records: &mut NamespaceRecords| records.coordination.replace_tombstone(key.id, after);
        let before = self.change(&key.namespace, replace);
        let old = before.as_deref().map(LeaseTombstone::hash);
        account(&mut self.sum, &mut self.lease_tombstones, old, new);
        before
    }

    /// The same for a claim.
    pub(super) fn replace_claim(
        &mut self,
        key: &ClaimKey,
        after: Option<Arc<Claim>>,
    ) -> Option<Arc<Claim>> {
        let ClaimKey { lock: LockKey { namespace, name }, order } = key;
        let new = after.as_deref().map(|claim| claim.hash);
        let replace = |records: &mut NamespaceRecords| {
            records.coordination.replace_claim(name, *order, after)
        };
        let before = self.change(namespace, replace);
        let old = before.as_deref().map(|claim| claim.hash);
        account(&mut self.sum, &mut self.claims, old, new);
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
        for (_, lease) in records.coordination.leases(None) {
            account(&mut self.sum, &mut self.leases, None, Some(lease.hash()));
        }
        for (_, tombstone) in records.coordination.tombstones() {
            account(&mut self.sum, &mut self.lease_tombstones, None, Some(tombstone.hash()));
        }
        for (_, lock) in records.coordination.locks(None) {
            for (_, claim) in lock.claims() {
                account(&mut self.sum, &mut self.claims, None, Some(claim.hash));
            }
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

    pub(super) fn leases(&self) -> u64 {
        self.leases
    }

    pub(super) fn claims(&self) -> u64 {
        self.claims
    }

    /// How many records there are of all kinds.
    pub(super) fn count(&self) -> u64 {
        self.sessions + self.tombstones + self.leases + self.lease_tombstones + self.claims
    }

    /// Sum of the hashes of all records, modulo 2^64.
    pub(super) fn sum(&self) -> u64 {
        self.sum
    }

    /// All records, by namespace, kind and key.
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
            let coordination = coordination_records(namespace, &place.records.coordination);
            sessions.chain(tombstones).chain(coordination)
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
        let first = place.records.coordination.first_steady_deadline();
        if first != place.first_steady_deadline {
            if let Some(deadline) = place.first_steady_deadline {
                assert!(self.first_steady_deadlines.remove(&(deadline, name.clone())));
            }
            if let Some(deadline) = first {
                assert!(self.first_steady_deadlines.insert((deadline, name.clone())));
            }
            place.first_steady_deadline = first;
        }
        let has_backlog = place.records.coordination.has_backlog();
        if has_backlog != place.has_backlog {
            if has_backlog {
                assert!(self.backlogs.insert(name.clone()));
            } else {
                assert!(self.backlogs.remove(name));
            }
            place.has_backlog = has_backlog;
        }
        if place.records.is_empty() {
            self.namespaces.remove(name);
        }
        changed
    }
}

/// The leases of a namespace, what remains of others, and the claims.
fn coordination_records(
    namespace: &Namespace,
    coordination: &Coordination,
) -> impl Iterator<Item = (RecordKey, Record)> {
    let key = |id: LeaseId| LeaseKey { namespace: namespace.clone(), id };
    let leases = coordination
        .leases(None)
        .map(move |(id, lease)| (RecordKey::Lease(key(id)), Record::Lease(lease.clone())));
    let tombstones = coordination.tombstones().map(move |(id, tombstone)| {
        (RecordKey::LeaseTombstone(key(id)), Record::LeaseTombstone(tombstone.clone()))
    });
    let claims = coordination.locks(None).flat_map(move |(name, lock)| {
        let lock_key = LockKey { namespace: namespace.clone(), name: name.clone() };
        lock.claims().map(move |(order, claim)| {
            let key = ClaimKey { lock: lock_key.clone(), order };
            (RecordKey::Claim(key), Record::Claim(claim.clone()))
        })
    });
    leases.chain(tombstones).chain(claims)
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
        let (mut firsts, mut steady_firsts) = (BTreeSet::new(), BTreeSet::new());
        let mut backlogs = BTreeSet::new();
        for (name, place) in &self.namespaces {
            assert!(!place.records.is_empty(), "{name} is empty");
            place.records.check();
            let first = place.records.first_deadline().map(|(deadline, ..)| deadline);
            assert_eq!(place.first_deadline, first, "{name}");
            firsts.extend(first.map(|deadline| (deadline, name.clone())));
            let first = place.records.coordination.first_steady_deadline();
            assert_eq!(place.first_steady_deadline, first, "{name}");
            steady_firsts.extend(first.map(|deadline| (deadline, name.clone())));
            let has_backlog = place.records.coordination.has_backlog();
            assert_eq!(place.has_backlog, has_backlog, "{name}");
            backlogs.extend(has_backlog.then(|| name.clone()));
        }
        assert_eq!(self.first_deadlines, firsts);
        assert_eq!(self.first_steady_deadlines, steady_firsts);
        assert_eq!(self.backlogs, backlogs);
        let (mut sum, mut counts) = (0, [0; 5]);
        for (_, record) in self.iter() {
            let (kind, hash) = match record {
                Record::Session(session) => (0, session.hash()),
                Record::Tombstone(tombstone) => (1, tombstone.hash()),
                Record::Lease(lease) => (2, lease.hash()),
                Record::LeaseTombstone(tombstone) => (3, tombstone.hash()),
                Record::Claim(claim) => (4, claim.hash),
            };
            account(&mut sum, &mut counts[kind], None, Some(hash));
        }
        let found =
            [self.sessions, self.tombstones, self.leases, self.lease_tombstones, self.claims];
        assert_eq!((self.sum, found), (sum, counts));
    }
}
