//! What commands do to locks.
//!
//! An Acquire is remembered by the claim that it made, for as long as that exists; it is answered
//! by it, even after the request itself has expired, as its owner may have waited for ten minutes.
//! Once the claim is gone the lease remembers the Acquire until it can no longer come, so that a
//! late resend does not claim the lock anew for somebody who has long given it back.

use super::State;
use super::apply::Answer;
use super::claim::{Claim, ClaimKey, ClaimState, LockKey};
use super::command::{Cause, Command, Outcome, Rejection, Reply, Request, Revision};
use super::lease::LeaseKey;
use super::retry::Requests;
use super::settle::Step;
use super::time::Timestamp;
use crate::limits::{
    CLAIMS_PER_LEASE_MAX, LOCK_DELAY_MAX, LOCK_POSITION_MAX, LOCK_WAIT_MAX, LOCK_WAITERS_MAX,
    NAME_BYTES_MAX,
};

impl State {
    pub(super) fn acquire_lock(
        &mut self,
        command: &Command,
        resend: bool,
        step: &mut Step<'_>,
    ) -> Answer {
        let Command::AcquireLock { request, lock, lease, mode, wait, lock_delay } = command else {
            unreachable!("dispatched by its kind");
        };
        let is_well_formed = (1..=NAME_BYTES_MAX).contains(&lock.name.len())
            && mode.is_valid()
            && *wait <= LOCK_WAIT_MAX
            && *lock_delay <= LOCK_DELAY_MAX;
        if !is_well_formed {
            return Err(Rejection::MalformedCommand);
        }
        let lock = &self.records.shared_lock_key(lock);
        let lease_key = LeaseKey { namespace: lock.namespace.clone(), id: *lease };
        let alive = self.meet_lease(&lease_key, step);
        if let Some(reply) = self.replay_acquire(lock, &lease_key, request, step) {
            return Ok(reply);
        }
        let alive = alive.ok_or(Rejection::LeaseNotFound)?;
        match self.check_request(request) {
            // Its claim is not there, and no sending of it can make one any more.
            Err(Rejection::RequestExpired) if resend => return Err(Rejection::AcquireEnded),
            checked => checked?,
        }
        // By what is remembered now: its own claim may just have timed out.
        if self.judge_by_lease(&lease_key, request, resend)?.is_some() {
            return Err(Rejection::AcquireEnded);
        }
        alive.facts().voids.check(request)?;

        self.settle(lock, step);
        let place = self.records.lock(lock);
        if let Some(place) = place.filter(|place| place.kind() != mode.kind()) {
            return Err(Rejection::LockModeMismatch(place.kind()));
        }
        let is_free =
            place.is_none_or(|place| place.waiters_count() == 0 && place.has_room_for(*mode));
        self.make_claim(command, lock, alive.deadline(), is_free, resend, step)
    }

    /// Makes a claim that is held or, if it is to, waits.
    fn make_claim(
        &mut self,
        command: &Command,
        lock: &LockKey,
        lease_deadline: Timestamp,
        is_free: bool,
        resend: bool,
        step: &mut Step<'_>,
    ) -> Answer {
        let Command::AcquireLock { request, lease, mode, wait, lock_delay, .. } = command else {
            unreachable!("dispatched by its kind");
        };
        if !is_free && wait.is_zero() {
            return Err(Rejection::LockHeld);
        }
        let coordination = self.records.coordination(&lock.namespace);
        if coordination.is_some_and(|it| it.claims_count(*lease) >= CLAIMS_PER_LEASE_MAX) {
            return Err(Rejection::TooManyClaims(CLAIMS_PER_LEASE_MAX as u64));
        }
        let waiters = self.records.lock(lock).map_or(0, |place| place.waiters_count());
        if !is_free && waiters >= LOCK_WAITERS_MAX {
            return Err(Rejection::TooManyWaiters(LOCK_WAITERS_MAX as u64));
        }
        self.raise_anew(step);
        let order = self.revision;
        let key = ClaimKey { lock: lock.clone(), order };
        let (state, cause, outcome) = if is_free {
            let state = ClaimState::Held { token: order, time: self.clock.time };
            let time = self.clock.time;
            let outcome = Outcome::LockGranted { token: order, time, lease_deadline };
            (state, Cause::Granted, outcome)
        } else {
            let state = ClaimState::Waiting { deadline: self.clock.steady.plus(*wait) };
            let position = (waiters + 1).min(LOCK_POSITION_MAX) as u32;
            (state, Cause::Queued, Outcome::LockWaiting { position })
        };
        let claim = Claim {
            hash: 0,
            lease: *lease,
            mode: *mode,
            request: *request,
            resend,
            enqueued_time: self.clock.time,
            lock_delay: *lock_delay,
            state,
        };
        self.put_claim(&key, Some(claim.sealed(&key)), cause, step.changes);
        Ok(Reply { revision: order, outcome })
    }

    /// The answer of the claim that this Acquire made before, if it is there and not over.
    fn replay_acquire(
        &mut self,
        lock: &LockKey,
        lease: &LeaseKey,
        request: &Request,
        step: &mut Step<'_>,
    ) -> Option<Reply> {
        let key = self.claim_of(lock, lease.id, request.id)?;
        if self.end_met(&key, step) {
            return None;
        }
        let place = self.records.lock(lock)?;
        match place.claim(key.order)?.state {
            ClaimState::Held { token, time } => {
                let lease_deadline = self.records.lease(lease)?.deadline();
                let outcome = Outcome::LockGranted { token, time, lease_deadline };
                Some(Reply { revision: token, outcome })
            }
            ClaimState::Waiting { .. } => {
                let position = place.position(key.order, LOCK_POSITION_MAX) as u32;
                let outcome = Outcome::LockWaiting { position };
                Some(Reply { revision: key.order, outcome })
            }
            ClaimState::Delayed { .. } => None,
        }
    }

    pub(super) fn release_lock(
        &mut self,
        command: &Command,
        resend: bool,
        step: &mut Step<'_>,
    ) -> Answer {
        let Command::ReleaseLock { request, lock, lease, token } = command else {
            unreachable!("dispatched by its kind");
        };
        self.check_request(request)?;
        let lock = &self.records.shared_lock_key(lock);
        if let Some((key, claim)) = self.meet_token(lock, *token, step)
            && claim.token().is_some()
            && lease.is_none_or(|lease| lease == claim.lease)
        {
            self.raise_anew(step);
            let revision = self.revision;
            self.put_claim(&key, None, Cause::Released, step.changes);
            self.remember(&lock.namespace, &claim, Some((request, resend)), step);
            self.grant_waiters(lock, step);
            return Ok(Reply { revision, outcome: Outcome::Done });
        }
        if let Some(id) = *lease {
            let key = LeaseKey { namespace: lock.namespace.clone(), id };
            self.meet_lease(&key, step);
            if let Some(revision) = self.judge_by_lease(&key, request, resend)? {
                return Ok(Reply { revision, outcome: Outcome::Done });
            }
            return Err(Rejection::LockNotHeld);
        }
        Err(self.token_not_held(*token, resend))
    }

    /// The answer to a command on a token that holds nothing, which no lease remembers. A token
    /// that was never given out was never taken away either.
    fn token_not_held(&self, token: Revision, resend: bool) -> Rejection {
        self.not_found_by(resend && token <= self.revision, Rejection::LockNotHeld)
    }

    pub(super) fn cancel_acquire(&mut self, command: &Command, step: &mut Step<'_>) -> Answer {
        let Command::CancelAcquire { request, lock, lease, acquire } = command else {
            unreachable!("dispatched by its kind");
        };
        self.check_request(request)?;
        let lock = &self.records.shared_lock_key(lock);
        let lease_key = LeaseKey { namespace: lock.namespace.clone(), id: *lease };
        self.meet_lease(&lease_key, step);
        if let Some(key) = self.claim_of(lock, *lease, *acquire)
            && !self.end_met(&key, step)
            && let Some(claim) = self.records.claim(&key).cloned()
        {
            self.raise_anew(step);
            let revision = self.revision;
            self.put_claim(&key, None, Cause::Cancelled, step.changes);
            self.remember(&lock.namespace, &claim, None, step);
            self.grant_waiters(lock, step);
            return Ok(Reply { revision, outcome: Outcome::Done });
        }
        let alive = self.records.lease(&lease_key).ok_or(Rejection::LeaseNotFound)?.clone();
        let mut facts = alive.facts();
        let is_known = facts.requests.recent().iter().any(|request| request.id == *acquire)
            || facts.voids.contains(*acquire);
        if !is_known {
            self.raise_anew(step);
            facts.voids.add(*acquire, request, self.clock.time);
            let lease = alive.with_facts(&lease_key, &facts);
            self.put_lease(&lease_key, Some(lease), Cause::Remembered, step.changes);
        }
        Ok(Reply { revision: self.revision, outcome: Outcome::Done })
    }

    pub(super) fn break_lock(
        &mut self,
        request: &Request,
        lock: &LockKey,
        token: Revision,
        delay: bool,
        resend: bool,
        step: &mut Step<'_>,
    ) -> Answer {
        self.check_request(request)?;
        let lock = &self.records.shared_lock_key(lock);
        let Some((key, claim)) = self.meet_token(lock, token, step) else {
            return Err(self.token_not_held(token, resend));
        };
        let is_held = claim.token().is_some();
        if !is_held && delay {
            return Ok(Reply { revision: self.revision, outcome: Outcome::Done });
        }
        self.raise_anew(step);
        let revision = self.revision;
        let after = if delay { self.delayed(&key, &claim) } else { None };
        self.put_claim(&key, after, Cause::Broken, step.changes);
        if is_held {
            self.remember(&lock.namespace, &claim, None, step);
        }
        self.grant_waiters(lock, step);
        Ok(Reply { revision, outcome: Outcome::Done })
    }

    /// The claim that takes its share of `lock` under this token, unless it is over.
    fn meet_token(
        &mut self,
        lock: &LockKey,
        token: Revision,
        step: &mut Step<'_>,
    ) -> Option<(ClaimKey, Claim)> {
        let key = self.claim_of_token(lock, token)?;
        self.end_met(&key, step);
        // One that is over may stay, in its lock-delay.
        let claim = self.records.claim(&key)?;
        Some((key, Claim::clone(claim)))
    }

    /// Judges a request by what its lease remembers, or what remains of it.
    pub(super) fn judge_by_lease(
        &self,
        key: &LeaseKey,
        request: &Request,
        resend: bool,
    ) -> Result<Option<Revision>, Rejection> {
        let lease = self.records.lease(key).map(|lease| lease.requests());
        let stone = || self.records.lease_tombstone(key).map(|stone| stone.requests());
        let requests: Requests = lease.or_else(stone).unwrap_or_default();
        requests.judge(request, resend)
    }
}
