//! Rings: joining and leaving them, asking where keys lie, and knowing it without asking.
//!
//! ```no_run
//! use quorate::client::{Client, Error, LeaseOptions, NewRingMember};
//!
//! # async fn example(client: Client) -> Result<(), Error> {
//! // An instance of the service, as long as its lease lives.
//! let lease = client.leases().grant(LeaseOptions::new()).await?;
//! let member = NewRingMember::new("billing-7").address("10.0.0.7:8080").weight(2);
//! client.rings().join("billing", lease.id(), member).await?;
//! // Whoever joined asks `lease.lost()`: then nobody is routed here any more, and nothing joins
//! // again by itself.
//!
//! // Somebody who calls the service.
//! let mut ring = client.rings().get("billing").await?;
//! let instance = ring.locate(b"alice").map(|member| member.address.clone());
//! // When the instance does not answer, or says that the key is not its own:
//! ring.refresh().await?;
//! # Ok(())
//! # }
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::Client;
use super::error::{Error, mismatched};
use super::id::LeaseId;
use super::lease::LeaseTiming;
use super::time::{duration_to_proto, system_time};
use crate::placement::{ALGORITHM_VERSION, Circle};
use crate::proto::v1;
use crate::proto::v1::Consistency;
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;

/// What somebody who joins a ring says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewRingMember {
    name: String,
    address: String,
    weight: u32,
    tags: BTreeMap<String, String>,
}

impl NewRingMember {
    /// A member of this name (1 to 256 bytes) and weight 1. A name that stays the same over
    /// restarts keeps its keys.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), address: String::new(), weight: 1, tags: BTreeMap::new() }
    }

    /// Where it is reached, in whatever form its users understand: at most 256 bytes.
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.address = address.into();
        self
    }

    /// Its share of the keys relative to the other members' weights: 1 to 1,000.
    pub fn weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }

    /// Something that its users want to know of it: at most 64 tags, of names of 1 to 256 bytes and
    /// values of up to 1,024, and 2,048 bytes in all.
    pub fn tag(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.insert(name.into(), value.into());
        self
    }
}

/// A member of a ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingMember {
    /// Unique within the ring.
    pub name: String,
    /// Where it is reached; may be empty.
    pub address: String,
    /// 1 to 1,000.
    pub weight: u32,
    /// Whatever its users want to know of it.
    pub tags: BTreeMap<String, String>,
    /// The lease that it hangs from.
    pub lease: LeaseId,
    /// When it joined, in cluster time.
    pub joined: Option<SystemTime>,
}

impl RingMember {
    fn from_proto(member: v1::RingMember) -> Result<Self, Error> {
        Ok(Self {
            name: member.name,
            address: member.address,
            weight: member.weight,
            tags: member.tags,
            lease: LeaseId::new(&member.lease_id)?,
            joined: system_time(member.join_time),
        })
    }
}

fn members_from_proto(members: Vec<v1::RingMember>) -> Result<Vec<RingMember>, Error> {
    let mut members: Vec<_> =
        members.into_iter().map(RingMember::from_proto).collect::<Result<_, _>>()?;
    // So they come; whoever looks for one relies on it.
    members.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(members)
}

/// A member that has joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Joined {
    /// The ring's revision.
    pub revision: u64,
    /// The time of the lease, which joining does not renew.
    pub timing: LeaseTiming,
}

/// How to read a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingReadOptions {
    local: bool,
    min_revision: u64,
    max_staleness: Option<Duration>,
}

impl RingReadOptions {
    /// Linearizable.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what the asked node has applied, once that includes `min_revision`; may be stale.
    pub fn local(mut self, min_revision: u64) -> Self {
        self.local = true;
        self.min_revision = min_revision;
        self
    }

    /// Refuses a local read of what can be older than this, by what the asked node has heard;
    /// another node is asked then. Of no use to a read that is not local.
    pub fn max_staleness(mut self, age: Duration) -> Self {
        self.max_staleness = Some(age);
        self
    }

    fn consistency(self) -> i32 {
        if self.local { Consistency::Local.into() } else { Consistency::Unspecified.into() }
    }
}

/// Who serves some keys, as the cluster has placed them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Revision of the state that it was read from.
    pub revision: u64,
    /// Revision of the last change of the ring: a [`Ring`] of another is stale.
    pub ring_revision: u64,
    /// Which algorithm placed the keys.
    pub algorithm_version: u32,
    /// For each key the names of distinct members: the first serves it, and each takes over when
    /// those before it have left.
    pub placements: Vec<Vec<String>>,
    /// Those that are named, by name.
    pub members: Vec<RingMember>,
}

impl Located {
    /// A member that is named in the placements.
    pub fn member(&self, name: &str) -> Option<&RingMember> {
        by_name(&self.members, name)
    }
}

/// A ring with what part of the circle each member serves.
#[derive(Clone, Debug, PartialEq)]
pub struct RingShares {
    /// Revision of the state that it was read from.
    pub revision: u64,
    /// Revision of the last change of the ring.
    pub ring_revision: u64,
    /// Which algorithm places keys on it.
    pub algorithm_version: u32,
    /// By name, each with its part of all possible keys, from 0 to 1.
    pub members: Vec<(RingMember, f64)>,
}

/// The members of a ring as of one revision: routes keys without asking anybody.
///
/// Where a key lies follows from the members' names and weights by a published algorithm
/// ([`crate::placement`]), so that every node and every client that has the ring at this revision
/// agrees. It does not change by itself. Whoever is told of another ring revision, by
/// [`Rings::locate`] or by a member that knows better, refreshes it.
///
/// Caveat: a member whose lease has ended is gone at once for whoever reads the ring, and raises
/// its revision only when the cluster sweeps it up, a moment later.
#[derive(Clone, Debug)]
pub struct Ring {
    rings: Rings,
    name: String,
    revision: u64,
    members: Vec<RingMember>,
    circle: Circle,
}

impl Ring {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Revision of its last change when it was read.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Its members, by name; none only after a refresh that has found none.
    pub fn members(&self) -> &[RingMember] {
        &self.members
    }

    /// A member by its name.
    pub fn member(&self, name: &str) -> Option<&RingMember> {
        by_name(&self.members, name)
    }

    /// The member that serves `key`; `None` when there are no members.
    pub fn locate(&self, key: impl AsRef<[u8]>) -> Option<&RingMember> {
        self.member(&self.circle.locate(key.as_ref())?.name)
    }

    /// The first `count` distinct members for `key`, or all if there are fewer. The first serves
    /// it, and each takes over when those before it have left.
    pub fn locate_distinct(&self, key: impl AsRef<[u8]>, count: usize) -> Vec<&RingMember> {
        let found = self.circle.locate_distinct(key.as_ref(), count);
        found.into_iter().filter_map(|member| self.member(&member.name)).collect()
    }

    /// What part of all possible keys each member serves, from 0 to 1, by name.
    pub fn shares(&self) -> Vec<(&RingMember, f64)> {
        let shares = self.circle.shares();
        self.members.iter().zip(shares.iter().map(|share| share.fraction())).collect()
    }

    /// Whether the ring has changed since this was read, given the revision of its last change as
    /// somebody else knows it.
    pub fn is_stale(&self, ring_revision: u64) -> bool {
        self.revision < ring_revision
    }

    /// Reads the ring again, linearizably. Returns whether its members have changed. A ring that
    /// nobody is left on has none from then on, and keeps its revision.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] and [`Error::DeadlineExceeded`]: then it stays as it was.
    pub async fn refresh(&mut self) -> Result<bool, Error> {
        let (revision, members) = match self.rings.read(&self.name, RingReadOptions::new()).await {
            Ok(read) => read,
            Err(Error::NotFound { .. }) => (self.revision, Vec::new()),
            Err(error) => return Err(error),
        };
        let changed = members != self.members;
        if changed {
            // Of the same names and weights it is the same.
            self.circle = circle_of(&members).await?;
            self.members = members;
        }
        self.revision = revision;
        Ok(changed)
    }
}

fn by_name<'a>(members: &'a [RingMember], name: &str) -> Option<&'a RingMember> {
    let index = members.binary_search_by(|member| member.name.as_str().cmp(name)).ok()?;
    members.get(index)
}

/// Built on a thread of its own: a thousand members take a tenth of a second.
async fn circle_of(members: &[RingMember]) -> Result<Circle, Error> {
    let members: Vec<(String, u32)> =
        members.iter().map(|member| (member.name.clone(), member.weight)).collect();
    let built = tokio::task::spawn_blocking(move || Circle::new(members)).await;
    let built = built.map_err(|error| Error::internal(error.to_string()))?;
    built.map_err(|error| Error::internal(format!("the server sent an impossible ring: {error}")))
}

/// The calls on rings; see [`Client::rings`].
#[derive(Clone, Debug)]
pub struct Rings {
    client: Client,
}

impl Rings {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Makes somebody a member of `ring` for as long as `lease` lives; or changes what a member
    /// says of itself that hangs from this lease already. Joining does not renew the lease, and
    /// nothing joins again by itself: that the lease is lost is the signal.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when there is no such lease; [`Error::AlreadyExists`] when a member of
    /// this name hangs from another lease; [`Error::LimitExceeded`] when the ring is full;
    /// [`Error::InvalidArgument`].
    pub async fn join(
        &self,
        ring: &str,
        lease: LeaseId,
        member: NewRingMember,
    ) -> Result<Joined, Error> {
        let NewRingMember { name, address, weight, tags } = member;
        let request = Request::JoinRing(v1::JoinRingRequest {
            context: None,
            namespace: self.namespace(),
            ring: ring.to_owned(),
            member: name,
            lease_id: lease.to_string(),
            address,
            tags,
            weight: Some(weight),
        });
        match self.client.call(request).await? {
            Response::JoinRing(v1::JoinRingResponse { revision, timing: Some(timing) }) => {
                Ok(Joined { revision, timing: LeaseTiming::from_proto(timing)? })
            }
            _ => Err(mismatched()),
        }
    }

    /// Removes a member; its lease lives on. With `lease`, only if it hangs from that one. Returns
    /// the ring's revision.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when there is no such member, or it hangs from another lease. Without
    /// `lease` it may be that an earlier attempt of this very call has removed it.
    pub async fn leave(
        &self,
        ring: &str,
        member: &str,
        lease: Option<LeaseId>,
    ) -> Result<u64, Error> {
        let request = Request::LeaveRing(v1::LeaveRingRequest {
            context: None,
            namespace: self.namespace(),
            ring: ring.to_owned(),
            member: member.to_owned(),
            lease_id: lease.map(|lease| lease.to_string()).unwrap_or_default(),
        });
        match self.client.call(request).await? {
            Response::LeaveRing(left) => Ok(left.revision),
            _ => Err(mismatched()),
        }
    }

    /// Asks the cluster which members serve some keys: for each of 1 to 1,000 keys the first
    /// `count` (1 to 1,000), at most 10,000 in all. [`Rings::get`] is for whoever asks often.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when the ring has no members; [`Error::InvalidArgument`] when the keys
    /// are too many or too long.
    pub async fn locate(
        &self,
        ring: &str,
        keys: impl IntoIterator<Item: Into<Bytes>>,
        count: u32,
        options: RingReadOptions,
    ) -> Result<Located, Error> {
        let request = Request::LocateKeys(v1::LocateKeysRequest {
            namespace: self.namespace(),
            ring: ring.to_owned(),
            keys: keys.into_iter().map(Into::into).collect(),
            count,
            consistency: options.consistency(),
            min_revision: options.min_revision,
            max_staleness: options.max_staleness.map(duration_to_proto),
        });
        match self.client.call(request).await? {
            Response::LocateKeys(located) => Ok(Located {
                revision: located.revision,
                ring_revision: located.ring_revision,
                algorithm_version: located.algorithm_version,
                placements: located.placements.into_iter().map(|it| it.members).collect(),
                members: members_from_proto(located.members)?,
            }),
            _ => Err(mismatched()),
        }
    }

    /// Reads a ring, to route by it.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when it has no members; [`Error::Internal`] when the cluster places keys
    /// by an algorithm that this build does not know.
    pub async fn get(&self, ring: &str) -> Result<Ring, Error> {
        self.get_with(ring, RingReadOptions::new()).await
    }

    /// The same, as `options` say.
    ///
    /// # Errors
    ///
    /// As [`Rings::get`].
    pub async fn get_with(&self, ring: &str, options: RingReadOptions) -> Result<Ring, Error> {
        let (revision, members) = self.read(ring, options).await?;
        let circle = circle_of(&members).await?;
        let (rings, name) = (self.clone(), ring.to_owned());
        Ok(Ring { rings, name, revision, members, circle })
    }

    /// Reads a ring with each member's part of the circle, as the cluster has computed it.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when it has no members.
    pub async fn shares(&self, ring: &str, options: RingReadOptions) -> Result<RingShares, Error> {
        let found = self.request(ring, options, false).await?;
        let shares: BTreeMap<_, _> =
            found.shares.into_iter().map(|share| (share.member, share.fraction)).collect();
        let share = |member: RingMember| {
            let fraction = shares.get(&member.name).copied().ok_or_else(mismatched)?;
            Ok((member, fraction))
        };
        let members = members_from_proto(found.members)?;
        Ok(RingShares {
            revision: found.revision,
            ring_revision: found.ring_revision,
            algorithm_version: found.algorithm_version,
            members: members.into_iter().map(share).collect::<Result<_, Error>>()?,
        })
    }

    async fn read(
        &self,
        ring: &str,
        options: RingReadOptions,
    ) -> Result<(u64, Vec<RingMember>), Error> {
        let found = self.request(ring, options, true).await?;
        if found.algorithm_version != ALGORITHM_VERSION {
            return Err(Error::internal(format!(
                "the cluster places keys by algorithm {}, and this client knows {}: let the \
                 cluster locate them, or upgrade the client",
                found.algorithm_version, ALGORITHM_VERSION
            )));
        }
        Ok((found.ring_revision, members_from_proto(found.members)?))
    }

    async fn request(
        &self,
        ring: &str,
        options: RingReadOptions,
        without_shares: bool,
    ) -> Result<v1::GetRingResponse, Error> {
        let request = Request::GetRing(v1::GetRingRequest {
            namespace: self.namespace(),
            ring: ring.to_owned(),
            consistency: options.consistency(),
            min_revision: options.min_revision,
            max_staleness: options.max_staleness.map(duration_to_proto),
            without_shares,
        });
        match self.client.call(request).await? {
            Response::GetRing(found) => Ok(found),
            _ => Err(mismatched()),
        }
    }

    fn namespace(&self) -> String {
        self.client.namespace.to_string()
    }
}
