//! Locks.

use super::lease::timing_out;
use super::{consistency_in, context_in, duration_or_zero, duration_out, timestamp_out};
use crate::proto::v1;
use crate::proto::v1::lock_mode::Mode;
use crate::service::{
    AcquireLock, AcquiredLock, BreakLock, CancelAcquire, Error, FoundLocks, GetLock, ListLocks,
    ReleaseLock,
};
use crate::state::{ClaimState, ClaimView, LockKind, LockMode, LockView, Revision, Timestamp};

fn mode_in(mode: Option<v1::LockMode>) -> Result<LockMode, Error> {
    let invalid = |message| Err(Error::invalid("mode", "INVALID_LOCK_MODE", message));
    match mode.and_then(|mode| mode.mode) {
        Some(Mode::Exclusive(true)) => Ok(LockMode::Exclusive),
        Some(Mode::Shared(true)) => Ok(LockMode::Shared),
        Some(Mode::Permits(v1::Permits { of, take })) => {
            Ok(LockMode::Permits { of, take: take.max(1) })
        }
        Some(Mode::Exclusive(false) | Mode::Shared(false)) => {
            invalid("mode is set to false; set the one that is wanted to true")
        }
        None => invalid("mode is missing: set mode.exclusive, mode.shared or mode.permits"),
    }
}

fn mode_out(mode: LockMode) -> v1::LockMode {
    let mode = match mode {
        LockMode::Exclusive => Mode::Exclusive(true),
        LockMode::Shared => Mode::Shared(true),
        LockMode::Permits { of, take } => Mode::Permits(v1::Permits { of, take }),
    };
    v1::LockMode { mode: Some(mode) }
}

pub(in crate::wire) fn acquire_in(request: v1::AcquireLockRequest) -> Result<AcquireLock, Error> {
    Ok(AcquireLock {
        context: context_in(request.context)?,
        namespace: request.namespace,
        lock: request.lock,
        lease_id: request.lease_id,
        mode: mode_in(request.mode)?,
        wait: duration_or_zero("wait", request.wait)?,
        lock_delay: duration_or_zero("lock_delay", request.lock_delay)?,
    })
}

pub(in crate::wire) fn acquired_out(acquired: &AcquiredLock) -> v1::AcquireLockResponse {
    v1::AcquireLockResponse {
        revision: acquired.token.0,
        token: acquired.token.0,
        grant_time: Some(timestamp_out(acquired.grant_time)),
        timing: Some(timing_out(acquired.timing)),
    }
}

pub(in crate::wire) fn cancel_in(
    request: v1::CancelAcquireRequest,
) -> Result<CancelAcquire, Error> {
    Ok(CancelAcquire {
        context: context_in(request.context)?,
        namespace: request.namespace,
        lock: request.lock,
        lease_id: request.lease_id,
        acquire_request_id: request.acquire_request_id,
    })
}

pub(in crate::wire) fn cancelled_out(revision: Revision) -> v1::CancelAcquireResponse {
    v1::CancelAcquireResponse { revision: revision.0 }
}

pub(in crate::wire) fn release_in(request: v1::ReleaseLockRequest) -> Result<ReleaseLock, Error> {
    Ok(ReleaseLock {
        context: context_in(request.context)?,
        namespace: request.namespace,
        lock: request.lock,
        token: request.token,
        lease_id: request.lease_id,
    })
}

pub(in crate::wire) fn released_out(revision: Revision) -> v1::ReleaseLockResponse {
    v1::ReleaseLockResponse { revision: revision.0 }
}

pub(in crate::wire) fn break_in(request: v1::BreakLockRequest) -> Result<BreakLock, Error> {
    Ok(BreakLock {
        context: context_in(request.context)?,
        namespace: request.namespace,
        lock: request.lock,
        token: request.token,
        skip_lock_delay: request.skip_lock_delay,
    })
}

pub(in crate::wire) fn broken_out(revision: Revision) -> v1::BreakLockResponse {
    v1::BreakLockResponse { revision: revision.0 }
}

pub(in crate::wire) fn get_lock_in(request: v1::GetLockRequest) -> Result<GetLock, Error> {
    Ok(GetLock {
        namespace: request.namespace,
        lock: request.lock,
        consistency: consistency_in(
            request.consistency,
            request.min_revision,
            request.max_staleness,
        )?,
        page_size: request.page_size,
    })
}

fn holder_out(view: &ClaimView, now: Timestamp) -> v1::LockHolder {
    let (token, grant_time, delayed_until) = match view.claim.state {
        ClaimState::Held { token, time } => (token, Some(time), None),
        ClaimState::Delayed { token, until } => (token, None, Some(until)),
        ClaimState::Waiting { .. } => (Revision(0), None, None),
    };
    let lease = view.lease.as_deref();
    v1::LockHolder {
        lease_id: lease.map(|_| view.claim.lease.to_string()).unwrap_or_default(),
        request_id: view.claim.request.id,
        owner: lease.map(|lease| lease.owner().to_owned()).unwrap_or_default(),
        mode: Some(mode_out(view.claim.mode)),
        token: token.0,
        grant_time: grant_time.map(timestamp_out),
        lease_remaining: lease.map(|lease| duration_out(lease.deadline().since(now))),
        lock_delay_remaining: delayed_until.map(|until| duration_out(until.since(now))),
    }
}

fn waiter_out(view: &ClaimView, now: Timestamp) -> v1::LockWaiter {
    let deadline = match view.claim.state {
        ClaimState::Waiting { deadline } => Some(deadline),
        ClaimState::Held { .. } | ClaimState::Delayed { .. } => None,
    };
    let owner = view.lease.as_deref().map(|lease| lease.owner().to_owned());
    v1::LockWaiter {
        lease_id: view.claim.lease.to_string(),
        request_id: view.claim.request.id,
        owner: owner.unwrap_or_default(),
        mode: Some(mode_out(view.claim.mode)),
        wait_start_time: Some(timestamp_out(view.claim.enqueued_time)),
        wait_remaining: deadline.map(|deadline| duration_out(deadline.since(now))),
    }
}

fn lock_out(found: &FoundLocks, view: &LockView) -> v1::Lock {
    let count = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    let (kind, permits) = match view.kind {
        LockKind::ReadWrite => (v1::LockKind::ExclusiveShared, 0),
        LockKind::Counted { permits } => (v1::LockKind::Permits, permits),
    };
    let delays = view.holders.iter().filter_map(|holder| match holder.claim.state {
        ClaimState::Delayed { until, .. } => Some(until.since(found.now)),
        ClaimState::Held { .. } | ClaimState::Waiting { .. } => None,
    });
    v1::Lock {
        namespace: found.namespace.to_string(),
        name: view.name.to_string(),
        kind: kind as i32,
        permits,
        permits_taken: view.permits_taken,
        holder_count: count(view.holders_count),
        lock_delay_remaining: delays.max().map(duration_out),
        holders: view.holders.iter().map(|holder| holder_out(holder, found.now)).collect(),
        waiter_count: count(view.waiters_count),
        waiters: view.waiters.iter().map(|waiter| waiter_out(waiter, found.now)).collect(),
    }
}

pub(in crate::wire) fn found_lock_out(found: &FoundLocks) -> v1::GetLockResponse {
    v1::GetLockResponse {
        revision: found.revision.0,
        lock: found.locks.first().map(|view| lock_out(found, view)),
    }
}

pub(in crate::wire) fn list_locks_in(request: v1::ListLocksRequest) -> Result<ListLocks, Error> {
    Ok(ListLocks {
        namespace: request.namespace,
        page_size: request.page_size,
        page_token: request.page_token,
        consistency: consistency_in(request.consistency, 0, request.max_staleness)?,
    })
}

pub(in crate::wire) fn listed_locks_out(found: &FoundLocks) -> v1::ListLocksResponse {
    v1::ListLocksResponse {
        revision: found.revision.0,
        locks: found.locks.iter().map(|view| lock_out(found, view)).collect(),
        next_page_token: found.next.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}
