//! A node: from an empty directory, through the formation of a cluster, to its end.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;

use super::barrier::BarrierError;
use super::checkpointer::CheckpointPolicy;
use super::following::{ClaimEnd, ClaimName};
use super::formation::{self, FormationError, Founding};
use super::halt::Halt;
use super::lanes::Lane;
use super::network::{self, PEER_MESSAGE_BYTES_MAX};
use super::peer::PeerServer;
use super::proposals::ProposeError;
use super::recovery::{RecoveryError, StoragePaths};
use super::replica::{RaftTimeouts, Replica, ReplicaParts, SetTimeError};
use super::supervisor::Supervisor;
use super::troubles;
use crate::accept::{AcceptPolicy, accept};
use crate::clock::Clock;
use crate::limits::PEER_CONNECTIONS_MAX;
use crate::proto::peer;
use crate::proto::peer::peer_service_server::PeerServiceServer;
use crate::state::{Command, Outcome, Rejection, Reply, Stamp, State, Timestamp, encode_command};
use crate::storage::directory::{DataDirectory, DirectoryError, Identity};

/// How far beyond the leader's wall clock the cluster's time may be set: time never goes back, so
/// a typing error would be there for ever.
const SET_TIME_AHEAD_MAX: Duration = Duration::from_secs(60);
/// A connection to the port for peers that has been silent for so long makes room for another, once
/// there are as many as may be.
const PEER_SILENCE_MAX: Duration = Duration::from_secs(1);

/// Everything that a node needs; nothing is global.
pub struct NodeOptions {
    /// Its number in the cluster, from 1.
    pub node_id: u64,
    /// Where it keeps everything.
    pub data_directory: PathBuf,
    /// Where other nodes reach it: host:port.
    pub peer_address: String,
    /// Where clients reach it: host:port.
    pub client_address: String,
    /// The nodes that form a cluster by themselves, by their peer addresses; empty to wait for
    /// `cluster init`.
    pub initial_cluster: BTreeMap<u64, String>,
    /// Raft's pace.
    pub timeouts: RaftTimeouts,
    /// When checkpoints are due.
    pub checkpoints: CheckpointPolicy,
    /// Time.
    pub clock: Arc<dyn Clock>,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The data directory cannot be used; the message names the remedy.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The data directory belongs to another node.
    #[error(
        "data directory {} belongs to node {found}, and this is node {expected}: correct \
         --node-id or --data-dir",
        path.display()
    )]
    OtherNode {
        /// Which directory.
        path: PathBuf,
        /// Whose it is.
        found: u64,
        /// Who wants it.
        expected: u64,
    },
    /// What is on disk cannot be used; the message names file and remedy.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// Randomness or a socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Why a write was not answered by the state machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The node belongs to no cluster yet. Nothing was changed.
    #[error("this node belongs to no cluster yet")]
    NotInitialized,
    /// Too much is under way. Nothing was changed.
    #[error("the node has as many commands under way as it can hold")]
    Overloaded,
    /// Nobody leads. Nothing was changed.
    #[error("no leader was found in time; nothing was changed")]
    NoLeader,
    /// No majority answered in time.
    #[error("no majority answered in time; whether the command was applied is not known")]
    OutcomeUnknown,
    /// The node has stopped itself, for this reason. Nothing was changed.
    #[error("this node has halted: {0}")]
    Halted(String),
}

impl WriteError {
    /// A node that halts knows no more than another of what became of a command that it has
    /// proposed: the others may have it, and may commit it.
    fn of(error: ProposeError, halted: Option<String>) -> Self {
        match (error, halted) {
            (ProposeError::OutcomeUnknown, _) => Self::OutcomeUnknown,
            (ProposeError::Overloaded | ProposeError::NoLeader, Some(reason)) => {
                Self::Halted(reason)
            }
            (ProposeError::Overloaded, None) => Self::Overloaded,
            (ProposeError::NoLeader, None) => Self::NoLeader,
        }
    }
}

/// What an Acquire came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquired {
    /// It was granted, at once or after a wait, or the wait came to another end.
    Waited(ClaimEnd),
    /// It was refused; and if its claim came to an end while it was under way, how.
    Refused(Rejection, Option<ClaimEnd>),
}

/// Why a read was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The node belongs to no cluster yet.
    #[error("this node belongs to no cluster yet")]
    NotInitialized,
    /// Too much is under way.
    #[error("the node has as many reads waiting as it can hold")]
    Overloaded,
    /// No majority confirmed a leader, or the node has not applied enough.
    #[error("no majority confirmed a leader in time")]
    NoLeader,
    /// What this node has applied can be so old, or of any age, and a local read was to be fresher.
    #[error("what this node has applied is older than was asked for")]
    TooStale(Option<Duration>),
    /// The node has stopped itself, for this reason.
    #[error("this node has halted: {0}")]
    Halted(String),
}

/// One node.
pub struct Node {
    pub(super) options: NodeOptions,
    pub(super) incarnation: u64,
    pub(super) halt: Halt,
    /// `None` once the node has stopped.
    directory: Mutex<Option<DataDirectory>>,
    founding: Mutex<Option<Founding>>,
    replica: OnceLock<Arc<Replica>>,
    starting: tokio::sync::Mutex<()>,
    supervisor: Supervisor,
}

impl Node {
    /// Opens the data directory, serves peers on `peer_listener` and takes part in the cluster, or
    /// in its formation. Returns before there is a leader.
    ///
    /// # Errors
    ///
    /// If the directory is foreign, in use, not writable or corrupt.
    pub async fn start(
        options: NodeOptions,
        peer_listener: TcpListener,
    ) -> Result<Arc<Self>, NodeError> {
        let directory = DataDirectory::open(&options.data_directory, random_u64()?)?;
        let incarnation = directory.identity().incarnation();
        let founding = match directory.identity() {
            Identity::Empty { .. } => None,
            Identity::Member { node_id, .. } if *node_id != options.node_id => {
                return Err(NodeError::OtherNode {
                    path: options.data_directory,
                    found: *node_id,
                    expected: options.node_id,
                });
            }
            Identity::Member { cluster_id, members, .. } => {
                Some(Founding::decode(*cluster_id, members)?)
            }
        };
        let halt = Halt::new();
        let node = Arc::new(Self {
            incarnation,
            supervisor: Supervisor::new(halt.clone()),
            halt,
            directory: Mutex::new(Some(directory)),
            founding: Mutex::new(founding.clone()),
            replica: OnceLock::new(),
            starting: tokio::sync::Mutex::new(()),
            options,
        });
        if founding.is_some() {
            node.become_member().await?;
        }
        node.serve_peers(peer_listener);
        node.supervisor.spawn("troubles", troubles::watch(node.clone()));
        if !node.options.initial_cluster.is_empty() {
            node.supervisor.spawn_finite("formation", formation::run(node.clone()));
        }
        Ok(node)
    }

    fn serve_peers(self: &Arc<Self>, listener: TcpListener) {
        let service = PeerServiceServer::new(PeerServer { node: self.clone() })
            .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX);
        // Nodes that belong here are never silent for long, and get in whoever else holds the port.
        let policy = AcceptPolicy {
            port: "peer",
            most: PEER_CONNECTIONS_MAX,
            replace_silent: Some(PEER_SILENCE_MAX),
        };
        let (connections, _) = accept(listener, policy, |_| ());
        let server = tonic::transport::Server::builder()
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(16 << 20)
            .max_concurrent_streams(4096)
            .http2_max_pending_accept_reset_streams(Some(4096))
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .add_service(service)
            .serve_with_incoming(connections);
        let halt = self.halt.clone();
        self.supervisor.spawn("peer listener", async move {
            if let Err(error) = server.await {
                halt.because(&format!("the peer listener failed: {error}"));
            }
        });
    }

    /// Spawns what serves for as long as this node: if it ends before [`Node::begin_stop`], or
    /// panics, the node halts and names it.
    pub fn supervise(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.supervisor.spawn(name, task);
    }

    /// Halts the node for this reason, unless it has another one.
    pub fn halt(&self, reason: &str) {
        self.halt.because(reason);
    }

    pub(super) fn replica(&self) -> Option<Arc<Replica>> {
        self.replica.get().cloned()
    }

    pub(super) fn founding(&self) -> Option<Founding> {
        self.founding.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes this node a member of the cluster that is being founded, durably. Idempotent; refuses
    /// another cluster.
    pub(super) fn accept(&self, founding: &Founding) -> Result<(), String> {
        let mut current = self.founding.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = &*current {
            if current.cluster_id == founding.cluster_id {
                return Ok(());
            }
            return Err(format!(
                "node {} already belongs to cluster {:032x}",
                self.options.node_id, current.cluster_id
            ));
        }
        self.save(founding).map_err(|error| error.to_string())?;
        tracing::info!(cluster_id = %format_args!("{:032x}", founding.cluster_id), "joined");
        *current = Some(founding.clone());
        Ok(())
    }

    fn save(&self, founding: &Founding) -> Result<(), DirectoryError> {
        let mut directory = self.directory.lock().unwrap_or_else(PoisonError::into_inner);
        let directory = directory.as_mut().ok_or(DirectoryError::Released)?;
        directory.save_identity(Identity::Member {
            cluster_id: founding.cluster_id,
            node_id: self.options.node_id,
            incarnation: self.incarnation,
            members: founding.encode(),
        })
    }

    /// Starts the replica, once the node belongs to a cluster.
    pub(super) async fn become_member(&self) -> Result<Arc<Replica>, RecoveryError> {
        let _starting = self.starting.lock().await;
        if let Some(replica) = self.replica.get() {
            return Ok(replica.clone());
        }
        let mut founding = self
            .founding()
            .ok_or_else(|| RecoveryError::new("this node belongs to no cluster yet"))?;
        let paths = {
            let directory = self.directory.lock().unwrap_or_else(PoisonError::into_inner);
            let directory =
                directory.as_ref().ok_or_else(|| RecoveryError::new(DirectoryError::Released))?;
            StoragePaths {
                wal: directory.wal_path(),
                checkpoint: directory.sled_path(),
                snapshots: directory.snapshots_path(),
                time: directory.time_path(),
            }
        };
        let replica = Replica::start(ReplicaParts {
            identity: network::Identity {
                cluster_id: founding.cluster_id,
                node_id: self.options.node_id,
                incarnation: self.incarnation,
            },
            founders: founding.members.clone(),
            has_log: founding.has_log,
            paths,
            clock: self.options.clock.clone(),
            timeouts: self.options.timeouts,
            checkpoints: self.options.checkpoints.clone(),
            supervisor: self.supervisor.clone(),
        })
        .await?;
        if !founding.has_log {
            founding.has_log = true;
            self.save(&founding).map_err(RecoveryError::new)?;
            *self.founding.lock().unwrap_or_else(PoisonError::into_inner) = Some(founding);
        }
        Ok(self.replica.get_or_init(|| replica).clone())
    }

    pub(super) fn identify(&self) -> peer::IdentifyResponse {
        let founding = self.founding();
        let cluster_id = founding.as_ref().map_or(0, |founding| founding.cluster_id);
        let replica = self.replica();
        let members = match &replica {
            Some(replica) => replica.members(),
            None => founding.map(|founding| founding.members).unwrap_or_default(),
        };
        peer::IdentifyResponse {
            node_id: self.options.node_id,
            incarnation: self.incarnation,
            client_address: self.options.client_address.clone(),
            peer_address: self.options.peer_address.clone(),
            cluster_id_high: (cluster_id >> 64) as u64,
            cluster_id_low: cluster_id as u64,
            initialized: replica.is_some_and(|replica| !replica.is_pristine()),
            members: members.into_iter().map(formation::member_out).collect(),
        }
    }

    /// Answers a founder: becomes a member of its cluster.
    pub(super) fn adopt(self: &Arc<Self>, request: peer::AdoptRequest) -> Result<(), String> {
        if (request.to_node, request.to_incarnation) != (self.options.node_id, self.incarnation) {
            return Err(format!(
                "this is node {} in its life {:016x}",
                self.options.node_id, self.incarnation
            ));
        }
        let founding = Founding {
            cluster_id: u128::from(request.cluster_id_high) << 64
                | u128::from(request.cluster_id_low),
            members: request.members.into_iter().map(formation::member_in).collect(),
            has_log: false,
        };
        if !founding.members.contains_key(&self.options.node_id) {
            return Err(format!("node {} is not among the members", self.options.node_id));
        }
        self.accept(&founding)?;
        let node = self.clone();
        self.supervisor.spawn_finite("joining", async move {
            if let Err(error) = node.become_member().await {
                node.halt.because(&error.to_string());
            }
        });
        Ok(())
    }

    /// Forms a cluster of the listed nodes, of which this is one.
    ///
    /// # Errors
    ///
    /// See [`FormationError`].
    pub async fn initialize(
        self: &Arc<Self>,
        listed: &BTreeMap<u64, String>,
    ) -> Result<u128, FormationError> {
        formation::found(self, listed).await
    }

    /// Proposes a command. `done` is called once, by the deadline (see [`Node::monotonic`]).
    pub fn write(
        &self,
        command: &Command,
        resend: bool,
        deadline: Duration,
        done: impl FnOnce(Result<Reply, WriteError>) + Send + 'static,
    ) {
        let Some(replica) = self.replica.get() else {
            done(Err(self.unavailable()));
            return;
        };
        let lane = Lane::of(command);
        let halt = self.halt.clone();
        let done = move |result: Result<Reply, ProposeError>| {
            done(result.map_err(|error| WriteError::of(error, halt.reason())));
        };
        let command = encode_command(command, replica.core.levels().in_force());
        replica.proposals.propose(command, resend, deadline, lane, Box::new(done));
    }

    /// Proposes an AcquireLock, and waits for the lock where it has to. The command has to be
    /// answered by `propose_by`, and a claim that waits is followed until `wait_until` (see
    /// [`Node::monotonic`]); `done` is called once, by then.
    pub fn acquire(
        self: &Arc<Self>,
        command: &Command,
        resend: bool,
        propose_by: Duration,
        wait_until: Duration,
        done: impl FnOnce(Result<Acquired, WriteError>) + Send + 'static,
    ) {
        let Command::AcquireLock { request, lock, lease, .. } = command else {
            return done(Ok(Acquired::Refused(Rejection::MalformedCommand, None)));
        };
        let Some(replica) = self.replica.get() else {
            return done(Err(self.unavailable()));
        };
        let name = ClaimName { lock: lock.clone(), lease: *lease, request: request.id };
        let core = replica.core.clone();
        let Some(ticket) = core.following().register(name) else {
            return done(Err(WriteError::Overloaded));
        };
        let sweeper = replica.sweeper.clone();
        self.write(command, resend, propose_by, move |result| {
            let Reply { revision, outcome } = match result {
                Ok(reply) => reply,
                Err(error) => {
                    core.following().forget(ticket);
                    return done(Err(error));
                }
            };
            if let Outcome::LockWaiting { .. } = outcome {
                let told = Box::new(move |end| done(Ok(Acquired::Waited(end))));
                let following = core.following();
                let calls =
                    core.read(|state| following.wait(ticket, revision, wait_until, state, told));
                calls.make();
                sweeper.wake();
                return;
            }
            let noted = core.following().forget(ticket);
            done(Ok(match outcome {
                Outcome::LockGranted { token, time, lease_deadline } => {
                    Acquired::Waited(ClaimEnd::Granted { token, time, lease_deadline })
                }
                Outcome::Rejected(rejection) => Acquired::Refused(rejection, noted),
                _ => Acquired::Refused(Rejection::MalformedCommand, None),
            }));
        });
    }

    /// Tells all calls that wait for locks that this node is stopping.
    pub fn stop_waiting(&self) {
        if let Some(replica) = self.replica.get() {
            replica.core.following().close();
        }
    }

    /// Why a node that cannot date a request does not take it.
    pub fn unavailable(&self) -> WriteError {
        match (self.halt.reason(), self.replica.get()) {
            (Some(reason), _) => WriteError::Halted(reason),
            (None, None) => WriteError::NotInitialized,
            (None, Some(_)) => WriteError::NoLeader,
        }
    }

    /// Looks at the state once that is linearizable, and hands what `look` saw to `done`, which is
    /// called once, by the deadline. `look` holds up everything else and should be brief.
    pub fn read<T>(
        &self,
        deadline: Duration,
        look: impl FnOnce(&State) -> T + Send + 'static,
        done: impl FnOnce(Result<T, ReadError>) + Send + 'static,
    ) {
        let Some(replica) = self.replica.get() else {
            done(Err(self.halt.reason().map_or(ReadError::NotInitialized, ReadError::Halted)));
            return;
        };
        let core = replica.core.clone();
        let halt = self.halt.clone();
        replica.barriers.wait(
            deadline,
            Box::new(move |passed| match (halt.reason(), passed) {
                (Some(reason), _) => done(Err(ReadError::Halted(reason))),
                (None, Ok(_)) => done(Ok(core.read(look))),
                (None, Err(BarrierError::Overloaded)) => done(Err(ReadError::Overloaded)),
                (None, Err(_)) => done(Err(ReadError::NoLeader)),
            }),
        );
    }

    /// Looks at the state as this node has it, once it has applied `min_revision`, and unless it
    /// can be older than `max_staleness` then.
    pub fn read_local<T>(
        &self,
        min_revision: u64,
        max_staleness: Option<Duration>,
        deadline: Duration,
        look: impl FnOnce(&State) -> T + Send + 'static,
        done: impl FnOnce(Result<T, ReadError>) + Send + 'static,
    ) {
        let Some(replica) = self.replica.get() else {
            done(Err(ReadError::NotInitialized));
            return;
        };
        let replica = replica.clone();
        let mut applied = replica.core.applied();
        if applied.borrow().revision.0 >= min_revision {
            done(look_locally(&replica, max_staleness, look));
            return;
        }
        let wait = deadline.saturating_sub(self.monotonic());
        tokio::spawn(async move {
            let reached = applied.wait_for(|applied| applied.revision.0 >= min_revision);
            let reached = matches!(tokio::time::timeout(wait, reached).await, Ok(Ok(_)));
            done(if reached {
                look_locally(&replica, max_staleness, look)
            } else {
                Err(ReadError::NoLeader)
            });
        });
    }

    /// The node's estimate of cluster time; `None` while it has not heard of it.
    pub fn cluster_time(&self) -> Option<Stamp> {
        let clock = &self.replica.get()?.clock;
        clock.is_synced().then(|| clock.now())
    }

    /// The node's estimate of the steady clock, by which leases and locks live; a bound from below
    /// while the node has not heard of the time.
    pub fn steady_time(&self) -> Timestamp {
        self.replica.get().map_or(Timestamp(0), |replica| replica.clock.now().steady)
    }

    /// Sets the cluster's time forward to `time`, or to this node's wall clock, as an operator
    /// says: a leap, which sessions feel and leases do not. Returns by how much it leapt; time
    /// that is later already stays as it is.
    ///
    /// # Errors
    ///
    /// If this node does not lead, or if `time` is more than a minute beyond its wall clock.
    pub async fn set_time(&self, time: Option<Timestamp>) -> Result<Duration, SetTimeError> {
        let wall = Timestamp(self.options.clock.wall());
        let time = time.unwrap_or(wall);
        if time.since(wall) > SET_TIME_AHEAD_MAX {
            return Err(SetTimeError::BeyondWallClock);
        }
        let replica = self.replica().ok_or(SetTimeError::NotLeader)?;
        replica.set_time(time).await
    }

    /// Local monotonic time, in which deadlines are given.
    pub fn monotonic(&self) -> Duration {
        self.options.clock.monotonic()
    }

    /// Waits until the node halts, and returns why.
    pub async fn halted(&self) -> String {
        self.halt.halted().await
    }

    /// Says that the node is about to stop, so that what serves may end.
    pub fn begin_stop(&self) {
        self.supervisor.begin_stop();
    }

    /// Names of everything that is supervised.
    #[cfg(test)]
    pub(crate) fn task_names(&self) -> Vec<&'static str> {
        self.supervisor.names()
    }

    /// Ends one of these.
    #[cfg(test)]
    pub(crate) fn kill_task(&self, name: &str) {
        self.supervisor.kill(name);
    }

    /// Ends something of it that is no task of ours.
    #[cfg(test)]
    pub(crate) async fn kill_part(&self, part: &str) {
        let replica = self.replica().unwrap();
        match part {
            "log" => {
                let vote = super::convert::vote_encode(&replica.log.vote().unwrap());
                replica.wal.save_vote(vote, Box::new(|_| panic!("killed by a test")));
            }
            "checkpoints" => replica.checkpointer.kill(),
            _ => replica.raft.shutdown().await.unwrap(),
        }
    }

    /// Drains and stops. Nothing acknowledged depends on it.
    pub async fn stop(&self) {
        // Until they have ended, the peers' port is in use, and peers would be answered by a
        // replica that has stopped.
        self.supervisor.stop().await;
        // A replica that is being started is waited for, or it would outlive this.
        let _starting = self.starting.lock().await;
        let replica = self.replica.get().cloned();
        if let Some(replica) = replica {
            replica.stop().await;
        }
        // Connections of peers may keep this node in memory for a while, but not its directory.
        *self.directory.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Looks at the state unless it can be too old. That is judged first: what is applied in between
/// only makes it fresher.
fn look_locally<T>(
    replica: &Replica,
    max_staleness: Option<Duration>,
    look: impl FnOnce(&State) -> T,
) -> Result<T, ReadError> {
    if let Some(max) = max_staleness {
        let found = replica.staleness();
        if found.is_none_or(|found| found > max) {
            return Err(ReadError::TooStale(found));
        }
    }
    Ok(replica.core.read(look))
}

fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(u64::from_le_bytes(bytes))
}

/// A random cluster id.
pub(super) fn random_cluster_id() -> io::Result<u128> {
    Ok(u128::from(random_u64()?) << 64 | u128::from(random_u64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_proposed_is_unknown_on_a_node_that_halts_too() {
        let halted = || Some("the log failed".to_owned());
        let is_halted = |error| matches!(WriteError::of(error, halted()), WriteError::Halted(_));
        assert!(!is_halted(ProposeError::OutcomeUnknown));
        assert!(is_halted(ProposeError::NoLeader));
        assert!(is_halted(ProposeError::Overloaded));
        let unknown = WriteError::of(ProposeError::OutcomeUnknown, halted());
        assert_eq!(unknown, WriteError::OutcomeUnknown);
    }
}
