//! sled 0.34.7 as a [`BlockStore`]: the only file that names it.
//!
//! sled is dormant and has known faults. What is done about them here:
//!
//! - A kill while it opens can leave a half-written `snap.*.generating` that it takes for its
//!   newest index at the next opening, and then refuses to open (fixed only after 0.34.7). Those
//!   files are removed first.
//! - Its `flush` starts and awaits write-back (`sync_file_range`) but neither commits file sizes
//!   nor empties the disk's cache. So [`sync`](BlockStore::sync) fsyncs the data file after it,
//!   through a handle held open since the start, so that no write-back error passes unseen; and
//!   blob files and directories, should there be any.
//! - It panics on some kinds of damage. Panics are caught at each call and are an error then.
//!   What cannot be caught is a panic in one of its own threads.
//! - Batches retain what they retire, async flushes deadlock, transactions take a process-wide
//!   lock: none of these is used, only single inserts, removes and gets.
//! - Dropping a `Db` releases its file lock a little later, when its threads have noticed. So a
//!   lock that is held is waited for briefly; the data directory has a lock of its own.
//! - Its own flusher thread is off: a checkpoint flushes twice and nothing else needs it.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::checkpoint::{BlockStore, StoreError};
use super::durable::{sync_directory, write_file};
use super::envelope::{self, Magic};
use super::file::{RealFiles, create_dir_durably};
use super::outside::is_outside;

/// How often, and how long apart, a lock that is still held is tried again: 5 s in all.
const LOCK_TRIES: u32 = 250;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// The file, beside sled's own, that notes the newest finished checkpoint.
const ACKNOWLEDGED: &str = "acknowledged";
const MAGIC: Magic = *b"QRACKGEN";
const VERSION: u8 = 1;

/// Why sled was not opened.
#[derive(Debug)]
pub enum SledError {
    /// What is in the directory cannot be opened.
    Unusable(String),
    /// The directory cannot be reached, but nothing is known to be wrong in it.
    Io(io::Error),
}

impl SledError {
    fn new(message: String, from_system: Option<io::Error>) -> Self {
        match from_system {
            Some(error) if is_outside(&error) => Self::Io(error),
            _ => Self::Unusable(message),
        }
    }
}

/// One sled database.
pub struct SledStore {
    database: sled::Db,
    directory: PathBuf,
    data: File,
}

impl SledStore {
    /// Opens the database in the directory, or creates it.
    ///
    /// # Errors
    /// See [`SledError`].
    pub fn open(directory: &Path, cache_bytes: u64) -> Result<Self, SledError> {
        create_dir_durably(&RealFiles, directory).map_err(SledError::Io)?;
        remove_unfinished_indexes(directory).map_err(SledError::Io)?;
        let database = open_database(directory, cache_bytes)?;
        let data = File::open(directory.join("db")).map_err(SledError::Io)?;
        let store = Self { database, directory: directory.to_owned(), data };
        store.sync_metadata().map_err(SledError::Io)?;
        Ok(store)
    }

    /// The files and directories that opening made.
    fn sync_metadata(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.is_file() {
                File::open(&path)?.sync_all()?;
            }
        }
        sync_directory(&self.directory)
    }

    fn sync_files(&self) -> io::Result<()> {
        self.data.sync_all()?;
        // Blocks are too small to become blobs; should sled make one after all, it counts too.
        let blobs = self.directory.join("blobs");
        let mut found = false;
        for entry in fs::read_dir(&blobs)? {
            found = true;
            match File::open(entry?.path()) {
                Ok(blob) => blob.sync_all()?,
                // sled removes blobs when it pleases.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        if found { sync_directory(&blobs) } else { Ok(()) }
    }
}

impl BlockStore for SledStore {
    fn read(&self, key: &[u8], into: &mut Vec<u8>) -> Result<bool, StoreError> {
        let value = guarded("read from sled", || self.database.get(key))?;
        if let Some(value) = &value {
            into.extend_from_slice(value);
        }
        Ok(value.is_some())
    }

    fn insert(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        guarded("write to sled", || self.database.insert(key, value)).map(drop)
    }

    fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
        guarded("remove from sled", || self.database.remove(key)).map(drop)
    }

    fn keys(&self, range: Range<&[u8]>, limit: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        guarded("list the keys of sled", || {
            let keys = self.database.range(range).keys().take(limit);
            keys.map(|key| key.map(|key| key.to_vec())).collect()
        })
    }

    fn sync(&self) -> Result<(), StoreError> {
        guarded("flush sled", || self.database.flush())?;
        self.sync_files().map_err(|error| StoreError::io("sync sled's files", &error))
    }

    fn acknowledge(&self, generation: u64) -> Result<(), StoreError> {
        let action = "note the generation";
        let bytes = envelope::seal(MAGIC, VERSION, &generation);
        let bytes = bytes.map_err(|error| StoreError::new(action, error))?;
        write_file(&self.directory.join(ACKNOWLEDGED), &bytes)
            .map_err(|error| StoreError::io(action, &error))
    }

    fn acknowledged(&self) -> Result<u64, StoreError> {
        let action = "read the generation noted";
        match fs::read(self.directory.join(ACKNOWLEDGED)) {
            Ok(bytes) => envelope::unseal(MAGIC, VERSION, &bytes)
                .map_err(|error| StoreError::new(action, error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(StoreError::io(action, &error)),
        }
    }

    fn disk_bytes(&self) -> u64 {
        directory_bytes(&self.directory)
    }
}

/// Calls into sled, and makes an error of a panic.
fn guarded<T>(
    action: &'static str,
    call: impl FnOnce() -> sled::Result<T>,
) -> Result<T, StoreError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(match system_error(&error) {
            Some(error) => StoreError::io(action, &error),
            None => StoreError::new(action, error),
        }),
        Err(panic) => Err(match panic_message(panic.as_ref()) {
            (_, Some(error)) => StoreError::io(action, &error),
            (message, None) => StoreError::new(action, message),
        }),
    }
}

/// What the system said, if that is what sled complains of.
fn system_error(error: &sled::Error) -> Option<io::Error> {
    let sled::Error::Io(error) = error else { return None };
    let code = error.raw_os_error().map(io::Error::from_raw_os_error);
    code.or_else(|| system_error_in(&error.to_string()))
}

/// The same in words: sled hands an error of the system on to later calls as text.
fn system_error_in(message: &str) -> Option<io::Error> {
    let (_, code) = message.split_once("Os { code: ")?;
    let (code, _) = code.split_once(',')?;
    Some(io::Error::from_raw_os_error(code.parse().ok()?))
}

/// What a panic says, with what the system said to cause it.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> (String, Option<io::Error>) {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    (format!("panic: {text}"), system_error_in(&text))
}

fn open_database(directory: &Path, cache_bytes: u64) -> Result<sled::Db, SledError> {
    let configuration = || {
        sled::Config::new()
            .path(directory)
            .cache_capacity(cache_bytes.max(1024 * 1024))
            .flush_every_ms(None)
            .use_compression(false)
            .mode(sled::Mode::HighThroughput)
    };
    for _ in 0..LOCK_TRIES {
        let opened = catch_unwind(AssertUnwindSafe(|| configuration().open()));
        match opened {
            Ok(Ok(database)) => return Ok(database),
            Ok(Err(sled::Error::Io(error))) if is_lock(&error) => std::thread::sleep(LOCK_PAUSE),
            Ok(Err(error)) => return Err(SledError::new(error.to_string(), system_error(&error))),
            Err(panic) => {
                let (message, error) = panic_message(panic.as_ref());
                return Err(SledError::new(message, error));
            }
        }
    }
    Err(SledError::Io(io::Error::new(io::ErrorKind::WouldBlock, "another process has sled open")))
}

/// Whether sled complains that somebody holds its lock; it says so in words only.
fn is_lock(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Other && error.to_string().contains("could not acquire lock")
}

fn remove_unfinished_indexes(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Bytes of all files, as far as they can be told: files come and go while this looks.
fn directory_bytes(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let mut bytes = 0;
    for entry in entries.flatten() {
        bytes += match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => directory_bytes(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// sled says it first as it is, then as a copy in words, and panics with it where it unwraps.
    #[test]
    fn what_the_system_refuses_sled_is_no_damage() {
        for (code, is_outside) in
            [(libc::EMFILE, true), (libc::ENFILE, true), (libc::EIO, true), (libc::ENOENT, false)]
        {
            let said = || sled::Error::Io(io::Error::from_raw_os_error(code));
            let call = |error| guarded("call sled", || Err::<(), _>(error)).unwrap_err();
            let panicked = guarded::<()>("call sled", || panic!("it says {:?}", said()));
            for error in [call(said()), call(said().clone()), panicked.unwrap_err()] {
                assert_eq!(error.is_outside, is_outside, "{error:?}");
            }
            let opened = SledError::new("no".to_owned(), system_error(&said().clone()));
            assert_eq!(matches!(opened, SledError::Io(_)), is_outside, "{opened:?}");
        }
        let damage =
            guarded("call sled", || Err::<(), _>(sled::Error::Corruption { at: None, bt: () }));
        assert!(!damage.unwrap_err().is_outside);
        let bug = guarded::<()>("call sled", || panic!("index out of bounds"));
        assert!(!bug.unwrap_err().is_outside);
    }
}
