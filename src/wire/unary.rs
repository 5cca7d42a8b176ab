//! What all calls have in common that are one message and one answer.

use std::time::Duration;

use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::status::status;
use crate::raft::Node;
use crate::service::{Call, Caller, Error};

/// What the caller set as `grpc-timeout`.
pub(super) fn timeout_of<T>(request: &Request<T>) -> Option<Duration> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value.saturating_mul(3600)),
        "M" => Duration::from_secs(value.saturating_mul(60)),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// How much earlier than at the caller's own deadline an answer is due: later it would meet a
/// caller, or a transport on the way, that has given up without hearing the reason.
const ANSWER_MARGIN_MAX: Duration = Duration::from_millis(50);

/// The same, less the time that the answer takes.
fn answer_within<T>(request: &Request<T>) -> Option<Duration> {
    timeout_of(request).map(|timeout| timeout - (timeout / 4).min(ANSWER_MARGIN_MAX))
}

pub(super) fn call_of<T>(node: &Node, request: &Request<T>) -> Call {
    Call::within(node, Caller, answer_within(request))
}

/// A call that waits for a lock, for `wait` at most.
pub(super) fn waiting_call_of<T>(node: &Node, request: &Request<T>, wait: Duration) -> Call {
    Call::waiting(node, Caller, answer_within(request), wait)
}

pub(super) type Reply<T> = Result<Response<T>, Status>;

/// Runs a use case that answers by callback, and waits for the answer.
pub(super) async fn answered<T: Send + 'static>(
    run: impl FnOnce(Box<dyn FnOnce(Result<T, Error>) + Send>),
) -> Result<T, Status> {
    let (done, answer) = oneshot::channel();
    // A caller that has gone away does not want the answer.
    run(Box::new(move |result| drop(done.send(result))));
    match answer.await {
        Ok(result) => result.map_err(status),
        Err(_) => Err(Status::unavailable("the node is stopping")),
    }
}
