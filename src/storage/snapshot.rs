//! Snapshot files: the second line behind a checkpoint store that will not open, what a node that
//! has fallen behind is sent, and what the log may be purged up to.
//!
//! # Format
//!
//! ```text
//! magic (8) version (1)
//! block*          kind (1) length (u32 LE) checksum (u64 LE) payload
//!   header        index (u64 LE), then the opaque header           first, once
//!   records       (key length (u32 LE) value length (u32 LE) key value)+
//!   trailer       records (u64 LE), checksum of the whole file up to here (u64 LE)   last, once
//! ```
//!
//! A block's checksum covers kind, number and payload of the block, so damage is found while
//! streaming, before its records are used. Blocks that are missing, doubled or in another order
//! are found by the number; a file that is cut short, by the missing trailer. Records come in
//! ascending order of distinct keys, so that two snapshots of one state are the same bytes on
//! every node.
//!
//! # Order
//!
//! A file is written as `*.partial`, synced, renamed, and the directory synced: a file with its
//! final name is whole, unless the disk failed it. What is received from a peer is verified from
//! the first to the last byte before it gets its name.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use thiserror::Error;
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::checkpoint::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use super::durable::{PARTIAL_SUFFIX, create_file, rename_file, sync_directory};
use super::file::{RealFiles, create_dir_durably};
use super::outside::{explain, is_outside};

const MAGIC: [u8; 8] = *b"QRSNAPSH";
const VERSION: u8 = 1;
const PREFIX: &str = "snapshot-";
const SUFFIX: &str = ".quorate";

/// A block of records is closed once it has this many bytes.
const BLOCK_BYTES: usize = 64 * 1024;
/// No block can be larger than a block that is almost full and the largest record.
const BLOCK_BYTES_MAX: usize = BLOCK_BYTES + LENGTHS_BYTES + KEY_BYTES_MAX + VALUE_BYTES_MAX;
const BLOCK_HEADER_BYTES: usize = 13;
const LENGTHS_BYTES: usize = 8;
const TRAILER_BYTES: usize = 16;

const HEADER: u8 = 1;
const RECORDS: u8 = 2;
const TRAILER: u8 = 3;

/// Why a snapshot was not written or read.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The file system failed.
    #[error("{action} {path}: {}", explain(source))]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: String,
        /// What the file system said.
        source: io::Error,
    },
    /// The bytes are not those of a snapshot, or not all of them.
    #[error("snapshot {path} is damaged at byte {offset}: {reason}")]
    Corrupt {
        /// Which file.
        path: String,
        /// Where in it.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
    /// Records must be written in ascending order of distinct keys.
    #[error("the records of a snapshot are not in ascending order")]
    Unordered,
    /// A key, value or header beyond its limit.
    #[error("a record of {bytes} bytes is too large for a snapshot")]
    TooLarge {
        /// How large it is.
        bytes: usize,
    },
    /// A peer sends more than it may.
    #[error("the snapshot is larger than the {limit} bytes allowed")]
    Limit {
        /// How many bytes it may have.
        limit: u64,
    },
}

impl SnapshotError {
    /// Whether nothing is known to be wrong with the snapshot.
    pub fn is_outside(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_outside(source))
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> SnapshotError {
    SnapshotError::Io { action, path: path.display().to_string(), source }
}

/// A finished snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotFile {
    /// Where it is.
    pub path: PathBuf,
    /// The log index that it is as of.
    pub index: u64,
    /// Its size.
    pub bytes: u64,
}

fn final_path(directory: &Path, index: u64) -> PathBuf {
    directory.join(format!("{PREFIX}{index:020}{SUFFIX}"))
}

fn index_of(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok()
}

/// The snapshots in the directory, by ascending index. Their contents are not looked at.
///
/// # Errors
/// The directory cannot be read.
pub fn list(directory: &Path) -> Result<Vec<SnapshotFile>, SnapshotError> {
    let failed = |error| io_error("list", directory, error);
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Some(index) = entry.file_name().to_str().and_then(index_of) {
            let bytes = entry.metadata().map_err(failed)?.len();
            files.push(SnapshotFile { path: entry.path(), index, bytes });
        }
    }
    files.sort_by_key(|file| file.index);
    Ok(files)
}

/// The snapshot with the highest index, if there is one.
///
/// # Errors
/// The directory cannot be read.
pub fn newest(directory: &Path) -> Result<Option<SnapshotFile>, SnapshotError> {
    Ok(list(directory)?.pop())
}

/// Removes the snapshots below `index`.
///
/// # Errors
/// The directory cannot be read or changed.
pub fn remove_older(directory: &Path, index: u64) -> Result<(), SnapshotError> {
    for file in list(directory)?.into_iter().filter(|file| file.index < index) {
        fs::remove_file(&file.path).map_err(|error| io_error("remove", &file.path, error))?;
    }
    Ok(())
}

/// Removes what earlier lives of the node did not finish. Not while one is being written.
///
/// # Errors
/// The directory cannot be read or changed.
pub fn remove_partials(directory: &Path) -> Result<(), SnapshotError> {
    let failed = |error| io_error("clean up", directory, error);
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().to_string_lossy().ends_with(PARTIAL_SUFFIX) {
            fs::remove_file(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// A partial file, removed again unless it is given its final name.
struct Partial {
    path: PathBuf,
    kept: bool,
}

impl Partial {
    fn create(path: PathBuf) -> Result<(Self, File), SnapshotError> {
        let file = create_file(&path).map_err(|error| io_error("create", &path, error))?;
        Ok((Self { path, kept: false }, file))
    }

    fn keep(mut self, place: &Path) -> Result<(), SnapshotError> {
        rename_file(&self.path, place).map_err(|error| io_error("rename", &self.path, error))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.kept {
            // Best effort: the next start removes what is left.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes one snapshot. Dropped before [`finish`](Self::finish), it leaves nothing behind.
pub struct SnapshotWriter {
    partial: Partial,
    place: PathBuf,
    index: u64,
    file: BufWriter<File>,
    whole: Xxh3,
    bytes: u64,
    blocks: u64,
    records: u64,
    block: Vec<u8>,
    last: Vec<u8>,
}

impl SnapshotWriter {
    /// Begins the snapshot of the state as of `index`, with an opaque header.
    ///
    /// # Errors
    /// The file cannot be created or written.
    pub fn create(directory: &Path, index: u64, header: &[u8]) -> Result<Self, SnapshotError> {
        let place = final_path(directory, index);
        let (partial, file) = Partial::create(super::durable::partial_path(&place))?;
        let mut writer = Self {
            partial,
            place,
            index,
            file: BufWriter::with_capacity(2 * BLOCK_BYTES, file),
            whole: Xxh3::new(),
            bytes: 0,
            blocks: 0,
            records: 0,
            block: Vec::with_capacity(2 * BLOCK_BYTES),
            last: Vec::new(),
        };
        writer.put(&[&MAGIC[..], &[VERSION]].concat())?;
        let payload = [&index.to_le_bytes()[..], header].concat();
        writer.put_block(HEADER, &payload)?;
        Ok(writer)
    }

    /// Appends a record; keys come in ascending order.
    ///
    /// # Errors
    /// The file cannot be written; the record is too large or out of order.
    pub fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), SnapshotError> {
        if key.len() > KEY_BYTES_MAX || value.len() > VALUE_BYTES_MAX {
            return Err(SnapshotError::TooLarge { bytes: key.len() + value.len() });
        }
        if self.records > 0 && key <= self.last.as_slice() {
            return Err(SnapshotError::Unordered);
        }
        self.last.clear();
        self.last.extend_from_slice(key);
        self.block.extend_from_slice(&(key.len() as u32).to_le_bytes());
        self.block.extend_from_slice(&(value.len() as u32).to_le_bytes());
        self.block.extend_from_slice(key);
        self.block.extend_from_slice(value);
        self.records += 1;
        if self.block.len() >= BLOCK_BYTES { self.put_records() } else { Ok(()) }
    }

    /// Completes the file, and returns once it is durable under its final name.
    ///
    /// # Errors
    /// The file cannot be written, synced or renamed.
    pub fn finish(mut self) -> Result<SnapshotFile, SnapshotError> {
        if !self.block.is_empty() {
            self.put_records()?;
        }
        let whole = self.whole.digest();
        let payload = [self.records.to_le_bytes(), whole.to_le_bytes()].concat();
        self.put_block(TRAILER, &payload)?;
        let Self { partial, place, index, file, bytes, .. } = self;
        let failed = |error| io_error("sync", &partial.path, error);
        let file = file.into_inner().map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(failed)?;
        partial.keep(&place)?;
        Ok(SnapshotFile { path: place, index, bytes })
    }

    fn put_records(&mut self) -> Result<(), SnapshotError> {
        let mut block = std::mem::take(&mut self.block);
        self.put_block(RECORDS, &block)?;
        block.clear();
        block.shrink_to(4 * BLOCK_BYTES);
        self.block = block;
        Ok(())
    }

    fn put_block(&mut self, kind: u8, payload: &[u8]) -> Result<(), SnapshotError> {
        if payload.len() > BLOCK_BYTES_MAX {
            return Err(SnapshotError::TooLarge { bytes: payload.len() });
        }
        let mut header = [kind; BLOCK_HEADER_BYTES];
        header[1..5].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        let checksum = block_checksum(kind, self.blocks, payload);
        header[5..].copy_from_slice(&checksum.to_le_bytes());
        self.blocks += 1;
        self.put(&header)?;
        self.put(payload)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        self.whole.update(bytes);
        self.bytes += bytes.len() as u64;
        let Self { file, partial, .. } = self;
        file.write_all(bytes).map_err(|error| io_error("write", &partial.path, error))
    }
}

fn block_checksum(kind: u8, number: u64, payload: &[u8]) -> u64 {
    xxh3_64_with_seed(payload, (number << 8) | u64::from(kind))
}

/// Reads one snapshot, and verifies it on the way.
pub struct SnapshotReader {
    path: PathBuf,
    file: BufReader<File>,
    whole: Xxh3,
    offset: u64,
    blocks: u64,
    index: u64,
    header: Bytes,
}

impl SnapshotReader {
    /// Opens the file and reads its header.
    ///
    /// # Errors
    /// It cannot be read, or does not begin like a snapshot.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let file = File::open(path).map_err(|error| io_error("open", path, error))?;
        let mut reader = Self {
            path: path.to_owned(),
            file: BufReader::with_capacity(2 * BLOCK_BYTES, file),
            whole: Xxh3::new(),
            offset: 0,
            blocks: 0,
            index: 0,
            header: Bytes::new(),
        };
        let mut start = [0; MAGIC.len() + 1];
        reader.take(&mut start)?;
        if start[..MAGIC.len()] != MAGIC {
            return Err(reader.corrupt("it is no snapshot of ours"));
        }
        if start[MAGIC.len()] != VERSION {
            let reason = format!("format version {} is unknown", start[MAGIC.len()]);
            return Err(reader.corrupt(&reason));
        }
        let (kind, mut payload, _) = reader.take_block()?;
        if kind != HEADER || payload.len() < 8 {
            return Err(reader.corrupt("it does not begin with its header"));
        }
        let mut index = [0; 8];
        index.copy_from_slice(&payload.split_to(8));
        reader.index = u64::from_le_bytes(index);
        reader.header = payload;
        Ok(reader)
    }

    /// The log index that the snapshot is as of.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The opaque header.
    pub fn header(&self) -> &Bytes {
        &self.header
    }

    /// The records. What is given has passed its block's checksum; that nothing is missing is
    /// known when the iterator has ended without an error.
    pub fn records(self) -> SnapshotRecords {
        SnapshotRecords {
            reader: self,
            block: Bytes::new(),
            last: Bytes::new(),
            records: 0,
            done: false,
        }
    }

    fn corrupt(&self, reason: &str) -> SnapshotError {
        let path = self.path.display().to_string();
        SnapshotError::Corrupt { path, offset: self.offset, reason: reason.into() }
    }

    fn take(&mut self, into: &mut [u8]) -> Result<(), SnapshotError> {
        match self.file.read_exact(into) {
            Ok(()) => {
                self.whole.update(into);
                self.offset += into.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.corrupt("it is cut short"))
            }
            Err(error) => Err(io_error("read", &self.path, error)),
        }
    }

    /// The next block's kind and payload, and the checksum of the whole file before the block.
    fn take_block(&mut self) -> Result<(u8, Bytes, u64), SnapshotError> {
        let whole = self.whole.digest();
        let mut header = [0; BLOCK_HEADER_BYTES];
        self.take(&mut header)?;
        let kind = header[0];
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if length > BLOCK_BYTES_MAX {
            return Err(self.corrupt("a block is too long"));
        }
        // The length is not verified yet: grow with what is really there.
        let mut payload = BytesMut::new();
        while payload.len() < length {
            let start = payload.len();
            payload.resize(length.min(start + 4 * BLOCK_BYTES), 0);
            self.take(&mut payload[start..])?;
        }
        let mut checksum = [0; 8];
        checksum.copy_from_slice(&header[5..]);
        if u64::from_le_bytes(checksum) != block_checksum(kind, self.blocks, &payload) {
            return Err(self.corrupt("a block does not match its checksum"));
        }
        self.blocks += 1;
        Ok((kind, payload.freeze(), whole))
    }

    fn take_trailer(
        &mut self,
        payload: &[u8],
        whole: u64,
        records: u64,
    ) -> Result<(), SnapshotError> {
        let expected = [records.to_le_bytes(), whole.to_le_bytes()].concat();
        if payload.len() != TRAILER_BYTES || payload != expected {
            return Err(self.corrupt("its trailer does not match its contents"));
        }
        match self.file.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(self.corrupt("something follows its trailer")),
            Err(error) => Err(io_error("read", &self.path, error)),
        }
    }
}

/// The records of a snapshot, in ascending order of keys. Keys and values are slices of a block
/// of some 64 KiB, which each of them keeps alive: copy what is to be kept.
pub struct SnapshotRecords {
    reader: SnapshotReader,
    block: Bytes,
    last: Bytes,
    records: u64,
    done: bool,
}

impl SnapshotRecords {
    fn read(&mut self) -> Result<Option<(Bytes, Bytes)>, SnapshotError> {
        while self.block.is_empty() {
            let (kind, payload, whole) = self.reader.take_block()?;
            match kind {
                RECORDS if !payload.is_empty() => self.block = payload,
                TRAILER => {
                    self.reader.take_trailer(&payload, whole, self.records)?;
                    return Ok(None);
                }
                _ => return Err(self.reader.corrupt("a block is out of place")),
            }
        }
        let record = self.split().ok_or_else(|| self.reader.corrupt("a record is malformed"))?;
        if self.records > 0 && record.0 <= self.last {
            return Err(self.reader.corrupt("its records are not in ascending order"));
        }
        self.last = record.0.clone();
        self.records += 1;
        Ok(Some(record))
    }

    fn split(&mut self) -> Option<(Bytes, Bytes)> {
        let key_bytes = u32::from_le_bytes(*self.block.first_chunk::<4>()?) as usize;
        let value_bytes = u32::from_le_bytes(*self.block.get(4..)?.first_chunk::<4>()?) as usize;
        if key_bytes > KEY_BYTES_MAX || value_bytes > VALUE_BYTES_MAX {
            return None;
        }
        let end = LENGTHS_BYTES + key_bytes + value_bytes;
        if self.block.len() < end {
            return None;
        }
        let record = self.block.split_to(end);
        let (key, value) = (LENGTHS_BYTES, LENGTHS_BYTES + key_bytes);
        Some((record.slice(key..value), record.slice(value..)))
    }
}

impl Iterator for SnapshotRecords {
    type Item = Result<(Bytes, Bytes), SnapshotError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.read().transpose();
        // After an error nothing that follows can be relied on.
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}

/// Reads a snapshot from the first to the last byte.
///
/// # Errors
/// It cannot be read, or is not intact.
pub fn verify(path: &Path) -> Result<SnapshotFile, SnapshotError> {
    let reader = SnapshotReader::open(path)?;
    let index = reader.index();
    let mut records = reader.records();
    records.by_ref().try_for_each(|record| record.map(drop))?;
    Ok(SnapshotFile { path: path.to_owned(), index, bytes: records.reader.offset })
}

/// Receives the bytes of a peer's snapshot. Dropped before [`finish`](Self::finish), it leaves
/// nothing behind.
pub struct SnapshotReceiver {
    partial: Partial,
    directory: PathBuf,
    file: File,
    bytes: u64,
    limit: u64,
}

impl SnapshotReceiver {
    /// Begins to receive a snapshot of at most `limit` bytes.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(directory: &Path, limit: u64) -> Result<Self, SnapshotError> {
        // One that was given up may not have been dropped yet, so names are not shared.
        let mut number = 0;
        let path = loop {
            let path = directory.join(format!("received-{number}{PARTIAL_SUFFIX}"));
            if !path.try_exists().map_err(|error| io_error("look for", &path, error))? {
                break path;
            }
            number += 1;
        };
        let (partial, file) = Partial::create(path)?;
        Ok(Self { partial, directory: directory.to_owned(), file, bytes: 0, limit })
    }

    /// Appends what arrived.
    ///
    /// # Errors
    /// The file cannot be written, or there is too much.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        self.bytes += bytes.len() as u64;
        if self.bytes > self.limit {
            return Err(SnapshotError::Limit { limit: self.limit });
        }
        self.file.write_all(bytes).map_err(|error| io_error("write", &self.partial.path, error))
    }

    /// Bytes received so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Verifies what was received, all of it, and returns once it is durable under its final name.
    ///
    /// # Errors
    /// It is not an intact snapshot; or the file cannot be read, synced or renamed.
    pub fn finish(self) -> Result<SnapshotFile, SnapshotError> {
        let Self { partial, directory, file, .. } = self;
        file.sync_all().map_err(|error| io_error("sync", &partial.path, error))?;
        let SnapshotFile { index, bytes, .. } = verify(&partial.path)?;
        let path = final_path(&directory, index);
        partial.keep(&path)?;
        Ok(SnapshotFile { path, index, bytes })
    }
}

/// Creates the directory of the snapshots, durably, and clears it of what was not finished.
///
/// # Errors
/// The directory cannot be made or cleared.
pub fn prepare(directory: &Path) -> Result<(), SnapshotError> {
    let failed = |error| io_error("create", directory, error);
    create_dir_durably(&RealFiles, directory).map_err(failed)?;
    remove_partials(directory)?;
    sync_directory(directory).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(count: u32) -> Vec<(Vec<u8>, Vec<u8>)> {
        let value = |number: u32| match number % 50 {
            0 => vec![],
            7 => vec![7; 1024 * 1024],
            size => vec![number as u8; (size * 11) as usize],
        };
        (0..count).map(|number| (number.to_be_bytes().to_vec(), value(number))).collect()
    }

    fn write(directory: &Path, index: u64, records: &[(Vec<u8>, Vec<u8>)]) -> SnapshotFile {
        let mut writer = SnapshotWriter::create(directory, index, b"header").unwrap();
        for (key, value) in records {
            writer.write(key, value).unwrap();
        }
        writer.finish().unwrap()
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries.map(name).map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_snapshot_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        for count in [0, 1, 1000] {
            let expected = records(count);
            let file = write(directory.path(), 42, &expected);
            assert_eq!(file.bytes, fs::metadata(&file.path).unwrap().len());
            assert_eq!(names(directory.path()), ["snapshot-00000000000000000042.quorate"]);
            assert_eq!(verify(&file.path).unwrap(), file);
            let reader = SnapshotReader::open(&file.path).unwrap();
            assert_eq!((reader.index(), reader.header().as_ref()), (42, &b"header"[..]));
            let read: Vec<_> = reader
                .records()
                .map(|record| record.map(|(key, value)| (key.to_vec(), value.to_vec())).unwrap())
                .collect();
            assert!(read == expected);
        }
    }

    /// These bytes are on disks and on the wire: if this fails, the format changed.
    #[test]
    fn golden_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let file = write(directory.path(), 3, &[(b"key".to_vec(), b"value".to_vec())]);
        let bytes = fs::read(file.path).unwrap();
        let checksum = xxh3_64_with_seed(&bytes, 0);
        assert_eq!((bytes.len(), checksum), (94, 0x75c2_5078_b0e9_ba30));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let few: Vec<_> = (0..5u8).map(|key| (vec![key], vec![9; key.into()])).collect();
        let file = write(directory.path(), 1, &few);
        let bytes = fs::read(&file.path).unwrap();
        let damaged_path = directory.path().join("damaged");
        let damaged = |bytes: &[u8]| {
            fs::write(&damaged_path, bytes).unwrap();
            verify(&damaged_path).is_err()
        };
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(damaged(&flipped), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(damaged(&bytes[..length]), "cut to {length}");
        }
        assert!(damaged(&[&bytes[..], &[0]].concat()), "one byte more");
        assert!(!damaged(&bytes));
    }

    #[test]
    fn whole_blocks_that_are_missing_doubled_or_swapped_are_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let many: Vec<_> =
            (0..900u32).map(|key| (key.to_be_bytes().to_vec(), vec![1; 300])).collect();
        let file = write(directory.path(), 1, &many);
        let bytes = fs::read(&file.path).unwrap();
        let mut blocks = Vec::new();
        let mut start = MAGIC.len() + 1;
        while start < bytes.len() {
            let length = u32::from_le_bytes(bytes[start + 1..start + 5].try_into().unwrap());
            let end = start + BLOCK_HEADER_BYTES + length as usize;
            blocks.push(bytes[start..end].to_vec());
            start = end;
        }
        assert!(blocks.len() > 5);
        let intact = |blocks: &[Vec<u8>]| {
            let path = directory.path().join("changed");
            fs::write(&path, [&bytes[..MAGIC.len() + 1], &blocks.concat()].concat()).unwrap();
            verify(&path).is_ok()
        };
        assert!(intact(&blocks));
        for block in 0..blocks.len() - 1 {
            let mut changed = blocks.clone();
            changed.swap(block, block + 1);
            assert!(!intact(&changed));
            changed = blocks.clone();
            changed.remove(block);
            assert!(!intact(&changed));
            changed = blocks.clone();
            changed.insert(block, blocks[block].clone());
            assert!(!intact(&changed));
        }
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = SnapshotWriter::create(directory.path(), 1, b"").unwrap();
        writer.write(b"b", b"").unwrap();
        assert!(matches!(writer.write(b"b", b""), Err(SnapshotError::Unordered)));
        assert!(matches!(writer.write(b"a", b""), Err(SnapshotError::Unordered)));
        let large = vec![0; VALUE_BYTES_MAX + 1];
        assert!(matches!(writer.write(b"c", &large), Err(SnapshotError::TooLarge { .. })));
        assert_eq!(names(directory.path()), ["snapshot-00000000000000000001.quorate.partial"]);
        assert_eq!(newest(directory.path()).unwrap(), None);
        drop(writer);
        assert!(names(directory.path()).is_empty());
        fs::write(directory.path().join("received-0.partial"), b"left by a crash").unwrap();
        prepare(directory.path()).unwrap();
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn the_newest_counts_and_older_ones_go() {
        let directory = tempfile::tempdir().unwrap();
        for index in [7, 100, 20] {
            write(directory.path(), index, &records(3));
        }
        assert_eq!(newest(directory.path()).unwrap().unwrap().index, 100);
        remove_older(directory.path(), 100).unwrap();
        assert_eq!(names(directory.path()), ["snapshot-00000000000000000100.quorate"]);
    }

    #[test]
    fn what_is_received_is_verified_before_it_counts() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = write(from.path(), 9, &records(100));
        let bytes = fs::read(&file.path).unwrap();
        let mut receiver = SnapshotReceiver::create(to.path(), bytes.len() as u64).unwrap();
        let mut other = SnapshotReceiver::create(to.path(), 1 << 30).unwrap();
        let mut cut = SnapshotReceiver::create(to.path(), 1 << 30).unwrap();
        for chunk in bytes.chunks(10_000) {
            receiver.write(chunk).unwrap();
            let mut damaged = chunk.to_vec();
            damaged[5000 % chunk.len()] ^= 1;
            other.write(&damaged).unwrap();
        }
        cut.write(&bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(names(to.path()).len(), 3);
        assert!(matches!(other.finish(), Err(SnapshotError::Corrupt { .. })));
        assert!(matches!(cut.finish(), Err(SnapshotError::Corrupt { .. })));
        let received = receiver.finish().unwrap();
        assert_eq!((received.index, received.bytes), (9, file.bytes));
        assert_eq!(names(to.path()), ["snapshot-00000000000000000009.quorate"]);
        let mut limited = SnapshotReceiver::create(to.path(), 10).unwrap();
        assert!(matches!(limited.write(&bytes), Err(SnapshotError::Limit { limit: 10 })));
    }
}
