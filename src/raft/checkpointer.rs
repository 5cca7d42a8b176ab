//! Keeps the durable copy of the state near the log: checkpoints, and the snapshots behind them.
//!
//! One thread owns the checkpoint store. It takes the dirty map when the log behind the last
//! checkpoint has grown enough or enough time has passed, waits until that point of the log is on
//! the local disk, and writes. A snapshot is streamed out of a finished checkpoint by a thread of
//! its own while writing goes on. Any failure halts the node: it could not keep its promise to
//! restart.

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use super::convert::boundary_encode;
use super::log::Durable;
use super::machine::{Core, Taken};
use crate::clock::Clock;
use crate::state;
use crate::storage::checkpoint::{CheckpointError, CheckpointStore, FrozenCheckpoint};
use crate::storage::snapshot::{self, SnapshotFile, SnapshotReader, SnapshotWriter};
use crate::storage::thread::ThreadWatch;
use crate::storage::wal::Wal;

/// How often the thread looks whether a checkpoint is due: the minimum pause between two.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The runs of a checkpoint hold records that later runs have outdated: about as many again.
const OUTDATED_SHARE: u64 = 2;

/// When checkpoints and snapshots are due, and how far they may lag.
#[derive(Clone, Debug)]
pub struct CheckpointPolicy {
    /// A checkpoint is due when the log behind the last one has so many bytes: about what a
    /// restart applies again in a second.
    pub log_bytes: u64,
    /// A checkpoint is due when the last one is so old and anything has changed.
    pub age: Duration,
    /// Proposals are slowed while the log behind the last checkpoint has more bytes than this.
    pub log_bytes_max: u64,
    /// A snapshot is due when the log behind the last one has at least so many bytes, and more
    /// than the state.
    pub snapshot_log_bytes: u64,
}

impl Default for CheckpointPolicy {
    fn default() -> Self {
        Self {
            log_bytes: 128 << 20,
            age: Duration::from_secs(30),
            log_bytes_max: 1 << 30,
            snapshot_log_bytes: 512 << 20,
        }
    }
}

enum Message {
    BuildSnapshot(oneshot::Sender<io::Result<SnapshotFile>>),
    Stop,
    #[cfg(test)]
    Panic,
}

/// A handle on the thread.
#[derive(Clone)]
pub(crate) struct Checkpointer {
    messages: SyncSender<Message>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    snapshot: Option<SnapshotFile>,
    /// Log index of the newest finished checkpoint.
    index: Option<u64>,
    finished_at: Option<Duration>,
    /// About what a snapshot would hold.
    state_bytes: u64,
    /// Whether Raft was asked for a snapshot that is not there yet. Raft forgets a request that
    /// comes while one is being built, so none is made then.
    asked: bool,
    /// The thread, until it is joined.
    thread: Option<JoinHandle<()>>,
}

/// What an operator wants to know of checkpoints.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CheckpointStatus {
    pub(crate) index: Option<u64>,
    pub(crate) finished_at: Option<Duration>,
}

/// What the thread works with.
pub(crate) struct CheckpointerParts {
    pub(crate) store: CheckpointStore,
    pub(crate) core: Arc<Core>,
    pub(crate) durable: Arc<Durable>,
    pub(crate) wal: Wal,
    pub(crate) snapshots: PathBuf,
    pub(crate) snapshot: Option<SnapshotFile>,
    pub(crate) index: Option<u64>,
    pub(crate) policy: CheckpointPolicy,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) threads: ThreadWatch,
    /// Asks Raft to take a snapshot, and with it to purge its log.
    pub(crate) snapshot_due: Box<dyn Fn() + Send>,
}

/// Has this thread go behind those that answer requests, where cores are few: it gets a quarter of
/// one that both want.
fn step_back() {
    // On Linux that is a thread's own.
    if let Err(error) = rustix::process::nice(6) {
        tracing::debug!(%error, "cannot lower the priority of checkpoints");
    }
}

impl Checkpointer {
    pub(crate) fn start(parts: CheckpointerParts) -> io::Result<Self> {
        let (messages, inbox) = sync_channel(16);
        let shared = Arc::new(Mutex::new(Shared {
            snapshot: parts.snapshot.clone(),
            index: parts.index,
            finished_at: parts.index.map(|_| parts.clock.monotonic()),
            ..Shared::default()
        }));
        let worker = Worker { parts, shared: shared.clone() };
        let thread = worker.parts.threads.clone().spawn("checkpoint", move || {
            step_back();
            worker.run(&inbox)
        })?;
        let this = Self { messages, shared };
        this.lock().thread = Some(thread);
        Ok(this)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn status(&self) -> CheckpointStatus {
        let shared = self.lock();
        CheckpointStatus { index: shared.index, finished_at: shared.finished_at }
    }

    pub(crate) fn current_snapshot(&self) -> Option<SnapshotFile> {
        self.lock().snapshot.clone()
    }

    /// Notes a snapshot that came from the leader and is durable.
    pub(crate) fn installed(&self, file: SnapshotFile) {
        self.lock().snapshot = Some(file);
    }

    /// Makes a checkpoint and a snapshot out of it.
    pub(crate) async fn build_snapshot(&self) -> io::Result<SnapshotFile> {
        let (done, built) = oneshot::channel();
        self.messages
            .try_send(Message::BuildSnapshot(done))
            .map_err(|_| io::Error::other("the checkpoint thread is busy or has stopped"))?;
        built.await.map_err(|_| io::Error::other("the checkpoint thread has stopped"))?
    }

    /// Has the thread panic.
    #[cfg(test)]
    pub(crate) fn kill(&self) {
        self.messages.send(Message::Panic).unwrap();
    }

    /// Makes a last checkpoint and ends the thread. Blocks.
    pub(crate) fn stop(&self) {
        // A thread that is already gone has said why.
        let _ = self.messages.send(Message::Stop);
        let thread = self.lock().thread.take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

struct Worker {
    parts: CheckpointerParts,
    shared: Arc<Mutex<Shared>>,
}

impl Worker {
    fn run(mut self, inbox: &Receiver<Message>) -> Result<(), String> {
        loop {
            let result = match inbox.recv_timeout(CHECK_INTERVAL) {
                Ok(Message::BuildSnapshot(done)) => self.snapshot(done),
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => {
                    if let Err(error) = self.checkpoint_if_dirty() {
                        tracing::warn!(%error, "no last checkpoint");
                    }
                    return Ok(());
                }
                Err(RecvTimeoutError::Timeout) => self.look(),
                #[cfg(test)]
                Ok(Message::Panic) => panic!("killed by a test"),
            };
            if let Err(error) = result {
                return Err(format!("checkpoint failed: {error}"));
            }
        }
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&mut self) -> Result<(), CheckpointError> {
        let (index, finished_at) = {
            let shared = self.shared();
            (shared.index, shared.finished_at)
        };
        let lag = self.parts.wal.bytes_after(index.unwrap_or(0));
        let old = finished_at.is_none_or(|at| {
            self.parts.clock.monotonic().saturating_sub(at) >= self.parts.policy.age
        });
        if lag >= self.parts.policy.log_bytes {
            // Even if the log has grown by commands that changed nothing: it has to be purged.
            self.checkpoint()?;
        } else if old {
            self.checkpoint_if_dirty()?;
        }
        self.ask_for_snapshot();
        Ok(())
    }

    fn ask_for_snapshot(&mut self) {
        let (snapshot, state_bytes) = {
            let shared = self.shared();
            (shared.snapshot.as_ref().map(|file| file.index), shared.state_bytes)
        };
        let behind = self.parts.wal.bytes_after(snapshot.unwrap_or(0));
        let due = behind > self.parts.policy.snapshot_log_bytes.max(state_bytes);
        if due && !std::mem::replace(&mut self.shared().asked, true) {
            (self.parts.snapshot_due)();
        }
    }

    fn checkpoint_if_dirty(&mut self) -> Result<(), CheckpointError> {
        if self.parts.core.dirty_records() > 0 { self.checkpoint() } else { Ok(()) }
    }

    fn checkpoint(&mut self) -> Result<(), CheckpointError> {
        let Taken { boundary, installed, changes } = self.parts.core.take_dirty();
        let index = boundary.index();
        if !self.parts.durable.wait(boundary.next_index()) {
            return Err(CheckpointError::Record("the log has stopped".to_owned()));
        }
        let started = self.parts.clock.monotonic();
        if let Some(file) = installed {
            self.replace(&file)?;
        }
        let count = changes.len();
        let mut encoded = changes.into_records().map(|(key, record)| {
            let value = record.map(|record| {
                let mut value = Vec::new();
                state::encode_record(&record, &mut value);
                value.into()
            });
            (state::encode_key(&key), value)
        });
        let (_, statistics) =
            self.parts.store.write(&mut encoded, index, boundary_encode(&boundary))?;
        let now = self.parts.clock.monotonic();
        let mut shared = self.shared();
        shared.index = Some(index);
        shared.finished_at = Some(now);
        shared.state_bytes = statistics.run_bytes / OUTDATED_SHARE;
        let took = now.saturating_sub(started);
        tracing::debug!(index, changes = count, ?took, ?statistics, "checkpoint");
        Ok(())
    }

    fn replace(&mut self, file: &SnapshotFile) -> Result<(), CheckpointError> {
        let reader = SnapshotReader::open(&file.path)?;
        let header = reader.header().clone();
        let index = reader.index();
        self.parts.store.replace(&mut reader.records(), index, header)?;
        Ok(())
    }

    /// Begins a snapshot of a fresh checkpoint; a thread of its own streams it.
    fn snapshot(
        &mut self,
        done: oneshot::Sender<io::Result<SnapshotFile>>,
    ) -> Result<(), CheckpointError> {
        let applied = self.parts.core.last_applied().map(|log_id| log_id.index);
        let held = self.parts.store.root().map(|root| root.index);
        if held.is_none() || held < applied || self.parts.core.dirty_records() > 0 {
            self.checkpoint()?;
        }
        let current = self.shared().snapshot.clone();
        let Some(frozen) = self.parts.store.freeze() else {
            self.shared().asked = false;
            let _ = done.send(Err(io::Error::other("there is no checkpoint")));
            return Ok(());
        };
        if let Some(file) = current.filter(|file| file.index >= frozen.root().index) {
            self.shared().asked = false;
            let _ = done.send(Ok(file));
            return Ok(());
        }
        let (shared, directory) = (self.shared.clone(), self.parts.snapshots.clone());
        self.parts
            .threads
            .spawn("snapshot", move || {
                step_back();
                let built = write_snapshot(&frozen, &directory);
                drop(frozen);
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                shared.asked = false;
                if let Ok(file) = &built
                    && shared.snapshot.as_ref().is_none_or(|old| old.index < file.index)
                {
                    shared.snapshot = Some(file.clone());
                }
                drop(shared);
                let failed = built.as_ref().err().map(|error| format!("snapshot failed: {error}"));
                // Raft may have stopped waiting; the file counts all the same.
                let _ = done.send(built);
                failed.map_or(Ok(()), Err)
            })
            .map_err(|error| CheckpointError::Record(error.to_string()))?;
        Ok(())
    }
}

fn write_snapshot(
    frozen: &FrozenCheckpoint,
    directory: &std::path::Path,
) -> io::Result<SnapshotFile> {
    let root = frozen.root();
    let mut writer =
        SnapshotWriter::create(directory, root.index, &root.header).map_err(io::Error::other)?;
    frozen.records(&mut |key, value| Ok(writer.write(key, value)?)).map_err(io::Error::other)?;
    let file = writer.finish().map_err(io::Error::other)?;
    snapshot::remove_older(directory, file.index).map_err(io::Error::other)?;
    tracing::info!(index = file.index, "snapshot written");
    Ok(file)
}
