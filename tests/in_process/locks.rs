//! Leases and locks of three nodes in one process, asked through the generated stubs: nothing is
//! retried here, and each request goes to the node that is named.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use quorate::proto::v1;
use quorate::proto::v1::lease_renewal::Outcome;
use quorate::proto::v1::lease_service_client::LeaseServiceClient;
use quorate::proto::v1::lock_mode::Mode;
use quorate::proto::v1::lock_service_client::LockServiceClient;
use quorate::proto::v1::pipeline_request::Request as Asked;
use quorate::proto::v1::pipeline_response::Response as Answer;
use quorate::proto::v1::pipeline_service_client::PipelineServiceClient;
use quorate::proto::v1::session_service_client::SessionServiceClient;
use quorate::server::Server;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::nodes::{PATIENCE, eventually, three_nodes};

const MINUTE: Duration = Duration::from_secs(60);

struct Cluster {
    servers: Vec<Option<Server>>,
    channels: Vec<Channel>,
    requests: AtomicU64,
    _directory: TempDir,
}

async fn start() -> Cluster {
    let directory = tempfile::tempdir().unwrap();
    let servers = three_nodes(directory.path()).await;
    let channel = |server: &Server| {
        let address = format!("http://{}", server.address());
        Endpoint::from_shared(address).unwrap().connect_lazy()
    };
    let channels = servers.iter().map(channel).collect();
    let servers = servers.into_iter().map(Some).collect();
    let requests = AtomicU64::new(1);
    let cluster = Cluster { servers, channels, requests, _directory: directory };
    eventually("all nodes serve", async || {
        let ready = |server: &Option<Server>| server.as_ref().unwrap().node().is_ready();
        cluster.servers.iter().all(ready).then_some(())
    })
    .await;
    cluster
}

fn length(duration: Duration) -> Option<prost_types::Duration> {
    Some(duration.try_into().unwrap())
}

fn at_most(duration: &Option<prost_types::Duration>) -> Duration {
    duration.unwrap().try_into().unwrap()
}

fn exclusive() -> Option<v1::LockMode> {
    Some(v1::LockMode { mode: Some(Mode::Exclusive(true)) })
}

fn lease_id(number: u8) -> String {
    format!("{number:02x}").repeat(16)
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: &Result<T, Status>, code: Code, reason: &str) {
    let status = result.as_ref().unwrap_err();
    let details = status.get_error_details();
    let found = details.error_info().map(|info| info.reason.as_str());
    assert_eq!((status.code(), found), (code, Some(reason)), "{status:?}");
}

type Acquiring = JoinHandle<Result<v1::AcquireLockResponse, Status>>;

impl Cluster {
    fn leader(&self) -> Option<usize> {
        let running = self.servers.iter().flatten();
        let ids: Vec<u64> = running.filter_map(|server| server.node().leader_id()).collect();
        let agreed = ids.first().filter(|first| ids.iter().all(|id| id == *first))?;
        let leader = usize::try_from(*agreed).ok()? - 1;
        self.servers[leader].as_ref().map(|_| leader)
    }

    fn leases(&self, node: usize) -> LeaseServiceClient<Channel> {
        LeaseServiceClient::new(self.channels[node].clone())
    }

    fn locks(&self, node: usize) -> LockServiceClient<Channel> {
        LockServiceClient::new(self.channels[node].clone())
    }

    fn context(&self) -> v1::RequestContext {
        let request_id = self.requests.fetch_add(1, Ordering::Relaxed);
        v1::RequestContext { request_id, ..Default::default() }
    }

    async fn grant(&self, node: usize, number: u8, ttl: Duration) -> v1::LeaseTiming {
        let request = v1::GrantLeaseRequest {
            lease_id: lease_id(number),
            owner: format!("owner-{number}"),
            ttl: length(ttl),
            ..Default::default()
        };
        self.leases(node).grant_lease(request).await.unwrap().into_inner().timing.unwrap()
    }

    fn acquire_request(&self, number: u8, lock: &str, wait: Duration) -> v1::AcquireLockRequest {
        v1::AcquireLockRequest {
            context: Some(self.context()),
            lock: lock.into(),
            lease_id: lease_id(number),
            mode: exclusive(),
            wait: length(wait),
            ..Default::default()
        }
    }

    async fn acquire(
        &self,
        node: usize,
        request: v1::AcquireLockRequest,
    ) -> Result<v1::AcquireLockResponse, Status> {
        Ok(self.locks(node).acquire_lock(request).await?.into_inner())
    }

    /// Begins to acquire, and returns when the claim is in line as seen by `node`.
    async fn queue(&self, node: usize, request: v1::AcquireLockRequest) -> Acquiring {
        let id = request.context.unwrap().request_id;
        let name = request.lock.clone();
        let mut locks = self.locks(node);
        let acquiring =
            tokio::spawn(async move { Ok(locks.acquire_lock(request).await?.into_inner()) });
        eventually("the claim is in line", async || {
            let lock = self.lock(node, &name).await.ok()?;
            lock.waiters.iter().any(|waiter| waiter.request_id == id).then_some(())
        })
        .await;
        acquiring
    }

    async fn lock(&self, node: usize, lock: &str) -> Result<v1::Lock, Status> {
        let request = v1::GetLockRequest { lock: lock.into(), ..Default::default() };
        Ok(self.locks(node).get_lock(request).await?.into_inner().lock.unwrap())
    }

    async fn release(
        &self,
        node: usize,
        number: u8,
        lock: &str,
        token: u64,
    ) -> Result<u64, Status> {
        let request = v1::ReleaseLockRequest {
            lock: lock.into(),
            token,
            lease_id: lease_id(number),
            ..Default::default()
        };
        Ok(self.locks(node).release_lock(request).await?.into_inner().revision)
    }

    async fn stop(&mut self, node: usize) {
        self.servers[node].take().unwrap().stop().await;
    }
}

async fn answered(acquiring: Acquiring) -> Result<v1::AcquireLockResponse, Status> {
    tokio::time::timeout(PATIENCE, acquiring).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_lease_is_granted_kept_alive_and_revoked() {
    let cluster = start().await;
    let timing = cluster.grant(0, 1, MINUTE).await;
    assert!(at_most(&timing.remaining) <= MINUTE);
    assert!(at_most(&timing.renew_after) < MINUTE / 2);
    let mut again = cluster.leases(1);
    let taken = again
        .grant_lease(v1::GrantLeaseRequest {
            lease_id: lease_id(1),
            ttl: length(MINUTE),
            ..Default::default()
        })
        .await;
    assert_refused(&taken, Code::AlreadyExists, "LEASE_EXISTS");

    // Two messages on one stream, each answered under its own id.
    let (send, messages) = mpsc::unbounded_channel();
    for (request_id, ids) in [(7, vec![1, 2]), (8, vec![1])] {
        send.send(v1::KeepAliveLeasesRequest {
            context: Some(v1::RequestContext { request_id, ..Default::default() }),
            namespace: String::new(),
            lease_ids: ids.into_iter().map(lease_id).collect(),
        })
        .unwrap();
    }
    let mut stream = cluster
        .leases(2)
        .keep_alive_leases(UnboundedReceiverStream::new(messages))
        .await
        .unwrap()
        .into_inner();
    let mut renewed = BTreeMap::new();
    for _ in 0..2 {
        let response = stream.message().await.unwrap().unwrap();
        renewed.insert(response.request_id, response.renewals);
    }
    let is_renewed =
        |renewal: &v1::LeaseRenewal| matches!(renewal.outcome, Some(Outcome::Renewed(_)));
    assert!(is_renewed(&renewed[&7][0]) && is_renewed(&renewed[&8][0]), "{renewed:?}");
    assert!(matches!(renewed[&7][1].outcome, Some(Outcome::Lost(_))), "{renewed:?}");
    assert_eq!(renewed[&7][1].lease_id, lease_id(2));
    // One that is refused as a whole ends the stream.
    send.send(v1::KeepAliveLeasesRequest::default()).unwrap();
    assert_refused(&stream.message().await, Code::InvalidArgument, "INVALID_LEASE_ID");

    cluster.grant(1, 3, MINUTE).await;
    let list = v1::ListLeasesRequest { page_size: 1, ..Default::default() };
    let page = cluster.leases(2).list_leases(list.clone()).await.unwrap().into_inner();
    assert_eq!((page.leases.len(), &page.next_page_token), (1, &lease_id(1)));
    let list = v1::ListLeasesRequest { page_token: page.next_page_token, ..list };
    let page = cluster.leases(2).list_leases(list).await.unwrap().into_inner();
    assert_eq!((&*page.leases[0].owner, &*page.next_page_token), ("owner-3", ""));

    let revoke = v1::RevokeLeaseRequest { lease_id: lease_id(1), ..Default::default() };
    cluster.leases(1).revoke_lease(revoke).await.unwrap();
    let get = v1::GetLeaseRequest { lease_id: lease_id(1), ..Default::default() };
    let gone = cluster.leases(0).get_lease(get).await;
    assert_refused(&gone, Code::NotFound, "LEASE_NOT_FOUND");
}

#[tokio::test]
async fn who_waits_on_one_node_is_granted_what_is_released_on_another() {
    let cluster = start().await;
    for number in 1..=3 {
        cluster.grant(0, number, MINUTE).await;
    }
    let first = cluster.acquire_request(1, "door", Duration::ZERO);
    let held = cluster.acquire(0, first.clone()).await.unwrap();
    assert_eq!(held.token, held.revision);
    // The same request again, elsewhere, tells of the same grant.
    let again = cluster.acquire(1, first).await.unwrap();
    assert_eq!((again.token, again.grant_time), (held.token, held.grant_time));

    let now = cluster.acquire_request(2, "door", Duration::ZERO);
    assert_refused(&cluster.acquire(2, now).await, Code::FailedPrecondition, "LOCK_HELD");
    let in_line = [
        cluster.queue(1, cluster.acquire_request(2, "door", MINUTE)).await,
        cluster.queue(2, cluster.acquire_request(3, "door", MINUTE)).await,
    ];
    let lock = cluster.lock(0, "door").await.unwrap();
    assert_eq!((lock.holder_count, lock.waiter_count), (1, 2));
    assert_eq!(lock.holders[0].owner, "owner-1");
    let owners: Vec<_> = lock.waiters.iter().map(|waiter| &*waiter.owner).collect();
    assert_eq!(owners, ["owner-2", "owner-3"]);

    let mut token = held.token;
    for (number, acquiring) in (2..).zip(in_line) {
        cluster.release(0, number - 1, "door", token).await.unwrap();
        let granted = answered(acquiring).await.unwrap();
        assert!(granted.token > token);
        assert!(at_most(&granted.timing.unwrap().remaining) <= MINUTE);
        let late = cluster.release(1, number - 1, "door", token).await;
        assert_refused(&late, Code::FailedPrecondition, "LOCK_NOT_HELD");
        token = granted.token;
    }
    cluster.release(2, 3, "door", token).await.unwrap();
    let free = cluster.lock(1, "door").await;
    assert_refused(&free, Code::NotFound, "LOCK_NOT_FOUND");
}

#[tokio::test]
async fn a_wait_ends_as_it_was_asked_to() {
    let cluster = start().await;
    for number in 1..=3 {
        cluster.grant(0, number, MINUTE).await;
    }
    let held = cluster.acquire_request(1, "door", Duration::ZERO);
    let token = cluster.acquire(0, held).await.unwrap().token;

    let cancelled = cluster.acquire_request(2, "door", MINUTE);
    let acquire_request_id = cancelled.context.unwrap().request_id;
    let acquiring = cluster.queue(1, cancelled.clone()).await;
    let cancel = v1::CancelAcquireRequest {
        lock: "door".into(),
        lease_id: lease_id(2),
        acquire_request_id,
        ..Default::default()
    };
    cluster.locks(2).cancel_acquire(cancel).await.unwrap();
    let end = answered(acquiring).await;
    assert_refused(&end, Code::FailedPrecondition, "ACQUIRE_CANCELLED");
    let again = cluster.acquire(0, cancelled).await;
    assert_refused(&again, Code::FailedPrecondition, "ACQUIRE_ENDED");

    let short = cluster.acquire_request(2, "door", Duration::from_millis(300));
    let end = cluster.acquire(2, short).await;
    assert_refused(&end, Code::FailedPrecondition, "LOCK_WAIT_EXPIRED");

    // The call's deadline comes first: the claim stays, and its request finds it.
    let patient = cluster.acquire_request(3, "door", MINUTE);
    let mut call = Request::new(patient.clone());
    call.set_timeout(Duration::from_secs(1));
    let end = cluster.locks(1).acquire_lock(call).await;
    assert_refused(&end, Code::DeadlineExceeded, "STILL_WAITING");
    let waiters = cluster.lock(0, "door").await.unwrap().waiters;
    assert_eq!(waiters[0].request_id, patient.context.unwrap().request_id);
    let acquiring = cluster.queue(2, patient).await;
    cluster.release(0, 1, "door", token).await.unwrap();
    assert!(answered(acquiring).await.unwrap().token > token);

    // The lease of one who waits is revoked.
    let acquiring = cluster.queue(1, cluster.acquire_request(2, "door", MINUTE)).await;
    let revoke = v1::RevokeLeaseRequest { lease_id: lease_id(2), ..Default::default() };
    cluster.leases(0).revoke_lease(revoke).await.unwrap();
    assert_refused(&answered(acquiring).await, Code::NotFound, "LEASE_NOT_FOUND");
}

#[tokio::test]
async fn a_lease_that_ends_hands_its_lock_on() {
    let cluster = start().await;
    cluster.grant(0, 1, Duration::from_secs(1)).await;
    cluster.grant(0, 2, MINUTE).await;
    let held = cluster.acquire_request(1, "door", Duration::ZERO);
    let token = cluster.acquire(0, held).await.unwrap().token;
    let next = cluster.acquire_request(2, "door", MINUTE);
    let granted = cluster.acquire(1, next).await.unwrap();
    assert!(granted.token > token);
    let late = cluster.release(2, 1, "door", token).await;
    assert_refused(&late, Code::FailedPrecondition, "LOCK_NOT_HELD");
}

#[tokio::test]
async fn a_fenced_write_needs_the_token_that_holds() {
    let cluster = start().await;
    let mut sessions = SessionServiceClient::new(cluster.channels[1].clone());
    let id = "a-session-of-its-own".to_owned();
    let create = v1::CreateSessionRequest { id: id.clone(), ..Default::default() };
    sessions.create_session(create).await.unwrap();
    let selector = || {
        let selector = Some(v1::session_selector::Selector::Id(id.clone()));
        Some(v1::SessionSelector { selector })
    };
    cluster.grant(0, 1, MINUTE).await;
    let acquire = cluster.acquire_request(1, "door", Duration::ZERO);
    let token = cluster.acquire(0, acquire).await.unwrap().token;
    let update = |token: u64| v1::UpdateSessionRequest {
        session: selector(),
        set_attributes: [("count".to_owned(), token.to_string().into())].into(),
        fence: Some(v1::Fence { lock: "door".into(), token }),
        ..Default::default()
    };
    sessions.update_session(update(token)).await.unwrap();
    let wrong = sessions.update_session(update(token + 1)).await;
    assert_refused(&wrong, Code::FailedPrecondition, "FENCED");
    cluster.release(2, 1, "door", token).await.unwrap();
    let late = sessions.update_session(update(token)).await;
    assert_refused(&late, Code::FailedPrecondition, "FENCED");
    let delete =
        |fence| v1::DeleteSessionRequest { session: selector(), fence, ..Default::default() };
    let fence = Some(v1::Fence { lock: "door".into(), token });
    let late = sessions.delete_session(delete(fence)).await;
    assert_refused(&late, Code::FailedPrecondition, "FENCED");
    let get = v1::GetSessionRequest { session: selector(), ..Default::default() };
    let session = sessions.get_session(get).await.unwrap().into_inner().session.unwrap();
    assert_eq!(session.attributes["count"], token.to_string().as_bytes());
    sessions.delete_session(delete(None)).await.unwrap();
}

/// A stream of requests, and what came back so far.
struct Pipeline {
    send: mpsc::UnboundedSender<v1::PipelineRequest>,
    answers: Streaming<v1::PipelineResponse>,
    received: BTreeMap<u64, Answer>,
}

impl Pipeline {
    async fn open(channel: Channel) -> Self {
        let (send, requests) = mpsc::unbounded_channel();
        let mut client = PipelineServiceClient::new(channel);
        let answers = client.pipeline(UnboundedReceiverStream::new(requests)).await.unwrap();
        let mut pipeline = Self { send, answers: answers.into_inner(), received: BTreeMap::new() };
        assert!(matches!(pipeline.answer(0).await, Answer::Hello(_)));
        pipeline
    }

    fn ask(&self, correlation_id: u64, request: Asked) {
        let request = Some(request);
        self.send.send(v1::PipelineRequest { correlation_id, timeout: None, request }).unwrap();
    }

    async fn answer(&mut self, correlation_id: u64) -> Answer {
        loop {
            if let Some(answer) = self.received.remove(&correlation_id) {
                return answer;
            }
            let next = tokio::time::timeout(PATIENCE, self.answers.message()).await.unwrap();
            let next = next.unwrap().unwrap();
            self.received.insert(next.correlation_id, next.response.unwrap());
        }
    }
}

#[tokio::test]
async fn a_pipeline_carries_what_waits_and_what_ends_the_wait() {
    let cluster = start().await;
    let mut pipeline = Pipeline::open(cluster.channels[1].clone()).await;
    for number in [1, 2] {
        pipeline.ask(
            number.into(),
            Asked::GrantLease(v1::GrantLeaseRequest {
                lease_id: lease_id(number),
                ttl: length(MINUTE),
                ..Default::default()
            }),
        );
    }
    // Nothing is waited for: what goes first in the pipeline is proposed first.
    let acquire = |number, wait| Asked::AcquireLock(cluster.acquire_request(number, "door", wait));
    pipeline.ask(3, acquire(1, Duration::ZERO));
    pipeline.ask(4, acquire(2, MINUTE));
    let keep_alive = v1::KeepAliveLeasesRequest {
        lease_ids: vec![lease_id(1), lease_id(2)],
        ..Default::default()
    };
    pipeline.ask(5, Asked::KeepAliveLeases(keep_alive));
    let Answer::AcquireLock(held) = pipeline.answer(3).await else { panic!("not acquired") };
    let Answer::KeepAliveLeases(renewed) = pipeline.answer(5).await else { panic!("not renewed") };
    let is_renewed =
        |renewal: &v1::LeaseRenewal| matches!(renewal.outcome, Some(Outcome::Renewed(_)));
    assert!(renewed.renewals.iter().all(is_renewed), "{renewed:?}");
    // Read behind the acquire that waits.
    let get = v1::GetLockRequest { lock: "door".into(), ..Default::default() };
    pipeline.ask(6, Asked::GetLock(get));
    let Answer::GetLock(found) = pipeline.answer(6).await else { panic!("not found") };
    assert_eq!(found.lock.unwrap().waiter_count, 1);
    assert!(!pipeline.received.contains_key(&4));
    let release =
        v1::ReleaseLockRequest { lock: "door".into(), token: held.token, ..Default::default() };
    pipeline.ask(7, Asked::ReleaseLock(release.clone()));
    pipeline.ask(8, Asked::ReleaseLock(release));
    let Answer::AcquireLock(next) = pipeline.answer(4).await else { panic!("not acquired") };
    assert!(next.token > held.token);
    assert!(matches!(pipeline.answer(7).await, Answer::ReleaseLock(_)));
    let Answer::Error(error) = pipeline.answer(8).await else { panic!("released twice") };
    assert_eq!(error.code, Code::FailedPrecondition as u32);
}

#[tokio::test]
async fn who_waits_keeps_his_place_when_the_leader_stops() {
    let mut cluster = start().await;
    let leader = eventually("there is a leader", async || cluster.leader()).await;
    let (first, second) = ((leader + 1) % 3, (leader + 2) % 3);
    for number in 1..=4 {
        cluster.grant(leader, number, MINUTE).await;
    }
    let held = cluster.acquire_request(1, "door", Duration::ZERO);
    let token = cluster.acquire(leader, held).await.unwrap().token;
    let in_line = [
        cluster.queue(first, cluster.acquire_request(2, "door", MINUTE)).await,
        cluster.queue(second, cluster.acquire_request(3, "door", MINUTE)).await,
    ];
    // One waits on the leader itself, and goes on waiting elsewhere.
    let moved = cluster.acquire_request(4, "door", MINUTE);
    let turned_away = cluster.queue(leader, moved.clone()).await;
    cluster.stop(leader).await;
    assert_refused(&answered(turned_away).await, Code::Unavailable, "NODE_STOPPING");
    eventually("there is another leader", async || cluster.leader()).await;
    let moved = cluster.queue(first, moved).await;
    let lock = cluster.lock(second, "door").await.unwrap();
    let owners: Vec<_> = lock.waiters.iter().map(|waiter| &*waiter.owner).collect();
    assert_eq!(owners, ["owner-2", "owner-3", "owner-4"]);
    let mut token = token;
    for (number, acquiring) in (2..).zip(in_line.into_iter().chain([moved])) {
        cluster.release(second, number - 1, "door", token).await.unwrap();
        let granted = answered(acquiring).await.unwrap();
        assert!(granted.token > token);
        token = granted.token;
    }
}
