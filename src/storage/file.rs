//! The file layer: every byte of the write-ahead log goes through these two traits.
//!
//! They exist so that a test can stand between the log and its disk and pull the plug: `RealFiles`
//! is the operating system, `faulty` an imitation that loses whatever was not synced. Snapshots
//! and the identity are written by way of `durable`, and sled does its own.
//!
//! What callers may rely on, and `faulty` takes away at its worst:
//! - [`File::write_all_at`] promises nothing until a sync of that file returned. Until then any
//!   512-byte sector of it may be on disk or not, whatever the order in which it was written, and
//!   one block of [`BLOCK_BYTES`] of it may be spoilt, with all that was in it before.
//! - A name (create, rename, remove) promises nothing until [`Files::sync_dir`] of its directory.
//!   That holds for the names of directories too.
//! - Once a sync failed, what it covered is unknown for good: a second sync that succeeds proves
//!   nothing, because the kernel may have dropped the pages (the "fsyncgate" of 2018).

use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{DirBuilderExt as _, FileExt, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, fadvise};

use super::durable::{DIRECTORY_MODE, FILE_MODE};

#[cfg(test)]
pub(crate) mod faulty;

/// Bytes of a block: what is written in whole blocks from a [`BlockBuffer`] can go to the disk
/// past the page cache, which spares a copy of all that is written. The largest sector and page in
/// common use.
pub const BLOCK_BYTES: usize = 4096;

/// Bytes that begin at a multiple of [`BLOCK_BYTES`] in memory, as direct I/O wants them. Keeps its
/// allocation from use to use.
#[derive(Debug, Default)]
pub struct BlockBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl BlockBuffer {
    /// Makes it `length` bytes long. What is in there is not specified.
    pub fn reset(&mut self, length: usize) {
        if self.memory.len() < length + BLOCK_BYTES {
            // Dropped first: nothing of it needs to be copied.
            self.memory = Vec::new();
            self.memory = vec![0; (length + BLOCK_BYTES).next_power_of_two()];
            self.start = self.memory.as_ptr().align_offset(BLOCK_BYTES);
        }
        self.length = length;
    }
}

impl Deref for BlockBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..][..self.length]
    }
}

impl DerefMut for BlockBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.length]
    }
}

/// A file system, as far as storage needs one. Paths are used as given.
pub trait Files: Send + Sync + 'static {
    /// Opens an existing file for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>>;

    /// Creates an empty file for reading and writing, for its owner alone; one of that name is
    /// emptied.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>>;

    /// Names of all entries of a directory, sorted. Names that are not UTF-8 are left out.
    fn list(&self, directory: &Path) -> io::Result<Vec<String>>;

    /// True if a file or directory of that name exists.
    fn exists(&self, path: &Path) -> io::Result<bool>;

    /// Gives a file another name within its directory, replacing one that has it, atomically.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file. It stays readable through handles that are open.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Creates a directory in one that is there, for its owner alone.
    fn create_dir(&self, directory: &Path) -> io::Result<()>;

    /// Makes the creations, renames and removals in a directory durable.
    fn sync_dir(&self, directory: &Path) -> io::Result<()>;
}

/// An open file. All calls take an offset, so that one handle serves several threads.
#[expect(clippy::len_without_is_empty, reason = "a length in bytes, not a collection")]
pub trait File: Send + Sync {
    /// Writes all of `bytes` at `offset`; the file grows as needed.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Fills `buffer` from `offset`; `UnexpectedEof` if the file ends before.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// As [`File::read_exact_at`], but asks the disk and not what the system remembers of it:
    /// after a sync that failed the two may differ for good. Offset and length are multiples of
    /// [`BLOCK_BYTES`].
    fn read_from_disk(&self, buffer: &mut BlockBuffer, offset: u64) -> io::Result<()>;

    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Cuts or extends (with zeros) to `length` bytes.
    fn set_len(&self, length: u64) -> io::Result<()>;

    /// Makes content durable, with the length if it changed (`fdatasync`).
    fn sync_data(&self) -> io::Result<()>;

    /// Makes content and all metadata durable (`fsync`).
    fn sync_all(&self) -> io::Result<()>;
}

/// The operating system's files.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealFiles;

impl Files for RealFiles {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Arc::new(RealFile::new(file, path)))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(FILE_MODE);
        let file = options.open(path)?;
        Ok(Arc::new(RealFile::new(file, path)))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(directory)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir(&self, directory: &Path) -> io::Result<()> {
        fs::DirBuilder::new().mode(DIRECTORY_MODE).create(directory)
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        fs::File::open(directory)?.sync_all()
    }
}

/// An open file of the operating system, with a second handle for whole blocks.
///
/// Linux warns of mixing direct and buffered I/O on one file. It is sound here: a direct write
/// drops what the page cache held of its range, before and after, and where it cannot, the next
/// sync fails; a sync is of the file, not of the handle; and what is read while it is being written
/// is checked against a checksum by whoever reads.
struct RealFile {
    buffered: fs::File,
    /// `None` where the file system knows no direct I/O, as some that live in memory.
    direct: Option<fs::File>,
    /// Set once the file system has refused direct I/O: it may want larger blocks than ours.
    refused: AtomicBool,
}

impl RealFile {
    fn new(buffered: fs::File, path: &Path) -> Self {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let direct = options.open(path).ok();
        // Opened by name a second time: what is written through one must be synced by the other.
        let same = |file: &fs::File| {
            let (a, b) = (file.metadata().ok()?, buffered.metadata().ok()?);
            Some((a.dev(), a.ino()) == (b.dev(), b.ino()))
        };
        let direct = direct.filter(|direct| same(direct) == Some(true));
        Self { buffered, direct, refused: AtomicBool::new(false) }
    }

    /// The handle for I/O of `bytes` at `offset`, if it may go past the page cache.
    fn direct_for(&self, bytes: &[u8], offset: u64) -> Option<&fs::File> {
        let fits = bytes.len().is_multiple_of(BLOCK_BYTES)
            && offset.is_multiple_of(BLOCK_BYTES as u64)
            && bytes.as_ptr().addr().is_multiple_of(BLOCK_BYTES)
            && !self.refused.load(Ordering::Relaxed);
        self.direct.as_ref().filter(|_| fits)
    }

    fn note_refusal(&self, error: &io::Error) {
        self.refused.store(true, Ordering::Relaxed);
        tracing::info!(%error, "direct I/O was refused; reads and writes are buffered");
    }
}

/// Whether direct I/O failed because it was that.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

impl File for RealFile {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if let Some(direct) = self.direct_for(bytes, offset) {
            match direct.write_all_at(bytes, offset) {
                // What was written of it before the refusal is written again.
                Err(error) if is_refusal(&error) => self.note_refusal(&error),
                written => return written,
            }
        }
        self.buffered.write_all_at(bytes, offset)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.buffered.read_exact_at(buffer, offset)
    }

    fn read_from_disk(&self, buffer: &mut BlockBuffer, offset: u64) -> io::Result<()> {
        if let Some(direct) = self.direct_for(buffer, offset) {
            match direct.read_exact_at(buffer, offset) {
                Err(error) if is_refusal(&error) => self.note_refusal(&error),
                read => return read,
            }
        }
        // Next best: the page cache is asked to forget the range. Where it does not, as in a file
        // system that lives in memory, what it remembers is all there is.
        let length = NonZeroU64::new(buffer.len() as u64);
        if let Err(error) = fadvise(&self.buffered, offset, length, Advice::DontNeed) {
            tracing::debug!(%error, "the page cache keeps what it was asked to forget");
        }
        self.buffered.read_exact_at(buffer, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.buffered.metadata()?.len())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.buffered.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.buffered.sync_data()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.buffered.sync_all()
    }
}

/// Replaces the whole of a small file: after a crash it holds either the old bytes or the new
/// ones, and after `Ok` the new ones. Leaves `<path>.tmp` behind if it is interrupted.
pub fn replace(files: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let beside = PathBuf::from(beside);
    let file = files.create(&beside)?;
    file.write_all_at(bytes, 0)?;
    file.sync_all()?;
    files.rename(&beside, path)?;
    files.sync_dir(parent(path))
}

/// Creates a directory and those above it, where missing, so that a power cut does not take them
/// away again. Each is durable before the next is created; so if this is interrupted, only the
/// lowest that is there may not be, and that is made durable by the next call.
pub fn create_dir_durably(files: &dyn Files, directory: &Path) -> io::Result<()> {
    let mut missing = Vec::new();
    for ancestor in directory.ancestors().filter(|path| !path.as_os_str().is_empty()) {
        if files.exists(ancestor)? {
            if let Err(error) = files.sync_dir(parent(ancestor)) {
                // Of a directory that somebody else made, in a place that is not ours to sync.
                if !is_not_ours(&error) {
                    return Err(error);
                }
                tracing::debug!(directory = %ancestor.display(), %error, "its name is not synced");
            }
            break;
        }
        missing.push(ancestor);
    }
    missing.into_iter().rev().try_for_each(|directory| {
        files.create_dir(directory)?;
        files.sync_dir(parent(directory))
    })
}

/// Whether a directory cannot be synced for reasons that no process of ours can have caused: it may
/// not be read, or its file system has nothing to sync.
fn is_not_ours(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem, Unsupported};
    matches!(error.kind(), InvalidInput | PermissionDenied | ReadOnlyFilesystem | Unsupported)
}

/// Reads a whole file, or refuses one of more than `bytes_max` bytes.
pub fn read_whole(files: &dyn Files, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = files.open(path)?;
    let length = file.len()?;
    if length > bytes_max {
        let reason = format!("{} is {length} bytes, more than {bytes_max}", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The directory that holds `path`; the current one if it has no other.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_back_however_they_were_written() {
        let directory = tempfile::tempdir().unwrap();
        let file = RealFiles.create(&directory.path().join("file")).unwrap();
        let mut blocks = BlockBuffer::default();
        for round in 1..4 {
            blocks.reset(round * BLOCK_BYTES);
            assert_eq!(blocks.as_ptr().addr() % BLOCK_BYTES, 0);
            blocks.fill(round as u8);
            // Once past the page cache, once through it, one over the end of the other.
            file.write_all_at(&blocks, (round * BLOCK_BYTES) as u64).unwrap();
            file.write_all_at(&[9; 10], (2 * round * BLOCK_BYTES - 5) as u64).unwrap();
            file.sync_data().unwrap();
            let mut read = vec![0; round * BLOCK_BYTES + 5];
            file.read_exact_at(&mut read, (round * BLOCK_BYTES) as u64).unwrap();
            let (first, last) = read.split_at(round * BLOCK_BYTES - 5);
            assert!(first.iter().all(|byte| *byte == round as u8));
            assert_eq!(last, [9; 10]);
            file.read_from_disk(&mut blocks, (round * BLOCK_BYTES) as u64).unwrap();
            assert_eq!(blocks[..], read[..round * BLOCK_BYTES]);
        }
        let end = file.read_from_disk(&mut blocks, (8 * BLOCK_BYTES) as u64).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn real_files_do_what_the_trait_says() {
        let directory = tempfile::tempdir().unwrap();
        let files = RealFiles;
        let nested = directory.path().join("a/b");
        create_dir_durably(&files, &nested).unwrap();
        create_dir_durably(&files, &nested).unwrap();
        let path = nested.join("file");
        assert!(!files.exists(&path).unwrap());
        replace(&files, &path, b"one").unwrap();
        replace(&files, &path, b"three").unwrap();
        assert_eq!(read_whole(&files, &path, 5).unwrap(), b"three");
        assert_eq!(read_whole(&files, &path, 4).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(files.list(&nested).unwrap(), ["file"]);

        let file = files.open(&path).unwrap();
        file.write_all_at(b"xy", 8).unwrap();
        assert_eq!(read_whole(&files, &path, 100).unwrap(), b"three\0\0\0xy");
        file.set_len(2).unwrap();
        assert_eq!(file.len().unwrap(), 2);
        file.sync_data().unwrap();
        let end = file.read_exact_at(&mut [0; 3], 0).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);

        files.remove(&path).unwrap();
        assert_eq!(files.open(&path).err().unwrap().kind(), io::ErrorKind::NotFound);
        file.read_exact_at(&mut [0; 2], 0).unwrap();
    }
}
