//! One Raft group on one node: its log, its state, and everything that works for them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::{Config, Instant as _, SnapshotPolicy};

use super::barrier::{BarrierParts, Barriers};
use super::checkpointer::{CheckpointPolicy, Checkpointer, CheckpointerParts};
use super::clock::{ClusterClock, Found};
use super::convert::{Boundary, log_id_in, record_in};
use super::exchange::Exchanges;
use super::freshness::Freshness;
use super::halt::Halt;
use super::leadership::{Leadership, Route};
use super::level;
use super::log::{Durable, LogStore};
use super::machine::{Core, StateMachine};
use super::network::{Identity, NetworkFactory, Peers};
use super::proposals::Proposals;
use super::recovery::{Recovery, RecoveryError, StoragePaths, recover};
use super::supervisor::Supervisor;
use super::sweeper::Sweeper;
use super::ticker;
use super::timekeeper;
use super::types::{EntryPayload, LogId, Member, Raft, term_of};
use crate::clock::Clock;
use crate::proto::peer;
use crate::state::{self, Stamp, State, Timestamp};
use crate::storage::wal::Wal;

/// How late it may be noticed that openraft has given up.
const FATAL_LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Raft's pace.
#[derive(Clone, Copy, Debug)]
pub struct RaftTimeouts {
    /// How often a leader makes itself heard; also the time that a vote or heartbeat may take.
    pub heartbeat_interval: Duration,
    /// Shortest time without a leader after which a node stands for election; the longest is half
    /// as much again.
    pub election_timeout: Duration,
}

impl Default for RaftTimeouts {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_millis(100),
            election_timeout: Duration::from_millis(500),
        }
    }
}

/// Why the cluster's time was not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTimeError {
    /// This node does not lead.
    NotLeader,
    /// No majority has confirmed it; whether it is set is not known.
    OutcomeUnknown,
    /// It is beyond this node's wall clock, which has to be right first.
    BeyondWallClock,
}

pub(crate) struct Replica {
    pub(crate) identity: Identity,
    pub(crate) raft: Raft,
    pub(crate) core: Arc<Core>,
    pub(crate) clock: Arc<ClusterClock>,
    pub(crate) freshness: Arc<Freshness>,
    pub(crate) leadership: Arc<Leadership>,
    pub(crate) proposals: Arc<Proposals>,
    pub(crate) barriers: Arc<Barriers>,
    pub(crate) sweeper: Arc<Sweeper>,
    pub(crate) snapshots: PathBuf,
    pub(crate) wal: Wal,
    pub(crate) checkpointer: Checkpointer,
    pub(crate) log: LogStore,
    durable: Arc<Durable>,
    /// The members at the time of formation, for as long as the log says nothing.
    founders: BTreeMap<u64, Member>,
}

/// What a replica is started with.
pub(crate) struct ReplicaParts {
    pub(crate) identity: Identity,
    pub(crate) founders: BTreeMap<u64, Member>,
    /// Whether the log was made before, and so has to be there.
    pub(crate) has_log: bool,
    pub(crate) paths: StoragePaths,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) timeouts: RaftTimeouts,
    pub(crate) checkpoints: CheckpointPolicy,
    pub(crate) supervisor: Supervisor,
}

fn raft_config(timeouts: RaftTimeouts) -> Result<Config, RecoveryError> {
    let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let config = Config {
        cluster_name: "quorate".to_owned(),
        heartbeat_interval: milliseconds(timeouts.heartbeat_interval),
        election_timeout_min: milliseconds(timeouts.election_timeout),
        election_timeout_max: milliseconds(timeouts.election_timeout * 3 / 2),
        // Streaming a large state takes its time; progress is the transport's to watch.
        install_snapshot_timeout: 600_000,
        max_payload_entries: 1024,
        // What the log still has is always the cheaper way to catch up.
        replication_lag_threshold: u64::MAX / 2,
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: 1000,
        purge_batch_size: 256,
        enable_pre_vote: Some(true),
        // A restarted leader has lost what it applied and not checkpointed.
        enable_leader_restore: Some(false),
        // A follower whose last records were damaged on disk has lost what it acknowledged. It is
        // no less of a voter for being sent them again, and no better for being left behind.
        allow_log_reversion: Some(true),
        ..Config::default()
    };
    config.validate().map_err(RecoveryError::new)
}

impl Replica {
    /// Recovers from disk and takes part. Blocks while it reads the disk.
    pub(crate) async fn start(parts: ReplicaParts) -> Result<Arc<Self>, RecoveryError> {
        let supervisor = parts.supervisor;
        let config = Arc::new(raft_config(parts.timeouts)?);
        let Recovery { store, checkpoint_index, snapshot, state, replace_with, wal, recovered } =
            recover(&parts.paths, parts.has_log, supervisor.thread_watch())?;
        let log = LogStore::new(wal.clone(), &recovered).map_err(RecoveryError::new)?;
        let durable = log.durable();
        let found = find_time(&wal, &recovered, &log, state.as_ref())?;
        let core = Core::new(state, replace_with);
        let time_note = parts.paths.time;
        let kept = timekeeper::recall(&time_note, &*parts.clock);
        let own_id = parts.identity.node_id;
        let clock = Arc::new(ClusterClock::new(own_id, parts.clock.clone(), found, kept));
        let snapshots = parts.paths.snapshots;
        let (snapshot_due, mut snapshots_due) = tokio::sync::mpsc::channel::<()>(1);
        let machine_clock = parts.clock.clone();
        let checkpoints = parts.checkpoints.clone();
        let checkpointer = Checkpointer::start(CheckpointerParts {
            store,
            core: core.clone(),
            durable: durable.clone(),
            wal: wal.clone(),
            snapshots: snapshots.clone(),
            snapshot,
            index: checkpoint_index,
            policy: parts.checkpoints,
            clock: parts.clock.clone(),
            threads: supervisor.thread_watch(),
            // One request waiting is as good as many.
            snapshot_due: Box::new(move || {
                let _ = snapshot_due.try_send(());
            }),
        })
        .map_err(RecoveryError::new)?;
        let freshness = Arc::new(Freshness::default());
        let peers = Peers::new(
            parts.identity,
            clock.clone(),
            core.levels().clone(),
            freshness.clone(),
            parts.timeouts.election_timeout,
            wal.clone(),
        );
        let machine = StateMachine::new(core.clone(), clock.clone(), checkpointer.clone());
        let network = NetworkFactory { peers: peers.clone() };
        let starting = Raft::new(parts.identity.node_id, config, network, log.clone(), machine);
        let raft = supervisor.supervise_raft(starting).await.map_err(RecoveryError::new)?;
        let metrics = raft.data_metrics();
        freshness.watch_quorum(Box::new(move || {
            metrics.borrow_watched().last_quorum_acked.as_deref().map(|acked| acked.elapsed())
        }));
        let leadership = Leadership::new(raft.clone(), clock.clone(), peers.membership.clone());
        let exchanges = Exchanges::new(peers.clone());
        let sweeper = Arc::new(Sweeper::default());
        let lagging = {
            let (wal, checkpointer) = (wal.clone(), checkpointer.clone());
            Box::new(move || {
                let index = checkpointer.status().index.unwrap_or(0);
                wal.bytes_after(index) > checkpoints.log_bytes_max
            })
        };
        let proposals = Proposals::new(
            raft.clone(),
            leadership.clone(),
            core.levels().clone(),
            exchanges.clone(),
            clock.clone(),
            sweeper.clone(),
            lagging,
        );
        let barriers = Barriers::new(BarrierParts {
            own_id: parts.identity.node_id,
            core: core.clone(),
            log: log.clone(),
            leadership: leadership.clone(),
            exchanges,
            clock: clock.clone(),
            sweeper: sweeper.clone(),
            flush_commits: peers.flush_commits.clone(),
            announced: peers.announced.clone(),
        });
        supervisor.spawn("leadership", leadership.clone().run());
        let levelling = level::run(core.levels().clone(), leadership.clone(), raft.clone());
        supervisor.spawn("feature level", levelling);
        let keeping = timekeeper::run(time_note, machine_clock, clock.clone(), leadership.clone());
        supervisor.spawn("timekeeper", keeping);
        supervisor.spawn("proposals", proposals.clone().run());
        supervisor.spawn("barriers", barriers.clone().run());
        let ticking =
            ticker::run(core.clone(), clock.clone(), leadership.clone(), proposals.clone());
        supervisor.spawn("ticker", ticking);
        {
            let (proposals, barriers, clock) = (proposals.clone(), barriers.clone(), clock.clone());
            let (following, sweeper) = (core.following().clone(), sweeper.clone());
            supervisor.spawn("sweeper", async move {
                sweeper
                    .run(|| {
                        let now = clock.monotonic();
                        proposals.expire(now) | barriers.expire(now) | following.expire(now)
                    })
                    .await;
            });
        }
        {
            let raft = raft.clone();
            supervisor.spawn("snapshots", async move {
                while snapshots_due.recv().await.is_some() {
                    if let Err(error) = raft.trigger().snapshot().await {
                        tracing::warn!(%error, "no snapshot");
                    }
                }
                // That the checkpointer is gone is told by whoever knows why.
                std::future::pending().await
            });
        }
        supervisor.spawn("raft", watch_for_fatal(raft.clone(), supervisor.halt()));
        Ok(Arc::new(Self {
            identity: parts.identity,
            raft,
            core,
            clock,
            freshness,
            leadership,
            proposals,
            barriers,
            sweeper,
            snapshots,
            wal,
            checkpointer,
            log,
            durable,
            founders: parts.founders,
        }))
    }

    /// How old what this node has applied can be; `None` while it cannot tell.
    pub(crate) fn staleness(&self) -> Option<Duration> {
        let view = self.leadership.view();
        // A sole voter knows all that was acknowledged once it has applied an entry of its term.
        let is_sole_voter = view.voters.iter().flatten().all(|id| *id == self.identity.node_id);
        let applied_term = self.core.last_applied().map(|log_id| term_of(&log_id));
        if view.route == Route::Local && is_sole_voter && applied_term == Some(view.term) {
            return Some(Duration::ZERO);
        }
        let as_of = self.freshness.as_of(self.core.next_index())?;
        Some(self.clock.monotonic().saturating_sub(as_of))
    }

    /// Whether Raft has never written anything here.
    pub(crate) fn is_pristine(&self) -> bool {
        self.log.is_pristine()
    }

    /// The members, by the log or, before it says anything, by formation.
    pub(crate) fn members(&self) -> BTreeMap<u64, Member> {
        let metrics = self.raft.server_metrics();
        let members: BTreeMap<u64, Member> = metrics
            .borrow_watched()
            .membership_config
            .membership()
            .nodes()
            .map(|(node, member)| (*node, member.clone()))
            .collect();
        if members.is_empty() { self.founders.clone() } else { members }
    }

    /// Where in the log the membership stands, whether it is committed or not.
    fn membership(&self) -> Option<LogId> {
        *self.raft.server_metrics().borrow_watched().membership_config.log_id()
    }

    /// The sets of voters; two while a membership change is under way.
    pub(crate) fn voters(&self) -> Vec<BTreeSet<u64>> {
        let metrics = self.raft.server_metrics();
        metrics.borrow_watched().membership_config.membership().get_joint_config().clone()
    }

    /// Sets the cluster's time forward, and has that committed. Returns by how much it leapt.
    pub(crate) async fn set_time(&self, time: Timestamp) -> Result<Duration, SetTimeError> {
        let leap = self.clock.set_time(time).ok_or(SetTimeError::NotLeader)?;
        match ticker::tick(&self.clock, &self.proposals).await {
            true => Ok(leap),
            false => Err(SetTimeError::OutcomeUnknown),
        }
    }

    /// Refuses messages from another cluster, to another life of this node, from another life of a
    /// member, from a node that is no member, or from a build that does not know the feature level
    /// in force.
    pub(crate) fn check_header(&self, header: &peer::Header) -> Result<(), String> {
        let cluster_id =
            u128::from(header.cluster_id_high) << 64 | u128::from(header.cluster_id_low);
        let own = &self.identity;
        if cluster_id != own.cluster_id {
            return Err(format!(
                "this node belongs to cluster {:032x}, not to {cluster_id:032x}",
                own.cluster_id
            ));
        }
        if (header.to_node, header.to_incarnation) != (own.node_id, own.incarnation) {
            return Err(format!(
                "this is node {} in its life {:016x}, not node {} in its life {:016x}",
                own.node_id, own.incarnation, header.to_node, header.to_incarnation
            ));
        }
        match self.members().get(&header.from_node) {
            Some(member) if member.incarnation != header.from_incarnation => {
                return Err(format!(
                    "node {} is a member in its life {:016x}; {:016x} is not that one",
                    header.from_node, member.incarnation, header.from_incarnation
                ));
            }
            Some(_) => {}
            // One that has been added may be known to the sender before it is known here, and one
            // whose removal is not committed may be needed to commit it, or to undo it.
            None if self.core.is_member(header.from_node) => {}
            None if self.membership() < header.membership.map(log_id_in) => {}
            None => {
                return Err(format!(
                    "node {} is no member of this cluster, and its membership is no newer than \
                     that of node {}",
                    header.from_node, own.node_id
                ));
            }
        }
        let levels = self.core.levels();
        levels.hear(header.from_node, header.from_incarnation, header.feature_level);
        levels.admit(header.from_node, header.feature_level)
    }

    /// Drains and stops, once its tasks have ended: a last checkpoint, the log closed.
    pub(crate) async fn stop(&self) {
        // Whoever waits is told before nobody is left to tell.
        self.proposals.expire(Duration::MAX);
        self.barriers.expire(Duration::MAX);
        self.core.following().close();
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "raft did not stop cleanly");
        }
        let (checkpointer, wal) = (self.checkpointer.clone(), self.wal.clone());
        let durable = self.durable.clone();
        let stopping = tokio::task::spawn_blocking(move || {
            checkpointer.stop();
            wal.close();
            durable.fail();
        });
        if let Err(error) = stopping.await {
            tracing::warn!(%error, "storage did not stop cleanly");
        }
    }
}

/// What the state, and the log behind it, say of the time.
fn find_time(
    wal: &Wal,
    recovered: &crate::storage::wal::Recovered,
    log: &LogStore,
    state: Option<&(Boundary, State)>,
) -> Result<Found, RecoveryError> {
    let committed = state.map_or_else(Stamp::default, |(_, state)| state.clock());
    let mut found = Found { committed, highest: committed, term: log.last_term() };
    let Some(last) = recovered.last_index else { return Ok(found) };
    let not_applied = state.map_or(0, |(boundary, _)| boundary.next_index());
    // Stamps grow along the log but for some milliseconds, so the last entry that has one has the
    // highest, and the last of those that are committed theirs. The state knows all before it.
    for index in (recovered.first_index.max(not_applied)..=last).rev() {
        let records = wal.read(index..index + 1, 0).map_err(RecoveryError::new)?;
        let Some(record) = records.into_iter().next() else { break };
        let entry = record_in(index, record).map_err(RecoveryError::new)?;
        if let EntryPayload::Normal(pack) = entry.payload {
            let entry = state::decode_entry(pack.0)
                .map_err(|error| RecoveryError::new(format_args!("entry {index}: {error}")))?;
            found.highest = found.highest.max(entry.stamp);
            if log.committed_index() >= Some(index) {
                found.committed = found.committed.max(entry.stamp);
                break;
            }
        }
    }
    Ok(found)
}

/// Ends when openraft does, of its own or because it was told to.
async fn watch_for_fatal(raft: Raft, halt: Halt) {
    let mut metrics = raft.metrics();
    loop {
        let stopped = metrics.borrow_watched().running_state.clone().err();
        match stopped {
            Some(openraft::errors::Fatal::Stopped) => return,
            Some(fatal) => return halt.because(&fatal.to_string()),
            None => {}
        }
        if metrics.changed().await.is_err() {
            return;
        }
        // They change several times an entry.
        tokio::time::sleep(FATAL_LOOK_INTERVAL).await;
    }
}
