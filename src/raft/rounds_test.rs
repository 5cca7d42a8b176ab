//! No read is forgotten, and none is answered before it may be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use super::leadership::{Route, View};
use super::rounds::{Action, BarrierError, Outlook, Progress, Reader, Rounds, Sleep};
use super::types::{Member, log_id};
use crate::limits::{BARRIERS_IN_FLIGHT_MAX, READS_PENDING_MAX};

const OWN: u64 = 1;
const OTHER: u64 = 2;
const TERM: u64 = 7;

type Answers = Arc<Mutex<BTreeMap<u64, Result<u64, BarrierError>>>>;

/// A node's rounds, and a task beside them that sleeps exactly as it is allowed to.
struct World {
    rounds: Rounds,
    now: Duration,
    route: Route,
    term: u64,
    own_term: u64,
    applied: (u64, u64),
    announced_next: u64,
    sleep: Sleep,
    /// Questions under way: the round, and the voter or leader that was asked.
    questions: Vec<(u64, u64)>,
    answers: Answers,
    readers: u64,
}

impl World {
    fn new(route: Route) -> Self {
        let mut world = Self {
            rounds: Rounds::new(OWN),
            now: Duration::from_secs(1),
            route,
            term: TERM,
            own_term: TERM,
            applied: (TERM, 5),
            announced_next: 0,
            sleep: Sleep::default(),
            questions: Vec::new(),
            answers: Answers::default(),
            readers: 0,
        };
        world.step();
        world
    }

    fn leading() -> Self {
        Self::new(Route::Local)
    }

    fn following() -> Self {
        Self::new(Route::Remote(OTHER, Member::default()))
    }

    fn progress(&self) -> Progress {
        Progress { now: self.now, last_applied: Some(log_id(self.applied.0, self.applied.1)) }
    }

    fn step(&mut self) {
        let view = Arc::new(View {
            route: self.route.clone(),
            term: if self.route == Route::Local { self.term } else { 0 },
            voters: vec![BTreeSet::from([1, 2, 3])],
            peers: vec![(2, Member::default()), (3, Member::default())],
        });
        let announced_next = self.announced_next;
        let outlook = Outlook { progress: self.progress(), view, announced_next };
        let (actions, sleep) = self.rounds.step(&outlook);
        self.sleep = sleep;
        self.perform(actions);
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Answer(readers, result) => {
                    for reader in readers {
                        (reader.passed)(result);
                    }
                }
                Action::AskVoters { round, view } => {
                    self.questions.extend(view.peers.iter().map(|(voter, _)| (round, *voter)));
                }
                Action::AskLeader { round, leader, .. } => self.questions.push((round, leader)),
            }
        }
    }

    /// The task steps if it is woken, and only then.
    fn after(&mut self) {
        if self.rounds.wants_a_step() {
            self.step();
        }
    }

    fn join(&mut self, as_leader: bool) -> u64 {
        self.readers += 1;
        let (reader, answers) = (self.readers, self.answers.clone());
        let passed = Box::new(move |result| {
            let before = answers.lock().unwrap().insert(reader, result);
            assert_eq!(before, None, "reader {reader} is answered twice");
        });
        let deadline = self.now + Duration::from_secs(3_600);
        let refused = self.rounds.join(Reader { deadline, as_leader, passed });
        assert!(refused.is_ok());
        self.after();
        reader
    }

    fn answer(&mut self, question: usize, yes: bool, index: u64) {
        let (round, node) = self.questions.remove(question);
        let own_term = Some(self.own_term);
        // Only one of the two is what was asked; the other changes nothing.
        let mut actions = self.rounds.confirmed(round, node, yes, self.progress(), own_term);
        actions.extend(self.rounds.named(round, yes.then_some(index), self.progress()));
        self.after();
        self.perform(actions);
    }

    fn apply(&mut self, index: u64) {
        let changed = index > self.applied.1;
        self.applied = (self.term, self.applied.1.max(index));
        if changed && self.sleep.watches_applied {
            self.step();
        }
    }

    fn pass_time(&mut self, by: Duration) {
        self.now += by;
        if self.sleep.until.is_some_and(|until| until <= self.now) {
            self.step();
        }
    }

    fn lead(&mut self, route: Route) {
        self.route = route;
        self.rounds.leader_changed(&self.route, self.now);
        self.step();
    }

    fn answer_of(&self, reader: u64) -> Option<Result<u64, BarrierError>> {
        self.answers.lock().unwrap().get(&reader).copied()
    }
}

#[test]
fn readers_who_find_no_room_are_served_once_there_is_some() {
    let mut world = World::following();
    let early: Vec<u64> = (0..BARRIERS_IN_FLIGHT_MAX)
        .map(|_| {
            let reader = world.join(false);
            world.answer(0, true, 10);
            reader
        })
        .collect();
    // All places are taken by rounds whose index is not applied yet.
    let late: Vec<u64> = (0..12).map(|_| world.join(false)).collect();
    assert!(world.questions.is_empty());
    world.apply(10);
    for reader in early {
        assert_eq!(world.answer_of(reader), Some(Ok(10)));
    }
    // Nobody else arrives; the late ones are asked for all the same.
    assert_eq!(world.questions.len(), 1);
    world.answer(0, true, 10);
    for reader in late {
        assert_eq!(world.answer_of(reader), Some(Ok(10)));
    }
    assert!(world.rounds.is_idle());
}

#[test]
fn a_leader_shows_what_it_has_told_others_is_committed() {
    let mut world = World::leading();
    world.announced_next = 8;
    let own = world.join(false);
    world.answer(0, true, 0);
    assert_eq!(world.answer_of(own), None, "entry 7 may have been shown by who was told of it");
    world.apply(6);
    assert_eq!(world.answer_of(own), None);
    world.apply(7);
    assert_eq!(world.answer_of(own), Some(Ok(7)));
}

#[test]
fn a_follower_is_told_at_once_what_it_has_to_wait_for() {
    let mut world = World::leading();
    world.announced_next = 8;
    let asked = world.join(true);
    world.answer(0, true, 0);
    assert_eq!(world.answer_of(asked), Some(Ok(7)));
}

#[test]
fn an_index_that_is_named_late_wakes_who_waits_for_it() {
    let mut world = World::following();
    let reader = world.join(false);
    assert!(!world.sleep.watches_applied);
    world.answer(0, true, 6);
    world.apply(6);
    assert_eq!(world.answer_of(reader), Some(Ok(6)));
}

#[test]
fn a_leader_waits_for_an_entry_of_its_term() {
    let mut world = World::leading();
    world.applied = (TERM - 1, 5);
    let reader = world.join(false);
    assert!(world.questions.is_empty());
    world.apply(6);
    world.answer(0, true, 0);
    assert_eq!(world.answer_of(reader), Some(Ok(6)));
}

#[test]
fn a_confirmation_that_comes_after_a_later_vote_does_not_count() {
    let mut world = World::leading();
    let reader = world.join(false);
    world.own_term = TERM + 1;
    world.answer(0, true, 0);
    assert_eq!(world.answer_of(reader), None);
    world.own_term = TERM;
    world.questions.clear();
    world.pass_time(Duration::from_secs(1));
    world.answer(0, true, 0);
    assert_eq!(world.answer_of(reader), Some(Ok(5)));
}

#[test]
fn who_asks_for_a_leader_is_told_that_there_is_another() {
    let mut world = World::following();
    let asked = world.join(true);
    assert_eq!(world.answer_of(asked), Some(Err(BarrierError::NotLeader)));
    assert!(world.rounds.is_idle());
}

#[test]
fn what_an_earlier_leader_was_asked_is_asked_of_the_next() {
    let mut world = World::following();
    let reader = world.join(false);
    world.lead(Route::Unknown);
    world.lead(Route::Remote(3, Member::default()));
    assert_eq!(world.questions.iter().map(|(_, node)| *node).collect::<Vec<_>>(), [OTHER, 3]);
    world.answer(1, true, 5);
    assert_eq!(world.answer_of(reader), Some(Ok(5)));
}

#[test]
fn there_is_a_limit() {
    let mut world = World::new(Route::Unknown);
    for _ in 0..READS_PENDING_MAX {
        world.join(false);
    }
    let reader = Reader {
        deadline: Duration::MAX,
        as_leader: false,
        passed: Box::new(|_| panic!("it is given back")),
    };
    assert!(world.rounds.join(reader).is_err());
}

#[derive(Clone, Debug)]
enum Event {
    Join { as_leader: bool },
    Answer { question: usize, yes: bool, ahead: u64 },
    Lose { question: usize },
    Apply { ahead: u64 },
    Announce { ahead: u64 },
    Pass { millis: u64 },
    Lead { route: usize },
    Expire,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        4 => any::<bool>().prop_map(|as_leader| Event::Join { as_leader }),
        3 => (any::<usize>(), prop::bool::weighted(0.8), 0..4u64)
            .prop_map(|(question, yes, ahead)| Event::Answer { question, yes, ahead }),
        1 => any::<usize>().prop_map(|question| Event::Lose { question }),
        2 => (0..3u64).prop_map(|ahead| Event::Apply { ahead }),
        1 => (0..3u64).prop_map(|ahead| Event::Announce { ahead }),
        2 => (0..400u64).prop_map(|millis| Event::Pass { millis }),
        1 => (0..4usize).prop_map(|route| Event::Lead { route }),
        1 => Just(Event::Expire),
    ];
    prop::collection::vec(event, 1..120)
}

fn route(number: usize) -> Route {
    match number {
        0 => Route::Local,
        1 => Route::Unknown,
        other => Route::Remote(other as u64, Member::default()),
    }
}

fn happen(world: &mut World, event: &Event) {
    let questions = world.questions.len();
    match *event {
        Event::Join { as_leader } => drop(world.join(as_leader)),
        Event::Answer { question, yes, ahead } if questions > 0 => {
            let index = world.applied.1 + ahead;
            world.answer(question % questions, yes, index);
        }
        Event::Lose { question } if questions > 0 => {
            world.questions.remove(question % questions);
        }
        Event::Answer { .. } | Event::Lose { .. } => {}
        Event::Apply { ahead } => world.apply(world.applied.1 + ahead),
        Event::Announce { ahead } => {
            world.announced_next = world.announced_next.max(world.applied.1 + 1 + ahead);
        }
        Event::Pass { millis } => world.pass_time(Duration::from_millis(millis)),
        Event::Lead { route: number } => world.lead(route(number)),
        Event::Expire => expire(world),
    }
}

fn expire(world: &mut World) {
    let actions = world.rounds.expire(world.now);
    world.after();
    world.perform(actions);
}

proptest! {
    /// Whatever happens in whatever order: once there is a leader again, questions are answered
    /// and entries applied, everybody is served, though the task sleeps whenever it may.
    #[test]
    fn nobody_is_forgotten(events in events(), leads in any::<bool>()) {
        let mut world = World::leading();
        for event in &events {
            happen(&mut world, event);
        }
        world.lead(route(if leads { 0 } else { 2 }));
        for _ in 0..50 {
            world.apply(world.applied.1 + 3);
            while !world.questions.is_empty() {
                let index = world.applied.1;
                world.answer(0, true, index);
            }
            world.pass_time(Duration::from_millis(600));
            expire(&mut world);
        }
        let answers = world.answers.lock().unwrap().len() as u64;
        prop_assert_eq!(answers, world.readers);
        prop_assert!(world.rounds.is_idle());
    }
}
