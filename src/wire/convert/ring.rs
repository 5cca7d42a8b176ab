//! Rings.

use std::sync::Arc;

use prost::Message as _;

use super::{consistency_in, context_in, timestamp_out, timing_out};
use crate::limits::ANSWER_BYTES_MAX;
use crate::proto::v1;
use crate::service::{
    Error, FoundRing, GetRing, JoinRing, JoinedRing, LeaveRing, LocateKeys, LocatedKeys, Rings,
};
use crate::state::{MemberView, Revision};

pub(in crate::wire) fn join_in(request: v1::JoinRingRequest) -> Result<JoinRing, Error> {
    Ok(JoinRing {
        context: context_in(request.context)?,
        namespace: request.namespace,
        ring: request.ring,
        member: request.member,
        lease_id: request.lease_id,
        address: request.address,
        tags: request.tags,
        weight: request.weight,
    })
}

pub(in crate::wire) fn joined_out(joined: &JoinedRing) -> v1::JoinRingResponse {
    v1::JoinRingResponse { revision: joined.revision.0, timing: Some(timing_out(joined.timing)) }
}

pub(in crate::wire) fn leave_in(request: v1::LeaveRingRequest) -> Result<LeaveRing, Error> {
    Ok(LeaveRing {
        context: context_in(request.context)?,
        namespace: request.namespace,
        ring: request.ring,
        member: request.member,
        lease_id: request.lease_id,
    })
}

pub(in crate::wire) fn left_out(revision: Revision) -> v1::LeaveRingResponse {
    v1::LeaveRingResponse { revision: revision.0 }
}

pub(in crate::wire) fn locate_in(request: v1::LocateKeysRequest) -> Result<LocateKeys, Error> {
    Ok(LocateKeys {
        namespace: request.namespace,
        ring: request.ring,
        keys: request.keys,
        count: request.count,
        consistency: consistency_in(
            request.consistency,
            request.min_revision,
            request.max_staleness,
        )?,
    })
}

fn member_out(view: &MemberView) -> v1::RingMember {
    let MemberView { name, member } = view;
    let data = member.data();
    v1::RingMember {
        name: name.to_string(),
        address: data.address.to_string(),
        tags: data.tags.clone(),
        weight: data.weight,
        lease_id: member.lease().to_string(),
        join_time: Some(timestamp_out(member.join_time())),
    }
}

pub(in crate::wire) fn located_out(located: &LocatedKeys) -> Result<v1::LocateKeysResponse, Error> {
    let placement = |members: &Vec<Arc<str>>| v1::KeyPlacement {
        members: members.iter().map(ToString::to_string).collect(),
    };
    let response = v1::LocateKeysResponse {
        revision: located.revision.0,
        ring_revision: located.ring_revision.0,
        algorithm_version: Rings::ALGORITHM_VERSION,
        placements: located.placements.iter().map(placement).collect(),
        members: located.members.iter().map(member_out).collect(),
    };
    if response.encoded_len() > ANSWER_BYTES_MAX {
        return Err(Error::answer_too_large("keys", "name fewer keys, or a smaller count"));
    }
    Ok(response)
}

pub(in crate::wire) fn get_ring_in(request: v1::GetRingRequest) -> Result<GetRing, Error> {
    Ok(GetRing {
        namespace: request.namespace,
        ring: request.ring,
        consistency: consistency_in(
            request.consistency,
            request.min_revision,
            request.max_staleness,
        )?,
        without_shares: request.without_shares,
    })
}

pub(in crate::wire) fn found_ring_out(found: &FoundRing) -> v1::GetRingResponse {
    let members = &found.ring.members;
    let share = |(view, fraction): (&MemberView, &f64)| v1::RingShare {
        member: view.name.to_string(),
        fraction: *fraction,
    };
    v1::GetRingResponse {
        revision: found.revision.0,
        ring_revision: found.ring.revision.0,
        algorithm_version: Rings::ALGORITHM_VERSION,
        members: members.iter().map(member_out).collect(),
        shares: members.iter().zip(&found.shares).map(share).collect(),
    }
}
