//! Leases.

use super::{consistency_in, context_in, duration_or_zero, duration_out, timestamp_out};
use crate::proto::v1;
use crate::proto::v1::lease_renewal::Outcome;
use crate::service::{
    Error, FoundLeases, GetLease, GrantedLease, LeaseTiming, ListLeases, NewLease, Renewals,
    Renewed, RevokeLease,
};
use crate::state::{LeaseView, Revision};

pub(super) fn timing_out(timing: LeaseTiming) -> v1::LeaseTiming {
    v1::LeaseTiming {
        remaining: Some(duration_out(timing.remaining)),
        renew_after: Some(duration_out(timing.renew_after)),
    }
}

pub(in crate::wire) fn grant_in(request: v1::GrantLeaseRequest) -> Result<NewLease, Error> {
    Ok(NewLease {
        context: context_in(request.context)?,
        namespace: request.namespace,
        id: request.lease_id,
        owner: request.owner,
        ttl: duration_or_zero("ttl", request.ttl)?,
    })
}

pub(in crate::wire) fn granted_out(granted: &GrantedLease) -> v1::GrantLeaseResponse {
    v1::GrantLeaseResponse {
        revision: granted.revision.0,
        timing: Some(timing_out(granted.timing)),
    }
}

pub(in crate::wire) fn renew_in(request: v1::KeepAliveLeasesRequest) -> Result<Renewals, Error> {
    Ok(Renewals {
        context: context_in(request.context)?,
        namespace: request.namespace,
        ids: request.lease_ids,
    })
}

pub(in crate::wire) fn renewed_out(renewed: Renewed) -> v1::KeepAliveLeasesResponse {
    let renewals = renewed.leases.into_iter().map(|(id, timing)| v1::LeaseRenewal {
        lease_id: id.to_string(),
        outcome: Some(match timing {
            Some(timing) => Outcome::Renewed(timing_out(timing)),
            None => Outcome::Lost(v1::LeaseLost {}),
        }),
    });
    v1::KeepAliveLeasesResponse {
        request_id: renewed.request_id,
        revision: renewed.revision.0,
        renewals: renewals.collect(),
    }
}

pub(in crate::wire) fn revoke_in(request: v1::RevokeLeaseRequest) -> Result<RevokeLease, Error> {
    Ok(RevokeLease {
        context: context_in(request.context)?,
        namespace: request.namespace,
        id: request.lease_id,
    })
}

pub(in crate::wire) fn revoked_out(revision: Revision) -> v1::RevokeLeaseResponse {
    v1::RevokeLeaseResponse { revision: revision.0 }
}

pub(in crate::wire) fn get_lease_in(request: v1::GetLeaseRequest) -> Result<GetLease, Error> {
    Ok(GetLease {
        namespace: request.namespace,
        id: request.lease_id,
        consistency: consistency_in(
            request.consistency,
            request.min_revision,
            request.max_staleness,
        )?,
    })
}

fn lease_out(found: &FoundLeases, view: &LeaseView) -> v1::Lease {
    let count = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    v1::Lease {
        namespace: found.namespace.to_string(),
        id: view.id.to_string(),
        owner: view.lease.owner().to_owned(),
        ttl: Some(duration_out(view.lease.ttl())),
        grant_time: Some(timestamp_out(view.lease.granted_time())),
        remaining: Some(duration_out(view.lease.deadline().since(found.now))),
        held_locks: count(view.held),
        waits: count(view.claims.saturating_sub(view.held)),
        ring_members: count(view.members),
    }
}

pub(in crate::wire) fn found_lease_out(found: &FoundLeases) -> v1::GetLeaseResponse {
    v1::GetLeaseResponse {
        revision: found.revision.0,
        lease: found.leases.first().map(|view| lease_out(found, view)),
    }
}

pub(in crate::wire) fn list_leases_in(request: v1::ListLeasesRequest) -> Result<ListLeases, Error> {
    Ok(ListLeases {
        namespace: request.namespace,
        page_size: request.page_size,
        page_token: request.page_token,
        consistency: consistency_in(request.consistency, 0, request.max_staleness)?,
    })
}

pub(in crate::wire) fn listed_leases_out(found: &FoundLeases) -> v1::ListLeasesResponse {
    v1::ListLeasesResponse {
        revision: found.revision.0,
        leases: found.leases.iter().map(|view| lease_out(found, view)).collect(),
        next_page_token: found.next.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}
