//! `quorate.v1.PipelineService`: every request over one stream.
//!
//! One task reads; each request goes straight into the service with a callback that puts the
//! answer into the stream's outbox. A request is under way until its answer has left the outbox
//! for the transport; at the limit, of their number or of the bytes in the outbox, nothing more is
//! read, and the client's sends are stopped by flow control. What was under way by then may still
//! be answered by a megabyte each, so beyond twice those bytes reads are refused: a client that
//! does not read its answers cannot make the node hold much.
//!
//! An Acquire that waits for its lock is counted apart until it is answered, and beyond a limit of
//! its own it is refused. Were it under way, enough of them would keep the node from reading the
//! very release that they wait for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use prost::Message as _;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::UseCases;
use super::cluster::describe;
use super::convert::{
    acquire_in, acquired_out, batch_get_in, batch_out, break_in, broken_out, cancel_in,
    cancelled_out, create_in, created_out, delete_in, deleted_out, duration_in, found_lease_out,
    found_lock_out, found_out, found_ring_out, get_in, get_lease_in, get_lock_in, get_ring_in,
    grant_in, granted_out, join_in, joined_out, leave_in, left_out, list_in, list_leases_in,
    list_locks_in, listed_leases_out, listed_locks_out, listed_out, locate_in, located_out,
    release_in, released_out, renew_in, renewed_out, revoke_in, revoked_out, touch_in, touched_out,
    update_in, updated_out,
};
use super::status::{empty_request, pipeline_error};
use crate::limits::{PIPELINE_ANSWER_BYTES_MAX, PIPELINE_IN_FLIGHT_MAX, PIPELINE_WAITING_MAX};
use crate::proto::v1;
use crate::proto::v1::pipeline_request::Request as Asked;
use crate::proto::v1::pipeline_response::Response as Answer;
use crate::proto::v1::pipeline_service_server::PipelineService;
use crate::service::{Call, Caller, Error, Leases, Locks, Rings, Sessions};

pub(super) struct Pipelines {
    use_cases: UseCases,
    /// Ends every stream once what is under way on it has been answered.
    draining: Arc<Notify>,
}

impl Pipelines {
    pub(super) fn new(use_cases: UseCases, draining: Arc<Notify>) -> Self {
        Self { use_cases, draining }
    }
}

/// Answers, each with the bytes that it counts for.
type Outbox = mpsc::UnboundedSender<(v1::PipelineResponse, usize)>;

/// The way of answers into one stream.
struct Flow {
    outbox: Outbox,
    room: Arc<Room>,
}

/// How full one stream is.
struct Room {
    under_way: AtomicUsize,
    /// Acquires that wait, which are not under way.
    waiting: AtomicUsize,
    /// Bytes of the answers in the outbox.
    bytes: AtomicUsize,
    made: Notify,
}

impl Room {
    fn holding(under_way: usize) -> Self {
        Self {
            under_way: AtomicUsize::new(under_way),
            waiting: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            made: Notify::new(),
        }
    }

    fn is_full(&self) -> bool {
        self.under_way.load(Ordering::Acquire) >= PIPELINE_IN_FLIGHT_MAX
            || self.bytes.load(Ordering::Acquire) >= PIPELINE_ANSWER_BYTES_MAX
    }

    fn left(&self, bytes: usize) {
        let was_full = self.under_way.fetch_sub(1, Ordering::AcqRel) == PIPELINE_IN_FLIGHT_MAX;
        let before = self.bytes.fetch_sub(bytes, Ordering::AcqRel);
        let most = PIPELINE_ANSWER_BYTES_MAX;
        if was_full || (before >= most && before - bytes < most) {
            self.made.notify_one();
        }
    }

    /// What is under way begins to wait. False if there are too many.
    fn begins_to_wait(&self) -> bool {
        if self.waiting.fetch_add(1, Ordering::AcqRel) >= PIPELINE_WAITING_MAX {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            return false;
        }
        self.left(0);
        true
    }

    /// What waited is under way again.
    fn ends_to_wait(&self) {
        self.under_way.fetch_add(1, Ordering::AcqRel);
        self.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Flow {
    fn answer(&self, correlation_id: u64, result: Result<Answer, Error>) {
        let refused = |error| Answer::Error(pipeline_error(error));
        let mut response = result.unwrap_or_else(refused);
        let mut bytes = found_bytes(&response);
        let before = self.room.bytes.fetch_add(bytes, Ordering::AcqRel);
        if bytes > 0 && before >= 2 * PIPELINE_ANSWER_BYTES_MAX {
            self.room.bytes.fetch_sub(bytes, Ordering::AcqRel);
            (response, bytes) = (refused(Error::unread_answers()), 0);
        }
        let response = Some(response);
        // A client that has gone away does not want the answer.
        let _ = self.outbox.send((v1::PipelineResponse { correlation_id, response }, bytes));
    }
}

/// What an answer counts for: its bytes, if it is to a read, as those to writes are small.
fn found_bytes(answer: &Answer) -> usize {
    match answer {
        Answer::GetSession(found) => found.encoded_len(),
        Answer::BatchGetSessions(found) => found.encoded_len(),
        Answer::ListSessions(found) => found.encoded_len(),
        Answer::GetLease(found) => found.encoded_len(),
        Answer::ListLeases(found) => found.encoded_len(),
        Answer::GetLock(found) => found.encoded_len(),
        Answer::ListLocks(found) => found.encoded_len(),
        Answer::GetRing(found) => found.encoded_len(),
        Answer::LocateKeys(found) => found.encoded_len(),
        _ => 0,
    }
}

#[tonic::async_trait]
impl PipelineService for Pipelines {
    type PipelineStream = BoxStream<'static, Result<v1::PipelineResponse, Status>>;

    async fn pipeline(
        &self,
        request: Request<Streaming<v1::PipelineRequest>>,
    ) -> Result<Response<Self::PipelineStream>, Status> {
        let requests = request.into_inner();
        let (outbox, outbound) = mpsc::unbounded_channel();
        let hello = Some(Answer::Hello(describe(&self.use_cases.cluster)));
        let hello = v1::PipelineResponse { correlation_id: 0, response: hello };
        // The receiver is held right here.
        let _ = outbox.send((hello, 0));
        // The hello counts as well, as it leaves like an answer.
        let room = Arc::new(Room::holding(1));
        let flow = Arc::new(Flow { outbox, room: room.clone() });
        tokio::spawn(read(self.use_cases.clone(), requests, flow, self.draining.clone()));
        let outbound = UnboundedReceiverStream::new(outbound).map(move |(answer, bytes)| {
            room.left(bytes);
            Ok(answer)
        });
        Ok(Response::new(outbound.boxed()))
    }
}

/// Reads requests until the client ends the stream or the node drains. The stream closes when the
/// last request under way has dropped its handle on the outbox.
async fn read(
    use_cases: UseCases,
    mut requests: Streaming<v1::PipelineRequest>,
    flow: Arc<Flow>,
    draining: Arc<Notify>,
) {
    let drained = draining.notified();
    let mut drained = std::pin::pin!(drained);
    loop {
        let request = tokio::select! {
            biased;
            request = requests.message(), if !flow.room.is_full() => request,
            () = flow.room.made.notified() => continue,
            () = &mut drained => return,
        };
        let Ok(Some(request)) = request else { return };
        flow.room.under_way.fetch_add(1, Ordering::AcqRel);
        dispatch(&use_cases, request, flow.clone());
    }
}

fn dispatch(use_cases: &UseCases, request: v1::PipelineRequest, flow: Arc<Flow>) {
    let id = request.correlation_id;
    let timeout = request.timeout.map(|timeout| duration_in("timeout", timeout)).transpose();
    let (timeout, asked) = match (timeout, request.request) {
        (Ok(timeout), Some(asked)) => (timeout, asked),
        (Err(error), _) => return flow.answer(id, Err(error)),
        (_, None) => return flow.answer(id, Err(empty_request())),
    };
    let failed = flow.clone();
    if let Err(error) = serve(use_cases, timeout, asked, id, flow) {
        failed.answer(id, Err(error));
    }
}

/// Hands a request to its use case, which answers through `flow`; an error is for the caller to
/// answer.
fn serve(
    use_cases: &UseCases,
    timeout: Option<Duration>,
    asked: Asked,
    id: u64,
    flow: Arc<Flow>,
) -> Result<(), Error> {
    let call = &Call::within(use_cases.sessions.node(), Caller, timeout);
    match asked {
        Asked::CreateSession(_)
        | Asked::GetSession(_)
        | Asked::BatchGetSessions(_)
        | Asked::UpdateSession(_)
        | Asked::TouchSession(_)
        | Asked::DeleteSession(_)
        | Asked::ListSessions(_) => serve_session(&use_cases.sessions, call, asked, id, flow),
        Asked::GrantLease(_)
        | Asked::KeepAliveLeases(_)
        | Asked::RevokeLease(_)
        | Asked::GetLease(_)
        | Asked::ListLeases(_) => serve_lease(&use_cases.leases, call, asked, id, flow),
        Asked::AcquireLock(request) => acquire(&use_cases.locks, timeout, request, id, flow),
        Asked::CancelAcquire(_)
        | Asked::ReleaseLock(_)
        | Asked::GetLock(_)
        | Asked::ListLocks(_)
        | Asked::BreakLock(_) => serve_lock(&use_cases.locks, call, asked, id, flow),
        Asked::JoinRing(_) | Asked::LeaveRing(_) | Asked::LocateKeys(_) | Asked::GetRing(_) => {
            serve_ring(&use_cases.rings, call, asked, id, flow)
        }
    }
}

fn serve_session(
    sessions: &Sessions,
    call: &Call,
    asked: Asked,
    id: u64,
    flow: Arc<Flow>,
) -> Result<(), Error> {
    match asked {
        Asked::CreateSession(request) => {
            sessions.create(call, create_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::CreateSession(created_out(it))));
            });
        }
        Asked::GetSession(request) => {
            let (get, wanted) = get_in(request)?;
            sessions.get(call, get, move |result| {
                flow.answer(id, result.map(|it| Answer::GetSession(found_out(&it, &wanted))));
            });
        }
        Asked::BatchGetSessions(request) => {
            let (get, wanted) = batch_get_in(request)?;
            sessions.batch_get(call, get, move |result| {
                flow.answer(id, result.map(|it| Answer::BatchGetSessions(batch_out(&it, &wanted))));
            });
        }
        Asked::UpdateSession(request) => {
            sessions.update(call, update_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::UpdateSession(updated_out(&it))));
            });
        }
        Asked::TouchSession(request) => {
            let touch = touch_in(request)?;
            sessions.touch(call, &touch.context, touch.namespace, &touch.session, move |result| {
                flow.answer(id, result.map(|it| Answer::TouchSession(touched_out(&it))));
            });
        }
        Asked::DeleteSession(request) => {
            sessions.delete(call, delete_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::DeleteSession(deleted_out(&it))));
            });
        }
        Asked::ListSessions(request) => {
            sessions.list(call, list_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::ListSessions(listed_out(&it))));
            });
        }
        _ => return Err(empty_request()),
    }
    Ok(())
}

fn serve_lease(
    leases: &Leases,
    call: &Call,
    asked: Asked,
    id: u64,
    flow: Arc<Flow>,
) -> Result<(), Error> {
    match asked {
        Asked::GrantLease(request) => {
            leases.grant(call, grant_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::GrantLease(granted_out(&it))));
            });
        }
        Asked::KeepAliveLeases(request) => {
            leases.renew(call, renew_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::KeepAliveLeases(renewed_out(it))));
            });
        }
        Asked::RevokeLease(request) => {
            leases.revoke(call, revoke_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::RevokeLease(revoked_out(it))));
            });
        }
        Asked::GetLease(request) => {
            leases.get(call, get_lease_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::GetLease(found_lease_out(&it))));
            });
        }
        Asked::ListLeases(request) => {
            leases.list(call, list_leases_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::ListLeases(listed_leases_out(&it))));
            });
        }
        _ => return Err(empty_request()),
    }
    Ok(())
}

/// Takes a lock, which may take as long as the caller is willing to wait.
fn acquire(
    locks: &Locks,
    timeout: Option<Duration>,
    request: v1::AcquireLockRequest,
    id: u64,
    flow: Arc<Flow>,
) -> Result<(), Error> {
    let acquire = acquire_in(request)?;
    let call = Call::waiting(locks.node(), Caller, timeout, acquire.wait);
    let waits = !acquire.wait.is_zero();
    if waits && !flow.room.begins_to_wait() {
        let what = "requests that wait for locks on this pipeline";
        return Err(Error::too_many(what, PIPELINE_WAITING_MAX as u64));
    }
    locks.acquire(&call, acquire, move |result| {
        if waits {
            flow.room.ends_to_wait();
        }
        flow.answer(id, result.map(|it| Answer::AcquireLock(acquired_out(&it))));
    });
    Ok(())
}

fn serve_lock(
    locks: &Locks,
    call: &Call,
    asked: Asked,
    id: u64,
    flow: Arc<Flow>,
) -> Result<(), Error> {
    match asked {
        Asked::CancelAcquire(request) => {
            locks.cancel(call, cancel_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::CancelAcquire(cancelled_out(it))));
            });
        }
        Asked::ReleaseLock(request) => {
            locks.release(call, release_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::ReleaseLock(released_out(it))));
            });
        }
        Asked::GetLock(request) => {
            locks.get(call, get_lock_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::GetLock(found_lock_out(&it))));
            });
        }
        Asked::ListLocks(request) => {
            locks.list(call, list_locks_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::ListLocks(listed_locks_out(&it))));
            });
        }
        Asked::BreakLock(request) => {
            locks.break_lock(call, break_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::BreakLock(broken_out(it))));
            });
        }
        _ => return Err(empty_request()),
    }
    Ok(())
}

fn serve_ring(
    rings: &Rings,
    call: &Call,
    asked: Asked,
    id: u64,
    flow: Arc<Flow>,
) -> Result<(), Error> {
    match asked {
        Asked::JoinRing(request) => {
            rings.join(call, join_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::JoinRing(joined_out(&it))));
            });
        }
        Asked::LeaveRing(request) => {
            rings.leave(call, leave_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::LeaveRing(left_out(it))));
            });
        }
        Asked::LocateKeys(request) => {
            rings.locate(call, locate_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::LocateKeys(located_out(&it))));
            });
        }
        Asked::GetRing(request) => {
            rings.get(call, get_ring_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::GetRing(found_ring_out(&it))));
            });
        }
        _ => return Err(empty_request()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_does_not_read_is_not_kept_much_for() {
        let (outbox, mut inbox) = mpsc::unbounded_channel();
        let flow = Flow { outbox, room: Arc::new(Room::holding(0)) };
        let found = || {
            let attribute = ("a".to_owned(), vec![0; 1024 * 1024].into());
            let session = v1::Session { attributes: [attribute].into(), ..v1::Session::default() };
            Ok(Answer::GetSession(v1::GetSessionResponse { revision: 1, session: Some(session) }))
        };
        let most = PIPELINE_ANSWER_BYTES_MAX / (1024 * 1024);
        for number in 0..2 * most {
            assert_eq!(flow.room.is_full(), number >= most, "after {number}");
            flow.room.under_way.fetch_add(1, Ordering::AcqRel);
            flow.answer(number as u64, found());
        }
        flow.room.under_way.fetch_add(2, Ordering::AcqRel);
        flow.answer(1_000, found());
        let done = v1::ReleaseLockResponse { revision: 7 };
        flow.answer(1_001, Ok(Answer::ReleaseLock(done)));
        let mut answers = Vec::new();
        while let Ok((answer, bytes)) = inbox.try_recv() {
            flow.room.left(bytes);
            answers.push(answer);
        }
        assert_eq!(answers.len(), 2 * most + 2);
        let found =
            |answer: &&v1::PipelineResponse| matches!(answer.response, Some(Answer::GetSession(_)));
        assert_eq!(answers.iter().filter(found).count(), 2 * most);
        let Some(Answer::Error(error)) = &answers[2 * most].response else { panic!() };
        assert!(error.message.contains("have not been read"), "{error:?}");
        assert_eq!(answers[2 * most + 1].response, Some(Answer::ReleaseLock(done)));
        assert!(!flow.room.is_full());
        assert_eq!(flow.room.bytes.load(Ordering::Acquire), 0);
        assert_eq!(flow.room.under_way.load(Ordering::Acquire), 0);
    }
}
