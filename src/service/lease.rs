//! Leases: the use cases.
//!
//! Deadlines lie on the steady clock, which owners do not see. They are told how long their lease
//! has left, as of this node's estimate of that clock, and when to renew it next.

use std::sync::Arc;
use std::time::Duration;

use super::error::Error;
use super::field::{
    invalid_page_token, lease_id, page_size, parse_hex, valid_label, valid_namespace,
};
use super::request::{Call, Consistency, RequestContext, RequestIds, read};
use crate::limits::{LEASE_RENEWALS_MAX, LEASE_TTL_MAX, LEASE_TTL_MIN};
use crate::raft::Node;
use crate::state::{
    Command, LeaseId, LeaseKey, LeaseView, Namespace, Outcome, Rejection, Revision, State,
    Timestamp,
};

/// What the owner of a lease has to know of its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTiming {
    /// The lease ends after this time unless it is renewed.
    pub remaining: Duration,
    /// When to renew next: about a third of that, with jitter.
    pub renew_after: Duration,
}

/// A lease to be granted.
#[derive(Clone, Debug, Default)]
pub struct NewLease {
    /// Identity of the request.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// Minted by the caller: 32 lowercase hex characters.
    pub id: String,
    /// Label for people; may be empty.
    pub owner: String,
    /// Time to live: 1 s to 24 h.
    pub ttl: Duration,
}

/// A lease was granted.
#[derive(Clone, Copy, Debug)]
pub struct GrantedLease {
    /// Of the change.
    pub revision: Revision,
    /// Its time.
    pub timing: LeaseTiming,
}

/// Leases to be renewed.
#[derive(Clone, Debug, Default)]
pub struct Renewals {
    /// Identity of the request, which is not remembered; past its end nothing is renewed.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// 1 to 1,000.
    pub ids: Vec<String>,
}

/// What became of leases that were to be renewed.
#[derive(Clone, Debug)]
pub struct Renewed {
    /// The request's id; 0 if it had none.
    pub request_id: u64,
    /// Of the state in which they were applied.
    pub revision: Revision,
    /// In the order of the request; without timing those that are lost.
    pub leases: Vec<(LeaseId, Option<LeaseTiming>)>,
}

/// Names one lease for a change.
#[derive(Clone, Debug, Default)]
pub struct RevokeLease {
    /// Identity of the request.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// Which.
    pub id: String,
}

/// A lease to be read.
#[derive(Clone, Debug, Default)]
pub struct GetLease {
    /// Empty for `default`.
    pub namespace: String,
    /// Which.
    pub id: String,
    /// How fresh.
    pub consistency: Consistency,
}

/// A page of leases.
#[derive(Clone, Debug, Default)]
pub struct ListLeases {
    /// Empty for `default`.
    pub namespace: String,
    /// 0 for the default.
    pub page_size: u32,
    /// Empty for the first page.
    pub page_token: String,
    /// How fresh.
    pub consistency: Consistency,
}

/// Leases as they were found, shared with the state.
#[derive(Clone, Debug)]
pub struct FoundLeases {
    /// Of the state that was read.
    pub revision: Revision,
    /// Where they are.
    pub namespace: Namespace,
    /// The steady clock, by which their deadlines are to be judged.
    pub now: Timestamp,
    /// Those found, by id.
    pub leases: Vec<LeaseView>,
    /// Behind which the next page begins, if there is one.
    pub next: Option<LeaseId>,
}

/// Tells owners when to renew.
pub(super) struct Pace(RequestIds);

impl Pace {
    pub(super) fn new(seed: u64) -> Self {
        Self(RequestIds::new(seed))
    }

    /// The time that a lease has left at `now`. Renewals are spread over a quarter around a third
    /// of it, so that those of many leases neither come at once nor fall together after a failover.
    pub(super) fn timing(&self, deadline: Timestamp, now: Timestamp) -> LeaseTiming {
        let remaining = deadline.since(now);
        let percent = 29 + u32::try_from(self.0.next() % 9).unwrap_or_default();
        LeaseTiming { remaining, renew_after: remaining * percent / 100 }
    }
}

/// The lease use cases of one node.
pub struct Leases {
    node: Arc<Node>,
    request_ids: RequestIds,
    pace: Arc<Pace>,
}

impl Leases {
    /// For one node; `seed` is random.
    pub fn new(node: Arc<Node>, seed: u64) -> Self {
        let pace = Arc::new(Pace::new(!seed));
        Self { node, request_ids: RequestIds::new(seed), pace }
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Grants a lease.
    pub fn grant(
        &self,
        call: &Call<'_>,
        new: NewLease,
        done: impl FnOnce(Result<GrantedLease, Error>) + Send + 'static,
    ) {
        let resend = new.context.resend;
        let command = match self.grant_command(call, new) {
            Ok(command) => command,
            Err(error) => return done(Err(error)),
        };
        let (node, pace) = (self.node.clone(), self.pace.clone());
        self.node.write(&command, resend, call.deadline.0, move |result| {
            done(result.map_err(Error::from).and_then(|reply| match reply.outcome {
                Outcome::LeaseGranted { deadline } => {
                    let timing = pace.timing(deadline, node.steady_time());
                    Ok(GrantedLease { revision: reply.revision, timing })
                }
                other => Err(refused(&other)),
            }));
        });
    }

    fn grant_command(&self, call: &Call<'_>, new: NewLease) -> Result<Command, Error> {
        let request = self.request_ids.complete(&self.node, call, &new.context)?;
        let namespace = valid_namespace(new.namespace)?;
        let id = lease_id("lease_id", &new.id)?;
        valid_label("owner", &new.owner)?;
        if !(LEASE_TTL_MIN..=LEASE_TTL_MAX).contains(&new.ttl) {
            return Err(Error::invalid(
                "ttl",
                "INVALID_TTL",
                "ttl, the lease's time to live, has to be between 1 s and 24 h",
            ));
        }
        let key = LeaseKey { namespace, id };
        Ok(Command::GrantLease { request, key, owner: new.owner.into(), ttl: new.ttl })
    }

    /// Renews leases, and says of each whether it is lost.
    pub fn renew(
        &self,
        call: &Call<'_>,
        renewals: Renewals,
        done: impl FnOnce(Result<Renewed, Error>) + Send + 'static,
    ) {
        let (request_id, resend) = (renewals.context.request_id, renewals.context.resend);
        let (namespace, ids, expires) = match self.valid_renewals(call, renewals) {
            Ok(valid) => valid,
            Err(error) => return done(Err(error)),
        };
        let (node, pace) = (self.node.clone(), self.pace.clone());
        let expires = Some(expires);
        let command = Command::RenewLeases { namespace, ids: ids.clone(), expires };
        self.node.write(&command, resend, call.deadline.0, move |result| {
            done(result.map_err(Error::from).and_then(|reply| match reply.outcome {
                Outcome::LeasesRenewed(deadlines) if deadlines.len() == ids.len() => {
                    let now = node.steady_time();
                    let timing = |deadline: Timestamp| pace.timing(deadline, now);
                    let timings = deadlines.into_iter().map(|deadline| deadline.map(timing));
                    let leases = ids.into_iter().zip(timings).collect();
                    Ok(Renewed { request_id, revision: reply.revision, leases })
                }
                other => Err(refused(&other)),
            }));
        });
    }

    fn valid_renewals(
        &self,
        call: &Call<'_>,
        renewals: Renewals,
    ) -> Result<(Namespace, Vec<LeaseId>, Timestamp), Error> {
        let request = self.request_ids.complete(&self.node, call, &renewals.context)?;
        // A straggler must not lengthen what its owner believes to have ended. Below the feature
        // level that has an expiry of renewals in the log, this is all that keeps it from that.
        if self.node.cluster_time().is_some_and(|now| now.time > request.expires) {
            return Err(Error::rejected(Rejection::RequestExpired));
        }
        let namespace = valid_namespace(renewals.namespace)?;
        let (found, limit) = (renewals.ids.len(), LEASE_RENEWALS_MAX);
        if found > limit {
            return Err(Error::over_limit("lease_ids", "leases", found as u64, limit as u64));
        }
        if found == 0 {
            let message = "lease_ids names none; name 1 to 1,000 leases";
            return Err(Error::invalid("lease_ids", "INVALID_LEASE_ID", message));
        }
        let ids = renewals.ids.iter().map(|id| lease_id("lease_ids", id));
        Ok((namespace, ids.collect::<Result<_, _>>()?, request.expires))
    }

    /// Ends a lease, and what hangs from it.
    pub fn revoke(
        &self,
        call: &Call<'_>,
        revoke: RevokeLease,
        done: impl FnOnce(Result<Revision, Error>) + Send + 'static,
    ) {
        let RevokeLease { context, namespace, id } = revoke;
        let command = self.request_ids.complete(&self.node, call, &context).and_then(|request| {
            Ok(Command::RevokeLease { request, key: lease_key(namespace, &id)? })
        });
        let command = match command {
            Ok(command) => command,
            Err(error) => return done(Err(error)),
        };
        self.node.write(&command, context.resend, call.deadline.0, move |result| {
            done(
                result
                    .map_err(Error::from)
                    .and_then(|reply| done_at(reply.revision, &reply.outcome)),
            );
        });
    }

    /// Reads a lease.
    pub fn get(
        &self,
        call: &Call<'_>,
        get: GetLease,
        done: impl FnOnce(Result<FoundLeases, Error>) + Send + 'static,
    ) {
        let key = match lease_key(get.namespace, &get.id) {
            Ok(key) => key,
            Err(error) => return done(Err(error)),
        };
        let (node, namespace) = (self.node.clone(), key.namespace.clone());
        let look = move |state: &State| (state.revision(), state.lease(&key));
        read(&self.node, call, get.consistency, look, move |looked| {
            done(looked.and_then(|(revision, lease)| {
                let leases = vec![lease.ok_or_else(Error::lease_not_found)?];
                let now = node.steady_time();
                Ok(FoundLeases { revision, namespace, now, leases, next: None })
            }));
        });
    }

    /// Lists leases in the order of their ids.
    pub fn list(
        &self,
        call: &Call<'_>,
        list: ListLeases,
        done: impl FnOnce(Result<FoundLeases, Error>) + Send + 'static,
    ) {
        let (namespace, after, limit) = match valid_list(&list) {
            Ok(valid) => valid,
            Err(error) => return done(Err(error)),
        };
        let (node, listed) = (self.node.clone(), namespace.clone());
        let look =
            move |state: &State| (state.revision(), state.list_leases(&listed, after, limit));
        read(&self.node, call, list.consistency, look, move |looked| {
            done(looked.map(|(revision, page)| {
                let now = node.steady_time();
                FoundLeases { revision, namespace, now, leases: page.items, next: page.next }
            }));
        });
    }
}

fn lease_key(namespace: String, id: &str) -> Result<LeaseKey, Error> {
    Ok(LeaseKey { namespace: valid_namespace(namespace)?, id: lease_id("lease_id", id)? })
}

fn valid_list(list: &ListLeases) -> Result<(Namespace, Option<LeaseId>, usize), Error> {
    let namespace = valid_namespace(list.namespace.clone())?;
    let after = match list.page_token.as_str() {
        "" => None,
        token => Some(LeaseId(parse_hex(token).ok_or_else(invalid_page_token)?)),
    };
    Ok((namespace, after, page_size(list.page_size)?))
}

/// An outcome that is not the one hoped for.
pub(super) fn refused(outcome: &Outcome) -> Error {
    match outcome {
        Outcome::Rejected(rejection) => Error::rejected(*rejection),
        _ => Error::rejected(Rejection::MalformedCommand),
    }
}

/// The revision of what was done.
pub(super) fn done_at(revision: Revision, outcome: &Outcome) -> Result<Revision, Error> {
    match outcome {
        Outcome::Done => Ok(revision),
        other => Err(refused(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewals_are_due_at_about_a_third_and_not_together() {
        let pace = Pace::new(7);
        let timings: Vec<_> =
            (0..100).map(|_| pace.timing(Timestamp(15_000), Timestamp(5_000))).collect();
        let range = Duration::from_millis(2_900)..=Duration::from_millis(3_700);
        for timing in &timings {
            assert_eq!(timing.remaining, Duration::from_secs(10));
            assert!(range.contains(&timing.renew_after), "{timing:?}");
        }
        assert!(timings.iter().any(|timing| timing != &timings[0]));
        let over = pace.timing(Timestamp(1), Timestamp(2));
        assert_eq!((over.remaining, over.renew_after), (Duration::ZERO, Duration::ZERO));
    }
}
