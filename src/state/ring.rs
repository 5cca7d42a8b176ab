//! A ring: its members, and when they last changed.
//!
//! Each member is a record of its own and hangs from a lease, so a ring of a thousand is not
//! rewritten when one joins. Whoever routes by a ring must know that his members are stale, so
//! there is a number that any change of them raises: the revision of the last one. The members that
//! are left cannot tell when another has gone, so it is kept in one more record, the ring's own. A
//! ring is there for as long as it has members; of one that has none left nothing remains, and when
//! it comes back its revision is beyond any that it had, as revisions are.
//!
//! Where a key lies follows from the members' names and weights, which is no business of the core.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::command::{Namespace, Revision};
use super::digest;
use super::lease::LeaseId;
use super::packing::{put_bytes, put_varint};
use super::time::Timestamp;
use crate::limits::{
    NAME_BYTES_MAX, RING_MEMBER_TAG_BYTES_MAX, RING_MEMBER_TAGS_MAX, RING_TAG_VALUE_BYTES_MAX,
    RING_WEIGHT_MAX,
};

/// Names a ring.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RingKey {
    /// The namespace.
    pub namespace: Namespace,
    /// 1 to 256 bytes of UTF-8.
    pub name: Arc<str>,
}

impl fmt::Display for RingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Names a member of a ring.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberKey {
    /// The ring.
    pub ring: RingKey,
    /// 1 to 256 bytes of UTF-8.
    pub name: Arc<str>,
}

impl MemberKey {
    /// Whether both names are within their limits.
    pub(super) fn is_valid(&self) -> bool {
        [&self.ring.name, &self.name].iter().all(|it| (1..=NAME_BYTES_MAX).contains(&it.len()))
    }
}

impl fmt::Display for MemberKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.ring, self.name)
    }
}

/// What a member says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberData {
    /// Where it is reached: at most 256 bytes, may be empty.
    pub address: Arc<str>,
    /// 1 to 1,000: its share of the keys relative to the other members' weights.
    pub weight: u32,
    /// At most 64, of names of 1 to 256 bytes and values of up to 1,024, and 2,048 bytes in all.
    pub tags: BTreeMap<String, String>,
}

impl MemberData {
    /// Whether everything is within its range.
    pub(super) fn is_valid(&self) -> bool {
        let fits = |(name, value): (&String, &String)| {
            (1..=NAME_BYTES_MAX).contains(&name.len()) && value.len() <= RING_TAG_VALUE_BYTES_MAX
        };
        let bytes: usize = self.tags.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.address.len() <= NAME_BYTES_MAX
            && (1..=RING_WEIGHT_MAX).contains(&self.weight)
            && self.tags.len() <= RING_MEMBER_TAGS_MAX
            && self.tags.iter().all(fits)
            && bytes <= RING_MEMBER_TAG_BYTES_MAX
    }

    fn pack(&self, lease: LeaseId) -> Vec<u8> {
        let mut out = lease.0.to_vec();
        put_bytes(&mut out, self.address.as_bytes());
        put_varint(&mut out, self.tags.len() as u64);
        for (name, value) in &self.tags {
            put_bytes(&mut out, name.as_bytes());
            put_bytes(&mut out, value.as_bytes());
        }
        out
    }
}

/// A member as stored. It never changes; what happens to it makes another in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Of key and content; the member's share in the digest of the state.
    hash: u64,
    lease: LeaseId,
    data: MemberData,
    join_time: Timestamp,
    revision: Revision,
}

impl Member {
    pub(super) fn new(
        key: &MemberKey,
        lease: LeaseId,
        data: MemberData,
        join_time: Timestamp,
        revision: Revision,
    ) -> Self {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&xxh3_64(key.ring.name.as_bytes()).to_le_bytes());
        id[8..].copy_from_slice(&xxh3_64(key.name.as_bytes()).to_le_bytes());
        let fields = [u64::from(data.weight), join_time.0, revision.0];
        let packed = data.pack(lease);
        let hash = digest::of_parts(digest::MEMBER, &key.ring.namespace, id, &fields, &packed);
        Self { hash, lease, data, join_time, revision }
    }

    /// The lease that it hangs from.
    pub fn lease(&self) -> LeaseId {
        self.lease
    }

    /// What it says of itself.
    pub fn data(&self) -> &MemberData {
        &self.data
    }

    /// Cluster time at which it joined; changes of its data leave it.
    pub fn join_time(&self) -> Timestamp {
        self.join_time
    }

    /// Revision of the last change of its data.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }
}

/// What is stored of a ring beside its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    hash: u64,
    revision: Revision,
}

impl Ring {
    pub(super) fn new(key: &RingKey, revision: Revision) -> Self {
        let id = digest::of_name(&key.name, revision);
        let hash = digest::of_parts(digest::RING, &key.namespace, id, &[], &[]);
        Self { hash, revision }
    }

    /// Revision of the last change of its members: who they are, or what they say of themselves.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }
}

/// A ring in its place.
///
/// - Between commands it has members and a record, or it does not exist, and the record's revision
///   is not before any member's.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct RingPlace {
    pub(super) record: Option<Arc<Ring>>,
    pub(super) members: BTreeMap<Arc<str>, Arc<Member>>,
}

impl RingPlace {
    pub(super) fn is_empty(&self) -> bool {
        self.record.is_none() && self.members.is_empty()
    }

    /// Whether it is as it is between commands.
    pub(super) fn is_sound(&self) -> bool {
        let last = self.members.values().map(|member| member.revision).max();
        match (&self.record, last) {
            (Some(record), Some(last)) => last <= record.revision,
            _ => false,
        }
    }
}
