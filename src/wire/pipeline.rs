//! `quorate.v1.PipelineService`: every request over one stream.
//!
//! One task reads; each request goes straight into the service with a callback that puts the
//! answer into the stream's outbox. A request is under way until its answer has left the outbox
//! for the encoder; at the limit of their number, or without room to ask on the connection
//! (`service::admission`), nothing more is read, and the client's sends are stopped by flow
//! control.
//!
//! An Acquire that waits for its lock is counted apart until it is answered, and beyond a limit of
//! its own it is refused. Were it under way, enough of them would keep the node from reading the
//! very release that they wait for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt as _};
use tokio::sync::{Notify, mpsc};
use tonic::{Request, Response, Status, Streaming};

use super::UseCases;
use super::answers::{Encoding, Outbox, Weight as _, make};
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
use super::draining::Draining;
use super::lease::RENEWAL_WEIGHT;
use super::status::{empty_request, pipeline_error};
use super::unary::share_of;
use crate::limits::{PIPELINE_IN_FLIGHT_MAX, PIPELINE_WAITING_MAX};
use crate::proto::v1;
use crate::proto::v1::pipeline_request::Request as Asked;
use crate::proto::v1::pipeline_response::Response as Answer;
use crate::proto::v1::pipeline_service_server::PipelineService;
use crate::service::{
    ASKED_WEIGHT, Call, Caller, Count, Error, Leases, Locks, Presence, Present, Rings, Sessions,
    Share,
};

pub(super) struct Pipelines {
    use_cases: UseCases,
    /// Ends every stream once what is under way on it has been answered.
    draining: Draining,
}

impl Pipelines {
    pub(super) fn new(use_cases: UseCases, draining: Draining) -> Self {
        Self { use_cases, draining }
    }
}

/// The way of answers into one stream.
struct Flow {
    answers: mpsc::UnboundedSender<(v1::PipelineResponse, Count)>,
    room: Arc<Room>,
    share: Arc<Share>,
    presence: Presence,
}

/// How full one stream is.
struct Room {
    under_way: AtomicUsize,
    /// Acquires that wait, which are not under way.
    waiting: AtomicUsize,
    made: Notify,
}

impl Room {
    fn holding(under_way: usize) -> Self {
        Self {
            under_way: AtomicUsize::new(under_way),
            waiting: AtomicUsize::new(0),
            made: Notify::new(),
        }
    }

    fn is_full(&self) -> bool {
        self.under_way.load(Ordering::Acquire) >= PIPELINE_IN_FLIGHT_MAX
    }

    fn left(&self) {
        if self.under_way.fetch_sub(1, Ordering::AcqRel) == PIPELINE_IN_FLIGHT_MAX {
            self.made.notify_one();
        }
    }

    /// What is under way begins to wait. False if there are too many.
    fn begins_to_wait(&self) -> bool {
        if self.waiting.fetch_add(1, Ordering::AcqRel) >= PIPELINE_WAITING_MAX {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            return false;
        }
        self.left();
        true
    }

    /// What waited is under way again.
    fn ends_to_wait(&self) {
        self.under_way.fetch_add(1, Ordering::AcqRel);
        self.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// An answer that is due. It counts for something from the request on, and for what it weighs once
/// it is made; see `answers`.
struct Due {
    flow: Arc<Flow>,
    correlation_id: u64,
    asked: usize,
    waits: bool,
    is_sent: bool,
}

impl Due {
    fn new(flow: Arc<Flow>, correlation_id: u64) -> Self {
        flow.room.under_way.fetch_add(1, Ordering::AcqRel);
        flow.share.hold(Count::asked(ASKED_WEIGHT));
        Self { flow, correlation_id, asked: ASKED_WEIGHT, waits: false, is_sent: false }
    }

    /// Counts for so much more, for what the request names.
    fn weigh(&mut self, names: usize) {
        self.flow.share.hold(Count::asked(names));
        self.asked += names;
    }

    /// It waits, perhaps for long, and takes little room: there is a limit for such.
    fn begins_to_wait(&mut self) -> bool {
        self.waits = self.flow.room.begins_to_wait();
        if self.waits {
            self.flow.share.release(Count::asked(std::mem::take(&mut self.asked)));
        }
        self.waits
    }

    /// If it waits, it is under way again.
    fn ends_to_wait(&mut self) {
        if !std::mem::take(&mut self.waits) {
            return;
        }
        self.flow.room.ends_to_wait();
        self.flow.share.hold(Count::asked(ASKED_WEIGHT));
        self.asked = ASKED_WEIGHT;
    }

    fn answer<T>(self, result: Result<T, Error>, out: impl FnOnce(T) -> Result<Answer, Error>) {
        let answer = make(&self.flow.share, result, out);
        self.send(answer.unwrap_or_else(|error| Answer::Error(pipeline_error(error))));
    }

    fn refuse(self, error: Error) {
        self.send(Answer::Error(pipeline_error(error)));
    }

    fn send(mut self, mut answer: Answer) {
        self.ends_to_wait();
        let share = &self.flow.share;
        let small = Count::asked(self.asked.min(ASKED_WEIGHT));
        let count = match found_bytes(&answer) {
            None => Count::asked(self.asked),
            Some(bytes) if bytes <= ASKED_WEIGHT => small,
            Some(bytes) if share.can_hold(bytes) => Count::answers(bytes),
            Some(_) => {
                answer = Answer::Error(pipeline_error(Error::unread_answers()));
                small
            }
        };
        share.hold(Count::answers(count.answers));
        if self.asked > count.asked {
            share.release(Count::asked(self.asked - count.asked));
        }
        let response = Some(answer);
        let response = v1::PipelineResponse { correlation_id: self.correlation_id, response };
        self.is_sent = true;
        // A client that has gone away does not want the answer.
        if self.flow.answers.send((response, count)).is_err() {
            self.flow.share.release(count);
        }
    }
}

impl Drop for Due {
    fn drop(&mut self) {
        if !self.is_sent {
            self.ends_to_wait();
            self.flow.room.left();
            self.flow.share.release(Count::asked(self.asked));
        }
    }
}

/// What a read found. `None` for a write, whose answer counts for what its request did: it has been
/// applied, and there must be room for whoever has to learn of it.
fn found_bytes(answer: &Answer) -> Option<usize> {
    Some(match answer {
        Answer::Error(_) => 0,
        Answer::GetSession(found) => found.weight(),
        Answer::BatchGetSessions(found) => found.weight(),
        Answer::ListSessions(found) => found.weight(),
        Answer::GetLease(found) => found.weight(),
        Answer::ListLeases(found) => found.weight(),
        Answer::GetLock(found) => found.weight(),
        Answer::ListLocks(found) => found.weight(),
        Answer::GetRing(found) => found.weight(),
        Answer::LocateKeys(found) => found.weight(),
        Answer::Hello(_)
        | Answer::CreateSession(_)
        | Answer::UpdateSession(_)
        | Answer::TouchSession(_)
        | Answer::DeleteSession(_)
        | Answer::GrantLease(_)
        | Answer::KeepAliveLeases(_)
        | Answer::RevokeLease(_)
        | Answer::AcquireLock(_)
        | Answer::CancelAcquire(_)
        | Answer::ReleaseLock(_)
        | Answer::BreakLock(_)
        | Answer::JoinRing(_)
        | Answer::LeaveRing(_) => return None,
    })
}

#[tonic::async_trait]
impl PipelineService for Pipelines {
    type PipelineStream = BoxStream<'static, Result<v1::PipelineResponse, Status>>;

    async fn pipeline(
        &self,
        request: Request<Streaming<v1::PipelineRequest>>,
    ) -> Result<Response<Self::PipelineStream>, Status> {
        let share = share_of(&request);
        let requests = request.into_inner();
        let (answers, inbox) = mpsc::unbounded_channel();
        let hello = Some(Answer::Hello(describe(&self.use_cases.cluster)));
        let hello = v1::PipelineResponse { correlation_id: 0, response: hello };
        // The receiver is held right here.
        let _ = answers.send((hello, Count::default()));
        // The hello counts as well, as it leaves like an answer.
        let room = Arc::new(Room::holding(1));
        let encoding = Encoding::new(share.clone(), Count::default());
        let present = Present::new();
        let presence = present.presence();
        let flow = Arc::new(Flow { answers, room: room.clone(), share, presence });
        let use_cases = self.use_cases.clone();
        let dispatch = move |request, flow: &Arc<Flow>| dispatch(&use_cases, request, flow);
        tokio::spawn(read(requests, flow, self.draining.clone(), dispatch));
        let outbound = Outbox::new(inbox, encoding.clone()).map(move |answer| {
            // For as long as there is somebody for whom it flows.
            let _: &Present = &present;
            room.left();
            Ok(answer)
        });
        let mut response = Response::new(outbound.boxed());
        response.extensions_mut().insert(encoding);
        Ok(response)
    }
}

/// Reads requests until the client ends the stream or goes, or the node drains. The stream closes
/// when the last request under way has dropped its handle on the flow.
async fn read(
    requests: impl Stream<Item = Result<v1::PipelineRequest, Status>>,
    flow: Arc<Flow>,
    mut draining: Draining,
    dispatch: impl Fn(v1::PipelineRequest, &Arc<Flow>),
) {
    let mut requests = std::pin::pin!(requests);
    let mut drained = std::pin::pin!(draining.begun());
    // Of a client that goes while the stream is full, nothing else is heard.
    let mut gone = std::pin::pin!(flow.answers.closed());
    loop {
        let is_full = flow.room.is_full();
        let next = async {
            flow.share.room_to_ask().await;
            requests.next().await
        };
        let request = tokio::select! {
            biased;
            request = next, if !is_full => request,
            () = flow.room.made.notified(), if is_full => continue,
            () = &mut gone => return,
            () = &mut drained => return,
        };
        let Some(Ok(request)) = request else { return };
        dispatch(request, &flow);
    }
}

/// A panic on the way is this request's alone.
fn dispatch(use_cases: &UseCases, request: v1::PipelineRequest, flow: &Arc<Flow>) {
    let id = request.correlation_id;
    let dispatched = catch_unwind(AssertUnwindSafe(|| begin(use_cases, request, flow)));
    if dispatched.is_err() {
        flow.share.admission().note_panic();
        Due::new(flow.clone(), id).refuse(Error::panicked());
    }
}

fn begin(use_cases: &UseCases, request: v1::PipelineRequest, flow: &Arc<Flow>) {
    let id = request.correlation_id;
    let due = || Due::new(flow.clone(), id);
    let timeout = request.timeout.map(|timeout| duration_in("timeout", timeout)).transpose();
    let (timeout, asked) = match (timeout, request.request) {
        (Ok(timeout), Some(asked)) => (timeout, asked),
        (Err(error), _) => return due().refuse(error),
        (_, None) => return due().refuse(empty_request()),
    };
    if let Err(error) = serve(use_cases, flow, timeout, asked, due()) {
        due().refuse(error);
    }
}

/// Hands a request to its use case, which answers what is due; an error is for the caller to
/// answer.
fn serve(
    use_cases: &UseCases,
    flow: &Flow,
    timeout: Option<Duration>,
    asked: Asked,
    due: Due,
) -> Result<(), Error> {
    let share = &flow.share;
    let call = Call::within(use_cases.sessions.node(), Caller, share, timeout);
    let call = &call.while_present(&flow.presence);
    match asked {
        Asked::CreateSession(_)
        | Asked::GetSession(_)
        | Asked::BatchGetSessions(_)
        | Asked::UpdateSession(_)
        | Asked::TouchSession(_)
        | Asked::DeleteSession(_)
        | Asked::ListSessions(_) => serve_session(&use_cases.sessions, call, asked, due),
        Asked::GrantLease(_)
        | Asked::KeepAliveLeases(_)
        | Asked::RevokeLease(_)
        | Asked::GetLease(_)
        | Asked::ListLeases(_) => serve_lease(&use_cases.leases, call, asked, due),
        Asked::AcquireLock(request) => acquire(&use_cases.locks, share, timeout, request, due),
        Asked::CancelAcquire(_)
        | Asked::ReleaseLock(_)
        | Asked::GetLock(_)
        | Asked::ListLocks(_)
        | Asked::BreakLock(_) => serve_lock(&use_cases.locks, call, asked, due),
        Asked::JoinRing(_) | Asked::LeaveRing(_) | Asked::LocateKeys(_) | Asked::GetRing(_) => {
            serve_ring(&use_cases.rings, call, asked, due)
        }
    }
}

fn serve_session(
    sessions: &Sessions,
    call: &Call<'_>,
    asked: Asked,
    mut due: Due,
) -> Result<(), Error> {
    match asked {
        Asked::CreateSession(request) => {
            sessions.create(call, create_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::CreateSession(created_out(it))));
            });
        }
        Asked::GetSession(request) => {
            let (get, wanted) = get_in(request)?;
            due.weigh(wanted.weight());
            sessions.get(call, get, move |result| {
                due.answer(result, |it| Ok(Answer::GetSession(found_out(&it, &wanted))));
            });
        }
        Asked::BatchGetSessions(request) => {
            let (get, wanted) = batch_get_in(request)?;
            due.weigh(wanted.weight() + get.weight());
            sessions.batch_get(call, get, move |result| {
                due.answer(result, |it| batch_out(&it, &wanted).map(Answer::BatchGetSessions));
            });
        }
        Asked::UpdateSession(request) => {
            sessions.update(call, update_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::UpdateSession(updated_out(&it))));
            });
        }
        Asked::TouchSession(request) => {
            let touch = touch_in(request)?;
            sessions.touch(call, &touch.context, touch.namespace, &touch.session, move |result| {
                due.answer(result, |it| Ok(Answer::TouchSession(touched_out(&it))));
            });
        }
        Asked::DeleteSession(request) => {
            sessions.delete(call, delete_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::DeleteSession(deleted_out(&it))));
            });
        }
        Asked::ListSessions(request) => {
            sessions.list(call, list_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::ListSessions(listed_out(&it))));
            });
        }
        _ => return Err(empty_request()),
    }
    Ok(())
}

fn serve_lease(leases: &Leases, call: &Call<'_>, asked: Asked, mut due: Due) -> Result<(), Error> {
    match asked {
        Asked::GrantLease(request) => {
            leases.grant(call, grant_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::GrantLease(granted_out(&it))));
            });
        }
        Asked::KeepAliveLeases(request) => {
            due.weigh(RENEWAL_WEIGHT * request.lease_ids.len());
            leases.renew(call, renew_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::KeepAliveLeases(renewed_out(it))));
            });
        }
        Asked::RevokeLease(request) => {
            leases.revoke(call, revoke_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::RevokeLease(revoked_out(it))));
            });
        }
        Asked::GetLease(request) => {
            leases.get(call, get_lease_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::GetLease(found_lease_out(&it))));
            });
        }
        Asked::ListLeases(request) => {
            leases.list(call, list_leases_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::ListLeases(listed_leases_out(&it))));
            });
        }
        _ => return Err(empty_request()),
    }
    Ok(())
}

/// Takes a lock, which may take as long as the caller is willing to wait.
fn acquire(
    locks: &Locks,
    share: &Arc<Share>,
    timeout: Option<Duration>,
    request: v1::AcquireLockRequest,
    mut due: Due,
) -> Result<(), Error> {
    let acquire = acquire_in(request)?;
    let call = Call::waiting(locks.node(), Caller, share, timeout, acquire.wait);
    let waits = !acquire.wait.is_zero();
    if waits && !due.begins_to_wait() {
        let what = "requests that wait for locks on this pipeline";
        return Err(Error::too_many(what, PIPELINE_WAITING_MAX as u64));
    }
    locks.acquire(&call, acquire, move |result| {
        due.answer(result, |it| Ok(Answer::AcquireLock(acquired_out(&it))));
    });
    Ok(())
}

fn serve_lock(locks: &Locks, call: &Call<'_>, asked: Asked, due: Due) -> Result<(), Error> {
    match asked {
        Asked::CancelAcquire(request) => {
            locks.cancel(call, cancel_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::CancelAcquire(cancelled_out(it))));
            });
        }
        Asked::ReleaseLock(request) => {
            locks.release(call, release_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::ReleaseLock(released_out(it))));
            });
        }
        Asked::GetLock(request) => {
            locks.get(call, get_lock_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::GetLock(found_lock_out(&it))));
            });
        }
        Asked::ListLocks(request) => {
            locks.list(call, list_locks_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::ListLocks(listed_locks_out(&it))));
            });
        }
        Asked::BreakLock(request) => {
            locks.break_lock(call, break_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::BreakLock(broken_out(it))));
            });
        }
        _ => return Err(empty_request()),
    }
    Ok(())
}

fn serve_ring(rings: &Rings, call: &Call<'_>, asked: Asked, mut due: Due) -> Result<(), Error> {
    match asked {
        Asked::JoinRing(request) => {
            rings.join(call, join_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::JoinRing(joined_out(&it))));
            });
        }
        Asked::LeaveRing(request) => {
            rings.leave(call, leave_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::LeaveRing(left_out(it))));
            });
        }
        Asked::LocateKeys(request) => {
            let locate = locate_in(request)?;
            due.weigh(locate.weight());
            rings.locate(call, locate, move |result| {
                due.answer(result, |it| located_out(&it).map(Answer::LocateKeys));
            });
        }
        Asked::GetRing(request) => {
            rings.get(call, get_ring_in(request)?, move |result| {
                due.answer(result, |it| Ok(Answer::GetRing(found_ring_out(&it))));
            });
        }
        _ => return Err(empty_request()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::draining::draining;
    use super::*;
    use crate::limits::ANSWER_BYTES_OF_NODE_MAX;
    use crate::service::Admission;

    type Inbox = mpsc::UnboundedReceiver<(v1::PipelineResponse, Count)>;

    fn flow(share: &Arc<Share>) -> (Arc<Flow>, Inbox) {
        let (answers, inbox) = mpsc::unbounded_channel();
        let room = Arc::new(Room::holding(0));
        let presence = Present::new().presence();
        (Arc::new(Flow { answers, room, share: share.clone(), presence }), inbox)
    }

    fn found(bytes: usize) -> Result<Answer, Error> {
        let attribute = ("a".to_owned(), vec![0; bytes].into());
        let session = v1::Session { attributes: [attribute].into(), ..v1::Session::default() };
        Ok(Answer::GetSession(v1::GetSessionResponse { revision: 1, session: Some(session) }))
    }

    #[test]
    fn an_answer_counts_until_it_is_encoded_and_dropped() {
        let share = Admission::new().share(|| {});
        let (flow, inbox) = flow(&share);
        let due = Due::new(flow.clone(), 1);
        assert_eq!(share.held(), Count::asked(ASKED_WEIGHT));
        due.answer(Ok(()), |()| found(100_000));
        assert!(share.held().answers > 100_000);
        // A write's answer, one that panics, and one that nobody gives.
        let done = v1::ReleaseLockResponse { revision: 7 };
        Due::new(flow.clone(), 2).answer(Ok(()), |()| Ok(Answer::ReleaseLock(done)));
        Due::new(flow.clone(), 3).answer(Ok(()), |()| panic!("a defect"));
        drop(Due::new(flow.clone(), 4));
        let held = share.held();
        assert_eq!(flow.room.under_way.load(Ordering::Acquire), 3);
        let encoding = Encoding::new(share.clone(), Count::default());
        let mut outbox = Outbox::new(inbox, encoding.clone());
        let mut next = || {
            let next = futures_util::FutureExt::now_or_never(outbox.next());
            next.flatten().unwrap().response.unwrap()
        };
        assert!(matches!(next(), Answer::GetSession(_)));
        assert!(matches!(next(), Answer::ReleaseLock(_)));
        assert_eq!(share.held(), held);
        drop(outbox);
        assert!(share.held().answers > 100_000);
        drop(encoding);
        assert_eq!(share.held(), Count::default());
        // The stream has ended, and an answer that comes late counts for nothing.
        Due::new(flow, 5).answer(Ok(()), |()| found(100_000));
        assert_eq!(share.held(), Count::default());
        assert_eq!(share.admission().panics(), 1);
    }

    #[tokio::test]
    async fn a_full_stream_whose_client_goes_is_read_no_more() {
        let share = Admission::new().share(|| {});
        let (flow, inbox) = flow(&share);
        let under_way: Vec<_> =
            (0..PIPELINE_IN_FLIGHT_MAX as u64).map(|id| Due::new(flow.clone(), id)).collect();
        let (_drain, draining) = draining();
        let requests = futures_util::stream::pending();
        let reading = tokio::spawn(read(requests, flow, draining, |_, _| {}));
        under_way.into_iter().for_each(|due| due.refuse(Error::still_waiting()));
        tokio::task::yield_now().await;
        drop(Outbox::new(inbox, Encoding::new(share.clone(), Count::default())));
        tokio::time::timeout(Duration::from_secs(10), reading).await.unwrap().unwrap();
        assert_eq!(share.held(), Count::default());
    }

    #[test]
    fn who_has_renewed_leases_learns_of_it_however_little_room_there_is() {
        let share = Admission::new().share(|| {});
        let (flow, mut inbox) = flow(&share);
        share.hold(Count::answers(2 * ANSWER_BYTES_OF_NODE_MAX));
        let mut due = Due::new(flow.clone(), 1);
        due.weigh(1_000 * RENEWAL_WEIGHT);
        let asked = share.held().asked;
        let renewals = vec![v1::LeaseRenewal::default(); 1_000];
        let renewed = v1::KeepAliveLeasesResponse { request_id: 1, revision: 1, renewals };
        due.answer(Ok(()), |()| Ok(Answer::KeepAliveLeases(renewed)));
        let (response, count) = inbox.try_recv().unwrap();
        assert!(matches!(response.response, Some(Answer::KeepAliveLeases(_))));
        assert_eq!((count, share.held().asked), (Count::asked(asked), asked));
        // One that was refused takes no more room than any other.
        let mut due = Due::new(flow, 2);
        due.weigh(1_000 * RENEWAL_WEIGHT);
        due.refuse(Error::still_waiting());
        assert_eq!(inbox.try_recv().unwrap().1, Count::asked(ASKED_WEIGHT));
    }

    #[test]
    fn what_is_given_up_while_it_waits_is_counted_once() {
        let share = Admission::new().share(|| {});
        let (flow, _inbox) = flow(&share);
        let mut due = Due::new(flow.clone(), 1);
        assert!(due.begins_to_wait());
        drop(due);
        assert_eq!(flow.room.under_way.load(Ordering::Acquire), 0);
        assert_eq!(flow.room.waiting.load(Ordering::Acquire), 0);
        assert_eq!(share.held(), Count::default());
    }

    #[test]
    fn what_waits_for_a_lock_takes_no_room() {
        let share = Admission::new().share(|| {});
        let (flow, _inbox) = flow(&share);
        let mut due = Due::new(flow.clone(), 1);
        assert!(due.begins_to_wait());
        assert_eq!(share.held(), Count::default());
        assert_eq!(flow.room.under_way.load(Ordering::Acquire), 0);
        due.refuse(Error::still_waiting());
        assert_eq!(share.held(), Count::asked(ASKED_WEIGHT));
        assert_eq!(flow.room.under_way.load(Ordering::Acquire), 1);
    }
}
