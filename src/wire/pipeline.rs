//! `quorate.v1.PipelineService`: every request over one stream.
//!
//! One task reads; each request goes straight into the service with a callback that puts the
//! answer into the stream's outbox. A request is under way until its answer has left the outbox
//! for the transport; at the limit nothing more is read, and the client's sends are stopped by flow
//! control, so that a client that does not read its answers cannot make the node hold many.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::cluster::describe;
use super::convert::{
    addressed_in, batch_get_in, batch_out, create_in, created_out, deleted_out, duration_in,
    found_out, get_in, list_in, listed_out, touched_out, unfenced, update_in, updated_out,
};
use super::status::{empty_request, pipeline_error};
use crate::limits::PIPELINE_IN_FLIGHT_MAX;
use crate::proto::v1;
use crate::proto::v1::pipeline_request::Request as Asked;
use crate::proto::v1::pipeline_response::Response as Answer;
use crate::proto::v1::pipeline_service_server::PipelineService;
use crate::service::{Call, Caller, Cluster, Error, Sessions};

pub(super) struct Pipelines {
    sessions: Arc<Sessions>,
    cluster: Arc<Cluster>,
    draining: Arc<Notify>,
}

impl Pipelines {
    pub(super) fn new(sessions: Arc<Sessions>, cluster: Arc<Cluster>) -> Self {
        Self { sessions, cluster, draining: Arc::new(Notify::new()) }
    }

    /// Ends every stream once what is under way on it has been answered.
    pub(super) fn draining(&self) -> Arc<Notify> {
        self.draining.clone()
    }
}

type Outbox = mpsc::UnboundedSender<Result<v1::PipelineResponse, Status>>;

/// The way of answers into one stream.
struct Flow {
    outbox: Outbox,
    room: Arc<Room>,
}

/// How full one stream is.
struct Room {
    under_way: AtomicUsize,
    made: Notify,
}

impl Room {
    fn is_full(&self) -> bool {
        self.under_way.load(Ordering::Acquire) >= PIPELINE_IN_FLIGHT_MAX
    }

    fn left(&self) {
        if self.under_way.fetch_sub(1, Ordering::AcqRel) == PIPELINE_IN_FLIGHT_MAX {
            self.made.notify_one();
        }
    }
}

impl Flow {
    fn answer(&self, correlation_id: u64, result: Result<Answer, Error>) {
        let response = result.unwrap_or_else(|error| Answer::Error(pipeline_error(error)));
        let response = Some(response);
        // A client that has gone away does not want the answer.
        let _ = self.outbox.send(Ok(v1::PipelineResponse { correlation_id, response }));
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
        let hello = Some(Answer::Hello(describe(&self.cluster)));
        let hello = v1::PipelineResponse { correlation_id: 0, response: hello };
        // The receiver is held right here.
        let _ = outbox.send(Ok(hello));
        // The hello counts as well, as it leaves like an answer.
        let room = Arc::new(Room { under_way: AtomicUsize::new(1), made: Notify::new() });
        let flow = Arc::new(Flow { outbox, room: room.clone() });
        tokio::spawn(read(self.sessions.clone(), requests, flow, self.draining.clone()));
        let outbound = UnboundedReceiverStream::new(outbound).inspect(move |_| room.left());
        Ok(Response::new(outbound.boxed()))
    }
}

/// Reads requests until the client ends the stream or the node drains. The stream closes when the
/// last request under way has dropped its handle on the outbox.
async fn read(
    sessions: Arc<Sessions>,
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
        dispatch(&sessions, request, flow.clone());
    }
}

fn dispatch(sessions: &Sessions, request: v1::PipelineRequest, flow: Arc<Flow>) {
    let id = request.correlation_id;
    let timeout = request.timeout.map(|timeout| duration_in("timeout", timeout)).transpose();
    let (timeout, asked) = match (timeout, request.request) {
        (Ok(timeout), Some(asked)) => (timeout, asked),
        (Err(error), _) => return flow.answer(id, Err(error)),
        (_, None) => return flow.answer(id, Err(empty_request())),
    };
    let call = Call::within(sessions.node(), Caller, timeout);
    let failed = flow.clone();
    if let Err(error) = serve(sessions, &call, asked, id, flow) {
        failed.answer(id, Err(error));
    }
}

/// Hands a request to its use case, which answers through `flow`; an error is for the caller to
/// answer.
fn serve(
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
            let v1::TouchSessionRequest { context, namespace, session } = request;
            let to = addressed_in(context, namespace, session)?;
            sessions.touch(call, &to.context, to.namespace, &to.session, move |result| {
                flow.answer(id, result.map(|it| Answer::TouchSession(touched_out(&it))));
            });
        }
        Asked::DeleteSession(request) => {
            let v1::DeleteSessionRequest { context, namespace, session, expected_version, fence } =
                request;
            unfenced(fence)?;
            let to = addressed_in(context, namespace, session)?;
            let done = move |result: Result<_, Error>| {
                flow.answer(id, result.map(|it| Answer::DeleteSession(deleted_out(&it))));
            };
            sessions.delete(call, &to.context, to.namespace, &to.session, expected_version, done);
        }
        Asked::ListSessions(request) => {
            sessions.list(call, list_in(request)?, move |result| {
                flow.answer(id, result.map(|it| Answer::ListSessions(listed_out(&it))));
            });
        }
        _ => return Err(Error::unimplemented("leases, locks and rings")),
    }
    Ok(())
}
