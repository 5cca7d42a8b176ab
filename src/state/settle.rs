//! What follows when leases end and claims come and go: who is lost, and who is next.
//!
//! One thing leads to another here. A lease ends, so its claims end; so other claims are granted;
//! and on the way a waiter is met whose own lease is due. None of that may make one command long,
//! so ending a lease does only that, and each further step is taken from the `Step` of the call,
//! which has a bounded number of them. What is left over shows in the records themselves (a claim
//! whose lease is not there; a lock with room for its first waiter), so it is found again by the
//! next Tick on every node alike, whether that node was restored in between or not.
//!
//! A claim that is over but has not been ended can hold up those behind it until then. The reverse
//! cannot be: before anything is granted to a claim or done by its token, its lease and deadline
//! are looked at.

use std::sync::Arc;

use super::State;
use super::claim::{Claim, ClaimKey, ClaimState, LockKey};
use super::command::{
    Cause, Change, Fence, Namespace, Record, RecordKey, Rejection, Request, Revision,
};
use super::coordination::Backlog;
use super::lease::{Lease, LeaseEnd, LeaseId, LeaseKey, LeaseTombstone};
use super::retry::Requests;
use super::ring::{Member, MemberKey, Ring, RingKey};
use crate::limits::EXPIRE_BATCH_MAX;

/// Most holders of one lock that a command looks at while any may be lost.
const HOLDERS_MET_MAX: usize = 1_000;

/// One call of `apply` at work.
///
/// - It ends or grants at most `EXPIRE_BATCH_MAX` records beside what its command is about.
/// - What it removes shares a revision, the command's own or the last grant's; each grant has its
///   own.
pub(super) struct Step<'a> {
    pub(super) changes: &'a mut Vec<Change>,
    left: usize,
    raised: bool,
    /// Leases that ended in this call and from which something hangs.
    ended: Vec<LeaseKey>,
}

impl<'a> Step<'a> {
    pub(super) fn new(changes: &'a mut Vec<Change>) -> Self {
        Self { changes, left: EXPIRE_BATCH_MAX, raised: false, ended: Vec::new() }
    }

    pub(super) fn has_left(&self) -> bool {
        self.left > 0
    }

    /// Counts one record that is ended or granted.
    pub(super) fn take(&mut self) {
        self.left = self.left.saturating_sub(1);
    }
}

impl State {
    /// Raises the revision, unless this call has.
    pub(super) fn raise(&mut self, step: &mut Step<'_>) {
        if !step.raised {
            self.raise_anew(step);
        }
    }

    /// Raises the revision for a change that has one of its own.
    pub(super) fn raise_anew(&mut self, step: &mut Step<'_>) {
        self.revision = self.next_revision();
        step.raised = true;
    }

    /// The lease of `key` if it is alive. One that is due is ended first, and a tombstone dropped
    /// whose time is over.
    pub(super) fn meet_lease(&mut self, key: &LeaseKey, step: &mut Step<'_>) -> Option<Arc<Lease>> {
        let Some(lease) = self.records.lease(key) else {
            let stone = self.records.lease_tombstone(key);
            if stone.is_some_and(|stone| stone.deadline() <= self.clock.time)
                && !self.is_orphaned(key)
            {
                self.raise(step);
                self.put_lease_tombstone(key, None, Cause::Forgotten, step.changes);
            }
            return None;
        };
        if !lease.is_due(self.clock.steady) {
            return Some(lease.clone());
        }
        self.expire_lease(key, step);
        None
    }

    /// Ends a lease that is due.
    pub(super) fn expire_lease(&mut self, key: &LeaseKey, step: &mut Step<'_>) {
        let lease = self.records.lease(key).expect("what is due is there");
        let mut requests = lease.requests();
        requests.drop_expired(self.clock.time);
        self.raise(step);
        self.end_lease(key, LeaseEnd::Expired, &requests, step);
    }

    /// Puts a tombstone into a lease's place, at the current revision. Its claims and members are
    /// ended by `sweep_ended` or a Tick.
    pub(super) fn end_lease(
        &mut self,
        key: &LeaseKey,
        end: LeaseEnd,
        requests: &Requests,
        step: &mut Step<'_>,
    ) {
        step.take();
        let key = &self.records.shared_lease_key(key);
        let tombstone = LeaseTombstone::new(key, self.clock.time, end, requests);
        let cause = match end {
            LeaseEnd::Expired => Cause::Expired,
            LeaseEnd::Revoked => Cause::Revoked,
        };
        self.put_lease(key, None, cause, step.changes);
        self.put_lease_tombstone(key, Some(tombstone), cause, step.changes);
        if self.is_orphaned(key) {
            step.ended.push(key.clone());
        }
    }

    /// Ends claims and members of the leases that ended in this call, as far as it may, and grants
    /// what that sets free.
    pub(super) fn sweep_ended(&mut self, step: &mut Step<'_>) {
        // Those that end on the way line up behind.
        let mut next = 0;
        while step.has_left() && next < step.ended.len() {
            let lease = &step.ended[next];
            let coordination = self.records.coordination(&lease.namespace);
            let coordination = coordination.filter(|it| it.is_orphaned(lease.id));
            let claim = coordination.and_then(|it| it.ties(lease.id).next());
            let member = coordination.and_then(|it| it.member_ties(lease.id).next());
            let namespace = lease.namespace.clone();
            if let Some((name, order)) = claim {
                let lock = LockKey { namespace, name: name.clone() };
                self.end_met(&ClaimKey { lock, order }, step);
            } else if let Some((ring, name)) = member {
                let ring = RingKey { namespace, name: ring.clone() };
                self.end_met_member(&MemberKey { ring, name: name.clone() }, step);
            } else {
                next += 1;
            }
        }
    }

    /// Does one piece of the work that earlier calls have left over.
    pub(super) fn work_off(&mut self, namespace: Namespace, backlog: Backlog, step: &mut Step<'_>) {
        match backlog {
            Backlog::Orphan(name, order) => {
                let lock = LockKey { namespace, name };
                self.end_met(&ClaimKey { lock, order }, step);
            }
            Backlog::OrphanMember(ring, name) => {
                let ring = RingKey { namespace, name: ring };
                self.end_met_member(&MemberKey { ring, name }, step);
            }
            Backlog::Grantable(name) => {
                self.grant_waiters(&LockKey { namespace, name }, step);
            }
        }
    }

    /// Ends the claim of `key` if it is over, and grants what that sets free. Returns whether it
    /// was.
    pub(super) fn end_met(&mut self, key: &ClaimKey, step: &mut Step<'_>) -> bool {
        let Some(claim) = self.records.claim(key).cloned() else { return false };
        let Some(cause) = self.why_over(&key.lock.namespace, &claim, step) else { return false };
        self.end_claim(key, &claim, cause, step);
        self.grant_waiters(&key.lock, step);
        true
    }

    /// Why a claim is over, if it is. Ends its lease if that is due.
    fn why_over(
        &mut self,
        namespace: &Namespace,
        claim: &Claim,
        step: &mut Step<'_>,
    ) -> Option<Cause> {
        let steady = self.clock.steady;
        if let ClaimState::Delayed { until, .. } = claim.state {
            return (until <= steady).then_some(Cause::DelayOver);
        }
        let key = LeaseKey { namespace: namespace.clone(), id: claim.lease };
        if let Some(cause) = self.why_lease_is_over(&key, step) {
            return Some(cause);
        }
        let is_late = claim.deadline().is_some_and(|deadline| deadline <= steady);
        is_late.then_some(Cause::TimedOut)
    }

    /// What became of what hangs from a lease, if that is over. Ends it if it is due.
    fn why_lease_is_over(&mut self, key: &LeaseKey, step: &mut Step<'_>) -> Option<Cause> {
        if self.meet_lease(key, step).is_some() {
            return None;
        }
        let end = self.records.lease_tombstone(key).map(|stone| stone.end());
        Some(match end {
            Some(LeaseEnd::Revoked) => Cause::LeaseRevoked,
            Some(LeaseEnd::Expired) | None => Cause::LeaseExpired,
        })
    }

    /// Removes the member of `key` if its lease is over. Returns whether it was.
    pub(super) fn end_met_member(&mut self, key: &MemberKey, step: &mut Step<'_>) -> bool {
        let Some(lease) = self.records.member(key).map(|member| member.lease()) else {
            return false;
        };
        let lease = LeaseKey { namespace: key.ring.namespace.clone(), id: lease };
        let Some(cause) = self.why_lease_is_over(&lease, step) else { return false };
        step.take();
        self.raise(step);
        self.put_member(key, None, cause, step.changes);
        true
    }

    /// Ends a claim that is over: removes it, or keeps its share back for its lock-delay.
    fn end_claim(&mut self, key: &ClaimKey, claim: &Claim, cause: Cause, step: &mut Step<'_>) {
        step.take();
        self.raise(step);
        let is_lost = cause == Cause::LeaseExpired;
        let after = if is_lost { self.delayed(key, claim) } else { None };
        self.put_claim(key, after, cause, step.changes);
        if cause == Cause::TimedOut {
            self.remember(&key.lock.namespace, claim, None, step);
        }
    }

    /// A holder's claim in its lock-delay, if it wants one.
    pub(super) fn delayed(&self, key: &ClaimKey, claim: &Claim) -> Option<Claim> {
        let token = claim.token()?;
        let until = self.clock.steady.plus(claim.lock_delay);
        let state = ClaimState::Delayed { token, until };
        (!claim.lock_delay.is_zero()).then(|| claim.with_state(key, state))
    }

    /// Whether any lease or claim may be over that has not been ended yet. A Tick is on its way
    /// then, so that what costs more because of it does not do so for long.
    fn has_steady_due(&self) -> bool {
        let next = self.records.next_steady_deadline();
        self.records.has_backlog() || next.is_some_and(|next| next <= self.clock.steady)
    }

    /// Makes room for a claim on `lock` as far as there is any: ends holders that are lost, and
    /// grants or ends who waits.
    pub(super) fn settle(&mut self, lock: &LockKey, step: &mut Step<'_>) {
        if self.has_steady_due() {
            let Some(place) = self.records.lock(lock) else { return };
            let met: Vec<_> =
                place.takers().take(HOLDERS_MET_MAX).map(|(order, _)| order).collect();
            for order in met {
                let key = ClaimKey { lock: lock.clone(), order };
                self.end_met(&key, step);
            }
        }
        self.grant_waiters(lock, step);
    }

    /// Grants a lock to those who wait for it, in their order, for as long as there is room for the
    /// next; removes those whose time is over. Each grant has a revision of its own, its token.
    pub(super) fn grant_waiters(&mut self, lock: &LockKey, step: &mut Step<'_>) {
        while step.has_left()
            && let Some(place) = self.records.lock(lock)
            && let Some((order, claim)) = place.first_waiter()
        {
            let (claim, has_room) = (claim.clone(), place.has_room_for(claim.mode));
            let key = ClaimKey { lock: lock.clone(), order };
            if let Some(cause) = self.why_over(&lock.namespace, &claim, step) {
                self.end_claim(&key, &claim, cause, step);
                continue;
            }
            if !has_room {
                return;
            }
            step.take();
            self.raise_anew(step);
            let held = ClaimState::Held { token: self.revision, time: self.clock.time };
            let granted = claim.with_state(&key, held);
            self.put_claim(&key, Some(granted), Cause::Granted, step.changes);
        }
    }

    /// Has the lease of a claim that was ended before it remember the Acquire that made it, so that
    /// it cannot be made again, and the request that ended it; as of the current revision.
    pub(super) fn remember(
        &mut self,
        namespace: &Namespace,
        claim: &Claim,
        ended_by: Option<(&Request, bool)>,
        step: &mut Step<'_>,
    ) {
        let can_come = claim.request.expires >= self.clock.time;
        let made_by = can_come.then_some((&claim.request, claim.resend));
        let mut list = made_by.into_iter().chain(ended_by).peekable();
        let key = LeaseKey { namespace: namespace.clone(), id: claim.lease };
        let lease = self.records.lease(&key).filter(|_| list.peek().is_some());
        let Some(lease) = lease.cloned() else { return };
        let mut facts = lease.facts();
        for (request, resend) in list {
            facts.requests.remember(request, resend, self.revision, self.clock.time);
        }
        self.put_lease(&key, Some(lease.with_facts(&key, &facts)), Cause::Remembered, step.changes);
    }

    /// Refuses what depends on a lock that is not held, or whose holder's lease has ended.
    pub(super) fn check_fence(
        &self,
        namespace: &Namespace,
        fence: Option<&Fence>,
    ) -> Result<(), Rejection> {
        let Some(fence) = fence else { return Ok(()) };
        let is_held = self.records.coordination(namespace).is_some_and(|coordination| {
            let claim = coordination.lock(&fence.lock).and_then(|lock| lock.of_token(fence.token));
            let claim = claim.filter(|(_, claim)| claim.token() == Some(fence.token));
            let lease = claim.and_then(|(_, claim)| coordination.lease(claim.lease));
            lease.is_some_and(|lease| !lease.is_due(self.clock.steady))
        });
        if is_held { Ok(()) } else { Err(Rejection::Fenced) }
    }

    /// Whether a lease has ended and something still hangs from it.
    pub(super) fn is_orphaned(&self, key: &LeaseKey) -> bool {
        self.records.coordination(&key.namespace).is_some_and(|it| it.is_orphaned(key.id))
    }

    /// The claim that a request made on a lease, with its key.
    pub(super) fn claim_of(
        &self,
        lock: &LockKey,
        lease: LeaseId,
        request: u64,
    ) -> Option<ClaimKey> {
        let coordination = self.records.coordination(&lock.namespace)?;
        let (order, _) = coordination.claim_of(lease, request, &lock.name)?;
        Some(ClaimKey { lock: lock.clone(), order })
    }

    /// The claim that takes its share of a lock under this token, with its key.
    pub(super) fn claim_of_token(&self, lock: &LockKey, token: Revision) -> Option<ClaimKey> {
        let (order, _) = self.records.lock(lock)?.of_token(token)?;
        Some(ClaimKey { lock: lock.clone(), order })
    }

    /// Puts a lease in its place, at the current revision.
    pub(super) fn put_lease(
        &mut self,
        key: &LeaseKey,
        after: Option<Lease>,
        cause: Cause,
        changes: &mut Vec<Change>,
    ) {
        let after = after.map(Arc::new);
        let before = self.records.replace_lease(key, after.clone());
        changes.push(Change {
            revision: self.revision,
            key: RecordKey::Lease(self.records.shared_lease_key(key)),
            before: before.map(Record::Lease),
            after: after.map(Record::Lease),
            cause,
        });
    }

    /// The same for what remains of a lease.
    pub(super) fn put_lease_tombstone(
        &mut self,
        key: &LeaseKey,
        after: Option<LeaseTombstone>,
        cause: Cause,
        changes: &mut Vec<Change>,
    ) {
        let after = after.map(Arc::new);
        let before = self.records.replace_lease_tombstone(key, after.clone());
        changes.push(Change {
            revision: self.revision,
            key: RecordKey::LeaseTombstone(self.records.shared_lease_key(key)),
            before: before.map(Record::LeaseTombstone),
            after: after.map(Record::LeaseTombstone),
            cause,
        });
    }

    /// The same for a claim.
    pub(super) fn put_claim(
        &mut self,
        key: &ClaimKey,
        after: Option<Claim>,
        cause: Cause,
        changes: &mut Vec<Change>,
    ) {
        let after = after.map(Arc::new);
        let before = self.records.replace_claim(key, after.clone());
        changes.push(Change {
            revision: self.revision,
            key: RecordKey::Claim(key.clone()),
            before: before.map(Record::Claim),
            after: after.map(Record::Claim),
            cause,
        });
    }

    /// The same for a member, and then for its ring, which vanishes with its last one.
    pub(super) fn put_member(
        &mut self,
        key: &MemberKey,
        after: Option<Member>,
        cause: Cause,
        changes: &mut Vec<Change>,
    ) {
        let after = after.map(Arc::new);
        let before = self.records.replace_member(key, after.clone());
        changes.push(Change {
            revision: self.revision,
            key: RecordKey::Member(key.clone()),
            before: before.map(Record::Member),
            after: after.map(Record::Member),
            cause,
        });
        let place = self.records.ring(&key.ring);
        let revision = place.and_then(|place| place.record.as_deref()).map(Ring::revision);
        let is_there = place.is_some_and(|place| !place.members.is_empty());
        if is_there && revision == Some(self.revision) {
            return;
        }
        let after = is_there.then(|| Arc::new(Ring::new(&key.ring, self.revision)));
        let before = self.records.replace_ring(&key.ring, after.clone());
        changes.push(Change {
            revision: self.revision,
            key: RecordKey::Ring(key.ring.clone()),
            before: before.map(Record::Ring),
            after: after.map(Record::Ring),
            cause,
        });
    }
}
