//! What can go wrong with the log.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::storage::outside::explain;

/// Why the log refuses to open, to take an operation, or to go on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WalError {
    /// What is on disk is not what was written. The log was left as it is.
    #[error("{} is damaged at offset {offset}: {reason}", file.display())]
    Corrupt {
        /// The segment.
        file: PathBuf,
        /// Where the first damage was noticed, in bytes.
        offset: u64,
        /// What is wrong, and how it is known.
        reason: String,
    },
    /// The disk failed. A log that was open has stopped for good.
    #[error("cannot {action} {}: {}", file.display(), explain(error))]
    Io {
        /// A verb, such as `sync`.
        action: &'static str,
        /// The file or directory.
        file: PathBuf,
        /// What the operating system said.
        error: Arc<io::Error>,
    },
    /// The caller broke the contract; nothing happened.
    #[error("refused by the log: {0}")]
    Refused(String),
    /// The records asked for begin before the log does: they were purged.
    #[error("record {asked} was purged; the log begins at {first}")]
    Purged {
        /// Index of the first record asked for.
        asked: u64,
        /// Index of the first record held, or of the next one if none is.
        first: u64,
    },
    /// The log was closed before the operation was queued.
    #[error("the log is closed")]
    Closed,
    /// The log's thread died of a bug of ours.
    #[error("the log stopped unexpectedly")]
    Stopped,
}

/// Says what was done to which file when the operating system refused.
pub(super) fn io_error(action: &'static str, file: &Path, error: io::Error) -> WalError {
    WalError::Io { action, file: file.to_owned(), error: Arc::new(error) }
}
