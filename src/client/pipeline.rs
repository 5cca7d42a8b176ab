//! One pipeline: many requests under way on one stream, each with a correlation id.
//!
//! Callers, the writer and the reader meet in one mutex, held for a few instructions and never
//! across an await. A caller puts its request on the queue and waits on a oneshot; the writer is
//! the body of the HTTP/2 request and takes the whole queue whenever the transport can write; the
//! reader is one task for each connection that hands out whatever has arrived and then sleeps. So
//! under load one wake-up serves many requests, and no request costs a task or a timer.
//!
//! Deadlines are watched by the reader: it sleeps until the earliest of those it knows, and since
//! callers mostly ask for the same timeout, a new request seldom has an earlier one.
//!
//! Invariants:
//! - A correlation id is the number of a slot plus one. A slot whose caller has given up stays
//!   taken until the server has answered, so that a late answer never meets a new request.
//! - At most [`PIPELINE_IN_FLIGHT_MAX`] slots are taken, and as the server counts them apart
//!   [`PIPELINE_WAITING_MAX`] more by Acquires that wait: a release behind them may be what they
//!   wait for. The queue holds no other requests.
//! - Once `closed` is set no slot is taken, and none will be.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, Sleep};
use tokio_stream::Stream;
use tonic::codec::{BufferSettings, Codec, EncodeBuf, Encoder, Streaming};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request as Call, Status};
use tonic_prost::{ProstCodec, ProstDecoder};

use super::RESPONSE_BYTES_MAX;
use super::error::{Error, Failure, transport_message};
use super::time::duration_to_proto;
use crate::limits::{PIPELINE_IN_FLIGHT_MAX, PIPELINE_WAITING_MAX};
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;
use crate::proto::v1::{DescribeResponse, PipelineRequest, PipelineResponse};

/// How long a server may owe an answer beyond the request's own timeout, while it answers others,
/// before the connection is taken for broken.
const ANSWER_GRACE: Duration = Duration::from_secs(30);
/// How much sooner than at the caller's deadline the server is to answer: a reason that comes later
/// is heard by nobody.
const ANSWER_MARGIN_MAX: Duration = Duration::from_millis(50);
/// Answers handed out before the reader lets other tasks run.
const ANSWERS_BURST_MAX: usize = 1_024;
const PATH: &str = "/quorate.v1.PipelineService/Pipeline";

/// The sending end of one pipeline; dropping it closes the stream.
pub(super) struct Pipeline {
    shared: Arc<Shared>,
}

impl Pipeline {
    /// Opens the stream and waits for the server's greeting. The caller sets the deadline.
    pub(super) async fn open(channel: Channel) -> Result<(Self, DescribeResponse), Status> {
        let shared = Arc::new(Shared::default());
        let pipeline = Self { shared: shared.clone() };
        let mut grpc = tonic::client::Grpc::new(channel)
            .max_decoding_message_size(RESPONSE_BYTES_MAX)
            .max_encoding_message_size(usize::MAX);
        grpc.ready().await.map_err(|error| Status::from_error(Box::new(error)))?;
        let outbox = Outbox { shared: shared.clone(), taken: VecDeque::new() };
        let call = grpc.streaming(Call::new(outbox), PathAndQuery::from_static(PATH), FrameCodec);
        let mut answers: Streaming<PipelineResponse> = call.await?.into_inner();
        let hello = match answers.message().await? {
            Some(PipelineResponse {
                correlation_id: 0,
                response: Some(Response::Hello(hello)),
            }) => hello,
            _ => return Err(Status::internal("the server did not say hello")),
        };
        tokio::spawn(Reader { shared, answers, alarm: Box::pin(tokio::time::sleep(ANSWER_GRACE)) });
        Ok((pipeline, hello))
    }

    /// Sends `request` and waits for its answer, for at most `timeout` from `now`.
    pub(super) async fn call(
        &self,
        request: Arc<Request>,
        now: Instant,
        timeout: Duration,
    ) -> Result<Response, Failure> {
        let answer = match self.shared.submit(request, now, timeout) {
            Ok(answer) => answer,
            Err(refused) => self.submit_when_there_is_room(refused?, now, timeout).await?,
        };
        // The reader drops the sender only together with the whole connection.
        answer.await.unwrap_or_else(|_| Err(Failure::lost("the connection was closed")))
    }

    #[cold]
    async fn submit_when_there_is_room(
        &self,
        mut request: Arc<Request>,
        now: Instant,
        timeout: Duration,
    ) -> Result<Answer, Failure> {
        loop {
            let room = self.shared.room.notified();
            match self.shared.submit(request, now, timeout) {
                Ok(answer) => return Ok(answer),
                Err(refused) => request = refused?,
            }
            if tokio::time::timeout_at(now + timeout, room).await.is_err() {
                let message = "the connection had no room for another request";
                return Err(Failure::NotSent(Error::DeadlineExceeded { message: message.into() }));
            }
        }
    }

    /// Whether the stream has ended; no call will succeed any more.
    pub(super) fn is_closed(&self) -> bool {
        self.shared.lock().closed.is_some()
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.shared.close("the client closed the connection");
    }
}

type Answer = oneshot::Receiver<Result<Response, Failure>>;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Told when a slot becomes free that somebody waits for.
    room: Notify,
}

#[derive(Default)]
struct State {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// How many slots are taken by Acquires that wait in line.
    in_line: usize,
    /// Whether anybody has been turned away for want of a slot since one became free.
    crowded: bool,
    queue: VecDeque<Outgoing>,
    writer: Option<Waker>,
    reader: Option<Waker>,
    /// When the reader looks at the deadlines next; `None` while there are none.
    alarm: Option<Instant>,
    /// When the server was last heard.
    heard: Option<Instant>,
    closed: Option<String>,
}

enum Slot {
    Free,
    /// A caller waits.
    Waiting {
        answer: oneshot::Sender<Result<Response, Failure>>,
        sent: Instant,
        deadline: Instant,
        in_line: bool,
    },
    /// The caller has given up; the server has not answered. At `deadline` it should have.
    Abandoned {
        deadline: Instant,
        in_line: bool,
    },
}

/// One request on its way. The body is shared with the caller, who needs it for a resend: so it is
/// neither copied nor encoded twice.
struct Outgoing {
    correlation_id: u64,
    timeout: Duration,
    request: Arc<Request>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; were it so, the state is still a state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `request`. When there is no room it comes back as `Err(Ok(request))`.
    fn submit(
        &self,
        request: Arc<Request>,
        sent: Instant,
        timeout: Duration,
    ) -> Result<Answer, Result<Arc<Request>, Failure>> {
        let deadline = sent + timeout;
        let mut state = self.lock();
        if let Some(why) = &state.closed {
            return Err(Err(Failure::NotSent(Error::unavailable(why.clone()))));
        }
        let in_line = waits_in_line(&request);
        let Some(index) = state.take_slot(in_line) else {
            state.crowded = true;
            return Err(Ok(request));
        };
        let (sender, answer) = oneshot::channel();
        state.slots[index as usize] = Slot::Waiting { answer: sender, sent, deadline, in_line };
        let timeout = timeout - (timeout / 4).min(ANSWER_MARGIN_MAX);
        state.queue.push_back(Outgoing { correlation_id: u64::from(index) + 1, timeout, request });
        let writer = state.writer.take();
        let reader = if state.alarm.is_none_or(|alarm| deadline < alarm) {
            state.alarm = Some(deadline);
            state.reader.take()
        } else {
            None
        };
        drop(state);
        writer.into_iter().chain(reader).for_each(Waker::wake);
        Ok(answer)
    }

    /// Ends the pipeline: everything under way fails with `why`.
    fn close(&self, why: &str) {
        let mut state = self.lock();
        if state.closed.is_some() {
            return;
        }
        state.closed = Some(why.to_owned());
        state.queue = VecDeque::new();
        state.free = Vec::new();
        let slots = std::mem::take(&mut state.slots);
        let wakers = [state.writer.take(), state.reader.take()];
        drop(state);
        for slot in slots {
            if let Slot::Waiting { answer, .. } = slot {
                // The caller may have gone; then nobody is left to tell.
                let _ = answer.send(Err(Failure::lost(why)));
            }
        }
        wakers.into_iter().flatten().for_each(Waker::wake);
        self.room.notify_waiters();
    }

    /// Hands out one answer; an error when no request of that id is under way.
    fn answer(&self, message: PipelineResponse) -> Result<(), String> {
        let result = match message.response {
            Some(Response::Error(error)) => Err(Failure::from_pipeline(error)),
            Some(response) => Ok(response),
            None => Err(Failure::Unknown(Error::internal("the server sent an empty answer"))),
        };
        let mut state = self.lock();
        if state.closed.is_some() {
            return Ok(());
        }
        let slot = state.release_slot(message.correlation_id).ok_or_else(|| {
            format!(
                "the server answered a request that it was not sent: {}",
                message.correlation_id
            )
        })?;
        let crowded = std::mem::take(&mut state.crowded);
        drop(state);
        if let Slot::Waiting { answer, .. } = slot {
            // As in `close`: the caller may have gone.
            let _ = answer.send(result);
        }
        if crowded {
            self.room.notify_waiters();
        }
        Ok(())
    }

    /// Fails what is overdue and sets the next alarm; an error when the server seems to be gone.
    fn check_deadlines(&self, now: Instant) -> Result<(), &'static str> {
        let mut overdue = Vec::new();
        let mut state = self.lock();
        let State { slots, heard, alarm, .. } = &mut *state;
        let mut next: Option<Instant> = None;
        let mut broken = None;
        for slot in slots.iter_mut() {
            let (Slot::Waiting { deadline, in_line, .. } | Slot::Abandoned { deadline, in_line }) =
                *slot
            else {
                continue;
            };
            if deadline > now {
                next = Some(next.map_or(deadline, |next| next.min(deadline)));
                continue;
            }
            let abandoned = Slot::Abandoned { deadline: now + ANSWER_GRACE, in_line };
            match std::mem::replace(slot, abandoned) {
                Slot::Waiting { answer, sent, .. } => {
                    overdue.push(answer);
                    if heard.is_none_or(|heard| heard < sent) {
                        broken = Some("the server has gone silent");
                    }
                }
                Slot::Abandoned { .. } => broken = Some("the server leaves requests unanswered"),
                Slot::Free => {}
            }
            next = Some(next.map_or(now + ANSWER_GRACE, |next| next.min(now + ANSWER_GRACE)));
        }
        *alarm = next;
        drop(state);
        for answer in overdue {
            let error = Error::DeadlineExceeded { message: "no answer".into() };
            let _ = answer.send(Err(Failure::Unknown(error)));
        }
        broken.map_or(Ok(()), Err)
    }
}

impl State {
    fn take_slot(&mut self, in_line: bool) -> Option<u32> {
        let others = self.slots.len() - self.free.len() - self.in_line;
        let is_full = if in_line {
            self.in_line >= PIPELINE_WAITING_MAX
        } else {
            others >= PIPELINE_IN_FLIGHT_MAX
        };
        if is_full {
            return None;
        }
        self.in_line += usize::from(in_line);
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        self.slots.push(Slot::Free);
        u32::try_from(self.slots.len() - 1).ok()
    }

    fn release_slot(&mut self, correlation_id: u64) -> Option<Slot> {
        let index = usize::try_from(correlation_id.checked_sub(1)?).ok()?;
        let slot = self.slots.get_mut(index)?;
        if matches!(slot, Slot::Free) {
            return None;
        }
        let slot = std::mem::replace(slot, Slot::Free);
        if let Slot::Waiting { in_line: true, .. } | Slot::Abandoned { in_line: true, .. } = slot {
            self.in_line -= 1;
        }
        self.free.push(u32::try_from(index).ok()?);
        Some(slot)
    }
}

/// Whether the server may hold the answer back until somebody else has done something.
fn waits_in_line(request: &Request) -> bool {
    let Request::AcquireLock(request) = request else { return false };
    request.wait.as_ref().is_some_and(|wait| wait.seconds > 0 || wait.nanos > 0)
}

/// The body of the call: what is queued.
struct Outbox {
    shared: Arc<Shared>,
    taken: VecDeque<Outgoing>,
}

impl Stream for Outbox {
    type Item = Outgoing;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Outgoing>> {
        if self.taken.is_empty() {
            let this = &mut *self;
            let mut state = this.shared.lock();
            std::mem::swap(&mut state.queue, &mut this.taken);
            if this.taken.is_empty() {
                if state.closed.is_some() {
                    return Poll::Ready(None);
                }
                register(&mut state.writer, cx);
                return Poll::Pending;
            }
        }
        Poll::Ready(self.taken.pop_front())
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.shared.close("the connection was lost");
    }
}

/// Hands out answers and watches deadlines, until either end closes.
struct Reader {
    shared: Arc<Shared>,
    answers: Streaming<PipelineResponse>,
    alarm: Pin<Box<Sleep>>,
}

impl Reader {
    /// Everything that has arrived; an error when the stream has ended.
    fn read(&mut self, cx: &mut Context<'_>) -> Result<(), String> {
        for count in 0.. {
            if count == ANSWERS_BURST_MAX {
                cx.waker().wake_by_ref();
                break;
            }
            match Pin::new(&mut self.answers).poll_next(cx) {
                Poll::Ready(Some(Ok(message))) => {
                    if count == 0 {
                        self.shared.lock().heard = Some(Instant::now());
                    }
                    self.shared.answer(message)?;
                }
                Poll::Ready(Some(Err(status))) => {
                    return Err(format!("the connection was lost: {}", describe(&status)));
                }
                Poll::Ready(None) => return Err("the server closed the connection".to_owned()),
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    /// Whatever is overdue; an error when the connection is to be given up.
    fn watch(&mut self, cx: &mut Context<'_>) -> Result<(), &'static str> {
        loop {
            let alarm = {
                let mut state = self.shared.lock();
                if state.closed.is_some() {
                    return Err("closed");
                }
                register(&mut state.reader, cx);
                state.alarm
            };
            let Some(alarm) = alarm else { return Ok(()) };
            if self.alarm.deadline() != alarm {
                self.alarm.as_mut().reset(alarm);
            }
            if self.alarm.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            self.shared.check_deadlines(Instant::now())?;
        }
    }
}

impl Future for Reader {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let result = this.read(cx).and_then(|()| this.watch(cx).map_err(str::to_owned));
        match result {
            Ok(()) => Poll::Pending,
            Err(why) => {
                this.shared.close(&why);
                Poll::Ready(())
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Also when the runtime shuts down: nobody may wait for an answer that nobody reads.
        self.shared.close("the client's runtime was shut down");
    }
}

fn register(waker: &mut Option<Waker>, cx: &Context<'_>) {
    match waker {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *waker = Some(cx.waker().clone()),
    }
}

fn describe(status: &Status) -> String {
    if std::error::Error::source(status).is_some() {
        transport_message(status)
    } else {
        status.message().to_owned()
    }
}

/// Writes requests without owning them.
#[derive(Clone, Copy)]
struct FrameCodec;

impl Codec for FrameCodec {
    type Encode = Outgoing;
    type Decode = PipelineResponse;
    type Encoder = FrameEncoder;
    type Decoder = ProstDecoder<PipelineResponse>;

    fn encoder(&mut self) -> FrameEncoder {
        FrameEncoder
    }

    fn decoder(&mut self) -> ProstDecoder<PipelineResponse> {
        ProstCodec::<PipelineResponse, PipelineResponse>::raw_decoder(BufferSettings::default())
    }
}

struct FrameEncoder;

impl Encoder for FrameEncoder {
    type Item = Outgoing;
    type Error = Status;

    fn encode(&mut self, item: Outgoing, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        // The encodings of two parts of a message, one after the other, are that of the whole.
        let head = PipelineRequest {
            correlation_id: item.correlation_id,
            timeout: Some(duration_to_proto(item.timeout)),
            request: None,
        };
        head.encode(buffer).map_err(|error| Status::internal(error.to_string()))?;
        item.request.encode(buffer);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1::{AcquireLockRequest, GetSessionRequest, GetSessionResponse};

    fn request() -> Arc<Request> {
        Arc::new(Request::GetSession(GetSessionRequest::default()))
    }

    fn response(correlation_id: u64, revision: u64) -> PipelineResponse {
        let response = GetSessionResponse { revision, session: None };
        PipelineResponse { correlation_id, response: Some(Response::GetSession(response)) }
    }

    fn submit(shared: &Shared, timeout: Duration) -> Answer {
        match shared.submit(request(), Instant::now(), timeout) {
            Ok(answer) => answer,
            Err(_) => panic!("there is room"),
        }
    }

    #[test]
    fn answers_find_their_requests_in_any_order() {
        let shared = Shared::default();
        let mut first = submit(&shared, Duration::from_secs(1));
        let mut second = submit(&shared, Duration::from_secs(1));
        shared.answer(response(2, 22)).unwrap();
        shared.answer(response(1, 11)).unwrap();
        for (answer, expected) in [(&mut first, 11), (&mut second, 22)] {
            match answer.try_recv().unwrap() {
                Ok(Response::GetSession(response)) => assert_eq!(response.revision, expected),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn an_answer_to_nothing_is_an_error() {
        let shared = Shared::default();
        assert!(shared.answer(response(0, 1)).is_err());
        assert!(shared.answer(response(1, 1)).is_err());
        assert!(shared.answer(response(u64::MAX, 1)).is_err());
        let _answer = submit(&shared, Duration::from_secs(1));
        assert!(shared.answer(response(1, 1)).is_ok());
        assert!(shared.answer(response(1, 1)).is_err());
    }

    #[test]
    fn a_slot_whose_caller_gave_up_is_not_reused_before_its_answer() {
        let shared = Shared::default();
        let start = Instant::now();
        let mut late = submit(&shared, Duration::from_secs(1));
        shared.lock().heard = Some(start + Duration::from_secs(1));
        shared.check_deadlines(start + Duration::from_secs(2)).unwrap();
        assert!(matches!(
            late.try_recv().unwrap(),
            Err(Failure::Unknown(Error::DeadlineExceeded { .. }))
        ));
        let mut next = submit(&shared, Duration::from_secs(9));
        shared.answer(response(1, 11)).unwrap();
        assert!(next.try_recv().is_err(), "the late answer is not the new request's");
        shared.answer(response(2, 22)).unwrap();
        assert!(next.try_recv().unwrap().is_ok());
    }

    #[test]
    fn a_server_that_says_nothing_is_given_up() {
        let shared = Shared::default();
        let start = Instant::now();
        let _answer = submit(&shared, Duration::from_secs(1));
        assert!(shared.check_deadlines(start + Duration::from_millis(10)).is_ok());
        assert!(shared.check_deadlines(start + Duration::from_secs(2)).is_err());
    }

    #[test]
    fn requests_under_way_are_bounded_and_room_is_found_again() {
        let shared = Shared::default();
        let timeout = Duration::from_secs(1);
        let _answers: Vec<Answer> =
            (0..PIPELINE_IN_FLIGHT_MAX).map(|_| submit(&shared, timeout)).collect();
        assert!(matches!(shared.submit(request(), Instant::now(), timeout), Err(Ok(_))));
        shared.answer(response(7, 1)).unwrap();
        let _answer = submit(&shared, timeout);
    }

    #[test]
    fn acquires_that_wait_leave_room_for_the_release_that_they_wait_for() {
        let shared = Shared::default();
        let wait = Some(duration_to_proto(Duration::from_secs(5)));
        let acquire = AcquireLockRequest { wait, ..Default::default() };
        let acquire = Arc::new(Request::AcquireLock(acquire));
        let timeout = Duration::from_secs(9);
        let submit_acquire = || shared.submit(acquire.clone(), Instant::now(), timeout);
        let mut waiting: Vec<Answer> = (0..PIPELINE_WAITING_MAX)
            .map(|_| submit_acquire().unwrap_or_else(|_| panic!()))
            .collect();
        assert!(matches!(submit_acquire(), Err(Ok(_))));
        let _others: Vec<Answer> =
            (0..PIPELINE_IN_FLIGHT_MAX).map(|_| submit(&shared, timeout)).collect();
        assert!(matches!(shared.submit(request(), Instant::now(), timeout), Err(Ok(_))));
        shared.answer(response(1, 1)).unwrap();
        assert!(waiting[0].try_recv().unwrap().is_ok());
        assert!(matches!(shared.submit(request(), Instant::now(), timeout), Err(Ok(_))));
        assert!(submit_acquire().is_ok());
    }

    #[test]
    fn closing_fails_what_is_under_way_and_what_comes_later() {
        let shared = Shared::default();
        let mut answer = submit(&shared, Duration::from_secs(1));
        shared.close("gone");
        assert!(matches!(answer.try_recv().unwrap(), Err(Failure::Unknown(_))));
        assert!(matches!(
            shared.submit(request(), Instant::now(), Duration::from_secs(1)),
            Err(Err(Failure::NotSent(_)))
        ));
    }

    #[test]
    fn the_split_encoding_is_that_of_the_whole_message() {
        let request = GetSessionRequest { min_revision: 9, ..Default::default() };
        let whole = PipelineRequest {
            correlation_id: 7,
            timeout: Some(duration_to_proto(Duration::from_millis(1_500))),
            request: Some(Request::GetSession(request.clone())),
        };
        let head = PipelineRequest { request: None, ..whole.clone() };
        let mut parts = head.encode_to_vec();
        Request::GetSession(request).encode(&mut parts);
        assert_eq!(parts, whole.encode_to_vec());
    }
}
