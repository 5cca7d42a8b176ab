//! What the checkpoint asks of the store beneath it, and how a block is sealed.
//!
//! | key | value |
//! |---|---|
//! | `b` run (u64 BE) block (u32 BE) | checksum (u64 LE), then a stretch of the run's records |
//! | `r` generation (u64 BE) | a root, see `root.rs` |
//!
//! Keys are never used twice for different contents as long as the process lives, and nothing is
//! overwritten: what a root names stays as it is until no root names it. The checksum covers the
//! place of a block too, so that a block that turns up elsewhere does not pass.

use std::io;
use std::ops::Range;

use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::storage::outside::{explain, is_outside};

/// Bytes of checksum in front of a block's payload.
pub(super) const CHECKSUM_BYTES: usize = 8;

const BLOCK_TAG: u8 = b'b';
const ROOT_TAG: u8 = b'r';

/// The store failed, or does not make sense. There is no telling what it holds now.
#[derive(Debug, Clone, Error)]
#[error("{action}: {reason}")]
pub struct StoreError {
    /// What was being done.
    pub action: &'static str,
    /// What went wrong, in the words of whoever noticed.
    pub reason: String,
    /// Whether the system refused, and nothing is known to be wrong with what is stored.
    pub is_outside: bool,
}

impl StoreError {
    /// Notes what was being done when `reason` came up.
    pub fn new(action: &'static str, reason: impl ToString) -> Self {
        Self { action, reason: reason.to_string(), is_outside: false }
    }

    /// Notes what was being done when the system said this.
    pub fn io(action: &'static str, error: &io::Error) -> Self {
        Self { action, reason: explain(error), is_outside: is_outside(error) }
    }
}

/// An ordered map from small keys to values of a few kilobytes: all that is asked of sled.
///
/// - One key's insert or remove is atomic; nothing else is.
/// - What was written before [`sync`](Self::sync) returned survives a power cut. Of later writes
///   any subset may survive.
/// - Reads see all earlier writes, from any thread.
pub trait BlockStore: Send + Sync {
    /// Appends the value at `key` to `into`; false if there is none.
    ///
    /// # Errors
    /// The store is of no use any more.
    fn read(&self, key: &[u8], into: &mut Vec<u8>) -> Result<bool, StoreError>;

    /// Writes one value.
    ///
    /// # Errors
    /// The store is of no use any more.
    fn insert(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError>;

    /// Removes one value, if it is there.
    ///
    /// # Errors
    /// The store is of no use any more.
    fn remove(&self, key: &[u8]) -> Result<(), StoreError>;

    /// The first `limit` keys of the range, in order.
    ///
    /// # Errors
    /// The store is of no use any more.
    fn keys(&self, range: Range<&[u8]>, limit: usize) -> Result<Vec<Vec<u8>>, StoreError>;

    /// Makes everything written so far durable: it survives a power cut.
    ///
    /// # Errors
    /// The store is of no use any more.
    fn sync(&self) -> Result<(), StoreError>;

    /// Notes, durably and apart from the map, that the checkpoint of that generation is durable.
    ///
    /// # Errors
    /// It cannot be written; which generation is noted now is unknown.
    fn acknowledge(&self, generation: u64) -> Result<(), StoreError>;

    /// The generation noted last, 0 if there is none.
    ///
    /// # Errors
    /// The note cannot be read.
    fn acknowledged(&self) -> Result<u64, StoreError>;

    /// Bytes that the store takes up on disk.
    fn disk_bytes(&self) -> u64;
}

/// The key of a block.
pub(super) fn block_key(run: u64, block: u32) -> [u8; 13] {
    let mut key = [BLOCK_TAG; 13];
    key[1..9].copy_from_slice(&run.to_be_bytes());
    key[9..].copy_from_slice(&block.to_be_bytes());
    key
}

/// The first key behind all blocks.
pub(super) fn blocks_end() -> [u8; 1] {
    [BLOCK_TAG + 1]
}

/// Whose block a key names; `None` for what is no block's key.
pub(super) fn run_of(key: &[u8]) -> Option<u64> {
    let (&tag, rest) = key.split_first()?;
    let run = rest.first_chunk::<8>()?;
    (tag == BLOCK_TAG && rest.len() == 12).then(|| u64::from_be_bytes(*run))
}

/// The key of a root.
pub(super) fn root_key(generation: u64) -> [u8; 9] {
    let mut key = [ROOT_TAG; 9];
    key[1..].copy_from_slice(&generation.to_be_bytes());
    key
}

/// The first key behind all roots.
pub(super) fn roots_end() -> [u8; 1] {
    [ROOT_TAG + 1]
}

/// The generation of a root's key; `None` for what is no root's key.
pub(super) fn generation_of(key: &[u8]) -> Option<u64> {
    let (&tag, rest) = key.split_first()?;
    (tag == ROOT_TAG && rest.len() == 8)
        .then(|| rest.first_chunk::<8>().map(|generation| u64::from_be_bytes(*generation)))
        .flatten()
}

/// The checksum of a block's payload at its place.
pub(super) fn block_checksum(run: u64, block: u32, payload: &[u8]) -> u64 {
    xxh3_64_with_seed(payload, run.rotate_left(32) ^ u64::from(block))
}

/// The checksum of a run after one more block: covers the blocks' checksums in their order.
pub(super) fn chain_checksum(chain: u64, block: u64) -> u64 {
    xxh3_64_with_seed(&block.to_le_bytes(), chain)
}
