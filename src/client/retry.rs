//! From a request to its outcome: attempts, deadlines, and when to stop.
//!
//! A request is named, dated and numbered once and sent until it has an answer that is final or
//! its deadline passes. Only failures that say "not applied, try again" or "no idea" lead to
//! another attempt, and each resend says that it is one, so that the server can tell it from a new
//! request. What is not known at the deadline is reported as unknown, never as failed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Client;
use super::error::{Error, Failure};
use super::id::mix;
use super::time::millis_to_proto;
use crate::limits::{REQUEST_BYTES_MAX, REQUEST_LIFETIME_MAX};
use crate::proto::v1::RequestContext;
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;

/// Longest time between a request's first sending and its expiry: below the server's own limit,
/// because the two may disagree a little about the time.
const EXPIRE_AFTER_MAX: Duration = REQUEST_LIFETIME_MAX.saturating_sub(Duration::from_secs(10));
/// Pauses between attempts double from the first to the last of these.
const BACKOFF_MIN: Duration = Duration::from_millis(5);
/// Short, because an election is: whoever waits longer than the new leader needs is idle.
const BACKOFF_MAX: Duration = Duration::from_millis(100);
/// Room that the envelope of a message needs beside the request itself.
const ENVELOPE_BYTES: usize = 64;

impl Client {
    /// Sends `request` until it has an outcome or the client's timeout has passed.
    pub(super) fn call(
        &self,
        request: Request,
    ) -> impl Future<Output = Result<Response, Error>> + Send + '_ {
        // Behind a pointer before the first future is made, so that none has to carry it.
        let request = Arc::new(request);
        async move { self.call_shared(request, self.patience(), &mut Progress::default()).await }
    }

    /// The same with another patience; `progress` tells what came of it beside the outcome.
    pub(super) fn call_with<'a>(
        &'a self,
        request: Request,
        patience: Patience,
        progress: &'a mut Progress,
    ) -> impl Future<Output = Result<Response, Error>> + Send + 'a {
        self.call_shared(Arc::new(request), patience, progress)
    }

    /// That of an ordinary request.
    pub(super) fn patience(&self) -> Patience {
        Patience { total: self.timeout, attempt: self.attempt_timeout, lifetime: self.timeout }
    }

    async fn call_shared(
        &self,
        mut request: Arc<Request>,
        patience: Patience,
        progress: &mut Progress,
    ) -> Result<Response, Error> {
        let mut now = Instant::now();
        let deadline = now + patience.total;
        if request.encoded_len() > REQUEST_BYTES_MAX - ENVELOPE_BYTES {
            return Err(Error::LimitExceeded {
                limit: Some("request_bytes".to_owned()),
                reason: "LIMIT_EXCEEDED".to_owned(),
                message: format!("the request is larger than {REQUEST_BYTES_MAX} bytes"),
            });
        }
        loop {
            let attempt = self.attempt(&mut request, now, deadline, patience, progress);
            let failure = match attempt.await {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            let is_write = context(Arc::make_mut(&mut request)).is_some();
            let delay = match failure {
                Failure::Final(error) => return Err(progress.conclude(error, is_write)),
                Failure::NotApplied { error, delay, .. } => progress.note(error, delay),
                Failure::NotSent(error) => progress.note_unsent(error),
                Failure::Pending(error) => {
                    // Nothing went wrong: it is asked for again at once.
                    progress.maybe_applied = true;
                    progress.failures = 0;
                    progress.note(error, None)
                }
                Failure::Unknown(error) => {
                    progress.maybe_applied = true;
                    progress.note(error, None)
                }
            };
            let pause = self.backoff(progress.failures).max(delay);
            if Instant::now() + pause >= deadline {
                return Err(progress.give_up(is_write, patience.total, self.pool.failures()));
            }
            tokio::time::sleep(pause).await;
            now = Instant::now();
        }
    }

    async fn attempt(
        &self,
        request: &mut Arc<Request>,
        mut now: Instant,
        deadline: Instant,
        patience: Patience,
        progress: &mut Progress,
    ) -> Result<Response, Failure> {
        let connection = match self.pool.ready_connection() {
            Ok(connection) => connection,
            Err(index) => {
                let connecting = self.pool.connect(index);
                let connected = tokio::time::timeout_at(deadline, connecting).await;
                now = Instant::now();
                let late = || {
                    let why = self.pool.failures();
                    let why = why.unwrap_or_else(|| "no node could be reached".to_owned());
                    Failure::NotSent(Error::unavailable(why))
                };
                connected.map_err(|_| late())?.map_err(|unreached| match unreached.is_final {
                    true => Failure::Final(unreached.error),
                    false => Failure::NotSent(unreached.error),
                })?
            }
        };
        self.pool.refresh_if_due(&connection, now);
        let timeout = deadline.saturating_duration_since(now).min(patience.attempt);
        // Copies the request only if the attempt before is still in the transport's hands.
        if !progress.dated {
            let dated = self.date(Arc::make_mut(request), patience.lifetime);
            dated.map_err(|error| {
                self.pool.complain(&connection);
                let failure = Failure::NotApplied { error, delay: None, elsewhere: true };
                failure.of_node(&connection.name())
            })?;
            progress.dated = true;
        } else if progress.sent
            && let Some(Some(context)) = context(Arc::make_mut(request))
        {
            context.resend = true;
        }
        let result = connection.call(request.clone(), now, timeout).await;
        progress.sent |= !matches!(result, Err(Failure::NotSent(_)));
        match &result {
            Err(Failure::NotApplied { elsewhere: true, .. }) => self.pool.complain(&connection),
            Err(Failure::Unknown(_)) if connection.is_closed() => self.pool.lost(&connection),
            // Perhaps it is cut off from the others, or only slow: the next one may know more.
            Err(Failure::Unknown(_)) => self.pool.complain(&connection),
            _ => {}
        }
        result.map_err(|failure| failure.of_node(&connection.name()))
    }

    /// Names a write, unless it has a name, and dates it.
    fn date(&self, request: &mut Request, lifetime: Duration) -> Result<(), Error> {
        let Some(context) = context(request) else { return Ok(()) };
        let Some(now) = self.pool.time.now() else {
            // A node that has started and heard of no leader does not know the cluster's time.
            let (reason, message) = match self.pool.knows_cluster() {
                true => ("NO_LEADER", "it has not heard of a leader since it started"),
                false => ("NOT_INITIALIZED", "it belongs to no cluster yet"),
            };
            let (reason, message) = (reason.to_owned(), message.to_owned());
            return Err(Error::Unavailable { reason, message });
        };
        let lifetime = lifetime.min(EXPIRE_AFTER_MAX);
        let expiry = now.saturating_add(i64::try_from(lifetime.as_millis()).unwrap_or(i64::MAX));
        let named = context.as_ref().map(|context| context.request_id).filter(|id| *id != 0);
        *context = Some(RequestContext {
            request_id: named.unwrap_or_else(|| self.request_ids.mint()),
            resend: false,
            first_sent_time: Some(millis_to_proto(now)),
            expire_time: Some(millis_to_proto(expiry)),
        });
        Ok(())
    }

    /// The pause before attempt `failures + 1`: doubling, and half of it random, so that those who
    /// failed together do not come back together.
    fn backoff(&self, failures: u32) -> Duration {
        let full = BACKOFF_MIN.saturating_mul(1 << failures.min(10)).min(BACKOFF_MAX);
        let random = mix(self.request_ids.mint()) % 1_024;
        full / 2 + (full / 2) * u32::try_from(random).unwrap_or(0) / 1_024
    }
}

/// How long a request may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// With all its attempts.
    pub(super) total: Duration,
    /// One attempt, before another node is asked.
    pub(super) attempt: Duration,
    /// From its first sending until no node applies it any more.
    pub(super) lifetime: Duration,
}

/// What the attempts so far have come to.
#[derive(Default)]
pub(super) struct Progress {
    /// Whether the request has its name and dates.
    dated: bool,
    /// Whether any attempt may have reached a server.
    sent: bool,
    /// Whether any attempt, less the last if that has a final answer, may have been applied.
    pub(super) maybe_applied: bool,
    failures: u32,
    last: Option<Error>,
    /// Whether that is about what was sent.
    told: bool,
}

impl Progress {
    /// That of a request that has been sent before, and has its name and dates from then.
    pub(super) fn of_resend() -> Self {
        Self { dated: true, sent: true, ..Self::default() }
    }

    fn note(&mut self, error: Error, delay: Option<Duration>) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.last = Some(error);
        self.told = true;
        delay.unwrap_or_default()
    }

    /// Nothing was sent, of which what a node has said before says more.
    fn note_unsent(&mut self, error: Error) -> Duration {
        self.failures = self.failures.saturating_add(1);
        if !self.told {
            self.last = Some(error);
        }
        Duration::ZERO
    }

    /// A final answer to this attempt, seen in the light of those before.
    fn conclude(&self, error: Error, is_write: bool) -> Error {
        match error {
            // This resend came too late to be applied, but one before it may have been.
            Error::DeadlineExceeded { message } if is_write && self.maybe_applied => {
                Error::OutcomeUnknown { message }
            }
            error => error,
        }
    }

    /// The deadline has passed; `failures` says which addresses could not be reached.
    fn give_up(&mut self, is_write: bool, timeout: Duration, failures: Option<String>) -> Error {
        let waited = format!("no answer within {timeout:?}");
        let failures = failures.unwrap_or_default();
        let Some(mut last) = self.last.take() else {
            return Error::DeadlineExceeded { message: waited };
        };
        if let Error::Unavailable { message, .. } | Error::DeadlineExceeded { message } = &mut last
            && !failures.is_empty()
            && *message != failures
        {
            message.push_str("; not reached: ");
            message.push_str(&failures);
        }
        if is_write && self.maybe_applied {
            let message = format!("{waited}; it may or may not have been applied: {last}");
            return Error::OutcomeUnknown { message };
        }
        match last {
            Error::Unavailable { reason, message } => {
                Error::Unavailable { reason, message: format!("{waited}: {message}") }
            }
            Error::DeadlineExceeded { message } => {
                Error::DeadlineExceeded { message: format!("{waited}: {message}") }
            }
            other => other,
        }
    }
}

/// Where a write keeps what makes its retry safe; `None` for a read.
fn context(request: &mut Request) -> Option<&mut Option<RequestContext>> {
    match request {
        Request::CreateSession(request) => Some(&mut request.context),
        Request::UpdateSession(request) => Some(&mut request.context),
        Request::TouchSession(request) => Some(&mut request.context),
        Request::DeleteSession(request) => Some(&mut request.context),
        Request::GrantLease(request) => Some(&mut request.context),
        Request::KeepAliveLeases(request) => Some(&mut request.context),
        Request::RevokeLease(request) => Some(&mut request.context),
        Request::AcquireLock(request) => Some(&mut request.context),
        Request::CancelAcquire(request) => Some(&mut request.context),
        Request::ReleaseLock(request) => Some(&mut request.context),
        Request::BreakLock(request) => Some(&mut request.context),
        Request::JoinRing(request) => Some(&mut request.context),
        Request::LeaveRing(request) => Some(&mut request.context),
        Request::GetSession(_) | Request::BatchGetSessions(_) | Request::ListSessions(_) => None,
        Request::GetLease(_) | Request::ListLeases(_) => None,
        Request::GetLock(_) | Request::ListLocks(_) => None,
        Request::LocateKeys(_) | Request::GetRing(_) => None,
    }
}
