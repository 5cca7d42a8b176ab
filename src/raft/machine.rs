//! The state machine as openraft sees it: entries in, replies and changes out.
//!
//! No entry waits for a disk here. Applying changes memory and answers; the changes collect in a
//! dirty map, from which the checkpointer takes them at a boundary of its choice. What a restart
//! finds is the newest checkpoint or snapshot, and openraft applies the log behind it again.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use tokio::sync::watch;

use super::checkpointer::Checkpointer;
use super::clock::ClusterClock;
use super::convert::{Boundary, boundary_decode};
use super::dirty::DirtyMap;
use super::following::{Calls, Following};
use super::halt::abort_on_panic;
use super::level::Levels;
use super::types::{
    CommittedLeaderId, LogId, Member, PackReply, SnapshotMeta, StoredMembership, TypeConfig,
};
use crate::state::{
    self, Change, CodecError, Command, Proposal, RecordKey, Reply, Restore, Revision, State,
};
use crate::storage::snapshot::{SnapshotError, SnapshotFile, SnapshotReader};

type Snapshot = openraft::storage::Snapshot<CommittedLeaderId, u64, Member, SnapshotFile>;

/// Commands whose records are fetched at once: enough to hide the waiting for memory, and few
/// enough that what was fetched first is still in the cache when it is needed.
const COMMANDS_FETCHED_MAX: usize = 128;

/// How far the state machine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    /// One more than the index of the last entry applied.
    pub(crate) next_index: u64,
    pub(crate) revision: Revision,
    /// Where in the log the membership stands.
    pub(crate) membership: Option<LogId>,
}

/// The state of one replica, shared by those who apply, read and checkpoint.
///
/// - `inner` is locked for one entry, one batch of queries or one take of the dirty map at a time,
///   and never across an await.
/// - `following` may be locked while `inner` is, not the other way round.
pub(crate) struct Core {
    inner: Mutex<Inner>,
    applied: watch::Sender<Applied>,
    following: Arc<Following>,
    levels: Arc<Levels>,
}

struct Inner {
    state: State,
    last_applied: Option<LogId>,
    membership: StoredMembership,
    dirty: DirtyMap,
    /// A snapshot that has replaced the state since the last checkpoint: the next one begins with
    /// it, and the dirty map holds what came after it.
    installed: Option<SnapshotFile>,
    /// Reused from entry to entry.
    changes: Vec<Change>,
}

/// What a checkpoint has to write.
pub(crate) struct Taken {
    pub(crate) boundary: Boundary,
    pub(crate) installed: Option<SnapshotFile>,
    pub(crate) changes: DirtyMap,
}

impl Core {
    /// `installed` is the snapshot that the state came from, if the checkpoint is older.
    pub(crate) fn new(
        recovered: Option<(Boundary, State)>,
        installed: Option<SnapshotFile>,
    ) -> Arc<Self> {
        let (last_applied, membership, state) = match recovered {
            Some((boundary, state)) => (boundary.log_id, boundary.membership, state),
            None => (None, StoredMembership::default(), State::new()),
        };
        let applied = Applied {
            next_index: last_applied.map_or(0, |log_id| log_id.index + 1),
            revision: state.revision(),
            membership: *membership.log_id(),
        };
        let levels = Levels::new(state.feature_level());
        Arc::new(Self {
            inner: Mutex::new(Inner {
                state,
                last_applied,
                membership,
                dirty: DirtyMap::default(),
                installed,
                changes: Vec::new(),
            }),
            applied: watch::Sender::new(applied),
            following: Arc::default(),
            levels,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the state as of the last entry applied.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.lock().state)
    }

    /// The feature level in force, and what the members know.
    pub(crate) fn levels(&self) -> &Arc<Levels> {
        &self.levels
    }

    /// The calls that wait for locks.
    pub(crate) fn following(&self) -> &Arc<Following> {
        &self.following
    }

    /// Follows how far the state machine is.
    pub(crate) fn applied(&self) -> watch::Receiver<Applied> {
        self.applied.subscribe()
    }

    /// Log index of the first entry not applied.
    pub(crate) fn next_index(&self) -> u64 {
        self.applied.borrow().next_index
    }

    /// Whether the node is a member, as far as the log is applied.
    pub(crate) fn is_member(&self, node: u64) -> bool {
        self.lock().membership.membership().get_node(&node).is_some()
    }

    /// Where in the log the membership stands, as far as it is applied.
    pub(crate) fn membership(&self) -> Option<LogId> {
        self.applied.borrow().membership
    }

    pub(crate) fn last_applied(&self) -> Option<LogId> {
        self.lock().last_applied
    }

    /// The number of records that the next checkpoint has to write.
    pub(crate) fn dirty_records(&self) -> usize {
        let inner = self.lock();
        inner.dirty.len() + usize::from(inner.installed.is_some())
    }

    /// Takes all changes since the last take.
    pub(crate) fn take_dirty(&self) -> Taken {
        let mut inner = self.lock();
        Taken {
            boundary: Boundary {
                log_id: inner.last_applied,
                membership: inner.membership.clone(),
                state: inner.state.header(),
            },
            installed: inner.installed.take(),
            changes: std::mem::take(&mut inner.dirty),
        }
    }

    fn apply(&self, entry: super::types::Entry, wanted: bool) -> io::Result<PackReply> {
        let mut calls = Calls::default();
        let mut inner = self.lock();
        let replies = match entry.payload {
            EntryPayload::Blank => Vec::new(),
            EntryPayload::Normal(pack) => {
                let (index, command) = (entry.log_id.index, Cell::new("no command"));
                abort_on_panic(
                    || format!("applying entry {index} ({})", command.get()),
                    || inner.apply_pack(pack.0, wanted, &command, &self.following, &mut calls),
                )?
            }
            EntryPayload::Membership(membership) => {
                inner.membership = StoredMembership::new(Some(entry.log_id), membership);
                Vec::new()
            }
        };
        inner.last_applied = Some(entry.log_id);
        let applied = Applied {
            next_index: entry.log_id.index + 1,
            revision: inner.state.revision(),
            membership: *inner.membership.log_id(),
        };
        self.levels.follow(inner.state.feature_level());
        drop(inner);
        self.applied.send_replace(applied);
        calls.make();
        Ok(PackReply(replies))
    }

    fn install(&self, boundary: Boundary, state: State, file: SnapshotFile) {
        let mut inner = self.lock();
        let applied = Applied {
            next_index: boundary.next_index(),
            revision: state.revision(),
            membership: *boundary.membership.log_id(),
        };
        let mut calls = Calls::default();
        inner.state = state;
        self.levels.follow(inner.state.feature_level());
        self.following.installed(&inner.state, &mut calls);
        inner.last_applied = boundary.log_id;
        inner.membership = boundary.membership;
        inner.dirty = DirtyMap::default();
        inner.installed = Some(file);
        drop(inner);
        self.applied.send_replace(applied);
        calls.make();
    }
}

impl Inner {
    /// `applying` is set to what is being applied.
    fn apply_pack(
        &mut self,
        pack: Bytes,
        wanted: bool,
        applying: &Cell<&'static str>,
        following: &Following,
        calls: &mut Calls,
    ) -> io::Result<Vec<Reply>> {
        let invalid = |error: CodecError| {
            io::Error::new(io::ErrorKind::InvalidData, format!("an entry of the log: {error}"))
        };
        let entry = state::decode_entry(pack).map_err(invalid)?;
        let level = self.state.feature_level();
        let decode = |proposal: Proposal| match state::decode_command(proposal.command, level) {
            Ok(command) => Ok((Some(command), proposal.resend)),
            // Another build may know it, and would apply it.
            Err(error @ CodecError::FeatureLevel { .. }) => Err(invalid(error)),
            // No build does.
            Err(_) => Ok((None, proposal.resend)),
        };
        let commands: Vec<_> =
            entry.proposals.into_iter().map(decode).collect::<io::Result<_>>()?;
        self.state.advance(entry.stamp);
        let mut replies = Vec::with_capacity(if wanted { commands.len() } else { 0 });
        for group in commands.chunks(COMMANDS_FETCHED_MAX) {
            self.state.fetch(group.iter().filter_map(|(command, _)| command.as_ref()));
            for (command, resend) in group {
                applying.set(command.as_ref().map_or("malformed", Command::kind));
                let reply = match command {
                    Some(command) => self.state.apply(command, *resend, &mut self.changes),
                    None => self.state.reject_malformed(),
                };
                if wanted {
                    replies.push(reply);
                }
            }
        }
        if !following.is_empty() {
            following.observe(self.changes.iter(), &self.state, calls);
        }
        let traced = tracing::enabled!(target: "quorate::changes", tracing::Level::DEBUG);
        for change in self.changes.drain(..) {
            if traced {
                trace(&change);
            }
            self.dirty.note(change);
        }
        Ok(replies)
    }
}

fn trace(change: &Change) {
    let (namespace, handle): (_, &dyn std::fmt::Display) = match &change.key {
        RecordKey::Session(key) | RecordKey::Tombstone(key) => (&key.namespace, &key.digest),
        RecordKey::Lease(key) | RecordKey::LeaseTombstone(key) => (&key.namespace, &key.id),
        RecordKey::Claim(key) => (&key.lock.namespace, &key.lock.name),
        RecordKey::Ring(key) => (&key.namespace, &key.name),
        RecordKey::Member(key) => (&key.ring.namespace, &key.name),
    };
    tracing::debug!(
        target: "quorate::changes",
        revision = change.revision.0,
        kind = change.key.kind(),
        %namespace,
        %handle,
        cause = %change.cause,
        "change"
    );
}

/// openraft's handle on the core.
pub(crate) struct StateMachine {
    core: Arc<Core>,
    clock: Arc<ClusterClock>,
    checkpointer: Checkpointer,
}

impl StateMachine {
    pub(crate) fn new(
        core: Arc<Core>,
        clock: Arc<ClusterClock>,
        checkpointer: Checkpointer,
    ) -> Self {
        Self { core, clock, checkpointer }
    }
}

/// What says that a file is sound, and that it takes a later build to read it.
pub(crate) fn unsupported(path: &Path, error: &CodecError) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, format!("{}: {error}", path.display()))
}

/// Reads a snapshot file into a state. Blocks for as long as that takes. `Unsupported` if it takes
/// a later build.
pub(crate) fn load_snapshot(file: &SnapshotFile) -> io::Result<(Boundary, State)> {
    let invalid = |error: &dyn std::fmt::Display| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("snapshot {}: {error}", file.path.display()),
        )
    };
    let reader = SnapshotReader::open(&file.path).map_err(snapshot_failed)?;
    let boundary = boundary_decode(reader.header()).map_err(|error| invalid(&error))?;
    let mut restore = Restore::new(&boundary.state).map_err(|error| match error {
        CodecError::FeatureLevel { .. } => unsupported(&file.path, &error),
        error => invalid(&error),
    })?;
    for record in reader.records() {
        let (key, value) = record.map_err(snapshot_failed)?;
        restore.insert(&key, &value).map_err(|error| invalid(&error))?;
    }
    let state = restore.finish().map_err(|error| invalid(&error))?;
    Ok((boundary, state))
}

fn snapshot_failed(error: SnapshotError) -> io::Error {
    let kind = match &error {
        SnapshotError::Corrupt { .. } => io::ErrorKind::InvalidData,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

/// Reads what a snapshot file says of itself. `InvalidData` if it is damaged.
pub(crate) fn load_snapshot_header(file: &SnapshotFile) -> io::Result<Boundary> {
    let reader = SnapshotReader::open(&file.path).map_err(snapshot_failed)?;
    boundary_decode(reader.header()).map_err(|error| {
        let message = format!("snapshot {}: {error}", file.path.display());
        io::Error::new(io::ErrorKind::InvalidData, message)
    })
}

/// The metadata of a snapshot file, from its header.
pub(crate) fn snapshot_meta(boundary: &Boundary) -> SnapshotMeta {
    SnapshotMeta { last_log_id: boundary.log_id, last_membership: boundary.membership.clone() }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let inner = self.core.lock();
        Ok((inner.last_applied, inner.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let replies = self.core.apply(entry, responder.is_some())?;
            if let Some(responder) = responder {
                responder.send(replies);
            }
        }
        self.clock.observe_stamp(self.core.read(State::clock));
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder { checkpointer: self.checkpointer.clone() }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotFile,
    ) -> Result<(), io::Error> {
        let file = snapshot.clone();
        let (boundary, state) = tokio::task::spawn_blocking(move || load_snapshot(&file))
            .await
            .map_err(io::Error::other)??;
        if boundary.log_id != meta.last_log_id {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("snapshot {} is not the one announced", snapshot.path.display()),
            ));
        }
        tracing::info!(index = boundary.index(), sessions = state.sessions(), "snapshot installed");
        let stamp = state.clock();
        self.core.install(boundary, state, snapshot.clone());
        self.clock.observe_stamp(stamp);
        self.checkpointer.installed(snapshot);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let Some(file) = self.checkpointer.current_snapshot() else { return Ok(None) };
        let boundary = load_snapshot_header(&file)?;
        Ok(Some(Snapshot { meta: snapshot_meta(&boundary), snapshot: file }))
    }
}

/// Builds a snapshot out of a fresh checkpoint.
pub(crate) struct SnapshotBuilder {
    checkpointer: Checkpointer,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let file = self.checkpointer.build_snapshot().await?;
        let boundary = load_snapshot_header(&file)?;
        Ok(Snapshot { meta: snapshot_meta(&boundary), snapshot: file })
    }
}
