//! What a start makes of the files.
//!
//! The segments are read in order, and every batch must follow from the one before it: next
//! sequence, next index, checksums. Where that ends, it is one of four things:
//!
//! - **The end**: zeros up to the end of this segment and in all that follow.
//! - **The end of a segment**: zeros up to its end, and the log goes on in the next.
//! - **A torn tail**: not zeros, yet nothing valid lies behind, here or in a later segment. The
//!   batch was being written when the power went; as the next one is only written once this one is
//!   synced, it was never acknowledged. It is overwritten with zeros and synced, lest parts of it
//!   ever be taken for something.
//! - **Corruption**: a batch that should be there is not, or is damaged, and a later one proves
//!   that it was once complete. The log is refused, and left as it is. So is a log that ends
//!   before what `must_contain`, its own `committed` or the [floor](super::floor) vouch for, and
//!   one whose batches contradict each other although their checksums are right.
//!
//! The seal, a batch that binds nobody, which a close or a rest leaves behind, makes damage to any
//! acknowledged batch the last kind. Without it, and above the floor, damage to the last batch
//! cannot be told from a torn one.
//!
//! Nothing is changed before all is found good. Then the last batch is made sure of: a process that
//! was killed between write and sync, or by a failed sync, leaves a batch that can be read but may
//! not be on disk. A sync brings it there, unless the kernel believes that it has been written; so
//! the disk is asked past the page cache, and only where it has something else is the batch written
//! once more. One that is on disk is never written to: a power cut in its midst could spoil it.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::batch::{BLOCK_BYTES, FrameEntry, HEADER_BYTES, Header, Kind};
use super::floor::{Floor, Notebook};
use super::log::{Location, Log};
use super::segment::{self, FIRST_BATCH, Segment};
use super::words::Words;
use super::writer::Span;
use super::{BATCH_BYTES_MAX, Recovered, TornTail, WalError, WalOptions, io_error};
use crate::storage::file::{BlockBuffer, Files, create_dir_durably};

/// Bytes of a file that are read at once.
const WINDOW_BYTES: u64 = 4 * 1024 * 1024;

/// A log that is ready to go on.
pub(super) struct Recovery {
    pub(super) recovered: Recovered,
    pub(super) log: Log,
    pub(super) words: Words,
    /// Oldest first, up to the last one that has a batch; empty if the log is.
    pub(super) spans: VecDeque<Span>,
    /// Where the next batch goes in the last of them.
    pub(super) position: u64,
    pub(super) next_sequence: u64,
    /// True if the last batch binds nobody, or there is none.
    pub(super) sealed: bool,
    pub(super) notebook: Notebook,
    pub(super) floor: Floor,
    /// Prepared, and not used yet.
    pub(super) spares: VecDeque<Arc<Segment>>,
    /// Number of the next segment to be prepared.
    pub(super) next_segment: u32,
}

/// Reads the log in `directory`, creating that if need be, and repairs its tail.
pub(super) fn recover(
    files: &dyn Files,
    directory: &Path,
    options: &WalOptions,
) -> Result<Recovery, WalError> {
    let (segments, unfinished) = open_segments(files, directory)?;
    let (notebook, floor) = Notebook::open(files, directory)?;
    let mut scan = Scan::new(segments, options.cache_bytes_max);
    scan.run()?;
    scan.check(directory, options, floor)?;

    for name in unfinished {
        let path = directory.join(name);
        files.remove(&path).map_err(|error| io_error("remove", &path, error))?;
    }
    // The names of segments that an earlier process created without living to sync them.
    files.sync_dir(directory).map_err(|error| io_error("sync", directory, error))?;
    let repaired_tail = scan.repair()?;
    Ok(scan.finish(repaired_tail, notebook, floor))
}

/// Opens all segments, in order, and lists files that were never finished.
fn open_segments(
    files: &dyn Files,
    directory: &Path,
) -> Result<(Vec<Arc<Segment>>, Vec<String>), WalError> {
    let names = create_dir_durably(files, directory).and_then(|()| files.list(directory));
    let names = names.map_err(|error| io_error("open", directory, error))?;
    let mut numbers: Vec<u32> = names.iter().filter_map(|name| segment::number_of(name)).collect();
    numbers.sort_unstable();
    let mut segments = Vec::with_capacity(numbers.len());
    for number in numbers {
        if let Some(before) = segments.last().map(|segment: &Arc<Segment>| segment.number)
            && before + 1 != number
        {
            return Err(WalError::Corrupt {
                file: directory.join(segment::file_name(before + 1)),
                offset: 0,
                reason: format!("the file is missing, yet segment {number} is there"),
            });
        }
        segments.push(Arc::new(Segment::open(files, directory, number)?));
    }
    let unfinished =
        names.into_iter().filter(|name| name.ends_with(segment::UNFINISHED_SUFFIX)).collect();
    Ok((segments, unfinished))
}

/// Where a batch lies.
#[derive(Clone, Copy)]
struct At {
    /// Position in the list of segments.
    segment: usize,
    offset: u64,
    /// Padding included.
    bytes: u64,
}

/// What lies at an offset that may begin a batch.
enum Finding {
    Batch { header: Header, frames: Vec<FrameEntry> },
    Damage(&'static str),
}

struct Scan {
    segments: Vec<Arc<Segment>>,
    /// Highest record index in each.
    highest: Vec<Option<u64>>,
    log: Log,
    words: Words,
    /// Unknown until the first batch says it.
    next_sequence: Option<u64>,
    /// The last good batch.
    last: Option<At>,
    /// True if that binds nobody, or there is none.
    sealed: bool,
    /// Bytes behind the last good batch that are not zeros.
    torn: Option<At>,
    /// The first batch that was found told of records before it.
    began_late: bool,
}

impl Scan {
    fn new(segments: Vec<Arc<Segment>>, cache_bytes_max: usize) -> Scan {
        Scan {
            highest: vec![None; segments.len()],
            segments,
            log: Log::new(cache_bytes_max),
            words: Words::default(),
            next_sequence: None,
            last: None,
            sealed: true,
            torn: None,
            began_late: false,
        }
    }

    fn run(&mut self) -> Result<(), WalError> {
        for position in 0..self.segments.len() {
            let mut window = Window::new(&self.segments[position])?;
            self.scan_segment(position, &mut window)?;
            if self.torn.is_some() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Takes in the batches of one segment, and makes sure of what is behind them.
    fn scan_segment(&mut self, position: usize, window: &mut Window) -> Result<(), WalError> {
        let mut offset = FIRST_BATCH;
        while offset < self.segments[position].length {
            let (header, frames) = match window.batch_at(offset)? {
                Finding::Batch { header, frames } => (header, frames),
                Finding::Damage(reason) => {
                    return self.judge_end(position, offset, reason, window);
                }
            };
            let reason = self.take_in(position, offset, &header, &frames, window)?;
            if let Some(reason) = reason {
                return Err(self.corrupt(position, offset, reason));
            }
            let bytes = header.bytes().next_multiple_of(BLOCK_BYTES as u64);
            self.last = Some(At { segment: position, offset, bytes });
            self.sealed = frames.iter().all(|frame| frame.kind == Kind::Committed);
            offset += bytes;
        }
        Ok(())
    }

    /// Takes in one batch; returns what it contradicts, if anything.
    fn take_in(
        &mut self,
        position: usize,
        offset: u64,
        header: &Header,
        frames: &[FrameEntry],
        window: &mut Window,
    ) -> Result<Option<String>, WalError> {
        let place = header.place;
        match self.next_sequence {
            Some(sequence) if sequence != place.sequence => {
                let reason = format!(
                    "batch {} is here, where {sequence} should be: batches are missing before it",
                    place.sequence
                );
                return Ok(Some(reason));
            }
            Some(_) => {}
            None if self.segments[0].number == 1 && place.sequence != 1 => {
                return Ok(Some(format!("batch {} is the first", place.sequence)));
            }
            None => {
                self.words.next = place.next_index;
                if let Some(index) = place.next_index {
                    self.log.begin(index);
                    self.began_late = true;
                }
            }
        }
        self.next_sequence = Some(place.sequence + 1);
        if place.next_index != self.log.next() {
            return Ok(Some(format!(
                "the batch says that record {:?} is next, where {:?} is",
                place.next_index,
                self.log.next()
            )));
        }
        for frame in frames {
            if let Some(reason) = self.take_in_frame(position, offset, frame, window)? {
                return Ok(Some(reason));
            }
        }
        Ok(None)
    }

    fn take_in_frame(
        &mut self,
        position: usize,
        offset: u64,
        frame: &FrameEntry,
        window: &mut Window,
    ) -> Result<Option<String>, WalError> {
        let index = frame.index;
        let at = offset + u64::from(frame.offset);
        let mut payload = Bytes::new();
        match frame.kind {
            Kind::Record => {
                if let Some(next) = self.log.next()
                    && next != index
                {
                    return Ok(Some(format!("record {index} is here, where {next} should be")));
                }
                let number = self.segments[position].number;
                let place = Location::new(
                    number,
                    at as u32,
                    frame.checksum,
                    frame.header_bytes,
                    frame.bytes,
                );
                self.log.append_located(index, place);
                self.highest[position] = self.highest[position].max(Some(index));
            }
            Kind::Truncate => self.log.truncate_from(index),
            Kind::Purge => self.log.purge_to(index),
            Kind::Vote | Kind::Committed => {}
        }
        if frame.kind != Kind::Record
            && let Some(bytes) = window.get(at, u64::from(frame.bytes))?
        {
            payload = Bytes::copy_from_slice(bytes);
        }
        self.words.apply(frame.kind, index, || payload);
        Ok(None)
    }

    /// Says what kind of end this is; see the module.
    fn judge_end(
        &mut self,
        position: usize,
        offset: u64,
        reason: &str,
        window: &mut Window,
    ) -> Result<(), WalError> {
        let next_sequence = self.next_sequence.unwrap_or(0);
        let end = window.inspect(offset, next_sequence)?;
        let Some(garbage_end) = end.garbage_end else {
            // Only zeros here: whether the log ends or goes on in the next segment, the sequence
            // numbers will tell.
            return Ok(());
        };
        if let Some(later) = end.batch_at {
            let proof = format!("{reason}, and there is a valid batch behind it, at {later}");
            return Err(self.corrupt(position, offset, proof));
        }
        for later in &self.segments[position + 1..] {
            let mut window = Window::new(later)?;
            if let Ok(header) = window.header_at(FIRST_BATCH)?
                && header.place.sequence == next_sequence
            {
                // The log goes on there and nothing is missing: these were spare bytes.
                let file = &self.segments[position].path;
                tracing::warn!(file = %file.display(), offset, "unused bytes are not zeros");
                return Ok(());
            }
            let end = window.inspect(FIRST_BATCH, 0)?;
            if end.garbage_end.is_some() {
                let proof = format!("{reason}, and segment {} has been used since", later.number);
                return Err(self.corrupt(position, offset, proof));
            }
        }
        self.torn = Some(At { segment: position, offset, bytes: garbage_end - offset });
        Ok(())
    }

    /// Refuses a log that is sound in itself but has lost something.
    fn check(&self, directory: &Path, options: &WalOptions, floor: Floor) -> Result<(), WalError> {
        let purged = self.words.purged_index();
        let at_end = |reason: String| {
            let first =
                self.torn.or(self.last.map(|last| At { offset: last.offset + last.bytes, ..last }));
            match first {
                Some(end) => self.corrupt(end.segment, end.offset, reason),
                None => WalError::Corrupt { file: directory.to_owned(), offset: 0, reason },
            }
        };
        if let Some(first) = self.segments.first()
            && first.number > 1
        {
            let begins_at = purged.map(|index| index + 1);
            let missing = self.began_late && self.log.first() != begins_at;
            if missing || self.last.is_none() {
                let reason = format!(
                    "the log begins with record {:?}, but only those before {begins_at:?} were \
                     purged: earlier segments are missing",
                    self.log.first()
                );
                return Err(self.corrupt(0, 0, reason));
            }
        }
        let end = self.log.last().max(purged);
        let sequence = self.next_sequence.map_or(0, |next| next - 1);
        if sequence < floor.sequence {
            let record = |index: Option<u64>| {
                index.map_or("no record".to_owned(), |index| format!("record {index}"))
            };
            return Err(at_end(format!(
                "the log ends with {} (batch {sequence}), but {} (batch {}) was once on disk: \
                 the disk has lost the newest part of it, which was acknowledged",
                record(end),
                record(floor.next_index.checked_sub(1)),
                floor.sequence,
            )));
        }
        if options.must_contain > 0 && end < Some(options.must_contain) {
            return Err(at_end(format!(
                "the log ends with record {end:?}, but {} was once acknowledged",
                options.must_contain
            )));
        }
        if let Some((committed, _)) = &self.words.committed
            && end < Some(*committed)
        {
            return Err(at_end(format!(
                "the log ends with record {end:?}, but {committed} was committed"
            )));
        }
        Ok(())
    }

    /// Overwrites the torn tail, gives cut files their length back, and makes sure that what was
    /// read is on disk.
    fn repair(&mut self) -> Result<Option<TornTail>, WalError> {
        let mut repaired = None;
        if let Some(torn) = self.torn {
            let segment = &self.segments[torn.segment];
            write_zeros(segment, torn.offset, torn.offset + torn.bytes)?;
            repaired = Some(TornTail {
                file: segment.path.clone(),
                offset: torn.offset,
                bytes: torn.bytes,
            });
        }
        let in_use = self.last.map_or(0, |last| last.segment);
        for segment in self.segments.iter().skip(in_use) {
            let length =
                segment.file.len().map_err(|error| io_error("inspect", &segment.path, error))?;
            if length < segment.length {
                write_zeros(segment, length, segment.length)?;
                let bytes = segment.length - length;
                let file = segment.path.clone();
                repaired.get_or_insert(TornTail { file, offset: length, bytes });
            }
        }
        if let Some(last) = self.last {
            let segment = &self.segments[last.segment];
            make_sure_of(segment, last)
                .map_err(|error| io_error("make sure of", &segment.path, error))?;
        }
        Ok(repaired)
    }

    fn finish(self, repaired_tail: Option<TornTail>, notebook: Notebook, floor: Floor) -> Recovery {
        let next_segment = self.segments.last().map_or(1, |last| last.number + 1);
        let used = self.last.map_or(0, |last| last.segment + 1);
        let mut segments = self.segments;
        let spares = segments.split_off(used).into();
        let spans = segments.into_iter().zip(self.highest);
        let spans = spans.map(|(segment, highest)| Span { segment, highest }).collect();
        let recovered = Recovered {
            vote: self.words.vote.clone(),
            committed: self.words.committed.clone().map(|(_, committed)| committed),
            purged: self.words.purged.clone(),
            first_index: self.log.first().unwrap_or(0),
            last_index: self.log.last(),
            repaired_tail,
        };
        Recovery {
            recovered,
            log: self.log,
            words: self.words,
            spans,
            position: self.last.map_or(FIRST_BATCH, |last| last.offset + last.bytes),
            next_sequence: self.next_sequence.unwrap_or(1),
            sealed: self.sealed,
            notebook,
            floor,
            spares,
            next_segment,
        }
    }

    fn corrupt(&self, position: usize, offset: u64, reason: impl Into<String>) -> WalError {
        let file = self.segments[position].path.clone();
        WalError::Corrupt { file, offset, reason: reason.into() }
    }
}

/// Sees to it that a batch that was read is on disk; see the module.
fn make_sure_of(segment: &Segment, batch: At) -> io::Result<()> {
    let (file, bytes) = (&segment.file, batch.bytes as usize);
    let mut read = vec![0; bytes];
    file.read_exact_at(&mut read, batch.offset)?;
    file.sync_all()?;
    let mut on_disk = BlockBuffer::default();
    on_disk.reset(bytes);
    file.read_from_disk(&mut on_disk, batch.offset)?;
    if on_disk[..] == read[..] {
        return Ok(());
    }
    let (file_name, offset) = (segment.path.display(), batch.offset);
    tracing::warn!(file = %file_name, offset, "the last batch had not reached the disk");
    file.write_all_at(&read, batch.offset)?;
    file.sync_all()
}

fn write_zeros(segment: &Segment, start: u64, end: u64) -> Result<(), WalError> {
    let zeros = vec![0; (end - start).min(WINDOW_BYTES) as usize];
    let write = || -> io::Result<()> {
        let mut offset = start;
        while offset < end {
            let bytes = (end - offset).min(WINDOW_BYTES) as usize;
            segment.file.write_all_at(&zeros[..bytes], offset)?;
            offset += bytes as u64;
        }
        segment.file.sync_all()
    };
    write().map_err(|error| io_error("repair", &segment.path, error))
}

/// What lies behind the last good batch of a segment.
struct Behind {
    /// End of the last block that is not zero.
    garbage_end: Option<u64>,
    /// Offset of a batch header that this log has written.
    batch_at: Option<u64>,
}

/// A segment's file, read in large pieces.
struct Window {
    segment: Arc<Segment>,
    /// Bytes of the file that there are, at most as many as it was prepared with.
    length: u64,
    start: u64,
    buffer: Vec<u8>,
}

impl Window {
    fn new(segment: &Arc<Segment>) -> Result<Window, WalError> {
        let length =
            segment.file.len().map_err(|error| io_error("inspect", &segment.path, error))?;
        let length = length.min(segment.length);
        Ok(Window { segment: Arc::clone(segment), length, start: 0, buffer: Vec::new() })
    }

    /// So many bytes at an offset, or none if the file ends before.
    fn get(&mut self, offset: u64, bytes: u64) -> Result<Option<&[u8]>, WalError> {
        if offset + bytes > self.length {
            return Ok(None);
        }
        let held = self.start..self.start + self.buffer.len() as u64;
        if offset < held.start || offset + bytes > held.end {
            let wanted = bytes.max(WINDOW_BYTES).min(self.length - offset);
            self.buffer.resize(wanted as usize, 0);
            self.start = offset;
            let read = self.segment.file.read_exact_at(&mut self.buffer, offset);
            read.map_err(|error| io_error("read", &self.segment.path, error))?;
        }
        let from = (offset - self.start) as usize;
        Ok(Some(&self.buffer[from..from + bytes as usize]))
    }

    /// The header at an offset, if it is one of this segment's.
    fn header_at(&mut self, offset: u64) -> Result<Result<Header, &'static str>, WalError> {
        let Some(bytes) = self.get(offset, HEADER_BYTES as u64)? else {
            return Ok(Err("the file ends here"));
        };
        Ok(Header::decode(bytes).and_then(|header| {
            let place = header.place;
            if place.salt != self.segment.salt || place.segment != self.segment.number {
                return Err("the batch belongs to another segment");
            }
            Ok(header)
        }))
    }

    fn batch_at(&mut self, offset: u64) -> Result<Finding, WalError> {
        let header = match self.header_at(offset)? {
            Ok(header) => header,
            Err(reason) => return Ok(Finding::Damage(reason)),
        };
        if header.bytes() > BATCH_BYTES_MAX
            || offset + header.bytes().next_multiple_of(BLOCK_BYTES as u64) > self.segment.length
        {
            return Ok(Finding::Damage("the batch is longer than any can be"));
        }
        // The padding must be there as well, so that the log can go on behind it.
        let bytes = header.bytes().next_multiple_of(BLOCK_BYTES as u64);
        let Some(bytes) = self.get(offset, bytes)? else {
            return Ok(Finding::Damage("the file ends within the batch"));
        };
        Ok(match header.frames(bytes) {
            Ok(frames) => Finding::Batch { header, frames },
            Err(reason) => Finding::Damage(reason),
        })
    }

    /// Looks at everything from `offset` on: is it zeros, and if not, is there a batch with a
    /// sequence above `sequence` behind the first block?
    fn inspect(&mut self, offset: u64, sequence: u64) -> Result<Behind, WalError> {
        let mut behind = Behind { garbage_end: None, batch_at: None };
        let mut block = offset;
        while block < self.length {
            let bytes = (self.length - block).min(BLOCK_BYTES as u64);
            let Some(content) = self.get(block, bytes)? else { break };
            if content != &[0; BLOCK_BYTES][..bytes as usize] {
                behind.garbage_end = Some(block + bytes);
                if block > offset
                    && bytes == BLOCK_BYTES as u64
                    && let Ok(header) = self.header_at(block)?
                    && header.place.sequence > sequence
                {
                    behind.batch_at = Some(block);
                    return Ok(behind);
                }
            }
            block += bytes;
        }
        Ok(behind)
    }
}
