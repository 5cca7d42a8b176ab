//! `quorate.v1.RingService`: decode, call the service, encode.

use std::sync::Arc;

use tonic::{Request, Response};

use super::convert::{
    found_ring_out, get_ring_in, join_in, joined_out, leave_in, left_out, locate_in, located_out,
};
use super::status::status;
use super::unary::{Asked, Reply, answered};
use crate::proto::v1;
use crate::proto::v1::ring_service_server::RingService;
use crate::service::{FoundRing, LocatedKeys, Rings};

pub(super) struct RingServer {
    pub(super) rings: Arc<Rings>,
}

#[tonic::async_trait]
impl RingService for RingServer {
    async fn join_ring(
        &self,
        request: Request<v1::JoinRingRequest>,
    ) -> Reply<v1::JoinRingResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.rings.node());
        let join = join_in(message).map_err(status)?;
        let joined = answered(|done| self.rings.join(&call, join, done)).await?;
        Ok(Response::new(joined_out(&joined)))
    }

    async fn leave_ring(
        &self,
        request: Request<v1::LeaveRingRequest>,
    ) -> Reply<v1::LeaveRingResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.rings.node());
        let leave = leave_in(message).map_err(status)?;
        let revision = answered(|done| self.rings.leave(&call, leave, done)).await?;
        Ok(Response::new(left_out(revision)))
    }

    async fn locate_keys(
        &self,
        request: Request<v1::LocateKeysRequest>,
    ) -> Reply<v1::LocateKeysResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.rings.node());
        let locate = locate_in(message).map_err(status)?;
        let weight = locate.weight();
        let out = |located: LocatedKeys| located_out(&located);
        asked.find(weight, |done| self.rings.locate(&call, locate, done), out).await
    }

    async fn get_ring(&self, request: Request<v1::GetRingRequest>) -> Reply<v1::GetRingResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.rings.node());
        let get = get_ring_in(message).map_err(status)?;
        let out = |found: FoundRing| Ok(found_ring_out(&found));
        asked.find(0, |done| self.rings.get(&call, get, done), out).await
    }
}
