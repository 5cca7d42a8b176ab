//! Locks: the use cases.
//!
//! An Acquire has two times. Its *wait* is in the command and judged in the log, and when it is
//! over the claim is gone. The *call's deadline* is the caller's, and when it comes first he is
//! told that his claim still waits: the same request, sent again to any node, goes on waiting.

use std::sync::Arc;
use std::time::Duration;

use super::error::Error;
use super::field::{
    invalid_page_token, lease_id, lock_key, page_size, valid_name, valid_namespace,
};
use super::lease::{LeaseTiming, Pace, done_at};
use super::request::{Call, Consistency, RequestContext, RequestIds, read};
use crate::limits::{LOCK_DELAY_MAX, LOCK_PERMITS_MAX, LOCK_WAIT_MAX};
use crate::raft::{Acquired, ClaimEnd, Node};
use crate::state::{
    Command, LockMode, LockView, Namespace, Outcome, Rejection, Revision, State, Timestamp,
};

/// A lock to be taken.
#[derive(Clone, Debug)]
pub struct AcquireLock {
    /// Identity of the request, and of the claim.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// The lock's name.
    pub lock: String,
    /// The lease that it will hang from.
    pub lease_id: String,
    /// What is wanted.
    pub mode: LockMode,
    /// How long to wait in line; zero for not at all.
    pub wait: Duration,
    /// How long the share is kept back if the holder is lost.
    pub lock_delay: Duration,
}

/// A lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcquiredLock {
    /// Of the grant; it is the fencing token.
    pub token: Revision,
    /// Cluster time of the grant.
    pub grant_time: Timestamp,
    /// Of the lease.
    pub timing: LeaseTiming,
}

/// An Acquire to be undone.
#[derive(Clone, Debug, Default)]
pub struct CancelAcquire {
    /// Identity of the request.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// The lock's name.
    pub lock: String,
    /// The lease of the Acquire.
    pub lease_id: String,
    /// The request id of the Acquire.
    pub acquire_request_id: u64,
}

/// A lock to be given back.
#[derive(Clone, Debug, Default)]
pub struct ReleaseLock {
    /// Identity of the request.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// The lock's name.
    pub lock: String,
    /// The fencing token.
    pub token: u64,
    /// The lease that holds it, which remembers the request; empty for not said.
    pub lease_id: String,
}

/// A lock to be taken from its holder.
#[derive(Clone, Debug, Default)]
pub struct BreakLock {
    /// Identity of the request.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// The lock's name.
    pub lock: String,
    /// The fencing token.
    pub token: u64,
    /// Whether the lock-delay is left out, or ended.
    pub skip_lock_delay: bool,
}

/// A lock to be read.
#[derive(Clone, Debug, Default)]
pub struct GetLock {
    /// Empty for `default`.
    pub namespace: String,
    /// The lock's name.
    pub lock: String,
    /// How fresh.
    pub consistency: Consistency,
    /// Most holders, and most waiters, to list; 0 for the default.
    pub page_size: u32,
}

/// A page of locks.
#[derive(Clone, Debug, Default)]
pub struct ListLocks {
    /// Empty for `default`.
    pub namespace: String,
    /// 0 for the default.
    pub page_size: u32,
    /// Empty for the first page.
    pub page_token: String,
    /// How fresh.
    pub consistency: Consistency,
}

/// Locks as they were found, shared with the state.
#[derive(Clone, Debug)]
pub struct FoundLocks {
    /// Of the state that was read.
    pub revision: Revision,
    /// Where they are.
    pub namespace: Namespace,
    /// The steady clock, by which deadlines are to be judged.
    pub now: Timestamp,
    /// Those found, by name.
    pub locks: Vec<LockView>,
    /// Behind which the next page begins, if there is one.
    pub next: Option<Arc<str>>,
}

/// The lock use cases of one node.
pub struct Locks {
    node: Arc<Node>,
    request_ids: RequestIds,
    pace: Arc<Pace>,
}

impl Locks {
    /// For one node; `seed` is random.
    pub fn new(node: Arc<Node>, seed: u64) -> Self {
        let pace = Arc::new(Pace::new(!seed));
        Self { node, request_ids: RequestIds::new(seed), pace }
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Takes a lock, and waits in line for it if need be: make the call with [`Call::waiting`].
    pub fn acquire(
        &self,
        call: &Call<'_>,
        acquire: AcquireLock,
        done: impl FnOnce(Result<AcquiredLock, Error>) + Send + 'static,
    ) {
        let resend = acquire.context.resend;
        let proposing = call.proposing(&self.node);
        let command = match self.acquire_command(&proposing, acquire) {
            Ok(command) => command,
            Err(error) => return done(Err(error)),
        };
        let (node, pace) = (self.node.clone(), self.pace.clone());
        let (propose_by, wait_until) = (proposing.deadline.0, call.deadline.0);
        self.node.acquire(&command, resend, propose_by, wait_until, move |result| {
            done(result.map_err(Error::from).and_then(|acquired| {
                acquired_lock(acquired, |deadline| pace.timing(deadline, node.steady_time()))
            }));
        });
    }

    fn acquire_command(&self, call: &Call<'_>, acquire: AcquireLock) -> Result<Command, Error> {
        let AcquireLock { context, namespace, lock, lease_id: lease, mode, wait, lock_delay } =
            acquire;
        let request = self.request_ids.complete(&self.node, call, &context)?;
        let lock = lock_key(namespace, lock)?;
        let lease = lease_id("lease_id", &lease)?;
        valid_mode(mode)?;
        if wait > LOCK_WAIT_MAX {
            let message = "wait is longer than 10 min, which is the limit; wait again after it";
            return Err(Error::invalid("wait", "INVALID_WAIT", message));
        }
        if lock_delay > LOCK_DELAY_MAX {
            let message = "lock_delay is longer than 60 s, which is the limit";
            return Err(Error::invalid("lock_delay", "INVALID_LOCK_DELAY", message));
        }
        Ok(Command::AcquireLock { request, lock, lease, mode, wait, lock_delay })
    }

    /// Undoes an Acquire, whatever became of it.
    pub fn cancel(
        &self,
        call: &Call<'_>,
        cancel: CancelAcquire,
        done: impl FnOnce(Result<Revision, Error>) + Send + 'static,
    ) {
        let resend = cancel.context.resend;
        let command = self.cancel_command(call, cancel);
        self.write(call, resend, command, done);
    }

    fn cancel_command(&self, call: &Call<'_>, cancel: CancelAcquire) -> Result<Command, Error> {
        let CancelAcquire { context, namespace, lock, lease_id: lease, acquire_request_id } =
            cancel;
        if acquire_request_id == 0 {
            return Err(Error::invalid(
                "acquire_request_id",
                "INVALID_REQUEST_ID",
                "acquire_request_id is 0; set it to the context.request_id of the AcquireLock",
            ));
        }
        Ok(Command::CancelAcquire {
            request: self.request_ids.complete(&self.node, call, &context)?,
            lock: lock_key(namespace, lock)?,
            lease: lease_id("lease_id", &lease)?,
            acquire: acquire_request_id,
        })
    }

    /// Gives a lock back.
    pub fn release(
        &self,
        call: &Call<'_>,
        release: ReleaseLock,
        done: impl FnOnce(Result<Revision, Error>) + Send + 'static,
    ) {
        let resend = release.context.resend;
        let command = self.release_command(call, release);
        self.write(call, resend, command, done);
    }

    fn release_command(&self, call: &Call<'_>, release: ReleaseLock) -> Result<Command, Error> {
        let ReleaseLock { context, namespace, lock, token, lease_id: lease } = release;
        let lease = match lease.as_str() {
            "" => None,
            lease => Some(lease_id("lease_id", lease)?),
        };
        Ok(Command::ReleaseLock {
            request: self.request_ids.complete(&self.node, call, &context)?,
            lock: lock_key(namespace, lock)?,
            lease,
            token: valid_token(token)?,
        })
    }

    /// Takes a lock from its holder.
    pub fn break_lock(
        &self,
        call: &Call<'_>,
        broken: BreakLock,
        done: impl FnOnce(Result<Revision, Error>) + Send + 'static,
    ) {
        let resend = broken.context.resend;
        let command = self.break_command(call, broken);
        self.write(call, resend, command, done);
    }

    fn break_command(&self, call: &Call<'_>, broken: BreakLock) -> Result<Command, Error> {
        let BreakLock { context, namespace, lock, token, skip_lock_delay } = broken;
        Ok(Command::BreakLock {
            request: self.request_ids.complete(&self.node, call, &context)?,
            lock: lock_key(namespace, lock)?,
            token: valid_token(token)?,
            delay: !skip_lock_delay,
        })
    }

    /// Proposes what is answered with nothing but its revision.
    fn write(
        &self,
        call: &Call<'_>,
        resend: bool,
        command: Result<Command, Error>,
        done: impl FnOnce(Result<Revision, Error>) + Send + 'static,
    ) {
        let command = match command {
            Ok(command) => command,
            Err(error) => return done(Err(error)),
        };
        self.node.write(&command, resend, call.deadline.0, move |result| {
            let result = result.map_err(Error::from);
            done(result.and_then(|reply| done_at(reply.revision, &reply.outcome)));
        });
    }

    /// Reads a lock.
    pub fn get(
        &self,
        call: &Call<'_>,
        get: GetLock,
        done: impl FnOnce(Result<FoundLocks, Error>) + Send + 'static,
    ) {
        let valid =
            lock_key(get.namespace, get.lock).and_then(|key| Ok((key, page_size(get.page_size)?)));
        let (key, limit) = match valid {
            Ok(valid) => valid,
            Err(error) => return done(Err(error)),
        };
        let (node, namespace) = (self.node.clone(), key.namespace.clone());
        let look = move |state: &State| (state.revision(), state.lock(&key, limit));
        read(&self.node, call, get.consistency, look, move |looked| {
            done(looked.and_then(|(revision, lock)| {
                let locks = vec![lock.ok_or_else(Error::lock_not_found)?];
                let now = node.steady_time();
                Ok(FoundLocks { revision, namespace, now, locks, next: None })
            }));
        });
    }

    /// Lists locks in the order of their names.
    pub fn list(
        &self,
        call: &Call<'_>,
        list: ListLocks,
        done: impl FnOnce(Result<FoundLocks, Error>) + Send + 'static,
    ) {
        let consistency = list.consistency;
        let (namespace, after, limit) = match valid_list(list) {
            Ok(valid) => valid,
            Err(error) => return done(Err(error)),
        };
        let (node, listed) = (self.node.clone(), namespace.clone());
        let look = move |state: &State| {
            (state.revision(), state.list_locks(&listed, after.as_deref(), limit))
        };
        read(&self.node, call, consistency, look, move |looked| {
            done(looked.map(|(revision, page)| {
                let now = node.steady_time();
                FoundLocks { revision, namespace, now, locks: page.items, next: page.next }
            }));
        });
    }
}

/// What an Acquire came to, in the caller's words.
fn acquired_lock(
    acquired: Acquired,
    timing: impl FnOnce(Timestamp) -> LeaseTiming,
) -> Result<AcquiredLock, Error> {
    match acquired {
        Acquired::Waited(ClaimEnd::Granted { token, time, lease_deadline }) => {
            Ok(AcquiredLock { token, grant_time: time, timing: timing(lease_deadline) })
        }
        Acquired::Waited(ClaimEnd::Over(cause)) => Err(Error::acquire_ended(cause)),
        Acquired::Waited(ClaimEnd::StillWaiting) => Err(Error::still_waiting()),
        Acquired::Waited(ClaimEnd::Stopping) => Err(Error::stopped_waiting()),
        // It ended while this was on its way, so this node knows more than the refusal says.
        Acquired::Refused(Rejection::AcquireEnded, Some(ClaimEnd::Over(cause))) => {
            Err(Error::acquire_ended(cause))
        }
        Acquired::Refused(rejection, _) => {
            Err(super::lease::refused(&Outcome::Rejected(rejection)))
        }
    }
}

fn valid_mode(mode: LockMode) -> Result<(), Error> {
    let LockMode::Permits { of, take } = mode else { return Ok(()) };
    if of > LOCK_PERMITS_MAX {
        let (found, limit) = (u64::from(of), u64::from(LOCK_PERMITS_MAX));
        return Err(Error::over_limit("mode.permits.of", "permits", found, limit));
    }
    if take == 0 || take > of {
        let message = "mode.permits has to take between 1 and all of the lock's permits";
        return Err(Error::invalid("mode.permits", "INVALID_LOCK_MODE", message));
    }
    Ok(())
}

fn valid_token(token: u64) -> Result<Revision, Error> {
    if token == 0 {
        let message = "token is 0; set it to the token that AcquireLock answered";
        return Err(Error::invalid("token", "INVALID_TOKEN", message));
    }
    Ok(Revision(token))
}

fn valid_list(list: ListLocks) -> Result<(Namespace, Option<String>, usize), Error> {
    let namespace = valid_namespace(list.namespace)?;
    let after = (!list.page_token.is_empty()).then_some(list.page_token);
    if after.as_ref().is_some_and(|after| valid_name("page_token", after).is_err()) {
        return Err(invalid_page_token());
    }
    Ok((namespace, after, page_size(list.page_size)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Cause;

    fn reason(acquired: Acquired) -> &'static str {
        let timing = |_| LeaseTiming { remaining: Duration::ZERO, renew_after: Duration::ZERO };
        acquired_lock(acquired, timing).unwrap_err().reason
    }

    #[test]
    fn each_end_of_a_wait_has_its_reason() {
        let over = |cause| reason(Acquired::Waited(ClaimEnd::Over(cause)));
        assert_eq!(over(Some(Cause::TimedOut)), "LOCK_WAIT_EXPIRED");
        assert_eq!(over(Some(Cause::Cancelled)), "ACQUIRE_CANCELLED");
        assert_eq!(over(Some(Cause::LeaseExpired)), "LEASE_NOT_FOUND");
        assert_eq!(over(Some(Cause::LeaseRevoked)), "LEASE_NOT_FOUND");
        assert_eq!(over(None), "ACQUIRE_ENDED");
        assert_eq!(reason(Acquired::Waited(ClaimEnd::StillWaiting)), "STILL_WAITING");
        assert_eq!(reason(Acquired::Waited(ClaimEnd::Stopping)), "NODE_STOPPING");
        let ended = |noted| reason(Acquired::Refused(Rejection::AcquireEnded, noted));
        assert_eq!(ended(None), "ACQUIRE_ENDED");
        assert_eq!(ended(Some(ClaimEnd::Over(Some(Cause::TimedOut)))), "LOCK_WAIT_EXPIRED");
        assert_eq!(reason(Acquired::Refused(Rejection::LockHeld, None)), "LOCK_HELD");
    }

    #[test]
    fn permits_have_their_range() {
        let check = |of, take| valid_mode(LockMode::Permits { of, take }).map_err(|e| e.reason);
        assert_eq!(check(1, 1), Ok(()));
        assert_eq!(check(LOCK_PERMITS_MAX, LOCK_PERMITS_MAX), Ok(()));
        assert_eq!(check(LOCK_PERMITS_MAX + 1, 1), Err("LIMIT_EXCEEDED"));
        assert_eq!(check(0, 0), Err("INVALID_LOCK_MODE"));
        assert_eq!(check(2, 3), Err("INVALID_LOCK_MODE"));
    }
}
