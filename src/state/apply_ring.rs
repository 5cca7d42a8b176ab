//! What commands do to rings.
//!
//! A request is remembered on the lease that its member hangs from, together with those on locks. A
//! join that finds everything as it wants it changes no member, and so leaves the ring's revision
//! alone: nobody who routes by the ring has to learn anything. It is remembered all the same, or it
//! could undo a later one when it is sent again.

use super::State;
use super::apply::Answer;
use super::command::{Cause, Command, Outcome, Rejection, Reply, Request, Revision};
use super::lease::{LeaseId, LeaseKey};
use super::ring::{Member, MemberData, MemberKey, Ring, RingKey};
use super::settle::Step;
use crate::limits::{MEMBERS_PER_LEASE_MAX, RING_MEMBERS_MAX};

impl State {
    pub(super) fn join_ring(
        &mut self,
        command: &Command,
        resend: bool,
        step: &mut Step<'_>,
    ) -> Answer {
        let Command::JoinRing { request, member: key, lease, data } = command else {
            unreachable!("dispatched by its kind");
        };
        if !key.is_valid() || !data.is_valid() {
            return Err(Rejection::MalformedCommand);
        }
        self.check_request(request)?;
        let key = &self.records.shared_member_key(key);
        let lease_key = LeaseKey { namespace: key.ring.namespace.clone(), id: *lease };
        // What a request of a lease that has ended may have done has ended with it.
        let alive = self.meet_lease(&lease_key, step).ok_or(Rejection::LeaseNotFound)?;
        let outcome = Outcome::RingJoined { lease_deadline: alive.deadline() };
        if let Some(revision) = alive.requests().judge(request, resend)? {
            return Ok(Reply { revision, outcome });
        }
        self.end_met_member(key, step);
        let place = self.records.member(key).map(|member| member.lease());
        match place {
            Some(other) if other != *lease => return Err(Rejection::MemberExists),
            Some(_) => {}
            None => self.check_room(&key.ring, &lease_key, step)?,
        }
        self.raise_anew(step);
        let revision = self.write_member(key, *lease, data, step);
        self.remember_on_lease(&lease_key, request, resend, revision, step);
        Ok(Reply { revision, outcome })
    }

    /// Puts a member in its place, unless it is there as it is to be. Returns the revision at which
    /// it came to be like this, or the ring's.
    fn write_member(
        &mut self,
        key: &MemberKey,
        lease: LeaseId,
        data: &MemberData,
        step: &mut Step<'_>,
    ) -> Revision {
        let member = |join_time| Member::new(key, lease, data.clone(), join_time, self.revision);
        let (after, cause) = match self.records.member(key) {
            Some(before) if before.data() == data => {
                let ring = self.records.ring(&key.ring).and_then(|ring| ring.record.as_deref());
                return ring.map_or(self.revision, Ring::revision);
            }
            Some(before) => (member(before.join_time()), Cause::Updated),
            None => (member(self.clock.time), Cause::Joined),
        };
        self.put_member(key, Some(after), cause, step.changes);
        self.revision
    }

    /// Refuses another member of a ring or lease that has as many as it may. Those whose leases are
    /// over do not count, and are removed if they are in the way.
    fn check_room(
        &mut self,
        ring: &RingKey,
        lease: &LeaseKey,
        step: &mut Step<'_>,
    ) -> Result<(), Rejection> {
        let coordination = self.records.coordination(&lease.namespace);
        if coordination.is_some_and(|it| it.members_count(lease.id) >= MEMBERS_PER_LEASE_MAX) {
            return Err(Rejection::TooManyMembersOfLease(MEMBERS_PER_LEASE_MAX as u64));
        }
        let is_full = |state: &Self| {
            state.records.ring(ring).is_some_and(|place| place.members.len() >= RING_MEMBERS_MAX)
        };
        let is_settled = coordination.is_none_or(|it| it.is_settled(self.clock.steady));
        // Members cannot be over while no lease is, so a full ring is refused without a look at it.
        if !is_settled && is_full(self) {
            let place = self.records.ring(ring).expect("it is full");
            let names: Vec<_> = place.members.keys().cloned().collect();
            for name in names {
                if !step.has_left() {
                    break;
                }
                self.end_met_member(&MemberKey { ring: ring.clone(), name }, step);
            }
        }
        if is_full(self) {
            return Err(Rejection::TooManyMembers(RING_MEMBERS_MAX as u64));
        }
        Ok(())
    }

    pub(super) fn leave_ring(
        &mut self,
        command: &Command,
        resend: bool,
        step: &mut Step<'_>,
    ) -> Answer {
        let Command::LeaveRing { request, member: key, lease } = command else {
            unreachable!("dispatched by its kind");
        };
        self.check_request(request)?;
        let key = &self.records.shared_member_key(key);
        let lease_key = |id| LeaseKey { namespace: key.ring.namespace.clone(), id };
        self.end_met_member(key, step);
        let member = self.records.member(key).cloned();
        let member = member.filter(|member| lease.is_none_or(|lease| lease == member.lease()));
        let Some(on) = member.as_ref().map(|member| member.lease()).or(*lease) else {
            return Err(self.not_found_by(resend, Rejection::MemberNotFound));
        };
        let on = lease_key(on);
        self.meet_lease(&on, step);
        if let Some(revision) = self.judge_by_lease(&on, request, resend)? {
            return Ok(Reply { revision, outcome: Outcome::Done });
        }
        let member = member.ok_or(Rejection::MemberNotFound)?;
        // Perhaps it was applied, and this is whoever took the name since, on another lease, which
        // remembers nothing of it. That holds for a first sending, too: its resend may have
        // overtaken it.
        if lease.is_none() && member.join_time() >= request.first_sent {
            return Err(Rejection::OutcomeUnknown);
        }
        self.raise_anew(step);
        let revision = self.revision;
        self.put_member(key, None, Cause::Left, step.changes);
        self.remember_on_lease(&on, request, resend, revision, step);
        Ok(Reply { revision, outcome: Outcome::Done })
    }

    fn remember_on_lease(
        &mut self,
        key: &LeaseKey,
        request: &Request,
        resend: bool,
        revision: Revision,
        step: &mut Step<'_>,
    ) {
        let Some(lease) = self.records.lease(key).cloned() else { return };
        let key = &self.records.shared_lease_key(key);
        let mut facts = lease.facts();
        facts.requests.remember(request, resend, revision, self.clock.time);
        self.put_lease(key, Some(lease.with_facts(key, &facts)), Cause::Remembered, step.changes);
    }
}
