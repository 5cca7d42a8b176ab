//! The lease record, and what remains of one for a while.
//!
//! A lease is a promise that its owner keeps alive: whatever hangs from it, claims on locks above
//! all, lasts for as long as it is renewed, and goes with it. Its deadline lies on the steady
//! clock, which does not feel the jumps made after the whole cluster was down: the owner was cut
//! off as well and must get its chance to renew.
//!
//! Every renewal is stored, so a lease ends at its last renewal + TTL exactly. Slack, as sessions
//! have it, would save nothing, because leases are renewed at a third of their TTL and not a
//! hundred times within it. What a renewal leaves as it is, is shared by the records before and
//! after.
//!
//! Requests that concern locks are remembered on the lease that they name, and the tombstone
//! inherits them. Acquires that were cancelled before they came need no memory beyond the lease, as
//! nothing is acquired without one. An id is minted by the client and used once; the tombstone sees
//! to it that a Grant which comes late does not revive what has ended.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::command::{Namespace, Request, Revision};
use super::digest;
use super::packing::{Reader, put_bytes, put_varint};
use super::retry::Requests;
use super::time::{Timestamp, millis};
use super::void::Voids;
use crate::limits::TOMBSTONE_LIFETIME;

/// Names a lease within a namespace; minted at random by the client. Displayed in lowercase hex.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub [u8; 16]);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Names a lease.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey {
    /// The namespace.
    pub namespace: Namespace,
    /// The id.
    pub id: LeaseId,
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.id)
    }
}

/// A lease as stored.
///
/// - `deadline` is the time of the grant or of the last renewal + TTL, on the steady clock.
/// - `body` is canonical: leases with the same content have the same bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Lease {
    /// Of key and content; the lease's share in the digest of the state.
    hash: u64,
    deadline: Timestamp,
    /// Milliseconds; a day has fewer than 2^27.
    ttl: u32,
    /// `LeaseFacts`, packed.
    body: Arc<[u8]>,
}

/// What a lease's body holds.
#[derive(Clone)]
pub(super) struct LeaseFacts<'a> {
    pub(super) granted_time: Timestamp,
    pub(super) granted_revision: Revision,
    /// Id of the request that granted it.
    pub(super) granted_by: u64,
    pub(super) owner: &'a str,
    pub(super) requests: Requests,
    pub(super) voids: Voids,
}

impl Lease {
    /// Makes a lease. `ttl` is in milliseconds.
    pub(super) fn new(
        key: &LeaseKey,
        ttl: u32,
        deadline: Timestamp,
        facts: &LeaseFacts<'_>,
    ) -> Self {
        Self::of_body(key, ttl, deadline, facts.pack().into())
    }

    fn of_body(key: &LeaseKey, ttl: u32, deadline: Timestamp, body: Arc<[u8]>) -> Self {
        let fields = [deadline.0, u64::from(ttl)];
        let hash = digest::of_parts(digest::LEASE, &key.namespace, key.id.0, &fields, &body);
        Self { hash, deadline, ttl, body }
    }

    /// The same lease, renewed at `steady`; `None` if that moves nothing.
    pub(super) fn renewed(&self, key: &LeaseKey, steady: Timestamp) -> Option<Self> {
        let deadline = steady.plus(self.ttl());
        let moves = deadline > self.deadline;
        moves.then(|| Self::of_body(key, self.ttl, deadline, self.body.clone()))
    }

    /// The same lease with other facts.
    pub(super) fn with_facts(&self, key: &LeaseKey, facts: &LeaseFacts<'_>) -> Self {
        Self::new(key, self.ttl, self.deadline, facts)
    }

    /// Who holds it, in its own words; may be empty.
    pub fn owner(&self) -> &str {
        self.facts().owner
    }

    /// How long it lives without a renewal: 1 s to 24 h.
    pub fn ttl(&self) -> Duration {
        Duration::from_millis(u64::from(self.ttl))
    }

    /// When it ends unless it is renewed before, on the steady clock (`Stamp::steady`).
    pub fn deadline(&self) -> Timestamp {
        self.deadline
    }

    /// Cluster time of the grant.
    pub fn granted_time(&self) -> Timestamp {
        self.facts().granted_time
    }

    /// Revision of the grant.
    pub fn granted_revision(&self) -> Revision {
        self.facts().granted_revision
    }

    /// Whether its deadline has passed; `steady` is the steady clock.
    pub fn is_due(&self, steady: Timestamp) -> bool {
        self.deadline <= steady
    }

    /// Whether `request` granted it.
    pub(super) fn is_granted_by(&self, request: &Request) -> bool {
        self.facts().granted_by == request.id
    }

    pub(super) fn requests(&self) -> Requests {
        self.facts().requests
    }

    pub(super) fn facts(&self) -> LeaseFacts<'_> {
        LeaseFacts::unpack(&self.body)
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let facts = self.facts();
        f.debug_struct("Lease")
            .field("owner", &facts.owner)
            .field("ttl", &self.ttl())
            .field("deadline", &self.deadline)
            .field("granted_time", &facts.granted_time)
            .field("granted_revision", &facts.granted_revision)
            .field("requests", &facts.requests.recent())
            .finish_non_exhaustive()
    }
}

impl<'a> LeaseFacts<'a> {
    fn pack(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32 + self.owner.len() + 32 * self.requests.recent().len());
        put_varint(&mut out, self.granted_time.0);
        put_varint(&mut out, self.granted_revision.0);
        out.extend_from_slice(&self.granted_by.to_le_bytes());
        put_bytes(&mut out, self.owner.as_bytes());
        self.requests.pack(&mut out);
        self.voids.pack(&mut out);
        out
    }

    fn unpack(body: &'a [u8]) -> Self {
        let mut packed = Reader::new(body);
        Self {
            granted_time: Timestamp(packed.varint()),
            granted_revision: Revision(packed.varint()),
            granted_by: u64::from_le_bytes(packed.fixed()),
            owner: packed.str(),
            requests: Requests::unpack(&mut packed),
            voids: Voids::unpack(&mut packed),
        }
    }
}

/// How a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseEnd {
    /// Nobody renewed it in time.
    Expired,
    /// Its owner, or an operator, gave it up.
    Revoked,
}

/// What remains of a lease that has ended.
///
/// - It stays for `TOMBSTONE_LIFETIME` of cluster time, and at least until nothing hangs from the
///   lease any more: what is swept after the end still asks how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseTombstone {
    hash: u64,
    removed_time: Timestamp,
    end: LeaseEnd,
    /// Packed; empty for none.
    requests: Box<[u8]>,
}

impl LeaseTombstone {
    pub(super) fn new(
        key: &LeaseKey,
        removed_time: Timestamp,
        end: LeaseEnd,
        requests: &Requests,
    ) -> Self {
        let mut packed = Vec::new();
        if *requests != Requests::default() {
            requests.pack(&mut packed);
        }
        let fields = [removed_time.0, u64::from(end == LeaseEnd::Revoked)];
        let hash =
            digest::of_parts(digest::LEASE_TOMBSTONE, &key.namespace, key.id.0, &fields, &packed);
        Self { hash, removed_time, end, requests: packed.into_boxed_slice() }
    }

    /// Cluster time at which the lease was removed.
    pub fn removed_time(&self) -> Timestamp {
        self.removed_time
    }

    /// How the lease ended.
    pub fn end(&self) -> LeaseEnd {
        self.end
    }

    /// When it may go, in cluster time. A request sent in the millisecond of the removal is not
    /// refused before `TOMBSTONE_LIFETIME` is over, only behind it: hence one more.
    pub fn deadline(&self) -> Timestamp {
        self.removed_time.plus(TOMBSTONE_LIFETIME + Duration::from_millis(1))
    }

    pub(super) fn requests(&self) -> Requests {
        if self.requests.is_empty() {
            return Requests::default();
        }
        Requests::unpack(&mut Reader::new(&self.requests))
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }
}

/// A TTL in milliseconds; `None` if it is out of range.
pub(super) fn packed_ttl(ttl: Duration, range: std::ops::RangeInclusive<Duration>) -> Option<u32> {
    u32::try_from(millis(ttl)).ok().filter(|_| range.contains(&ttl))
}
