//! Bytes ⇄ commands, entries, replies and records: the only place that knows `quorate.stored.v1`.
//!
//! A command is encoded once, by the node that accepted it; the same bytes go over the wire, into
//! the log of every node and into apply, where they are sliced rather than copied. What is stored
//! may be read by a later build, so fields are added and never reused, and golden bytes in the
//! tests stand guard.
//!
//! Whatever comes in here came from a disk or a wire. It is checked, and what does not fit is an
//! error, never a panic. Attributes of a command are left as they are: that they are in order is
//! for `apply` to check, which refuses them on every node alike.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;

use super::attributes::{Attributes, is_well_formed};
use super::claim::{ClaimKey, LockKey, LockKind};
use super::codec_coordination as coordination;
use super::codec_ring as ring;
use super::command::{
    Attribute, Command, Digest, Fence, Namespace, Outcome, Record, RecordKey, Rejection, Reply,
    Request, Revision, SessionKey,
};
use super::digest::{CLAIM, LEASE, LEASE_TOMBSTONE, MEMBER, RING, SESSION, TOMBSTONE};
use super::lease::{LeaseId, LeaseKey};
use super::level::{FEATURE_LEVEL, FEATURE_LEVEL_BASE};
use super::packing::Reader;
use super::restore::StateHeader;
use super::retry::{Remembered, Requests};
use super::ring::{MemberKey, RingKey};
use super::session::{Facts, Session, Times, packed_timeout, unpacked_timeout};
use super::time::{Stamp, Timeout, Timestamp};
use super::tombstone::Tombstone;
use crate::proto::stored;
use crate::proto::stored::command::Body;
use stored::Reason;

/// Why bytes are not what they should be.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// They are not a message of the expected kind.
    #[error("not a stored message: {0}")]
    Message(#[from] prost::DecodeError),
    /// They are, but a field is missing or makes no sense.
    #[error("stored message is malformed: {0}")]
    Malformed(&'static str),
    /// They were written by a build that knew more than this one.
    #[error(
        "it takes feature level {found}, and this version knows up to {known}: upgrade this node",
        known = FEATURE_LEVEL
    )]
    FeatureLevel {
        /// The level that it takes to understand them.
        found: u32,
    },
    /// Records and header do not belong together.
    #[error("state is damaged: {what} is {found:x}, and the header says {expected:x}")]
    Mismatch {
        /// What was compared.
        what: &'static str,
        /// As in the records.
        found: u64,
        /// As in the header.
        expected: u64,
    },
}

use CodecError::Malformed;

/// The payload of one log entry: a stamp, and the commands that were queued together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The leader's time.
    pub stamp: Stamp,
    /// What it takes to understand the entry; at most `FEATURE_LEVEL`.
    pub feature_level: u32,
    /// In the order in which they are applied.
    pub proposals: Vec<Proposal>,
}

/// A command on its way through the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// An encoded command.
    pub command: Bytes,
    /// Whether this may not be the first sending of it.
    pub resend: bool,
}

/// Encodes a log entry, copying each command once. `feature_level` is what it takes to understand
/// the entry: the level in force, or the one that it raises to.
pub fn encode_entry(stamp: Stamp, feature_level: u32, proposals: &[Proposal]) -> Bytes {
    let each = |proposal: &Proposal| stored::Proposal {
        command: proposal.command.clone(),
        resend: proposal.resend,
    };
    let entry = stored::Entry {
        time: stamp.time.0,
        steady: stamp.steady.0,
        feature_level,
        proposals: proposals.iter().map(each).collect(),
    };
    entry.encode_to_vec().into()
}

/// Decodes a log entry; its commands are slices of `bytes`.
///
/// Errors: the bytes are no entry, or one above this build's feature level.
pub fn decode_entry(bytes: Bytes) -> Result<Entry, CodecError> {
    let entry = stored::Entry::decode(bytes)?;
    if entry.feature_level > FEATURE_LEVEL {
        return Err(CodecError::FeatureLevel { found: entry.feature_level });
    }
    let stamp = Stamp { time: Timestamp(entry.time), steady: Timestamp(entry.steady) };
    let each = |proposal: stored::Proposal| Proposal {
        command: proposal.command,
        resend: proposal.resend,
    };
    let proposals = entry.proposals.into_iter().map(each).collect();
    Ok(Entry { stamp, feature_level: entry.feature_level, proposals })
}

/// Encodes a command for a cluster at a feature level: without what is above that.
pub fn encode_command(command: &Command, feature_level: u32) -> Bytes {
    let command = &*command.fitted_to(feature_level);
    let mut stored = stored_command(command);
    stored.feature_level = command.needed_level();
    stored.encode_to_vec().into()
}

fn stored_command(command: &Command) -> stored::Command {
    let (request, key, body) = match command {
        Command::CreateSession {
            request,
            key,
            principal,
            attributes,
            idle_timeout,
            absolute_timeout,
        } => {
            let body = stored::CreateSession {
                digest: stored_digest(key),
                principal: principal.as_deref().unwrap_or_default().into(),
                attributes: stored_attributes(attributes),
                idle_timeout: idle_timeout.map(stored_timeout),
                absolute_timeout: absolute_timeout.map(stored_timeout),
            };
            (request, key, Body::CreateSession(body))
        }
        Command::UpdateSession {
            request,
            key,
            set,
            remove,
            expected_version,
            principal,
            idle_timeout,
            fence,
        } => {
            let name = |name: &Option<Arc<str>>| name.as_deref().unwrap_or_default().into();
            let body = stored::UpdateSession {
                digest: stored_digest(key),
                set: stored_attributes(set),
                remove: remove.clone(),
                expected_version: expected_version.map(|version| version.0),
                principal: principal.as_ref().map(name),
                idle_timeout: idle_timeout.map(stored_timeout),
                fence: stored_fence(fence),
            };
            (request, key, Body::UpdateSession(body))
        }
        Command::TouchSession { request, key } => {
            (request, key, Body::TouchSession(stored::TouchSession { digest: stored_digest(key) }))
        }
        Command::DeleteSession { request, key, expected_version, fence } => {
            let body = stored::DeleteSession {
                digest: stored_digest(key),
                expected_version: expected_version.map(|version| version.0),
                fence: stored_fence(fence),
            };
            (request, key, Body::DeleteSession(body))
        }
        Command::GrantLease { .. }
        | Command::RenewLeases { .. }
        | Command::RevokeLease { .. }
        | Command::AcquireLock { .. }
        | Command::ReleaseLock { .. }
        | Command::CancelAcquire { .. }
        | Command::BreakLock { .. } => {
            return coordination::stored_command(command);
        }
        Command::JoinRing { .. } | Command::LeaveRing { .. } => {
            return ring::stored_command(command);
        }
        Command::Tick => {
            let tick = Some(Body::Tick(stored::Tick {}));
            return stored::Command { body: tick, ..Default::default() };
        }
        Command::RaiseFeatureLevel { to } => {
            let raise = Some(Body::RaiseFeatureLevel(stored::RaiseFeatureLevel { to: *to }));
            return stored::Command { body: raise, ..Default::default() };
        }
    };
    let request = Some(stored_request(request));
    let namespace = key.namespace.0.to_string();
    stored::Command { request, namespace, body: Some(body), ..Default::default() }
}

/// Decodes a command; the values of its attributes are slices of `bytes`.
///
/// Errors: the command is above `feature_level`, the one in force, so other builds may make
/// something else of it, and the node has to halt; or the bytes are no command for any build, and
/// the proposal is answered with `State::reject_malformed`.
pub fn decode_command(bytes: Bytes, feature_level: u32) -> Result<Command, CodecError> {
    let stored::Command { request, namespace, feature_level: needed, body } =
        stored::Command::decode(bytes)?;
    if needed > feature_level {
        return Err(CodecError::FeatureLevel { found: needed });
    }
    let body = body.ok_or(Malformed("a command without a body"))?;
    if let Body::Tick(_) = body {
        return Ok(Command::Tick);
    }
    if let Body::RaiseFeatureLevel(stored::RaiseFeatureLevel { to }) = body {
        return Ok(Command::RaiseFeatureLevel { to });
    }
    let namespace = Namespace(Arc::from(namespace));
    if let Body::RenewLeases(body) = body {
        return coordination::renew_leases(namespace, &body);
    }
    let request = request_of(request.ok_or(Malformed("a command without a request"))?);
    let key = |digest: Bytes| {
        let digest = digest.as_ref().try_into();
        let digest = Digest(digest.map_err(|_| Malformed("a digest not of 16 bytes"))?);
        Ok::<_, CodecError>(SessionKey { namespace: namespace.clone(), digest })
    };
    Ok(match body {
        Body::CreateSession(body) => Command::CreateSession {
            request,
            key: key(body.digest)?,
            principal: principal(&body.principal),
            attributes: attributes(body.attributes),
            idle_timeout: body.idle_timeout.map(timeout),
            absolute_timeout: body.absolute_timeout.map(timeout),
        },
        Body::UpdateSession(body) => Command::UpdateSession {
            request,
            key: key(body.digest)?,
            set: attributes(body.set),
            remove: body.remove,
            expected_version: body.expected_version.map(Revision),
            principal: body.principal.as_deref().map(principal),
            idle_timeout: body.idle_timeout.map(timeout),
            fence: body.fence.map(fence),
        },
        Body::TouchSession(body) => Command::TouchSession { request, key: key(body.digest)? },
        Body::DeleteSession(body) => Command::DeleteSession {
            request,
            key: key(body.digest)?,
            expected_version: body.expected_version.map(Revision),
            fence: body.fence.map(fence),
        },
        body @ (Body::JoinRing(_) | Body::LeaveRing(_)) => {
            return ring::command(request, namespace, body);
        }
        body => return coordination::command(request, namespace, body),
    })
}

/// Encodes a reply.
pub fn encode_reply(reply: &Reply) -> Bytes {
    let outcome = match &reply.outcome {
        Outcome::Written { version, deadline } => {
            let deadline = deadline.map(|deadline| deadline.0);
            stored::reply::Outcome::Written(stored::Written { version: version.0, deadline })
        }
        Outcome::Rejected(rejection) => {
            stored::reply::Outcome::Rejection(stored_rejection(*rejection))
        }
        other => coordination::stored_outcome(other),
    };
    let reply = stored::Reply { revision: reply.revision.0, outcome: Some(outcome) };
    reply.encode_to_vec().into()
}

/// Decodes a reply.
///
/// Errors: the bytes are no reply, or one that this build does not know.
pub fn decode_reply(bytes: &[u8]) -> Result<Reply, CodecError> {
    let reply = stored::Reply::decode(bytes)?;
    let revision = Revision(reply.revision);
    let outcome = match reply.outcome.ok_or(Malformed("a reply without an outcome"))? {
        stored::reply::Outcome::Written(stored::Written { version, deadline }) => {
            let (version, deadline) = (Revision(version), deadline.map(Timestamp));
            Outcome::Written { version, deadline }
        }
        stored::reply::Outcome::Rejection(stored) => Outcome::Rejected(rejection(stored)?),
        other => coordination::outcome(other)?,
    };
    Ok(Reply { revision, outcome })
}

fn stored_rejection(rejection: Rejection) -> stored::Rejection {
    let (reason, detail) = match rejection {
        Rejection::SessionNotFound => (Reason::SessionNotFound, 0),
        Rejection::SessionExists => (Reason::SessionExists, 0),
        Rejection::SessionIdRetired => (Reason::SessionIdRetired, 0),
        Rejection::VersionMismatch(version) => (Reason::VersionMismatch, version.0),
        Rejection::RequestExpired => (Reason::RequestExpired, 0),
        Rejection::RequestLifetimeTooLong => (Reason::RequestLifetimeTooLong, 0),
        Rejection::OutcomeUnknown => (Reason::OutcomeUnknown, 0),
        Rejection::SessionTooLarge(bytes) => (Reason::SessionTooLarge, bytes),
        Rejection::TooManyAttributes(count) => (Reason::TooManyAttributes, count),
        Rejection::Fenced => (Reason::Fenced, 0),
        Rejection::LeaseNotFound => (Reason::LeaseNotFound, 0),
        Rejection::LeaseExists => (Reason::LeaseExists, 0),
        Rejection::LeaseIdRetired => (Reason::LeaseIdRetired, 0),
        Rejection::TooManyLeases(limit) => (Reason::TooManyLeases, limit),
        Rejection::LockHeld => (Reason::LockHeld, 0),
        Rejection::LockNotHeld => (Reason::LockNotHeld, 0),
        Rejection::LockModeMismatch(kind) => {
            let permits = match kind {
                LockKind::ReadWrite => 0,
                LockKind::Counted { permits } => permits,
            };
            (Reason::LockModeMismatch, u64::from(permits))
        }
        Rejection::AcquireEnded => (Reason::AcquireEnded, 0),
        Rejection::TooManyWaiters(limit) => (Reason::TooManyWaiters, limit),
        Rejection::TooManyClaims(limit) => (Reason::TooManyClaims, limit),
        Rejection::MemberExists => (Reason::MemberExists, 0),
        Rejection::MemberNotFound => (Reason::MemberNotFound, 0),
        Rejection::TooManyMembers(limit) => (Reason::TooManyMembers, limit),
        Rejection::TooManyMembersOfLease(limit) => (Reason::TooManyMembersOfLease, limit),
        Rejection::MalformedCommand => (Reason::MalformedCommand, 0),
        Rejection::ClockAhead => (Reason::ClockAhead, 0),
    };
    stored::Rejection { reason: reason.into(), detail }
}

fn rejection(stored: stored::Rejection) -> Result<Rejection, CodecError> {
    let stored::Rejection { reason, detail } = stored;
    let unknown = Malformed("a rejection for an unknown reason");
    Ok(match Reason::try_from(reason).map_err(|_| unknown)? {
        Reason::Unspecified => return Err(Malformed("a rejection without a reason")),
        Reason::SessionNotFound => Rejection::SessionNotFound,
        Reason::SessionExists => Rejection::SessionExists,
        Reason::SessionIdRetired => Rejection::SessionIdRetired,
        Reason::VersionMismatch => Rejection::VersionMismatch(Revision(detail)),
        Reason::RequestExpired => Rejection::RequestExpired,
        Reason::RequestLifetimeTooLong => Rejection::RequestLifetimeTooLong,
        Reason::OutcomeUnknown => Rejection::OutcomeUnknown,
        Reason::SessionTooLarge => Rejection::SessionTooLarge(detail),
        Reason::TooManyAttributes => Rejection::TooManyAttributes(detail),
        Reason::Fenced => Rejection::Fenced,
        Reason::LeaseNotFound => Rejection::LeaseNotFound,
        Reason::LeaseExists => Rejection::LeaseExists,
        Reason::LeaseIdRetired => Rejection::LeaseIdRetired,
        Reason::TooManyLeases => Rejection::TooManyLeases(detail),
        Reason::LockHeld => Rejection::LockHeld,
        Reason::LockNotHeld => Rejection::LockNotHeld,
        Reason::LockModeMismatch => Rejection::LockModeMismatch(match detail {
            0 => LockKind::ReadWrite,
            permits => LockKind::Counted { permits: permits as u32 },
        }),
        Reason::AcquireEnded => Rejection::AcquireEnded,
        Reason::TooManyWaiters => Rejection::TooManyWaiters(detail),
        Reason::TooManyClaims => Rejection::TooManyClaims(detail),
        Reason::MemberExists => Rejection::MemberExists,
        Reason::MemberNotFound => Rejection::MemberNotFound,
        Reason::TooManyMembers => Rejection::TooManyMembers(detail),
        Reason::TooManyMembersOfLease => Rejection::TooManyMembersOfLease(detail),
        Reason::MalformedCommand => Rejection::MalformedCommand,
        Reason::ClockAhead => Rejection::ClockAhead,
    })
}

/// Encodes the key of a record: a byte for its kind, the namespace, and what names it in there,
/// which ends in something of a fixed length. Different records have different keys.
pub fn encode_key(key: &RecordKey) -> Bytes {
    let of = |kind: u8, namespace: &Namespace, id: &[u8; 16]| {
        [&[kind][..], namespace.0.as_bytes(), id].concat().into()
    };
    match key {
        RecordKey::Session(key) => of(SESSION, &key.namespace, &key.digest.0),
        RecordKey::Tombstone(key) => of(TOMBSTONE, &key.namespace, &key.digest.0),
        RecordKey::Lease(key) => of(LEASE, &key.namespace, &key.id.0),
        RecordKey::LeaseTombstone(key) => of(LEASE_TOMBSTONE, &key.namespace, &key.id.0),
        RecordKey::Claim(ClaimKey { lock, order }) => {
            // A claim that was made has a name within its limit.
            let length = (lock.name.len() as u16).to_be_bytes();
            let (namespace, name) = (lock.namespace.0.as_bytes(), lock.name.as_bytes());
            [&[CLAIM][..], namespace, name, &length, &order.0.to_be_bytes()].concat().into()
        }
        RecordKey::Ring(key) => ring::stored_key(RING, key, &[]),
        RecordKey::Member(MemberKey { ring: key, name }) => ring::stored_key(MEMBER, key, &[name]),
    }
}

/// What names a record within its namespace.
pub(super) enum KeyName<'a> {
    Session(Digest),
    Tombstone(Digest),
    Lease(LeaseId),
    LeaseTombstone(LeaseId),
    Claim(&'a str, Revision),
    Ring(&'a str),
    Member(&'a str, &'a str),
}

impl KeyName<'_> {
    pub(super) fn key(self, namespace: Namespace) -> RecordKey {
        match self {
            Self::Session(digest) => RecordKey::Session(SessionKey { namespace, digest }),
            Self::Tombstone(digest) => RecordKey::Tombstone(SessionKey { namespace, digest }),
            Self::Lease(id) => RecordKey::Lease(LeaseKey { namespace, id }),
            Self::LeaseTombstone(id) => RecordKey::LeaseTombstone(LeaseKey { namespace, id }),
            Self::Claim(name, order) => {
                let lock = LockKey { namespace, name: Arc::from(name) };
                RecordKey::Claim(ClaimKey { lock, order })
            }
            Self::Ring(name) => RecordKey::Ring(RingKey { namespace, name: Arc::from(name) }),
            Self::Member(ring, name) => {
                let ring = RingKey { namespace, name: Arc::from(ring) };
                RecordKey::Member(MemberKey { ring, name: Arc::from(name) })
            }
        }
    }
}

/// Takes the key of a record apart: its namespace, and the rest.
pub(super) fn split_key(key: &[u8]) -> Result<(&str, KeyName<'_>), CodecError> {
    let too_short = || Malformed("a key that is too short");
    let text = |text| std::str::from_utf8(text).map_err(|_| Malformed("a name not of UTF-8"));
    let (kind, rest) = key.split_first().ok_or(Malformed("an empty key"))?;
    if *kind == CLAIM {
        let (rest, order) = rest.split_last_chunk().ok_or_else(too_short)?;
        let (rest, length) = rest.split_last_chunk().ok_or_else(too_short)?;
        let length = usize::from(u16::from_be_bytes(*length));
        let split = rest.len().checked_sub(length).ok_or_else(too_short)?;
        let (namespace, name) = rest.split_at(split);
        let order = Revision(u64::from_be_bytes(*order));
        return Ok((text(namespace)?, KeyName::Claim(text(name)?, order)));
    }
    if *kind == RING {
        let (namespace, [name]) = ring::split_key(rest)?;
        return Ok((namespace, KeyName::Ring(name)));
    }
    if *kind == MEMBER {
        let (namespace, [ring, name]) = ring::split_key(rest)?;
        return Ok((namespace, KeyName::Member(ring, name)));
    }
    let (namespace, id) = rest.split_last_chunk().ok_or_else(too_short)?;
    let name = match *kind {
        SESSION => KeyName::Session(Digest(*id)),
        TOMBSTONE => KeyName::Tombstone(Digest(*id)),
        LEASE => KeyName::Lease(LeaseId(*id)),
        LEASE_TOMBSTONE => KeyName::LeaseTombstone(LeaseId(*id)),
        _ => return Err(Malformed("a key of an unknown kind")),
    };
    Ok((text(namespace)?, name))
}

/// Decodes the key of a record.
///
/// Errors: the bytes are no key, or one of a kind that this build does not know.
pub fn decode_key(key: &[u8]) -> Result<RecordKey, CodecError> {
    let (namespace, name) = split_key(key)?;
    Ok(name.key(Namespace(Arc::from(namespace))))
}

/// Appends an encoded record to `out`.
pub fn encode_record(record: &Record, out: &mut Vec<u8>) {
    let record = match record {
        Record::Session(session) => stored::record::Record::Session(stored_session(session)),
        Record::Tombstone(tombstone) => {
            let requests = tombstone.requests();
            let tombstone = stored::TombstoneRecord {
                removed_time: tombstone.removed_time().0,
                recent: stored_requests(&requests),
                forgotten: requests.forgotten().0,
                forgotten_resend: requests.forgotten_resend().0,
            };
            stored::record::Record::Tombstone(tombstone)
        }
        Record::Lease(lease) => coordination::stored_lease(lease),
        Record::LeaseTombstone(tombstone) => coordination::stored_lease_tombstone(tombstone),
        Record::Claim(claim) => coordination::stored_claim(claim),
        Record::Ring(ring) => ring::stored_ring(ring),
        Record::Member(member) => ring::stored_member(member),
    };
    let record = stored::Record { record: Some(record) };
    record.encode(out).expect("a vector grows as needed");
}

/// Decodes the record of `key`.
///
/// Errors: the bytes are no record of that kind.
pub fn decode_record(key: &RecordKey, bytes: &[u8]) -> Result<Record, CodecError> {
    decode_record_with(key, bytes, &mut Vec::new())
}

/// The same, with a buffer that was used before.
pub(super) fn decode_record_with(
    key: &RecordKey,
    bytes: &[u8],
    scratch: &mut Vec<u8>,
) -> Result<Record, CodecError> {
    let record = stored::Record::decode(bytes)?.record;
    match (key, record.ok_or(Malformed("an empty record"))?) {
        (RecordKey::Session(key), stored::record::Record::Session(session)) => {
            Ok(Record::Session(Arc::new(session_of(key, session, scratch)?)))
        }
        (RecordKey::Tombstone(key), stored::record::Record::Tombstone(tombstone)) => {
            let forgotten = [tombstone.forgotten, tombstone.forgotten_resend];
            let requests = requests(&tombstone.recent, forgotten)?;
            let removed_time = Timestamp(tombstone.removed_time);
            Ok(Record::Tombstone(Arc::new(Tombstone::new(key, removed_time, &requests))))
        }
        (RecordKey::Lease(key), stored::record::Record::Lease(lease)) => {
            Ok(Record::Lease(Arc::new(coordination::lease(key, &lease)?)))
        }
        (RecordKey::LeaseTombstone(key), stored::record::Record::LeaseTombstone(tombstone)) => {
            let tombstone = coordination::lease_tombstone(key, &tombstone)?;
            Ok(Record::LeaseTombstone(Arc::new(tombstone)))
        }
        (RecordKey::Claim(key), stored::record::Record::Claim(claim)) => {
            Ok(Record::Claim(Arc::new(coordination::claim(key, claim)?)))
        }
        (RecordKey::Ring(key), stored::record::Record::Ring(ring)) => {
            Ok(Record::Ring(Arc::new(ring::ring(key, ring))))
        }
        (RecordKey::Member(key), stored::record::Record::Member(member)) => {
            Ok(Record::Member(Arc::new(ring::member(key, member)?)))
        }
        _ => Err(Malformed("a record of another kind than its key")),
    }
}

pub(super) fn encode_header(header: &StateHeader) -> Bytes {
    let header = stored::StateHeader {
        feature_level: header.feature_level,
        clock: header.clock.time.0,
        steady: header.clock.steady.0,
        revision: header.revision.0,
        digest: header.sum,
        records: header.records,
    };
    header.encode_to_vec().into()
}

pub(super) fn decode_header(bytes: &[u8]) -> Result<StateHeader, CodecError> {
    let header = stored::StateHeader::decode(bytes)?;
    if header.feature_level > FEATURE_LEVEL {
        return Err(CodecError::FeatureLevel { found: header.feature_level });
    }
    if header.feature_level == 0 {
        return Err(Malformed("a state without a feature level"));
    }
    if header.revision > u64::MAX / 2 {
        return Err(Malformed("a revision that leaves no room for others"));
    }
    Ok(StateHeader {
        // What is below the base came before there was anything to raise.
        feature_level: header.feature_level.max(FEATURE_LEVEL_BASE),
        clock: Stamp { time: Timestamp(header.clock), steady: Timestamp(header.steady) },
        revision: Revision(header.revision),
        sum: header.digest,
        records: header.records,
    })
}

fn stored_session(session: &Session) -> stored::SessionRecord {
    let (facts, attributes) = session.split();
    let attribute = |(name, value): (&str, &[u8])| stored::Attribute {
        name: name.to_string(),
        value: Bytes::copy_from_slice(value),
    };
    stored::SessionRecord {
        principal: facts.principal.unwrap_or_default().to_string(),
        attributes: attributes.map(attribute).collect(),
        version: session.version().0,
        created_revision: facts.times.created_revision.0,
        create_time: facts.times.create_time.0,
        last_access_time: facts.times.last_access_time.0,
        idle_timeout: packed_timeout(facts.times.idle_timeout),
        absolute_timeout: packed_timeout(facts.times.absolute_timeout),
        deadline: session.deadline().map_or(0, |deadline| deadline.0),
        recent: stored_requests(&facts.requests),
        forgotten: facts.requests.forgotten().0,
        forgotten_resend: facts.requests.forgotten_resend().0,
    }
}

fn session_of(
    key: &SessionKey,
    session: stored::SessionRecord,
    scratch: &mut Vec<u8>,
) -> Result<Session, CodecError> {
    let attributes = attributes(session.attributes);
    if !is_well_formed(&attributes, &[]) {
        return Err(Malformed("a session whose attributes are not in order"));
    }
    let times = Times {
        create_time: Timestamp(session.create_time),
        created_revision: Revision(session.created_revision),
        last_access_time: Timestamp(session.last_access_time),
        idle_timeout: unpacked_timeout(session.idle_timeout),
        absolute_timeout: unpacked_timeout(session.absolute_timeout),
    };
    let facts = Facts {
        times,
        principal: Some(session.principal.as_str()),
        requests: requests(&session.recent, [session.forgotten, session.forgotten_resend])?,
    };
    let nothing = Attributes::new(Reader::new(&[]));
    let (body, _) = facts.pack(nothing, &attributes, &[], scratch);
    let deadline = Some(Timestamp(session.deadline)).filter(|deadline| *deadline > Timestamp(0));
    Ok(Session::new(key, Revision(session.version), deadline, body))
}

pub(super) fn stored_request(request: &Request) -> stored::Request {
    let Request { id, first_sent, expires } = *request;
    stored::Request { id, first_sent: first_sent.0, expires: expires.0 }
}

pub(super) fn request_of(request: stored::Request) -> Request {
    let stored::Request { id, first_sent, expires } = request;
    Request { id, first_sent: Timestamp(first_sent), expires: Timestamp(expires) }
}

pub(super) fn stored_requests(requests: &Requests) -> Vec<stored::Remembered> {
    let each = |remembered: &Remembered| stored::Remembered {
        id: remembered.id,
        first_sent: remembered.first_sent.0,
        expires: remembered.expires.0,
        revision: remembered.revision.0,
        resend: remembered.resend,
    };
    requests.recent().iter().map(each).collect()
}

/// `forgotten` is both marks, the one for first sendings last.
pub(super) fn requests(
    recent: &[stored::Remembered],
    forgotten: [u64; 2],
) -> Result<Requests, CodecError> {
    let each = |remembered: &stored::Remembered| Remembered {
        id: remembered.id,
        first_sent: Timestamp(remembered.first_sent),
        expires: Timestamp(remembered.expires),
        revision: Revision(remembered.revision),
        resend: remembered.resend,
    };
    let [forgotten, forgotten_resend] = forgotten.map(Timestamp);
    let requests = Requests::restore(recent.iter().map(each), forgotten, forgotten_resend);
    requests.ok_or(Malformed("a record that remembers what cannot be remembered"))
}

fn stored_digest(key: &SessionKey) -> Bytes {
    Bytes::copy_from_slice(&key.digest.0)
}

fn stored_fence(fence: &Option<Fence>) -> Option<stored::Fence> {
    fence
        .as_ref()
        .map(|Fence { lock, token }| stored::Fence { lock: lock.to_string(), token: token.0 })
}

fn fence(fence: stored::Fence) -> Fence {
    Fence { lock: Arc::from(fence.lock), token: Revision(fence.token) }
}

fn stored_attributes(attributes: &[Attribute]) -> Vec<stored::Attribute> {
    let each = |attribute: &Attribute| stored::Attribute {
        name: attribute.name.clone(),
        value: attribute.value.clone(),
    };
    attributes.iter().map(each).collect()
}

fn attributes(attributes: Vec<stored::Attribute>) -> Vec<Attribute> {
    let each = |stored::Attribute { name, value }| Attribute { name, value };
    attributes.into_iter().map(each).collect()
}

fn principal(name: &str) -> Option<Arc<str>> {
    Some(name).filter(|name| !name.is_empty()).map(Arc::from)
}

fn stored_timeout(timeout: Timeout) -> stored::Timeout {
    let after = Some(packed_timeout(timeout)).filter(|length| *length > 0);
    stored::Timeout { after }
}

fn timeout(timeout: stored::Timeout) -> Timeout {
    // An absent length is never; one of zero would be the shortest there is.
    timeout.after.map_or(Timeout::Never, |length| unpacked_timeout(length.max(1)))
}
