//! Locks: how they are taken, what a holder has, and the plain calls on them.
//!
//! An Acquire that waits is one request for as long as it waits, whatever becomes of connections
//! and leaders: it is asked for again under the same request id, which takes the same place in the
//! line or tells of the grant that was made meanwhile. Whoever stops waiting, also by dropping the
//! future, cancels it in the background, so that nothing is granted to nobody.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::runtime::Handle;
use tokio::time::Instant;

use super::Client;
use super::error::{Error, mismatched};
use super::guard::Guard;
use super::id::LeaseId;
use super::lease::Lease;
use super::liveness::{Liveness, Loss};
use super::retry::{Patience, Progress};
use super::session::Found;
use super::time::{duration_from_proto, duration_to_proto, system_time};
use crate::proto::v1;
use crate::proto::v1::lock_mode::Mode;
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;

/// How long an Acquire waits at one node before it asks again, perhaps elsewhere: so long may a
/// grant go unnoticed whose node is cut off from the others.
const ATTACHED_MAX: Duration = Duration::from_secs(15);
/// Pause before what ends a claim is sent again, beyond the attempts of one call.
const INSIST_PAUSE: Duration = Duration::from_millis(500);
/// Pause before an Acquire that was lost is made anew.
const ANEW_PAUSE: Duration = Duration::from_millis(100);

/// How a lock is held, or is to be held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockMode {
    /// Alone.
    #[default]
    Exclusive,
    /// Beside others that share it.
    Shared,
    /// Some of a number of permits.
    Permits {
        /// How many the lock has; all who use it at a time must say the same.
        of: u32,
        /// How many of them: 1 to `of`.
        take: u32,
    },
}

impl LockMode {
    pub(super) fn into_proto(self) -> v1::LockMode {
        let mode = match self {
            Self::Exclusive => Mode::Exclusive(true),
            Self::Shared => Mode::Shared(true),
            Self::Permits { of, take } => Mode::Permits(v1::Permits { of, take }),
        };
        v1::LockMode { mode: Some(mode) }
    }

    fn from_proto(mode: Option<v1::LockMode>) -> Result<Self, Error> {
        match mode.and_then(|mode| mode.mode).ok_or_else(mismatched)? {
            Mode::Exclusive(_) => Ok(Self::Exclusive),
            Mode::Shared(_) => Ok(Self::Shared),
            Mode::Permits(v1::Permits { of, take }) => Ok(Self::Permits { of, take: take.max(1) }),
        }
    }
}

/// Who has a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockHolder {
    /// The lease that it hangs from; `None` during the lock-delay of a holder that was lost.
    pub lease: Option<LeaseId>,
    /// Request id of its Acquire.
    pub request_id: u64,
    /// The lease's label.
    pub owner: String,
    /// How it is held.
    pub mode: LockMode,
    /// The fencing token.
    pub token: u64,
    /// Since when, in cluster time.
    pub granted: Option<SystemTime>,
    /// What is left of the lease unless it is renewed.
    pub lease_remaining: Option<Duration>,
    /// Set when it has lost the lock: for how long its share is kept from others.
    pub lock_delay_remaining: Option<Duration>,
}

/// Who waits for a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockWaiter {
    /// The lease that it hangs from.
    pub lease: LeaseId,
    /// Request id of its Acquire.
    pub request_id: u64,
    /// The lease's label.
    pub owner: String,
    /// How it is to be held.
    pub mode: LockMode,
    /// Since when it waits, in cluster time.
    pub since: Option<SystemTime>,
    /// How much longer it waits.
    pub remaining: Option<Duration>,
}

/// A lock as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockRecord {
    /// Where it lives.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// How many permits it has; `None` when it is for exclusive and shared use.
    pub permits: Option<u32>,
    /// How many permits are taken.
    pub permits_taken: u32,
    /// How many hold it.
    pub holder_count: u32,
    /// The first of them, in the order of their tokens.
    pub holders: Vec<LockHolder>,
    /// How many wait for it.
    pub waiter_count: u32,
    /// The first of them, in the order in which they will be served.
    pub waiters: Vec<LockWaiter>,
    /// For how long it is kept from others because a holder was lost.
    pub lock_delay_remaining: Option<Duration>,
}

impl LockRecord {
    fn from_proto(lock: v1::Lock) -> Result<Self, Error> {
        let holder = |holder: v1::LockHolder| {
            let lease = Some(&*holder.lease_id).filter(|id| !id.is_empty());
            Ok::<_, Error>(LockHolder {
                lease: lease.map(LeaseId::new).transpose()?,
                request_id: holder.request_id,
                owner: holder.owner,
                mode: LockMode::from_proto(holder.mode)?,
                token: holder.token,
                granted: system_time(holder.grant_time),
                lease_remaining: duration_from_proto(holder.lease_remaining),
                lock_delay_remaining: duration_from_proto(holder.lock_delay_remaining),
            })
        };
        let waiter = |waiter: v1::LockWaiter| {
            Ok::<_, Error>(LockWaiter {
                lease: LeaseId::new(&waiter.lease_id)?,
                request_id: waiter.request_id,
                owner: waiter.owner,
                mode: LockMode::from_proto(waiter.mode)?,
                since: system_time(waiter.wait_start_time),
                remaining: duration_from_proto(waiter.wait_remaining),
            })
        };
        let is_counted = lock.kind() == v1::LockKind::Permits;
        Ok(Self {
            namespace: lock.namespace,
            name: lock.name,
            permits: is_counted.then_some(lock.permits),
            permits_taken: lock.permits_taken,
            holder_count: lock.holder_count,
            holders: lock.holders.into_iter().map(holder).collect::<Result<_, Error>>()?,
            waiter_count: lock.waiter_count,
            waiters: lock.waiters.into_iter().map(waiter).collect::<Result<_, Error>>()?,
            lock_delay_remaining: duration_from_proto(lock.lock_delay_remaining),
        })
    }
}

/// One page of the locks of a namespace.
#[derive(Clone, Debug)]
pub struct LockPage {
    /// Revision of the state that it was read from.
    pub revision: u64,
    /// In the order of their names, each with the first of its holders and waiters only.
    pub locks: Vec<LockRecord>,
    /// What the next page is asked for with; `None` on the last.
    pub next: Option<String>,
}

/// A lock that has been granted to a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The fencing token: larger than that of any grant of the lock before.
    pub token: u64,
    /// When it was granted, in cluster time.
    pub granted: Option<SystemTime>,
}

/// The calls on locks; see [`Client::locks`].
#[derive(Clone, Debug)]
pub struct Locks {
    client: Client,
}

impl Locks {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    /// A request for the lock of this name (1 to 256 bytes of UTF-8): exclusive and without
    /// waiting, unless it is told otherwise.
    pub fn lock(&self, name: impl Into<String>) -> Acquire {
        Acquire {
            client: self.client.clone(),
            lock: name.into(),
            mode: LockMode::Exclusive,
            wait: Duration::ZERO,
            lock_delay: Duration::ZERO,
        }
    }

    /// Gives a lock back by its token. Returns the revision of that.
    ///
    /// # Errors
    ///
    /// [`Error::LockNotHeld`] when the token does not hold it. Without `lease`, which remembers the
    /// request, [`Error::OutcomeUnknown`] where it may have been this very call that has given it
    /// back, over a connection that was lost.
    pub async fn release(
        &self,
        lock: &str,
        token: u64,
        lease: Option<LeaseId>,
    ) -> Result<u64, Error> {
        self.client.release_lock(lock, token, lease, &mut Progress::default()).await
    }

    /// Takes a lock away from the holder of this token, for operators. The holder is not asked and
    /// finds out late: only fences keep it from doing harm. Its lock-delay begins, or ends if it is
    /// to be skipped. Returns the revision of that.
    ///
    /// # Errors
    ///
    /// [`Error::LockNotHeld`] when the token does not hold it; [`Error::OutcomeUnknown`] where it
    /// may have been this very call that broke it, over a connection that was lost.
    pub async fn break_lock(
        &self,
        lock: &str,
        token: u64,
        skip_lock_delay: bool,
    ) -> Result<u64, Error> {
        let request = Request::BreakLock(v1::BreakLockRequest {
            context: None,
            namespace: self.namespace(),
            lock: lock.to_owned(),
            token,
            skip_lock_delay,
        });
        match self.client.call(request).await? {
            Response::BreakLock(broken) => Ok(broken.revision),
            _ => Err(mismatched()),
        }
    }

    /// Reads a lock, linearizably, with at most `page_size` holders and as many waiters (1 to
    /// 1,000; 0 for 100).
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when nobody has it or waits for it.
    pub async fn get(&self, lock: &str, page_size: u32) -> Result<Found<LockRecord>, Error> {
        let request = Request::GetLock(v1::GetLockRequest {
            namespace: self.namespace(),
            lock: lock.to_owned(),
            page_size,
            ..Default::default()
        });
        match self.client.call(request).await? {
            Response::GetLock(v1::GetLockResponse { revision, lock: Some(lock) }) => {
                Ok(Found { revision, value: LockRecord::from_proto(lock)? })
            }
            _ => Err(mismatched()),
        }
    }

    /// One page of the namespace's locks, of at most `page_size` (1 to 1,000; 0 for 100): the
    /// first, or with `page.next` of one the next.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when the token is not one of this list's.
    pub async fn list(&self, page_size: u32, next: Option<String>) -> Result<LockPage, Error> {
        let request = Request::ListLocks(v1::ListLocksRequest {
            namespace: self.namespace(),
            page_size,
            page_token: next.unwrap_or_default(),
            ..Default::default()
        });
        match self.client.call(request).await? {
            Response::ListLocks(page) => Ok(LockPage {
                revision: page.revision,
                locks: page
                    .locks
                    .into_iter()
                    .map(LockRecord::from_proto)
                    .collect::<Result<_, Error>>()?,
                next: Some(page.next_page_token).filter(|token| !token.is_empty()),
            }),
            _ => Err(mismatched()),
        }
    }

    fn namespace(&self) -> String {
        self.client.namespace.to_string()
    }
}

/// A request for a lock; see [`Locks::lock`].
#[derive(Clone, Debug)]
#[must_use = "nothing is asked for before `acquire`"]
pub struct Acquire {
    client: Client,
    lock: String,
    mode: LockMode,
    wait: Duration,
    lock_delay: Duration,
}

impl Acquire {
    /// Takes it alone.
    pub fn exclusive(self) -> Self {
        self.mode(LockMode::Exclusive)
    }

    /// Takes it beside others that share it.
    pub fn shared(self) -> Self {
        self.mode(LockMode::Shared)
    }

    /// Takes `take` of its `of` permits (1 to 1,000,000).
    pub fn permits(self, of: u32, take: u32) -> Self {
        self.mode(LockMode::Permits { of, take })
    }

    /// Takes it in this mode.
    pub fn mode(mut self, mode: LockMode) -> Self {
        self.mode = mode;
        self
    }

    /// Waits in line for so long, at most 10 min.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Keeps others out for so long, at most 60 s, if this holder is lost rather than released.
    pub fn lock_delay(mut self, delay: Duration) -> Self {
        self.lock_delay = delay;
        self
    }

    /// Takes the lock for a lease that this client keeps alive. The future may be dropped at any
    /// time: then the request is cancelled in the background, also if it had been granted.
    ///
    /// # Errors
    ///
    /// [`Error::LockHeld`] when it is not free and there is no wait; [`Error::WaitExpired`] when it
    /// did not become free in time; [`Error::LeaseLost`]; [`Error::Refused`] with
    /// `LOCK_MODE_MISMATCH` when it is in use in a way that does not fit, or with
    /// `ACQUIRE_CANCELLED`; [`Error::LimitExceeded`] when too many wait;
    /// [`Error::InvalidArgument`].
    pub async fn acquire(self, lease: &Lease) -> Result<Guard, Error> {
        let held = lease.held();
        if held.namespace() != &self.client.namespace {
            let message = "a lock hangs from a lease of its own namespace";
            return Err(Error::invalid("lease_id", "INVALID_LEASE_ID", message));
        }
        let lost =
            |loss: Loss| Error::LeaseLost { message: format!("the lease {}", loss.describe()) };
        let asked = tokio::select! {
            biased;
            loss = lease.lost() => Err(lost(loss)),
            asked = self.ask(held.id, Some(&held.liveness)) => asked,
        };
        let (grant, claim) = asked.inspect_err(|error| {
            if matches!(error, Error::LeaseLost { .. }) {
                held.liveness.lose(Loss::Ended);
            }
        })?;
        if let Some(loss) = held.liveness.loss() {
            return Err(lost(loss));
        }
        let guard = Guard::new(held.clone(), &self.client, &self.lock, grant, claim.request_id);
        claim.settle();
        Ok(guard)
    }

    /// Takes the lock for a lease that somebody else keeps alive, without a guard. Dropping the
    /// future cancels the request as [`Acquire::acquire`] does; the grant, once returned, is the
    /// caller's to give back.
    ///
    /// # Errors
    ///
    /// As [`Acquire::acquire`].
    pub async fn acquire_for(self, lease: LeaseId) -> Result<Grant, Error> {
        let (grant, claim) = self.ask(lease, None).await?;
        claim.settle();
        Ok(grant)
    }

    /// Asks until the lock is granted or can no longer be.
    async fn ask(
        &self,
        lease: LeaseId,
        liveness: Option<&Arc<Liveness>>,
    ) -> Result<(Grant, Claim), Error> {
        let start = Instant::now();
        let mut left = self.wait;
        loop {
            let claim = Claim::new(&self.client, &self.lock, lease, liveness);
            let error = match self.ask_once(&claim, left).await {
                Ok(grant) => return Ok((grant, claim)),
                Err(error) => error,
            };
            let waited = start.elapsed() >= self.wait && !self.wait.is_zero();
            match error {
                // Its claim is not there and cannot come any more: no node took it in time, or
                // what it had has ended unheard. Asking anew loses no place in the line.
                Error::Refused { reason, .. }
                    if reason == "ACQUIRE_ENDED" && start.elapsed() < self.wait =>
                {
                    claim.settle();
                    tokio::time::sleep(ANEW_PAUSE).await;
                    left = self.wait.saturating_sub(start.elapsed());
                }
                Error::DeadlineExceeded { .. } | Error::OutcomeUnknown { .. }
                    if start.elapsed() < self.wait =>
                {
                    drop(claim);
                    tokio::time::sleep(ANEW_PAUSE).await;
                    left = self.wait.saturating_sub(start.elapsed());
                }
                Error::DeadlineExceeded { message } if waited => {
                    return Err(Error::WaitExpired { message });
                }
                Error::Refused { reason, .. }
                    if waited && matches!(&*reason, "ACQUIRE_ENDED" | "ACQUIRE_CANCELLED") =>
                {
                    claim.settle();
                    let message = format!("the lock did not become free within {:?}", self.wait);
                    return Err(Error::WaitExpired { message });
                }
                Error::NotFound { message, .. } => {
                    claim.settle();
                    return Err(Error::LeaseLost { message });
                }
                error => {
                    if leaves_no_claim(&error) {
                        claim.settle();
                    }
                    return Err(error);
                }
            }
        }
    }

    /// One request, under whichever connections and leaders.
    async fn ask_once(&self, claim: &Claim, wait: Duration) -> Result<Grant, Error> {
        let request = Request::AcquireLock(v1::AcquireLockRequest {
            context: Some(v1::RequestContext {
                request_id: claim.request_id,
                ..Default::default()
            }),
            namespace: self.client.namespace.to_string(),
            lock: self.lock.clone(),
            lease_id: claim.lease.to_string(),
            mode: Some(self.mode.into_proto()),
            wait: Some(duration_to_proto(wait)),
            lock_delay: Some(duration_to_proto(self.lock_delay)),
        });
        let ordinary = self.client.patience();
        let patience = Patience {
            total: wait.saturating_add(ordinary.total),
            attempt: ordinary.attempt.saturating_add(wait.min(ATTACHED_MAX)),
            lifetime: ordinary.lifetime,
        };
        match self.client.call_with(request, patience, &mut Progress::default()).await? {
            Response::AcquireLock(granted) => {
                Ok(Grant { token: granted.token, granted: system_time(granted.grant_time) })
            }
            _ => Err(mismatched()),
        }
    }
}

/// Whether, with this answer, there is no claim that would have to be cancelled.
fn leaves_no_claim(error: &Error) -> bool {
    matches!(
        error,
        Error::LockHeld { .. }
            | Error::WaitExpired { .. }
            | Error::LeaseLost { .. }
            | Error::Refused { .. }
            | Error::InvalidArgument { .. }
            | Error::LimitExceeded { .. }
    )
}

/// An Acquire that may have claimed the lock; dropped unsettled, it is cancelled.
struct Claim {
    client: Client,
    lock: String,
    lease: LeaseId,
    request_id: u64,
    liveness: Option<Arc<Liveness>>,
    runtime: Handle,
    is_settled: bool,
}

impl Claim {
    fn new(client: &Client, lock: &str, lease: LeaseId, liveness: Option<&Arc<Liveness>>) -> Self {
        Self {
            client: client.clone(),
            lock: lock.to_owned(),
            lease,
            request_id: client.request_ids.mint(),
            liveness: liveness.cloned(),
            runtime: Handle::current(),
            is_settled: false,
        }
    }

    /// There is nothing to cancel, or somebody else sees to it.
    fn settle(mut self) {
        self.is_settled = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        let request = Request::CancelAcquire(v1::CancelAcquireRequest {
            context: None,
            namespace: self.client.namespace.to_string(),
            lock: std::mem::take(&mut self.lock),
            lease_id: self.lease.to_string(),
            acquire_request_id: self.request_id,
        });
        let liveness = self.liveness.clone();
        let insisting = insist(self.client.clone(), request, liveness);
        self.client.background.spawn(&self.runtime, insisting);
    }
}

/// Sends what ends a claim until it has been answered, for as long as the lease could keep the
/// claim alive. Without a lease of this client it is sent once: the claim ends with its wait.
pub(super) async fn insist(client: Client, request: Request, liveness: Option<Arc<Liveness>>) {
    loop {
        let Err(error) = client.call(request.clone()).await else { return };
        tracing::debug!(%error, "could not end a claim on a lock");
        let may_succeed = matches!(
            error,
            Error::Unavailable { .. }
                | Error::DeadlineExceeded { .. }
                | Error::OutcomeUnknown { .. }
                | Error::LimitExceeded { .. }
        );
        let lives = liveness.as_ref().is_some_and(|liveness| liveness.loss().is_none());
        if !may_succeed || !lives {
            return;
        }
        tokio::time::sleep(INSIST_PAUSE).await;
    }
}

impl Client {
    pub(super) async fn release_lock(
        &self,
        lock: &str,
        token: u64,
        lease: Option<LeaseId>,
        progress: &mut Progress,
    ) -> Result<u64, Error> {
        let request = self.release_request(lock.to_owned(), token, lease);
        match self.call_with(request, self.patience(), progress).await? {
            Response::ReleaseLock(released) => Ok(released.revision),
            _ => Err(mismatched()),
        }
    }

    pub(super) fn release_request(
        &self,
        lock: String,
        token: u64,
        lease: Option<LeaseId>,
    ) -> Request {
        Request::ReleaseLock(v1::ReleaseLockRequest {
            context: None,
            namespace: self.namespace.to_string(),
            lock,
            token,
            lease_id: lease.map(|lease| lease.to_string()).unwrap_or_default(),
        })
    }
}
