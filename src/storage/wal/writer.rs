//! The log's thread: takes what is queued, makes a batch of it, writes, syncs, tells.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::batch::{self, Frame, FrameEntry, Kind, Place};
use super::floor::Floor;
use super::log::Location;
use super::segment::{FIRST_BATCH, Segment};
use super::supply::Supply;
use super::words::Words;
use super::{Completion, Operation, Shared, State, WalError, io_error};
use crate::storage::file::BlockBuffer;

/// A segment that has been written to, or is about to be.
pub(super) struct Span {
    pub(super) segment: Arc<Segment>,
    /// Highest index of any record in it, dropped or not.
    pub(super) highest: Option<u64>,
}

/// While batches flow, the floor is noted once in so many times what makes an idle log.
const NOTE_INTERVAL_FACTOR: u32 = 10;

/// Where the log goes on.
pub(super) struct Start {
    /// Oldest first; the last is the one to write to.
    pub(super) spans: VecDeque<Span>,
    pub(super) position: u64,
    pub(super) sequence: u64,
    /// True if the last batch binds nobody, or there is none.
    pub(super) sealed: bool,
    /// The floor that was noted last.
    pub(super) noted: Floor,
    /// How long nothing may come before the log counts as idle.
    pub(super) idle_after: Duration,
}

/// What the thread has to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Write,
    /// Nothing has come for a while.
    Rest,
    Close,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    supply: Supply,
    spans: VecDeque<Span>,
    /// Where the next batch goes in the last span.
    position: u64,
    sequence: u64,
    /// As of the last batch that was synced.
    words: Words,
    /// Bytes that the frames of one batch may take.
    room: usize,
    /// Taken from the queue, not yet written in full.
    pending: VecDeque<Operation>,
    /// Reused from batch to batch, and at most twice as large as one.
    buffer: BlockBuffer,
    /// True if the last batch on disk binds nobody, or there is none at all: it is proof of all
    /// that were before it, and its own loss is none.
    sealed: bool,
    /// As of the last batch that binds somebody.
    floor: Floor,
    /// The floor that was noted last.
    noted: Floor,
    noted_at: Instant,
    idle_after: Duration,
}

/// What one batch is made of.
#[derive(Default)]
struct Draft {
    frames: Vec<Frame>,
    bytes: usize,
    /// Which call appended them: runs of records, by the number of the call and how many.
    appended: Vec<(u64, usize)>,
    completions: Vec<Completion>,
    /// Whether anything in it is promised to somebody: all but `committed` is.
    binds: bool,
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        supply: Supply,
        start: Start,
        words: Words,
        room: usize,
    ) -> Writer {
        assert!(!start.spans.is_empty());
        // What recovery has read is on disk.
        let sequence = (start.sequence - 1).saturating_sub(u64::from(start.sealed));
        let floor = Floor { sequence, next_index: words.next.unwrap_or(0) };
        Writer {
            shared,
            supply,
            spans: start.spans,
            position: start.position,
            sequence: start.sequence,
            words,
            room,
            pending: VecDeque::new(),
            buffer: BlockBuffer::default(),
            sealed: start.sealed,
            floor,
            noted: start.noted,
            noted_at: now(),
            idle_after: start.idle_after,
        }
    }

    /// The thread: until the log is closed or the disk fails.
    pub(super) fn run(&mut self) -> Result<(), String> {
        // Whatever ends this thread, nobody waits in vain.
        let _last_will = LastWill { shared: Arc::clone(&self.shared) };
        loop {
            let turn = self.wait();
            if self.take_turn(turn).is_err() {
                let stopped = self.shared.lock().stopped.clone().unwrap_or(WalError::Stopped);
                return Err(format!("the write-ahead log has stopped: {stopped}"));
            }
            if turn == Turn::Close {
                return Ok(());
            }
        }
    }

    /// Takes the queue once there is something worth a sync in it, or nothing has come for so long
    /// that the log is idle.
    fn wait(&mut self) -> Turn {
        let nothing_to_do = |state: &mut State| state.urgent == 0 && !state.closing;
        let mut state = self.shared.lock();
        state.idle = nothing_to_do(&mut state);
        state = if self.sealed && self.noted >= self.floor {
            let woken = self.shared.work.wait_while(state, nothing_to_do);
            woken.unwrap_or_else(PoisonError::into_inner)
        } else {
            let woken = self.shared.work.wait_timeout_while(state, self.idle_after, nothing_to_do);
            woken.unwrap_or_else(PoisonError::into_inner).0
        };
        state.idle = false;
        take_queue(&mut state, &mut self.pending)
    }

    /// Does what the thread does when it wakes, for a test. False once the log has stopped.
    #[cfg(test)]
    pub(super) fn turn(&mut self) -> bool {
        let turn = {
            let mut state = self.shared.lock();
            if state.urgent == 0 && !state.closing {
                return state.stopped.is_none();
            }
            take_queue(&mut state, &mut self.pending)
        };
        self.take_turn(turn).is_ok() && turn != Turn::Close
    }

    /// Does what the thread does when nothing has come for a while, for a test. False once the log
    /// has stopped.
    #[cfg(test)]
    pub(super) fn idle(&mut self) -> bool {
        let turn = {
            let mut state = self.shared.lock();
            if state.stopped.is_some() {
                return false;
            }
            take_queue(&mut state, &mut self.pending)
        };
        self.take_turn(turn).is_ok() && turn != Turn::Close
    }

    fn take_turn(&mut self, turn: Turn) -> Result<(), ()> {
        if turn != Turn::Rest {
            self.write_pending()?;
        }
        if turn != Turn::Write {
            self.seal()?;
        }
        if turn == Turn::Close {
            self.stop(WalError::Closed, Vec::new());
        }
        Ok(())
    }

    /// Writes all that was taken from the queue, and what joins it meanwhile.
    fn write_pending(&mut self) -> Result<(), ()> {
        while !self.pending.is_empty() {
            self.write_batch()?;
            let mut state = self.shared.lock();
            // Only as much as is urgent: what remains can wait for the next waking.
            if state.urgent > 0 || !self.pending.is_empty() {
                take_queue(&mut state, &mut self.pending);
            }
        }
        Ok(())
    }

    /// Ends the log with a batch that binds nobody: proof that all before it was complete. It holds
    /// `committed`, if that has moved since. Then notes how far the log goes.
    fn seal(&mut self) -> Result<(), ()> {
        // A seal is not worth a segment that is yet to be made, perhaps on a disk that is full.
        let has_room = self.position + batch::BLOCK_BYTES as u64 <= self.active().segment.length
            || self.supply.has_spare();
        if has_room && (!self.sealed || !self.pending.is_empty()) {
            self.write_batch()?;
        }
        self.note();
        Ok(())
    }

    fn note(&mut self) {
        if self.noted < self.floor {
            self.noted = self.floor;
            self.supply.note(self.floor);
        }
    }

    /// Makes one batch of as many operations as fit, and puts it on disk. An error has been told
    /// to everybody.
    fn write_batch(&mut self) -> Result<(), ()> {
        let mut draft = self.draft();
        match self.put(&mut draft) {
            Ok((entries, begun)) => {
                self.conclude(&draft, &entries, begun);
                for done in draft.completions {
                    done(Ok(()));
                }
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "the write-ahead log has stopped");
                self.stop(error, draft.completions);
                Err(())
            }
        }
    }

    fn draft(&mut self) -> Draft {
        let mut draft = Draft::default();
        while let Some(operation) = self.pending.pop_front() {
            if let Some(rest) = draft.take(operation, self.room) {
                self.pending.push_front(rest);
                break;
            }
        }
        draft
    }

    /// Encodes, writes and syncs. Returns the batch's table and when it went to the disk.
    fn put(&mut self, draft: &mut Draft) -> Result<(Vec<FrameEntry>, Instant), WalError> {
        let restated = self.words.restate().iter().map(Frame::bytes).sum::<usize>();
        let bytes = (batch::HEADER_BYTES + restated + draft.bytes) as u64;
        let bytes = bytes.next_multiple_of(batch::BLOCK_BYTES as u64);
        if self.position + bytes > self.active().segment.length {
            self.advance(bytes)?;
        }
        if self.position == FIRST_BATCH {
            draft.frames.splice(0..0, self.words.restate());
        }
        let active = self.active();
        let place = Place {
            sequence: self.sequence,
            salt: active.segment.salt,
            segment: active.segment.number,
            next_index: self.words.next,
        };
        let segment = Arc::clone(&active.segment);
        let entries = batch::encode(place, &draft.frames, &mut self.buffer);
        assert!(self.position + self.buffer.len() as u64 <= segment.length);

        let begun = now();
        self.set_sync_begun(Some(begun));
        let file = &segment.file;
        let written = file.write_all_at(&self.buffer, self.position);
        written.map_err(|error| io_error("write", &segment.path, error))?;
        file.sync_data().map_err(|error| io_error("sync", &segment.path, error))?;
        self.set_sync_begun(None);
        Ok((entries, begun))
    }

    fn set_sync_begun(&self, begun: Option<Instant>) {
        *self.shared.sync_begun.lock().unwrap_or_else(PoisonError::into_inner) = begun;
    }

    /// Moves on to the next segment that has room for a batch of so many bytes, which any that is
    /// prepared from now on has.
    fn advance(&mut self, bytes: u64) -> Result<(), WalError> {
        loop {
            let segment = self.supply.take()?;
            self.position = FIRST_BATCH;
            let mut state = self.shared.lock();
            state.segments.push(Arc::clone(&segment));
            state.position = FIRST_BATCH;
            drop(state);
            let fits = FIRST_BATCH + bytes <= segment.length;
            self.spans.push_back(Span { segment, highest: None });
            // A spare of an earlier start may be smaller than the options say now.
            if fits {
                return Ok(());
            }
        }
    }

    /// Takes note of a batch that is on disk.
    fn conclude(&mut self, draft: &Draft, entries: &[FrameEntry], begun: Instant) {
        let time = begun.elapsed();
        for frame in &draft.frames {
            self.words.apply(frame.kind, frame.index, || frame.payload.clone());
        }
        let start = self.position as u32;
        if draft.binds {
            self.floor =
                Floor { sequence: self.sequence, next_index: self.words.next.unwrap_or(0) };
        }
        self.sealed = !draft.binds;
        self.sequence += 1;
        self.position += self.buffer.len() as u64;
        let records = entries.iter().filter(|entry| entry.kind == Kind::Record);
        let highest = records.clone().map(|entry| entry.index).max();
        let active = self.spans.back_mut().expect("there is always a segment to write to");
        active.highest = active.highest.max(highest);
        let number = active.segment.number;

        let mut state = self.shared.lock();
        let calls =
            draft.appended.iter().flat_map(|(call, count)| std::iter::repeat_n(*call, *count));
        for (entry, call) in records.zip(calls) {
            let offset = start + entry.offset;
            let (checksum, header_bytes) = (entry.checksum, entry.header_bytes);
            let location = Location::new(number, offset, checksum, header_bytes, entry.bytes);
            state.log.locate(entry.index, call, location);
            state.bytes_queued -= u64::from(entry.bytes);
            state.counters.records += 1;
        }
        state.log.evict();
        state.position = self.position;
        state.counters.bytes += self.buffer.len() as u64;
        state.counters.segment_waits = self.supply.waits();
        state.counters.synced(time);
        drop(state);
        self.after_batch(begun);
    }

    /// Looks after segments and the floor.
    fn after_batch(&mut self, begun: Instant) {
        self.remove_purged();
        self.supply.keep_pace(self.position, self.active().segment.length);
        if begun.duration_since(self.noted_at) / NOTE_INTERVAL_FACTOR > self.idle_after {
            self.noted_at = begun;
            self.note();
        }
    }

    /// Removes the segments at the front of which every record is purged, on disk.
    pub(super) fn remove_purged(&mut self) {
        while self.spans.len() > 1 && self.spans[0].highest <= self.words.purged_index() {
            let Some(span) = self.spans.pop_front() else { return };
            self.shared.lock().segments.retain(|segment| segment.number != span.segment.number);
            self.supply.remove(&span.segment);
        }
    }

    fn active(&self) -> &Span {
        self.spans.back().expect("there is always a segment to write to")
    }

    /// Ends the log: tells those of the batch, those behind it, and all who come later.
    fn stop(&mut self, error: WalError, mut completions: Vec<Completion>) {
        let waiting = std::mem::take(&mut self.pending);
        completions.extend(waiting.into_iter().filter_map(Operation::into_completion));
        completions.extend(self.shared.stop(error.clone()));
        for done in completions {
            done(Err(error.clone()));
        }
    }
}

impl Draft {
    /// Adds an operation, or as much of it as fits; returns what does not. An empty draft takes at
    /// least one frame.
    fn take(&mut self, operation: Operation, room: usize) -> Option<Operation> {
        match operation {
            Operation::Append { number, first_index, mut records, done } => {
                let mut index = first_index;
                while let Some(record) = records.as_slice().first() {
                    if !self.fits(batch::FRAME_BYTES + record.bytes(), room) {
                        break;
                    }
                    let Some(record) = records.next() else { break };
                    let (header, payload) = (record.header, record.payload);
                    self.push(Frame { kind: Kind::Record, index, header, payload });
                    index += 1;
                }
                if index > first_index {
                    self.appended.push((number, (index - first_index) as usize));
                }
                if !records.as_slice().is_empty() {
                    return Some(Operation::Append { number, first_index: index, records, done });
                }
                self.completions.push(done);
                None
            }
            Operation::Vote { vote, done } => {
                if !self.fits(batch::FRAME_BYTES + vote.len(), room) {
                    return Some(Operation::Vote { vote, done });
                }
                self.push_with(Frame::new(Kind::Vote, 0, vote), done)
            }
            Operation::Committed { index, committed } => {
                if !self.fits(batch::FRAME_BYTES + committed.len(), room) {
                    return Some(Operation::Committed { index, committed });
                }
                self.push(Frame::new(Kind::Committed, index, committed));
                None
            }
            Operation::Truncate { from, done } => {
                if !self.fits(batch::FRAME_BYTES, room) {
                    return Some(Operation::Truncate { from, done });
                }
                self.push_with(Frame::new(Kind::Truncate, from, Default::default()), done)
            }
            Operation::Purge { index, marker, done } => {
                if !self.fits(batch::FRAME_BYTES + marker.len(), room) {
                    return Some(Operation::Purge { index, marker, done });
                }
                self.push_with(Frame::new(Kind::Purge, index, marker), done)
            }
        }
    }

    fn fits(&self, bytes: usize, room: usize) -> bool {
        self.frames.is_empty() || self.bytes + bytes <= room
    }

    fn push(&mut self, frame: Frame) {
        self.bytes += frame.bytes();
        self.binds |= frame.kind != Kind::Committed;
        self.frames.push(frame);
    }

    fn push_with(&mut self, frame: Frame, done: Completion) -> Option<Operation> {
        self.push(frame);
        self.completions.push(done);
        None
    }
}

impl Shared {
    /// Takes no more operations from now on; returns the completions of those in the queue.
    fn stop(&self, error: WalError) -> Vec<Completion> {
        let mut state = self.lock();
        if state.stopped.is_none() {
            state.stopped = Some(error);
        }
        state.urgent = 0;
        let queue = std::mem::take(&mut state.queue);
        queue.into_iter().filter_map(Operation::into_completion).collect()
    }
}

/// Stops the log if its thread ends in any way that did not.
struct LastWill {
    shared: Arc<Shared>,
}

impl Drop for LastWill {
    fn drop(&mut self) {
        for done in self.shared.stop(WalError::Stopped) {
            done(Err(WalError::Stopped));
        }
    }
}

/// Takes all that is queued; returns what there is to do about it.
fn take_queue(state: &mut State, pending: &mut VecDeque<Operation>) -> Turn {
    let turn = match state.urgent {
        _ if state.closing => Turn::Close,
        0 => Turn::Rest,
        _ => Turn::Write,
    };
    state.urgent = 0;
    pending.extend(state.queue.drain(..));
    turn
}

#[expect(clippy::disallowed_methods, reason = "measures the disk and decides nothing")]
fn now() -> Instant {
    Instant::now()
}
