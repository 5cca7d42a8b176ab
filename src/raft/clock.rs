//! Cluster time on one node: what it has heard, and what it stamps when it leads.
//!
//! A leader's time runs on its own CLOCK_BOOTTIME. Every peer message, in either direction,
//! carries the sender's estimate, so each node knows the highest time anybody could have acted on,
//! and a new leader continues from there plus its own time since: neither a failover nor a step of
//! a wall clock moves time back or makes it leap.
//!
//! - The estimate never decreases, whatever is observed and whoever leads.
//! - While leading, a node takes nobody's word: others only echo what it said, later.
//! - Towards the wall clock time slews by at most one percent of the time that passes.
//! - Time leaps only on a leader that is not `synced`: one that, since its start, has heard from
//!   nobody who knew the time. Its electors were all freshly started then, so a majority had lost
//!   count, and the best guess is the median of their wall clocks. The leap is added to `time` and
//!   not to `steady`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::proto::peer;
use crate::state::{Stamp, Timestamp};

/// Largest share of passing time by which time is sped up or slowed down: 1/100.
const SLEW_DIVISOR: u64 = 100;

pub(crate) struct ClusterClock {
    clock: Arc<dyn Clock>,
    inner: Mutex<Inner>,
}

struct Inner {
    /// In microseconds, so that slewing a few milliseconds does not vanish in rounding.
    time: u64,
    steady: u64,
    /// Local monotonic time at which those were true.
    at: Duration,
    synced: bool,
    leading: bool,
    /// Whether no time has ever been known: a cluster that is being formed.
    timeless: bool,
    /// Microseconds that have passed while leading and have not been used for slewing yet.
    slewable: u64,
    /// Peers' wall clocks in milliseconds, and the local monotonic time at which each was heard.
    walls: BTreeMap<u64, (u64, Duration)>,
}

impl ClusterClock {
    /// Starts from the highest stamp in the node's state and log.
    pub(crate) fn new(clock: Arc<dyn Clock>, highest: Stamp) -> Self {
        let at = clock.monotonic();
        let inner = Inner {
            time: highest.time.0.saturating_mul(1000),
            steady: highest.steady.0.saturating_mul(1000),
            at,
            synced: false,
            leading: false,
            timeless: highest == Stamp::default(),
            slewable: 0,
            walls: BTreeMap::new(),
        };
        Self { clock, inner: Mutex::new(inner) }
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
        if inner.leading {
            inner.slew(elapsed, self.clock.wall().saturating_mul(1000));
        }
    }

    /// Takes note of a stamp found in the log.
    pub(crate) fn observe_stamp(&self, stamp: Stamp) {
        let mut inner = self.lock();
        self.run(&mut inner);
        inner.raise(stamp);
    }

    /// Takes note of what a peer said.
    pub(crate) fn observe(&self, node: u64, heard: Option<&peer::Clock>) {
        let Some(heard) = heard else { return };
        let mut inner = self.lock();
        self.run(&mut inner);
        let at = inner.at;
        inner.walls.insert(node, (heard.wall, at));
        if inner.leading {
            return;
        }
        inner.raise(Stamp { time: Timestamp(heard.time), steady: Timestamp(heard.steady) });
        inner.synced |= heard.synced;
    }

    /// What this node says in its messages.
    pub(crate) fn announce(&self) -> peer::Clock {
        let mut inner = self.lock();
        self.run(&mut inner);
        let stamp = inner.stamp();
        peer::Clock {
            time: stamp.time.0,
            steady: stamp.steady.0,
            synced: inner.synced,
            wall: self.clock.wall(),
        }
    }

    /// Begins to lead. Returns by how much time leapt, if it did.
    pub(crate) fn begin_leading(&self, voters: usize) -> Option<Duration> {
        let mut inner = self.lock();
        self.run(&mut inner);
        inner.leading = true;
        inner.slewable = 0;
        if inner.synced {
            return None;
        }
        let now = inner.at;
        let mut walls: Vec<u64> = inner
            .walls
            .values()
            .map(|(wall, at)| wall.saturating_add(micros(now.saturating_sub(*at)) / 1000))
            .collect();
        walls.push(self.clock.wall());
        if walls.len() <= voters / 2 {
            return None;
        }
        inner.synced = true;
        walls.sort_unstable();
        // The lower median: of two guesses the one that expires nothing too early.
        let median = walls[(walls.len() - 1) / 2].saturating_mul(1000);
        let leap = median.saturating_sub(inner.time);
        inner.time += leap;
        if inner.timeless {
            inner.timeless = false;
            inner.steady = inner.time;
        }
        (leap > 0).then(|| Duration::from_micros(leap))
    }

    /// Ends to lead.
    pub(crate) fn end_leading(&self) {
        let mut inner = self.lock();
        self.run(&mut inner);
        inner.leading = false;
    }
}

impl Inner {
    fn stamp(&self) -> Stamp {
        Stamp { time: Timestamp(self.time / 1000), steady: Timestamp(self.steady / 1000) }
    }

    fn raise(&mut self, stamp: Stamp) {
        self.timeless &= stamp == Stamp::default();
        self.time = self.time.max(stamp.time.0.saturating_mul(1000));
        self.steady = self.steady.max(stamp.steady.0.saturating_mul(1000));
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

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
