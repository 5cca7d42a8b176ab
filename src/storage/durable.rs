//! The few file operations whose order decides what a power cut leaves behind.
//!
//! A file is written beside its place, synced, renamed over it, and then the directory is synced,
//! because a rename is as volatile as any other write until its directory has been.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Permissions of every file of a node: what is in it may be the value of a session.
pub const FILE_MODE: u32 = 0o600;
/// Permissions of every directory of a node.
pub const DIRECTORY_MODE: u32 = 0o700;
/// What the name of a file that is still being written ends with.
pub const PARTIAL_SUFFIX: &str = ".partial";

/// The place beside `path` where its next contents are written.
pub fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(PARTIAL_SUFFIX);
    PathBuf::from(name)
}

/// Creates the file, or empties the one that is there, for writing, for its owner alone.
///
/// # Errors
/// Whatever the file system says.
pub fn create_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(FILE_MODE).open(path)
}

/// Makes durable which names the directory holds.
///
/// # Errors
/// Whatever the file system says.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Puts a synced file in its place, durably.
///
/// # Errors
/// Whatever the file system says; the rename may or may not have happened then.
pub fn rename_file(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

/// Replaces the contents of a small file: after a power cut it holds the old or the new ones.
///
/// # Errors
/// Whatever the file system says; the file holds either contents then.
pub fn write_file(path: &Path, contents: &[u8]) -> io::Result<()> {
    let partial = partial_path(path);
    let mut file = create_file(&partial)?;
    file.write_all(contents)?;
    file.sync_all()?;
    drop(file);
    rename_file(&partial, path)
}
