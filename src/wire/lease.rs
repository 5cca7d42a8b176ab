//! `quorate.v1.LeaseService`: decode, call the service, encode.

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::{Request, Response, Status, Streaming};

use super::answers::{Encoding, Outbox, make};
use super::convert::{
    found_lease_out, get_lease_in, grant_in, granted_out, list_leases_in, listed_leases_out,
    renew_in, renewed_out, revoke_in, revoked_out,
};
use super::draining::Draining;
use super::status::status;
use super::unary::{Asked, Reply, answered, share_of};
use crate::limits::KEEP_ALIVES_IN_FLIGHT_MAX;
use crate::proto::v1;
use crate::proto::v1::lease_service_server::LeaseService;
use crate::service::{Call, Caller, Count, Error, FoundLeases, Leases, Renewals, Share};

pub(super) struct LeaseServer {
    pub(super) leases: Arc<Leases>,
    /// Ends every stream once what is under way on it has been answered.
    pub(super) draining: Draining,
}

type Renewed = Result<v1::KeepAliveLeasesResponse, Status>;

/// The way of answers into one stream, each with what it counts for. The permit is given back when
/// the answer has left.
type Answers = mpsc::UnboundedSender<((Renewed, OwnedSemaphorePermit), Count)>;

/// What renewing a lease counts for, from the request until its answer is taken, in bytes.
pub(super) const RENEWAL_WEIGHT: usize = 256;

#[tonic::async_trait]
impl LeaseService for LeaseServer {
    type KeepAliveLeasesStream = BoxStream<'static, Renewed>;

    async fn grant_lease(
        &self,
        request: Request<v1::GrantLeaseRequest>,
    ) -> Reply<v1::GrantLeaseResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.leases.node());
        let new = grant_in(message).map_err(status)?;
        let granted = answered(|done| self.leases.grant(&call, new, done)).await?;
        Ok(Response::new(granted_out(&granted)))
    }

    async fn keep_alive_leases(
        &self,
        request: Request<Streaming<v1::KeepAliveLeasesRequest>>,
    ) -> Reply<Self::KeepAliveLeasesStream> {
        let (answers, inbox) = mpsc::unbounded_channel();
        let share = share_of(&request);
        let encoding = Encoding::new(share.clone(), Count::default());
        let (leases, draining) = (self.leases.clone(), self.draining.clone());
        tokio::spawn(read(leases, request.into_inner(), answers, share, draining));
        let outbound = Outbox::new(inbox, encoding.clone()).map(|(renewed, _permit)| renewed);
        let mut response = Response::new(outbound.boxed());
        response.extensions_mut().insert(encoding);
        Ok(response)
    }

    async fn revoke_lease(
        &self,
        request: Request<v1::RevokeLeaseRequest>,
    ) -> Reply<v1::RevokeLeaseResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.leases.node());
        let revoke = revoke_in(message).map_err(status)?;
        let revision = answered(|done| self.leases.revoke(&call, revoke, done)).await?;
        Ok(Response::new(revoked_out(revision)))
    }

    async fn get_lease(
        &self,
        request: Request<v1::GetLeaseRequest>,
    ) -> Reply<v1::GetLeaseResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.leases.node());
        let get = get_lease_in(message).map_err(status)?;
        let out = |found: FoundLeases| Ok(found_lease_out(&found));
        asked.find(0, |done| self.leases.get(&call, get, done), out).await
    }

    async fn list_leases(
        &self,
        request: Request<v1::ListLeasesRequest>,
    ) -> Reply<v1::ListLeasesResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.leases.node());
        let list = list_leases_in(message).map_err(status)?;
        let out = |found: FoundLeases| Ok(listed_leases_out(&found));
        asked.find(0, |done| self.leases.list(&call, list, done), out).await
    }
}

/// Reads renewals until the client ends the stream, one is refused, or the node drains. The stream
/// closes when the last renewal under way has dropped its handle on the answers.
async fn read(
    leases: Arc<Leases>,
    mut requests: Streaming<v1::KeepAliveLeasesRequest>,
    answers: Answers,
    share: Arc<Share>,
    mut draining: Draining,
) {
    let room = Arc::new(Semaphore::new(KEEP_ALIVES_IN_FLIGHT_MAX));
    let mut drained = std::pin::pin!(draining.begun());
    loop {
        let next = async {
            let permit = room.clone().acquire_owned().await.ok()?;
            share.room_to_ask().await;
            Some((requests.message().await.ok()??, permit))
        };
        let next = tokio::select! {
            next = next => next,
            () = answers.closed() => return,
            () = &mut drained => return,
        };
        let Some((request, permit)) = next else { return };
        let count = Count::asked(RENEWAL_WEIGHT * (1 + request.lease_ids.len()));
        let due = Due { answers: answers.clone(), share: share.clone(), count, permit };
        due.share.hold(count);
        match renew_in(request) {
            Ok(renewals) => renew(&leases, renewals, due),
            Err(error) => return due.answer(Err(error)),
        }
    }
}

fn renew(leases: &Leases, renewals: Renewals, due: Due) {
    let share = due.share.clone();
    let call = Call::within(leases.node(), Caller, &share, None);
    leases.renew(&call, renewals, move |result| {
        let made = make(&due.share, result, |it| Ok(renewed_out(it)));
        due.answer(made);
    });
}

/// An answer that is due.
struct Due {
    answers: Answers,
    share: Arc<Share>,
    count: Count,
    permit: OwnedSemaphorePermit,
}

impl Due {
    fn answer(self, made: Result<v1::KeepAliveLeasesResponse, Error>) {
        let Self { answers, share, count, permit } = self;
        // A client that has gone away does not want the answer.
        if answers.send(((made.map_err(status), permit), count)).is_err() {
            share.release(count);
        }
    }
}
