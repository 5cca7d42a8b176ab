//! Rings: the use cases.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::circles::{Circles, Placed};
use super::error::{Error, ErrorKind};
use super::field::{lease_id, valid_label, valid_name, valid_namespace};
use super::lease::{LeaseTiming, Pace, done_at, refused};
use super::request::{Call, Consistency, RequestContext, RequestIds, read};
use crate::limits::{
    LOCATE_KEY_BYTES_MAX, LOCATE_KEYS_MAX, LOCATE_PLACEMENTS_MAX, RING_MEMBER_TAG_BYTES_MAX,
    RING_MEMBER_TAGS_MAX, RING_TAG_VALUE_BYTES_MAX, RING_WEIGHT_MAX,
};
use crate::placement;
use crate::raft::Node;
use crate::state::{
    Command, MemberData, MemberKey, MemberView, Outcome, Revision, RingKey, RingView, State,
};

/// Most members that are looked up on the thread of the node's core: about a millisecond's worth.
const LOCATED_INLINE_MAX: usize = 1_000;

/// Somebody who wants to be a member of a ring.
#[derive(Clone, Debug, Default)]
pub struct JoinRing {
    /// Identity of the request.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// Which ring.
    pub ring: String,
    /// The member's name.
    pub member: String,
    /// The lease that it will hang from.
    pub lease_id: String,
    /// Where it is reached; may be empty.
    pub address: String,
    /// Whatever its users want to know of it.
    pub tags: BTreeMap<String, String>,
    /// 1 to 1,000; `None` for 1.
    pub weight: Option<u32>,
}

/// Somebody is a member of a ring.
#[derive(Clone, Copy, Debug)]
pub struct JoinedRing {
    /// Of the change; also the ring's.
    pub revision: Revision,
    /// The time of its lease.
    pub timing: LeaseTiming,
}

/// A member that is to be removed.
#[derive(Clone, Debug, Default)]
pub struct LeaveRing {
    /// Identity of the request.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// Which ring.
    pub ring: String,
    /// The member's name.
    pub member: String,
    /// Only if it hangs from this lease; empty for whichever.
    pub lease_id: String,
}

/// Keys to be located.
#[derive(Clone, Debug, Default)]
pub struct LocateKeys {
    /// Empty for `default`.
    pub namespace: String,
    /// Which ring.
    pub ring: String,
    /// 1 to 1,000.
    pub keys: Vec<Bytes>,
    /// How many distinct members for each key; 0 for 1.
    pub count: u32,
    /// How fresh.
    pub consistency: Consistency,
}

impl LocateKeys {
    /// Bytes of memory that the keys take while the read waits.
    pub fn weight(&self) -> usize {
        self.keys.iter().map(|key| size_of::<Bytes>() + key.len()).sum()
    }
}

/// Who serves some keys.
#[derive(Clone, Debug)]
pub struct LocatedKeys {
    /// Of the state that was read.
    pub revision: Revision,
    /// Of the last change of the ring.
    pub ring_revision: Revision,
    /// For each key the names of its members, the one that serves it first.
    pub placements: Vec<Vec<Arc<str>>>,
    /// Those that are named, once each, by name.
    pub members: Vec<MemberView>,
}

/// A ring to be read.
#[derive(Clone, Debug, Default)]
pub struct GetRing {
    /// Empty for `default`.
    pub namespace: String,
    /// Which.
    pub ring: String,
    /// How fresh.
    pub consistency: Consistency,
    /// Leave out the shares.
    pub without_shares: bool,
}

/// A ring as it was found, shared with the state.
#[derive(Clone, Debug)]
pub struct FoundRing {
    /// Of the state that was read.
    pub revision: Revision,
    /// The ring.
    pub ring: Arc<RingView>,
    /// From 0 to 1, of each member in the order of the ring; empty where they were not wanted.
    pub shares: Vec<f64>,
}

/// The ring use cases of one node.
pub struct Rings {
    node: Arc<Node>,
    request_ids: RequestIds,
    pace: Arc<Pace>,
    circles: Arc<Circles>,
}

impl Rings {
    /// Which algorithm places the keys.
    pub const ALGORITHM_VERSION: u32 = placement::ALGORITHM_VERSION;

    /// For one node; `seed` is random.
    pub fn new(node: Arc<Node>, seed: u64) -> Self {
        let pace = Arc::new(Pace::new(!seed));
        let circles = Arc::new(Circles::default());
        Self { node, request_ids: RequestIds::new(seed), pace, circles }
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Makes somebody a member of a ring, or changes what the member says of itself.
    pub fn join(
        &self,
        call: &Call<'_>,
        join: JoinRing,
        done: impl FnOnce(Result<JoinedRing, Error>) + Send + 'static,
    ) {
        let resend = join.context.resend;
        let command = match self.join_command(call, join) {
            Ok(command) => command,
            Err(error) => return done(Err(error)),
        };
        let (node, pace) = (self.node.clone(), self.pace.clone());
        self.node.write(&command, resend, call.deadline.0, move |result| {
            done(result.map_err(Error::from).and_then(|reply| match reply.outcome {
                Outcome::RingJoined { lease_deadline } => {
                    let timing = pace.timing(lease_deadline, node.steady_time());
                    Ok(JoinedRing { revision: reply.revision, timing })
                }
                other => Err(refused(&other)),
            }));
        });
    }

    fn join_command(&self, call: &Call<'_>, join: JoinRing) -> Result<Command, Error> {
        let request = self.request_ids.complete(&self.node, call, &join.context)?;
        let member = member_key(join.namespace, join.ring, join.member)?;
        let lease = lease_id("lease_id", &join.lease_id)?;
        valid_label("address", &join.address)?;
        valid_tags(&join.tags)?;
        let weight = join.weight.unwrap_or(1);
        if !(1..=RING_WEIGHT_MAX).contains(&weight) {
            return Err(Error::invalid(
                "weight",
                "INVALID_WEIGHT",
                format!("weight is {weight}; a member's weight is 1 to {RING_WEIGHT_MAX}"),
            ));
        }
        let data = MemberData { address: join.address.into(), weight, tags: join.tags };
        Ok(Command::JoinRing { request, member, lease, data })
    }

    /// Removes a member from its ring.
    pub fn leave(
        &self,
        call: &Call<'_>,
        leave: LeaveRing,
        done: impl FnOnce(Result<Revision, Error>) + Send + 'static,
    ) {
        let resend = leave.context.resend;
        let command = match self.leave_command(call, leave) {
            Ok(command) => command,
            Err(error) => return done(Err(error)),
        };
        self.node.write(&command, resend, call.deadline.0, move |result| {
            let result = result.map_err(Error::from);
            done(result.and_then(|reply| done_at(reply.revision, &reply.outcome)));
        });
    }

    fn leave_command(&self, call: &Call<'_>, leave: LeaveRing) -> Result<Command, Error> {
        let request = self.request_ids.complete(&self.node, call, &leave.context)?;
        let member = member_key(leave.namespace, leave.ring, leave.member)?;
        let lease = Some(leave.lease_id).filter(|id| !id.is_empty());
        let lease = lease.map(|id| lease_id("lease_id", &id)).transpose()?;
        Ok(Command::LeaveRing { request, member, lease })
    }

    /// Says which members serve some keys.
    pub fn locate(
        &self,
        call: &Call<'_>,
        locate: LocateKeys,
        done: impl FnOnce(Result<LocatedKeys, Error>) + Send + 'static,
    ) {
        let LocateKeys { namespace, ring, keys, count, consistency } = locate;
        let valid =
            valid_locate(&keys, count).and_then(|count| Ok((ring_key(namespace, ring)?, count)));
        let (key, count) = match valid {
            Ok(valid) => valid,
            Err(error) => return done(Err(error)),
        };
        self.placed(call, key, consistency, move |placed| {
            let (revision, placed) = match placed {
                Ok(placed) => placed,
                Err(error) => return done(Err(error)),
            };
            let members = keys.len() * count.min(placed.view.members.len());
            if members > LOCATE_PLACEMENTS_MAX {
                let (found, limit) = (members as u64, LOCATE_PLACEMENTS_MAX as u64);
                return done(Err(Error::over_limit("keys", "members in all", found, limit)));
            }
            let located = move || located(revision, &placed, &keys, count);
            if members > LOCATED_INLINE_MAX {
                tokio::task::spawn_blocking(move || done(Ok(located())));
            } else {
                done(Ok(located()));
            }
        });
    }

    /// Reads a ring.
    pub fn get(
        &self,
        call: &Call<'_>,
        get: GetRing,
        done: impl FnOnce(Result<FoundRing, Error>) + Send + 'static,
    ) {
        let key = match ring_key(get.namespace, get.ring) {
            Ok(key) => key,
            Err(error) => return done(Err(error)),
        };
        if get.without_shares {
            let look = move |state: &State| (state.revision(), state.ring(&key));
            return read(&self.node, call, get.consistency, look, move |looked| {
                done(looked.and_then(|(revision, ring)| {
                    let ring = Arc::new(ring.ok_or_else(ring_empty)?);
                    Ok(FoundRing { revision, ring, shares: Vec::new() })
                }));
            });
        }
        self.placed(call, key, get.consistency, move |placed| {
            let (revision, placed) = match placed {
                Ok(placed) => placed,
                Err(error) => return done(Err(error)),
            };
            let found = move |placed: &Placed| FoundRing {
                revision,
                ring: placed.view.clone(),
                shares: placed.shares().to_vec(),
            };
            if placed.has_shares() {
                done(Ok(found(&placed)));
            } else {
                tokio::task::spawn_blocking(move || done(Ok(found(&placed))));
            }
        });
    }

    /// A ring with its circle, and the revision of the state in which it was so.
    fn placed(
        &self,
        call: &Call<'_>,
        key: RingKey,
        consistency: Consistency,
        done: impl FnOnce(Result<(Revision, Arc<Placed>), Error>) + Send + 'static,
    ) {
        let (circles, at) = (self.circles.clone(), key.clone());
        let look = move |state: &State| {
            let current = state.settled_ring_revision(&at);
            let placed = current.and_then(|revision| circles.at(&at, revision));
            let seen = placed.map_or_else(|| Seen::Ring(state.ring(&at)), Seen::Placed);
            (state.revision(), seen)
        };
        let circles = self.circles.clone();
        read(&self.node, call, consistency, look, move |looked| match looked {
            Err(error) => done(Err(error)),
            Ok((revision, Seen::Placed(placed))) => done(Ok((revision, placed))),
            Ok((_, Seen::Ring(None))) => done(Err(ring_empty())),
            Ok((revision, Seen::Ring(Some(view)))) => {
                let placed = move |placed: Result<Arc<Placed>, Error>| {
                    // It may be of a later state than was read.
                    done(placed.map(|placed| (revision.max(placed.view.revision), placed)));
                };
                circles.of(key, view, Box::new(placed));
            }
        });
    }
}

/// What a look at the state found.
enum Seen {
    /// The circle that is at hand is the ring's.
    Placed(Arc<Placed>),
    /// There is none, or another.
    Ring(Option<RingView>),
}

fn located(revision: Revision, placed: &Placed, keys: &[Bytes], count: usize) -> LocatedKeys {
    let view = &placed.view;
    let mut named = vec![false; view.members.len()];
    let mut place = |key: &Bytes| {
        let members = placed.circle.locate_distinct(key, count);
        let name = |member: &placement::Member| {
            // The circle has the members that the ring has, both by name.
            let index = view.members.binary_search_by(|it| it.name.cmp(&member.name));
            index.iter().for_each(|index| named[*index] = true);
            member.name.clone()
        };
        members.into_iter().map(name).collect::<Vec<_>>()
    };
    let placements = keys.iter().map(&mut place).collect();
    let members = view.members.iter().zip(named).filter(|(_, named)| *named);
    let members = members.map(|(member, _)| member.clone()).collect();
    LocatedKeys { revision, ring_revision: view.revision, placements, members }
}

fn ring_empty() -> Error {
    Error::new(ErrorKind::NotFound, "RING_EMPTY", "the ring has no members")
}

fn ring_key(namespace: String, ring: String) -> Result<RingKey, Error> {
    let namespace = valid_namespace(namespace)?;
    valid_name("ring", &ring)?;
    Ok(RingKey { namespace, name: ring.into() })
}

fn member_key(namespace: String, ring: String, member: String) -> Result<MemberKey, Error> {
    let ring = ring_key(namespace, ring)?;
    valid_name("member", &member)?;
    Ok(MemberKey { ring, name: member.into() })
}

fn valid_tags(tags: &BTreeMap<String, String>) -> Result<(), Error> {
    let check = |unit: &str, found: usize, limit: usize| {
        let over = || Error::over_limit("tags", unit, found as u64, limit as u64);
        if found > limit { Err(over()) } else { Ok(()) }
    };
    check("tags", tags.len(), RING_MEMBER_TAGS_MAX)?;
    let mut bytes = 0;
    for (name, value) in tags {
        valid_name("tags", name)?;
        check("bytes in a value", value.len(), RING_TAG_VALUE_BYTES_MAX)?;
        bytes += name.len() + value.len();
    }
    check("bytes of names and values", bytes, RING_MEMBER_TAG_BYTES_MAX)
}

/// How many members each key wants.
fn valid_locate(keys: &[Bytes], count: u32) -> Result<usize, Error> {
    if keys.is_empty() {
        let message = "keys names none; name 1 to 1,000 keys";
        return Err(Error::invalid("keys", "INVALID_KEYS", message));
    }
    let limit = LOCATE_KEYS_MAX as u64;
    if keys.len() > LOCATE_KEYS_MAX {
        return Err(Error::over_limit("keys", "keys", keys.len() as u64, limit));
    }
    if let Some(key) = keys.iter().find(|key| key.len() > LOCATE_KEY_BYTES_MAX) {
        let (found, limit) = (key.len() as u64, LOCATE_KEY_BYTES_MAX as u64);
        return Err(Error::over_limit("keys", "bytes in a key", found, limit));
    }
    if u64::from(count) > limit {
        return Err(Error::over_limit("count", "members a key", count.into(), limit));
    }
    Ok(count.max(1) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_named() {
        let tags = |count: usize, length: usize| -> BTreeMap<String, String> {
            (0..count).map(|number| (number.to_string(), "x".repeat(length))).collect()
        };
        assert!(valid_tags(&tags(64, 29)).is_ok());
        for wrong in [tags(65, 0), tags(1, 1_025), tags(3, 1_000), tags(64, 40)] {
            let error = valid_tags(&wrong).unwrap_err();
            assert_eq!(error.reason, "LIMIT_EXCEEDED", "{error}");
        }
        assert_eq!(
            valid_tags(&[(String::new(), String::new())].into()).unwrap_err().reason,
            "INVALID_NAME"
        );

        let key = Bytes::from_static(b"key");
        assert_eq!(valid_locate(std::slice::from_ref(&key), 0), Ok(1));
        assert_eq!(valid_locate(&vec![key.clone(); 1_000], 1_000), Ok(1_000));
        assert_eq!(valid_locate(&[], 1).unwrap_err().reason, "INVALID_KEYS");
        let long = Bytes::from(vec![0; 1_025]);
        for wrong in [
            valid_locate(&vec![key.clone(); 1_001], 1),
            valid_locate(&[long], 1),
            valid_locate(&[key], 1_001),
        ] {
            assert_eq!(wrong.unwrap_err().reason, "LIMIT_EXCEEDED");
        }
    }
}
