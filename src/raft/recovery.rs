//! What a node finds on its disk when it starts, and what it makes of it.
//!
//! The newer of checkpoint and snapshot is the state; the log behind it is applied again by
//! openraft. A checkpoint store that will not open or does not match its checksums is moved aside,
//! loudly, and the snapshot and the log take its place. A log that is corrupt is another matter:
//! it holds what this node has acknowledged, so the node refuses to start.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::convert::{Boundary, boundary_decode, record_in};
use super::machine::{load_snapshot, load_snapshot_header, unsupported};
use crate::state::{CodecError, Restore, State};
use crate::storage::checkpoint::{
    self, CheckpointError, CheckpointOptions, CheckpointStore, OpenError,
};
use crate::storage::file::RealFiles;
use crate::storage::snapshot::{self, SnapshotFile};
use crate::storage::thread::ThreadWatch;
use crate::storage::wal::{self, Recovered, Wal, WalOptions};

/// Where everything is.
pub(crate) struct StoragePaths {
    pub(crate) wal: PathBuf,
    pub(crate) checkpoint: PathBuf,
    pub(crate) snapshots: PathBuf,
    pub(crate) time: PathBuf,
}

/// Everything that was found.
pub(crate) struct Recovery {
    pub(crate) store: CheckpointStore,
    /// Log index of the checkpoint, where there is one.
    pub(crate) checkpoint_index: Option<u64>,
    pub(crate) snapshot: Option<SnapshotFile>,
    /// The newer of the two.
    pub(crate) state: Option<(Boundary, State)>,
    /// Set if the snapshot is the newer one: the checkpoint has to be replaced by it.
    pub(crate) replace_with: Option<SnapshotFile>,
    pub(crate) wal: Wal,
    pub(crate) recovered: Recovered,
}

/// Why a node cannot start from its disk. The message names what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RecoveryError(String);

impl RecoveryError {
    pub(crate) fn new(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

fn because(error: impl std::fmt::Display) -> RecoveryError {
    RecoveryError::new(error)
}

/// Reads the data directory. Blocks for as long as that takes.
///
/// `has_log` says that the log was made before: without it, the node has lost what it acknowledged
/// and must not vote again.
pub(crate) fn recover(
    paths: &StoragePaths,
    has_log: bool,
    threads: ThreadWatch,
) -> Result<Recovery, RecoveryError> {
    if has_log && !wal::is_present(&paths.wal) {
        return Err(because(format_args!(
            "the log in {} is gone, and with it the votes and entries that this node has \
             acknowledged; bring it back, or leave this node out of the cluster",
            paths.wal.display()
        )));
    }
    snapshot::prepare(&paths.snapshots).map_err(because)?;
    let (store, checkpoint) = open_checkpoint(&paths.checkpoint)?;
    let mut snapshot = snapshot::newest(&paths.snapshots).map_err(because)?;
    let checkpoint_index = checkpoint.as_ref().map(|(boundary, _)| boundary.index());
    let newer = snapshot.clone().filter(|file| Some(file.index) > checkpoint_index);
    // Nothing else reads an older one before a node that is far behind wants it.
    if let Some(file) = snapshot.take_if(|_| newer.is_none())
        && is_readable(&file)?
    {
        snapshot = Some(file);
    }
    let (state, replace_with) = match newer {
        None => (checkpoint, None),
        Some(file) => match load_snapshot(&file) {
            Ok(state) => (Some(state), Some(file)),
            // As with the checkpoint: what is there may be as it should be, or a later build can
            // read it.
            Err(error) if error.kind() != std::io::ErrorKind::InvalidData => {
                return Err(because(error));
            }
            Err(error) if checkpoint.is_some() => {
                tracing::error!(%error, "snapshot moved aside; checkpoint and log will do");
                set_aside(&file.path)?;
                snapshot = None;
                (checkpoint, None)
            }
            Err(error) => {
                return Err(because(format_args!(
                    "{error}, and there is no checkpoint to fall back on; bring back the data \
                     directory, or leave this node out of the cluster"
                )));
            }
        },
    };
    // A checkpoint is only taken where the log is on disk. A snapshot from the leader is no proof:
    // the log is purged up to it afterwards.
    let must_contain = checkpoint_index.unwrap_or(0);
    let options = WalOptions { must_contain, threads, ..WalOptions::default() };
    let (wal, recovered) = Wal::open(Arc::new(RealFiles), &paths.wal, options).map_err(because)?;
    if let Some(torn) = &recovered.repaired_tail {
        tracing::warn!(?torn, "the log ended in a record that was being written; cut off");
    }
    let next = state.as_ref().map_or(0, |(boundary, _)| boundary.next_index());
    if recovered.first_index > next {
        return Err(because(format_args!(
            "the log begins at index {}, but the state on disk ends before {next}: checkpoint and \
             snapshot are lost; bring back the data directory, or leave this node out of the \
             cluster",
            recovered.first_index
        )));
    }
    if let (Some(_), Some((boundary, _))) = (&replace_with, &state) {
        drop_conflicting_tail(&wal, boundary)?;
    }
    Ok(Recovery { store, checkpoint_index, snapshot, state, replace_with, wal, recovered })
}

/// A snapshot from a leader takes the place of whatever the log holds there of another term. Raft
/// truncates that when it installs the snapshot; a crash may come first.
fn drop_conflicting_tail(wal: &Wal, boundary: &Boundary) -> Result<(), RecoveryError> {
    let Some(log_id) = boundary.log_id else { return Ok(()) };
    if log_id.index < wal.first_index() || wal.last_index() < Some(log_id.index) {
        return Ok(());
    }
    let records = wal.read(log_id.index..log_id.index + 1, 0).map_err(because)?;
    let Some(record) = records.into_iter().next() else { return Ok(()) };
    let entry = record_in(log_id.index, record).map_err(because)?;
    if entry.log_id != log_id {
        tracing::warn!(index = log_id.index, "the log's tail conflicts with the snapshot; dropped");
        wal.truncate_from(log_id.index, Box::new(|_| {}));
    }
    Ok(())
}

/// Whether a snapshot that the checkpoint has outrun says what it is; otherwise it is moved aside.
fn is_readable(file: &SnapshotFile) -> Result<bool, RecoveryError> {
    let error = match load_snapshot_header(file) {
        Ok(_) => return Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => error,
        Err(error) => return Err(because(error)),
    };
    tracing::error!(%error, "snapshot moved aside; the checkpoint is newer");
    set_aside(&file.path)?;
    Ok(false)
}

fn set_aside(file: &Path) -> Result<(), RecoveryError> {
    let mut aside = file.as_os_str().to_owned();
    aside.push(".damaged");
    std::fs::rename(file, aside).map_err(because)
}

type OpenedCheckpoint = (CheckpointStore, Option<(Boundary, State)>);

fn open_checkpoint(path: &Path) -> Result<OpenedCheckpoint, RecoveryError> {
    match try_open(path) {
        Ok(opened) => Ok(opened),
        // Nothing is wrong with what is there: moving it aside would only lose it.
        Err(error @ OpenError::Outside { .. }) => Err(because(error)),
        Err(error) => {
            tracing::error!(%error, "checkpoint store is not usable; moved aside and rebuilt");
            checkpoint::set_aside(path).map_err(because)?;
            try_open(path).map_err(because)
        }
    }
}

fn try_open(path: &Path) -> Result<OpenedCheckpoint, OpenError> {
    let (store, root) = CheckpointStore::open(path, CheckpointOptions::default())?;
    let Some(root) = root else { return Ok((store, None)) };
    let boundary = boundary_decode(&root.header).map_err(unusable)?;
    let mut restore = Restore::new(&boundary.state).map_err(|error| match error {
        // A later build can open it.
        CodecError::FeatureLevel { .. } => {
            OpenError::Outside { reason: unsupported(path, &error).to_string() }
        }
        error => unusable(error),
    })?;
    let insert = &mut |key: &[u8], value: &[u8]| {
        restore.insert(key, value).map_err(|error| CheckpointError::Record(error.to_string()))
    };
    store.load(insert)?;
    let state = restore.finish().map_err(unusable)?;
    Ok((store, Some((boundary, state))))
}

fn unusable(error: impl std::fmt::Display) -> OpenError {
    OpenError::Unusable { reason: error.to_string() }
}
