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
//! - It never falls below the floor: the highest stamp found in the log or heard from a leader of
//!   the latest term that the node knows. A leader that was cut off goes on believing that it
//!   leads, and its time, slewed towards another wall clock, drifts from the cluster's.
//! - While leading, a node takes nobody's word: others only echo what it said, later. Nor does one
//!   that is `synced` take that of anybody but its leader: whatever was acted on is in the log of
//!   whoever gets elected.
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
    /// What the estimate never falls below; microseconds.
    floor_time: u64,
    floor_steady: u64,
    synced: bool,
    leading: bool,
    /// Microseconds that have passed while leading and have not been used for slewing yet.
    slewable: u64,
    /// Peers' wall clocks in milliseconds, and the local monotonic time at which each was heard.
    walls: BTreeMap<u64, (u64, Duration)>,
    /// The leader that spoke last, and the local monotonic time at which it did.
    followed: Option<(u64, Duration)>,
}

impl ClusterClock {
    /// Starts from the highest stamp in the node's state and log.
    pub(crate) fn new(clock: Arc<dyn Clock>, highest: Stamp) -> Self {
        let at = clock.monotonic();
        let (time, steady) = in_micros(highest);
        let inner = Inner {
            time,
            steady,
            at,
            floor_time: time,
            floor_steady: steady,
            synced: false,
            leading: false,
            slewable: 0,
            walls: BTreeMap::new(),
            followed: None,
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
        let (time, steady) = in_micros(stamp);
        inner.floor_time = inner.floor_time.max(time);
        inner.floor_steady = inner.floor_steady.max(steady);
    }

    /// Takes note of what a peer said that does not lead, or not that we know: its estimate may
    /// only raise ours, and only before we know the time.
    pub(crate) fn observe(&self, node: u64, heard: Option<&peer::Clock>) {
        self.hear(node, heard, |inner, stamp| {
            if !inner.synced {
                inner.raise(stamp);
            }
        });
    }

    /// Takes note of what a leader said, whose term is not over as far as this node knows: its
    /// time is the cluster's.
    pub(crate) fn follow(&self, node: u64, heard: Option<&peer::Clock>) {
        self.hear(node, heard, Inner::follow);
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

    fn hear(&self, node: u64, heard: Option<&peer::Clock>, take: impl FnOnce(&mut Inner, Stamp)) {
        let Some(heard) = heard else { return };
        let mut inner = self.lock();
        self.run(&mut inner);
        let at = inner.at;
        inner.walls.insert(node, (heard.wall, at));
        if inner.leading {
            return;
        }
        let stamp = Stamp { time: Timestamp(heard.time), steady: Timestamp(heard.steady) };
        take(&mut inner, stamp);
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
        let (time, steady) = in_micros(stamp);
        self.time = self.time.max(time);
        self.steady = self.steady.max(steady);
    }

    fn follow(&mut self, stamp: Stamp) {
        let (time, steady) = in_micros(stamp);
        self.floor_time = self.floor_time.max(time);
        self.floor_steady = self.floor_steady.max(steady);
        self.time = self.floor_time;
        self.steady = self.floor_steady;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that a test moves by hand.
    #[derive(Default)]
    struct Manual(Mutex<(Duration, u64)>);

    impl Manual {
        fn starting_at(wall: u64) -> Arc<Self> {
            Arc::new(Self(Mutex::new((Duration::from_secs(1), wall))))
        }

        /// Lets time pass, the wall clock's as well.
        fn pass(&self, milliseconds: u64) {
            let mut now = self.0.lock().unwrap();
            now.0 += Duration::from_millis(milliseconds);
            now.1 += milliseconds;
        }

        fn step_wall(&self, milliseconds: i64) {
            let mut now = self.0.lock().unwrap();
            now.1 = now.1.saturating_add_signed(milliseconds);
        }
    }

    impl Clock for Manual {
        fn monotonic(&self) -> Duration {
            self.0.lock().unwrap().0
        }

        fn wall(&self) -> u64 {
            self.0.lock().unwrap().1
        }
    }

    const HOUR: u64 = 3_600_000;
    const START: u64 = 1_000 * HOUR;

    fn node(wall: u64, highest: u64) -> (Arc<Manual>, ClusterClock) {
        let manual = Manual::starting_at(wall);
        let highest = Stamp { time: Timestamp(highest), steady: Timestamp(highest) };
        (manual.clone(), ClusterClock::new(manual, highest))
    }

    #[test]
    fn a_new_cluster_takes_the_median_wall_clock() {
        let (_, first) = node(START, 0);
        let (_, second) = node(START + HOUR, 0);
        let (_, third) = node(START + 5 * HOUR, 0);
        assert!(!first.is_synced());
        first.observe(2, Some(&second.announce()));
        first.observe(3, Some(&third.announce()));
        assert!(first.begin_leading(3).is_some());
        assert_eq!(first.now().time, Timestamp(START + HOUR));
        assert!(first.is_synced());
    }

    #[test]
    fn a_failover_neither_goes_back_nor_leaps() {
        let (leader_time, leader) = node(START, START);
        leader.begin_leading(1);
        let (follower_time, follower) = node(START, START);
        // The leader's wall clock is far behind, so it slews as slowly as it may.
        leader_time.step_wall(-(HOUR as i64));
        for _ in 0..10_000 {
            leader_time.pass(100);
            follower_time.pass(100);
            follower.follow(1, Some(&leader.announce()));
        }
        let before = leader.now();
        follower.begin_leading(3);
        let after = follower.now();
        assert!(after.time >= before.time, "{after:?} {before:?}");
        assert!(after.time.since(before.time) <= Duration::from_millis(2), "{after:?} {before:?}");
        assert!(after.steady.since(before.steady) <= Duration::from_millis(2));
    }

    #[test]
    fn time_runs_on_while_nobody_leads() {
        let (_, leader) = node(START, START);
        leader.begin_leading(1);
        let (time, follower) = node(START, 0);
        follower.follow(1, Some(&leader.announce()));
        time.pass(700);
        assert_eq!(follower.now().time, Timestamp(START + 700));
    }

    #[test]
    fn a_step_of_the_wall_clock_is_slewed() {
        let (time, leader) = node(START, START);
        leader.begin_leading(1);
        leader.now();
        time.step_wall(HOUR as i64);
        // Many short steps, as stamps are drawn.
        let mut last = leader.now();
        for _ in 0..100_000 {
            time.pass(1);
            let now = leader.now();
            assert!(now.time >= last.time);
            last = now;
        }
        let gained = last.time.since(Timestamp(START)).as_millis();
        assert!((100_900..=101_001).contains(&gained), "{gained}");
    }

    #[test]
    fn after_all_were_down_only_sessions_feel_the_gap() {
        let (_, second) = node(START + HOUR, START);
        let (_, first) = node(START + HOUR, START);
        first.observe(2, Some(&second.announce()));
        let leap = first.begin_leading(3);
        assert_eq!(leap, Some(Duration::from_millis(HOUR)));
        let now = first.now();
        assert_eq!(now, Stamp { time: Timestamp(START + HOUR), steady: Timestamp(START) });
    }

    #[test]
    fn a_leader_that_was_cut_off_does_not_carry_its_drift_to_the_next() {
        let (old_time, old) = node(START, START);
        let (new_time, new) = node(START, START);
        let (time, follower) = node(START, START);
        old.begin_leading(3);
        new.follow(1, Some(&old.announce()));
        new.begin_leading(3);
        old_time.step_wall(HOUR as i64);
        new_time.step_wall(-(HOUR as i64));
        for _ in 0..600 {
            for clock in [&old_time, &new_time, &time] {
                clock.pass(100);
            }
            old.now();
            follower.follow(2, Some(&new.announce()));
        }
        let apart = old.now().steady.since(new.now().steady);
        assert!(apart > Duration::from_millis(1_000), "{apart:?}");
        // The next to lead asks the old one for its vote.
        follower.observe(1, Some(&old.announce()));
        follower.begin_leading(3);
        assert!(follower.now().steady <= new.now().steady);
    }

    #[test]
    fn who_heard_the_time_does_not_leap() {
        let (_, old) = node(START, START);
        old.begin_leading(1);
        let (_, restarted) = node(START + HOUR, START - 5);
        restarted.observe(1, Some(&old.announce()));
        assert_eq!(restarted.begin_leading(3), None);
        assert_eq!(restarted.now().time, Timestamp(START));
    }
}
