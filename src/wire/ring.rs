//! `quorate.v1.RingService`: decode, call the service, encode.

use std::sync::Arc;

use tonic::{Request, Response};

use super::convert::{
    found_ring_out, get_ring_in, join_in, joined_out, leave_in, left_out, locate_in, located_out,
};
use super::status::status;
use super::unary::{Reply, answered, call_of};
use crate::proto::v1;
use crate::proto::v1::ring_service_server::RingService;
use crate::service::Rings;

pub(super) struct RingServer {
    pub(super) rings: Arc<Rings>,
}

#[tonic::async_trait]
impl RingService for RingServer {
    async fn join_ring(
        &self,
        request: Request<v1::JoinRingRequest>,
    ) -> Reply<v1::JoinRingResponse> {
        let call = call_of(self.rings.node(), &request);
        let join = join_in(request.into_inner()).map_err(status)?;
        let joined = answered(|done| self.rings.join(&call, join, done)).await?;
        Ok(Response::new(joined_out(&joined)))
    }

    async fn leave_ring(
        &self,
        request: Request<v1::LeaveRingRequest>,
    ) -> Reply<v1::LeaveRingResponse> {
        let call = call_of(self.rings.node(), &request);
        let leave = leave_in(request.into_inner()).map_err(status)?;
        let revision = answered(|done| self.rings.leave(&call, leave, done)).await?;
        Ok(Response::new(left_out(revision)))
    }

    async fn locate_keys(
        &self,
        request: Request<v1::LocateKeysRequest>,
    ) -> Reply<v1::LocateKeysResponse> {
        let call = call_of(self.rings.node(), &request);
        let locate = locate_in(request.into_inner()).map_err(status)?;
        let located = answered(|done| self.rings.locate(&call, locate, done)).await?;
        Ok(Response::new(located_out(&located)))
    }

    async fn get_ring(&self, request: Request<v1::GetRingRequest>) -> Reply<v1::GetRingResponse> {
        let call = call_of(self.rings.node(), &request);
        let get = get_ring_in(request.into_inner()).map_err(status)?;
        let found = answered(|done| self.rings.get(&call, get, done)).await?;
        Ok(Response::new(found_ring_out(&found)))
    }
}
