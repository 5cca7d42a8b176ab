//! Time neither goes back nor leaps, whoever leads and whatever the clocks of the machines do.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::clock::{Beginning, ClusterClock, Evidence, Found, KeptTime};
use crate::clock::Clock;
use crate::proto::peer;
use crate::state::{Stamp, Timestamp};

/// A clock that a test moves by hand.
#[derive(Default)]
struct Manual(Mutex<Times>);

#[derive(Default)]
struct Times {
    monotonic: Duration,
    wall: u64,
    is_synchronised: bool,
}

impl Manual {
    fn starting_at(wall: u64) -> Arc<Self> {
        let monotonic = Duration::from_secs(100_000);
        Arc::new(Self(Mutex::new(Times { monotonic, wall, is_synchronised: true })))
    }

    /// Lets time pass, the wall clock's as well.
    fn pass(&self, milliseconds: u64) {
        let mut now = self.0.lock().unwrap();
        now.monotonic += Duration::from_millis(milliseconds);
        now.wall += milliseconds;
    }

    fn lose_synchronisation(&self) {
        self.0.lock().unwrap().is_synchronised = false;
    }

    fn step_wall(&self, milliseconds: i64) {
        let mut now = self.0.lock().unwrap();
        now.wall = now.wall.saturating_add_signed(milliseconds);
    }
}

impl Clock for Manual {
    fn monotonic(&self) -> Duration {
        self.0.lock().unwrap().monotonic
    }

    fn wall(&self) -> u64 {
        self.0.lock().unwrap().wall
    }

    fn wall_is_synchronised(&self) -> bool {
        self.0.lock().unwrap().is_synchronised
    }
}

const HOUR: u64 = 3_600_000;
const START: u64 = 1_000 * HOUR;
const TERM: u64 = 1;

fn voters(count: u64) -> Vec<BTreeSet<u64>> {
    vec![(1..=count).collect()]
}

/// Node `id`, whose log ends at `highest`.
fn node(id: u64, wall: u64, highest: u64) -> (Arc<Manual>, ClusterClock) {
    node_that_kept(id, wall, highest, None)
}

fn node_that_kept(
    id: u64,
    wall: u64,
    highest: u64,
    kept: Option<KeptTime>,
) -> (Arc<Manual>, ClusterClock) {
    let manual = Manual::starting_at(wall);
    let committed = Stamp { time: Timestamp(highest), steady: Timestamp(highest) };
    let found = Found { committed, highest: committed, term: 0 };
    (manual.clone(), ClusterClock::new(id, manual, found, kept))
}

#[test]
fn a_new_cluster_takes_the_median_wall_clock() {
    let (_, first) = node(1, START, 0);
    let (_, second) = node(2, START + HOUR, 0);
    let (_, third) = node(3, START + 5 * HOUR, 0);
    assert!(!first.is_synced());
    first.observe(2, Some(&second.announce()));
    first.observe(3, Some(&third.announce()));
    assert!(first.begin_leading(TERM, &voters(3)).is_some());
    assert_eq!(first.now().time, Timestamp(START + HOUR));
    assert!(first.is_synced());
}

#[test]
fn a_failover_neither_goes_back_nor_leaps() {
    let (leader_time, leader) = node(1, START, START);
    leader.begin_leading(TERM, &voters(1));
    let (follower_time, follower) = node(2, START, START);
    // The leader's wall clock is far behind, so it slews as slowly as it may.
    leader_time.step_wall(-(HOUR as i64));
    for _ in 0..10_000 {
        leader_time.pass(100);
        follower_time.pass(100);
        follower.follow(1, 1, Some(&leader.announce()));
    }
    let before = leader.now();
    follower.begin_leading(2, &voters(3));
    let after = follower.now();
    assert!(after.time >= before.time, "{after:?} {before:?}");
    assert!(after.time.since(before.time) <= Duration::from_millis(2), "{after:?} {before:?}");
    assert!(after.steady.since(before.steady) <= Duration::from_millis(2));
}

#[test]
fn time_runs_on_while_nobody_leads() {
    let (_, leader) = node(1, START, START);
    leader.begin_leading(TERM, &voters(1));
    let (time, follower) = node(2, START, 0);
    follower.follow(1, 1, Some(&leader.announce()));
    time.pass(700);
    assert_eq!(follower.now().time, Timestamp(START + 700));
}

#[test]
fn a_step_of_the_wall_clock_is_slewed() {
    let (time, leader) = node(1, START, START);
    leader.begin_leading(TERM, &voters(1));
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
    let (_, second) = node(2, START + HOUR, START);
    let (_, first) = node(1, START + HOUR, START);
    first.observe(2, Some(&second.announce()));
    let leap = first.begin_leading(TERM, &voters(3));
    let leapt = Beginning { leap: Duration::from_millis(HOUR), evidence: Evidence::Walls };
    assert_eq!(leap, Some(leapt));
    let now = first.now();
    assert_eq!(now, Stamp { time: Timestamp(START + HOUR), steady: Timestamp(START) });
}

#[test]
fn a_leader_that_was_cut_off_does_not_carry_its_drift_to_the_next() {
    let (old_time, old) = node(1, START, START);
    let (new_time, new) = node(2, START, START);
    let (time, follower) = node(3, START, START);
    old.begin_leading(TERM, &voters(1));
    new.follow(1, 1, Some(&old.announce()));
    new.begin_leading(2, &voters(3));
    old_time.step_wall(HOUR as i64);
    new_time.step_wall(-(HOUR as i64));
    for _ in 0..600 {
        for clock in [&old_time, &new_time, &time] {
            clock.pass(100);
        }
        old.now();
        follower.follow(2, 2, Some(&new.announce()));
    }
    let apart = old.now().steady.since(new.now().steady);
    assert!(apart > Duration::from_millis(1_000), "{apart:?}");
    // The next to lead asks the old one for its vote.
    follower.observe(1, Some(&old.announce()));
    follower.begin_leading(3, &voters(3));
    assert!(follower.now().steady <= new.now().steady);
}

#[test]
fn who_heard_the_time_does_not_leap() {
    let (_, old) = node(1, START, START);
    old.begin_leading(TERM, &voters(1));
    let (_, restarted) = node(2, START + HOUR, START - 5);
    restarted.observe(1, Some(&old.announce()));
    assert_eq!(restarted.begin_leading(2, &voters(3)), None);
    assert_eq!(restarted.now().time, Timestamp(START));
}

#[test]
fn a_successor_of_one_who_began_anew_does_not_go_on_where_an_earlier_leader_was() {
    let (old_time, old) = node(1, START, START);
    let (third_time, third) = node(3, START, START);
    old.begin_leading(TERM, &voters(1));
    // Ten quiet minutes: heartbeats, and no entries.
    for _ in 0..6_000 {
        old_time.pass(100);
        third_time.pass(100);
        third.follow(1, 1, Some(&old.announce()));
    }
    // The first two are started again; the highest stamp in their logs is that of the beginning.
    let (second_time, second) = node(2, START + 600_000, START);
    let (first_time, first) = node(1, START + 600_000, START);
    first.observe(2, Some(&second.announce()));
    first.begin_leading(2, &voters(3));
    assert!(first.is_synced());
    for _ in 0..600 {
        for time in [&first_time, &second_time, &third_time] {
            time.pass(100);
        }
        second.follow(1, 2, Some(&first.announce()));
        third.follow(1, 2, Some(&first.announce()));
    }
    let before = first.now();
    third.begin_leading(3, &voters(3));
    let leap = third.now().steady.since(before.steady);
    assert!(leap <= Duration::from_millis(10), "a lease that was granted ends {leap:?} early");
}

#[test]
fn who_was_cut_off_with_a_leader_does_not_carry_its_drift() {
    let (old_time, old) = node(1, START, START);
    let (new_time, new) = node(2, START, START);
    let (time, follower) = node(3, START, START);
    old.begin_leading(TERM, &voters(1));
    follower.follow(1, 1, Some(&old.announce()));
    new.follow(1, 1, Some(&old.announce()));
    new.begin_leading(2, &voters(3));
    old_time.step_wall(HOUR as i64);
    for _ in 0..36_000 {
        for clock in [&old_time, &new_time, &time] {
            clock.pass(100);
        }
        follower.follow(1, 1, Some(&old.announce()));
        new.now();
    }
    follower.follow(2, 2, Some(&new.announce()));
    // The earlier leader may speak once more before it hears that it is deposed.
    follower.follow(1, 1, Some(&old.announce()));
    follower.begin_leading(3, &voters(3));
    let leap = follower.now().steady.since(new.now().steady);
    assert!(leap <= Duration::from_millis(10), "{leap:?}");
}

#[test]
fn what_is_in_the_log_is_a_floor_in_every_term() {
    let (_, leader) = node(1, START, START);
    leader.begin_leading(TERM, &voters(1));
    let (_, follower) = node(2, START, START);
    let stamp = Stamp { time: Timestamp(START + HOUR), steady: Timestamp(START + 1) };
    follower.observe_stamp(stamp);
    follower.follow(1, 9, Some(&leader.announce()));
    assert_eq!(follower.now(), stamp);
}

#[test]
fn a_garbled_time_is_ignored_and_told() {
    let (_, leader) = node(1, START, START);
    leader.begin_leading(TERM, &voters(1));
    let (time, follower) = node(2, START, START);
    follower.follow(1, 1, Some(&leader.announce()));
    let garbled = [
        peer::Clock { time: u64::MAX, steady: u64::MAX, synced: true, ..Default::default() },
        peer::Clock { time: START + HOUR, steady: START, synced: true, ..Default::default() },
        peer::Clock { time: START, steady: START + HOUR, synced: true, ..Default::default() },
    ];
    for clock in &garbled {
        follower.follow(1, 1, Some(clock));
        follower.observe(3, Some(clock));
        assert_eq!(follower.warnings(&voters(3)).len(), 2);
        assert_eq!(follower.now().time, Timestamp(START));
    }
    time.pass(10);
    assert_eq!(
        follower.silence_of(1),
        Some(Duration::from_millis(10)),
        "it has spoken all the same"
    );
    follower.follow(1, 1, Some(&leader.announce()));
    follower.observe(3, Some(&leader.announce()));
    assert_eq!(follower.warnings(&voters(3)), Vec::<String>::new());
    // What is committed counts, however far ahead it is.
    let stamp = Stamp { time: Timestamp(START + HOUR), steady: Timestamp(START + HOUR) };
    follower.observe_stamp(stamp);
    assert_eq!(follower.now(), stamp);
}

/// Three nodes that are started after all were down, and lead by the vote of node 2.
fn restarted(
    away: u64,
    walls: [u64; 3],
    has_record: bool,
    are_synchronised: [bool; 3],
) -> (Option<Beginning>, ClusterClock) {
    let nodes: Vec<_> = (1..=3)
        .zip(walls.into_iter().zip(are_synchronised))
        .map(|(id, (wall, is_synchronised))| {
            let at = Duration::from_secs(100_000) - Duration::from_millis(away);
            let kept = has_record.then_some(KeptTime { time: Timestamp(START + 5), at });
            let (time, clock) = node_that_kept(id, wall, START, kept);
            if !is_synchronised {
                time.lose_synchronisation();
            }
            clock
        })
        .collect();
    nodes[0].observe(2, Some(&nodes[1].announce()));
    let beginning = nodes[0].begin_leading(TERM, &voters(3));
    (beginning, nodes.into_iter().next().unwrap())
}

#[test]
fn where_no_machine_was_rebooted_no_wall_clock_is_asked() {
    let wrong = START + 2 * HOUR;
    let (beginning, clock) = restarted(60_000, [wrong; 3], true, [true; 3]);
    let leap = Duration::from_millis(60_005);
    assert_eq!(beginning, Some(Beginning { leap, evidence: Evidence::Kept }));
    let now = Stamp { time: Timestamp(START + 60_005), steady: Timestamp(START) };
    assert_eq!(clock.now(), now);
}

#[test]
fn wall_clocks_that_nobody_has_set_are_not_believed() {
    let wrong = START + 2 * HOUR;
    let (beginning, clock) = restarted(60_000, [wrong; 3], false, [false; 3]);
    let missing = Beginning { leap: Duration::ZERO, evidence: Evidence::Missing };
    assert_eq!(beginning, Some(missing));
    assert!(clock.is_synced());
    assert_eq!(clock.now().time, Timestamp(START));
    assert_eq!(clock.warnings(&voters(3)).len(), 1);
    assert_eq!(clock.set_time(Timestamp(START + HOUR)), Some(Duration::from_millis(HOUR)));
    let now = Stamp { time: Timestamp(START + HOUR), steady: Timestamp(START) };
    assert_eq!(clock.now(), now);
    assert_eq!(clock.set_time(Timestamp(START)), Some(Duration::ZERO), "time never goes back");
    assert_eq!(clock.now(), now);
    assert_eq!(clock.warnings(&voters(3)), Vec::<String>::new());
}

#[test]
fn a_majority_of_synchronised_wall_clocks_decides() {
    let right = START + HOUR;
    let (beginning, _) = restarted(0, [right, right + 7, 0], false, [true, true, false]);
    let leap = Duration::from_millis(HOUR);
    assert_eq!(beginning, Some(Beginning { leap, evidence: Evidence::Walls }));
    let (beginning, _) = restarted(0, [right, right + 7, 0], false, [true, false, true]);
    let evidence = Evidence::Missing;
    assert_eq!(beginning, Some(Beginning { leap: Duration::ZERO, evidence }), "of two, one is");
}

#[test]
fn a_wall_clock_that_was_heard_long_ago_is_no_evidence() {
    let (time, first) = node(1, START + HOUR, START);
    let (_, second) = node(2, START + HOUR, START);
    first.observe(2, Some(&second.announce()));
    time.pass(11_000);
    assert_eq!(first.begin_leading(TERM, &voters(3)), None);
    assert!(!first.is_synced());
    first.observe(2, Some(&second.announce()));
    let evidence = first.begin_leading(TERM, &voters(3)).map(|beginning| beginning.evidence);
    assert_eq!(evidence, Some(Evidence::Walls));
}

#[test]
fn only_voters_are_asked_for_the_time() {
    let (_, first) = node(1, START + HOUR, START);
    let (_, stranger) = node(9, START + 5 * HOUR, START);
    first.observe(9, Some(&stranger.announce()));
    assert_eq!(first.begin_leading(TERM, &voters(3)), None);
}

#[test]
fn a_leader_that_is_far_behind_the_wall_clocks_says_so() {
    let (_, second) = node(2, START + HOUR, START);
    let (_, first) = node(1, START, START);
    first.begin_leading(TERM, &voters(1));
    assert_eq!(first.warnings(&voters(1)), Vec::<String>::new());
    first.observe(2, Some(&second.announce()));
    let (_, third) = node(3, START + HOUR, START);
    first.observe(3, Some(&third.announce()));
    assert_eq!(first.warnings(&voters(3)).len(), 1);
}

#[test]
fn an_elector_that_was_cut_off_with_an_earlier_leader_is_not_believed() {
    let (old_time, old) = node(1, START, START);
    let (new_time, new) = node(2, START, START);
    old.begin_leading(4, &voters(1));
    new.follow(1, 4, Some(&old.announce()));
    new.begin_leading(5, &voters(3));
    old_time.step_wall(HOUR as i64);
    for _ in 0..36_000 {
        old_time.pass(100);
        new_time.pass(100);
        old.now();
    }
    let stamp = new.now();
    // Node 3 has entries of term 5, and is started again; the one who leads dies.
    let manual = Manual::starting_at(START);
    let found = Found { committed: stamp, highest: stamp, term: 5 };
    let restarted = ClusterClock::new(3, manual, found, None);
    restarted.observe(1, Some(&old.announce()));
    restarted.begin_leading(6, &voters(3));
    assert_eq!(restarted.now().steady, stamp.steady);
    // Whoever knows of term 5 is believed.
    let (_, another) = node(3, START + HOUR, START);
    another.observe(1, Some(&old.announce()));
    another.observe(2, Some(&new.announce()));
    another.observe(1, Some(&old.announce()));
    another.begin_leading(6, &voters(3));
    assert_eq!(another.now().steady, new.now().steady);
}

#[test]
fn who_is_deposed_goes_by_its_successor_at_once() {
    let (old_time, old) = node(1, START, START);
    let (_, new) = node(2, START, START);
    old.begin_leading(1, &voters(1));
    new.follow(1, 1, Some(&old.announce()));
    new.begin_leading(2, &voters(3));
    old_time.step_wall(HOUR as i64);
    old_time.pass(600_000);
    old.now();
    old.follow(2, 2, Some(&new.announce()));
    // What says that it leads comes late, and says no more.
    assert_eq!(old.begin_leading(1, &voters(1)), None);
    assert_eq!(old.now(), new.now());
    old.end_leading();
    assert_eq!(old.now(), new.now());
}

#[test]
fn a_stamp_that_was_never_committed_is_no_floor() {
    let (_, leader) = node(1, START, START);
    leader.begin_leading(7, &voters(1));
    let stamp = |time| Stamp { time: Timestamp(time), steady: Timestamp(START) };
    let found = Found { committed: stamp(START), highest: stamp(START + 2 * HOUR), term: 6 };
    let restarted = ClusterClock::new(2, Manual::starting_at(START), found, None);
    assert_eq!(restarted.now(), stamp(START + 2 * HOUR));
    restarted.follow(1, 7, Some(&leader.announce()));
    assert_eq!(restarted.now(), stamp(START));
}

#[test]
fn who_is_ignored_for_the_time_is_heard_for_the_evidence() {
    // Ten quiet minutes after the last stamp, node 1 comes back with a clock that is far behind.
    let (_, knows) = node(2, START + 600_000, START + 600_000);
    knows.begin_leading(TERM, &voters(1));
    let (_, first) = node(1, START - HOUR, START);
    first.observe(2, Some(&knows.announce()));
    assert!(!first.is_synced());
    let beginning = first.begin_leading(2, &voters(3));
    assert!(beginning.is_some() && first.is_synced(), "{beginning:?}");
    // The others go by it, and an operator can say more.
    knows.follow(1, 2, Some(&first.announce()));
    assert!(first.set_time(Timestamp(START)).is_some());
}
