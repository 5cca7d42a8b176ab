//! What commands do to leases.

use std::sync::Arc;
use std::time::Duration;

use super::State;
use super::apply::Answer;
use super::command::{Cause, Change, Command, Namespace, Outcome, Rejection, Reply, Request};
use super::lease::{Lease, LeaseEnd, LeaseFacts, LeaseId, LeaseKey, packed_ttl};
use super::retry::Requests;
use super::settle::Step;
use super::time::Timestamp;
use super::void::Voids;
use crate::limits::{LEASE_RENEWALS_MAX, LEASE_TTL_MAX, LEASE_TTL_MIN, LEASES_MAX, NAME_BYTES_MAX};

impl State {
    /// Applies a command on leases, locks or rings, and then does what it leads to.
    pub(super) fn coordinate(
        &mut self,
        command: &Command,
        resend: bool,
        changes: &mut Vec<Change>,
    ) -> Answer {
        let mut step = Step::new(changes);
        let answer = match command {
            Command::GrantLease { request, key, owner, ttl } => {
                self.grant_lease(request, key, owner, *ttl, &mut step)
            }
            Command::RenewLeases { namespace, ids, expires } => {
                self.renew_leases(namespace, ids, *expires, &mut step)
            }
            Command::RevokeLease { request, key } => {
                self.revoke_lease(request, key, resend, &mut step)
            }
            Command::AcquireLock { .. } => self.acquire_lock(command, resend, &mut step),
            Command::ReleaseLock { .. } => self.release_lock(command, resend, &mut step),
            Command::CancelAcquire { .. } => self.cancel_acquire(command, &mut step),
            Command::BreakLock { request, lock, token, delay } => {
                self.break_lock(request, lock, *token, *delay, resend, &mut step)
            }
            Command::JoinRing { .. } => self.join_ring(command, resend, &mut step),
            Command::LeaveRing { .. } => self.leave_ring(command, resend, &mut step),
            Command::CreateSession { .. }
            | Command::UpdateSession { .. }
            | Command::TouchSession { .. }
            | Command::DeleteSession { .. }
            | Command::Tick
            | Command::RaiseFeatureLevel { .. } => unreachable!("dispatched by its kind"),
        };
        self.sweep_ended(&mut step);
        answer
    }

    /// A lease knows the request that granted it for as long as it lives, so a resend needs nobody
    /// else to remember it.
    fn grant_lease(
        &mut self,
        request: &Request,
        key: &LeaseKey,
        owner: &str,
        ttl: Duration,
        step: &mut Step<'_>,
    ) -> Answer {
        let ttl = packed_ttl(ttl, LEASE_TTL_MIN..=LEASE_TTL_MAX);
        let ttl = ttl.filter(|_| owner.len() <= NAME_BYTES_MAX);
        let ttl = ttl.ok_or(Rejection::MalformedCommand)?;
        self.check_request(request)?;
        if let Some(lease) = self.meet_lease(key, step) {
            if !lease.is_granted_by(request) {
                return Err(Rejection::LeaseExists);
            }
            let outcome = Outcome::LeaseGranted { deadline: lease.deadline() };
            return Ok(Reply { revision: lease.granted_revision(), outcome });
        }
        if self.records.lease_tombstone(key).is_some() || self.is_orphaned(key) {
            return Err(Rejection::LeaseIdRetired);
        }
        self.check_lease_room(&key.namespace, step)?;
        self.raise_anew(step);
        let facts = LeaseFacts {
            granted_time: self.clock.time,
            granted_revision: self.revision,
            granted_by: request.id,
            owner,
            requests: Requests::default(),
            voids: Voids::default(),
        };
        let deadline = self.clock.steady.plus(Duration::from_millis(u64::from(ttl)));
        let lease = Lease::new(key, ttl, deadline, &facts);
        self.put_lease(key, Some(lease), Cause::Granted, step.changes);
        Ok(Reply { revision: self.revision, outcome: Outcome::LeaseGranted { deadline } })
    }

    /// Refuses another lease of a namespace that has as many as it may. One that is over does not
    /// count, and is removed if it is in the way.
    fn check_lease_room(
        &mut self,
        namespace: &Namespace,
        step: &mut Step<'_>,
    ) -> Result<(), Rejection> {
        let coordination = self.records.coordination(namespace);
        let Some(full) = coordination.filter(|it| it.leases_count() >= LEASES_MAX) else {
            return Ok(());
        };
        let due = full.first_due_lease(self.clock.steady);
        let id = due.ok_or(Rejection::TooManyLeases(LEASES_MAX as u64))?;
        self.expire_lease(&LeaseKey { namespace: namespace.clone(), id }, step);
        Ok(())
    }

    /// All that are due end at one revision, and all others are renewed at the next.
    fn renew_leases(
        &mut self,
        namespace: &Namespace,
        ids: &[LeaseId],
        expires: Option<Timestamp>,
        step: &mut Step<'_>,
    ) -> Answer {
        if ids.len() > LEASE_RENEWALS_MAX {
            return Err(Rejection::MalformedCommand);
        }
        if expires.is_some_and(|expires| self.clock.time > expires) {
            return Err(Rejection::RequestExpired);
        }
        let key = |id: &LeaseId| LeaseKey { namespace: namespace.clone(), id: *id };
        let alive: Vec<Option<Arc<Lease>>> =
            ids.iter().map(|id| self.meet_lease(&key(id), step)).collect();
        let mut deadlines = Vec::with_capacity(ids.len());
        let mut is_first = true;
        for (id, lease) in ids.iter().zip(alive) {
            let Some(lease) = lease else {
                deadlines.push(None);
                continue;
            };
            let key = self.records.shared_lease_key(&key(id));
            // A lease that is named twice is renewed twice, to the same deadline: once.
            let lease = self.records.lease(&key).cloned().unwrap_or(lease);
            let renewed = lease.renewed(&key, self.clock.steady);
            deadlines.push(Some(renewed.as_ref().unwrap_or(&lease).deadline()));
            if let Some(renewed) = renewed {
                if is_first {
                    self.raise_anew(step);
                    is_first = false;
                }
                self.put_lease(&key, Some(renewed), Cause::Renewed, step.changes);
            }
        }
        Ok(Reply { revision: self.revision, outcome: Outcome::LeasesRenewed(deadlines) })
    }

    fn revoke_lease(
        &mut self,
        request: &Request,
        key: &LeaseKey,
        resend: bool,
        step: &mut Step<'_>,
    ) -> Answer {
        self.check_request(request)?;
        if let Some(lease) = self.meet_lease(key, step) {
            self.raise_anew(step);
            let mut requests = lease.requests();
            requests.remember(request, resend, self.revision, self.clock.time);
            self.end_lease(key, LeaseEnd::Revoked, &requests, step);
            return Ok(Reply { revision: self.revision, outcome: Outcome::Done });
        }
        // A tombstone remembers no request after the one that made it, so what it has forgotten was
        // no Revoke.
        let stone = self.records.lease_tombstone(key).ok_or(Rejection::LeaseNotFound)?;
        let requests = stone.requests();
        let same = requests.recent().iter().find(|remembered| remembered.id == request.id);
        let revision = same.ok_or(Rejection::LeaseNotFound)?.revision;
        Ok(Reply { revision, outcome: Outcome::Done })
    }
}
