//! The leases of one namespace, what hangs from them, and the indexes over it all.
//!
//! Claims on locks and members of rings hang from leases. Each is a record of its own kind with a
//! table here, a kind of tie by which the end of the lease finds it, and a function in `settle`
//! which says what that end does to it. What else is to hang from one goes the same way.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::claim::Claim;
use super::command::Revision;
use super::lease::{Lease, LeaseId, LeaseTombstone};
use super::lock::Lock;
use super::ring::{Member, Ring, RingPlace};
use super::time::Timestamp;

/// Leases, locks and rings of a namespace.
///
/// - An id has a lease or a tombstone or neither, never both.
/// - `ties` holds exactly the claims that go when their lease does, `member_ties` exactly the
///   members, and each lease knows how many those are.
/// - `orphaned` holds exactly the ids of ties whose lease is not there.
/// - `grantable` holds exactly the locks whose first waiter there is room for.
/// - Each lease, each tombstone, and each claim that has one, is in the index of its deadline.
/// - Everything but the records follows from them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Coordination {
    leases: BTreeMap<LeaseId, LeasePlace>,
    tombstones: BTreeMap<LeaseId, Arc<LeaseTombstone>>,
    locks: BTreeMap<Arc<str>, Lock>,
    rings: BTreeMap<Arc<str>, RingPlace>,
    ties: BTreeSet<Tie>,
    member_ties: BTreeSet<MemberTie>,
    orphaned: BTreeSet<LeaseId>,
    grantable: BTreeSet<Arc<str>>,
    /// On the steady clock.
    lease_deadlines: BTreeSet<(Timestamp, LeaseId)>,
    /// On the steady clock.
    claim_deadlines: BTreeSet<(Timestamp, ClaimName)>,
    /// In cluster time.
    tombstone_deadlines: BTreeSet<(Timestamp, LeaseId)>,
}

/// A lease in its place.
#[derive(Debug, PartialEq, Eq)]
struct LeasePlace {
    lease: Arc<Lease>,
    claims: usize,
    members: usize,
}

/// By which a lease finds its claims, and an Acquire the claim that it made: lease, request id,
/// lock, order.
type Tie = (LeaseId, u64, Arc<str>, Revision);

/// What names a member within a namespace: its ring's name, and its own.
pub(super) type MemberName = (Arc<str>, Arc<str>);

/// By which a lease finds its members: lease, ring, member.
type MemberTie = (LeaseId, Arc<str>, Arc<str>);

/// What names a claim within a namespace: its lock's name, and its order.
pub(super) type ClaimName = (Arc<str>, Revision);

/// What is due on the steady clock; in this order where deadlines are equal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SteadyDue {
    Lease(LeaseId),
    Claim(Arc<str>, Revision),
}

/// Work that was left because a step is bounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Backlog {
    /// A lease has ended, and this claim of it has not.
    Orphan(Arc<str>, Revision),
    /// A lease has ended, and this member of a ring has not: ring and member.
    OrphanMember(Arc<str>, Arc<str>),
    /// Somebody waits for this lock and could have it.
    Grantable(Arc<str>),
}

/// The records of it all, in any order within each kind.
#[derive(Debug, Default)]
pub(super) struct CoordinationRecords {
    pub(super) leases: Vec<(LeaseId, Arc<Lease>)>,
    pub(super) tombstones: Vec<(LeaseId, Arc<LeaseTombstone>)>,
    pub(super) claims: Vec<(ClaimName, Arc<Claim>)>,
    pub(super) rings: Vec<(Arc<str>, Arc<Ring>)>,
    pub(super) members: Vec<(MemberName, Arc<Member>)>,
}

impl Coordination {
    /// Makes it from records.
    ///
    /// `None` if a key occurs twice, or claims or members do not go together.
    pub(super) fn build(records: CoordinationRecords) -> Option<Self> {
        let CoordinationRecords { leases, tombstones, claims, rings, members } = records;
        let mut built = Self::default();
        for (id, lease) in leases {
            if built.replace_lease(id, Some(lease)).is_some() {
                return None;
            }
        }
        for (id, tombstone) in tombstones {
            let is_alive = built.leases.contains_key(&id);
            if built.replace_tombstone(id, Some(tombstone)).is_some() || is_alive {
                return None;
            }
        }
        for ((name, order), claim) in claims {
            let lock = built.locks.get(&name);
            if lock.is_some_and(|lock| !lock.accepts(order, &claim)) {
                return None;
            }
            let name = built.shared_name(&name);
            built.replace_claim(&name, order, Some(claim));
        }
        for (name, ring) in rings {
            if built.replace_ring(&name, Some(ring)).is_some() {
                return None;
            }
        }
        for ((ring, name), member) in members {
            let ring = built.shared_ring_name(&ring);
            if built.rings.get(&ring)?.members.contains_key(&name) {
                return None;
            }
            built.replace_member(&ring, &name, Some(member));
        }
        built.rings.values().all(RingPlace::is_sound).then_some(built)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.leases.is_empty()
            && self.tombstones.is_empty()
            && self.locks.is_empty()
            && self.rings.is_empty()
    }

    pub(super) fn lease(&self, id: LeaseId) -> Option<&Arc<Lease>> {
        self.leases.get(&id).map(|place| &place.lease)
    }

    pub(super) fn leases_count(&self) -> usize {
        self.leases.len()
    }

    /// Leases behind `after`, or all, by id.
    pub(super) fn leases(
        &self,
        after: Option<LeaseId>,
    ) -> impl Iterator<Item = (LeaseId, &Arc<Lease>)> {
        let start = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let range = self.leases.range((start, std::ops::Bound::Unbounded));
        range.map(|(id, place)| (*id, &place.lease))
    }

    pub(super) fn tombstone(&self, id: LeaseId) -> Option<&Arc<LeaseTombstone>> {
        self.tombstones.get(&id)
    }

    pub(super) fn tombstones(&self) -> impl Iterator<Item = (LeaseId, &Arc<LeaseTombstone>)> {
        self.tombstones.iter().map(|(id, tombstone)| (*id, tombstone))
    }

    pub(super) fn lock(&self, name: &str) -> Option<&Lock> {
        self.locks.get(name)
    }

    /// A lock, with its name as it is shared.
    pub(super) fn lock_entry(&self, name: &str) -> Option<(&Arc<str>, &Lock)> {
        self.locks.get_key_value(name)
    }

    /// Locks behind `after`, or all, by name.
    pub(super) fn locks(&self, after: Option<&str>) -> impl Iterator<Item = (&Arc<str>, &Lock)> {
        let start = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        self.locks.range::<str, _>((start, std::ops::Bound::Unbounded))
    }

    /// `name`, shared with the lock if it exists.
    pub(super) fn shared_name(&self, name: &Arc<str>) -> Arc<str> {
        self.locks.get_key_value(name).map_or(name, |(name, _)| name).clone()
    }

    /// The claim that a request made on a lease.
    pub(super) fn claim_of(
        &self,
        id: LeaseId,
        request: u64,
        name: &Arc<str>,
    ) -> Option<(Revision, &Arc<Claim>)> {
        let mut ties = self.ties.range((id, request, name.clone(), Revision(0))..);
        let (lease, made_by, lock, order) = ties.next()?;
        let is_it = *lease == id && *made_by == request && lock == name;
        is_it.then(|| Some((*order, self.lock(name)?.claim(*order)?))).flatten()
    }

    /// How many claims hang from a lease that is there.
    pub(super) fn claims_count(&self, id: LeaseId) -> usize {
        self.leases.get(&id).map_or(0, |place| place.claims)
    }

    /// The claims that hang from a lease, whether it is still there or not.
    pub(super) fn ties(&self, id: LeaseId) -> impl Iterator<Item = (&Arc<str>, Revision)> {
        let start = (id, 0, Arc::from(""), Revision(0));
        let ties = self.ties.range(start..).take_while(move |(lease, ..)| *lease == id);
        ties.map(|(_, _, lock, order)| (lock, *order))
    }

    pub(super) fn ring(&self, name: &str) -> Option<&RingPlace> {
        self.rings.get(name)
    }

    /// Rings, by name.
    pub(super) fn rings(&self) -> impl Iterator<Item = (&Arc<str>, &RingPlace)> {
        self.rings.iter()
    }

    /// `name`, shared with the ring if it exists.
    pub(super) fn shared_ring_name(&self, name: &Arc<str>) -> Arc<str> {
        self.rings.get_key_value(name).map_or(name, |(name, _)| name).clone()
    }

    /// How many members of rings hang from a lease that is there.
    pub(super) fn members_count(&self, id: LeaseId) -> usize {
        self.leases.get(&id).map_or(0, |place| place.members)
    }

    /// The members that hang from a lease, whether it is still there or not: ring and member.
    pub(super) fn member_ties(&self, id: LeaseId) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        let start = (id, Arc::from(""), Arc::from(""));
        let ties = self.member_ties.range(start..).take_while(move |(lease, ..)| *lease == id);
        ties.map(|(_, ring, name)| (ring, name))
    }

    /// The lease that was due first, if any is.
    pub(super) fn first_due_lease(&self, steady: Timestamp) -> Option<LeaseId> {
        let (deadline, id) = self.lease_deadlines.first()?;
        (*deadline <= steady).then_some(*id)
    }

    /// Whether nothing here can hang from a lease that has ended.
    pub(super) fn is_settled(&self, steady: Timestamp) -> bool {
        let first = self.lease_deadlines.first();
        self.orphaned.is_empty() && first.is_none_or(|(deadline, _)| *deadline > steady)
    }

    /// Whether anything hangs from a lease that is not there any more.
    pub(super) fn is_orphaned(&self, id: LeaseId) -> bool {
        self.orphaned.contains(&id)
    }

    /// Work that was left over, if there is any.
    pub(super) fn first_backlog(&self) -> Option<Backlog> {
        if let Some(id) = self.orphaned.first() {
            let claim = self.ties(*id).next();
            let claim = claim.map(|(lock, order)| Backlog::Orphan(lock.clone(), order));
            return claim.or_else(|| {
                let (ring, name) = self.member_ties(*id).next().expect("it has ties");
                Some(Backlog::OrphanMember(ring.clone(), name.clone()))
            });
        }
        self.grantable.first().map(|name| Backlog::Grantable(name.clone()))
    }

    pub(super) fn has_backlog(&self) -> bool {
        !self.orphaned.is_empty() || !self.grantable.is_empty()
    }

    /// What is due first on the steady clock.
    pub(super) fn first_steady(&self) -> Option<(Timestamp, SteadyDue)> {
        let lease = self.lease_deadlines.first();
        let lease = lease.map(|(deadline, id)| (*deadline, SteadyDue::Lease(*id)));
        let claim = self
            .claim_deadlines
            .first()
            .map(|(deadline, (name, order))| (*deadline, SteadyDue::Claim(name.clone(), *order)));
        lease.into_iter().chain(claim).min()
    }

    /// When that is.
    pub(super) fn first_steady_deadline(&self) -> Option<Timestamp> {
        let lease = self.lease_deadlines.first().map(|(deadline, _)| *deadline);
        let claim = self.claim_deadlines.first().map(|(deadline, _)| *deadline);
        lease.into_iter().chain(claim).min()
    }

    /// The tombstone that is due first, in cluster time.
    pub(super) fn first_tombstone(&self) -> Option<(Timestamp, LeaseId)> {
        self.tombstone_deadlines.first().copied()
    }

    /// Puts a lease in the place of what was there, or removes it. Returns what was there.
    pub(super) fn replace_lease(
        &mut self,
        id: LeaseId,
        after: Option<Arc<Lease>>,
    ) -> Option<Arc<Lease>> {
        let new = after.as_deref().map(Lease::deadline);
        let before = match (self.leases.get_mut(&id), after) {
            (Some(place), Some(lease)) => Some(std::mem::replace(&mut place.lease, lease)),
            (Some(_), None) => {
                let place = self.leases.remove(&id).expect("it was found");
                if place.claims + place.members > 0 {
                    assert!(self.orphaned.insert(id), "a lease that was there was not orphaned");
                }
                Some(place.lease)
            }
            (None, Some(lease)) => {
                assert!(!self.is_orphaned(id), "nothing hangs from a lease before it is granted");
                self.leases.insert(id, LeasePlace { lease, claims: 0, members: 0 });
                None
            }
            (None, None) => None,
        };
        reindex(&mut self.lease_deadlines, id, before.as_deref().map(Lease::deadline), new);
        before
    }

    /// The same for a tombstone.
    pub(super) fn replace_tombstone(
        &mut self,
        id: LeaseId,
        after: Option<Arc<LeaseTombstone>>,
    ) -> Option<Arc<LeaseTombstone>> {
        let new = after.as_deref().map(LeaseTombstone::deadline);
        let before = match after {
            Some(tombstone) => self.tombstones.insert(id, tombstone),
            None => self.tombstones.remove(&id),
        };
        let old = before.as_deref().map(LeaseTombstone::deadline);
        reindex(&mut self.tombstone_deadlines, id, old, new);
        before
    }

    /// The same for a claim, which makes and unmakes its lock.
    pub(super) fn replace_claim(
        &mut self,
        name: &Arc<str>,
        order: Revision,
        after: Option<Arc<Claim>>,
    ) -> Option<Arc<Claim>> {
        if let (None, Some(claim)) = (self.locks.get(name), &after) {
            self.locks.insert(name.clone(), Lock::new(claim.mode.kind()));
        }
        let lock = self.locks.get_mut(name)?;
        let was_grantable = lock.is_grantable();
        let before = lock.replace(order, after.clone());
        let is_grantable = lock.is_grantable();
        if lock.is_empty() {
            self.locks.remove(name);
        }
        if was_grantable && !is_grantable {
            assert!(self.grantable.remove(name), "a grantable lock is in the index");
        } else if is_grantable && !was_grantable {
            assert!(self.grantable.insert(name.clone()), "no lock is in the index twice");
        }
        let old = before.as_deref().and_then(Claim::deadline);
        let new = after.as_deref().and_then(Claim::deadline);
        if old != new {
            reindex(&mut self.claim_deadlines, (name.clone(), order), old, new);
        }
        let (old, new) = (before.as_deref(), after.as_deref());
        match (old.filter(|claim| claim.is_tied()), new.filter(|claim| claim.is_tied())) {
            (None, Some(claim)) => self.tie(name, order, claim),
            (Some(claim), None) => self.untie(name, order, claim),
            // A claim keeps its lease and its request.
            (Some(_), Some(_)) | (None, None) => {}
        }
        before
    }

    /// Puts what is stored of a ring in the place of what was there, or removes it. Returns what
    /// was there.
    pub(super) fn replace_ring(
        &mut self,
        name: &Arc<str>,
        after: Option<Arc<Ring>>,
    ) -> Option<Arc<Ring>> {
        let place = self.rings.entry(name.clone()).or_default();
        let before = std::mem::replace(&mut place.record, after);
        if place.is_empty() {
            self.rings.remove(name);
        }
        before
    }

    /// The same for a member.
    pub(super) fn replace_member(
        &mut self,
        ring: &Arc<str>,
        name: &Arc<str>,
        after: Option<Arc<Member>>,
    ) -> Option<Arc<Member>> {
        let place = self.rings.entry(ring.clone()).or_default();
        let before = match &after {
            Some(member) => place.members.insert(name.clone(), member.clone()),
            None => place.members.remove(name),
        };
        if place.is_empty() {
            self.rings.remove(ring);
        }
        let (old, new) =
            (before.as_deref().map(Member::lease), after.as_deref().map(Member::lease));
        if old == new {
            return before;
        }
        if let Some(lease) = old {
            assert!(self.member_ties.remove(&(lease, ring.clone(), name.clone())));
            match self.leases.get_mut(&lease) {
                Some(place) => place.members -= 1,
                None => self.forget_if_free(lease),
            }
        }
        if let Some(lease) = new {
            assert!(self.member_ties.insert((lease, ring.clone(), name.clone())));
            match self.leases.get_mut(&lease) {
                Some(place) => place.members += 1,
                // Only a state that is being restored has such.
                None => _ = self.orphaned.insert(lease),
            }
        }
        before
    }

    fn tie(&mut self, name: &Arc<str>, order: Revision, claim: &Claim) {
        assert!(self.ties.insert((claim.lease, claim.request.id, name.clone(), order)));
        match self.leases.get_mut(&claim.lease) {
            Some(place) => place.claims += 1,
            // Only a state that is being restored has such.
            None => _ = self.orphaned.insert(claim.lease),
        }
    }

    fn untie(&mut self, name: &Arc<str>, order: Revision, claim: &Claim) {
        assert!(self.ties.remove(&(claim.lease, claim.request.id, name.clone(), order)));
        match self.leases.get_mut(&claim.lease) {
            Some(place) => place.claims -= 1,
            None => self.forget_if_free(claim.lease),
        }
    }

    /// Takes a lease that has ended, and from which something hung until now, out of the index if
    /// nothing does any more.
    fn forget_if_free(&mut self, id: LeaseId) {
        if self.ties(id).next().is_none() && self.member_ties(id).next().is_none() {
            assert!(self.orphaned.remove(&id), "it had a tie until now");
        }
    }
}

/// Moves one entry of a deadline index.
fn reindex<K: Ord + Clone>(
    index: &mut BTreeSet<(Timestamp, K)>,
    key: K,
    old: Option<Timestamp>,
    new: Option<Timestamp>,
) {
    if old == new {
        return;
    }
    if let Some(deadline) = old {
        assert!(index.remove(&(deadline, key.clone())), "each deadline is in the index");
    }
    if let Some(deadline) = new {
        assert!(index.insert((deadline, key)), "no deadline is in the index twice");
    }
}

#[cfg(test)]
impl Coordination {
    /// Compares everything that is derived with what the records alone say.
    pub(super) fn check(&self) {
        let leases = self.leases(None).map(|(id, lease)| (id, lease.clone()));
        let tombstones = self.tombstones().map(|(id, tombstone)| (id, tombstone.clone()));
        let claims = self.locks(None).flat_map(|(name, lock)| {
            assert!(!lock.is_empty(), "{name} is empty");
            lock.claims().map(|(order, claim)| ((name.clone(), order), claim.clone()))
        });
        let rings = self.rings().map(|(name, place)| {
            (name.clone(), place.record.clone().expect("a ring has a record between commands"))
        });
        let members = self.rings().flat_map(|(ring, place)| {
            let key = |(name, member): (&Arc<str>, &Arc<Member>)| {
                ((ring.clone(), name.clone()), member.clone())
            };
            place.members.iter().map(key).collect::<Vec<_>>()
        });
        let built = Self::build(CoordinationRecords {
            leases: leases.collect(),
            tombstones: tombstones.collect(),
            claims: claims.collect(),
            rings: rings.collect(),
            members: members.collect(),
        });
        assert_eq!(built.as_ref(), Some(self));
    }
}
