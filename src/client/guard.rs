//! What the holder of a lock has: its token, word of its loss, and the way to give it back.

use std::fmt;
use std::sync::Arc;

use super::Client;
use super::error::{Error, mismatched};
use super::lease::Held;
use super::liveness::Loss;
use super::lock::{Grant, LockMode, insist};
use super::retry::Progress;
use super::time::millis_to_proto;
use crate::proto::v1;
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;

/// Holders that a guard looks through for itself before it asks for its own claim.
const HOLDERS_LISTED: u32 = 100;

/// A lock that is held, until this is dropped (which gives it back in the background), released,
/// or lost.
///
/// Whatever it protects outside the cluster should check [`Guard::is_lost`] late and demand
/// [`Guard::token`]: between the check and the deed the machine may sleep. Caveat: a guard is not
/// told of a lock that an operator breaks. [`Guard::verify`] finds out; a fence does not have to.
#[must_use = "the lock is given back when its guard is dropped"]
pub struct Guard {
    held: Arc<Held>,
    client: Client,
    lock: String,
    grant: Grant,
    /// Of the Acquire that was granted.
    request_id: u64,
    is_released: bool,
}

impl Guard {
    /// That of a grant to this lease; the Acquire had this request id.
    pub(super) fn new(
        held: Arc<Held>,
        client: &Client,
        lock: &str,
        grant: Grant,
        request_id: u64,
    ) -> Self {
        let (client, lock) = (client.clone(), lock.to_owned());
        Self { held, client, lock, grant, request_id, is_released: false }
    }

    /// The lock's name.
    pub fn name(&self) -> &str {
        &self.lock
    }

    /// The fencing token: larger than that of any grant of the lock before. Whatever the lock
    /// protects can refuse those who come with a smaller one, as a session's update does with
    /// [`Update::fence`](super::Update::fence).
    pub fn token(&self) -> u64 {
        self.grant.token
    }

    /// The grant.
    pub fn grant(&self) -> Grant {
        self.grant
    }

    /// Returns when the lock is lost with its lease: at the latest 0.95 of the lease's time to live
    /// after the sending of the last renewal that was acknowledged, and so before the cluster gives
    /// the lock to anybody else.
    pub fn lost(&self) -> impl Future<Output = Loss> + Send + use<> {
        self.held.liveness.clone().lost()
    }

    /// Whether it is lost, by this machine's clock as of now.
    pub fn is_lost(&self) -> bool {
        self.held.liveness.loss().is_some()
    }

    /// Asks the cluster whether this still holds the lock; the answer is linearizable, and so true
    /// of a moment within this call. Only so can a holder find out that an operator has broken its
    /// lock; of a lost lease it is told by [`Guard::lost`]. It costs a read, or a write where more
    /// than a hundred hold the lock.
    ///
    /// # Errors
    ///
    /// [`Error::LockNotHeld`] when it does not; anything else when nobody could tell.
    pub async fn verify(&self) -> Result<(), Error> {
        let not_held = |why: &str| Error::LockNotHeld { message: why.to_owned() };
        if let Some(loss) = self.held.liveness.loss() {
            return Err(not_held(&format!("its lease {}", loss.describe())));
        }
        let found = match self.client.locks().get(&self.lock, HOLDERS_LISTED).await {
            Ok(found) => found.value,
            Err(Error::NotFound { message, .. }) => return Err(not_held(&message)),
            Err(error) => return Err(error),
        };
        let token = self.token();
        let is_held = match found.holders.iter().find(|holder| holder.token == token) {
            // Without its lease it is a holder that was lost, in its lock-delay.
            Some(holder) => holder.lease == Some(self.held.id),
            // They come in the order of their tokens, and this one may be behind the page.
            None if found.holders.last().is_some_and(|last| last.token < token)
                && found.holder_count as usize > found.holders.len() =>
            {
                self.is_claim_held().await?
            }
            None => false,
        };
        if is_held { Ok(()) } else { Err(not_held("the token does not hold the lock any more")) }
    }

    /// The same by the name of the claim, however many others hold the lock.
    ///
    /// It sends the Acquire again, which tells of its grant where that stands. Where it does not,
    /// it can do nothing: it is dated so long ago that nobody applies it any more.
    async fn is_claim_held(&self) -> Result<bool, Error> {
        let long_ago = Some(millis_to_proto(1));
        let request = Request::AcquireLock(v1::AcquireLockRequest {
            context: Some(v1::RequestContext {
                request_id: self.request_id,
                resend: true,
                first_sent_time: long_ago,
                expire_time: long_ago,
            }),
            namespace: self.client.namespace.to_string(),
            lock: self.lock.clone(),
            lease_id: self.held.id.to_string(),
            mode: Some(LockMode::Exclusive.into_proto()),
            wait: None,
            lock_delay: None,
        });
        let mut progress = Progress::of_resend();
        match self.client.call_with(request, self.client.patience(), &mut progress).await {
            Ok(Response::AcquireLock(granted)) => Ok(granted.token == self.token()),
            Ok(_) => Err(mismatched()),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(Error::Refused { reason, .. }) if reason == "ACQUIRE_ENDED" => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Gives the lock back, and returns once others can have it.
    ///
    /// # Errors
    ///
    /// [`Error::LockNotHeld`] when it was lost or broken before; [`Error::Unavailable`] and
    /// [`Error::OutcomeUnknown`]: then it goes on being tried in the background.
    pub async fn release(mut self) -> Result<(), Error> {
        let mut progress = Progress::default();
        // Should this future be dropped, or nobody answer, the guard's own end goes on with it.
        let lease = Some(self.held.id);
        let released =
            self.client.release_lock(&self.lock, self.token(), lease, &mut progress).await;
        match released {
            // An earlier sending of the same has done it.
            Err(Error::LockNotHeld { .. }) if progress.maybe_applied && !self.is_lost() => {
                self.is_released = true;
                Ok(())
            }
            released => {
                self.is_released = matches!(released, Ok(_) | Err(Error::LockNotHeld { .. }));
                released.map(drop)
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.is_released {
            return;
        }
        let lock = std::mem::take(&mut self.lock);
        let request = self.client.release_request(lock, self.token(), Some(self.held.id));
        let liveness = Some(self.held.liveness.clone());
        let insisting = insist(self.client.clone(), request, liveness);
        self.client.background.spawn(&self.held.runtime, insisting);
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("lock", &self.lock)
            .field("token", &self.grant.token)
            .finish_non_exhaustive()
    }
}
