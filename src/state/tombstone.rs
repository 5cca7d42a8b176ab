//! What remains of a session for a while after its end.
//!
//! A Delete wins over every save, also over one that was sent before it and arrives behind it: so
//! the key of a session that has ended stays retired until no request that was sent before can
//! still come. The tombstone also keeps the requests that the session remembered, so that a resend
//! of one that was applied before the end is still answered with what it did.

use std::time::Duration;

use super::command::SessionKey;
use super::digest;
use super::packing::Reader;
use super::retry::Requests;
use super::time::Timestamp;
use crate::limits::TOMBSTONE_LIFETIME;

/// What remains of a session that was deleted or has expired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tombstone {
    hash: u64,
    removed_time: Timestamp,
    /// Packed; empty for none, as it is for all that expired, which then own no allocation.
    requests: Box<[u8]>,
}

impl Tombstone {
    pub(super) fn new(key: &SessionKey, removed_time: Timestamp, requests: &Requests) -> Self {
        let mut packed = Vec::new();
        if *requests != Requests::default() {
            requests.pack(&mut packed);
        }
        let hash = digest::of_record(digest::TOMBSTONE, key, &[removed_time.0], &packed);
        Self { hash, removed_time, requests: packed.into_boxed_slice() }
    }

    /// Cluster time at which the session was removed; for one that expired this may be later than
    /// its deadline.
    pub fn removed_time(&self) -> Timestamp {
        self.removed_time
    }

    /// When it is gone. A request sent in the millisecond of the removal is not refused before
    /// `TOMBSTONE_LIFETIME` is over, only behind it: hence one more.
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
