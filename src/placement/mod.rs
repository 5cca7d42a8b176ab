//! Which member of a ring serves a key: weighted consistent hashing, as a pure function of the
//! members' names and weights. A node and a client that hold the same members agree on every key,
//! so a client can route by itself; the revision of the ring tells it when its members are stale.
//!
//! # The algorithm, version 1
//!
//! Positions are the numbers from 0 to 2^64 - 1, on a circle. XXH3-64 means that of xxHash 0.8,
//! unseeded (seed 0, default secret); its result is taken as a number.
//!
//! 1. Each member has 2,048 points, whatever its weight. Point i, from 0 to 2,047, lies at XXH3-64
//!    of the member's name in UTF-8, followed by one zero byte and by i as four bytes, least
//!    significant first.
//! 2. A key, any bytes or none, lies at XXH3-64 of these bytes.
//! 3. The distance from a key to a point is (point - key) modulo 2^64: clockwise, past the highest
//!    position on to 0, and 0 where both coincide.
//! 4. The cost of a member for a key is the distance to the nearest of the member's points, divided
//!    by its weight. It is a fraction and not rounded: a/v < b/w where a·w < b·v, in 128 bits.
//! 5. The member of the lowest cost serves the key; of equal costs, that whose name comes first in
//!    the order of its bytes. The distinct members of a key are all members in this order.
//!
//! `vectors.txt`, beside this file, holds points, keys, shares and placements to test another
//! implementation with. A result names [`ALGORITHM_VERSION`]: whatever would move one key gets
//! another.
//!
//! # Why it holds
//!
//! With equal weights this is the textbook ring: clockwise to the first point. What differs is what
//! a weight does. The textbook gives a member of weight w w times as many points. Here its points
//! reach w times as far instead. The distance to the nearest point of one member is as good as
//! exponentially distributed, and of several exponential variables, each divided by a weight, one
//! is the least with a probability proportional to its weight.
//!
//! A cost depends on one member and the key, on nobody else. So a member that joins enters the
//! order of each key somewhere and leaves the others in theirs, and a member that leaves hands each
//! key to the second of that key's order. A weight that is raised only draws keys, one that is
//! lowered only sheds them; as only ratios count, doubling all of them moves nothing.
//!
//! # Why 2,048 points, and not more for more weight
//!
//! Points fall at random, so a share strays from its weight's, by about 1/√points as standard
//! deviation, whichever way weights are done. Of 2,000 rings of ten members of equal weight, so
//! many had a share more than 10 % off:
//!
//! ```text
//! points a member       256     512   1,024   2,048   4,096
//! rings               1,241     338       6       0       0
//! worst share off      28 %    19 %    13 %     9 %     7 %
//! ```
//!
//! So the lightest member needs about 2,048. With points for each unit of weight ten members of
//! weight 100 would have two million, 20 MB and a quarter of a second for each change, and a
//! hundred such could not be held; scaling all weights down to save points would move the keys of
//! members that nobody touched whenever somebody joins. With reach a weight costs nothing
//! (optimised build, weights of 1 to 1,000 at random):
//!
//! ```text
//! members                10      100    1,000
//! bytes             204,800   2.0 MB    20 MB
//! build                2 ms     8 ms   107 ms
//! locate              70 ns   120 ns   650 ns
//! three distinct     170 ns   320 ns   1.3 µs
//! all shares           1 ms    16 ms   193 ms
//! ```
//!
//! Rendezvous hashing of each key with each member would give exact shares and needs no circle, but
//! a look-up takes time for each member, and its weights take logarithms, which differ in their
//! last bit from one language to the next. Here all numbers are integers.
//!
//! Caveats:
//! - Where one member far outweighs all others, their shares stray √2 times as far: with one of
//!   weight 1,000 and nine of weight 1, one ring in eighty has a share more than 10 % off.
//! - A look-up scans, beyond its binary search, about as many points as the largest weight is times
//!   the mean weight (one when they are equal; 500 in a ring of one member of weight 1,000 and 999
//!   of weight 1).
//! - A circle is built as a whole; a change of one member costs as much as the first build.
//! - XXH3 keeps nobody from choosing names or keys that collide. Whoever may choose a member's name
//!   is trusted; whoever chooses keys can send many to one member, as with any unkeyed hash.

mod shares;

#[cfg(test)]
mod circle_test;
#[cfg(test)]
mod vectors_test;

use std::cmp::Ordering;
use std::sync::Arc;

use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;

use crate::limits::{NAME_BYTES_MAX, RING_MEMBERS_MAX, RING_WEIGHT_MAX};

/// Which algorithm places the keys; results of different versions do not agree.
pub const ALGORITHM_VERSION: u32 = 1;
/// Points of each member on the circle.
pub const POINTS_PER_MEMBER: u32 = 2_048;

/// A member of a ring, as far as it matters to placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// 1 to 256 bytes; unique within the ring.
    pub name: Arc<str>,
    /// 1 to 1,000: its share of the keys relative to the other members' weights.
    pub weight: u32,
}

/// What part of a circle a member serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share<'a> {
    /// Who.
    pub member: &'a Member,
    /// How many of the circle's 2^64 positions, exactly.
    pub positions: u128,
}

impl Share<'_> {
    /// From 0 to 1. Those of all members add up to 1, but for rounding.
    pub fn fraction(&self) -> f64 {
        // Two to the power of 64 is exact as a double.
        self.positions as f64 / POSITIONS as f64
    }
}

/// Why there is no circle of such members.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlacementError {
    /// A name is empty or too long.
    #[error("a member's name has {bytes} bytes; 1 to {NAME_BYTES_MAX} are allowed")]
    Name {
        /// Length of the name.
        bytes: usize,
    },
    /// A weight is 0 or too large.
    #[error("member {name} has weight {weight}; 1 to {RING_WEIGHT_MAX} are allowed")]
    Weight {
        /// Whose.
        name: Arc<str>,
        /// The weight.
        weight: u32,
    },
    /// Two members have one name.
    #[error("two members have the name {name}")]
    Duplicate {
        /// The name.
        name: Arc<str>,
    },
    /// More members than a ring may have.
    #[error("the ring has {members} members; the limit is {RING_MEMBERS_MAX}")]
    TooMany {
        /// How many.
        members: usize,
    },
}

/// How many positions a circle has.
const POSITIONS: u128 = 1 << 64;

/// The members of a ring, arranged for look-ups. Takes ten bytes a point: 20 KiB a member.
#[derive(Clone, Debug)]
pub struct Circle {
    /// By name, so that an index decides ties as the name would.
    members: Box<[Member]>,
    /// Where the points are, ascending; those at one position in the order of their owners.
    positions: Box<[u64]>,
    /// Whose they are: indexes into `members`.
    owners: Box<[u16]>,
    weight_max: u32,
}

// An owner is an index in 16 bits.
const _: () = assert!(RING_MEMBERS_MAX <= 1 << 16);

/// A point as seen from a key.
#[derive(Clone, Copy)]
struct Candidate {
    /// Clockwise, from the key.
    distance: u64,
    owner: u16,
}

impl Circle {
    /// The circle of these members, each a name and a weight, in whatever order; of none, too.
    ///
    /// # Errors
    ///
    /// [`PlacementError`] when a name is empty, longer than 256 bytes or given twice, a weight is
    /// not 1 to 1,000, or there are more than 1,000 members.
    pub fn new<N: Into<Arc<str>>>(
        members: impl IntoIterator<Item = (N, u32)>,
    ) -> Result<Self, PlacementError> {
        let member = |(name, weight): (N, u32)| Member { name: name.into(), weight };
        let mut members: Vec<Member> = members.into_iter().map(member).collect();
        members.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        check(&members)?;
        let mut points = Vec::with_capacity(members.len() * POINTS_PER_MEMBER as usize);
        // The limit of members fits.
        for (owner, member) in (0..=u16::MAX).zip(&members) {
            let mut bytes = Vec::with_capacity(member.name.len() + 5);
            bytes.extend_from_slice(member.name.as_bytes());
            bytes.extend_from_slice(&[0; 5]);
            for point in 0..POINTS_PER_MEMBER {
                bytes[member.name.len() + 1..].copy_from_slice(&point.to_le_bytes());
                points.push((xxh3_64(&bytes), owner));
            }
        }
        Ok(Self::with_points(members, points))
    }

    /// What the points take, in bytes: 20 KiB a member.
    pub fn size_bytes(&self) -> usize {
        size_of_val(&*self.positions) + size_of_val(&*self.owners)
    }

    fn with_points(members: Vec<Member>, mut points: Vec<(u64, u16)>) -> Self {
        points.sort_unstable();
        let weight_max = members.iter().map(|member| member.weight).max().unwrap_or(1);
        Self {
            members: members.into(),
            positions: points.iter().map(|(position, _)| *position).collect(),
            owners: points.iter().map(|(_, owner)| *owner).collect(),
            weight_max,
        }
    }

    /// The members, by name.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The member that serves `key`; `None` when there are no members.
    pub fn locate(&self, key: &[u8]) -> Option<&Member> {
        self.nearest(xxh3_64(key)).map(|owner| &self.members[usize::from(owner)])
    }

    /// The first `count` of the distinct members of `key`, or all if there are fewer. The first is
    /// that which serves it, and each is the one that takes over when all before it have left.
    pub fn locate_distinct(&self, key: &[u8], count: usize) -> Vec<&Member> {
        let nearest = self.nearest_distinct(xxh3_64(key), count);
        nearest.into_iter().map(|found| &self.members[usize::from(found.owner)]).collect()
    }

    /// What part of the circle each member serves, by name. Walks the whole circle twice.
    pub fn shares(&self) -> Vec<Share<'_>> {
        let mut positions = vec![0; self.members.len()];
        shares::walk(self, |owner, served| {
            positions[usize::from(owner)] += 1 + u128::from(served.end() - served.start());
        });
        let each = self.members.iter().zip(positions);
        each.map(|(member, positions)| Share { member, positions }).collect()
    }

    fn nearest(&self, from: u64) -> Option<u16> {
        let mut points = self.clockwise(from);
        let mut best = points.next()?;
        for point in points {
            if !self.may_precede(point.distance, best) {
                break;
            }
            if self.order(point, best).is_lt() {
                best = point;
            }
        }
        Some(best.owner)
    }

    fn nearest_distinct(&self, from: u64, count: usize) -> Vec<Candidate> {
        let count = count.min(self.members.len());
        if count == 0 {
            return Vec::new();
        }
        let mut found: Vec<Candidate> = Vec::with_capacity(count + 1);
        let mut seen = vec![false; self.members.len()];
        let mut unseen = self.members.len();
        for point in self.clockwise(from) {
            let full = found.len() == count;
            let last = found.last().filter(|_| full);
            if unseen == 0 || last.is_some_and(|last| !self.may_precede(point.distance, *last)) {
                break;
            }
            // The first point of a member that is met is its nearest.
            if std::mem::replace(&mut seen[usize::from(point.owner)], true) {
                continue;
            }
            unseen -= 1;
            let place = found.partition_point(|other| self.order(*other, point).is_lt());
            found.insert(place, point);
            found.truncate(count);
        }
        found
    }

    /// All points, each once, from `from` on.
    fn clockwise(&self, from: u64) -> impl Iterator<Item = Candidate> {
        let start = self.positions.partition_point(|position| *position < from);
        (start..self.positions.len()).chain(0..start).map(move |at| Candidate {
            distance: self.positions[at].wrapping_sub(from),
            owner: self.owners[at],
        })
    }

    /// Whether a point at `distance`, or one further on, could come before `other`.
    fn may_precede(&self, distance: u64, other: Candidate) -> bool {
        let weight = self.weight(other.owner);
        scaled(distance, weight) <= scaled(other.distance, self.weight_max)
    }

    /// Which of two points costs less; at the same cost, whose owner's name comes first.
    fn order(&self, one: Candidate, other: Candidate) -> Ordering {
        let cost = scaled(one.distance, self.weight(other.owner));
        let other_cost = scaled(other.distance, self.weight(one.owner));
        cost.cmp(&other_cost).then(one.owner.cmp(&other.owner))
    }

    fn weight(&self, owner: u16) -> u32 {
        self.members[usize::from(owner)].weight
    }
}

fn scaled(distance: u64, weight: u32) -> u128 {
    u128::from(distance) * u128::from(weight)
}

fn check(members: &[Member]) -> Result<(), PlacementError> {
    if members.len() > RING_MEMBERS_MAX {
        return Err(PlacementError::TooMany { members: members.len() });
    }
    for Member { name, weight } in members {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(PlacementError::Name { bytes: name.len() });
        }
        if *weight == 0 || *weight > RING_WEIGHT_MAX {
            return Err(PlacementError::Weight { name: name.clone(), weight: *weight });
        }
    }
    match members.windows(2).find(|pair| pair[0].name == pair[1].name) {
        Some(pair) => Err(PlacementError::Duplicate { name: pair[0].name.clone() }),
        None => Ok(()),
    }
}
