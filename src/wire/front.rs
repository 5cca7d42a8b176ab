//! The shortest way for the calls of which there are most.
//!
//! tonic routes calls by way of axum, which looks for the path in a tree and boxes the service, the
//! call and the answer: a tenth of what a call costs. So calls of `SessionService`, `LeaseService`
//! and `LockService` are told by their path and handed over directly, and the router sees the rest.

use std::convert::Infallible;
use std::task::{Context, Poll};

use futures_util::future::Either;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::service::Routes;
use tower_layer::Layer;

use super::lease::LeaseServer;
use super::lock::LockServer;
use super::session::SessionServer;
use crate::proto::v1::lease_service_server::LeaseServiceServer;
use crate::proto::v1::lock_service_server::LockServiceServer;
use crate::proto::v1::session_service_server::SessionServiceServer;

const SESSION_SERVICE: &str = "/quorate.v1.SessionService/";
const LEASE_SERVICE: &str = "/quorate.v1.LeaseService/";
const LOCK_SERVICE: &str = "/quorate.v1.LockService/";

/// Puts services in front of the router.
#[derive(Clone)]
pub(super) struct Front {
    pub(super) sessions: SessionServiceServer<SessionServer>,
    pub(super) leases: LeaseServiceServer<LeaseServer>,
    pub(super) locks: LockServiceServer<LockServer>,
}

impl Layer<Routes> for Front {
    type Service = Fronted;

    fn layer(&self, routes: Routes) -> Fronted {
        Fronted { front: self.clone(), routes }
    }
}

/// The router with services in front.
#[derive(Clone)]
pub(super) struct Fronted {
    front: Front,
    routes: Routes,
}

type Request = http::Request<Body>;
type Response = http::Response<Body>;

impl Service<Request> for Fronted {
    type Response = Response;
    type Error = Infallible;
    type Future = Either<BoxFuture<Response, Infallible>, <Routes as Service<Request>>::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // The others are always ready.
        Service::<Request>::poll_ready(&mut self.routes, context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let path = request.uri().path();
        if path.starts_with(SESSION_SERVICE) {
            Either::Left(self.front.sessions.call(request))
        } else if path.starts_with(LOCK_SERVICE) {
            Either::Left(self.front.locks.call(request))
        } else if path.starts_with(LEASE_SERVICE) {
            Either::Left(self.front.leases.call(request))
        } else {
            Either::Right(self.routes.call(request))
        }
    }
}
