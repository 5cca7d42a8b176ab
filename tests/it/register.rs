//! Sessions as registers: what clients saw, under kills and pauses, could have happened one
//! after the other, each request between its beginning and its end.
//!
//! No search is needed to check that, because every write is told its revision: that is the order.
//! A read must show a version that no acknowledged one before its beginning exceeds, of a write
//! that had begun before its end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use quorate::client::{Error, NewSession, SessionId, Sessions, Update};
use tokio::task::JoinSet;
use tonic::Code;

use crate::cluster::{Cluster, Patience, ended, eventually};
use crate::direct::{Direct, is_transient};
use crate::random::{Random, size};

const REGISTERS: usize = 4;
const CLIENTS: u64 = 8;

#[tokio::test]
async fn sessions_are_linearizable_under_kills_and_pauses() {
    faults(size("QUORATE_TEST_FAULTS", 4)).await;
}

#[tokio::test]
#[ignore = "soak: forty faults take minutes"]
async fn sessions_are_linearizable_under_many_kills_and_pauses() {
    faults(size("QUORATE_TEST_FAULTS", 40)).await;
}

/// A moment: earlier ones are smaller, and nothing else is known of them.
type Moment = u64;

#[derive(Clone, Debug)]
struct Event {
    register: usize,
    begin: Moment,
    end: Moment,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    /// Number and version that were found.
    Read(u64, u64),
    /// There was no session.
    Gone,
    /// The number that was written, on condition of a version, and the new version unless unknown.
    Write { number: u64, expected: Option<u64>, version: Option<u64> },
    /// It was deleted; `false` if that is unknown.
    Delete(bool),
}

struct Player {
    sessions: Sessions,
    directs: Vec<Direct>,
    registers: Vec<SessionId>,
    random: Random,
    clock: Arc<AtomicU64>,
    numbers: Arc<AtomicU64>,
    /// By register: the version that was seen last.
    seen: Vec<u64>,
    events: Vec<Event>,
}

async fn faults(count: u64) {
    let mut cluster = Cluster::start("register").await;
    let sessions = cluster.client().sessions();
    let mut registers = Vec::new();
    let mut versions = Vec::new();
    for _ in 0..REGISTERS {
        let created = sessions.create(NewSession::new().attribute("n", "0")).await.unwrap();
        registers.push(created.id);
        versions.push(created.version);
    }
    let (clock, numbers) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicU64::new(1)));
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut players = JoinSet::new();
    for number in 0..CLIENTS {
        let timeout = Duration::from_secs(if number % 2 == 0 { 1 } else { 15 });
        let player = Player {
            sessions: cluster.client_within(timeout).sessions(),
            directs: cluster.ids().into_iter().map(|id| cluster.direct(id)).collect(),
            registers: registers.clone(),
            random: cluster.random.fork(),
            clock: clock.clone(),
            numbers: numbers.clone(),
            seen: versions.clone(),
            events: Vec::new(),
        };
        players.spawn(player.play(stop.clone(), done.clone()));
    }
    for _ in 0..count {
        progress(&mut players, &done, 200).await;
        disturb(&mut cluster, &mut players, &done).await;
    }
    // The last thing that happens to each register is its end, under the eyes of all.
    let mut events = Vec::new();
    for (register, id) in registers.iter().enumerate() {
        let begin = clock.fetch_add(1, Ordering::SeqCst);
        let patience = Patience::new();
        loop {
            match sessions.delete(id).await {
                Ok(_) => break,
                Err(Error::NotFound { .. }) => break,
                Err(error) => patience.pause("it is deleted", &error.to_string()).await,
            }
        }
        let end = clock.fetch_add(1, Ordering::SeqCst);
        events.push(Event { register, begin, end, what: What::Delete(true) });
    }
    progress(&mut players, &done, 100).await;
    stop.store(true, Ordering::Relaxed);
    events.extend(ended(players).await.into_iter().flatten());
    for (register, version) in versions.into_iter().enumerate() {
        let events: Vec<Event> =
            events.iter().filter(|event| event.register == register).cloned().collect();
        println!("register {register}: {} events", events.len());
        check(version, &events);
    }
    cluster.agree().await;
}

async fn progress(players: &mut JoinSet<Vec<Event>>, done: &AtomicU64, count: u64) {
    let before = done.load(Ordering::Relaxed);
    eventually("clients get answers", async || {
        if let Some(ended) = players.try_join_next() {
            panic!("a client ended: {:?}", ended.err());
        }
        let now = done.load(Ordering::Relaxed);
        if now >= before + count { Ok(()) } else { Err(format!("{}", now - before)) }
    })
    .await;
}

/// Kills or pauses a node, often the leader, and heals the cluster again.
async fn disturb(cluster: &mut Cluster, players: &mut JoinSet<Vec<Event>>, done: &AtomicU64) {
    let leader = cluster.leader().await;
    let anybody = *cluster.random.choose(&cluster.ids());
    let victim = if cluster.random.within(0..3) == 0 { anybody } else { leader };
    if cluster.random.within(0..2) == 0 {
        cluster.kill(victim);
        progress(players, done, 100).await;
        cluster.spawn(victim);
    } else {
        cluster.pause(victim);
        // Not by the number of answers: reads that wait at the paused node hold up the clients.
        cluster.leader_other_than(victim).await;
        cluster.resume(victim);
    }
    cluster.all_serving().await;
}

impl Player {
    fn now(&self) -> Moment {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    async fn play(mut self, stop: Arc<AtomicBool>, done: Arc<AtomicU64>) -> Vec<Event> {
        while !stop.load(Ordering::Relaxed) {
            let register = usize::try_from(self.random.within(0..REGISTERS as u64)).unwrap();
            let begin = self.now();
            let what = match self.random.within(0..4) {
                0 => self.write(register, false).await,
                1 => self.write(register, true).await,
                2 => self.read_through_client(register).await,
                _ => self.read_through_node(register).await,
            };
            let end = self.now();
            if let Some(what) = what {
                self.events.push(Event { register, begin, end, what });
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.events
    }

    async fn write(&mut self, register: usize, conditional: bool) -> Option<What> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let mut update = Update::new().set("n", number.to_string());
        let expected = conditional.then_some(self.seen[register]);
        if let Some(version) = expected {
            update = update.expect_version(version);
        }
        match self.sessions.update(&self.registers[register], update).await {
            Ok(updated) => {
                self.seen[register] = updated.version;
                Some(What::Write { number, expected, version: Some(updated.version) })
            }
            Err(Error::OutcomeUnknown { .. }) => {
                Some(What::Write { number, expected, version: None })
            }
            Err(Error::NotFound { .. }) => Some(What::Gone),
            Err(
                Error::VersionMismatch { .. }
                | Error::Unavailable { .. }
                | Error::DeadlineExceeded { .. },
            ) => None,
            Err(error) => panic!("{error:?}"),
        }
    }

    async fn read_through_client(&mut self, register: usize) -> Option<What> {
        match self.sessions.get(&self.registers[register]).await {
            Ok(session) => {
                self.seen[register] = session.version;
                Some(What::Read(parse(&session.attributes["n"]), session.version))
            }
            Err(Error::NotFound { .. }) => Some(What::Gone),
            Err(Error::Unavailable { .. } | Error::DeadlineExceeded { .. }) => None,
            Err(error) => panic!("{error:?}"),
        }
    }

    async fn read_through_node(&mut self, register: usize) -> Option<What> {
        let direct = self.random.choose(&self.directs);
        match direct.get(&self.registers[register]).await {
            Ok(found) => {
                let session = found.session.unwrap();
                self.seen[register] = session.version;
                Some(What::Read(parse(&session.attributes["n"]), session.version))
            }
            Err(status) if status.code() == Code::NotFound => Some(What::Gone),
            Err(status) => {
                assert!(is_transient(&status), "{status:?}");
                None
            }
        }
    }
}

fn parse(value: &[u8]) -> u64 {
    std::str::from_utf8(value).unwrap().parse().unwrap()
}

/// Sees that the events of one register have an order, given the version it was created with.
fn check(created: u64, events: &[Event]) {
    // Which write made which version, by acknowledgement or by what was read.
    let mut numbers = BTreeMap::from([(created, 0)]);
    let mut writes = BTreeMap::new();
    for event in events {
        if let What::Write { number, expected, version } = event.what {
            writes.insert(number, (event, expected));
            if let Some(version) = version {
                let other = numbers.insert(version, number);
                assert!(other.is_none(), "version {version} was made by {other:?} and {number}");
            }
        }
    }
    for event in events {
        if let What::Read(number, version) = event.what {
            let made = *numbers.entry(version).or_insert(number);
            assert_eq!(made, number, "two values of version {version}: {event:?}");
        }
    }
    check_writes(&numbers, &writes);
    check_order(created, &numbers, &writes, events);
}

/// Each version was made by one write, which applied once, on the version that it expected.
fn check_writes(numbers: &BTreeMap<u64, u64>, writes: &BTreeMap<u64, (&Event, Option<u64>)>) {
    let mut applied = BTreeSet::new();
    let mut before = None;
    for (version, number) in numbers {
        assert!(applied.insert(number), "{number} was applied twice, at last as {version}");
        if let Some((event, expected)) = writes.get(number) {
            // Versions that nobody saw may lie between, so only what is known can contradict.
            if let (Some(expected), Some(before)) = (expected, before) {
                assert!(before <= *expected, "{event:?} was applied although {before} was there");
            }
        } else {
            assert_eq!(*number, 0, "version {version} holds {number}, which nobody wrote");
        }
        before = Some(*version);
    }
}

fn check_order(
    created: u64,
    numbers: &BTreeMap<u64, u64>,
    writes: &BTreeMap<u64, (&Event, Option<u64>)>,
    events: &[Event],
) {
    // By their ends: the highest version that is known to be in force, and since when.
    let mut known: Vec<(Moment, u64)> = vec![(0, created)];
    let mut ended: Vec<Moment> = Vec::new();
    for event in events {
        match event.what {
            What::Read(_, version) | What::Write { version: Some(version), .. } => {
                known.push((event.end, version));
            }
            What::Delete(true) | What::Gone => ended.push(event.end),
            _ => {}
        }
    }
    known.sort_unstable();
    let mut highest = 0;
    for (_, version) in &mut known {
        highest = highest.max(*version);
        *version = highest;
    }
    let first_end = ended.into_iter().min().unwrap_or(Moment::MAX);
    let deletion = events.iter().filter(|event| matches!(event.what, What::Delete(_)));
    let first_delete = deletion.map(|event| event.begin).min().unwrap_or(Moment::MAX);
    for event in events {
        let at = known.partition_point(|(end, _)| *end < event.begin);
        let floor = known[..at].last().map_or(0, |(_, version)| *version);
        match event.what {
            What::Read(number, version) => {
                assert!(version >= floor, "stale: {event:?} after {floor} was known");
                assert_eq!(numbers[&version], number);
                if let Some((write, _)) = writes.get(&number) {
                    assert!(write.begin < event.end, "{event:?} shows what was written later");
                }
                assert!(event.begin < first_end, "{event:?} after it was known to be gone");
            }
            What::Write { version: Some(version), .. } => {
                assert!(version > floor, "{event:?} does not follow {floor}");
                assert!(event.begin < first_end, "{event:?} after it was known to be gone");
            }
            What::Gone => {
                assert!(event.end > first_delete, "{event:?} before anybody deleted it");
            }
            What::Write { version: None, .. } | What::Delete(_) => {}
        }
    }
}

/// Events that cannot have happened are told from those that can.
#[test]
fn the_checker_sees_what_is_wrong() {
    let event = |begin, end, what| Event { register: 0, begin, end, what };
    let write = |number, expected, version| What::Write { number, expected, version };
    let good = [
        event(1, 2, write(1, None, Some(11))),
        event(3, 9, write(2, Some(11), None)),
        event(4, 5, What::Read(1, 11)),
        event(6, 7, What::Read(2, 12)),
        event(10, 12, What::Delete(true)),
        event(11, 13, What::Gone),
    ];
    check(10, &good);
    let bad = [
        ("stale", event(3, 4, What::Read(0, 10))),
        ("from the future", event(0, 1, What::Read(2, 12))),
        ("two values of a version", event(6, 8, What::Read(1, 12))),
        ("older than the last", event(8, 9, What::Read(1, 11))),
        ("never written", event(8, 9, What::Read(7, 13))),
        ("applied twice", event(8, 9, What::Read(1, 14))),
        ("not on what it expected", event(8, 9, write(8, Some(11), Some(20)))),
        ("given an old version", event(8, 9, write(8, None, Some(11)))),
        ("gone before its end", event(8, 9, What::Gone)),
        ("back from the dead", event(14, 15, What::Read(2, 12))),
        ("changed after its end", event(14, 15, write(9, None, Some(30)))),
    ];
    for (what, event) in bad {
        let events: Vec<Event> = good.iter().cloned().chain([event]).collect();
        let result = std::panic::catch_unwind(|| check(10, &events));
        assert!(result.is_err(), "{what} was not seen");
    }
}
