//! What this node answers to others: the service behind `quorate.peer.v1`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _, stream};
use openraft::raft::{AppendEntriesRequest, StreamAppendError, VoteRequest};
use openraft::raft::{AppendEntriesResponse, VoteResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::convert::{append_result_out, entry_in, log_id_in, log_id_out, vote_in, vote_out};
use super::machine::load_snapshot_header;
use super::node::Node;
use super::replica::Replica;
use super::types::{LogId, TypeConfig};
use crate::proto::peer;
use crate::proto::peer::exchange_request::Request as Question;
use crate::proto::peer::exchange_response::Response as Answer;
use crate::proto::peer::peer_service_server::PeerService;
use crate::state::{FEATURE_LEVEL, Proposal};
use crate::storage::snapshot::SnapshotReceiver;

/// Answers on their way on one exchange stream before its questions are read no further.
const ANSWERS_UNDER_WAY_MAX: usize = 256;
/// Largest snapshot that is taken from a peer: more than any state that fits a memory.
const SNAPSHOT_BYTES_MAX: u64 = 1 << 40;
/// How long a follower may keep a leader waiting for a barrier before it asks again.
const BARRIER_TIMEOUT: Duration = Duration::from_millis(500);

/// The service; one for the node's life, from before it belongs to a cluster.
#[derive(Clone)]
pub(crate) struct PeerServer {
    pub(crate) node: Arc<Node>,
}

/// Who sends a message of its kind.
#[derive(Clone, Copy)]
enum Sender<'a> {
    /// Whoever leads by this vote, in a term that may be over.
    Leader(Option<&'a peer::VoteState>),
    /// Whoever asks for this vote.
    Candidate(Option<&'a peer::VoteState>),
    Anybody,
}

impl Sender<'_> {
    /// Refuses one who speaks for somebody else.
    fn check(self, from_node: u64) -> Result<(), Status> {
        match self {
            Self::Leader(Some(vote)) | Self::Candidate(Some(vote)) if vote.node != from_node => {
                Err(invalid(format_args!("node {from_node} speaks for node {}", vote.node)))
            }
            _ => Ok(()),
        }
    }
}

type Reply<T> = Result<Response<T>, Status>;
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn invalid(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

impl PeerServer {
    /// The replica, if the message is meant for it and its sender is who the membership says.
    fn meant(
        &self,
        header: Option<&peer::Header>,
        sender: Sender<'_>,
    ) -> Result<Arc<Replica>, Status> {
        let replica = self
            .node
            .replica()
            .ok_or_else(|| Status::unavailable("this node belongs to no cluster yet"))?;
        let header = header.ok_or_else(|| Status::invalid_argument("header is missing"))?;
        replica.check_header(header).map_err(Status::failed_precondition)?;
        sender.check(header.from_node)?;
        match sender {
            Sender::Leader(vote) => hear(&replica, header.from_node, vote, header.clock.as_ref()),
            Sender::Candidate(_) | Sender::Anybody => {
                replica.clock.observe(header.from_node, header.clock.as_ref());
            }
        }
        Ok(replica)
    }
}

/// Takes a leader's word for the time, unless this node has voted in a later term.
fn hear(replica: &Replica, from: u64, vote: Option<&peer::VoteState>, clock: Option<&peer::Clock>) {
    if let Some(vote) = vote
        && vote.term >= replica.log.promised_term()
    {
        replica.clock.follow(from, vote.term, clock);
    }
}

/// The sender of a stream, who is looked at anew when the membership has changed.
struct StreamSender {
    replica: Arc<Replica>,
    header: peer::Header,
    membership: Option<LogId>,
}

impl StreamSender {
    fn new(replica: Arc<Replica>, header: Option<peer::Header>) -> Self {
        let membership = replica.core.membership();
        Self { replica, header: header.unwrap_or_default(), membership }
    }

    fn check(&mut self, sender: Sender<'_>) -> Result<(), Status> {
        let membership = self.replica.core.membership();
        if membership != self.membership {
            // What the sender knew when it opened the stream may be older than what it knows.
            self.header.membership = None;
            self.replica.check_header(&self.header).map_err(Status::failed_precondition)?;
            self.membership = membership;
        }
        sender.check(self.header.from_node)
    }
}

fn append_request(rpc: peer::AppendRequest) -> Result<AppendEntriesRequest<TypeConfig>, Status> {
    Ok(AppendEntriesRequest {
        vote: vote_in(rpc.vote).map_err(invalid)?,
        prev_log_id: rpc.prev_log_id.map(log_id_in),
        leader_commit: rpc.leader_commit.map(log_id_in),
        entries: rpc
            .entries
            .into_iter()
            .map(entry_in)
            .collect::<Result<_, _>>()
            .map_err(invalid)?,
    })
}

#[tonic::async_trait]
impl PeerService for PeerServer {
    async fn identify(
        &self,
        request: Request<peer::IdentifyRequest>,
    ) -> Reply<peer::IdentifyResponse> {
        let _ = request;
        Ok(Response::new(self.node.identify()))
    }

    async fn adopt(&self, request: Request<peer::AdoptRequest>) -> Reply<peer::AdoptResponse> {
        self.node.adopt(request.into_inner()).map_err(Status::failed_precondition)?;
        Ok(Response::new(peer::AdoptResponse {}))
    }

    async fn vote(&self, request: Request<peer::VoteRequest>) -> Reply<peer::VoteResponse> {
        let request = request.into_inner();
        let sender = Sender::Candidate(request.vote.as_ref());
        let replica = self.meant(request.header.as_ref(), sender)?;
        let mut rpc = VoteRequest::new(
            vote_in(request.vote).map_err(invalid)?,
            request.last_log_id.map(log_id_in),
        );
        rpc.leadership_transfer = request.leadership_transfer;
        let result = if request.pre_vote {
            replica.raft.pre_vote(rpc).await
        } else {
            replica.raft.vote(rpc).await
        };
        let VoteResponse { vote, vote_granted, last_log_id } =
            result.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(peer::VoteResponse {
            vote: Some(vote_out(&vote)),
            granted: vote_granted,
            last_log_id: last_log_id.as_ref().map(log_id_out),
            clock: Some(replica.clock.announce()),
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<peer::HeartbeatRequest>,
    ) -> Reply<peer::HeartbeatResponse> {
        let request = request.into_inner();
        let sender = Sender::Leader(request.vote.as_ref());
        let replica = self.meant(request.header.as_ref(), sender)?;
        let prev_log_id: Option<LogId> = request.prev_log_id.map(log_id_in);
        let told = request.leader_commit.zip(request.quorum_silence);
        let rpc = AppendEntriesRequest {
            vote: vote_in(request.vote).map_err(invalid)?,
            prev_log_id,
            leader_commit: request.leader_commit.map(log_id_in),
            entries: Vec::new(),
        };
        // What it says was true when it came, however long it takes to answer.
        let heard_at = replica.clock.monotonic();
        let response = replica
            .raft
            .append_entries(rpc)
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        // What a leader says whose term is over is refused above all.
        if let Some((commit, silence)) = told
            && !matches!(response, AppendEntriesResponse::HigherVote(_))
        {
            let silence = Duration::from_millis(silence);
            replica.freshness.hear(heard_at, commit.index.saturating_add(1), silence);
        }
        let result = match response {
            AppendEntriesResponse::Success => Ok(prev_log_id),
            AppendEntriesResponse::PartialSuccess(matched) => Ok(matched),
            AppendEntriesResponse::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote)),
            AppendEntriesResponse::Conflict => Err(StreamAppendError::Conflict(
                prev_log_id.ok_or_else(|| Status::internal("nothing conflicts with nothing"))?,
            )),
        };
        Ok(Response::new(peer::HeartbeatResponse {
            result: Some(append_result_out(result)),
            clock: Some(replica.clock.announce()),
            feature_level: Some(FEATURE_LEVEL),
        }))
    }

    type AppendStream = BoxStream<peer::AppendResponse>;

    async fn append(
        &self,
        request: Request<Streaming<peer::AppendRequest>>,
    ) -> Reply<Self::AppendStream> {
        let mut requests = request.into_inner();
        let first = requests
            .message()
            .await?
            .ok_or_else(|| Status::invalid_argument("an append stream without a request"))?;
        let sender = Sender::Leader(first.vote.as_ref());
        let replica = self.meant(first.header.as_ref(), sender)?;
        let mut first = first;
        let sender = StreamSender::new(replica.clone(), first.header.take());
        let first = append_request(first)?;
        // A request that cannot be read, or is not the leader's, ends the stream; the leader opens
        // another.
        let rest = stream::unfold((requests, sender), |(mut requests, mut sender)| async move {
            let request = requests.message().await.ok()??;
            let vote = request.vote.as_ref();
            sender.check(Sender::Leader(vote)).ok()?;
            hear(&sender.replica, sender.header.from_node, vote, request.clock.as_ref());
            Some((append_request(request).ok()?, (requests, sender)))
        });
        let input = stream::once(async move { first }).chain(rest);
        let output = replica.raft.stream_append(input).map(|result| match result {
            Ok(result) => Ok(peer::AppendResponse { result: Some(append_result_out(result)) }),
            Err(fatal) => Err(Status::unavailable(fatal.to_string())),
        });
        Ok(Response::new(Box::pin(output)))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<peer::InstallSnapshotRequest>>,
    ) -> Reply<peer::InstallSnapshotResponse> {
        let mut chunks = request.into_inner();
        let first = chunks
            .message()
            .await?
            .ok_or_else(|| Status::invalid_argument("a snapshot without a header"))?;
        let sender = Sender::Leader(first.vote.as_ref());
        let replica = self.meant(first.header.as_ref(), sender)?;
        let vote = vote_in(first.vote).map_err(invalid)?;
        let directory = replica.snapshots.clone();
        let (data, mut inbox) = mpsc::channel::<bytes::Bytes>(8);
        let receiving = tokio::task::spawn_blocking(move || -> std::io::Result<_> {
            let mut receiver = SnapshotReceiver::create(&directory, SNAPSHOT_BYTES_MAX)
                .map_err(std::io::Error::other)?;
            while let Some(data) = inbox.blocking_recv() {
                receiver.write(&data).map_err(std::io::Error::other)?;
            }
            let file = receiver.finish().map_err(std::io::Error::other)?;
            let boundary = load_snapshot_header(&file)?;
            Ok((file, boundary))
        });
        while let Some(chunk) = chunks.message().await? {
            if data.send(chunk.data).await.is_err() {
                break;
            }
        }
        drop(data);
        let (file, boundary) = receiving
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| Status::aborted(error.to_string()))?;
        let snapshot = openraft::storage::Snapshot {
            meta: super::machine::snapshot_meta(&boundary),
            snapshot: file,
        };
        let response = replica
            .raft
            .install_full_snapshot(vote, snapshot)
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(peer::InstallSnapshotResponse { vote: Some(vote_out(&response.vote)) }))
    }

    type ExchangeStream = ReceiverStream<Result<peer::ExchangeResponse, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<peer::ExchangeRequest>>,
    ) -> Reply<Self::ExchangeStream> {
        let mut questions = request.into_inner();
        let first = questions
            .message()
            .await?
            .ok_or_else(|| Status::invalid_argument("an exchange without a header"))?;
        let replica = self.meant(first.header.as_ref(), Sender::Anybody)?;
        let mut sender = StreamSender::new(replica.clone(), first.header);
        let (answers, outbound) = mpsc::channel(ANSWERS_UNDER_WAY_MAX);
        tokio::spawn(async move {
            while let Ok(Some(question)) = questions.message().await {
                if sender.check(Sender::Anybody).is_err() {
                    return;
                }
                let Ok(permit) = answers.clone().reserve_owned().await else { return };
                let correlation_id = question.correlation_id;
                let Some(question) = question.request else { continue };
                answer(&replica, question, move |response| {
                    let response = Some(response);
                    permit.send(Ok(peer::ExchangeResponse { correlation_id, response }));
                });
            }
        });
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

fn answer(replica: &Arc<Replica>, question: Question, done: impl FnOnce(Answer) + Send + 'static) {
    match question {
        Question::Confirm(confirm) => {
            done(Answer::Confirmed(replica.barriers.confirm(confirm.term)));
        }
        Question::Barrier(_) => {
            let deadline = replica.clock.monotonic() + BARRIER_TIMEOUT;
            let barriers = replica.barriers.clone();
            replica.barriers.wait_as_leader(
                deadline,
                Box::new(move |passed| {
                    barriers.flush_commits();
                    done(match passed {
                        Ok(index) => Answer::Barrier(index),
                        Err(_) => Answer::NotLeader(peer::NotLeader {}),
                    });
                }),
            );
        }
        Question::Commands(commands) => {
            let level = commands.feature_level;
            let proposals = commands
                .commands
                .into_iter()
                .map(|command| Proposal { command: command.command, resend: command.resend })
                .collect();
            let replica = replica.clone();
            tokio::spawn(async move { done(replica.proposals.lead_for(proposals, level).await) });
        }
    }
}
