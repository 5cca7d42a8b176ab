//! Reads of leases and locks. What is over is not there, whether it was swept or not.
//!
//! Deadlines are on the steady clock, which moves on when entries are applied: how long something
//! has left is for the caller to say, who knows what time it is.

use std::sync::Arc;

use super::State;
use super::claim::{Claim, ClaimKey, ClaimState, LockKey, LockKind};
use super::command::{Namespace, Revision};
use super::coordination::Coordination;
use super::lease::{Lease, LeaseId, LeaseKey};
use super::lock::Lock;
use super::query::{Page, page};

/// Most holders, and most waiters, of one lock that a read of it looks at to count those that are
/// not over. The rest all count.
const COUNTED_MAX: usize = 1_000;
/// The same for each lock on a page of a list.
const LISTED_COUNTED_MAX: usize = 32;

/// A lease as it is read.
#[derive(Clone, Debug)]
pub struct LeaseView {
    /// Its id.
    pub id: LeaseId,
    /// The record, shared with the state.
    pub lease: Arc<Lease>,
    /// How many claims hang from it, held or waiting; including those whose time to wait is over
    /// and which have not been swept.
    pub claims: u64,
    /// How many of them hold their lock. Of those behind the first thousand (on a list: the first
    /// few) all count as waiting.
    pub held: u64,
    /// How many members of rings hang from it.
    pub members: u64,
}

/// A claim as it is read.
#[derive(Clone, Debug)]
pub struct ClaimView {
    /// Revision of the Acquire that made it.
    pub order: Revision,
    /// The record, shared with the state.
    pub claim: Arc<Claim>,
    /// Its lease; `None` in a lock-delay, as then that has ended or the claim was broken.
    pub lease: Option<Arc<Lease>>,
}

/// A lock as it is read.
#[derive(Clone, Debug)]
pub struct LockView {
    /// Its name.
    pub name: Arc<str>,
    /// What kind it is.
    pub kind: LockKind,
    /// How much is taken of a lock with permits, also by those in their lock-delay; 0 for another.
    pub permits_taken: u32,
    /// The first of those who hold it, or have lost it and are in their lock-delay; by token.
    pub holders: Vec<ClaimView>,
    /// How many there are.
    pub holders_count: u64,
    /// The first of those who wait, in the order in which they will be served.
    pub waiters: Vec<ClaimView>,
    /// How many there are.
    pub waiters_count: u64,
}

impl State {
    /// One lease.
    pub fn lease(&self, key: &LeaseKey) -> Option<LeaseView> {
        let coordination = self.records.coordination(&key.namespace)?;
        let lease = coordination.lease(key.id)?;
        let is_alive = !lease.is_due(self.clock.steady);
        is_alive.then(|| lease_view(coordination, key.id, lease, COUNTED_MAX))
    }

    /// Leases of a namespace by id, those behind `after`, at most `limit`.
    pub fn list_leases(
        &self,
        namespace: &Namespace,
        after: Option<LeaseId>,
        limit: usize,
    ) -> Page<LeaseId, LeaseView> {
        let Some(coordination) = self.records.coordination(namespace) else {
            return Page { items: Vec::new(), next: None };
        };
        page(coordination.leases(after), limit, |id, lease| {
            let is_alive = !lease.is_due(self.clock.steady);
            is_alive.then(|| lease_view(coordination, *id, lease, LISTED_COUNTED_MAX))
        })
    }

    /// What hangs from a lease, held or waiting; at most `limit` claims, in no particular order.
    pub fn lease_claims(&self, key: &LeaseKey, limit: usize) -> Vec<(ClaimKey, Arc<Claim>)> {
        let Some(coordination) = self.records.coordination(&key.namespace) else {
            return Vec::new();
        };
        let claims = coordination.ties(key.id).filter_map(|(name, order)| {
            let lock = LockKey { namespace: key.namespace.clone(), name: name.clone() };
            let claim = self.live_claim(coordination, coordination.lock(name)?.claim(order)?)?;
            Some((ClaimKey { lock, order }, claim.claim.clone()))
        });
        claims.take(limit).collect()
    }

    /// One claim, as whoever waits for it wants to know it.
    pub fn claim(&self, key: &ClaimKey) -> Option<Arc<Claim>> {
        let coordination = self.records.coordination(&key.lock.namespace)?;
        let claim = coordination.lock(&key.lock.name)?.claim(key.order)?;
        self.live_claim(coordination, claim).map(|live| live.claim.clone())
    }

    /// One lock, with at most `limit` holders and as many waiters.
    pub fn lock(&self, key: &LockKey, limit: usize) -> Option<LockView> {
        let coordination = self.records.coordination(&key.namespace)?;
        let (name, lock) = coordination.lock_entry(&key.name)?;
        self.lock_view(coordination, name, lock, limit, COUNTED_MAX)
    }

    /// Locks of a namespace by name, those behind `after`, at most `limit`; each with its first
    /// holder and waiter.
    pub fn list_locks(
        &self,
        namespace: &Namespace,
        after: Option<&str>,
        limit: usize,
    ) -> Page<Arc<str>, LockView> {
        let Some(coordination) = self.records.coordination(namespace) else {
            return Page { items: Vec::new(), next: None };
        };
        let locks = coordination.locks(after).map(|(name, lock)| (name.clone(), lock));
        page(locks, limit, |name, lock| {
            self.lock_view(coordination, name, lock, 1, LISTED_COUNTED_MAX)
        })
    }

    fn lock_view(
        &self,
        coordination: &Coordination,
        name: &Arc<str>,
        lock: &Lock,
        limit: usize,
        counted_max: usize,
    ) -> Option<LockView> {
        let look = |(order, claim)| {
            let live = self.live_claim(coordination, claim)?;
            let (claim, lease) = (live.claim.clone(), live.lease.cloned());
            Some(ClaimView { order, claim, lease })
        };
        let is_live = |claim: &Arc<Claim>| self.live_claim(coordination, claim).is_some();
        if !lock.claims().any(|(_, claim)| is_live(claim)) {
            return None;
        }
        let count = |claims: &mut dyn Iterator<Item = (Revision, &Arc<Claim>)>, all: usize| {
            let counted = claims.take(counted_max);
            let live = counted.filter(|(_, claim)| is_live(claim));
            (live.count() + all.saturating_sub(counted_max)) as u64
        };
        Some(LockView {
            name: name.clone(),
            kind: lock.kind(),
            permits_taken: lock.permits_taken(),
            holders: lock.takers().filter_map(look).take(limit).collect(),
            holders_count: count(&mut lock.takers(), lock.takers_count()),
            waiters: lock.waiters().filter_map(look).take(limit).collect(),
            waiters_count: count(&mut lock.waiters(), lock.waiters_count()),
        })
    }

    /// A claim that is not over, with its lease.
    fn live_claim<'a>(
        &self,
        coordination: &'a Coordination,
        claim: &'a Arc<Claim>,
    ) -> Option<LiveClaim<'a>> {
        let steady = self.clock.steady;
        if claim.deadline().is_some_and(|deadline| deadline <= steady) {
            return None;
        }
        if let ClaimState::Delayed { .. } = claim.state {
            return Some(LiveClaim { claim, lease: None });
        }
        let lease = coordination.lease(claim.lease).filter(|lease| !lease.is_due(steady))?;
        Some(LiveClaim { claim, lease: Some(lease) })
    }
}

/// A claim that is not over.
struct LiveClaim<'a> {
    claim: &'a Arc<Claim>,
    lease: Option<&'a Arc<Lease>>,
}

fn lease_view(
    coordination: &Coordination,
    id: LeaseId,
    lease: &Arc<Lease>,
    counted_max: usize,
) -> LeaseView {
    let claims = coordination.ties(id).take(counted_max);
    let claims = claims.filter_map(|(name, order)| coordination.lock(name)?.claim(order));
    let held = claims.filter(|claim| claim.token().is_some()).count() as u64;
    let claims = coordination.claims_count(id) as u64;
    let members = coordination.members_count(id) as u64;
    LeaseView { id, lease: lease.clone(), claims, held, members }
}
