//! What all calls pass: the shortest way for those of which there are most, and what has to be true
//! of every answer.
//!
//! tonic routes calls by way of axum, which looks for the path in a tree and boxes the service, the
//! call and the answer: a tenth of what a call costs. So calls of `SessionService`, `LeaseService`
//! and `LockService` are told by their path and handed over directly, and the router sees the rest.
//!
//! - A call whose time is over is answered with our reason. tonic has a timer of its own for that,
//!   around this one, which was set later and looks at this one first.
//! - A panic in a call is that call's alone.
//! - The bytes of an answer carry what they count for (`answers`), and those of a request count
//!   until it has come whole (`received`).

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::time::{Instant, Sleep};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::service::Routes;
use tower_layer::Layer;

use super::answers::counted;
use super::lease::LeaseServer;
use super::lock::LockServer;
use super::received::received;
use super::session::SessionServer;
use super::status::status;
use super::unary::parse_timeout;
use crate::proto::v1::lease_service_server::LeaseServiceServer;
use crate::proto::v1::lock_service_server::LockServiceServer;
use crate::proto::v1::session_service_server::SessionServiceServer;
use crate::service::{Admission, Error};

const SESSION_SERVICE: &str = "/quorate.v1.SessionService/";
const LEASE_SERVICE: &str = "/quorate.v1.LeaseService/";
const LOCK_SERVICE: &str = "/quorate.v1.LockService/";

/// How the names of methods begin that change nothing.
const READS: [&str; 6] = ["Get", "BatchGet", "List", "Locate", "Describe", "Status"];

/// Puts services in front of the router.
#[derive(Clone)]
pub(super) struct Front {
    pub(super) sessions: SessionServiceServer<SessionServer>,
    pub(super) leases: LeaseServiceServer<LeaseServer>,
    pub(super) locks: LockServiceServer<LockServer>,
    pub(super) admission: Arc<Admission>,
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
    type Future = Answering;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // The others are always ready.
        Service::<Request>::poll_ready(&mut self.routes, context)
    }

    fn call(&mut self, request: Request) -> Answering {
        let timeout = request.headers().get("grpc-timeout").and_then(|it| it.to_str().ok());
        let timeout = timeout.and_then(parse_timeout);
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let request = received(request);
        let path = request.uri().path();
        let changes_something = changes_something(path);
        let answer: BoxFuture<Response, Infallible> = if path.starts_with(SESSION_SERVICE) {
            self.front.sessions.call(request)
        } else if path.starts_with(LOCK_SERVICE) {
            self.front.locks.call(request)
        } else if path.starts_with(LEASE_SERVICE) {
            self.front.leases.call(request)
        } else {
            Box::pin(self.routes.call(request))
        };
        let admission = self.front.admission.clone();
        Answering { answer, admission, deadline, timer: None, changes_something }
    }
}

fn changes_something(path: &str) -> bool {
    let method = path.rsplit('/').next().unwrap_or_default();
    !READS.iter().any(|read| method.starts_with(read))
}

/// A call under way.
pub(super) struct Answering {
    answer: BoxFuture<Response, Infallible>,
    admission: Arc<Admission>,
    deadline: Option<Instant>,
    /// Set once there is something to wait for.
    timer: Option<Pin<Box<Sleep>>>,
    changes_something: bool,
}

impl Future for Answering {
    type Output = Result<Response, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let polled = catch_unwind(AssertUnwindSafe(|| this.answer.as_mut().poll(context)));
        match polled {
            Ok(Poll::Ready(answer)) => return Poll::Ready(answer.map(counted)),
            Ok(Poll::Pending) => {}
            Err(_) => {
                this.admission.note_panic();
                return Poll::Ready(Ok(status(Error::panicked()).into_http()));
            }
        }
        let Some(deadline) = this.deadline else { return Poll::Pending };
        let timer = this.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        timer.as_mut().poll(context).map(|()| {
            let error = Error::deadline_exceeded(this.changes_something);
            Ok(status(error).into_http())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answering(answer: BoxFuture<Response, Infallible>, deadline: Option<Instant>) -> Answering {
        let admission = Admission::new();
        Answering { answer, admission, deadline, timer: None, changes_something: false }
    }

    fn reason(response: &Response) -> (Option<String>, Option<String>) {
        use tonic_types::StatusExt as _;
        let status = tonic::Status::from_header_map(response.headers()).unwrap();
        let reason = status.get_details_error_info().map(|info| info.reason);
        (Some(format!("{:?}", status.code())), reason)
    }

    #[tokio::test]
    async fn a_call_whose_time_is_over_is_told_so_before_tonic_ends_it() {
        let timeout = std::time::Duration::from_millis(20);
        let deadline = Instant::now() + timeout;
        let answering = answering(Box::pin(std::future::pending()), Some(deadline));
        // As tonic does: the timer is set later, and looked at later.
        let timer = tokio::time::sleep(timeout);
        let answer = tokio::select! {
            biased;
            answer = answering => answer.unwrap(),
            () = timer => panic!("tonic's timer was first"),
        };
        let expected = (Some("DeadlineExceeded".into()), Some("DEADLINE_EXCEEDED".into()));
        assert_eq!(reason(&answer), expected);
    }

    #[tokio::test]
    async fn a_panic_is_its_own_calls_alone_and_counted() {
        let answering = answering(Box::pin(async { panic!("a defect") }), None);
        let admission = answering.admission.clone();
        let answer = answering.await.unwrap();
        let expected = (Some("Internal".into()), Some("REQUEST_PANICKED".into()));
        assert_eq!(reason(&answer), expected);
        assert_eq!(admission.panics(), 1);
    }

    #[test]
    fn reads_are_told_by_their_names() {
        assert!(!changes_something("/quorate.v1.SessionService/GetSession"));
        assert!(!changes_something("/quorate.v1.SessionService/BatchGetSessions"));
        assert!(!changes_something("/quorate.v1.RingService/LocateKeys"));
        assert!(changes_something("/quorate.v1.SessionService/CreateSession"));
        assert!(changes_something("/quorate.v1.LockService/AcquireLock"));
        assert!(changes_something(""));
    }
}
