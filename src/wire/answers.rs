//! Answers on their way out: what they count for, and until when.
//!
//! An answer is made in one place, by the callback of its use case, and counts from then on. gRPC's
//! encoder turns it into bytes, alone or with others, and HTTP/2 keeps these until the client's
//! windows let them go. So the bytes carry what they count for, and release it when the transport
//! drops them: when they were sent, or when the stream or connection has ended.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use prost::Message;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::Stream;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;

use crate::proto::v1;
use crate::service::{Count, Error, Share};

/// An answer of less counts only until it is made: there are no more such on a connection than
/// calls, and each call has memory of its own that is more.
pub(super) const COUNTED_MIN: usize = 1_024;
/// What an attribute takes in memory beside its name and value.
const ATTRIBUTE_WEIGHT: usize = 96;
/// What a record takes in memory beside what is encoded of it.
const RECORD_WEIGHT: usize = 256;

/// Bytes that an answer to a read takes in memory.
pub(super) trait Weight: Message {
    /// At least those of its encoding.
    fn weight(&self) -> usize {
        self.encoded_len() + RECORD_WEIGHT * self.records()
    }

    /// How many records it holds, attributes counted as parts of one.
    fn records(&self) -> usize;
}

fn records_of(session: &v1::Session) -> usize {
    1 + session.attributes.len() * ATTRIBUTE_WEIGHT / RECORD_WEIGHT
}

impl Weight for v1::GetSessionResponse {
    fn records(&self) -> usize {
        self.session.as_ref().map_or(0, records_of)
    }
}

impl Weight for v1::BatchGetSessionsResponse {
    fn records(&self) -> usize {
        self.sessions.iter().map(records_of).sum()
    }
}

impl Weight for v1::ListSessionsResponse {
    fn records(&self) -> usize {
        self.sessions.len()
    }
}

impl Weight for v1::GetLeaseResponse {
    fn records(&self) -> usize {
        1
    }
}

impl Weight for v1::ListLeasesResponse {
    fn records(&self) -> usize {
        self.leases.len()
    }
}

impl Weight for v1::KeepAliveLeasesResponse {
    fn records(&self) -> usize {
        self.renewals.len()
    }
}

fn claims_of(lock: &v1::Lock) -> usize {
    1 + lock.holders.len() + lock.waiters.len()
}

impl Weight for v1::GetLockResponse {
    fn records(&self) -> usize {
        self.lock.as_ref().map_or(0, claims_of)
    }
}

impl Weight for v1::ListLocksResponse {
    fn records(&self) -> usize {
        self.locks.iter().map(claims_of).sum()
    }
}

impl Weight for v1::GetRingResponse {
    fn records(&self) -> usize {
        self.members.iter().map(|member| 1 + member.tags.len()).sum()
    }
}

impl Weight for v1::LocateKeysResponse {
    fn records(&self) -> usize {
        let tags: usize = self.members.iter().map(|member| 1 + member.tags.len()).sum();
        tags + self.placements.len()
    }
}

/// Makes an answer of what a use case found. A panic on the way is this request's alone.
pub(super) fn make<T, M>(
    share: &Share,
    result: Result<T, Error>,
    out: impl FnOnce(T) -> Result<M, Error>,
) -> Result<M, Error> {
    let found = result?;
    catch_unwind(AssertUnwindSafe(|| out(found))).unwrap_or_else(|_| {
        share.admission().note_panic();
        Err(Error::panicked())
    })
}

/// What the encoder has taken of a stream's answers and not handed on as bytes yet. Travels to the
/// body as an extension of the response.
pub(super) struct Encoding {
    share: Arc<Share>,
    taken: Mutex<Count>,
}

impl Encoding {
    pub(super) fn new(share: Arc<Share>, taken: Count) -> Arc<Self> {
        Arc::new(Self { share, taken: Mutex::new(taken) })
    }

    fn add(&self, count: Count) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.asked += count.asked;
        taken.answers += count.answers;
    }

    fn take(&self) -> Count {
        std::mem::take(&mut self.taken.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Encoding {
    fn drop(&mut self) {
        self.share.release(self.take());
    }
}

/// Answers of one stream, each with what it counts for, in the order in which they were made.
pub(super) struct Outbox<T> {
    inbox: UnboundedReceiver<(T, Count)>,
    encoding: Arc<Encoding>,
}

impl<T> Outbox<T> {
    pub(super) fn new(inbox: UnboundedReceiver<(T, Count)>, encoding: Arc<Encoding>) -> Self {
        Self { inbox, encoding }
    }
}

impl<T> Stream for Outbox<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        self.inbox.poll_recv(context).map(|next| {
            let (answer, count) = next?;
            self.encoding.add(count);
            Some(answer)
        })
    }
}

impl<T> Drop for Outbox<T> {
    fn drop(&mut self) {
        self.inbox.close();
        while let Ok((_, count)) = self.inbox.try_recv() {
            self.encoding.share.release(count);
        }
    }
}

/// A body whose bytes carry what they count for.
struct Counted {
    body: Body,
    encoding: Arc<Encoding>,
}

/// Bytes in the hands of the transport.
struct Held {
    bytes: Bytes,
    share: Arc<Share>,
    count: Count,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.share.take(self.count);
    }
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        polled.map_ok(|frame| {
            frame.map_data(|bytes| {
                let count = self.encoding.take();
                if count == Count::default() {
                    return bytes;
                }
                Bytes::from_owner(Held { bytes, share: self.encoding.share.clone(), count })
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Lets the body of a response carry what its answers count for.
pub(super) fn counted(mut response: http::Response<Body>) -> http::Response<Body> {
    match response.extensions_mut().remove::<Arc<Encoding>>() {
        Some(encoding) => response.map(|body| Body::new(Counted { body, encoding })),
        None => response,
    }
}

#[cfg(test)]
mod tests {
    use prost_types::{Duration, Timestamp};

    use super::*;
    use crate::limits::{
        ANSWER_BYTES_MAX, LEASE_RENEWALS_MAX, NAME_BYTES_MAX, NAMESPACE_BYTES_MAX, PAGE_SIZE_MAX,
        RING_MEMBER_TAG_BYTES_MAX, RING_MEMBER_TAGS_MAX, RING_MEMBERS_MAX,
    };

    const DURATION: Option<Duration> = Some(Duration { seconds: i64::MAX, nanos: 999_999_999 });
    const TIME: Option<Timestamp> = Some(Timestamp { seconds: i64::MAX, nanos: 999_999_999 });

    fn name() -> String {
        "n".repeat(NAME_BYTES_MAX)
    }

    fn namespace() -> String {
        "n".repeat(NAMESPACE_BYTES_MAX)
    }

    fn hex() -> String {
        "0".repeat(32)
    }

    fn timing() -> Option<v1::LeaseTiming> {
        Some(v1::LeaseTiming { remaining: DURATION, renew_after: DURATION })
    }

    fn mode() -> Option<v1::LockMode> {
        let permits = v1::Permits { of: u32::MAX, take: u32::MAX };
        Some(v1::LockMode { mode: Some(v1::lock_mode::Mode::Permits(permits)) })
    }

    fn lock(claims: usize) -> v1::Lock {
        let holder = v1::LockHolder {
            lease_id: hex(),
            request_id: u64::MAX,
            owner: name(),
            mode: mode(),
            token: u64::MAX,
            grant_time: TIME,
            lease_remaining: DURATION,
            lock_delay_remaining: DURATION,
        };
        let waiter = v1::LockWaiter {
            lease_id: hex(),
            request_id: u64::MAX,
            owner: name(),
            mode: mode(),
            wait_start_time: TIME,
            wait_remaining: DURATION,
        };
        v1::Lock {
            namespace: namespace(),
            name: name(),
            kind: v1::LockKind::Permits as i32,
            permits: u32::MAX,
            permits_taken: u32::MAX,
            holder_count: u32::MAX,
            lock_delay_remaining: DURATION,
            holders: vec![holder; claims],
            waiter_count: u32::MAX,
            waiters: vec![waiter; claims],
        }
    }

    fn session() -> v1::Session {
        v1::Session {
            namespace: namespace(),
            handle: hex(),
            principal: name(),
            attributes: std::collections::BTreeMap::new(),
            version: u64::MAX,
            create_time: TIME,
            last_access_time: TIME,
            idle_timeout: DURATION,
            absolute_timeout: DURATION,
            expire_time: TIME,
            size_bytes: u64::MAX,
        }
    }

    fn lease() -> v1::Lease {
        v1::Lease {
            namespace: namespace(),
            id: hex(),
            owner: name(),
            ttl: DURATION,
            grant_time: TIME,
            remaining: DURATION,
            held_locks: u32::MAX,
            waits: u32::MAX,
            ring_members: u32::MAX,
        }
    }

    fn ring() -> v1::GetRingResponse {
        let bytes = RING_MEMBER_TAG_BYTES_MAX / RING_MEMBER_TAGS_MAX;
        let tag = |number| (format!("{number:0width$}", width = bytes / 2), "v".repeat(bytes / 2));
        let member = v1::RingMember {
            name: name(),
            address: name(),
            tags: (0..RING_MEMBER_TAGS_MAX).map(tag).collect(),
            weight: u32::MAX,
            lease_id: hex(),
            join_time: TIME,
        };
        v1::GetRingResponse {
            revision: u64::MAX,
            ring_revision: u64::MAX,
            algorithm_version: u32::MAX,
            members: vec![member; RING_MEMBERS_MAX],
            shares: vec![v1::RingShare { member: name(), fraction: 0.5 }; RING_MEMBERS_MAX],
        }
    }

    /// What is not counted before it is sent: the limits of what it holds see to it.
    #[test]
    fn the_largest_answers_fit_a_message() {
        let next_page_token = name();
        let (revision, page) = (u64::MAX, PAGE_SIZE_MAX);
        let sessions = vec![session(); page];
        let token = next_page_token.clone();
        let sessions = v1::ListSessionsResponse { revision, sessions, next_page_token: token };
        let token = next_page_token.clone();
        let leases = vec![lease(); page];
        let leases = v1::ListLeasesResponse { revision, leases, next_page_token: token };
        let locks = vec![lock(1); page];
        let locks = v1::ListLocksResponse { revision, locks, next_page_token };
        let outcome = Some(v1::lease_renewal::Outcome::Renewed(timing().unwrap()));
        let renewal = v1::LeaseRenewal { lease_id: hex(), outcome };
        let renewals = vec![renewal; LEASE_RENEWALS_MAX];
        let renewed = v1::KeepAliveLeasesResponse { request_id: u64::MAX, revision, renewals };
        let found = v1::GetLockResponse { revision, lock: Some(lock(page)) };
        for (what, bytes) in [
            ("sessions", sessions.encoded_len()),
            ("leases", leases.encoded_len()),
            ("locks", locks.encoded_len()),
            ("renewals", renewed.encoded_len()),
            ("a lock", found.encoded_len()),
            ("a ring", ring().encoded_len()),
        ] {
            assert!(bytes <= ANSWER_BYTES_MAX, "{what}: {bytes} bytes");
        }
    }
}
