//! Leases: promises that this client keeps alive, and the plain calls on them.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::runtime::Handle;
use tokio::time::Instant;

use super::Client;
use super::error::{Error, mismatched};
use super::id::LeaseId;
use super::keeper::{Renewals, Schedule};
use super::liveness::{Liveness, Loss};
use super::retry::{Patience, Progress};
use super::session::Found;
use super::time::{duration_from_proto, duration_to_proto, system_time};
use crate::proto::v1;
use crate::proto::v1::lease_renewal::Outcome;
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;

/// Time to live, unless told otherwise: an election takes a tenth of it.
const TTL_DEFAULT: Duration = Duration::from_secs(15);
/// What is to be waited before a renewal where the server did not say.
const RENEW_FRACTION: u32 = 3;

/// A lease to be granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseOptions {
    owner: String,
    ttl: Duration,
}

impl Default for LeaseOptions {
    fn default() -> Self {
        Self { owner: String::new(), ttl: TTL_DEFAULT }
    }
}

impl LeaseOptions {
    /// One without an owner's label, that ends 15 s after its last renewal.
    pub fn new() -> Self {
        Self::default()
    }

    /// A label for people, such as a host's name and a process id: at most 256 bytes.
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.owner = owner.into();
        self
    }

    /// For how long it lives without a renewal: 1 s to 24 h. Short, and a holder that died is
    /// missed soon; long, and no outage of the cluster is felt.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }
}

/// What its owner has to know of a lease's time, counted from when the request was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTiming {
    /// It ends after this time unless it is renewed.
    pub remaining: Duration,
    /// When to renew it next.
    pub renew_after: Duration,
}

impl LeaseTiming {
    pub(super) fn from_proto(timing: v1::LeaseTiming) -> Result<Self, Error> {
        let remaining = duration_from_proto(timing.remaining).ok_or_else(mismatched)?;
        let renew_after = duration_from_proto(timing.renew_after)
            .filter(|after| !after.is_zero())
            .unwrap_or(remaining / RENEW_FRACTION);
        Ok(Self { remaining, renew_after })
    }
}

/// What became of one lease that was to be renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// Which.
    pub id: LeaseId,
    /// Its time; `None` when there is no such lease any more.
    pub timing: Option<LeaseTiming>,
}

/// A lease as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRecord {
    /// Where it lives.
    pub namespace: String,
    /// Its id.
    pub id: LeaseId,
    /// Its owner's label.
    pub owner: String,
    /// What each renewal sets the remaining time to.
    pub ttl: Option<Duration>,
    /// When it was granted, in cluster time.
    pub granted: Option<SystemTime>,
    /// It ends after this time unless it is renewed.
    pub remaining: Option<Duration>,
    /// Locks that it holds.
    pub held_locks: u32,
    /// Its places in lines for locks.
    pub waits: u32,
    /// Members of rings that hang from it.
    pub ring_members: u32,
}

impl LeaseRecord {
    fn from_proto(lease: v1::Lease) -> Result<Self, Error> {
        Ok(Self {
            namespace: lease.namespace,
            id: LeaseId::new(&lease.id)?,
            owner: lease.owner,
            ttl: duration_from_proto(lease.ttl),
            granted: system_time(lease.grant_time),
            remaining: duration_from_proto(lease.remaining),
            held_locks: lease.held_locks,
            waits: lease.waits,
            ring_members: lease.ring_members,
        })
    }
}

/// One page of the leases of a namespace.
#[derive(Clone, Debug)]
pub struct LeasePage {
    /// Revision of the state that it was read from.
    pub revision: u64,
    /// In the order of their ids.
    pub leases: Vec<LeaseRecord>,
    /// What the next page is asked for with; `None` on the last.
    pub next: Option<String>,
}

/// A lease that this client keeps alive, until it is dropped, revoked or lost.
///
/// It is renewed in the background, across errors and changes of the leader. Dropping the last
/// clone, and the last guard of a lock that hangs from it, revokes it in the background.
#[derive(Clone)]
pub struct Lease {
    held: Arc<Held>,
}

impl Lease {
    /// Its id. Not a secret, but who knows it can renew and revoke the lease.
    pub fn id(&self) -> LeaseId {
        self.held.id
    }

    /// Returns when it is lost: at the latest 0.95 of its time to live after the sending of the
    /// last renewal that was acknowledged, and so before the cluster ends it.
    pub fn lost(&self) -> impl Future<Output = Loss> + Send + use<> {
        self.held.liveness.clone().lost()
    }

    /// Whether it is lost, by this machine's clock as of now.
    pub fn is_lost(&self) -> bool {
        self.held.liveness.loss().is_some()
    }

    /// Until when it is to be relied on if no renewal succeeds; zero once it is lost.
    pub fn remaining(&self) -> Duration {
        self.held.liveness.remaining()
    }

    /// Ends it now, and with it all that hangs from it. Guards say that they are lost from the
    /// moment of this call.
    ///
    /// # Errors
    ///
    /// [`Error::LeaseLost`] when it had ended before; [`Error::Unavailable`] and
    /// [`Error::OutcomeUnknown`]: then it ends when its time to live has passed.
    pub async fn revoke(self) -> Result<(), Error> {
        self.held.give_up();
        let mut progress = Progress::default();
        let client = &self.held.client;
        match client.revoke_lease(self.held.id, &mut progress).await {
            Ok(_) => Ok(()),
            // An earlier sending of the same has done it.
            Err(Error::NotFound { .. }) if progress.maybe_applied => Ok(()),
            Err(Error::NotFound { message, .. }) => Err(Error::LeaseLost { message }),
            Err(error) => Err(error),
        }
    }

    /// Stops renewing it and leaves it to itself: it ends when its time to live has passed, unless
    /// somebody else renews it by its id.
    pub fn into_id(self) -> LeaseId {
        self.held.give_up();
        self.held.id
    }

    pub(super) fn held(&self) -> &Arc<Held> {
        &self.held
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("id", &self.held.id).finish_non_exhaustive()
    }
}

/// What a lease, its guards and its renewal share.
pub(super) struct Held {
    pub(super) client: Client,
    pub(super) id: LeaseId,
    pub(super) ttl: Duration,
    pub(super) liveness: Arc<Liveness>,
    /// Where it was granted: what happens in the background happens there.
    pub(super) runtime: Handle,
}

impl Held {
    pub(super) fn namespace(&self) -> &Arc<str> {
        &self.client.namespace
    }

    /// The id first, as that is what tells leases apart at once.
    pub(super) fn key(&self) -> (LeaseId, Arc<str>) {
        (self.id, self.namespace().clone())
    }

    fn give_up(&self) {
        self.client.keeper.remove(&self.key());
        self.liveness.lose(Loss::GivenUp);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let lost = self.liveness.loss().is_some();
        self.client.keeper.remove(&self.key());
        if !lost {
            let (client, id) = (self.client.clone(), self.id);
            self.client.background.spawn(&self.runtime, async move {
                // If it cannot be told, the lease ends by itself.
                if let Err(error) = client.revoke_lease(id, &mut Progress::default()).await {
                    tracing::debug!(lease = %id, %error, "could not revoke a dropped lease");
                }
            });
        }
    }
}

/// The calls on leases; see [`Client::leases`].
#[derive(Clone, Debug)]
pub struct Leases {
    client: Client,
}

impl Leases {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Grants a lease and keeps it alive. One that a failover has granted so late that it cannot be
    /// relied on is left to run out, and another is asked for.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when its time to live or its owner's label is out of range;
    /// [`Error::DeadlineExceeded`] when none was granted soon enough within the client's timeout.
    pub async fn grant(&self, options: LeaseOptions) -> Result<Lease, Error> {
        let deadline = Instant::now() + self.client.timeout;
        let mut left = self.client.timeout;
        loop {
            let patient = Self::new(self.client.with_timeout(left));
            if let Some(lease) = patient.grant_in_time(&self.client, options.clone()).await? {
                return Ok(lease);
            }
            left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let ttl = options.ttl;
                let message =
                    format!("no lease was granted soon enough to be relied on for {ttl:?}");
                return Err(Error::DeadlineExceeded { message });
            }
        }
    }

    /// One lease, kept alive by `client`; `None` if the grant came too late.
    async fn grant_in_time(
        &self,
        client: &Client,
        options: LeaseOptions,
    ) -> Result<Option<Lease>, Error> {
        let clock = client.pool.time.clock().clone();
        let sent = clock.monotonic();
        let ttl = options.ttl;
        let (id, timing) = self.grant_only(options).await?;
        let lifetime = timing.remaining.min(ttl);
        let liveness = Arc::new(Liveness::new(clock, sent, lifetime));
        if liveness.loss().is_some() {
            return Ok(None);
        }
        let runtime = Handle::current();
        let held = Arc::new(Held { client: client.clone(), id, ttl, liveness, runtime });
        client.keeper.add(client, &held, Schedule::new(sent, timing.renew_after));
        Ok(Some(Lease { held }))
    }

    /// Grants a lease and leaves it to the caller to keep it alive, with [`Leases::keep_alive`].
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when its time to live or its owner's label is out of range.
    pub async fn grant_only(&self, options: LeaseOptions) -> Result<(LeaseId, LeaseTiming), Error> {
        let id = LeaseId::mint()?;
        let request = Request::GrantLease(v1::GrantLeaseRequest {
            context: None,
            namespace: self.namespace(),
            lease_id: id.to_string(),
            owner: options.owner,
            ttl: Some(duration_to_proto(options.ttl)),
        });
        match self.client.call(request).await? {
            Response::GrantLease(granted) => {
                let timing = granted.timing.ok_or_else(mismatched)?;
                Ok((id, LeaseTiming::from_proto(timing)?))
            }
            _ => Err(mismatched()),
        }
    }

    /// Renews leases by their ids, 1 to 1,000, and says of each what became of it.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when there are none or too many.
    pub async fn keep_alive(&self, ids: &[LeaseId]) -> Result<Vec<Renewal>, Error> {
        let patience = self.client.patience();
        let namespace = &self.client.namespace;
        self.client.renew_leases(namespace, ids, patience, &mut Progress::default()).await
    }

    /// Ends a lease by its id, and with it all that hangs from it. Returns the revision of that.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when there is no such lease.
    pub async fn revoke(&self, id: LeaseId) -> Result<u64, Error> {
        self.client.revoke_lease(id, &mut Progress::default()).await
    }

    /// Reads a lease, linearizably.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when there is none, or it has ended.
    pub async fn get(&self, id: LeaseId) -> Result<Found<LeaseRecord>, Error> {
        let request = Request::GetLease(v1::GetLeaseRequest {
            namespace: self.namespace(),
            lease_id: id.to_string(),
            ..Default::default()
        });
        match self.client.call(request).await? {
            Response::GetLease(v1::GetLeaseResponse { revision, lease: Some(lease) }) => {
                Ok(Found { revision, value: LeaseRecord::from_proto(lease)? })
            }
            _ => Err(mismatched()),
        }
    }

    /// One page of the namespace's leases, of at most `page_size` (1 to 1,000; 0 for 100): the
    /// first, or with `page.next` of one the next.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when the token is not one of this list's.
    pub async fn list(&self, page_size: u32, next: Option<String>) -> Result<LeasePage, Error> {
        let request = Request::ListLeases(v1::ListLeasesRequest {
            namespace: self.namespace(),
            page_size,
            page_token: next.unwrap_or_default(),
            ..Default::default()
        });
        match self.client.call(request).await? {
            Response::ListLeases(page) => Ok(LeasePage {
                revision: page.revision,
                leases: page
                    .leases
                    .into_iter()
                    .map(LeaseRecord::from_proto)
                    .collect::<Result<_, Error>>()?,
                next: Some(page.next_page_token).filter(|token| !token.is_empty()),
            }),
            _ => Err(mismatched()),
        }
    }

    /// What the renewals of this client and its clones have come to.
    pub fn renewals(&self) -> Renewals {
        self.client.keeper.renewals(self.client.pool.time.clock().monotonic())
    }

    fn namespace(&self) -> String {
        self.client.namespace.to_string()
    }
}

impl Client {
    pub(super) async fn renew_leases(
        &self,
        namespace: &str,
        ids: &[LeaseId],
        patience: Patience,
        progress: &mut Progress,
    ) -> Result<Vec<Renewal>, Error> {
        let request = Request::KeepAliveLeases(v1::KeepAliveLeasesRequest {
            context: None,
            namespace: namespace.to_owned(),
            lease_ids: ids.iter().map(LeaseId::to_string).collect(),
        });
        let Response::KeepAliveLeases(answer) = self.call_with(request, patience, progress).await?
        else {
            return Err(mismatched());
        };
        let renewals = answer.renewals.into_iter().map(|renewal| {
            let id = LeaseId::new(&renewal.lease_id)?;
            let timing = match renewal.outcome.ok_or_else(mismatched)? {
                Outcome::Renewed(timing) => Some(LeaseTiming::from_proto(timing)?),
                Outcome::Lost(_) => None,
            };
            Ok(Renewal { id, timing })
        });
        renewals.collect()
    }

    async fn revoke_lease(&self, id: LeaseId, progress: &mut Progress) -> Result<u64, Error> {
        let request = Request::RevokeLease(v1::RevokeLeaseRequest {
            context: None,
            namespace: self.namespace.to_string(),
            lease_id: id.to_string(),
        });
        match self.call_with(request, self.patience(), progress).await? {
            Response::RevokeLease(revoked) => Ok(revoked.revision),
            _ => Err(mismatched()),
        }
    }
}
