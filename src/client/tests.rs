//! The client against servers that misbehave on purpose.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request as Call, Response as Reply, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::*;
use crate::proto::v1;
use crate::proto::v1::cluster_service_server::{ClusterService, ClusterServiceServer};
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;
use crate::proto::v1::pipeline_service_server::{PipelineService, PipelineServiceServer};
use crate::proto::v1::session_service_server::{SessionService, SessionServiceServer};

/// Cluster time of the mocks, in milliseconds.
const CLUSTER_TIME: i64 = 1_800_000_000_000;

/// Where nobody listens: a port that no test is given.
const NOWHERE: &str = "127.0.0.1:1";

/// What a mock does with a request.
pub(super) enum Action {
    Answer(Response),
    Refuse(Code, &'static str),
    /// Answers only after the next request has been answered.
    HoldBack(Response),
    Ignore,
    Hangup,
}

type Script = Box<dyn FnMut(usize, &Request) -> Action + Send>;

/// A node that does as its script says.
#[derive(Clone)]
pub(super) struct Mock(Arc<MockState>);

struct MockState {
    node_id: u64,
    address: String,
    script: Mutex<Script>,
    seen: Mutex<Vec<v1::PipelineRequest>>,
    leader: Mutex<(u64, String)>,
    silent: Mutex<bool>,
    /// What it says of cluster and time; nothing of the time where it has not heard it.
    known: Mutex<(String, Option<i64>)>,
    /// How many were opened.
    pipelines: AtomicUsize,
}

impl Mock {
    /// A node that listens; it leads unless told otherwise.
    pub(super) async fn start(
        node_id: u64,
        script: impl FnMut(usize, &Request) -> Action + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mock = Self(Arc::new(MockState {
            node_id,
            address: address.clone(),
            script: Mutex::new(Box::new(script)),
            seen: Mutex::default(),
            leader: Mutex::new((node_id, address)),
            silent: Mutex::new(false),
            known: Mutex::new(("c1".to_owned(), Some(CLUSTER_TIME))),
            pipelines: AtomicUsize::new(0),
        }));
        let server = tonic::transport::Server::builder()
            .add_service(PipelineServiceServer::new(mock.clone()))
            .add_service(SessionServiceServer::new(mock.clone()))
            .add_service(ClusterServiceServer::new(mock.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        mock
    }

    fn address(&self) -> &str {
        &self.0.address
    }

    fn follow(&self, leader: &Self) {
        *self.0.leader.lock().unwrap() = (leader.0.node_id, leader.address().to_owned());
    }

    /// From now on it accepts connections and says nothing.
    fn fall_silent(&self) {
        *self.0.silent.lock().unwrap() = true;
    }

    /// It has just started, in this cluster, and has heard of nobody.
    fn know_only(&self, cluster_id: &str) {
        *self.0.known.lock().unwrap() = (cluster_id.to_owned(), None);
    }

    fn is_silent(&self) -> bool {
        *self.0.silent.lock().unwrap()
    }

    pub(super) fn seen(&self) -> Vec<v1::PipelineRequest> {
        self.0.seen.lock().unwrap().clone()
    }

    fn act(&self, message: v1::PipelineRequest) -> Action {
        let mut seen = self.0.seen.lock().unwrap();
        let count = seen.len();
        seen.push(message);
        let request = seen[count].request.as_ref().unwrap();
        (self.0.script.lock().unwrap())(count, request)
    }

    fn describe_now(&self) -> v1::DescribeResponse {
        let (leader_id, leader_address) = self.0.leader.lock().unwrap().clone();
        let (cluster_id, time) = self.0.known.lock().unwrap().clone();
        v1::DescribeResponse {
            cluster_id,
            node_id: self.0.node_id,
            leader_id,
            leader_address,
            cluster_time: time.map(time::millis_to_proto),
            members: Vec::new(),
        }
    }

    async fn unary(&self, request: Request) -> Result<Response, Status> {
        match self.act(v1::PipelineRequest { request: Some(request), ..Default::default() }) {
            Action::Answer(response) | Action::HoldBack(response) => Ok(response),
            Action::Refuse(code, reason) => Err(refusal(code, reason)),
            Action::Ignore => std::future::pending().await,
            Action::Hangup => panic!("a mock cannot hang up on a unary call"),
        }
    }
}

fn refusal(code: Code, reason: &str) -> Status {
    let details =
        ErrorDetails::with_error_info(reason, "quorate", std::collections::HashMap::new());
    Status::with_error_details(code, format!("refused: {reason}"), details)
}

#[tonic::async_trait]
impl PipelineService for Mock {
    type PipelineStream =
        Pin<Box<dyn Stream<Item = Result<v1::PipelineResponse, Status>> + Send + 'static>>;

    async fn pipeline(
        &self,
        call: Call<Streaming<v1::PipelineRequest>>,
    ) -> Result<Reply<Self::PipelineStream>, Status> {
        self.0.pipelines.fetch_add(1, Ordering::Relaxed);
        let (answers, answered) = mpsc::channel(64);
        let mock = self.clone();
        tokio::spawn(async move {
            let mut requests = call.into_inner();
            let hello = Response::Hello(mock.describe_now());
            if !mock.is_silent() {
                send(&answers, 0, hello).await;
            }
            let mut held = None;
            while let Some(Ok(message)) = requests.next().await {
                let id = message.correlation_id;
                match mock.act(message) {
                    _ if mock.is_silent() => {}
                    Action::Answer(response) => {
                        send(&answers, id, response).await;
                        if let Some((id, response)) = held.take() {
                            send(&answers, id, response).await;
                        }
                    }
                    Action::HoldBack(response) => held = Some((id, response)),
                    Action::Refuse(code, reason) => {
                        let status = refusal(code, reason);
                        let error = v1::PipelineError {
                            code: i32::from(code).cast_unsigned(),
                            message: status.message().to_owned(),
                            status_details: status.details().to_vec().into(),
                        };
                        send(&answers, id, Response::Error(error)).await;
                    }
                    Action::Ignore => {}
                    Action::Hangup => return,
                }
            }
        });
        Ok(Reply::new(Box::pin(ReceiverStream::new(answered))))
    }
}

async fn send(
    answers: &mpsc::Sender<Result<v1::PipelineResponse, Status>>,
    correlation_id: u64,
    response: Response,
) {
    let message = v1::PipelineResponse { correlation_id, response: Some(response) };
    // The client may have gone.
    let _ = answers.send(Ok(message)).await;
}

#[tonic::async_trait]
impl ClusterService for Mock {
    async fn describe(
        &self,
        _call: Call<v1::DescribeRequest>,
    ) -> Result<Reply<v1::DescribeResponse>, Status> {
        if self.is_silent() {
            return std::future::pending().await;
        }
        Ok(Reply::new(self.describe_now()))
    }

    async fn initialize(
        &self,
        call: Call<v1::InitializeRequest>,
    ) -> Result<Reply<v1::InitializeResponse>, Status> {
        if call.get_ref().members.len() != 3 {
            return Err(refusal(Code::FailedPrecondition, "ALREADY_INITIALIZED"));
        }
        Ok(Reply::new(v1::InitializeResponse { cluster_id: "c1".into() }))
    }

    async fn status(
        &self,
        _call: Call<v1::StatusRequest>,
    ) -> Result<Reply<v1::StatusResponse>, Status> {
        Ok(Reply::new(v1::StatusResponse { node_id: self.0.node_id, ..Default::default() }))
    }

    async fn set_time(
        &self,
        _call: Call<v1::SetTimeRequest>,
    ) -> Result<Reply<v1::SetTimeResponse>, Status> {
        Err(refusal(Code::FailedPrecondition, "NOT_LEADER"))
    }
}

macro_rules! unary {
    ($method:ident, $variant:ident, $request:ident, $response:ident) => {
        fn $method<'a: 'b, 'b>(
            &'a self,
            call: Call<v1::$request>,
        ) -> Pin<Box<dyn Future<Output = Result<Reply<v1::$response>, Status>> + Send + 'b>>
        where
            Self: 'b,
        {
            Box::pin(async move {
                match self.unary(Request::$variant(call.into_inner())).await? {
                    Response::$variant(response) => Ok(Reply::new(response)),
                    other => panic!("the script gave {other:?}"),
                }
            })
        }
    };
}

impl SessionService for Mock {
    unary!(create_session, CreateSession, CreateSessionRequest, CreateSessionResponse);
    unary!(get_session, GetSession, GetSessionRequest, GetSessionResponse);
    unary!(batch_get_sessions, BatchGetSessions, BatchGetSessionsRequest, BatchGetSessionsResponse);
    unary!(update_session, UpdateSession, UpdateSessionRequest, UpdateSessionResponse);
    unary!(touch_session, TouchSession, TouchSessionRequest, TouchSessionResponse);
    unary!(delete_session, DeleteSession, DeleteSessionRequest, DeleteSessionResponse);
    unary!(list_sessions, ListSessions, ListSessionsRequest, ListSessionsResponse);
}

fn updated(revision: u64) -> Response {
    Response::UpdateSession(v1::UpdateSessionResponse { revision, expire_time: None })
}

fn got(revision: u64) -> Response {
    let session = Some(v1::Session { version: revision, ..Default::default() });
    Response::GetSession(v1::GetSessionResponse { revision, session })
}

fn id() -> SessionId {
    SessionId::new("a-session-of-a-test").unwrap()
}

pub(super) fn builder(mocks: &[&Mock]) -> ClientBuilder {
    Client::builder().endpoints(mocks.iter().map(|mock| mock.address().to_owned()))
}

fn context_of(message: &v1::PipelineRequest) -> v1::RequestContext {
    match message.request.clone().unwrap() {
        Request::CreateSession(request) => request.context.unwrap(),
        Request::UpdateSession(request) => request.context.unwrap(),
        Request::TouchSession(request) => request.context.unwrap(),
        Request::DeleteSession(request) => request.context.unwrap(),
        other => panic!("a read has no context: {other:?}"),
    }
}

/// No test may hang: what takes this long has failed.
pub(super) async fn within_ten_seconds<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), test).await.expect("a deadline was not kept")
}

#[tokio::test]
async fn a_request_is_named_and_dated_by_the_cluster_s_time() {
    let mock = Mock::start(1, |_, _| Action::Answer(updated(7))).await;
    let timeout = Duration::from_secs(4);
    let client = builder(&[&mock]).timeout(timeout).connect().await.unwrap();
    let update = Update::new().set("name", "value");
    assert_eq!(client.sessions().update(id(), update).await.unwrap().version, 7);

    let seen = mock.seen();
    let context = context_of(&seen[0]);
    assert_ne!(context.request_id, 0);
    assert!(!context.resend);
    let first_sent = time::millis_from_proto(&context.first_sent_time.unwrap()).unwrap();
    let expire = time::millis_from_proto(&context.expire_time.unwrap()).unwrap();
    assert!((CLUSTER_TIME..CLUSTER_TIME + 10_000).contains(&first_sent), "{first_sent}");
    assert_eq!(expire - first_sent, 4_000);
    let server_timeout = time::duration_from_proto(seen[0].timeout).unwrap();
    // A little sooner than at the end of the attempt, so that its reason is heard.
    assert_eq!(server_timeout, Duration::from_millis(2_950));
    let now = client.cluster_time().unwrap();
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
    let cluster_time = u128::try_from(CLUSTER_TIME).unwrap();
    assert!((cluster_time..cluster_time + 10_000).contains(&now), "{now}");
}

#[tokio::test]
async fn what_is_waited_for_is_named() {
    for transport in [Transport::Pipeline, Transport::Unary] {
        let mock = Mock::start(7, |_, request| match request {
            Request::GetSession(_) => Action::Refuse(Code::Unavailable, "NO_LEADER"),
            _ => Action::Ignore,
        })
        .await;
        let endpoints = [NOWHERE, mock.address()];
        let client = Client::builder().endpoints(endpoints).transport(transport);
        let client = client.timeout(Duration::from_millis(300)).connect().await.unwrap();
        let node = format!("node 7 at {}", mock.address());
        let error = client.sessions().get(id()).await.unwrap_err();
        assert_eq!(error.reason(), "NO_LEADER");
        let message = error.to_string();
        let expected = format!("300ms: {node} answers, but no majority of the voters does; not");
        assert!(message.contains(&expected), "{message}");
        assert!(message.contains(&format!("not reached: {NOWHERE}: Connection ref")), "{message}");
        let message = client.sessions().touch(id()).await.unwrap_err().to_string();
        assert!(message.contains(&format!("{node}: ")), "{message}");
    }
}

#[tokio::test]
async fn who_has_not_heard_the_time_is_told_apart_from_who_has_no_cluster() {
    for (cluster, reason) in [("c1", "NO_LEADER"), ("", "NOT_INITIALIZED")] {
        let mock = Mock::start(1, |_, _| Action::Answer(updated(1))).await;
        mock.know_only(cluster);
        let client = builder(&[&mock]).timeout(Duration::from_millis(200)).build().unwrap();
        assert_eq!(client.cluster_time(), None);
        let error = client.sessions().update(id(), Update::new()).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        assert!(mock.seen().is_empty());
    }
}

#[tokio::test]
async fn a_port_that_is_not_for_clients_is_recognised() {
    // It serves gRPC, and nothing of what a client begins with: as a node's port for peers does.
    let mock = Mock::start(1, |_, _| Action::Ignore).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tonic::transport::Server::builder()
        .add_service(SessionServiceServer::new(mock.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    for transport in [Transport::Pipeline, Transport::Unary] {
        let client = Client::builder().endpoints([&*address]).transport(transport);
        let client = client.timeout(Duration::from_secs(3_600)).build().unwrap();
        let error = within_ten_seconds(client.sessions().get(id())).await.unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with(&format!("{address}: ")), "{message}");
        assert!(message.contains("port for peers"), "{message}");
        let message = client.status(&address).await.unwrap_err().to_string();
        assert!(message.contains("port for peers"), "{message}");
    }
}

#[tokio::test]
async fn that_all_refuse_is_told_at_once_unless_a_node_was_there() {
    let other = "127.0.0.1:2";
    let hour = Duration::from_secs(3_600);
    let client = Client::builder().endpoints([NOWHERE, other]).timeout(hour).build().unwrap();
    let error = within_ten_seconds(client.sessions().update(id(), Update::new())).await;
    let message = error.unwrap_err().to_string();
    let expected = format!("{NOWHERE}, {other}: Connection refused");
    assert!(message.contains(&expected), "{message}");

    // It was there, and hung up for good: that it comes back is waited for.
    let mock = Mock::start(1, |_, _| Action::Hangup).await;
    let client = builder(&[&mock]).timeout(Duration::from_millis(300)).connect().await.unwrap();
    let error = client.sessions().update(id(), Update::new()).await.unwrap_err();
    assert!(error.to_string().contains("no answer within 300ms"), "{error}");
}

#[tokio::test]
async fn a_long_timeout_does_not_outlive_what_the_server_remembers() {
    let mock = Mock::start(1, |_, _| Action::Answer(updated(7))).await;
    let client = builder(&[&mock]).timeout(Duration::from_secs(600)).connect().await.unwrap();
    client.sessions().update(id(), Update::new()).await.unwrap();
    let context = context_of(&mock.seen()[0]);
    let first_sent = time::millis_from_proto(&context.first_sent_time.unwrap()).unwrap();
    let expire = time::millis_from_proto(&context.expire_time.unwrap()).unwrap();
    assert_eq!(expire - first_sent, 50_000);
}

#[tokio::test]
async fn a_retry_names_the_same_request_and_says_that_it_is_one() {
    let mock = Mock::start(1, |count, _| match count {
        0 => Action::Refuse(Code::Unavailable, "NO_LEADER"),
        1 => Action::Refuse(Code::Unavailable, "SHUTTING_DOWN"),
        // A node that could not find out in the time that it was given.
        2 => Action::Refuse(Code::DeadlineExceeded, "OUTCOME_UNKNOWN"),
        _ => Action::Answer(updated(9)),
    })
    .await;
    let client = builder(&[&mock]).connect().await.unwrap();
    let update = Update::new().set("name", "value");
    client.sessions().update(id(), update).await.unwrap();

    let contexts: Vec<_> = mock.seen().iter().map(context_of).collect();
    let resends: Vec<bool> = contexts.iter().map(|context| context.resend).collect();
    assert_eq!(resends, [false, true, true, true]);
    for context in &contexts[1..] {
        assert_eq!(context.request_id, contexts[0].request_id);
        assert_eq!(context.first_sent_time, contexts[0].first_sent_time);
        assert_eq!(context.expire_time, contexts[0].expire_time);
    }
    let bodies: Vec<_> = mock.seen().into_iter().map(|message| message.request).collect();
    for body in bodies {
        match body.unwrap() {
            Request::UpdateSession(request) => assert_eq!(request.set_attributes["name"], "value"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_create_is_minted_here_and_resent_as_the_same_session() {
    let mock = Mock::start(1, |count, request| match (count, request) {
        (0, _) => Action::Hangup,
        (_, Request::CreateSession(_)) => {
            Action::Answer(Response::CreateSession(v1::CreateSessionResponse {
                revision: 3,
                ..Default::default()
            }))
        }
        _ => panic!("only creates are sent"),
    })
    .await;
    let client = builder(&[&mock]).connect().await.unwrap();
    let created = client.sessions().create(NewSession::new()).await.unwrap();

    let seen = mock.seen();
    let ids: Vec<String> = seen
        .iter()
        .map(|message| match message.request.clone().unwrap() {
            Request::CreateSession(request) => request.id,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(ids, [created.id.reveal(), created.id.reveal()]);
    assert_eq!(context_of(&seen[0]).request_id, context_of(&seen[1]).request_id);
    assert!(context_of(&seen[1]).resend);
}

#[tokio::test]
async fn refusals_are_not_retried() {
    type Expected = fn(&Error) -> bool;
    let cases: [(Code, &str, Expected); 5] = [
        (Code::NotFound, "SESSION_NOT_FOUND", |e| matches!(e, Error::NotFound { .. })),
        (Code::FailedPrecondition, "VERSION_MISMATCH", |e| {
            matches!(e, Error::VersionMismatch { current: None, .. })
        }),
        (Code::AlreadyExists, "SESSION_ID_RETIRED", |e| {
            matches!(e, Error::AlreadyExists { .. }) && e.reason() == "SESSION_ID_RETIRED"
        }),
        (Code::Aborted, "OUTCOME_UNKNOWN", |e| matches!(e, Error::OutcomeUnknown { .. })),
        (Code::ResourceExhausted, "LIMIT_EXCEEDED", |e| matches!(e, Error::LimitExceeded { .. })),
    ];
    for transport in [Transport::Pipeline, Transport::Unary] {
        for (code, reason, expected) in cases {
            let mock = Mock::start(1, move |_, _| Action::Refuse(code, reason)).await;
            let client = builder(&[&mock]).transport(transport).connect().await.unwrap();
            let error = client.sessions().update(id(), Update::new()).await.unwrap_err();
            assert!(expected(&error), "{transport:?} {reason}: {error:?}");
            assert!(error.to_string().contains(reason));
            assert_eq!(mock.seen().len(), 1);
        }
    }
}

#[tokio::test]
async fn the_leader_is_followed() {
    let leader = Mock::start(1, |_, _| Action::Answer(got(5))).await;
    let follower = Mock::start(2, |_, _| Action::Answer(got(4))).await;
    follower.follow(&leader);
    for transport in [Transport::Pipeline, Transport::Unary] {
        // The client is told of the follower only.
        let client = builder(&[&follower]).transport(transport).connect().await.unwrap();
        assert_eq!(client.sessions().get(id()).await.unwrap().version, 5);
    }
    assert_eq!(follower.seen().len(), 0);
}

#[tokio::test]
async fn a_leader_that_cannot_be_reached_is_done_without() {
    let follower = Mock::start(2, |_, _| Action::Answer(got(4))).await;
    *follower.0.leader.lock().unwrap() = (1, NOWHERE.to_owned());
    let client = builder(&[&follower]).connect().await.unwrap();
    assert_eq!(client.sessions().get(id()).await.unwrap().version, 4);
}

#[tokio::test]
async fn a_client_moves_to_a_new_leader_by_itself() {
    let next = Mock::start(2, |_, _| Action::Answer(got(2))).await;
    let first = Mock::start(1, |_, _| Action::Answer(got(1))).await;
    // It knows of no leader at first, so the client soon asks again.
    *first.0.leader.lock().unwrap() = (0, String::new());
    let client = builder(&[&first]).connect().await.unwrap();
    assert_eq!(client.sessions().get(id()).await.unwrap().version, 1);
    first.follow(&next);
    within_ten_seconds(async {
        while client.sessions().get(id()).await.unwrap().version != 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_unavailable_node_leads_to_another() {
    for transport in [Transport::Pipeline, Transport::Unary] {
        let bad = Mock::start(1, |_, _| Action::Refuse(Code::Unavailable, "NO_LEADER")).await;
        *bad.0.leader.lock().unwrap() = (0, String::new());
        let good = Mock::start(2, |_, _| Action::Answer(updated(3))).await;
        let client = builder(&[&bad, &good]).transport(transport).connect().await.unwrap();
        let sessions = client.sessions();
        within_ten_seconds(sessions.update(id(), Update::new())).await.unwrap();
        assert!(!bad.seen().is_empty());
        assert_eq!(good.seen().len(), 1);
        assert!(context_of(&good.seen()[0]).resend);
    }
}

#[tokio::test]
async fn a_lost_connection_leads_to_another_node() {
    let bad = Mock::start(1, |_, _| Action::Hangup).await;
    let good = Mock::start(2, |_, _| Action::Answer(updated(3))).await;
    let client = builder(&[&bad, &good]).connect().await.unwrap();
    let sessions = client.sessions();
    within_ten_seconds(sessions.update(id(), Update::new())).await.unwrap();
    assert_eq!((bad.seen().len(), good.seen().len()), (1, 1));
}

#[tokio::test]
async fn what_is_not_known_at_the_deadline_is_unknown() {
    for transport in [Transport::Pipeline, Transport::Unary] {
        let mock = Mock::start(1, |_, _| Action::Ignore).await;
        let timeout = Duration::from_millis(300);
        let client = builder(&[&mock]).transport(transport).timeout(timeout);
        let client = client.connect().await.unwrap();
        let start = Instant::now();
        let error = client.sessions().update(id(), Update::new()).await.unwrap_err();
        assert!(matches!(error, Error::OutcomeUnknown { .. }), "{error:?}");
        // A read changes nothing: there is nothing unknown about it.
        let error = client.sessions().get(id()).await.unwrap_err();
        assert!(
            matches!(error, Error::DeadlineExceeded { .. } | Error::Unavailable { .. }),
            "{error:?}"
        );
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn what_was_never_applied_is_not_unknown() {
    let mock = Mock::start(1, |_, _| Action::Refuse(Code::Unavailable, "NO_LEADER")).await;
    let client = builder(&[&mock]).timeout(Duration::from_millis(300)).connect().await.unwrap();
    let error = client.sessions().update(id(), Update::new()).await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable { .. }), "{error:?}");
    assert_eq!(error.reason(), "NO_LEADER");
    assert!(mock.seen().len() > 1);
}

#[tokio::test]
async fn an_expired_resend_is_unknown_and_an_expired_first_send_is_not() {
    let expired = Action::Refuse;
    let mock = Mock::start(1, move |count, _| match count {
        0 => expired(Code::FailedPrecondition, "REQUEST_EXPIRED"),
        1 => Action::Hangup,
        _ => expired(Code::FailedPrecondition, "REQUEST_EXPIRED"),
    })
    .await;
    let client = builder(&[&mock]).connect().await.unwrap();
    let error = client.sessions().update(id(), Update::new()).await.unwrap_err();
    assert!(matches!(error, Error::DeadlineExceeded { .. }), "{error:?}");
    let error = client.sessions().update(id(), Update::new()).await.unwrap_err();
    assert!(matches!(error, Error::OutcomeUnknown { .. }), "{error:?}");
}

#[tokio::test]
async fn a_server_that_goes_silent_is_left_for_another() {
    let silent = Mock::start(1, |_, _| Action::Answer(updated(1))).await;
    let good = Mock::start(2, |_, _| Action::Answer(updated(2))).await;
    let client = builder(&[&silent, &good])
        .attempt_timeout(Duration::from_millis(200))
        .connect_timeout(Duration::from_millis(200))
        .connect()
        .await
        .unwrap();
    let sessions = client.sessions();
    assert_eq!(sessions.update(id(), Update::new()).await.unwrap().version, 1);
    silent.fall_silent();
    let updated = within_ten_seconds(sessions.update(id(), Update::new())).await.unwrap();
    assert_eq!(updated.version, 2);
}

#[tokio::test]
async fn nobody_listening_is_an_error_in_time() {
    let error = Client::builder().endpoints([NOWHERE]).connect().await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable { message, .. } if message.contains(NOWHERE)));

    let timeout = Duration::from_millis(200);
    let client = Client::builder().endpoints([NOWHERE]).timeout(timeout).build().unwrap();
    let error = within_ten_seconds(client.sessions().update(id(), Update::new())).await;
    assert!(matches!(error.unwrap_err(), Error::Unavailable { .. }));
}

#[tokio::test]
async fn answers_may_come_in_any_order() {
    let mock = Mock::start(1, |count, request| {
        let Request::GetSession(request) = request else { panic!("only gets are sent") };
        let response = got(request.min_revision);
        if count % 2 == 0 { Action::HoldBack(response) } else { Action::Answer(response) }
    })
    .await;
    let client = builder(&[&mock]).connect().await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for revision in 0..200 {
        let sessions = client.sessions();
        calls.spawn(async move {
            assert_eq!(sessions.get_local(id(), revision).await.unwrap().version, revision);
        });
    }
    within_ten_seconds(calls.join_all()).await;
    assert_eq!(mock.seen().len(), 200);
}

#[tokio::test]
async fn more_requests_than_a_pipeline_takes_wait_their_turn() {
    let mock = Mock::start(1, |_, _| Action::Answer(got(1))).await;
    let client = builder(&[&mock]).connect().await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..crate::limits::PIPELINE_IN_FLIGHT_MAX * 2 {
        let sessions = client.sessions();
        calls.spawn(async move { sessions.get(id()).await.unwrap() });
    }
    within_ten_seconds(calls.join_all()).await;
}

#[tokio::test]
async fn callers_that_give_up_do_no_harm() {
    let mock = Mock::start(1, |count, _| match count {
        0..10 => Action::Ignore,
        _ => Action::Answer(got(1)),
    })
    .await;
    let client = builder(&[&mock]).connect().await.unwrap();
    for _ in 0..10 {
        let sessions = client.sessions();
        let call = sessions.get(id());
        assert!(tokio::time::timeout(Duration::from_millis(5), call).await.is_err());
    }
    within_ten_seconds(client.sessions().get(id())).await.unwrap();
}

#[tokio::test]
async fn a_request_that_no_server_would_take_stays_here() {
    let mock = Mock::start(1, |_, _| Action::Answer(updated(1))).await;
    let client = builder(&[&mock]).connect().await.unwrap();
    let update = Update::new().set("large", vec![0; crate::limits::REQUEST_BYTES_MAX]);
    let error = client.sessions().update(id(), update).await.unwrap_err();
    assert!(matches!(error, Error::LimitExceeded { .. }), "{error:?}");
    assert!(mock.seen().is_empty());
}

#[tokio::test]
async fn several_connections_are_used_in_turn() {
    let mock = Mock::start(1, |_, _| Action::Answer(got(1))).await;
    let client = builder(&[&mock]).connections(4).connect().await.unwrap();
    for _ in 0..8 {
        client.sessions().get(id()).await.unwrap();
    }
    assert_eq!(mock.seen().len(), 8);
    assert_eq!(mock.0.pipelines.load(Ordering::Relaxed), 4);
}

#[tokio::test]
async fn clusters_are_described_and_formed() {
    let mock = Mock::start(1, |_, _| Action::Ignore).await;
    let client = builder(&[&mock]).build().unwrap();
    assert_eq!(client.describe().await.unwrap().cluster_id, "c1");
    assert_eq!(client.status(mock.address()).await.unwrap().node_id, 1);
    let member =
        |node_id| NewMember { node_id, peer_address: format!("127.0.0.1:{}", 7_500 + node_id) };
    let members: Vec<NewMember> = (1..=3).map(member).collect();
    assert_eq!(client.initialize(members).await.unwrap(), "c1");
    let error = client.initialize(vec![member(1)]).await.unwrap_err();
    assert!(matches!(&error, Error::Refused { reason, .. } if reason == "ALREADY_INITIALIZED"));
}

#[test]
fn options_are_checked() {
    let bad = |builder: ClientBuilder| builder.build().is_err();
    assert!(bad(Client::builder().endpoints([] as [&str; 0])));
    for endpoint in [
        "",
        " , ",
        "host",
        "host:",
        ":7400",
        "host:0",
        "host:70000",
        "https://host:7400",
        "a/b:1",
        "a b:1",
        "a:1;b:2",
        "::1:7400",
        "[::1]",
        "[host]:7400",
        "127.0.0.1:7400:7401",
        "a:1,b",
    ] {
        let error = Client::builder().endpoints([endpoint]).build().unwrap_err();
        assert!(matches!(error, Error::Configuration { .. }), "{endpoint:?}: {error:?}");
    }
    let error = Client::builder().endpoints(["::1:7400"]).build().unwrap_err();
    assert!(error.to_string().contains("[::1]:7400"), "{error}");
    for endpoint in [
        "host:7400",
        "http://host:7400",
        "[::1]:7400",
        "http://10.0.0.1:7400/",
        "a:1, b:2",
        " a:1 ,b_c.d-e:2,",
    ] {
        assert!(!bad(Client::builder().endpoints([endpoint])), "{endpoint:?}");
    }
    assert!(bad(Client::builder().namespace("")));
    assert!(bad(Client::builder().namespace("Shop")));
    assert!(bad(Client::builder().namespace("a".repeat(64))));
    assert!(bad(Client::builder().connections(0)));
    assert!(bad(Client::builder().timeout(Duration::ZERO)));
    assert!(bad(Client::builder().timeout(Duration::MAX)));
}
