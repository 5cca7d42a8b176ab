//! How far the log was once synced, noted outside of it.
//!
//! A log whose newest part the disk has lost, to zeros or to an older state, looks like one that
//! was never longer. So the highest sequence that a synced batch had is noted in a file beside the
//! segments, off the path of writes: when the log comes to rest, and now and then while it grows.
//! A log that ends before is refused. Sequences only grow, whatever is truncated, purged or
//! installed, so nothing but a loss can end a log before its floor.
//!
//! The file has two blocks, written in turn, so that a power cut can spoil the newer note only.
//!
//! Caveat: what came after the last note, a second's worth at most, is not covered.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::batch::{BLOCK_BYTES, u32_at, u64_at};
use super::{WalError, io_error};
use crate::storage::file::{self, BlockBuffer, File, Files};

const NAME: &str = "floor";
const MAGIC: [u8; 8] = *b"quorflr\0";
const VERSION: u16 = 1;
const SLOTS: usize = 2;

/// Up to where the log was once synced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Floor {
    /// Of a batch; 0 before the first.
    pub(super) sequence: u64,
    /// Index of the record that was next after it, 0 if the log had not begun: for the message.
    pub(super) next_index: u64,
}

/// Where floors are noted. The file comes with the first note.
pub(super) struct Notebook {
    path: PathBuf,
    file: Option<Arc<dyn File>>,
    /// The slot to write to: not the one that holds the newest note.
    slot: usize,
    block: BlockBuffer,
}

impl Notebook {
    /// Looks up what was noted last.
    pub(super) fn open(files: &dyn Files, directory: &Path) -> Result<(Notebook, Floor), WalError> {
        let path = directory.join(NAME);
        let mut notebook = Notebook { path, file: None, slot: 0, block: BlockBuffer::default() };
        let bytes_max = (SLOTS * BLOCK_BYTES) as u64;
        let bytes = match file::read_whole(files, &notebook.path, bytes_max) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((notebook, Floor::default()));
            }
            // Larger than this version makes it: as good as a format that it does not know.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Vec::new(),
            Err(error) => return Err(io_error("read", &notebook.path, error)),
        };
        let notes = bytes.chunks_exact(BLOCK_BYTES).map(decode);
        let newest = notes.enumerate().filter_map(|(slot, note)| Some((note?, slot))).max();
        let Some((floor, slot)) = newest else {
            // Nothing says that the log is wrong. The next note makes the file anew.
            let file = notebook.path.display();
            tracing::warn!(%file, "the note of how far the log was synced is damaged");
            return Ok((notebook, Floor::default()));
        };
        if bytes.len() == SLOTS * BLOCK_BYTES {
            let file = files.open(&notebook.path);
            notebook.file = Some(file.map_err(|error| io_error("open", &notebook.path, error))?);
            notebook.slot = (slot + 1) % SLOTS;
        }
        Ok((notebook, floor))
    }

    /// Notes a floor, durably, for a log that was synced as far.
    pub(super) fn write(&mut self, files: &dyn Files, floor: Floor) -> io::Result<()> {
        match &self.file {
            Some(file) => {
                self.block.reset(BLOCK_BYTES);
                encode(floor, &mut self.block);
                file.write_all_at(&self.block, (self.slot * BLOCK_BYTES) as u64)?;
                file.sync_data()?;
            }
            None => {
                let mut bytes = [0; SLOTS * BLOCK_BYTES];
                encode(floor, &mut bytes[..BLOCK_BYTES]);
                file::replace(files, &self.path, &bytes)?;
                self.file = Some(files.open(&self.path)?);
                self.slot = 0;
            }
        }
        self.slot = (self.slot + 1) % SLOTS;
        Ok(())
    }
}

fn encode(floor: Floor, block: &mut [u8]) {
    block.fill(0);
    block[..8].copy_from_slice(&MAGIC);
    block[8..10].copy_from_slice(&VERSION.to_le_bytes());
    block[16..24].copy_from_slice(&floor.sequence.to_le_bytes());
    block[24..32].copy_from_slice(&floor.next_index.to_le_bytes());
    let checksum = crc32fast::hash(&block[..32]);
    block[32..36].copy_from_slice(&checksum.to_le_bytes());
}

/// `None` for what is no note of a format that this version knows.
fn decode(block: &[u8]) -> Option<Floor> {
    let sound = block[..8] == MAGIC
        && crc32fast::hash(&block[..32]) == u32_at(block, 32)
        && u16::from_le_bytes([block[8], block[9]]) == VERSION;
    sound.then(|| Floor { sequence: u64_at(block, 16), next_index: u64_at(block, 24) })
}
