//! Prepares the next segment and removes purged ones, off the log's thread: either takes tens of
//! milliseconds, and no write waits for it unless it comes faster than zeros can be written.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};

use super::segment::Segment;
use super::{WalError, io_error};
use crate::storage::file::Files;

/// Bytes of a log's first segment, if not less is asked for; each that follows is twice as long,
/// up to the full length. A node that writes little starts at once and takes up little.
const FIRST_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// Does the work, on whatever thread.
pub(super) struct Workshop {
    files: Arc<dyn Files>,
    directory: PathBuf,
    salt: u64,
    segment_bytes: u64,
    /// Set when a file could not be removed. The chain may have no gap, so nothing behind it may
    /// be removed either; the next start tries again.
    removal_failed: bool,
}

impl Workshop {
    pub(super) fn new(
        files: Arc<dyn Files>,
        directory: &Path,
        salt: u64,
        segment_bytes: u64,
    ) -> Workshop {
        let directory = directory.to_owned();
        Workshop { files, directory, salt, segment_bytes, removal_failed: false }
    }

    fn prepare(&self, number: u32) -> Result<Segment, WalError> {
        let bytes = FIRST_SEGMENT_BYTES
            .saturating_mul(1 << number.saturating_sub(1).min(16))
            .min(self.segment_bytes);
        Segment::prepare(&*self.files, &self.directory, number, self.salt, bytes)
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
}

enum Errand {
    Prepare(u32),
    Remove(PathBuf),
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
    Here(Workshop),
}

/// The log's side of it.
pub(super) struct Supply {
    place: Place,
    /// Prepared and unused, oldest first.
    spares: VecDeque<Arc<Segment>>,
    /// Number of the next segment that has to be prepared.
    next_number: u32,
    /// True if that one has been asked for.
    under_way: bool,
    waits: u64,
}

impl Supply {
    pub(super) fn new(
        shop: Workshop,
        next_number: u32,
        spares: VecDeque<Arc<Segment>>,
        threaded: bool,
    ) -> Result<Supply, WalError> {
        let place = if threaded { Place::start(shop)? } else { Place::Here(shop) };
        Ok(Supply { place, spares, next_number, under_way: false, waits: 0 })
    }

    /// Sees to it that a segment is ready or being prepared. If that fails, `take` will know.
    pub(super) fn order(&mut self) {
        if !self.spares.is_empty() || self.under_way {
            return;
        }
        if let Place::Thread { errands: Some(errands), .. } = &self.place {
            // If the thread is gone, `take` finds out.
            let _ = errands.send(Errand::Prepare(self.next_number));
        }
        self.under_way = true;
    }

    /// The next segment, waited for if need be. One that could not be prepared ahead of time is
    /// tried once more, as space may have been made since.
    pub(super) fn take(&mut self) -> Result<Arc<Segment>, WalError> {
        if let Some(spare) = self.spares.pop_front() {
            return Ok(spare);
        }
        let ordered_before = self.under_way;
        self.order();
        // The first segment of all is waited for by the start, not by a batch.
        let waits = self.waits;
        let mut segment = self.wait();
        if !ordered_before {
            self.waits = waits;
        } else if segment.is_err() {
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
            Place::Thread { errands, .. } => {
                if let Some(errands) = errands {
                    let _ = errands.send(Errand::Remove(segment.path.clone()));
                }
            }
        }
    }

    /// Times that `take` had to wait.
    pub(super) fn waits(&self) -> u64 {
        self.waits
    }
}

impl Place {
    fn start(mut shop: Workshop) -> Result<Place, WalError> {
        let directory = shop.directory.clone();
        let (errands, todo) = channel();
        let (ready, prepared) = channel();
        let thread = thread::Builder::new()
            .name("quorate-wal-files".to_owned())
            .spawn(move || {
                for errand in todo {
                    match errand {
                        Errand::Prepare(number) => {
                            if ready.send(shop.prepare(number)).is_err() {
                                return;
                            }
                        }
                        Errand::Remove(path) => shop.remove(&path),
                    }
                }
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
