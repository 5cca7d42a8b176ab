//! The leases of one namespace, what hangs from them, and the indexes over it all.
//!
//! Claims on locks hang from leases today. What else is to hang from one (the members of a ring)
//! goes the same way: a record of its own kind with a table here, a kind of tie by which the end of
//! the lease finds it, and an arm in `settle` which says what that end does to it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::claim::Claim;
use super::command::Revision;
use super::lease::{Lease, LeaseId, LeaseTombstone};
use super::lock::Lock;
use super::time::Timestamp;

/// Leases and locks of a namespace.
///
/// - An id has a lease or a tombstone or neither, never both.
/// - `ties` holds exactly the claims that go when their lease does, and each lease knows how many
///   those are.
/// - `orphaned` holds exactly the ids of ties whose lease is not there.
/// - `grantable` holds exactly the locks whose first waiter there is room for.
/// - Each lease, each tombstone, and each claim that has one, is in the index of its deadline.
/// - Everything but the records follows from them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Coordination {
    leases: BTreeMap<LeaseId, LeasePlace>,
    tombstones: BTreeMap<LeaseId, Arc<LeaseTombstone>>,
    locks: BTreeMap<Arc<str>, Lock>,
    ties: BTreeSet<Tie>,
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
}

/// By which a lease finds its claims, and an Acquire the claim that it made: lease, request id,
/// lock, order.
type Tie = (LeaseId, u64, Arc<str>, Revision);

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
    /// Somebody waits for this lock and could have it.
    Grantable(Arc<str>),
}

impl Coordination {
    /// Makes it from records.
    ///
    /// `None` if a key occurs twice, or claims do not go together.
    pub(super) fn build(
        leases: Vec<(LeaseId, Arc<Lease>)>,
        tombstones: Vec<(LeaseId, Arc<LeaseTombstone>)>,
        claims: Vec<(ClaimName, Arc<Claim>)>,
    ) -> Option<Self> {
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
        Some(built)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.leases.is_empty() && self.tombstones.is_empty() && self.locks.is_empty()
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

    /// Whether anything hangs from a lease that is not there any more.
    pub(super) fn is_orphaned(&self, id: LeaseId) -> bool {
        self.orphaned.contains(&id)
    }

    /// Work that was left over, if there is any.
    pub(super) fn first_backlog(&self) -> Option<Backlog> {
        if let Some(id) = self.orphaned.first() {
            let (lock, order) = self.ties(*id).next().expect("an orphaned lease has ties");
            return Some(Backlog::Orphan(lock.clone(), order));
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
                if place.claims > 0 {
                    assert!(self.orphaned.insert(id), "a lease that was there was not orphaned");
                }
                Some(place.lease)
            }
            (None, Some(lease)) => {
                assert!(!self.is_orphaned(id), "nothing hangs from a lease before it is granted");
                self.leases.insert(id, LeasePlace { lease, claims: 0 });
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
            None => {
                if self.ties(claim.lease).next().is_none() {
                    assert!(self.orphaned.remove(&claim.lease), "it had a tie until now");
                }
            }
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
        let built = Self::build(leases.collect(), tombstones.collect(), claims.collect());
        assert_eq!(built.as_ref(), Some(self));
    }
}
