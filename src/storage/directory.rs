//! The data directory of one node: who may use it, and whose it is.
//!
//! ```text
//! lock         held (flock) for as long as the node lives
//! identity     which node of which cluster this is
//! time         what the time was, for the next start
//! wal/ sled/ snapshots/
//! ```
//!
//! A directory is taken into use only if it is empty or has an identity of ours, so that a typing
//! error in a path neither mixes with foreign files nor makes a node that has lost its disk look
//! like a new one. A directory that has our log but no identity is refused for that reason too.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::durable::{partial_path, sync_directory, write_file};
use super::envelope::{self, EnvelopeError, Magic};

const MAGIC: Magic = *b"QRIDENTY";
const VERSION: u8 = 1;
const LOCK: &str = "lock";
const IDENTITY: &str = "identity";
const WAL: &str = "wal";
const SLED: &str = "sled";
const SNAPSHOTS: &str = "snapshots";
const TIME: &str = "time";
/// What a freshly made file system holds.
const LOST_AND_FOUND: &str = "lost+found";

/// Why a data directory cannot be used.
#[derive(Debug, Error)]
pub enum DirectoryError {
    /// Another process (or another node of this one) works in it.
    #[error("data directory {path} is in use by another process")]
    Locked {
        /// Which directory.
        path: String,
    },
    /// Something else is in it, or what is left of a node without its identity.
    #[error(
        "data directory {path} has no identity of a node but is not empty (found {found}): \
         name another directory, or empty it if this node is new"
    )]
    Foreign {
        /// Which directory.
        path: String,
        /// One of the entries that do not belong there.
        found: String,
    },
    /// The identity is damaged, or of another release.
    #[error("the identity in data directory {path} cannot be read: {source}")]
    Identity {
        /// Which directory.
        path: String,
        /// What is wrong with it.
        source: EnvelopeError,
    },
    /// It cannot be created, read or written.
    #[error("cannot {action} in data directory {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// Which directory.
        path: String,
        /// What the file system said.
        source: io::Error,
    },
    /// The node that worked in it has stopped.
    #[error("the node has stopped")]
    Released,
}

/// Whose directory it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Identity {
    /// A node that belongs to no cluster yet.
    Empty {
        /// Random number of this directory's life.
        incarnation: u64,
    },
    /// A member of a cluster.
    Member {
        /// Which cluster.
        cluster_id: u128,
        /// Which of its nodes.
        node_id: u64,
        /// Random number of this directory's life.
        incarnation: u64,
        /// Opaque: what else is remembered about the cluster.
        members: Bytes,
    },
}

impl Identity {
    /// Random number of the directory's life; never changes.
    pub fn incarnation(&self) -> u64 {
        match self {
            Self::Empty { incarnation } | Self::Member { incarnation, .. } => *incarnation,
        }
    }
}

/// A data directory, locked for as long as this value lives.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    identity: Identity,
    _lock: Lock,
}

/// The lock file, locked. Unlocked in so many words when it goes: closing the file alone does not
/// do it while a child process, forked at that moment by another thread, still holds a copy of it.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "cannot unlock the data directory; closing it will");
        }
    }
}

impl DataDirectory {
    /// Takes the directory into use, and creates it if need be. A new one gets `incarnation`, a
    /// fresh random number, as the incarnation of its life; one that has an identity keeps its
    /// own.
    ///
    /// # Errors
    /// See [`DirectoryError`]. Nothing is written into a directory that is refused as foreign.
    pub fn open(path: &Path, incarnation: u64) -> Result<Self, DirectoryError> {
        let failed = |action| move |source| io_error(action, path, source);
        let existed = path.is_dir();
        fs::create_dir_all(path).map_err(failed("create"))?;
        if !existed {
            let path = path.canonicalize().map_err(failed("create"))?;
            path.parent().map_or(Ok(()), sync_directory).map_err(failed("create"))?;
        }
        refuse_foreign(path)?;
        let lock = lock(path)?;
        // What was there before the lock was taken may have changed while another held it.
        refuse_foreign(path)?;
        let identity = match read_identity(path)? {
            Some(identity) => identity,
            None => {
                let identity = Identity::Empty { incarnation };
                write_identity(path, &identity)?;
                identity
            }
        };
        for directory in [WAL, SLED, SNAPSHOTS] {
            fs::create_dir_all(path.join(directory)).map_err(failed("create directories"))?;
        }
        sync_directory(path).map_err(failed("create directories"))?;
        Ok(Self { path: path.to_owned(), identity, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whose it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Saves a new identity, durably: after a power cut the old or the new one is found.
    ///
    /// # Errors
    /// It cannot be written; which of the two is found then is unknown.
    ///
    /// # Panics
    /// When the incarnation differs: a directory has one life.
    pub fn save_identity(&mut self, identity: Identity) -> Result<(), DirectoryError> {
        assert_eq!(
            identity.incarnation(),
            self.identity.incarnation(),
            "the incarnation of a data directory never changes"
        );
        write_identity(&self.path, &identity)?;
        self.identity = identity;
        Ok(())
    }

    /// The directory of the write-ahead log.
    pub fn wal_path(&self) -> PathBuf {
        self.path.join(WAL)
    }

    /// The directory of the checkpoint store.
    pub fn sled_path(&self) -> PathBuf {
        self.path.join(SLED)
    }

    /// The directory of the snapshot files.
    pub fn snapshots_path(&self) -> PathBuf {
        self.path.join(SNAPSHOTS)
    }

    /// The note of what the time was.
    pub fn time_path(&self) -> PathBuf {
        self.path.join(TIME)
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> DirectoryError {
    DirectoryError::Io { action, path: path.display().to_string(), source }
}

fn lock(path: &Path) -> Result<Lock, DirectoryError> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path.join(LOCK));
    let file = file.map_err(|source| io_error("write", path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(TryLockError::WouldBlock) => {
            Err(DirectoryError::Locked { path: path.display().to_string() })
        }
        Err(TryLockError::Error(source)) => Err(io_error("take the lock", path, source)),
    }
}

/// Without an identity there may be nothing but what a first start leaves when it is cut off
/// before it has saved one.
fn refuse_foreign(path: &Path) -> Result<(), DirectoryError> {
    let failed = |source| io_error("list files", path, source);
    let partial = partial_path(Path::new(IDENTITY));
    let mut foreign = None;
    for entry in fs::read_dir(path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if name == IDENTITY {
            return Ok(());
        }
        if name != LOCK && name != LOST_AND_FOUND && name != partial.as_os_str() {
            foreign = Some(name);
        }
    }
    match foreign {
        None => Ok(()),
        Some(name) => Err(DirectoryError::Foreign {
            path: path.display().to_string(),
            found: name.to_string_lossy().into_owned(),
        }),
    }
}

fn read_identity(path: &Path) -> Result<Option<Identity>, DirectoryError> {
    let bytes = match fs::read(path.join(IDENTITY)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(io_error("read the identity", path, source)),
    };
    envelope::unseal(MAGIC, VERSION, &bytes)
        .map(Some)
        .map_err(|source| DirectoryError::Identity { path: path.display().to_string(), source })
}

fn write_identity(path: &Path, identity: &Identity) -> Result<(), DirectoryError> {
    let bytes = envelope::seal(MAGIC, VERSION, identity)
        .map_err(|source| DirectoryError::Identity { path: path.display().to_string(), source })?;
    write_file(&path.join(IDENTITY), &bytes)
        .map_err(|source| io_error("save the identity", path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member() -> Identity {
        Identity::Member {
            cluster_id: 0x0011_2233,
            node_id: 3,
            incarnation: 77,
            members: Bytes::from_static(b"members"),
        }
    }

    #[test]
    fn a_directory_keeps_its_identity() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("deep/data");
        let mut directory = DataDirectory::open(&path, 77).unwrap();
        assert_eq!(directory.identity(), &Identity::Empty { incarnation: 77 });
        assert!(directory.wal_path().is_dir());
        assert!(directory.sled_path().is_dir());
        assert!(directory.snapshots_path().is_dir());
        drop(directory);
        directory = DataDirectory::open(&path, 78).unwrap();
        assert_eq!(directory.identity(), &Identity::Empty { incarnation: 77 });
        directory.save_identity(member()).unwrap();
        assert_eq!(directory.identity(), &member());
        drop(directory);
        assert_eq!(DataDirectory::open(&path, 79).unwrap().identity(), &member());
    }

    #[test]
    fn one_at_a_time() {
        let parent = tempfile::tempdir().unwrap();
        let first = DataDirectory::open(parent.path(), 1).unwrap();
        let second = DataDirectory::open(parent.path(), 2);
        assert!(matches!(second, Err(DirectoryError::Locked { .. })), "{second:?}");
        drop(first);
        DataDirectory::open(parent.path(), 2).unwrap();
    }

    /// As a child process has one between its fork and its exec.
    #[test]
    fn a_copy_of_the_lock_holds_nobody_back() {
        let parent = tempfile::tempdir().unwrap();
        let directory = DataDirectory::open(parent.path(), 1).unwrap();
        let copy = directory._lock.0.try_clone().unwrap();
        drop(directory);
        DataDirectory::open(parent.path(), 2).unwrap();
        drop(copy);
    }

    #[test]
    fn foreign_directories_are_refused_untouched() {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join("thesis.tex"), "").unwrap();
        let error = DataDirectory::open(parent.path(), 1).unwrap_err();
        assert!(error.to_string().contains("thesis.tex"), "{error}");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
        // Our own log without its identity: the node would come back as somebody else.
        let own = tempfile::tempdir().unwrap();
        drop(DataDirectory::open(own.path(), 1).unwrap());
        fs::remove_file(own.path().join(IDENTITY)).unwrap();
        let error = DataDirectory::open(own.path(), 1).unwrap_err();
        assert!(matches!(error, DirectoryError::Foreign { .. }), "{error}");
    }

    #[test]
    fn what_a_first_start_left_is_no_obstacle() {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join(LOCK), "").unwrap();
        fs::write(parent.path().join("identity.partial"), "half").unwrap();
        fs::create_dir(parent.path().join(LOST_AND_FOUND)).unwrap();
        DataDirectory::open(parent.path(), 1).unwrap();
        assert!(!parent.path().join("identity.partial").exists());
    }

    #[test]
    fn what_cannot_be_a_directory_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let file = parent.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("below")] {
            let error = DataDirectory::open(&path, 1).unwrap_err();
            assert!(matches!(error, DirectoryError::Io { .. }), "{error}");
        }
    }

    #[test]
    fn every_flipped_bit_of_an_identity_is_noticed() {
        let parent = tempfile::tempdir().unwrap();
        let mut directory = DataDirectory::open(parent.path(), 77).unwrap();
        directory.save_identity(member()).unwrap();
        drop(directory);
        let place = parent.path().join(IDENTITY);
        let bytes = fs::read(&place).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&place, &damaged).unwrap();
            let error = DataDirectory::open(parent.path(), 1).unwrap_err();
            assert!(matches!(error, DirectoryError::Identity { .. }), "bit {bit}: {error}");
        }
        fs::write(&place, b"").unwrap();
        assert!(DataDirectory::open(parent.path(), 1).is_err(), "an empty file is no identity");
    }

    /// These bytes are on disks: if this fails, the format changed.
    #[test]
    fn golden_bytes() {
        let hex = |identity| -> String {
            let bytes = envelope::seal(MAGIC, VERSION, &identity).unwrap();
            bytes[..bytes.len() - 4].iter().map(|byte| format!("{byte:02x}")).collect()
        };
        assert_eq!(hex(Identity::Empty { incarnation: 77 }), "51524944454e545901004d");
        assert_eq!(hex(member()), "51524944454e54590101fc33221100034d076d656d62657273");
    }
}
