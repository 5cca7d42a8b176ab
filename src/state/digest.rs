//! A digest of the whole state, kept up to date at every change.
//!
//! Each record keeps a hash of its key and content; the sum of them all, taken modulo 2^64, does
//! not depend on the order in which maps were filled. A change subtracts one hash and adds
//! another, so the digest costs one hash a change and nothing to read. Nodes whose states are at
//! the same revision must agree on it; a checkpoint that was damaged in a way that its checksums
//! miss, or read by a build that understands it differently, does not load.
//!
//! It finds defects, not forgers: XXH3 is no cryptographic hash.

use std::fmt;

use xxhash_rust::xxh3::xxh3_64;

use super::command::{Namespace, Revision, SessionKey};
use super::level::FEATURE_LEVEL_BASE;

/// Digest of a state's feature level, revision and records. Equal states have equal digests,
/// whatever their histories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StateDigest(pub u64);

impl fmt::Display for StateDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Kinds of records, as hashes and stored keys have them.
pub(super) const SESSION: u8 = 1;
pub(super) const TOMBSTONE: u8 = 2;
pub(super) const LEASE: u8 = 10;
pub(super) const LEASE_TOMBSTONE: u8 = 11;
pub(super) const CLAIM: u8 = 12;
pub(super) const RING: u8 = 13;
pub(super) const MEMBER: u8 = 14;

/// The hash of one record: of its kind, key, fields of fixed size, and the rest.
pub(super) fn of_record<const N: usize>(
    kind: u8,
    key: &SessionKey,
    fields: &[u64; N],
    rest: &[u8],
) -> u64 {
    of_parts(kind, &key.namespace, key.digest.0, fields, rest)
}

/// The same for any record: its name is a namespace and 16 bytes.
pub(super) fn of_parts<const N: usize>(
    kind: u8,
    namespace: &Namespace,
    id: [u8; 16],
    fields: &[u64; N],
    rest: &[u8],
) -> u64 {
    // Short and long parts are hashed by themselves, so that no buffer has to be filled with all
    // of them: at a million records that would be the larger part of the cost.
    let mut all = [0; 128];
    const { assert!(33 + 8 * N <= 128) };
    all[0] = kind;
    all[1..17].copy_from_slice(&id);
    all[17..25].copy_from_slice(&xxh3_64(namespace.0.as_bytes()).to_le_bytes());
    all[25..33].copy_from_slice(&xxh3_64(rest).to_le_bytes());
    for (index, field) in fields.iter().enumerate() {
        all[33 + 8 * index..][..8].copy_from_slice(&field.to_le_bytes());
    }
    xxh3_64(&all[..33 + 8 * N])
}

/// Stands for a name of any length and a number in `of_parts`.
pub(super) fn of_name(name: &str, number: Revision) -> [u8; 16] {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&xxh3_64(name.as_bytes()).to_le_bytes());
    id[8..].copy_from_slice(&number.0.to_le_bytes());
    id
}

/// The digest of a state from the sum of its records' hashes. Builds that know the lowest feature
/// level only leave it out.
pub(super) fn of_state(feature_level: u32, revision: Revision, sum: u64) -> StateDigest {
    let mut all = [0; 20];
    all[..8].copy_from_slice(&revision.0.to_le_bytes());
    all[8..16].copy_from_slice(&sum.to_le_bytes());
    all[16..].copy_from_slice(&feature_level.to_le_bytes());
    let length = if feature_level > FEATURE_LEVEL_BASE { all.len() } else { 16 };
    StateDigest(xxh3_64(&all[..length]))
}
