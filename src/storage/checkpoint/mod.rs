//! The durable copy of the state, as of a recent log entry: what a restart begins with.
//!
//! # How it is laid out
//!
//! A checkpoint is a list of *runs*. A run is a sorted, immutable sequence of records cut into
//! blocks of some seven kilobytes, each one value of the store beneath (sled). A checkpoint
//! writes what changed since the last one as a new run and then a *root*, one small record that
//! names all runs. Where a key is in several runs, the newest holds. Now and then neighbouring
//! runs are folded into one (`fold.rs`), a bounded stretch per checkpoint.
//!
//! # Why it is laid out so
//!
//! sled spends 15 to 35 µs of CPU on any key, so records are not its keys. Pages of records found
//! by hash, rewritten when one of their records changes, need a table of all pages, two slots a
//! page, splits, and read and write a page of 16 KiB for a change of 300 bytes when changes are
//! few. Runs cost the same few microseconds a change whether a checkpoint holds a hundred changes
//! or a million, and nothing that a root names is ever overwritten: a block's key is used once.
//! So a crash can leave garbage, but not a mixture; and a snapshot is streamed out of a finished
//! checkpoint by just keeping its runs, while checkpoints go on without waiting.
//!
//! Blocks are below the size at which sled moves its leaves to files of their own. Those files
//! would each need an fsync, are leaked by crashes, and do not count towards sled's cache limit.
//!
//! # Order
//!
//! Blocks, sync; root, sync; its generation noted in a file of its own; only then is what the new
//! root no longer names removed. At opening, the newest root counts. If it is damaged, if one of
//! its blocks is, or if it is older than the generation noted (sled takes damage in its log for
//! its end, and goes back to an older state as a whole without a word), then the store is
//! unusable: the caller moves it aside and rebuilds from snapshot and log.
//!
//! # Caveats
//!
//! - The disk holds up to three times the live records (four during a fold), and sled needs about
//!   half as much again; a load reads up to three times the live records.
//! - Blocks are verified as they are read: [`load`](CheckpointStore::load), not opening, finds a
//!   damaged one.

mod block;
#[cfg(test)]
mod faulty;
mod fold;
mod root;
mod run;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;

pub use self::block::{BlockStore, StoreError};
use self::block::{block_key, blocks_end, generation_of, root_key, roots_end, run_of};
use self::fold::Fold;
use self::root::Root;
pub use self::root::{CheckpointRoot, HEADER_BYTES_MAX};
pub use self::run::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use self::run::{Merge, Run, RunWriter};
use super::outside::explain;
use super::sled::{SledError, SledStore};
use super::snapshot::SnapshotError;

/// Largest payload of a block, in bytes: seventeen such in one leaf stay below the 128 KiB at
/// which sled 0.34 moves a leaf to a file of its own.
pub const BLOCK_BYTES_MAX: usize = 7_160;
/// Blocks of garbage removed per block written, so that removal keeps up and never piles up.
const RECLAIM_PER_BLOCK: usize = 3;
/// Blocks of garbage removed by any checkpoint.
const RECLAIM_MIN: usize = 256;
/// Keys asked for at once.
const KEYS_AT_ONCE: usize = 64;
/// Stores set aside that are kept for whoever wants to look into it.
const SET_ASIDE_MAX: usize = 2;

/// How a checkpoint store works.
#[derive(Debug, Clone)]
pub struct CheckpointOptions {
    /// Payload of a block, in bytes: 1 to [`BLOCK_BYTES_MAX`].
    pub block_bytes: usize,
    /// What sled may cache, in bytes. Blocks are written once and read once, so a cache gains
    /// nothing beyond the few leaves that are being written.
    pub cache_bytes: u64,
}

impl Default for CheckpointOptions {
    fn default() -> Self {
        Self { block_bytes: BLOCK_BYTES_MAX, cache_bytes: 8 * 1024 * 1024 }
    }
}

/// Why a checkpoint store was not opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// What is there cannot be relied on: [`set_aside`] and rebuild.
    #[error("the checkpoint is unusable: {reason}")]
    Unusable {
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing is known to be wrong with what is there, but it cannot be reached: disk full, too
    /// many open files, no permission, another process has it.
    #[error("the checkpoint cannot be opened: {reason}")]
    Outside {
        /// What stands in the way, and what removes it.
        reason: String,
    },
}

impl From<CheckpointError> for OpenError {
    fn from(error: CheckpointError) -> Self {
        let (is_outside, reason) = (error.is_outside(), error.to_string());
        if is_outside { Self::Outside { reason } } else { Self::Unusable { reason } }
    }
}

/// Why a checkpoint was not read or written.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The store does not hold what its root names: as good as [`OpenError::Unusable`].
    #[error("the checkpoint is damaged: {reason}")]
    Corrupt {
        /// What is wrong with it.
        reason: String,
    },
    /// The store beneath failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An earlier write failed, and nothing is known about the store since.
    #[error("an earlier checkpoint failed")]
    Poisoned,
    /// A record beyond [`KEY_BYTES_MAX`] or [`VALUE_BYTES_MAX`].
    #[error("a record is too large: {key} bytes of key, {value} bytes of value")]
    RecordTooLarge {
        /// Bytes of the key.
        key: usize,
        /// Bytes of the value.
        value: usize,
    },
    /// A header beyond [`HEADER_BYTES_MAX`].
    #[error("the header is too large: {bytes} bytes")]
    HeaderTooLarge {
        /// Bytes of the header.
        bytes: usize,
    },
    /// Records to replace the state with did not come in ascending order of distinct keys.
    #[error("the records to be installed are not in ascending order")]
    Unordered,
    /// The snapshot that was being installed could not be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Whoever received the records could not go on.
    #[error("{0}")]
    Record(String),
}

impl CheckpointError {
    /// Whether nothing is known to be wrong with what is stored.
    pub fn is_outside(&self) -> bool {
        match self {
            Self::Store(error) => error.is_outside,
            Self::Snapshot(error) => error.is_outside(),
            _ => false,
        }
    }
}

/// Receives records: key and value. An error ends the reading and is handed through.
pub type RecordSink<'a> = dyn FnMut(&[u8], &[u8]) -> Result<(), CheckpointError> + 'a;

/// What one checkpoint did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckpointStatistics {
    /// Distinct keys that changed.
    pub changes: u64,
    /// Bytes of the changed records.
    pub change_bytes: u64,
    /// Bytes of records read for folding.
    pub folded_bytes: u64,
    /// Runs that make up the checkpoint.
    pub runs: u64,
    /// Bytes of records in those runs, outdated ones included.
    pub run_bytes: u64,
}

/// The checkpoints of one state. Belongs to one thread.
///
/// - `runs` is what the newest durable root names, oldest first.
/// - Every run in the store whose id is not in `runs` is in `garbage`, or the target of `fold`.
/// - A run in `garbage` is removed only when nothing else refers to it: a [`FrozenCheckpoint`]
///   does. Only this struct hands out references, so their number cannot rise from one.
/// - `next_run` is above every id that was ever written since opening or found at opening.
pub struct CheckpointStore {
    store: Arc<dyn BlockStore>,
    options: CheckpointOptions,
    root: Option<CheckpointRoot>,
    runs: Vec<Arc<Run>>,
    next_run: u64,
    fold: Option<(u64, Fold)>,
    garbage: VecDeque<Arc<Run>>,
    poisoned: bool,
}

impl CheckpointStore {
    /// Opens the store in the directory, or creates it, with the root of its newest checkpoint.
    ///
    /// # Errors
    /// [`OpenError::Unusable`] when sled will not open or the root is damaged. Blocks are verified
    /// by [`load`](Self::load).
    pub fn open(
        directory: &Path,
        options: CheckpointOptions,
    ) -> Result<(Self, Option<CheckpointRoot>), OpenError> {
        let store =
            SledStore::open(directory, options.cache_bytes).map_err(|error| match error {
                SledError::Unusable(reason) => OpenError::Unusable { reason },
                SledError::Io(error) => OpenError::Outside { reason: explain(&error) },
            })?;
        Ok(Self::over(Arc::new(store), options)?)
    }

    /// Opens what is in the given store.
    ///
    /// # Errors
    /// The store fails, or its newest root is damaged.
    pub fn over(
        store: Arc<dyn BlockStore>,
        mut options: CheckpointOptions,
    ) -> Result<(Self, Option<CheckpointRoot>), CheckpointError> {
        options.block_bytes = options.block_bytes.clamp(1, BLOCK_BYTES_MAX);
        let root = newest_root(store.as_ref())?;
        let generation = root.as_ref().map_or(0, |root| root.public.generation);
        let acknowledged = store.acknowledged()?;
        if generation < acknowledged {
            let reason = format!("it went back from generation {acknowledged} to {generation}");
            return Err(CheckpointError::Corrupt { reason });
        }
        let (root, runs, next_run) = match root {
            Some(Root { public, runs, next_run }) => (Some(public), runs, next_run),
            None => (None, Vec::new(), 0),
        };
        let garbage = unnamed_runs(store.as_ref(), &runs)?;
        // An id whose blocks may still be about is not used again.
        let next_run = garbage.back().map_or(next_run, |run| next_run.max(run.id + 1));
        let runs = runs.into_iter().map(Arc::new).collect();
        let found = root.clone();
        let checkpoints =
            Self { store, options, root, runs, next_run, fold: None, garbage, poisoned: false };
        Ok((checkpoints, found))
    }

    /// Hands every record of the newest checkpoint to `record`, in ascending order of keys, and
    /// returns its root; `None` if there is no checkpoint yet.
    ///
    /// # Errors
    /// [`CheckpointError::Corrupt`] when what the root names is not there as it was written. It
    /// can come after all records were given: what was built of them must be dropped then.
    pub fn load(
        &self,
        record: &mut RecordSink<'_>,
    ) -> Result<Option<CheckpointRoot>, CheckpointError> {
        let Some(root) = &self.root else { return Ok(None) };
        stream(&self.store, &self.runs, record)?;
        Ok(Some(root.clone()))
    }

    /// Writes one checkpoint: the newest one plus `changes`, where `None` removes a key. Of
    /// several changes to one key the last holds. Returns once it is durable.
    ///
    /// # Errors
    /// After any error the store is poisoned: whether the checkpoint is durable is unknown, and
    /// the node must halt.
    pub fn write(
        &mut self,
        changes: &mut dyn Iterator<Item = (Bytes, Option<Bytes>)>,
        index: u64,
        header: Bytes,
    ) -> Result<(CheckpointRoot, CheckpointStatistics), CheckpointError> {
        self.begin()?;
        let mut statistics = CheckpointStatistics::default();
        let mut runs = self.runs.clone();
        let mut written = 0;
        if let Some(run) = self.write_changes(changes)? {
            statistics.changes = run.records;
            statistics.change_bytes = run.bytes;
            written += run.blocks;
            runs.push(Arc::new(run));
        }
        let (outdated, blocks) =
            self.fold(&mut runs, statistics.change_bytes, &mut statistics.folded_bytes)?;
        written += blocks;
        let root = self.publish(runs, outdated, index, header)?;
        self.reclaim(written as usize * RECLAIM_PER_BLOCK + RECLAIM_MIN)?;
        statistics.runs = self.runs.len() as u64;
        statistics.run_bytes = self.runs.iter().map(|run| run.bytes).sum();
        self.poisoned = false;
        Ok((root, statistics))
    }

    /// Replaces the whole state by the records of a snapshot, which come in ascending order of
    /// distinct keys. Until this has returned, the old checkpoint or the new one is found.
    ///
    /// # Errors
    /// As [`write`](Self::write); [`CheckpointError::Unordered`].
    pub fn replace(
        &mut self,
        records: &mut dyn Iterator<Item = Result<(Bytes, Bytes), SnapshotError>>,
        index: u64,
        header: Bytes,
    ) -> Result<CheckpointRoot, CheckpointError> {
        self.begin()?;
        if let Some((id, fold)) = self.fold.take() {
            drop(fold);
            self.garbage.push_back(Arc::new(unknown_run(id)));
        }
        let mut writer = self.new_run();
        let mut last: Option<Bytes> = None;
        for record in records {
            let (key, value) = record?;
            if last.as_ref().is_some_and(|last| *last >= key) {
                return Err(CheckpointError::Unordered);
            }
            writer.push(&key, Some(&value))?;
            last = Some(key);
        }
        let run = writer.finish()?;
        let written = run.blocks as usize;
        let runs = if run.records == 0 { vec![] } else { vec![Arc::new(run)] };
        let outdated = self.runs.clone();
        let root = self.publish(runs, outdated, index, header)?;
        self.reclaim(written * RECLAIM_PER_BLOCK + RECLAIM_MIN)?;
        self.poisoned = false;
        Ok(root)
    }

    /// The newest checkpoint, to be read by another thread while writing goes on here. It keeps
    /// its runs on disk for as long as it lives; nothing waits for it. `None` before the first.
    pub fn freeze(&self) -> Option<FrozenCheckpoint> {
        let root = self.root.clone()?;
        Some(FrozenCheckpoint { store: self.store.clone(), root, runs: self.runs.clone() })
    }

    /// The root of the newest checkpoint.
    pub fn root(&self) -> Option<&CheckpointRoot> {
        self.root.as_ref()
    }

    /// Bytes that the store takes up on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.store.disk_bytes()
    }

    /// From here until the work is done, whatever ends it early leaves the store poisoned.
    fn begin(&mut self) -> Result<(), CheckpointError> {
        if self.poisoned {
            return Err(CheckpointError::Poisoned);
        }
        self.poisoned = true;
        Ok(())
    }

    fn new_run(&mut self) -> RunWriter {
        let id = self.next_run;
        self.next_run += 1;
        RunWriter::new(self.store.clone(), id, self.options.block_bytes)
    }

    fn write_changes(
        &mut self,
        changes: &mut dyn Iterator<Item = (Bytes, Option<Bytes>)>,
    ) -> Result<Option<Run>, CheckpointError> {
        let mut changes: Vec<_> = changes.collect();
        // Stable, so that of one key's changes the last stays last; free if they come in order.
        changes.sort_by(|(left, _), (right, _)| left.cmp(right));
        let lowest = self.runs.is_empty();
        let mut writer = self.new_run();
        let mut changes = changes.into_iter().peekable();
        while let Some((key, value)) = changes.next() {
            if changes.peek().is_some_and(|(next, _)| *next == key) {
                continue;
            }
            if !(lowest && value.is_none()) {
                writer.push(&key, value.as_deref())?;
            }
        }
        let run = writer.finish()?;
        Ok((run.records > 0).then_some(run))
    }

    /// Advances the fold under way, or begins one. When it is finished, puts its result into
    /// `runs` and returns those whose place it takes, with the number of blocks written.
    fn fold(
        &mut self,
        runs: &mut Vec<Arc<Run>>,
        change_bytes: u64,
        folded: &mut u64,
    ) -> Result<(Vec<Arc<Run>>, u32), CheckpointError> {
        let (id, mut fold) = match self.fold.take() {
            Some(fold) => fold,
            None => {
                let Some(range) = fold::choose(runs) else { return Ok((vec![], 0)) };
                let (id, lowest) = (self.next_run, range.start == 0);
                let writer = self.new_run();
                (id, Fold::new(&self.store, runs[range].to_vec(), lowest, writer)?)
            }
        };
        let before = fold.blocks();
        if !fold.advance(change_bytes, folded)? {
            let written = fold.blocks() - before;
            self.fold = Some((id, fold));
            return Ok((vec![], written));
        }
        let (sources, run) = fold.finish()?;
        let written = run.blocks - before;
        let start = runs.iter().position(|run| run.id == sources[0].id);
        let start = start.expect("the runs being folded stay in the list until they are");
        let place = start..start + sources.len();
        assert_eq!(runs[place.clone()], sources[..], "what is folded lies side by side");
        runs.splice(place, (run.records > 0).then(|| Arc::new(run)));
        Ok((sources, written))
    }

    /// Makes `runs` the newest checkpoint, durably, and `outdated` garbage.
    fn publish(
        &mut self,
        runs: Vec<Arc<Run>>,
        outdated: Vec<Arc<Run>>,
        index: u64,
        header: Bytes,
    ) -> Result<CheckpointRoot, CheckpointError> {
        let generation = self.root.as_ref().map_or(0, |root| root.generation) + 1;
        let public = CheckpointRoot { generation, index, header };
        let named = runs.iter().map(|run| Run::clone(run)).collect();
        let root = Root { public: public.clone(), runs: named, next_run: self.next_run };
        let bytes = root.encode()?;
        self.store.sync()?;
        self.store.insert(&root_key(generation), &bytes)?;
        self.store.sync()?;
        self.store.acknowledge(generation)?;
        if generation > 1 {
            self.store.remove(&root_key(generation - 1))?;
        }
        self.runs = runs;
        self.root = Some(public.clone());
        self.garbage.extend(outdated);
        Ok(public)
    }

    /// Removes up to `budget` blocks that no checkpoint needs any more.
    fn reclaim(&mut self, mut budget: usize) -> Result<(), StoreError> {
        for _ in 0..self.garbage.len() {
            let Some(run) = self.garbage.pop_front() else { break };
            let id = run.id;
            if let Err(pinned) = Arc::try_unwrap(run) {
                self.garbage.push_back(pinned);
                continue;
            }
            loop {
                let limit = KEYS_AT_ONCE.min(budget);
                if limit == 0 {
                    self.garbage.push_front(Arc::new(unknown_run(id)));
                    return Ok(());
                }
                let range = block_key(id, 0);
                let keys = self.store.keys(&range[..]..&block_key(id + 1, 0)[..], limit)?;
                for key in &keys {
                    self.store.remove(key)?;
                }
                budget -= keys.len();
                if keys.len() < limit {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// A finished checkpoint that stays readable while later ones are written.
pub struct FrozenCheckpoint {
    store: Arc<dyn BlockStore>,
    root: CheckpointRoot,
    runs: Vec<Arc<Run>>,
}

impl FrozenCheckpoint {
    /// Which checkpoint it is.
    pub fn root(&self) -> &CheckpointRoot {
        &self.root
    }

    /// Hands every record to `record`, in ascending order of keys.
    ///
    /// # Errors
    /// As [`CheckpointStore::load`].
    pub fn records(&self, record: &mut RecordSink<'_>) -> Result<(), CheckpointError> {
        stream(&self.store, &self.runs, record)
    }
}

fn stream(
    store: &Arc<dyn BlockStore>,
    runs: &[Arc<Run>],
    record: &mut RecordSink<'_>,
) -> Result<(), CheckpointError> {
    let mut merge = Merge::new(store, runs)?;
    let mut live = |key: &[u8], value: Option<&[u8]>| match value {
        Some(value) => record(key, value),
        None => Ok(()),
    };
    while merge.step(&mut live)?.is_some() {}
    Ok(())
}

/// Decodes the newest root, and removes older ones that a crash left behind.
fn newest_root(store: &dyn BlockStore) -> Result<Option<Root>, CheckpointError> {
    let (start, end) = (root_key(0), roots_end());
    let mut newest: Option<u64> = None;
    loop {
        let from = newest.map_or(start, |generation| root_key(generation.saturating_add(1)));
        let keys = store.keys(&from[..]..&end[..], KEYS_AT_ONCE)?;
        for key in &keys {
            let generation = generation_of(key).ok_or_else(|| CheckpointError::Corrupt {
                reason: "a key among the roots is none of ours".into(),
            })?;
            if let Some(older) = newest.replace(generation) {
                store.remove(&root_key(older))?;
            }
        }
        if keys.len() < KEYS_AT_ONCE {
            break;
        }
    }
    let Some(generation) = newest else { return Ok(None) };
    let mut bytes = Vec::new();
    if !store.read(&root_key(generation), &mut bytes)? {
        return Err(CheckpointError::Corrupt { reason: "the root is gone".into() });
    }
    Root::decode(generation, &bytes).map(Some)
}

/// Runs in the store that are not named: of checkpoints that were not finished, and outdated
/// ones that were not removed in time. Only looks into the gaps between the named ones.
fn unnamed_runs(
    store: &dyn BlockStore,
    named: &[Run],
) -> Result<VecDeque<Arc<Run>>, CheckpointError> {
    let mut ids: Vec<u64> = named.iter().map(|run| run.id).collect();
    ids.sort_unstable();
    let mut garbage = VecDeque::new();
    let mut from = 0;
    for gap_end in ids.into_iter().map(Some).chain([None]) {
        loop {
            let end = gap_end.map_or(blocks_end().to_vec(), |id| block_key(id, 0).to_vec());
            let keys = store.keys(&block_key(from, 0)[..]..&end[..], 1)?;
            let Some(key) = keys.first() else { break };
            let id = run_of(key).filter(|id| *id < u64::MAX).ok_or_else(|| {
                CheckpointError::Corrupt { reason: "a key among the blocks is none of ours".into() }
            })?;
            garbage.push_back(Arc::new(unknown_run(id)));
            from = id + 1;
        }
        if let Some(id) = gap_end {
            from = id + 1;
        }
    }
    Ok(garbage)
}

/// A run of which nothing but the id matters any more.
fn unknown_run(id: u64) -> Run {
    Run { id, blocks: 0, records: 0, bytes: 0, checksum: 0 }
}

/// Moves an unusable store aside, to `<directory>.broken-<n>`, and returns where it went. Of
/// those set aside only the newest few are kept. The store must not be open.
///
/// # Errors
/// Whatever the file system says.
pub fn set_aside(directory: &Path) -> std::io::Result<PathBuf> {
    let parent = directory.parent().unwrap_or(Path::new("."));
    let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let prefix = format!("{name}.broken-");
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(parent)? {
        let entry = entry?.file_name();
        let number = entry.to_str().and_then(|entry| entry.strip_prefix(&prefix));
        numbers.extend(number.and_then(|number| number.parse::<u64>().ok()));
    }
    numbers.sort_unstable();
    let next = numbers.last().map_or(1, |newest| newest.saturating_add(1));
    let place = |number: u64| parent.join(format!("{prefix}{number}"));
    std::fs::rename(directory, place(next))?;
    super::durable::sync_directory(parent)?;
    let surplus = (numbers.len() + 1).saturating_sub(SET_ASIDE_MAX);
    for number in &numbers[..surplus] {
        std::fs::remove_dir_all(place(*number))?;
    }
    Ok(place(next))
}
