//! Prepares the next segment, removes purged ones and notes how far the log is synced, off the
//! log's thread. No write waits for it unless it comes faster than zeros can be written.
//!
//! The zeros share the disk with the batches, and a batch that is synced beside a piece of zeros
//! takes several times as long. So they are written at the pace at which the segment before fills,
//! mostly a piece at a time; only after a start what is due comes at once.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use super::floor::{Floor, Notebook};
use super::segment::{Preparation, Segment, ZERO_PIECE_BYTES};
use super::{WalError, io_error};
use crate::storage::file::Files;
use crate::storage::thread::ThreadWatch;

/// Does the work, on whatever thread.
pub(super) struct Workshop {
    files: Arc<dyn Files>,
    directory: PathBuf,
    salt: u64,
    segment_bytes: u64,
    notebook: Notebook,
    preparation: Option<Preparation>,
    /// Set when the next segment could not be prepared in part. The disk may be full: to begin
    /// again with every part would be a flood of zeros, so it waits until all of it is needed.
    part_failed: bool,
    /// Set when a file could not be removed. The chain may have no gap, so nothing behind it may
    /// be removed either; the next start tries again.
    removal_failed: bool,
    /// Set when a note failed. The one before still holds; the next start tries again.
    note_failed: bool,
}

impl Workshop {
    pub(super) fn new(
        files: Arc<dyn Files>,
        directory: &Path,
        salt: u64,
        segment_bytes: u64,
        notebook: Notebook,
    ) -> Workshop {
        Workshop {
            files,
            directory: directory.to_owned(),
            salt,
            segment_bytes,
            notebook,
            preparation: None,
            part_failed: false,
            removal_failed: false,
            note_failed: false,
        }
    }

    /// Goes on with what was begun, or begins, and makes it a segment. After an error the next call
    /// begins anew.
    fn prepare(&mut self, number: u32) -> Result<Segment, WalError> {
        self.part_failed = false;
        self.begun(number)?.finish(&*self.files, &self.directory)
    }

    /// Goes on with what was begun, or begins, until there are so many bytes.
    fn prepare_in_part(&mut self, number: u32, bytes: u64) {
        if self.part_failed {
            return;
        }
        let part = self.begun(number).and_then(|mut preparation| {
            preparation.write(bytes)?;
            Ok(preparation)
        });
        match part {
            Ok(preparation) => self.preparation = Some(preparation),
            Err(error) => {
                tracing::warn!(%error, "a log segment cannot be prepared ahead of time");
                self.part_failed = true;
            }
        }
    }

    fn begun(&mut self, number: u32) -> Result<Preparation, WalError> {
        if let Some(begun) = self.preparation.take() {
            assert_eq!(begun.number(), number, "a segment in use would be replaced");
            return Ok(begun);
        }
        let (salt, bytes) = (self.salt, self.segment_bytes);
        Preparation::begin(&*self.files, &self.directory, number, salt, bytes)
    }

    /// Removes the oldest segment's file, durably, before any other can follow.
    fn remove(&mut self, path: &Path) {
        if self.removal_failed {
            return;
        }
        let removed = self.files.remove(path).and_then(|()| self.files.sync_dir(&self.directory));
        if let Err(error) = removed {
            tracing::warn!(file = %path.display(), %error, "cannot remove a purged log segment");
            self.removal_failed = true;
        }
    }

    fn note(&mut self, floor: Floor) {
        if self.note_failed {
            return;
        }
        if let Err(error) = self.notebook.write(&*self.files, floor) {
            tracing::warn!(%error, "cannot note how far the log is synced");
            self.note_failed = true;
        }
    }
}

enum Errand {
    /// Goes on with the next segment until it has so many bytes.
    PrepareInPart(u32, u64),
    /// Completes the next segment, and hands it over or says why not. After a failure, of a part or
    /// of the whole, it begins anew.
    Prepare(u32),
    Remove(PathBuf),
    Note(Floor),
}

enum Place {
    /// Errands are run on a thread.
    Thread {
        /// Absent once the thread has been told to end.
        errands: Option<Sender<Errand>>,
        prepared: Receiver<Result<Segment, WalError>>,
        thread: Option<JoinHandle<()>>,
    },
    /// Errands are run by the caller, when the result is needed, so that a test knows the order of
    /// all I/O.
    Here(Box<Workshop>),
}

/// The log's side of it.
pub(super) struct Supply {
    place: Place,
    /// Prepared and unused, oldest first.
    spares: VecDeque<Arc<Segment>>,
    /// Number of the next segment that has to be prepared.
    next_number: u32,
    /// Bytes of every segment that is prepared.
    segment_bytes: u64,
    /// Bytes of the next one that have been asked for.
    paced: u64,
    /// True if all of it has been asked for.
    under_way: bool,
    waits: u64,
}

impl Supply {
    pub(super) fn new(
        shop: Workshop,
        next_number: u32,
        spares: VecDeque<Arc<Segment>>,
        threads: Option<&ThreadWatch>,
    ) -> Result<Supply, WalError> {
        let segment_bytes = shop.segment_bytes;
        let place = match threads {
            Some(threads) => Place::start(shop, threads)?,
            None => Place::Here(Box::new(shop)),
        };
        let (paced, under_way, waits) = (0, false, 0);
        Ok(Supply { place, spares, next_number, segment_bytes, paced, under_way, waits })
    }

    /// Sees to it that the next segment is prepared at the pace at which the active one fills, and
    /// completed when that is three quarters full. If that fails, `take` will know.
    pub(super) fn keep_pace(&mut self, position: u64, length: u64) {
        if !self.spares.is_empty() || self.under_way {
            return;
        }
        let due = self.segment_bytes * position / (length - length / 4);
        if due >= self.segment_bytes {
            self.order();
        } else if due > self.paced {
            self.paced = due.next_multiple_of(ZERO_PIECE_BYTES);
            self.send(Errand::PrepareInPart(self.next_number, self.paced));
        }
    }

    /// Sees to it that a segment is being prepared, as fast as that goes.
    fn order(&mut self) {
        if !self.under_way {
            self.send(Errand::Prepare(self.next_number));
            self.under_way = true;
            self.paced = 0;
        }
    }

    /// If the thread is gone, `take` finds out.
    fn send(&self, errand: Errand) {
        if let Place::Thread { errands: Some(errands), .. } = &self.place {
            let _ = errands.send(errand);
        }
    }

    /// Whether `take` has a segment at once.
    pub(super) fn has_spare(&self) -> bool {
        !self.spares.is_empty()
    }

    /// The next segment, waited for if need be. One that could not be prepared ahead of time is
    /// tried once more, as space may have been made since.
    pub(super) fn take(&mut self) -> Result<Arc<Segment>, WalError> {
        if let Some(spare) = self.spares.pop_front() {
            return Ok(spare);
        }
        let ordered_before = self.under_way || self.paced > 0;
        self.order();
        // The first segment of all is waited for by the start, not by a batch.
        let (number, waits) = (self.next_number, self.waits);
        let mut segment = self.wait();
        if !ordered_before {
            self.waits = waits;
            return segment;
        }
        if self.waits > waits {
            tracing::debug!(number, "a batch has waited for the segment to be prepared");
        }
        if segment.is_err() {
            self.order();
            segment = self.wait();
        }
        segment
    }

    fn wait(&mut self) -> Result<Arc<Segment>, WalError> {
        self.under_way = false;
        let segment = match &mut self.place {
            Place::Here(shop) => shop.prepare(self.next_number)?,
            Place::Thread { prepared, .. } => match prepared.try_recv() {
                Ok(segment) => segment?,
                Err(TryRecvError::Disconnected) => return Err(WalError::Stopped),
                Err(TryRecvError::Empty) => {
                    self.waits += 1;
                    prepared.recv().unwrap_or(Err(WalError::Stopped))?
                }
            },
        };
        self.next_number = self.next_number.checked_add(1).ok_or_else(|| {
            WalError::Refused("the log has no number left for a segment".to_owned())
        })?;
        Ok(Arc::new(segment))
    }

    /// Removes the oldest segment's file, in time.
    pub(super) fn remove(&mut self, segment: &Segment) {
        match &mut self.place {
            Place::Here(shop) => shop.remove(&segment.path),
            Place::Thread { .. } => self.send(Errand::Remove(segment.path.clone())),
        }
    }

    /// Notes how far the log is synced, in time.
    pub(super) fn note(&mut self, floor: Floor) {
        match &mut self.place {
            Place::Here(shop) => shop.note(floor),
            Place::Thread { .. } => self.send(Errand::Note(floor)),
        }
    }

    /// Times that `take` had to wait.
    pub(super) fn waits(&self) -> u64 {
        self.waits
    }
}

impl Place {
    fn start(mut shop: Workshop, threads: &ThreadWatch) -> Result<Place, WalError> {
        let directory = shop.directory.clone();
        let (errands, todo) = channel();
        let (ready, prepared) = channel();
        let thread = threads
            .spawn("quorate-wal-files", move || {
                for errand in todo {
                    match errand {
                        Errand::PrepareInPart(number, bytes) => {
                            shop.prepare_in_part(number, bytes);
                        }
                        Errand::Prepare(number) => {
                            if ready.send(shop.prepare(number)).is_err() {
                                break;
                            }
                        }
                        Errand::Remove(path) => shop.remove(&path),
                        Errand::Note(floor) => shop.note(floor),
                    }
                }
                Ok(())
            })
            .map_err(|error| io_error("start a thread for", &directory, error))?;
        Ok(Place::Thread { errands: Some(errands), prepared, thread: Some(thread) })
    }
}

impl Drop for Supply {
    fn drop(&mut self) {
        if let Place::Thread { errands, thread, .. } = &mut self.place {
            drop(errands.take());
            if let Some(thread) = thread.take() {
                let _ = thread.join();
            }
        }
    }
}
