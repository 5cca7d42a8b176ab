//! `quorate.v1.LockService`: decode, call the service, encode.

use std::sync::Arc;

use tonic::{Request, Response};

use super::convert::{
    acquire_in, acquired_out, break_in, broken_out, cancel_in, cancelled_out, found_lock_out,
    get_lock_in, list_locks_in, listed_locks_out, release_in, released_out,
};
use super::status::status;
use super::unary::{Asked, Reply, answered};
use crate::proto::v1;
use crate::proto::v1::lock_service_server::LockService;
use crate::service::{FoundLocks, Locks};

pub(super) struct LockServer {
    pub(super) locks: Arc<Locks>,
}

#[tonic::async_trait]
impl LockService for LockServer {
    async fn acquire_lock(
        &self,
        request: Request<v1::AcquireLockRequest>,
    ) -> Reply<v1::AcquireLockResponse> {
        let (asked, message) = Asked::of(request);
        let acquire = acquire_in(message).map_err(status)?;
        let call = asked.waiting_call(self.locks.node(), acquire.wait);
        let acquired = answered(|done| self.locks.acquire(&call, acquire, done)).await?;
        Ok(Response::new(acquired_out(&acquired)))
    }

    async fn cancel_acquire(
        &self,
        request: Request<v1::CancelAcquireRequest>,
    ) -> Reply<v1::CancelAcquireResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.locks.node());
        let cancel = cancel_in(message).map_err(status)?;
        let revision = answered(|done| self.locks.cancel(&call, cancel, done)).await?;
        Ok(Response::new(cancelled_out(revision)))
    }

    async fn release_lock(
        &self,
        request: Request<v1::ReleaseLockRequest>,
    ) -> Reply<v1::ReleaseLockResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.locks.node());
        let release = release_in(message).map_err(status)?;
        let revision = answered(|done| self.locks.release(&call, release, done)).await?;
        Ok(Response::new(released_out(revision)))
    }

    async fn get_lock(&self, request: Request<v1::GetLockRequest>) -> Reply<v1::GetLockResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.locks.node());
        let get = get_lock_in(message).map_err(status)?;
        let out = |found: FoundLocks| Ok(found_lock_out(&found));
        asked.find(0, |done| self.locks.get(&call, get, done), out).await
    }

    async fn list_locks(
        &self,
        request: Request<v1::ListLocksRequest>,
    ) -> Reply<v1::ListLocksResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.locks.node());
        let list = list_locks_in(message).map_err(status)?;
        let out = |found: FoundLocks| Ok(listed_locks_out(&found));
        asked.find(0, |done| self.locks.list(&call, list, done), out).await
    }

    async fn break_lock(
        &self,
        request: Request<v1::BreakLockRequest>,
    ) -> Reply<v1::BreakLockResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.locks.node());
        let broken = break_in(message).map_err(status)?;
        let revision = answered(|done| self.locks.break_lock(&call, broken, done)).await?;
        Ok(Response::new(broken_out(revision)))
    }
}
