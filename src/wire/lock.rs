//! `quorate.v1.LockService`: decode, call the service, encode.

use std::sync::Arc;

use tonic::{Request, Response};

use super::convert::{
    acquire_in, acquired_out, break_in, broken_out, cancel_in, cancelled_out, found_lock_out,
    get_lock_in, list_locks_in, listed_locks_out, release_in, released_out,
};
use super::status::status;
use super::unary::{Reply, answered, call_of, waiting_call_of};
use crate::proto::v1;
use crate::proto::v1::lock_service_server::LockService;
use crate::service::Locks;

pub(super) struct LockServer {
    pub(super) locks: Arc<Locks>,
}

#[tonic::async_trait]
impl LockService for LockServer {
    async fn acquire_lock(
        &self,
        request: Request<v1::AcquireLockRequest>,
    ) -> Reply<v1::AcquireLockResponse> {
        let node = self.locks.node();
        let (metadata, extensions, message) = request.into_parts();
        let acquire = acquire_in(message).map_err(status)?;
        let request = Request::from_parts(metadata, extensions, ());
        let call = waiting_call_of(node, &request, acquire.wait);
        let acquired = answered(|done| self.locks.acquire(&call, acquire, done)).await?;
        Ok(Response::new(acquired_out(&acquired)))
    }

    async fn cancel_acquire(
        &self,
        request: Request<v1::CancelAcquireRequest>,
    ) -> Reply<v1::CancelAcquireResponse> {
        let call = call_of(self.locks.node(), &request);
        let cancel = cancel_in(request.into_inner()).map_err(status)?;
        let revision = answered(|done| self.locks.cancel(&call, cancel, done)).await?;
        Ok(Response::new(cancelled_out(revision)))
    }

    async fn release_lock(
        &self,
        request: Request<v1::ReleaseLockRequest>,
    ) -> Reply<v1::ReleaseLockResponse> {
        let call = call_of(self.locks.node(), &request);
        let release = release_in(request.into_inner()).map_err(status)?;
        let revision = answered(|done| self.locks.release(&call, release, done)).await?;
        Ok(Response::new(released_out(revision)))
    }

    async fn get_lock(&self, request: Request<v1::GetLockRequest>) -> Reply<v1::GetLockResponse> {
        let call = call_of(self.locks.node(), &request);
        let get = get_lock_in(request.into_inner()).map_err(status)?;
        let found = answered(|done| self.locks.get(&call, get, done)).await?;
        Ok(Response::new(found_lock_out(&found)))
    }

    async fn list_locks(
        &self,
        request: Request<v1::ListLocksRequest>,
    ) -> Reply<v1::ListLocksResponse> {
        let call = call_of(self.locks.node(), &request);
        let list = list_locks_in(request.into_inner()).map_err(status)?;
        let found = answered(|done| self.locks.list(&call, list, done)).await?;
        Ok(Response::new(listed_locks_out(&found)))
    }

    async fn break_lock(
        &self,
        request: Request<v1::BreakLockRequest>,
    ) -> Reply<v1::BreakLockResponse> {
        let call = call_of(self.locks.node(), &request);
        let broken = break_in(request.into_inner()).map_err(status)?;
        let revision = answered(|done| self.locks.break_lock(&call, broken, done)).await?;
        Ok(Response::new(broken_out(revision)))
    }
}
