//! The way to other nodes: connections, and openraft's network on them.
//!
//! Each peer has four connections, so that a snapshot or a full pipe of appends never delays a
//! vote or a heartbeat. Appends of one replication session are one bidirectional stream, as deep
//! as the follower's flow control allows, answered in order.

use std::collections::HashMap;
use std::future::Future;
use std::io::Read as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use openraft::OptionalSend;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{
    Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2, stream_append_sequential,
};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, VoteRequest,
    VoteResponse,
};
use openraft::type_config::alias::SnapshotOf;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use super::clock::ClusterClock;
use super::convert::{append_result_in, entry_out, log_id_in, log_id_out, vote_in, vote_out};
use super::freshness::Freshness;
use super::level::Levels;
use super::types::{LogId, Member, TypeConfig, Vote, term_of};
use crate::limits::ENTRY_BYTES_MAX;
use crate::proto::peer;
use crate::proto::peer::peer_service_client::PeerServiceClient;
use crate::state::FEATURE_LEVEL;
use crate::storage::snapshot::SnapshotFile;
use crate::storage::wal::Wal;

/// Largest message between nodes: an append of entries, with room for its frame.
pub(crate) const PEER_MESSAGE_BYTES_MAX: usize = 4 * ENTRY_BYTES_MAX;
/// Pause before another attempt to reach a peer that could not be reached.
const UNREACHABLE_PAUSE: Duration = Duration::from_millis(100);
/// How long a commit that no entry follows is held back for one that might: see `hold_commits`.
const COMMIT_HOLD: Duration = Duration::from_millis(1);
const SNAPSHOT_CHUNK_BYTES: usize = 256 * 1024;

/// Who a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) cluster_id: u128,
    pub(crate) node_id: u64,
    pub(crate) incarnation: u64,
}

/// Connections to all peers, made on first use.
pub(crate) struct Peers {
    pub(crate) identity: Identity,
    pub(crate) clock: Arc<ClusterClock>,
    levels: Arc<Levels>,
    freshness: Arc<Freshness>,
    /// Ends the holding back of commits.
    pub(crate) flush_commits: Arc<Notify>,
    pub(crate) announced: Arc<Announced>,
    /// Where in the log this node's membership stands.
    pub(crate) membership: Arc<Mutex<Option<LogId>>>,
    election_timeout: Duration,
    wal: Wal,
    links: Mutex<HashMap<(u64, String), Arc<PeerLink>>>,
}

/// How far this node, leading, has told other nodes that the log is committed.
///
/// Whoever is told applies it and may show it, perhaps before this node has applied as much. What
/// is committed stays committed, so the highest index ever told is right in any term.
#[derive(Default)]
pub(crate) struct Announced(AtomicU64);

impl Announced {
    /// To be called before the message leaves.
    fn note(&self, committed: Option<&LogId>) {
        if let Some(committed) = committed {
            self.0.fetch_max(committed.index + 1, Ordering::SeqCst);
        }
    }

    /// One more than the highest index told.
    pub(crate) fn next_index(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// The connections to one peer.
pub(crate) struct PeerLink {
    control: Channel,
    append: Channel,
    bulk: Channel,
    exchange: Channel,
}

/// When a connection to a peer is given up.
///
/// A connection that is in use and has been silent for a quarter of the election timeout is asked
/// for a sign of life, and is replaced if it gives none for a whole one. So a cut is noticed about
/// when an election would begin, and the first attempt after it succeeds at once, where TCP by
/// itself would wait for its next retransmission; and a peer that was stopped for less than an
/// election timeout keeps its connections.
struct Pace {
    /// A new connection that takes longer has failed.
    connect_timeout: Duration,
    ask_after: Duration,
    give_up_after: Duration,
}

impl Pace {
    fn of(election_timeout: Duration) -> Self {
        Self {
            connect_timeout: election_timeout / 2,
            ask_after: election_timeout / 4,
            give_up_after: election_timeout,
        }
    }
}

/// A lazy connection to a peer's address.
///
/// # Errors
///
/// If the address is not of the form host:port.
pub(crate) fn connect(
    address: &str,
    election_timeout: Duration,
) -> Result<Channel, tonic::transport::Error> {
    let pace = Pace::of(election_timeout);
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(pace.connect_timeout)
        .tcp_nodelay(true)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .http2_keep_alive_interval(pace.ask_after)
        .keep_alive_timeout(pace.give_up_after)
        .connect_lazy())
}

pub(crate) fn client(channel: Channel) -> PeerServiceClient<Channel> {
    PeerServiceClient::new(channel)
        .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX)
}

impl Peers {
    pub(crate) fn new(
        identity: Identity,
        clock: Arc<ClusterClock>,
        levels: Arc<Levels>,
        freshness: Arc<Freshness>,
        election_timeout: Duration,
        wal: Wal,
    ) -> Arc<Self> {
        Arc::new(Self {
            identity,
            clock,
            levels,
            freshness,
            election_timeout,
            wal,
            membership: Arc::default(),
            flush_commits: Arc::new(Notify::new()),
            announced: Arc::default(),
            links: Mutex::new(HashMap::new()),
        })
    }

    fn link(&self, node: u64, member: &Member) -> Result<Arc<PeerLink>, tonic::transport::Error> {
        let key = (node, member.peer_address.clone());
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get(&key) {
            return Ok(link.clone());
        }
        let connect = || connect(&member.peer_address, self.election_timeout);
        let link = Arc::new(PeerLink {
            control: connect()?,
            append: connect()?,
            bulk: connect()?,
            exchange: connect()?,
        });
        links.insert(key, link.clone());
        Ok(link)
    }

    /// A client for small questions.
    pub(crate) fn exchange_client(
        &self,
        node: u64,
        member: &Member,
    ) -> Result<PeerServiceClient<Channel>, tonic::transport::Error> {
        Ok(client(self.link(node, member)?.exchange.clone()))
    }

    /// An append as it leaves.
    fn append_out(
        &self,
        header: Option<peer::Header>,
        rpc: AppendEntriesRequest<TypeConfig>,
    ) -> peer::AppendRequest {
        self.announced.note(rpc.leader_commit.as_ref());
        peer::AppendRequest {
            header,
            vote: Some(vote_out(&rpc.vote)),
            prev_log_id: rpc.prev_log_id.as_ref().map(log_id_out),
            leader_commit: rpc.leader_commit.as_ref().map(log_id_out),
            entries: rpc.entries.into_iter().map(entry_out).collect(),
            clock: Some(self.clock.announce()),
        }
    }

    /// A heartbeat as it leaves.
    fn heartbeat_out(
        &self,
        header: peer::Header,
        rpc: &AppendEntriesRequest<TypeConfig>,
        quorum_silence: Option<u64>,
    ) -> peer::HeartbeatRequest {
        self.announced.note(rpc.leader_commit.as_ref());
        peer::HeartbeatRequest {
            quorum_silence,
            header: Some(header),
            vote: Some(vote_out(&rpc.vote)),
            prev_log_id: rpc.prev_log_id.as_ref().map(log_id_out),
            leader_commit: rpc.leader_commit.as_ref().map(log_id_out),
        }
    }

    /// What opens a message or a stream to a peer.
    pub(crate) fn header(&self, to_node: u64, to_incarnation: u64) -> peer::Header {
        let membership = *self.membership.lock().unwrap_or_else(PoisonError::into_inner);
        peer::Header {
            membership: membership.as_ref().map(log_id_out),
            cluster_id_high: (self.identity.cluster_id >> 64) as u64,
            cluster_id_low: self.identity.cluster_id as u64,
            from_node: self.identity.node_id,
            from_incarnation: self.identity.incarnation,
            to_node,
            to_incarnation,
            clock: Some(self.clock.announce()),
            feature_level: Some(FEATURE_LEVEL),
        }
    }
}

/// Makes openraft's connections.
pub(crate) struct NetworkFactory {
    pub(crate) peers: Arc<Peers>,
}

impl NetworkFactory {
    fn network(&self, target: u64, member: &Member, pipelined: bool) -> Network {
        Network {
            peers: self.peers.clone(),
            link: self.peers.link(target, member).map_err(|error| error.to_string()),
            target,
            incarnation: member.incarnation,
            pipelined,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for NetworkFactory {
    type Network = Network;

    async fn new_client(&mut self, target: u64, member: &Member) -> Network {
        self.network(target, member, true)
    }

    async fn new_heartbeat_client(&mut self, target: u64, member: &Member) -> Network {
        self.network(target, member, false)
    }
}

/// One of openraft's connections to one peer.
pub(crate) struct Network {
    peers: Arc<Peers>,
    link: Result<Arc<PeerLink>, String>,
    target: u64,
    incarnation: u64,
    /// Whether appends use a stream. Heartbeats and read barriers are single calls, on the
    /// control connection.
    pipelined: bool,
}

type RpcResult<T> = Result<T, RPCError<TypeConfig>>;

fn failed(status: &tonic::Status) -> RPCError<TypeConfig> {
    if status.code() == tonic::Code::Unavailable {
        RPCError::Unreachable(Unreachable::from_string(status.message()))
    } else {
        RPCError::Network(NetworkError::from_string(format!(
            "{:?}: {}",
            status.code(),
            status.message()
        )))
    }
}

fn malformed(error: super::convert::Malformed) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string(error))
}

impl Network {
    fn link(&self) -> RpcResult<&PeerLink> {
        match &self.link {
            Ok(link) => Ok(link),
            Err(error) => Err(RPCError::Unreachable(Unreachable::from_string(error))),
        }
    }

    fn header(&self) -> peer::Header {
        self.peers.header(self.target, self.incarnation)
    }

    async fn ask_vote(
        &self,
        rpc: VoteRequest<TypeConfig>,
        pre_vote: bool,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let mut request = tonic::Request::new(peer::VoteRequest {
            header: Some(self.header()),
            vote: Some(vote_out(&rpc.vote)),
            last_log_id: rpc.last_log_id.as_ref().map(log_id_out),
            pre_vote,
            leadership_transfer: rpc.leadership_transfer,
        });
        request.set_timeout(option.hard_ttl());
        let mut client = client(self.link()?.control.clone());
        let response = client.vote(request).await.map_err(|status| failed(&status))?.into_inner();
        self.peers.clock.observe(self.target, response.clock.as_ref());
        Ok(VoteResponse {
            vote: vote_in(response.vote).map_err(malformed)?,
            vote_granted: response.granted,
            last_log_id: response.last_log_id.map(log_id_in),
        })
    }

    /// What a leader says of its majority, in milliseconds, where its commit proves something: it
    /// is of its own term. The leader takes itself at its word. The commit may be that of a
    /// heartbeat interval before, if this heartbeat has waited for the one before it.
    fn quorum_silence(
        &self,
        rpc: &AppendEntriesRequest<TypeConfig>,
        heartbeat_interval: Duration,
    ) -> Option<u64> {
        let silence = self.peers.freshness.quorum_silence()? + heartbeat_interval;
        let commit =
            rpc.leader_commit.filter(|commit| term_of(commit) == rpc.vote.leader_id.term)?;
        self.peers.freshness.hear(self.peers.clock.monotonic(), commit.index + 1, silence);
        u64::try_from(silence.as_millis()).ok()
    }

    async fn heartbeat(
        &self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
        let quorum_silence = self.quorum_silence(&rpc, option.hard_ttl());
        let heartbeat = self.peers.heartbeat_out(self.header(), &rpc, quorum_silence);
        let mut request = tonic::Request::new(heartbeat);
        request.set_timeout(option.hard_ttl());
        let mut client = client(self.link()?.control.clone());
        let response =
            client.heartbeat(request).await.map_err(|status| failed(&status))?.into_inner();
        self.peers.clock.observe(self.target, response.clock.as_ref());
        self.peers.levels.hear(self.target, self.incarnation, response.feature_level);
        Ok(match append_result_in(response.result).map_err(malformed)? {
            Ok(_) => AppendEntriesResponse::Success,
            Err(openraft::raft::StreamAppendError::Conflict(_)) => AppendEntriesResponse::Conflict,
            Err(openraft::raft::StreamAppendError::HigherVote(vote)) => {
                AppendEntriesResponse::HigherVote(vote)
            }
        })
    }

    async fn open_append_stream<'s, S>(
        &'s self,
        input: S,
    ) -> RpcResult<BoxStream<'s, RpcResult<StreamAppendResult<TypeConfig>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        // openraft pauses between sessions that fail where it hands out the first request, so that
        // one is taken before anything that can fail.
        let mut input = input;
        let Some(first) = input.next().await else { return Ok(Box::pin(stream::empty())) };
        let peers = self.peers.clone();
        let mut header = Some(self.header());
        let flush = self.peers.flush_commits.clone();
        let wal = self.peers.wal.clone();
        let purged = Arc::new(AtomicBool::new(false));
        let held = stream::once(async move { first }).chain(hold_commits(input, flush));
        let sendable = until_purged(held, move || wal.first_index(), purged.clone());
        let requests = sendable.map(move |rpc| peers.append_out(header.take(), rpc));
        let mut client = client(self.link()?.append.clone());
        let responses =
            client.append(requests).await.map_err(|status| failed(&status))?.into_inner();
        let answers = responses.map(|response| match response {
            Ok(response) => append_result_in(response.result).map_err(malformed),
            Err(status) => Err(failed(&status)),
        });
        let end = stream::iter(std::iter::from_fn(move || {
            purged.swap(false, Ordering::Relaxed).then(|| {
                let reason = "the next entry was purged; a snapshot has to take its place";
                Err(RPCError::Network(NetworkError::from_string(reason)))
            })
        }));
        Ok(Box::pin(answers.chain(end)))
    }
}

/// Ends a replication session that cannot go on because the entry that it needs next was purged
/// (see `LogStore::limited_get_log_entries`), and says so in `purged`.
fn until_purged<S>(
    requests: S,
    first_index: impl Fn() -> u64 + Send + 'static,
    purged: Arc<AtomicBool>,
) -> impl Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + 'static
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + 'static,
{
    requests.take_while(move |rpc| {
        let next_index = rpc.prev_log_id.map_or(0, |log_id| log_id.index + 1);
        let is_stuck = rpc.entries.is_empty() && next_index < first_index();
        if is_stuck {
            purged.store(true, Ordering::Relaxed);
        }
        std::future::ready(!is_stuck)
    })
}

/// Spares the commit-only append that openraft sends after every commit.
///
/// A request without entries is held for up to `COMMIT_HOLD`; if another request follows, which
/// carries the same commit or a later one, it goes instead. Nothing is ever acknowledged that the
/// follower has not acknowledged: the answer to the later request covers the earlier one. The
/// price is that a follower may apply that much later, so the hold ends at once when a follower
/// has been told to wait for a commit.
///
/// The alarm outlives the hold that set it, and the next one moves it only when it has rung: to set
/// a timer costs a system call, and most holds end long before.
fn hold_commits<S>(
    input: S,
    flush: Arc<Notify>,
) -> impl Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + 'static
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
{
    // Fused, because a stream that ends while a request is held is asked once more.
    let alarm = Box::pin(tokio::time::sleep(Duration::ZERO));
    stream::unfold((input.fuse(), flush, alarm), |(mut input, flush, mut alarm)| async move {
        let mut request = input.next().await?;
        let until = Instant::now() + COMMIT_HOLD;
        while request.entries.is_empty() {
            tokio::select! {
                biased;
                following = input.next() => match following {
                    Some(following) => request = following,
                    None => break,
                },
                () = flush.notified() => break,
                () = alarm.as_mut() => {
                    if Instant::now() >= until {
                        break;
                    }
                    alarm.as_mut().reset(until);
                }
            }
        }
        Some((request, (input, flush, alarm)))
    })
}

impl RaftNetworkV2<TypeConfig> for Network {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
        if !rpc.entries.is_empty() {
            // They would be lost, and acknowledged.
            return Err(RPCError::Network(NetworkError::from_string(
                "a heartbeat carries no entries; they go by stream",
            )));
        }
        self.heartbeat(rpc, option).await
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, RpcResult<BoxStream<'s, RpcResult<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        if self.pipelined {
            Box::pin(self.open_append_stream(input))
        } else {
            stream_append_sequential(self, input, option)
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        self.ask_vote(rpc, false, option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        self.ask_vote(rpc, true, option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<TypeConfig, SnapshotFile>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let chunks = snapshot_chunks(self.header(), &vote, &snapshot.snapshot)
            .map_err(|error| StreamingError::from(NetworkError::from_string(error)))?;
        let link = self.link().map_err(StreamingError::from)?;
        let mut client = client(link.bulk.clone());
        let sending = client.install_snapshot(chunks);
        tokio::select! {
            response = sending => {
                let response = response
                    .map_err(|status| StreamingError::from(failed(&status)))?
                    .into_inner();
                let vote = vote_in(response.vote)
                    .map_err(|error| StreamingError::from(malformed(error)))?;
                Ok(SnapshotResponse::new(vote))
            }
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(UNREACHABLE_PAUSE)))
    }
}

/// Reads a snapshot file ahead of the network, a few chunks at a time, on a blocking thread.
fn snapshot_chunks(
    header: peer::Header,
    vote: &Vote,
    file: &SnapshotFile,
) -> std::io::Result<ReceiverStream<peer::InstallSnapshotRequest>> {
    let mut source = std::fs::File::open(&file.path)?;
    let (chunks, stream) = tokio::sync::mpsc::channel(4);
    let first = peer::InstallSnapshotRequest {
        header: Some(header),
        vote: Some(vote_out(vote)),
        data: Bytes::new(),
    };
    tokio::task::spawn_blocking(move || {
        if chunks.blocking_send(first).is_err() {
            return;
        }
        loop {
            let mut data = vec![0; SNAPSHOT_CHUNK_BYTES];
            match source.read(&mut data) {
                // A read that fails ends the stream early; the receiver's checksum notices.
                Ok(0) | Err(_) => return,
                Ok(length) => data.truncate(length),
            }
            let chunk = peer::InstallSnapshotRequest { data: data.into(), ..Default::default() };
            if chunks.blocking_send(chunk).is_err() {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(stream))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::types::{Entry, EntryPayload, log_id};

    fn request(prev: u64, entries: u64) -> AppendEntriesRequest<TypeConfig> {
        let entry = |index| Entry { log_id: log_id(1, index), payload: EntryPayload::Blank };
        AppendEntriesRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: Some(log_id(1, prev)),
            leader_commit: None,
            entries: (prev + 1..=prev + entries).map(entry).collect(),
        }
    }

    #[test]
    fn a_cut_is_noticed_and_a_nap_forgiven() {
        let election_timeout = Duration::from_millis(500);
        let pace = Pace::of(election_timeout);
        assert!(pace.give_up_after > Duration::from_millis(400), "a peer may be stopped so long");
        let noticed = pace.ask_after + pace.give_up_after;
        assert!(noticed <= election_timeout * 3 / 2, "the longest that an election is waited for");
        assert!(pace.connect_timeout < election_timeout);
    }

    #[test]
    fn whoever_tells_others_of_a_commit_knows_of_it() {
        use crate::clock::SystemClock;
        use crate::raft::clock::Found;
        use crate::storage::file::RealFiles;
        use crate::storage::wal::WalOptions;

        let directory = tempfile::tempdir().unwrap();
        let wal = Wal::open(Arc::new(RealFiles), directory.path(), WalOptions::default());
        let clock = Arc::new(ClusterClock::new(1, Arc::new(SystemClock), Found::default(), None));
        let identity = Identity { cluster_id: 1, node_id: 1, incarnation: 1 };
        let (levels, freshness) = (Levels::new(FEATURE_LEVEL), Arc::default());
        let (wal, election_timeout) = (wal.unwrap().0, Duration::from_millis(500));
        let peers = Peers::new(identity, clock, levels, freshness, election_timeout, wal);
        assert_eq!(peers.announced.next_index(), 0);
        let committed =
            |index| AppendEntriesRequest { leader_commit: Some(log_id(1, index)), ..request(9, 0) };
        peers.append_out(None, committed(7));
        assert_eq!(peers.announced.next_index(), 8);
        peers.heartbeat_out(peer::Header::default(), &committed(9), None);
        assert_eq!(peers.announced.next_index(), 10);
        peers.append_out(None, committed(8));
        assert_eq!(peers.announced.next_index(), 10);
    }

    #[tokio::test]
    async fn a_session_whose_next_entry_was_purged_ends() {
        for (last, is_stuck) in [(request(5, 0), true), (request(9, 0), false)] {
            let requests = stream::iter([request(3, 2), last]);
            let purged = Arc::new(AtomicBool::new(false));
            // Entries 1 to 9 were purged after the first request was read.
            let sent = until_purged(requests, || 10, purged.clone());
            assert_eq!(sent.count().await, if is_stuck { 1 } else { 2 });
            assert_eq!(purged.load(Ordering::Relaxed), is_stuck);
        }
    }
}
