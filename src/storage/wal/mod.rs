//! The write-ahead log: what makes an acknowledged write survive.
//!
//! It is a list of opaque records under consecutive indexes, with three opaque words beside it
//! (`vote`, `committed`, `purged`); what they mean is Raft's business. Everything goes through one
//! ordered queue to one thread:
//!
//! ```text
//! append, save_vote, truncate, purge ──► queue ──► [ one batch: one write, one sync ] ──► done
//! save_committed (wakes nobody) ───────►
//! ```
//!
//! 1. A call puts its operation in the queue, and its records in the log in memory, where they can
//!    be read at once. It never waits for the disk.
//! 2. The thread takes whatever queued while its last sync ran, encodes it as one batch, writes
//!    and syncs it. No write waits for a timer: one alone costs one sync, a crowd shares one.
//! 3. The completions run on that thread, in order.
//! 4. When nothing has come for [`WalOptions::idle_after`], the thread seals the log with a batch
//!    that promises nothing, so that damage to the last one that does is told from a torn write,
//!    and has the [floor](floor) noted.
//!
//! On disk the log is a chain of [segments](segment), each a sequence of [batches](batch). The
//! first batch of a segment repeats the vote, `committed` and `purged`, so a segment can be removed
//! as soon as all its records are purged. The next segment is prepared, and purged ones are
//! removed, [on a thread of their own](supply). What a start makes of all that is told in
//! [`recovery`].
//!
//! When a write or sync fails, the log stops for good: what the disk holds is unknown, and a retry
//! that succeeds would prove nothing. Everything queued then or later gets the error.
//!
//! Caveats:
//! - The last batch of a log that was neither [closed](Wal::close) nor idle before it ended is
//!   believed to be torn when it is damaged, and cut off. Only what [`WalOptions::must_contain`],
//!   `committed` or the floor vouch for is refused instead.
//! - The queue is not bounded here. Its callers are: Raft bounds what it has in flight.
//! - A cached record keeps the whole buffer alive of which its `Bytes` are a part.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::storage::file::Files;
use crate::storage::thread::ThreadWatch;

mod batch;
mod error;
mod floor;
mod log;
mod reader;
mod recovery;
mod segment;
mod statistics;
mod supply;
#[cfg(test)]
mod tests;
mod words;
mod writer;

pub use self::error::WalError;
use self::error::io_error;
use self::log::Log;
use self::segment::Segment;
use self::statistics::Counters;
use self::supply::Supply;
use self::writer::Writer;

/// Largest `vote`, `committed` and purge marker, in bytes: they are repeated in every segment.
pub const BLOB_BYTES_MAX: usize = 1024;
/// Largest header of a record, in bytes.
pub const RECORD_HEADER_BYTES_MAX: usize = 255;
/// Largest batch, in bytes, of which a single record may take almost all.
const BATCH_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// What a batch leaves free for its header and for the words repeated at the start of a segment.
const BATCH_RESERVED_BYTES: u64 = 4096;
/// Smallest segment, in bytes: for tests.
const SEGMENT_BYTES_MIN: u64 = 16 * 1024;
/// Largest, so that an offset in one fits 32 bits.
const SEGMENT_BYTES_MAX: u64 = 1 << 31;

/// How to open a log.
#[derive(Clone, Debug)]
pub struct WalOptions {
    /// Bytes of a new segment: 16 KiB to 2 GiB, rounded up to whole blocks.
    pub segment_bytes: u64,
    /// Highest index of which there is proof elsewhere that it was once acknowledged, such as the
    /// checkpoint. A log that ends before it has lost something and is refused. 0 means none.
    pub must_contain: u64,
    /// Bytes of the newest records that are kept in memory, roughly.
    pub cache_bytes_max: usize,
    /// How long nothing may come before the log counts as idle and is sealed. In a log that is
    /// never idle the floor is noted once in ten times this.
    pub idle_after: Duration,
    /// Salt of new segments; drawn at random unless a simulation sets it.
    pub salt: Option<u64>,
    /// Told when the log stops by itself: its disk has failed, or one of its threads is gone.
    pub threads: ThreadWatch,
}

impl Default for WalOptions {
    fn default() -> WalOptions {
        WalOptions {
            segment_bytes: 16 * 1024 * 1024,
            must_contain: 0,
            cache_bytes_max: 32 * 1024 * 1024,
            idle_after: Duration::from_millis(100),
            salt: None,
            threads: ThreadWatch::default(),
        }
    }
}

/// Runs once, when its operation is on disk or never will be. On the log's thread, so it must be
/// quick and must not panic; on the caller's, before the call returns, if the operation is refused
/// or the log has stopped. It may call the log again, but for `close`.
pub type Completion = Box<dyn FnOnce(Result<(), WalError>) + Send>;

/// One entry of the log. It has two parts so that a large payload need not be copied to be
/// prefixed; they come back as they went in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalRecord {
    /// At most [`RECORD_HEADER_BYTES_MAX`].
    pub header: Bytes,
    /// With the header, at most [`Wal::record_bytes_max`].
    pub payload: Bytes,
}

impl WalRecord {
    /// Bytes of both parts.
    pub fn bytes(&self) -> usize {
        self.header.len() + self.payload.len()
    }
}

/// What [`Wal::open`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The newest vote.
    pub vote: Option<Bytes>,
    /// The newest `committed`; the log holds its index or has purged it.
    pub committed: Option<Bytes>,
    /// The highest purged index, with its marker.
    pub purged: Option<(u64, Bytes)>,
    /// Index of the first record held, or of the next one if none is.
    pub first_index: u64,
    /// Index of the last record held.
    pub last_index: Option<u64>,
    /// What a crash had left unfinished at the end, now cut off.
    pub repaired_tail: Option<TornTail>,
}

/// Bytes of a batch that a crash interrupted: never acknowledged, now overwritten with zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornTail {
    /// The segment.
    pub file: PathBuf,
    /// Where the log now ends in it.
    pub offset: u64,
    /// Length of what was overwritten.
    pub bytes: u64,
}

/// What the log did and holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalStatistics {
    /// Batches synced since the start.
    pub syncs: u64,
    /// Records synced since the start.
    pub records: u64,
    /// Bytes written since the start, padding included.
    pub bytes: u64,
    /// Median time of a sync, write included, over the last 1024.
    pub sync_p50: Duration,
    /// 99th percentile of the same.
    pub sync_p99: Duration,
    /// Times that a batch had to wait for its segment to be prepared.
    pub segment_waits: u64,
    /// Bytes of all segments that hold anything.
    pub bytes_on_disk: u64,
    /// Bytes of records that wait for their batch.
    pub bytes_queued: u64,
}

/// A handle to the log; clones are cheap and share it. When the last one goes, the log is closed.
#[derive(Clone)]
pub struct Wal {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What callers and the log's thread share.
struct Shared {
    state: Mutex<State>,
    /// Signalled when the idle thread has something to do.
    work: Condvar,
    /// When the write and sync began that are under way.
    sync_begun: Mutex<Option<Instant>>,
    record_bytes_max: usize,
}

/// Everything that callers and the thread both touch, behind one lock that is never held across
/// I/O or a completion. It is as of the end of the queue; the writer has a view of its own that is
/// as of the disk.
struct State {
    queue: Vec<Operation>,
    /// Operations in the queue that are worth waking the thread for.
    urgent: usize,
    bytes_queued: u64,
    idle: bool,
    closing: bool,
    /// Set once the log takes no more operations.
    stopped: Option<WalError>,
    log: Log,
    committed: Option<u64>,
    purged: Option<u64>,
    /// Calls of `append` so far.
    appends: u64,
    /// Segments with batches in them, oldest first.
    segments: Vec<Arc<Segment>>,
    /// Where the next batch will go in the last of them.
    position: u64,
    counters: Counters,
}

/// Why an operation does not get into the queue, and who is to be told.
type Refusal = (WalError, Completion);

/// An operation in the queue.
enum Operation {
    Append {
        number: u64,
        first_index: u64,
        records: std::vec::IntoIter<WalRecord>,
        done: Completion,
    },
    Vote {
        vote: Bytes,
        done: Completion,
    },
    Committed {
        index: u64,
        committed: Bytes,
    },
    Truncate {
        from: u64,
        done: Completion,
    },
    Purge {
        index: u64,
        marker: Bytes,
        done: Completion,
    },
}

impl Wal {
    /// Opens the log in `directory`, or begins one there, and starts its thread. Locking the
    /// directory against a second process is the caller's business.
    ///
    /// `Corrupt` if anything that was acknowledged is, or may be, missing or damaged.
    pub fn open(
        files: Arc<dyn Files>,
        directory: &Path,
        options: WalOptions,
    ) -> Result<(Wal, Recovered), WalError> {
        let threads = options.threads.clone();
        let (shared, recovered, mut writer) = prepare(files, directory, options, true)?;
        let thread = threads
            .spawn("quorate-wal", move || writer.run())
            .map_err(|error| io_error("start a thread for", directory, error))?;
        let handle = Handle { shared, thread: Mutex::new(Some(thread)) };
        Ok((Wal { handle: Arc::new(handle) }, recovered))
    }

    /// Opens the log without a thread: the caller turns the writer's crank.
    #[cfg(test)]
    fn open_by_hand(
        files: Arc<dyn Files>,
        directory: &Path,
        options: WalOptions,
    ) -> Result<(Wal, Recovered, Writer), WalError> {
        let (shared, recovered, writer) = prepare(files, directory, options, false)?;
        let handle = Handle { shared, thread: Mutex::new(None) };
        Ok((Wal { handle: Arc::new(handle) }, recovered, writer))
    }

    /// Queues records under `first_index` and the following; they can be read as soon as this
    /// returns. `first_index` must be the next one, except in a log that never held anything.
    /// One call may end up in several batches, and after a crash in part.
    pub fn append(&self, first_index: u64, records: Vec<WalRecord>, done: Completion) {
        self.handle.shared.submit(done, |state, shared, done| {
            if let Err(refusal) = shared.check_append(state, first_index, &records) {
                return Err((refusal, done));
            }
            state.appends += 1;
            let number = state.appends;
            for (index, record) in (first_index..).zip(&records) {
                state.bytes_queued += record.bytes() as u64;
                state.log.append(index, record.clone(), number);
            }
            Ok(Operation::Append { number, first_index, records: records.into_iter(), done })
        });
    }

    /// Queues a new vote, of at most [`BLOB_BYTES_MAX`].
    pub fn save_vote(&self, vote: Bytes, done: Completion) {
        self.handle.shared.submit(done, |_, _, done| match check_blob(&vote) {
            Ok(()) => Ok(Operation::Vote { vote, done }),
            Err(refusal) => Err((refusal, done)),
        });
    }

    /// Notes that records up to `index` are committed. It is written with the next batch and costs
    /// no sync and no wake-up of its own; until then a crash forgets it. Ignored unless the log
    /// holds or has purged `index`, if it is lower than before, or if it exceeds
    /// [`BLOB_BYTES_MAX`].
    pub fn save_committed(&self, index: u64, committed: Bytes) {
        let mut state = self.handle.shared.lock();
        let held = state.log.next().is_some_and(|next| index < next);
        let lower = state.committed.is_some_and(|before| index < before);
        if state.stopped.is_some() || !held || lower || check_blob(&committed).is_err() {
            return;
        }
        state.committed = Some(index);
        let operation = Operation::Committed { index, committed };
        match state.queue.last_mut() {
            Some(last @ Operation::Committed { .. }) => *last = operation,
            _ => state.queue.push(operation),
        }
    }

    /// Drops the records behind `index`. Refused if `committed` or a purge says that they stay.
    pub fn truncate_after(&self, index: u64, done: Completion) {
        self.truncate_from(index.saturating_add(1), done);
    }

    /// Drops the records from `index` on: with 0, or the first index, all of them. Refused if
    /// `committed` or a purge says that they stay.
    pub fn truncate_from(&self, index: u64, done: Completion) {
        self.handle.shared.submit(done, |state, _, done| {
            let kept = state.committed.max(state.purged);
            if kept.is_some_and(|kept| index <= kept) {
                let refusal = format!("records from {index} on cannot go: {kept:?} is final");
                return Err((WalError::Refused(refusal), done));
            }
            let (first, next) = (state.log.first().unwrap_or(0), state.log.next().unwrap_or(0));
            let from = index.clamp(first, next);
            state.log.truncate_from(from);
            Ok(Operation::Truncate { from, done })
        });
    }

    /// Drops the records up to and including `index`, which may lie behind the last one: the log
    /// then goes on at `index + 1`. Their files are removed after this is on disk. Changes nothing
    /// if as much is purged already.
    pub fn purge_to(&self, index: u64, marker: Bytes, done: Completion) {
        self.handle.shared.submit(done, |state, _, done| {
            if let Err(refusal) = check_blob(&marker).and_then(|()| check_index(index)) {
                return Err((refusal, done));
            }
            state.log.purge_to(index);
            state.purged = state.purged.max(Some(index));
            Ok(Operation::Purge { index, marker, done })
        });
    }

    /// Index of the first record held, or of the next one if none is.
    pub fn first_index(&self) -> u64 {
        self.handle.shared.lock().log.first().unwrap_or(0)
    }

    /// Index of the last record held, on disk or not yet.
    pub fn last_index(&self) -> Option<u64> {
        self.handle.shared.lock().log.last()
    }

    /// Largest record that fits this log, in bytes of header and payload together: close to 8 MiB
    /// unless segments are smaller.
    pub fn record_bytes_max(&self) -> usize {
        self.handle.shared.record_bytes_max
    }

    /// Records of `range`, as far as the log holds them, in order and without gaps: at least one if
    /// it holds one, then as many as stay within `bytes_max` (headers and payloads). The first is
    /// always at `range.start`; if that is gone, nothing is read: `Purged`.
    ///
    /// Reads the disk for records that are not in memory any more, and verifies them: `Corrupt` or
    /// `Io` stop nobody else. Fails also once the log has failed.
    pub fn read(&self, range: Range<u64>, bytes_max: usize) -> Result<Vec<WalRecord>, WalError> {
        let (found, segments) = {
            let state = self.handle.shared.lock();
            match &state.stopped {
                None | Some(WalError::Closed) => {}
                Some(error) => return Err(error.clone()),
            }
            match state.log.first() {
                Some(first) if range.start < first && !range.is_empty() => {
                    return Err(WalError::Purged { asked: range.start, first });
                }
                _ => {}
            }
            let found = state.log.find(range, bytes_max);
            let segments = reader::segments_of(&found.located, &state.segments);
            (found, segments)
        };
        let mut records = reader::read(&found.located, &segments)?;
        records.extend(found.cached);
        Ok(records)
    }

    /// Bytes of log behind `index`, on disk or queued: about what a restart has to read that has
    /// everything up to `index` already.
    pub fn bytes_after(&self, index: u64) -> u64 {
        let state = self.handle.shared.lock();
        let Some(next) = state.log.next() else { return 0 };
        let location = state.log.location(index.saturating_add(1));
        let from = match location {
            Some(location) => (location.segment, u64::from(location.offset)),
            None if index.saturating_add(1) >= next => return 0,
            None if state.log.first().is_some_and(|first| index < first) => (0, 0),
            None => return state.bytes_queued,
        };
        let on_disk = state.segments.iter().map(|segment| match segment.number {
            number if number < from.0 => 0,
            number if number == from.0 => segment.length - from.1,
            _ => segment.length,
        });
        let behind_end = state.segments.last().map_or(0, |last| last.length - state.position);
        on_disk.sum::<u64>().saturating_sub(behind_end) + state.bytes_queued
    }

    /// What the log did and holds.
    pub fn statistics(&self) -> WalStatistics {
        let state = self.handle.shared.lock();
        WalStatistics {
            bytes_on_disk: state.segments.iter().map(|segment| segment.length).sum(),
            bytes_queued: state.bytes_queued,
            ..state.counters.statistics()
        }
    }

    /// The longest that a sync has taken, write included, since this was last asked; one that is
    /// under way counts with what it has taken so far.
    pub fn take_slowest_sync(&self) -> Duration {
        let shared = &self.handle.shared;
        let begun = *shared.sync_begun.lock().unwrap_or_else(PoisonError::into_inner);
        let under_way = begun.map(|begun| begun.elapsed()).unwrap_or_default();
        shared.lock().counters.take_slowest().max(under_way)
    }

    /// Writes and syncs what is queued, marks the end as complete, and ends the thread. Operations
    /// that come later get `Closed`; records can still be read. Blocks on the disk; not to be
    /// called from a completion.
    pub fn close(&self) {
        self.handle.close();
    }
}

/// Whether there is a log in this directory: at least one segment. A segment that is still being
/// prepared is none.
pub fn is_present(directory: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(directory) else { return false };
    let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.any(|name| segment::number_of(&name).is_some())
}

impl fmt::Debug for Wal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Wal").field("last_index", &self.last_index()).finish()
    }
}

impl Handle {
    fn close(&self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_one();
        let mut slot = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = slot.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic of the thread has been told to everybody who waited: `Stopped`.
            let _ = thread.join();
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues what `build` makes of the state, and wakes the thread if it sleeps.
    fn submit(
        &self,
        done: Completion,
        build: impl FnOnce(&mut State, &Shared, Completion) -> Result<Operation, Refusal>,
    ) {
        let mut state = self.lock();
        let outcome = match &state.stopped {
            Some(error) => Err((error.clone(), done)),
            None => build(&mut state, self, done),
        };
        match outcome {
            Ok(operation) => {
                state.queue.push(operation);
                state.urgent += 1;
                let wake = std::mem::take(&mut state.idle);
                drop(state);
                // While it writes, the thread looks at the queue by itself: no need for a call
                // into the kernel.
                if wake {
                    self.work.notify_one();
                }
            }
            Err((error, done)) => {
                drop(state);
                done(Err(error));
            }
        }
    }

    fn check_append(
        &self,
        state: &State,
        first_index: u64,
        records: &[WalRecord],
    ) -> Result<(), WalError> {
        if let Some(next) = state.log.next()
            && next != first_index
        {
            let refusal = format!("record {first_index} cannot follow: {next} is next");
            return Err(WalError::Refused(refusal));
        }
        check_index(first_index.saturating_add(records.len() as u64))?;
        for record in records {
            if record.header.len() > RECORD_HEADER_BYTES_MAX
                || record.bytes() > self.record_bytes_max
            {
                let (header, payload) = (record.header.len(), record.payload.len());
                let (header_max, bytes_max) = (RECORD_HEADER_BYTES_MAX, self.record_bytes_max);
                let refusal = format!(
                    "a record of {header} + {payload} bytes; the most is {header_max}, and \
                     {bytes_max} together"
                );
                return Err(WalError::Refused(refusal));
            }
        }
        Ok(())
    }
}

impl Operation {
    fn into_completion(self) -> Option<Completion> {
        match self {
            Operation::Append { done, .. }
            | Operation::Vote { done, .. }
            | Operation::Truncate { done, .. }
            | Operation::Purge { done, .. } => Some(done),
            Operation::Committed { .. } => None,
        }
    }
}

fn check_blob(blob: &Bytes) -> Result<(), WalError> {
    if blob.len() <= BLOB_BYTES_MAX {
        return Ok(());
    }
    Err(WalError::Refused(format!("{} bytes; the most is {BLOB_BYTES_MAX}", blob.len())))
}

/// The highest numbers stand for "no index" on disk.
fn check_index(index: u64) -> Result<(), WalError> {
    if index < u64::MAX - 1 { Ok(()) } else { Err(WalError::Refused(format!("index {index}"))) }
}

/// Recovers a log and puts together what its thread will need.
fn prepare(
    files: Arc<dyn Files>,
    directory: &Path,
    options: WalOptions,
    supply_thread: bool,
) -> Result<(Arc<Shared>, Recovered, Writer), WalError> {
    let segment_bytes = options.segment_bytes.next_multiple_of(batch::BLOCK_BYTES as u64);
    if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment_bytes) {
        return Err(WalError::Refused(format!("segments of {segment_bytes} bytes")));
    }
    let salt = match options.salt {
        Some(salt) => salt,
        None => getrandom::u64().map_err(|error| {
            io_error("draw a salt for", directory, io::Error::other(error.to_string()))
        })?,
    };
    let recovery = recovery::recover(&*files, directory, &options)?;
    let shop = supply::Workshop::new(files, directory, salt, segment_bytes, recovery.notebook);
    let threads = supply_thread.then_some(&options.threads);
    let mut supply = Supply::new(shop, recovery.next_segment, recovery.spares, threads)?;

    let mut spans = recovery.spans;
    let mut position = recovery.position;
    if spans.is_empty() {
        spans.push_back(writer::Span { segment: supply.take()?, highest: None });
        position = segment::FIRST_BATCH;
    }
    let batch_bytes_max = BATCH_BYTES_MAX.min(segment_bytes - segment::FIRST_BATCH);
    let room = (batch_bytes_max - BATCH_RESERVED_BYTES) as usize;
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            queue: Vec::new(),
            urgent: 0,
            bytes_queued: 0,
            idle: false,
            closing: false,
            stopped: None,
            log: recovery.log,
            committed: recovery.words.committed.as_ref().map(|(index, _)| *index),
            purged: recovery.words.purged.as_ref().map(|(index, _)| *index),
            appends: 0,
            segments: spans.iter().map(|span| Arc::clone(&span.segment)).collect(),
            position,
            counters: Counters::default(),
        }),
        work: Condvar::new(),
        sync_begun: Mutex::new(None),
        record_bytes_max: room - batch::FRAME_BYTES,
    });
    let at = writer::Start {
        spans,
        position,
        sequence: recovery.next_sequence,
        sealed: recovery.sealed,
        noted: recovery.floor,
        idle_after: options.idle_after,
    };
    let mut writer = Writer::new(Arc::clone(&shared), supply, at, recovery.words, room);
    writer.remove_purged();
    Ok((shared, recovery.recovered, writer))
}
