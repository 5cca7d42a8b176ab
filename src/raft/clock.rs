//! Cluster time on one node: what it has heard, and what it stamps when it leads.
//!
//! A leader's time runs on its own CLOCK_BOOTTIME. Every peer message, in either direction,
//! carries the sender's estimate, so each node knows the highest time anybody could have acted on,
//! and a new leader continues from there plus its own time since: neither a failover nor a step of
//! a wall clock moves time back or makes it leap.
//!
//! - A follower's estimate is what its leader said last, plus its own time since. It is set anew
//!   with each message, up or down, so that the drift of its own oscillator, or a leader that
//!   slews, never adds up to a leap at the next failover.
//! - It never falls below two floors: the highest stamp that is committed in the log, for ever; and
//!   what the leader of the latest term that has spoken said, for as long as no later term speaks.
//!   A leader that was cut off, or whose successor had to begin anew from the log, is thereby
//!   forgotten: whatever was acted on under it is in the log.
//! - Every word on the time names the term of the leader on which it rests, and who does not lead
//!   only passes such a word on. It counts for those who have heard of no later term, neither from
//!   others nor by their own log; so the drift of a leader that was cut off reaches nobody by way
//!   of an election either. While leading, a node takes nobody's word of its own term or earlier.
//! - A time that is minutes beyond both this node's estimate and its wall clock is taken for
//!   garbled and ignored, with a warning; one that is committed in the log never is.
//! - Towards the wall clock time slews by at most one percent of the time that passes.
//! - Time leaps by itself only on a leader that is not `synced`: one that, since its start, has
//!   heard from nobody who knew the time. Its electors were all freshly started then, so a majority
//!   had lost count, and how long all were away is a question of evidence ([`Evidence`]). The leap
//!   is added to `time` and not to `steady`. Where the evidence is missing, time goes on from the
//!   log, and an operator may say what it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::proto::peer;
use crate::state::{Stamp, Timestamp};

/// Largest share of passing time by which time is sped up or slowed down: 1/100.
const SLEW_DIVISOR: u64 = 100;
/// A time that is further ahead of all that this node knows is garbled: more than any oscillator
/// drifts apart between two messages, and less than what would harm.
const AHEAD_MAX: Duration = Duration::from_secs(5 * 60);
/// What a peer said of its clocks longer ago is evidence no more: they may have been set since.
const FRESH_MAX: Duration = Duration::from_secs(10);
/// How often the kernel is asked whether the wall clock is synchronised.
const SYNCHRONISED_INTERVAL: Duration = Duration::from_secs(1);
/// Time that is so far behind the wall clocks is worth a warning: slewing takes a hundred times as
/// long to catch up.
const BEHIND_MAX: Duration = Duration::from_secs(10);

pub(crate) struct ClusterClock {
    own_id: u64,
    clock: Arc<dyn Clock>,
    inner: Mutex<Inner>,
}

/// How a leader found the time at which it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Evidence {
    /// A majority runs on machines that have not rebooted since they knew the time, and so knows
    /// how long it was away; no wall clock was asked.
    Kept,
    /// A majority's wall clocks are synchronised, says their kernels.
    Walls,
    /// The log holds no time at all: the cluster is new, and any wall clock is as good a beginning.
    New,
    /// None: time goes on from the log.
    Missing,
}

/// How time went on when a leader began that had lost count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Beginning {
    pub(crate) leap: Duration,
    pub(crate) evidence: Evidence,
}

/// A record of the time from before this process, good until the machine reboots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeptTime {
    pub(crate) time: Timestamp,
    /// Local monotonic time at which it was that.
    pub(crate) at: Duration,
}

/// What a peer said of its own clocks.
#[derive(Clone, Copy)]
struct Heard {
    /// Milliseconds.
    wall: u64,
    is_synchronised: bool,
    /// What the time is by the peer's record, in milliseconds.
    kept: Option<u64>,
    /// Local monotonic time.
    at: Duration,
}

/// What a node finds in its own state and log.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    /// The highest stamp that is known to be committed.
    pub(crate) committed: Stamp,
    /// The highest stamp of all.
    pub(crate) highest: Stamp,
    /// The term of the last entry.
    pub(crate) term: u64,
}

/// A leader's word.
#[derive(Clone, Copy, Default)]
struct Spoken {
    term: u64,
    /// Microseconds.
    time: u64,
    steady: u64,
}

struct Inner {
    /// In microseconds, so that slewing a few milliseconds does not vanish in rounding.
    time: u64,
    steady: u64,
    /// Local monotonic time at which those were true.
    at: Duration,
    /// The highest stamp that is committed; microseconds.
    floor_time: u64,
    floor_steady: u64,
    /// By the leader of the latest term that has spoken, or at first nothing, by the term of the
    /// last entry of the log.
    spoken: Spoken,
    synced: bool,
    /// Whether the log holds no time at all.
    is_new: bool,
    /// The term in which this node leads.
    leading: Option<u64>,
    /// Whether this leader had to begin without evidence.
    is_missing_evidence: bool,
    /// Microseconds that have passed while leading and have not been used for slewing yet.
    slewable: u64,
    kept: Option<KeptTime>,
    heard: BTreeMap<u64, Heard>,
    /// Peers whose last word on the time was garbled.
    garbled: BTreeSet<u64>,
    /// The leader that spoke last, and the local monotonic time at which it did.
    followed: Option<(u64, Duration)>,
    /// Whether the wall clock is synchronised, and the local monotonic time of asking.
    synchronised: Option<(bool, Duration)>,
}

impl ClusterClock {
    /// Starts from what is in the node's state and log, and from what was kept of the time since,
    /// if anything was.
    pub(crate) fn new(
        own_id: u64,
        clock: Arc<dyn Clock>,
        found: Found,
        kept: Option<KeptTime>,
    ) -> Self {
        let at = clock.monotonic();
        let (time, steady) = in_micros(found.highest.max(found.committed));
        let (floor_time, floor_steady) = in_micros(found.committed);
        let inner = Inner {
            time,
            steady,
            at,
            floor_time,
            floor_steady,
            spoken: Spoken { term: found.term, ..Spoken::default() },
            synced: false,
            is_new: time == 0,
            leading: None,
            is_missing_evidence: false,
            slewable: 0,
            kept: kept.filter(|kept| kept.at <= at),
            heard: BTreeMap::new(),
            garbled: BTreeSet::new(),
            followed: None,
            synchronised: None,
        };
        Self { own_id, clock, inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node's estimate of cluster time.
    pub(crate) fn now(&self) -> Stamp {
        let mut inner = self.lock();
        self.run(&mut inner);
        inner.stamp()
    }

    /// Whether the estimate rests on somebody who knew the time. Before, it is only a bound from
    /// below, and nothing should be dated by it.
    pub(crate) fn is_synced(&self) -> bool {
        self.lock().synced
    }

    /// Local monotonic time, for deadlines of work on this node.
    pub(crate) fn monotonic(&self) -> Duration {
        self.clock.monotonic()
    }

    /// Moves the estimate on to now.
    fn run(&self, inner: &mut Inner) {
        let now = self.clock.monotonic();
        let elapsed = micros(now.saturating_sub(inner.at));
        inner.at = now;
        inner.time = inner.time.saturating_add(elapsed);
        inner.steady = inner.steady.saturating_add(elapsed);
        if inner.leading.is_some() {
            inner.slew(elapsed, self.clock.wall().saturating_mul(1000));
        }
    }

    /// Takes note of a stamp that is committed in the log.
    pub(crate) fn observe_stamp(&self, stamp: Stamp) {
        let mut inner = self.lock();
        self.run(&mut inner);
        inner.raise(stamp);
        let (time, steady) = in_micros(stamp);
        inner.floor_time = inner.floor_time.max(time);
        inner.floor_steady = inner.floor_steady.max(steady);
        inner.is_new = false;
    }

    /// Takes note of what a peer said that does not lead, or not that we know: it counts if it
    /// rests on a leader of a later term than all that was heard, or before we know the time.
    pub(crate) fn observe(&self, node: u64, heard: Option<&peer::Clock>) {
        self.hear(node, heard, |inner, stamp, term| {
            if inner.leading.is_some_and(|leading| term <= leading) {
                return;
            }
            let is_news = term > inner.spoken.term;
            if is_news || (term == inner.spoken.term && !inner.synced) {
                inner.follow(term, stamp);
            }
        });
    }

    /// Takes note of what the leader of `term` said: unless a later one has spoken, its time is
    /// the cluster's.
    pub(crate) fn follow(&self, node: u64, term: u64, heard: Option<&peer::Clock>) {
        self.hear(node, heard, |inner, stamp, _| {
            // What deposes this node is heard here before anywhere else.
            if inner.leading.is_some_and(|leading| leading < term) {
                inner.resign();
            }
            if inner.leading.is_none() {
                inner.follow(term, stamp);
            }
        });
        let at = self.monotonic();
        self.lock().followed = Some((node, at));
    }

    /// How long that leader has said nothing; `None` if another one spoke last, or nobody did.
    pub(crate) fn silence_of(&self, leader: u64) -> Option<Duration> {
        let now = self.monotonic();
        self.lock()
            .followed
            .filter(|(node, _)| *node == leader)
            .map(|(_, at)| now.saturating_sub(at))
    }

    /// The local monotonic time at which each node that has said anything was last heard.
    pub(crate) fn last_heard(&self) -> BTreeMap<u64, Duration> {
        self.lock().heard.iter().map(|(node, heard)| (*node, heard.at)).collect()
    }

    /// `take` is called with a word of somebody who knows the time, and the term on which it rests.
    fn hear(
        &self,
        node: u64,
        clock: Option<&peer::Clock>,
        take: impl FnOnce(&mut Inner, Stamp, u64),
    ) {
        let Some(clock) = clock else { return };
        let mut inner = self.lock();
        self.run(&mut inner);
        // What a peer says of its own clocks is evidence, whatever it makes of the time.
        let heard = Heard {
            wall: clock.wall,
            is_synchronised: clock.wall_synchronised,
            kept: (clock.kept > 0).then_some(clock.kept),
            at: inner.at,
        };
        inner.heard.insert(node, heard);
        let stamp = Stamp { time: Timestamp(clock.time), steady: Timestamp(clock.steady) };
        if inner.is_garbled(stamp, self.clock.wall()) {
            let is_first = inner.garbled.insert(node);
            drop(inner);
            if is_first {
                tracing::warn!(
                    node,
                    time = clock.time,
                    "the time that this node says is minutes ahead of the cluster's and of the \
                     wall clock here, and is ignored; check the clocks of both machines"
                );
            }
            return;
        }
        inner.garbled.remove(&node);
        if clock.synced {
            take(&mut inner, stamp, clock.term);
        }
    }

    /// What this node says in its messages.
    pub(crate) fn announce(&self) -> peer::Clock {
        let mut inner = self.lock();
        self.run(&mut inner);
        let wall_synchronised = self.is_synchronised(&mut inner);
        let stamp = inner.stamp();
        let kept = if inner.synced { None } else { inner.kept_now() };
        peer::Clock {
            time: stamp.time.0,
            steady: stamp.steady.0,
            synced: inner.synced,
            wall: self.clock.wall(),
            wall_synchronised,
            kept: kept.unwrap_or(0),
            term: inner.leading.unwrap_or(inner.spoken.term),
        }
    }

    fn is_synchronised(&self, inner: &mut Inner) -> bool {
        match inner.synchronised {
            Some((is_synchronised, at)) if inner.at < at + SYNCHRONISED_INTERVAL => is_synchronised,
            _ => {
                let is_synchronised = self.clock.wall_is_synchronised();
                inner.synchronised = Some((is_synchronised, inner.at));
                is_synchronised
            }
        }
    }

    /// Begins to lead, or goes on. Returns how time goes on, if this node had lost count; `voters`
    /// are the sets of which a majority each decides.
    pub(crate) fn begin_leading(&self, term: u64, voters: &[BTreeSet<u64>]) -> Option<Beginning> {
        let mut inner = self.lock();
        self.run(&mut inner);
        if inner.spoken.term > term {
            return None;
        }
        if inner.leading != Some(term) {
            inner.leading = Some(term);
            inner.slewable = 0;
        }
        if inner.synced {
            return None;
        }
        let own = Heard {
            wall: self.clock.wall(),
            is_synchronised: self.is_synchronised(&mut inner),
            kept: inner.kept_now(),
            at: inner.at,
        };
        let beginning = inner.weigh(self.own_id, own, voters)?;
        inner.synced = true;
        inner.is_missing_evidence = beginning.evidence == Evidence::Missing;
        inner.time = inner.time.saturating_add(micros(beginning.leap));
        Some(beginning)
    }

    /// Ends to lead.
    pub(crate) fn end_leading(&self) {
        let mut inner = self.lock();
        self.run(&mut inner);
        inner.resign();
    }

    /// An operator says that it is at least `time`. Returns by how much time leaps; `None` if this
    /// node does not lead. A leader that has not found the time itself knows it then.
    pub(crate) fn set_time(&self, time: Timestamp) -> Option<Duration> {
        let mut inner = self.lock();
        self.run(&mut inner);
        inner.leading?;
        inner.synced = true;
        inner.is_missing_evidence = false;
        let leap = time.0.saturating_mul(1000).saturating_sub(inner.time);
        inner.time += leap;
        Some(Duration::from_micros(leap))
    }

    /// What has to be kept for the next start: `None` while this node does not know the time.
    pub(crate) fn keep(&self) -> Option<KeptTime> {
        let mut inner = self.lock();
        self.run(&mut inner);
        inner.synced.then(|| KeptTime { time: inner.stamp().time, at: inner.at })
    }

    /// What an operator should know of the clocks; each a sentence.
    pub(crate) fn warnings(&self, voters: &[BTreeSet<u64>]) -> Vec<String> {
        let mut inner = self.lock();
        self.run(&mut inner);
        let mut warnings: Vec<String> = inner
            .garbled
            .iter()
            .map(|node| {
                format!(
                    "node {node} says a time that is minutes ahead of the cluster's; it is ignored"
                )
            })
            .collect();
        if inner.leading.is_none() {
            return warnings;
        }
        let own = Heard {
            wall: self.clock.wall(),
            is_synchronised: self.is_synchronised(&mut inner),
            kept: None,
            at: inner.at,
        };
        let walls =
            inner.fresh(self.own_id, own, |heard| heard.is_synchronised.then_some(heard.wall));
        let behind = decide(&walls, voters)
            .map(|wall| Duration::from_millis(wall.saturating_sub(inner.time / 1000)))
            .filter(|behind| *behind > BEHIND_MAX);
        match behind {
            Some(behind) => warnings.push(format!(
                "cluster time is {} s behind the synchronised wall clocks of a majority, and \
                 catches up by 1 % of passing time; quorate cluster set-time sets it at once",
                behind.as_secs()
            )),
            None if inner.is_missing_evidence => warnings.push(
                "how long the whole cluster was down is not known, as its machines were rebooted \
                 and the clocks of a majority were not synchronised: cluster time went on from \
                 where it was; quorate cluster set-time sets it"
                    .to_owned(),
            ),
            None => {}
        }
        warnings
    }
}

/// The value that a majority of every set supports: the lower median, which of two guesses is the
/// one that expires nothing too early. `None` if a majority of some set has none.
fn decide(values: &BTreeMap<u64, u64>, voters: &[BTreeSet<u64>]) -> Option<u64> {
    let mut decided: Option<u64> = None;
    for set in voters {
        let mut found: Vec<u64> = set.iter().filter_map(|id| values.get(id).copied()).collect();
        if found.len() <= set.len() / 2 {
            return None;
        }
        found.sort_unstable();
        let median = found[(found.len() - 1) / 2];
        decided = Some(decided.map_or(median, |other| other.min(median)));
    }
    decided
}

impl Inner {
    fn stamp(&self) -> Stamp {
        Stamp { time: Timestamp(self.time / 1000), steady: Timestamp(self.steady / 1000) }
    }

    fn raise(&mut self, stamp: Stamp) {
        let (time, steady) = in_micros(stamp);
        self.time = self.time.max(time);
        self.steady = self.steady.max(steady);
    }

    fn follow(&mut self, term: u64, stamp: Stamp) {
        let (mut time, mut steady) = in_micros(stamp);
        if self.spoken.term > term {
            return;
        }
        if self.spoken.term == term {
            // Within its term a leader's time only grows; a message that was overtaken says less.
            time = time.max(self.spoken.time);
            steady = steady.max(self.spoken.steady);
        }
        self.spoken = Spoken { term, time, steady };
        self.time = self.floor_time.max(time);
        self.steady = self.floor_steady.max(steady);
        self.synced = true;
    }

    /// Leads no more: what this node said in its term is a leader's word like any other.
    fn resign(&mut self) {
        if let Some(term) = self.leading.take()
            && self.synced
        {
            self.spoken = Spoken { term, time: self.time, steady: self.steady };
        }
        self.is_missing_evidence = false;
    }

    /// Whether nobody who counts right can have come to `stamp`. Steady time never gains on time.
    fn is_garbled(&self, stamp: Stamp, wall: u64) -> bool {
        let own = self.stamp();
        let wall = wall.max(self.kept_now().unwrap_or(0));
        let ahead_max = u64::try_from(AHEAD_MAX.as_millis()).unwrap_or(u64::MAX);
        let time_max = own.time.0.max(wall).saturating_add(ahead_max);
        let passed = stamp.time.0.saturating_sub(own.time.0);
        let steady_max = own.steady.0.saturating_add(passed).saturating_add(ahead_max);
        stamp.time.0 > time_max || stamp.steady.0 > steady_max
    }

    /// What the record from before this process says of the time, in milliseconds.
    fn kept_now(&self) -> Option<u64> {
        let kept = self.kept?;
        Some(kept.time.plus(self.at.saturating_sub(kept.at)).0)
    }

    /// What this node and its peers say of themselves, as it is by now, in milliseconds.
    fn fresh(
        &self,
        own_id: u64,
        own: Heard,
        value: impl Fn(&Heard) -> Option<u64>,
    ) -> BTreeMap<u64, u64> {
        let heard = self.heard.iter().map(|(node, heard)| (*node, *heard));
        heard
            .chain([(own_id, own)])
            .filter_map(|(node, heard)| {
                let age = self.at.saturating_sub(heard.at);
                let age_millis = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
                let value = value(&heard).filter(|_| age <= FRESH_MAX)?;
                Some((node, value.saturating_add(age_millis)))
            })
            .collect()
    }

    /// How time goes on; `None` until a majority has been heard.
    fn weigh(&self, own_id: u64, own: Heard, voters: &[BTreeSet<u64>]) -> Option<Beginning> {
        let kept = decide(&self.fresh(own_id, own, |heard| heard.kept), voters);
        let synchronised =
            self.fresh(own_id, own, |heard| heard.is_synchronised.then_some(heard.wall));
        let walls = decide(&self.fresh(own_id, own, |heard| Some(heard.wall)), voters)?;
        let (time, evidence) = if self.is_new {
            (walls, Evidence::New)
        } else if let Some(kept) = kept {
            (kept, Evidence::Kept)
        } else if let Some(walls) = decide(&synchronised, voters) {
            (walls, Evidence::Walls)
        } else {
            (0, Evidence::Missing)
        };
        let leap = Duration::from_micros(time.saturating_mul(1000).saturating_sub(self.time));
        Some(Beginning { leap, evidence })
    }

    /// Speeds up or slows down the `elapsed` microseconds just added, towards `wall`. Stamps can
    /// be microseconds apart, so what is too short to be slewed is kept for the next time.
    fn slew(&mut self, elapsed: u64, wall: u64) {
        self.slewable += elapsed;
        let most = (self.slewable / SLEW_DIVISOR).min(elapsed);
        self.slewable -= most * SLEW_DIVISOR;
        if wall > self.time {
            let faster = most.min(wall - self.time);
            self.time += faster;
            self.steady += faster;
        } else {
            let slower = most.min(self.time - wall);
            self.time -= slower;
            self.steady -= slower.min(self.steady);
        }
    }
}

fn in_micros(stamp: Stamp) -> (u64, u64) {
    (stamp.time.0.saturating_mul(1000), stamp.steady.0.saturating_mul(1000))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
