//! Bytes ⇄ what concerns rings: the part of the codec that knows their messages.

use std::sync::Arc;

use bytes::Bytes;

use super::codec::CodecError::{self, Malformed};
use super::codec::stored_request;
use super::codec_coordination::{id, stored_id};
use super::command::{Command, Namespace, Request, Revision};
use super::ring::{Member, MemberData, MemberKey, Ring, RingKey};
use super::time::Timestamp;
use crate::proto::stored;
use crate::proto::stored::command::Body;
use crate::proto::stored::record::Record as StoredRecord;

/// A command on rings.
pub(super) fn stored_command(command: &Command) -> stored::Command {
    let (request, key, body) = match command {
        Command::JoinRing { request, member, lease, data } => {
            let body = stored::JoinRing {
                ring: member.ring.name.to_string(),
                member: member.name.to_string(),
                lease: stored_id(*lease),
                address: data.address.to_string(),
                weight: data.weight,
                tags: data.tags.clone(),
            };
            (request, member, Body::JoinRing(body))
        }
        Command::LeaveRing { request, member, lease } => {
            let body = stored::LeaveRing {
                ring: member.ring.name.to_string(),
                member: member.name.to_string(),
                lease: lease.map(stored_id),
            };
            (request, member, Body::LeaveRing(body))
        }
        _ => unreachable!("the codec keeps those to itself"),
    };
    let namespace = key.ring.namespace.0.to_string();
    let (request, body) = (Some(stored_request(request)), Some(body));
    stored::Command { request, namespace, body, ..Default::default() }
}

/// The same, back.
pub(super) fn command(
    request: Request,
    namespace: Namespace,
    body: Body,
) -> Result<Command, CodecError> {
    let key = |ring: String, name: String| MemberKey {
        ring: RingKey { namespace, name: Arc::from(ring) },
        name: Arc::from(name),
    };
    Ok(match body {
        Body::JoinRing(body) => Command::JoinRing {
            request,
            member: key(body.ring, body.member),
            lease: id(&body.lease)?,
            data: MemberData {
                address: Arc::from(body.address),
                weight: body.weight,
                tags: body.tags,
            },
        },
        Body::LeaveRing(body) => Command::LeaveRing {
            request,
            member: key(body.ring, body.member),
            lease: body.lease.as_ref().map(id).transpose()?,
        },
        _ => return Err(Malformed("a command that belongs elsewhere")),
    })
}

/// The key of a record that is named by its ring and `names`: their lengths come last, so that it
/// can be taken apart from the end.
pub(super) fn stored_key(kind: u8, ring: &RingKey, names: &[&Arc<str>]) -> Bytes {
    let names = || std::iter::once(&ring.name).chain(names.iter().copied());
    let mut key = vec![kind];
    key.extend_from_slice(ring.namespace.0.as_bytes());
    names().for_each(|name| key.extend_from_slice(name.as_bytes()));
    // What was made has names within their limits.
    names().for_each(|name| key.extend_from_slice(&(name.len() as u16).to_be_bytes()));
    key.into()
}

/// The namespace and the names of such a key, without its kind.
pub(super) fn split_key<const N: usize>(key: &[u8]) -> Result<(&str, [&str; N]), CodecError> {
    let too_short = || Malformed("a key that is too short");
    let text = |text| std::str::from_utf8(text).map_err(|_| Malformed("a name not of UTF-8"));
    let (mut rest, mut lengths) = (key, [0; N]);
    for length in lengths.iter_mut().rev() {
        let (before, bytes) = rest.split_last_chunk().ok_or_else(too_short)?;
        (rest, *length) = (before, usize::from(u16::from_be_bytes(*bytes)));
    }
    let mut names = [""; N];
    for (name, length) in names.iter_mut().zip(lengths).rev() {
        let split = rest.len().checked_sub(length).ok_or_else(too_short)?;
        let (before, bytes) = rest.split_at(split);
        (rest, *name) = (before, text(bytes)?);
    }
    Ok((text(rest)?, names))
}

pub(super) fn stored_ring(ring: &Ring) -> StoredRecord {
    StoredRecord::Ring(stored::RingRecord { revision: ring.revision().0 })
}

pub(super) fn ring(key: &RingKey, ring: stored::RingRecord) -> Ring {
    Ring::new(key, Revision(ring.revision))
}

pub(super) fn stored_member(member: &Member) -> StoredRecord {
    StoredRecord::Member(stored::MemberRecord {
        lease: stored_id(member.lease()),
        address: member.data().address.to_string(),
        weight: member.data().weight,
        tags: member.data().tags.clone(),
        join_time: member.join_time().0,
        revision: member.revision().0,
    })
}

pub(super) fn member(key: &MemberKey, stored: stored::MemberRecord) -> Result<Member, CodecError> {
    let stored::MemberRecord { lease, address, weight, tags, join_time, revision } = stored;
    let data = MemberData { address: Arc::from(address), weight, tags };
    if !data.is_valid() || !key.is_valid() {
        return Err(Malformed("a member whose data are out of range"));
    }
    Ok(Member::new(key, id(&lease)?, data, Timestamp(join_time), Revision(revision)))
}
