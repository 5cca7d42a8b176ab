//! One file of the log: a block that says which it is, then batches, then zeros.
//!
//! A segment is written full of zeros and synced before it gets its name, so that the syncs of
//! batches change neither its length nor its extents: on ext4 such a sync costs 96 µs where one
//! that grows a file costs 150. Files are not recycled, so what lies behind the last batch is zero
//! unless a crash tore a batch there, which is how a torn tail is told from an end.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::batch::{BLOCK_BYTES, u32_at, u64_at};
use super::{SEGMENT_BYTES_MAX, WalError, io_error};
use crate::storage::file::{BlockBuffer, File, Files};

const MAGIC: [u8; 8] = *b"quorwal\0";
const VERSION: u16 = 1;
const SUFFIX: &str = ".wal";
/// Suffix of a file that is still being prepared; it means nothing and is removed at start.
pub(super) const UNFINISHED_SUFFIX: &str = ".wal.tmp";
/// Offset of a segment's first batch.
pub(super) const FIRST_BATCH: u64 = BLOCK_BYTES as u64;
/// Zeros are written in pieces of this many bytes, each synced before the next, so that no
/// sync of the log ever waits behind a whole segment of them.
pub(super) const ZERO_PIECE_BYTES: u64 = 1024 * 1024;

/// An open segment. A reader's handle outlives the removal of the file.
pub(super) struct Segment {
    /// Numbered from 1 without gaps.
    pub(super) number: u32,
    /// Random; see [`Place::salt`](super::batch::Place::salt).
    pub(super) salt: u64,
    /// Bytes that the file was prepared with.
    pub(super) length: u64,
    pub(super) path: PathBuf,
    pub(super) file: Arc<dyn File>,
}

/// A segment that is being made ready: zeros and header, then, all of it on disk, its name.
pub(super) struct Preparation {
    segment: Segment,
    unfinished: PathBuf,
    /// Bytes written so far.
    written: u64,
    piece: BlockBuffer,
}

impl Preparation {
    pub(super) fn begin(
        files: &dyn Files,
        directory: &Path,
        number: u32,
        salt: u64,
        length: u64,
    ) -> Result<Preparation, WalError> {
        let path = directory.join(file_name(number));
        let unfinished = directory.join(format!("{number:010}{UNFINISHED_SUFFIX}"));
        let file = files.create(&unfinished).map_err(|error| io_error("prepare", &path, error))?;
        let mut piece = BlockBuffer::default();
        piece.reset(ZERO_PIECE_BYTES.min(length) as usize);
        piece.fill(0);
        encode_header(number, salt, length, &mut piece);
        let segment = Segment { number, salt, length, path, file };
        Ok(Preparation { segment, unfinished, written: 0, piece })
    }

    pub(super) fn number(&self) -> u32 {
        self.segment.number
    }

    /// Writes on until at least so many bytes are written, or all.
    pub(super) fn write(&mut self, bytes: u64) -> Result<(), WalError> {
        let Segment { length, path, file, .. } = &self.segment;
        while self.written < bytes.min(*length) {
            let piece = self.piece.len().min((length - self.written) as usize);
            file.write_all_at(&self.piece[..piece], self.written)
                .and_then(|()| file.sync_data())
                .map_err(|error| io_error("prepare", path, error))?;
            self.written += piece as u64;
            self.piece[..BLOCK_BYTES].fill(0);
        }
        Ok(())
    }

    /// Writes what is missing, and makes it a segment.
    pub(super) fn finish(
        mut self,
        files: &dyn Files,
        directory: &Path,
    ) -> Result<Segment, WalError> {
        self.write(self.segment.length)?;
        let Segment { path, file, .. } = &self.segment;
        file.sync_all()
            .and_then(|()| files.rename(&self.unfinished, path))
            .and_then(|()| files.sync_dir(directory))
            .map_err(|error| io_error("prepare", path, error))?;
        Ok(self.segment)
    }
}

impl Segment {
    /// Opens a segment by its name and verifies its header.
    pub(super) fn open(
        files: &dyn Files,
        directory: &Path,
        number: u32,
    ) -> Result<Segment, WalError> {
        let path = directory.join(file_name(number));
        let file = files.open(&path).map_err(|error| io_error("open", &path, error))?;
        let corrupt = |reason: &str| WalError::Corrupt {
            file: path.clone(),
            offset: 0,
            reason: reason.to_owned(),
        };
        let mut header = [0; BLOCK_BYTES];
        match file.read_exact_at(&mut header, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(corrupt("the file ends within its header"));
            }
            Err(error) => return Err(io_error("read", &path, error)),
        }
        if header[..8] != MAGIC || crc32fast::hash(&header[..32]) != u32_at(&header, 32) {
            return Err(corrupt("the segment's header is damaged"));
        }
        if u16::from_le_bytes([header[8], header[9]]) != VERSION {
            return Err(corrupt("the segment is of a format that this version does not know"));
        }
        if u32_at(&header, 12) != number {
            return Err(corrupt("the segment's header and its name differ in number"));
        }
        let (salt, length) = (u64_at(&header, 16), u64_at(&header, 24));
        if length > SEGMENT_BYTES_MAX {
            return Err(corrupt("the segment claims to be longer than any can be"));
        }
        Ok(Segment { number, salt, length, path, file })
    }
}

/// Name of the file that holds a segment.
pub(super) fn file_name(number: u32) -> String {
    format!("{number:010}{SUFFIX}")
}

/// Number of the segment that a file of this name holds.
pub(super) fn number_of(name: &str) -> Option<u32> {
    let number: u32 = name.strip_suffix(SUFFIX)?.parse().ok()?;
    (file_name(number) == name).then_some(number)
}

fn encode_header(number: u32, salt: u64, length: u64, block: &mut [u8]) {
    block[..8].copy_from_slice(&MAGIC);
    block[8..10].copy_from_slice(&VERSION.to_le_bytes());
    block[12..16].copy_from_slice(&number.to_le_bytes());
    block[16..24].copy_from_slice(&salt.to_le_bytes());
    block[24..32].copy_from_slice(&length.to_le_bytes());
    let checksum = crc32fast::hash(&block[..32]);
    block[32..36].copy_from_slice(&checksum.to_le_bytes());
}
