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
//!
//! Files hold the values of sessions, so nobody but the node's user may read them: directories are
//! made with permissions 0700 and files with 0600, and what is there with others is mended at each
//! start. A directory that belongs to somebody else and is open to others, as a volume may that a
//! Kubernetes `fsGroup` was set for, cannot be mended; a new node then keeps everything in a
//! directory `quorate` within, which can, and which is found again at the next start.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::durable::{DIRECTORY_MODE, FILE_MODE, partial_path, write_file};
use super::envelope::{self, EnvelopeError, Magic};
use super::file::{RealFiles, create_dir_durably};
use super::outside::explain;

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
/// Where everything is in a directory that is not ours to close to others.
const INNER: &str = "quorate";
/// What a group and others may do.
const OTHERS: u32 = 0o077;

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
    #[error("cannot {action} in data directory {path}: {}", explain(source))]
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
    /// Takes the directory, or the one within that is closed to others, into use, and creates it if
    /// need be. A new one gets `incarnation`, a fresh random number, as the incarnation of its
    /// life; one that has an identity keeps its own.
    ///
    /// # Errors
    /// See [`DirectoryError`]. Nothing is written into a directory that is refused as foreign.
    pub fn open(path: &Path, incarnation: u64) -> Result<Self, DirectoryError> {
        Self::open_as(path, incarnation, &close_to_others)
    }

    fn open_as(path: &Path, incarnation: u64, close: &Close) -> Result<Self, DirectoryError> {
        create_dir_durably(&RealFiles, path).map_err(|source| io_error("create", path, source))?;
        let path = &closed(path, close)?;
        let failed = |action| move |source| io_error(action, path, source);
        let lock = lock(path)?;
        // What was there before the lock was taken may have changed while another held it.
        refuse_foreign(path, None)?;
        let identity = match read_identity(path)? {
            Some(identity) => identity,
            None => {
                let identity = Identity::Empty { incarnation };
                write_identity(path, &identity)?;
                identity
            }
        };
        for directory in [WAL, SLED, SNAPSHOTS] {
            create_dir_durably(&RealFiles, &path.join(directory))
                .map_err(failed("create directories"))?;
        }
        close_all(path, close).map_err(failed("set permissions"))?;
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
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(FILE_MODE);
    let file = options.open(path.join(LOCK));
    let file = file.map_err(|source| io_error("write", path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(TryLockError::WouldBlock) => {
            Err(DirectoryError::Locked { path: path.display().to_string() })
        }
        Err(TryLockError::Error(source)) => Err(io_error("take the lock", path, source)),
    }
}

/// Takes away what group and others may do with a file or directory. False if it is not ours to
/// change.
type Close = dyn Fn(&Path) -> io::Result<bool>;

fn close_to_others(path: &Path) -> io::Result<bool> {
    let metadata = fs::metadata(path)?;
    if metadata.permissions().mode() & OTHERS == 0 {
        return Ok(true);
    }
    let mode = if metadata.is_dir() { DIRECTORY_MODE } else { FILE_MODE };
    match fs::set_permissions(path, Permissions::from_mode(mode)) {
        Ok(()) => Ok(true),
        Err(error) if is_not_ours(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether permissions stay as they are because the owner, or the file system, says so.
fn is_not_ours(error: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, Unsupported};
    matches!(error.kind(), PermissionDenied | Unsupported)
}

/// The directory to work in, closed to others if that can be: the one given, or the one within.
/// Foreign ones are refused before anything about them is changed.
fn closed(path: &Path, close: &Close) -> Result<PathBuf, DirectoryError> {
    let failed = |source| io_error("set permissions", path, source);
    let inner = path.join(INNER);
    let (is_in_use, has_inner) = (path.join(IDENTITY).is_file(), inner.is_dir());
    if !inner.join(IDENTITY).is_file() {
        refuse_foreign(path, Some(INNER).filter(|_| has_inner))?;
    }
    if (is_in_use || !has_inner) && close(path).map_err(failed)? {
        return Ok(path.to_owned());
    }
    let data_dir = path.display();
    if is_in_use {
        tracing::warn!(
            %data_dir,
            "the data directory is not this user's to close to others; what is in it is closed"
        );
        return Ok(path.to_owned());
    }
    create_dir_durably(&RealFiles, &inner).map_err(|source| io_error("create", &inner, source))?;
    refuse_foreign(&inner, None)?;
    let kept_in = inner.display();
    if close(&inner).map_err(failed)? {
        tracing::warn!(
            %data_dir, %kept_in,
            "the data directory is not this user's to close to others; all is kept in one that is"
        );
    } else {
        tracing::warn!(
            %data_dir, %kept_in,
            "the data directory cannot be closed to others, who may read the values of sessions"
        );
    }
    Ok(inner)
}

/// Closes to others whatever an earlier version, an administrator or a volume's driver left open.
/// What cannot be looked at is not this node's, or gone: it is told of, and keeps no node from
/// starting.
fn close_all(root: &Path, close: &Close) -> io::Result<()> {
    let mut open = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = match fs::read_dir(&directory) {
            Err(error) if directory == root => return Err(error),
            Err(_) => {
                open.push(directory);
                continue;
            }
            Ok(entries) => entries,
        };
        for entry in entries {
            let entry = entry?;
            let (path, name) = (entry.path(), entry.file_name());
            // Those three may be links to another disk. No other link is followed.
            let is_known =
                directory == root && [WAL, SLED, SNAPSHOTS].map(OsStr::new).contains(&&*name);
            let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
            if name == LOST_AND_FOUND || (is_link && !is_known) {
                continue;
            }
            match close(&path) {
                Ok(true) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Ok(false) | Err(_) => open.push(path.clone()),
            }
            if path.is_dir() {
                directories.push(path);
            }
        }
    }
    if let Some(first) = open.first() {
        let (first, count) = (first.display(), open.len());
        tracing::warn!(count, %first, "files of another user cannot be closed to others");
    }
    Ok(())
}

/// Without an identity there may be nothing but what a first start leaves when it is cut off
/// before it has saved one, and an entry that is known to be ours.
fn refuse_foreign(path: &Path, known: Option<&str>) -> Result<(), DirectoryError> {
    let failed = |source| io_error("list files", path, source);
    let partial = partial_path(Path::new(IDENTITY));
    let mut foreign = None;
    for entry in fs::read_dir(path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if name == IDENTITY {
            return Ok(());
        }
        let is_known = known.is_some_and(|known| name == known);
        if name != LOCK && name != LOST_AND_FOUND && name != partial.as_os_str() && !is_known {
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

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    /// Everything in a directory, and that itself, with permissions.
    fn modes(path: &Path) -> Vec<(PathBuf, u32)> {
        let mut found = vec![(path.to_owned(), mode(path))];
        if path.is_dir() {
            fs::read_dir(path)
                .unwrap()
                .for_each(|entry| found.extend(modes(&entry.unwrap().path())));
        }
        found
    }

    #[test]
    fn nobody_else_may_read_what_a_node_keeps() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("deep/data");
        drop(DataDirectory::open(&path, 77).unwrap());
        assert_eq!(mode(&parent.path().join("deep")), 0o700);
        // As an earlier version, under the usual umask, would have made them.
        for name in ["wal/1.wal", "sled/blobs/1", "sled.broken-1/db", "snapshots/1.damaged"] {
            fs::create_dir_all(path.join(name).parent().unwrap()).unwrap();
            fs::write(path.join(name), "").unwrap();
        }
        for (path, _) in modes(&path) {
            set_mode(&path, if path.is_dir() { 0o2775 } else { 0o664 });
        }
        let linked = parent.path().join("linked");
        fs::write(&linked, "").unwrap();
        set_mode(&linked, 0o644);
        std::os::unix::fs::symlink(&linked, path.join("wal/link")).unwrap();
        drop(DataDirectory::open(&path, 78).unwrap());
        assert_eq!(mode(&linked), 0o644, "a link leads elsewhere");
        fs::remove_file(path.join("wal/link")).unwrap();
        let found = modes(&path);
        assert_eq!(found.len(), 12, "{found:?}");
        for (path, mode) in found {
            let expected = if path.is_dir() { 0o700 } else { 0o600 };
            assert_eq!(mode & !0o2000, expected, "{} has {mode:o}", path.display());
        }
    }

    /// Another user's directory, as the permissions of root would hide it.
    fn not_ours(foreign: &Path) -> Box<Close> {
        let foreign = foreign.to_owned();
        Box::new(move |path| if path == foreign { Ok(false) } else { close_to_others(path) })
    }

    #[test]
    fn in_a_directory_of_another_user_all_is_kept_in_one_that_is_ours() {
        let parent = tempfile::tempdir().unwrap();
        let (path, inner) = (parent.path(), parent.path().join(INNER));
        fs::create_dir(path.join(LOST_AND_FOUND)).unwrap();
        set_mode(path, 0o2775);
        let mut directory = DataDirectory::open_as(path, 77, &not_ours(path)).unwrap();
        assert_eq!((directory.path(), mode(path)), (&*inner, 0o2775));
        assert_eq!(mode(&inner) & OTHERS, 0);
        directory.save_identity(member()).unwrap();
        let locked = DataDirectory::open(path, 78);
        assert!(matches!(locked, Err(DirectoryError::Locked { .. })), "{locked:?}");
        drop(directory);
        // Found again, whosever the outer one is by then, and mended.
        set_mode(&inner, 0o2770);
        for close in [&*not_ours(path), &close_to_others] {
            let directory = DataDirectory::open_as(path, 79, close).unwrap();
            assert_eq!((directory.path(), directory.identity()), (&*inner, &member()));
            assert_eq!(mode(&inner) & OTHERS, 0);
        }
        fs::write(path.join("README"), "").unwrap();
        drop(DataDirectory::open(path, 80).unwrap());
        fs::remove_file(path.join("README")).unwrap();
        // But one that has no identity is foreign, as the outer one is.
        for foreign in [path.join("thesis.tex"), inner.join("thesis.tex")] {
            fs::write(&foreign, "").unwrap();
            fs::rename(inner.join(IDENTITY), parent.path().join("lost+found/kept")).unwrap();
            let error = DataDirectory::open(path, 80).unwrap_err();
            assert!(matches!(error, DirectoryError::Foreign { .. }), "{error}");
            fs::rename(parent.path().join("lost+found/kept"), inner.join(IDENTITY)).unwrap();
            fs::remove_file(foreign).unwrap();
        }
    }

    #[test]
    fn what_is_in_use_stays_where_it_is() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path();
        drop(DataDirectory::open(path, 77).unwrap());
        set_mode(path, 0o2775);
        set_mode(&path.join(WAL), 0o2775);
        let directory = DataDirectory::open_as(path, 78, &not_ours(path)).unwrap();
        assert_eq!((directory.path(), directory.identity().incarnation()), (path, 77));
        assert_eq!((mode(path), mode(&path.join(WAL)) & OTHERS), (0o2775, 0));
        assert!(!path.join(INNER).exists());
    }

    #[test]
    fn a_foreign_directory_keeps_its_permissions() {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join("thesis.tex"), "").unwrap();
        set_mode(parent.path(), 0o755);
        DataDirectory::open(parent.path(), 1).unwrap_err();
        assert_eq!(mode(parent.path()), 0o755);
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
