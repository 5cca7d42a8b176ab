//! What a node says of itself to an operator.

use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::{Instant as _, ServerState};

use super::leadership::Route;
use super::node::Node;
use crate::state::{FEATURE_LEVEL, Stamp, State};

/// Election timeouts without a word of its majority, after which a leader may have a successor, or
/// without a word of the leader, after which a follower may have none.
const SILENT_ELECTIONS_MAX: u32 = 2;

/// A node's part in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It belongs to no cluster yet.
    Uninitialized,
    /// It leads.
    Leader,
    /// It follows and votes.
    Follower,
    /// It stands for election.
    Candidate,
    /// It follows and does not vote.
    Learner,
}

/// A member, as the node knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Its number.
    pub node_id: u64,
    /// host:port where other nodes reach it.
    pub peer_address: String,
    /// host:port where clients reach it.
    pub client_address: String,
    /// Random number of its data directory's life.
    pub incarnation: u64,
    /// Whether it votes.
    pub voter: bool,
}

/// A snapshot of a node's figures.
#[derive(Clone, Debug)]
pub struct NodeStatus {
    /// `None` while it belongs to no cluster.
    pub cluster_id: Option<u128>,
    /// Its number.
    pub node_id: u64,
    /// Its part.
    pub role: Role,
    /// Raft's term.
    pub term: u64,
    /// Who leads, if it knows.
    pub leader_id: Option<u64>,
    /// Log indexes.
    pub last_log_index: u64,
    /// As far as this node knows.
    pub committed_index: u64,
    /// The state reflects the log up to here.
    pub applied_index: u64,
    /// The newest snapshot ends here.
    pub snapshot_index: u64,
    /// The log begins behind here.
    pub purged_index: u64,
    /// Revision of the state.
    pub revision: u64,
    /// Digest of the state at that revision, in hex.
    pub state_digest: String,
    /// Live sessions and those not swept yet.
    pub sessions: u64,
    /// The node's estimate; `None` while it has not heard of it.
    pub cluster_time: Option<Stamp>,
    /// Entries behind the newest checkpoint.
    pub checkpoint_lag_entries: u64,
    /// Bytes of log behind the newest checkpoint.
    pub checkpoint_lag_bytes: u64,
    /// Time since the newest checkpoint; `None` before the first.
    pub checkpoint_age: Option<Duration>,
    /// Of recent syncs of the log.
    pub fsync_p99: Duration,
    /// Who else is there.
    pub members: Vec<MemberStatus>,
    /// The feature level in force, as far as this node has applied the log; 0 while it belongs to
    /// no cluster.
    pub feature_level: u32,
    /// What its build knows.
    pub supported_feature_level: u32,
    /// On the leader, why the level in force is not raised to what its build knows.
    pub feature_level_obstacle: Option<String>,
    /// Why it takes no part, if it does not.
    pub halted_reason: Option<String>,
    /// What an operator should look into; each a sentence.
    pub warnings: Vec<String>,
}

impl Node {
    /// The members that the node knows of.
    pub fn members(&self) -> Vec<MemberStatus> {
        let Some(replica) = self.replica() else { return Vec::new() };
        let metrics = replica.raft.server_metrics();
        let voters: Vec<u64> =
            metrics.borrow_watched().membership_config.membership().voter_ids().collect();
        replica
            .members()
            .into_iter()
            .map(|(node_id, member)| MemberStatus {
                node_id,
                peer_address: member.peer_address,
                client_address: member.client_address,
                incarnation: member.incarnation,
                voter: voters.contains(&node_id),
            })
            .collect()
    }

    /// Its own number.
    pub fn node_id(&self) -> u64 {
        self.options.node_id
    }

    /// The cluster it belongs to.
    pub fn cluster_id(&self) -> Option<u128> {
        self.founding().map(|founding| founding.cluster_id)
    }

    /// Who leads, as far as it knows. It does not know once nobody has spoken as that leader for
    /// longer than an election takes: a node that cannot win one votes for nobody, and would name
    /// a leader that is long gone.
    pub fn leader_id(&self) -> Option<u64> {
        let replica = self.replica()?;
        let leader = replica.raft.server_metrics().borrow_watched().current_leader?;
        let silence = replica.clock.silence_of(leader);
        let known = leader == self.node_id() || silence.is_some_and(|it| it <= self.silence_max());
        known.then_some(leader)
    }

    fn silence_max(&self) -> Duration {
        self.options.timeouts.election_timeout * SILENT_ELECTIONS_MAX
    }

    /// Whether it can serve: it belongs to a cluster, knows a leader that a majority follows as far
    /// as it can tell, and has applied everything that was committed when it last heard of a
    /// commit.
    pub fn is_ready(&self) -> bool {
        let Some(replica) = self.replica() else { return false };
        if self.halt.reason().is_some() || self.leader_id().is_none() {
            return false;
        }
        if self.leader_id() == Some(self.node_id()) && !self.has_majority() {
            return false;
        }
        let metrics = replica.raft.data_metrics();
        let metrics = metrics.borrow_watched();
        let index = |log_id: &Option<super::types::LogId>| log_id.map_or(0, |id| id.index + 1);
        index(&metrics.last_applied) > 0
            && index(&metrics.last_applied) >= index(&metrics.local_committed)
    }

    /// Whether a majority follows this node, if it leads. Nobody deposes a leader that lost it: it
    /// has to notice by itself.
    pub(super) fn has_majority(&self) -> bool {
        let Some(replica) = self.replica() else { return false };
        let metrics = replica.raft.data_metrics();
        let metrics = metrics.borrow_watched();
        let voters = self.members().into_iter().filter(|member| member.voter).count();
        let heard = metrics.last_quorum_acked.as_deref();
        voters <= 1 || heard.is_some_and(|acked| acked.elapsed() <= self.silence_max())
    }

    /// Its figures.
    pub fn status(&self) -> NodeStatus {
        let mut status = NodeStatus {
            cluster_id: self.cluster_id(),
            node_id: self.options.node_id,
            role: Role::Uninitialized,
            term: 0,
            leader_id: None,
            last_log_index: 0,
            committed_index: 0,
            applied_index: 0,
            snapshot_index: 0,
            purged_index: 0,
            revision: 0,
            state_digest: String::new(),
            sessions: 0,
            cluster_time: None,
            checkpoint_lag_entries: 0,
            checkpoint_lag_bytes: 0,
            checkpoint_age: None,
            fsync_p99: Duration::ZERO,
            members: self.members(),
            feature_level: 0,
            supported_feature_level: FEATURE_LEVEL,
            feature_level_obstacle: None,
            halted_reason: self.halt.reason(),
            warnings: Vec::new(),
        };
        let Some(replica) = self.replica() else { return status };
        let metrics = replica.raft.metrics();
        let metrics = metrics.borrow_watched().clone();
        let index = |log_id: Option<super::types::LogId>| log_id.map_or(0, |id| id.index);
        status.role = match metrics.state {
            ServerState::Leader => Role::Leader,
            ServerState::Candidate => Role::Candidate,
            ServerState::Learner => Role::Learner,
            _ => Role::Follower,
        };
        status.term = metrics.current_term;
        status.leader_id = self.leader_id();
        status.last_log_index = metrics.last_log_index.unwrap_or(0);
        status.committed_index = index(metrics.local_committed);
        status.snapshot_index = index(metrics.snapshot);
        status.purged_index = index(metrics.purged);
        status.applied_index = index(replica.core.last_applied());
        (status.revision, status.state_digest, status.sessions) =
            replica.core.read(|state: &State| {
                (state.revision().0, state.digest().to_string(), state.sessions())
            });
        let levels = replica.core.levels();
        status.feature_level = levels.in_force();
        let view = replica.leadership.view();
        if view.route == Route::Local {
            let obstacle = levels.next(&view.peers).err();
            status.feature_level_obstacle = obstacle.map(|obstacle| obstacle.to_string());
        }
        status.cluster_time = replica.clock.is_synced().then(|| replica.clock.now());
        let checkpoint = replica.checkpointer.status();
        let checkpointed = checkpoint.index.unwrap_or(0);
        status.checkpoint_lag_entries = status.applied_index.saturating_sub(checkpointed);
        status.checkpoint_lag_bytes = replica.wal.bytes_after(checkpointed);
        status.checkpoint_age =
            checkpoint.finished_at.map(|at| self.monotonic().saturating_sub(at));
        status.warnings = replica.clock.warnings(&replica.voters());
        status.fsync_p99 = replica.wal.statistics().sync_p99;
        status
    }
}
