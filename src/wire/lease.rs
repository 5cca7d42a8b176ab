//! `quorate.v1.LeaseService`: decode, call the service, encode.

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::convert::{
    found_lease_out, get_lease_in, grant_in, granted_out, list_leases_in, listed_leases_out,
    renew_in, renewed_out, revoke_in, revoked_out,
};
use super::status::status;
use super::unary::{Reply, answered, call_of};
use crate::limits::KEEP_ALIVES_IN_FLIGHT_MAX;
use crate::proto::v1;
use crate::proto::v1::lease_service_server::LeaseService;
use crate::service::{Call, Caller, Leases};

pub(super) struct LeaseServer {
    pub(super) leases: Arc<Leases>,
    /// Ends every stream once what is under way on it has been answered.
    pub(super) draining: Arc<Notify>,
}

type Renewed = Result<v1::KeepAliveLeasesResponse, Status>;

/// The way of answers into one stream. The permit is given back when the answer has left.
type Outbox = mpsc::UnboundedSender<(Renewed, OwnedSemaphorePermit)>;

#[tonic::async_trait]
impl LeaseService for LeaseServer {
    type KeepAliveLeasesStream = BoxStream<'static, Renewed>;

    async fn grant_lease(
        &self,
        request: Request<v1::GrantLeaseRequest>,
    ) -> Reply<v1::GrantLeaseResponse> {
        let call = call_of(self.leases.node(), &request);
        let new = grant_in(request.into_inner()).map_err(status)?;
        let granted = answered(|done| self.leases.grant(&call, new, done)).await?;
        Ok(Response::new(granted_out(&granted)))
    }

    async fn keep_alive_leases(
        &self,
        request: Request<Streaming<v1::KeepAliveLeasesRequest>>,
    ) -> Reply<Self::KeepAliveLeasesStream> {
        let (outbox, outbound) = mpsc::unbounded_channel();
        let draining = self.draining.clone();
        tokio::spawn(read(self.leases.clone(), request.into_inner(), outbox, draining));
        let outbound = UnboundedReceiverStream::new(outbound).map(|(renewed, _permit)| renewed);
        Ok(Response::new(outbound.boxed()))
    }

    async fn revoke_lease(
        &self,
        request: Request<v1::RevokeLeaseRequest>,
    ) -> Reply<v1::RevokeLeaseResponse> {
        let call = call_of(self.leases.node(), &request);
        let revoke = revoke_in(request.into_inner()).map_err(status)?;
        let revision = answered(|done| self.leases.revoke(&call, revoke, done)).await?;
        Ok(Response::new(revoked_out(revision)))
    }

    async fn get_lease(
        &self,
        request: Request<v1::GetLeaseRequest>,
    ) -> Reply<v1::GetLeaseResponse> {
        let call = call_of(self.leases.node(), &request);
        let get = get_lease_in(request.into_inner()).map_err(status)?;
        let found = answered(|done| self.leases.get(&call, get, done)).await?;
        Ok(Response::new(found_lease_out(&found)))
    }

    async fn list_leases(
        &self,
        request: Request<v1::ListLeasesRequest>,
    ) -> Reply<v1::ListLeasesResponse> {
        let call = call_of(self.leases.node(), &request);
        let list = list_leases_in(request.into_inner()).map_err(status)?;
        let found = answered(|done| self.leases.list(&call, list, done)).await?;
        Ok(Response::new(listed_leases_out(&found)))
    }
}

/// Reads renewals until the client ends the stream, one is refused, or the node drains. The stream
/// closes when the last renewal under way has dropped its handle on the outbox.
async fn read(
    leases: Arc<Leases>,
    mut requests: Streaming<v1::KeepAliveLeasesRequest>,
    outbox: Outbox,
    draining: Arc<Notify>,
) {
    let room = Arc::new(Semaphore::new(KEEP_ALIVES_IN_FLIGHT_MAX));
    let drained = draining.notified();
    let mut drained = std::pin::pin!(drained);
    loop {
        let next = async {
            let permit = room.clone().acquire_owned().await.ok()?;
            Some((requests.message().await.ok()??, permit))
        };
        let next = tokio::select! {
            next = next => next,
            () = outbox.closed() => return,
            () = &mut drained => return,
        };
        let Some((request, permit)) = next else { return };
        let renewals = match renew_in(request) {
            Ok(renewals) => renewals,
            Err(error) => return drop(outbox.send((Err(status(error)), permit))),
        };
        let call = Call::within(leases.node(), Caller, None);
        let outbox = outbox.clone();
        leases.renew(&call, renewals, move |result| {
            // A client that has gone away does not want the answer.
            let _ = outbox.send((result.map(renewed_out).map_err(status), permit));
        });
    }
}
