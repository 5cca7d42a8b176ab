//! What all calls have in common that are one message and one answer.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::answers::{COUNTED_MIN, Encoding, Weight, make};
use super::status::status;
use crate::raft::Node;
use crate::service::{ASKED_WEIGHT, Call, Caller, Count, Error, Presence, Present, Share};

/// A `grpc-timeout`.
pub(super) fn parse_timeout(text: &str) -> Option<Duration> {
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

pub(super) type Reply<T> = Result<Response<T>, Status>;

/// Whose share of the room for answers a call takes.
pub(super) fn share_of<T>(request: &Request<T>) -> Arc<Share> {
    request.extensions().get::<Arc<Share>>().cloned().expect("each connection has a share")
}

/// What a call says beside its message.
pub(super) struct Asked {
    share: Arc<Share>,
    /// Less than the caller's, by the time that the answer takes.
    timeout: Option<Duration>,
    /// Dropped with the call.
    _present: Present,
    presence: Presence,
}

impl Asked {
    pub(super) fn of<T>(request: Request<T>) -> (Self, T) {
        let timeout = request.metadata().get("grpc-timeout").and_then(|it| it.to_str().ok());
        let timeout = timeout.and_then(parse_timeout);
        let timeout = timeout.map(|timeout| timeout - (timeout / 4).min(ANSWER_MARGIN_MAX));
        let present = Present::new();
        let presence = present.presence();
        let share = share_of(&request);
        (Self { share, timeout, _present: present, presence }, request.into_inner())
    }

    pub(super) fn call(&self, node: &Node) -> Call<'_> {
        Call::within(node, Caller, &self.share, self.timeout).while_present(&self.presence)
    }

    /// A call that waits for a lock, for `wait` at most.
    pub(super) fn waiting_call(&self, node: &Node, wait: Duration) -> Call<'_> {
        Call::waiting(node, Caller, &self.share, self.timeout, wait)
    }

    /// Runs a use case that reads, and answers what `out` makes of what it finds. `weight` is that
    /// of the names in the request.
    pub(super) async fn find<T, M: Weight + 'static>(
        &self,
        weight: usize,
        run: impl FnOnce(Box<dyn FnOnce(Result<T, Error>) + Send>),
        out: impl FnOnce(T) -> Result<M, Error> + Send + 'static,
    ) -> Reply<M> {
        let asked = Count::asked(ASKED_WEIGHT + weight);
        self.share.hold(asked);
        let under_way = Encoding::new(self.share.clone(), asked);
        let (done, answer) = oneshot::channel();
        let share = self.share.clone();
        run(Box::new(move |result| {
            let made = make(&share, result, out).and_then(|answer| {
                let bytes = answer.weight();
                if bytes < COUNTED_MIN {
                    return Ok((answer, None));
                }
                if !share.can_hold(bytes) {
                    return Err(Error::unread_answers());
                }
                let count = Count::answers(bytes);
                share.hold(count);
                Ok((answer, Some(Encoding::new(share, count))))
            });
            drop(under_way);
            // A caller that has gone away does not want the answer.
            drop(done.send(made));
        }));
        let (answer, encoding) = answer.await.map_err(|_| stopping())?.map_err(status)?;
        let mut response = Response::new(answer);
        if let Some(encoding) = encoding {
            response.extensions_mut().insert(encoding);
        }
        Ok(response)
    }
}

/// Runs a use case that answers by callback, and waits for the answer.
pub(super) async fn answered<T: Send + 'static>(
    run: impl FnOnce(Box<dyn FnOnce(Result<T, Error>) + Send>),
) -> Result<T, Status> {
    let (done, answer) = oneshot::channel();
    // A caller that has gone away does not want the answer.
    run(Box::new(move |result| drop(done.send(result))));
    answer.await.map_err(|_| stopping())?.map_err(status)
}

fn stopping() -> Status {
    Status::unavailable("the node is stopping")
}
