//! Bytes ⇄ what concerns leases and locks: the part of the codec that knows their messages.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::claim::{Claim, ClaimKey, ClaimState, LockKey, LockMode};
use super::codec::CodecError::{self, Malformed};
use super::codec::{request_of, requests, stored_request, stored_requests};
use super::command::{Command, Namespace, Outcome, Request, Revision};
use super::lease::{Lease, LeaseEnd, LeaseFacts, LeaseId, LeaseKey, LeaseTombstone, packed_ttl};
use super::time::{Timestamp, millis};
use super::void::{Void, Voids};
use crate::limits::{LEASE_TTL_MAX, LEASE_TTL_MIN, LOCK_DELAY_MAX};
use crate::proto::stored;
use crate::proto::stored::claim_record::State as StoredState;
use crate::proto::stored::command::Body;
use crate::proto::stored::lock_mode::Mode;
use crate::proto::stored::record::Record as StoredRecord;
use crate::proto::stored::reply::Outcome as StoredOutcome;

/// A command on leases or locks.
pub(super) fn stored_command(command: &Command) -> stored::Command {
    let (request, namespace, body) = match command {
        Command::GrantLease { request, key, owner, ttl } => {
            let owner = owner.to_string();
            let body = stored::GrantLease { id: stored_id(key.id), owner, ttl: millis(*ttl) };
            (Some(request), &key.namespace, Body::GrantLease(body))
        }
        Command::RenewLeases { namespace, ids, expires } => {
            let ids = ids.iter().map(|id| stored_id(*id)).collect();
            let expires = expires.map(|expires| expires.0);
            (None, namespace, Body::RenewLeases(stored::RenewLeases { ids, expires }))
        }
        Command::RevokeLease { request, key } => {
            let body = stored::RevokeLease { id: stored_id(key.id) };
            (Some(request), &key.namespace, Body::RevokeLease(body))
        }
        Command::AcquireLock { request, lock, lease, mode, wait, lock_delay } => {
            let body = stored::AcquireLock {
                name: lock.name.to_string(),
                lease: stored_id(*lease),
                mode: Some(stored_mode(*mode)),
                wait: millis(*wait),
                lock_delay: millis(*lock_delay),
            };
            (Some(request), &lock.namespace, Body::AcquireLock(body))
        }
        Command::ReleaseLock { request, lock, lease, token } => {
            let (name, lease) = (lock.name.to_string(), lease.map(stored_id));
            let body = stored::ReleaseLock { name, lease, token: token.0 };
            (Some(request), &lock.namespace, Body::ReleaseLock(body))
        }
        Command::CancelAcquire { request, lock, lease, acquire } => {
            let (name, lease) = (lock.name.to_string(), stored_id(*lease));
            let body = stored::CancelAcquire { name, lease, acquire: *acquire };
            (Some(request), &lock.namespace, Body::CancelAcquire(body))
        }
        Command::BreakLock { request, lock, token, delay } => {
            let name = lock.name.to_string();
            let body = stored::BreakLock { name, token: token.0, delay: *delay };
            (Some(request), &lock.namespace, Body::BreakLock(body))
        }
        Command::CreateSession { .. }
        | Command::UpdateSession { .. }
        | Command::TouchSession { .. }
        | Command::DeleteSession { .. }
        | Command::JoinRing { .. }
        | Command::LeaveRing { .. }
        | Command::Tick
        | Command::RaiseFeatureLevel { .. } => unreachable!("the codec keeps those to itself"),
    };
    let request = request.map(stored_request);
    let namespace = namespace.0.to_string();
    stored::Command { request, namespace, body: Some(body), ..Default::default() }
}

/// The one command that has no request.
pub(super) fn renew_leases(
    namespace: Namespace,
    body: &stored::RenewLeases,
) -> Result<Command, CodecError> {
    let ids = body.ids.iter().map(id).collect::<Result<_, _>>()?;
    Ok(Command::RenewLeases { namespace, ids, expires: body.expires.map(Timestamp) })
}

/// Any other command on leases or locks.
pub(super) fn command(
    request: Request,
    namespace: Namespace,
    body: Body,
) -> Result<Command, CodecError> {
    let lock = |name: String| LockKey { namespace: namespace.clone(), name: Arc::from(name) };
    Ok(match body {
        Body::GrantLease(body) => Command::GrantLease {
            request,
            key: LeaseKey { id: id(&body.id)?, namespace },
            owner: Arc::from(body.owner),
            ttl: Duration::from_millis(body.ttl),
        },
        Body::RevokeLease(body) => {
            Command::RevokeLease { request, key: LeaseKey { id: id(&body.id)?, namespace } }
        }
        Body::AcquireLock(body) => Command::AcquireLock {
            request,
            lock: lock(body.name),
            lease: id(&body.lease)?,
            mode: mode(body.mode)?,
            wait: Duration::from_millis(body.wait),
            lock_delay: Duration::from_millis(body.lock_delay),
        },
        Body::ReleaseLock(body) => Command::ReleaseLock {
            request,
            lock: lock(body.name),
            lease: body.lease.as_ref().map(id).transpose()?,
            token: Revision(body.token),
        },
        Body::CancelAcquire(body) => Command::CancelAcquire {
            request,
            lock: lock(body.name),
            lease: id(&body.lease)?,
            acquire: body.acquire,
        },
        Body::BreakLock(body) => Command::BreakLock {
            request,
            lock: lock(body.name),
            token: Revision(body.token),
            delay: body.delay,
        },
        _ => return Err(Malformed("a command that belongs elsewhere")),
    })
}

/// An outcome of such a command.
pub(super) fn stored_outcome(outcome: &Outcome) -> StoredOutcome {
    match outcome {
        Outcome::Done => StoredOutcome::Done(stored::Done {}),
        Outcome::LeaseGranted { deadline } => {
            StoredOutcome::LeaseGranted(stored::LeaseGranted { deadline: deadline.0 })
        }
        Outcome::LeasesRenewed(deadlines) => {
            let deadline = |deadline: &Option<Timestamp>| deadline.map_or(0, |it| it.0);
            let deadlines = deadlines.iter().map(deadline).collect();
            StoredOutcome::LeasesRenewed(stored::LeasesRenewed { deadlines })
        }
        Outcome::LockGranted { token, time, lease_deadline } => {
            let (token, time, lease_deadline) = (token.0, time.0, lease_deadline.0);
            StoredOutcome::LockGranted(stored::LockGranted { token, lease_deadline, time })
        }
        Outcome::LockWaiting { position } => {
            StoredOutcome::LockWaiting(stored::LockWaiting { position: *position })
        }
        Outcome::RingJoined { lease_deadline } => {
            let lease_deadline = lease_deadline.0;
            StoredOutcome::RingJoined(stored::RingJoined { lease_deadline })
        }
        Outcome::Written { .. } | Outcome::Rejected(_) => {
            unreachable!("the codec keeps those to itself")
        }
    }
}

/// The same, back.
pub(super) fn outcome(outcome: StoredOutcome) -> Result<Outcome, CodecError> {
    Ok(match outcome {
        StoredOutcome::Done(stored::Done {}) => Outcome::Done,
        StoredOutcome::LeaseGranted(stored::LeaseGranted { deadline }) => {
            Outcome::LeaseGranted { deadline: Timestamp(deadline) }
        }
        StoredOutcome::LeasesRenewed(stored::LeasesRenewed { deadlines }) => {
            // No lease ends at zero: it lives for a second at least.
            let deadline = |deadline| (deadline > 0).then_some(Timestamp(deadline));
            Outcome::LeasesRenewed(deadlines.into_iter().map(deadline).collect())
        }
        StoredOutcome::LockGranted(stored::LockGranted { token, lease_deadline, time }) => {
            let (time, lease_deadline) = (Timestamp(time), Timestamp(lease_deadline));
            Outcome::LockGranted { token: Revision(token), time, lease_deadline }
        }
        StoredOutcome::LockWaiting(stored::LockWaiting { position }) => {
            Outcome::LockWaiting { position }
        }
        StoredOutcome::RingJoined(stored::RingJoined { lease_deadline }) => {
            Outcome::RingJoined { lease_deadline: Timestamp(lease_deadline) }
        }
        StoredOutcome::Written(_) | StoredOutcome::Rejection(_) => {
            return Err(Malformed("an outcome that belongs elsewhere"));
        }
    })
}

pub(super) fn stored_lease(lease: &Lease) -> StoredRecord {
    let facts = lease.facts();
    StoredRecord::Lease(stored::LeaseRecord {
        owner: facts.owner.to_string(),
        ttl: millis(lease.ttl()),
        granted_time: facts.granted_time.0,
        granted_revision: facts.granted_revision.0,
        granted_by: facts.granted_by,
        deadline: lease.deadline().0,
        recent: stored_requests(&facts.requests),
        forgotten: facts.requests.forgotten().0,
        forgotten_resend: facts.requests.forgotten_resend().0,
        voids: facts.voids.list().iter().map(stored_void).collect(),
        voids_forgotten: facts.voids.forgotten().0,
    })
}

fn stored_void(void: &Void) -> stored::Void {
    stored::Void { id: void.id, sent: void.sent.0, expires: void.expires.0 }
}

fn void(void: &stored::Void) -> Void {
    Void { id: void.id, sent: Timestamp(void.sent), expires: Timestamp(void.expires) }
}

pub(super) fn lease(key: &LeaseKey, lease: &stored::LeaseRecord) -> Result<Lease, CodecError> {
    let ttl = packed_ttl(Duration::from_millis(lease.ttl), LEASE_TTL_MIN..=LEASE_TTL_MAX);
    let voids = lease.voids.iter().map(void).collect();
    let voids = Voids::restore(voids, Timestamp(lease.voids_forgotten));
    let facts = LeaseFacts {
        granted_time: Timestamp(lease.granted_time),
        granted_revision: Revision(lease.granted_revision),
        granted_by: lease.granted_by,
        owner: &lease.owner,
        requests: requests(&lease.recent, [lease.forgotten, lease.forgotten_resend])?,
        voids: voids.ok_or(Malformed("a lease that refuses more than it can keep"))?,
    };
    let ttl = ttl.ok_or(Malformed("a lease whose TTL is out of range"))?;
    Ok(Lease::new(key, ttl, Timestamp(lease.deadline), &facts))
}

pub(super) fn stored_lease_tombstone(tombstone: &LeaseTombstone) -> StoredRecord {
    let requests = tombstone.requests();
    StoredRecord::LeaseTombstone(stored::LeaseTombstoneRecord {
        removed_time: tombstone.removed_time().0,
        revoked: tombstone.end() == LeaseEnd::Revoked,
        recent: stored_requests(&requests),
        forgotten: requests.forgotten().0,
        forgotten_resend: requests.forgotten_resend().0,
    })
}

pub(super) fn lease_tombstone(
    key: &LeaseKey,
    stored: &stored::LeaseTombstoneRecord,
) -> Result<LeaseTombstone, CodecError> {
    let requests = requests(&stored.recent, [stored.forgotten, stored.forgotten_resend])?;
    let end = if stored.revoked { LeaseEnd::Revoked } else { LeaseEnd::Expired };
    Ok(LeaseTombstone::new(key, Timestamp(stored.removed_time), end, &requests))
}

pub(super) fn stored_claim(claim: &Claim) -> StoredRecord {
    let state = match claim.state {
        ClaimState::Waiting { deadline } => {
            StoredState::Waiting(stored::Waiting { deadline: deadline.0 })
        }
        ClaimState::Held { token, time } => {
            StoredState::Held(stored::Held { token: token.0, time: time.0 })
        }
        ClaimState::Delayed { token, until } => {
            StoredState::Delayed(stored::Delayed { token: token.0, until: until.0 })
        }
    };
    StoredRecord::Claim(stored::ClaimRecord {
        lease: stored_id(claim.lease),
        mode: Some(stored_mode(claim.mode)),
        request: Some(stored_request(&claim.request)),
        resend: claim.resend,
        enqueued_time: claim.enqueued_time.0,
        lock_delay: millis(claim.lock_delay),
        state: Some(state),
    })
}

pub(super) fn claim(key: &ClaimKey, claim: stored::ClaimRecord) -> Result<Claim, CodecError> {
    let request = claim.request.ok_or(Malformed("a claim without a request"))?;
    let mode = mode(claim.mode)?;
    let lock_delay = Duration::from_millis(claim.lock_delay);
    if !mode.is_valid() || lock_delay > LOCK_DELAY_MAX {
        return Err(Malformed("a claim whose numbers are out of range"));
    }
    let state = match claim.state.ok_or(Malformed("a claim without a state"))? {
        StoredState::Waiting(stored::Waiting { deadline }) => {
            ClaimState::Waiting { deadline: Timestamp(deadline) }
        }
        StoredState::Held(stored::Held { token, time }) => {
            ClaimState::Held { token: Revision(token), time: Timestamp(time) }
        }
        StoredState::Delayed(stored::Delayed { token, until }) => {
            ClaimState::Delayed { token: Revision(token), until: Timestamp(until) }
        }
    };
    let claim = Claim {
        hash: 0,
        lease: id(&claim.lease)?,
        mode,
        request: request_of(request),
        resend: claim.resend,
        enqueued_time: Timestamp(claim.enqueued_time),
        lock_delay,
        state,
    };
    Ok(claim.sealed(key))
}

pub(super) fn stored_id(id: LeaseId) -> Bytes {
    Bytes::copy_from_slice(&id.0)
}

pub(super) fn id(id: &Bytes) -> Result<LeaseId, CodecError> {
    let id = id.as_ref().try_into().map_err(|_| Malformed("a lease id not of 16 bytes"))?;
    Ok(LeaseId(id))
}

fn stored_mode(mode: LockMode) -> stored::LockMode {
    let mode = match mode {
        LockMode::Exclusive => Mode::Exclusive(stored::Exclusive {}),
        LockMode::Shared => Mode::Shared(stored::Shared {}),
        LockMode::Permits { of, take } => Mode::Permits(stored::Permits { of, take }),
    };
    stored::LockMode { mode: Some(mode) }
}

fn mode(mode: Option<stored::LockMode>) -> Result<LockMode, CodecError> {
    Ok(match mode.and_then(|mode| mode.mode).ok_or(Malformed("a lock without a mode"))? {
        Mode::Exclusive(stored::Exclusive {}) => LockMode::Exclusive,
        Mode::Shared(stored::Shared {}) => LockMode::Shared,
        Mode::Permits(stored::Permits { of, take }) => LockMode::Permits { of, take },
    })
}
