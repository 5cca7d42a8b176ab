//! Writers under faults, and the proof that each of their writes happened once or not at all.
//!
//! Every writer has a session of its own, to which it writes numbers that it never uses twice:
//! blindly, or on condition of the version that the last write was acknowledged with. Nobody else
//! writes there, so the version that it finds must be the one that it was told: one that is older
//! is a lost write, one that is newer is a write applied twice. Beside that, all writers raise a
//! few counters by compare-and-set, as locks and carts are changed by many.
//!
//! A write whose outcome is unknown may take effect at any time, once; one that the client calls
//! not applied must never.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use quorate::client::{Client, Error, NewSession, Session, SessionId, Sessions, Update};
use tokio::task::JoinSet;

use crate::cluster::{Cluster, Patience, ended, eventually};
use crate::random::Random;

const COUNTERS: u64 = 4;
/// Some writers wait out an election; others give up and have to live with not knowing.
const PATIENT: Duration = Duration::from_secs(20);
const IMPATIENT: Duration = Duration::from_secs(1);

/// Writers at work.
pub(crate) struct Load {
    counters: Vec<SessionId>,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    writers: JoinSet<Writer>,
}

/// What was acknowledged and what is unknown, once the writers have ended.
pub(crate) struct Report {
    counters: Vec<SessionId>,
    writers: Vec<Writer>,
}

struct Writer {
    sessions: Sessions,
    random: Random,
    own: SessionId,
    counters: Vec<SessionId>,
    /// The last number that was written or tried.
    number: u64,
    /// Number and version that the own session must have, unless a pending write came through.
    known: (u64, u64),
    /// Numbers of writes that may still take effect.
    pending: BTreeSet<u64>,
    /// Revisions of all writes that were acknowledged.
    revisions: Vec<u64>,
    /// By counter: the values that this writer has set, with their versions.
    raised: BTreeMap<usize, Vec<(u64, u64)>>,
    /// By counter: how often nobody knows.
    unknown: BTreeMap<usize, u64>,
}

impl Load {
    pub(crate) async fn start(cluster: &mut Cluster, writers: u64) -> Self {
        let sessions = cluster.client().sessions();
        let mut counters = Vec::new();
        for _ in 0..COUNTERS {
            counters.push(sessions.create(zero()).await.unwrap().id);
        }
        let mut load = Self {
            counters,
            stop: Arc::default(),
            acknowledged: Arc::default(),
            writers: JoinSet::new(),
        };
        for number in 0..writers {
            let timeout = if number % 2 == 0 { PATIENT } else { IMPATIENT };
            let own = sessions.create(zero()).await.unwrap();
            let writer = Writer {
                sessions: cluster.client_within(timeout).sessions(),
                random: cluster.random.fork(),
                own: own.id,
                counters: load.counters.clone(),
                number: 0,
                known: (0, own.version),
                pending: BTreeSet::new(),
                revisions: vec![own.version],
                raised: BTreeMap::new(),
                unknown: BTreeMap::new(),
            };
            let (stop, acknowledged) = (load.stop.clone(), load.acknowledged.clone());
            load.writers.spawn(writer.run(stop, acknowledged));
        }
        load
    }

    /// Waits until so many writes more have been acknowledged.
    pub(crate) async fn progress(&mut self, writes: u64) {
        let before = self.acknowledged.load(Ordering::Relaxed);
        eventually("writes are acknowledged", async || {
            if let Some(ended) = self.writers.try_join_next() {
                panic!("a writer ended: {:?}", ended.err());
            }
            let now = self.acknowledged.load(Ordering::Relaxed);
            if now >= before + writes { Ok(()) } else { Err(format!("{}", now - before)) }
        })
        .await;
    }

    /// Ends the writers, each after the write that it is at.
    pub(crate) async fn finish(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let writers = ended(self.writers).await;
        Report { counters: self.counters, writers }
    }
}

fn zero() -> NewSession {
    NewSession::new().attribute("n", "0")
}

fn number_of(session: &Session) -> u64 {
    std::str::from_utf8(&session.attributes["n"]).unwrap().parse().unwrap()
}

impl Writer {
    async fn run(mut self, stop: Arc<AtomicBool>, acknowledged: Arc<AtomicU64>) -> Self {
        while !stop.load(Ordering::Relaxed) {
            let before = self.revisions.len();
            match self.random.within(0..8) {
                0 => self.look().await,
                1..4 => self.raise().await,
                choice => self.write(choice % 2 == 0).await,
            }
            acknowledged.fetch_add((self.revisions.len() - before) as u64, Ordering::Relaxed);
        }
        self
    }

    /// Writes a new number to the own session.
    async fn write(&mut self, conditional: bool) {
        self.number += 1;
        let mut update = Update::new().set("n", self.number.to_string());
        if conditional {
            update = update.expect_version(self.known.1);
        }
        match self.sessions.update(&self.own, update).await {
            Ok(updated) => {
                assert!(updated.version > self.known.1, "{updated:?}, known {:?}", self.known);
                self.known = (self.number, updated.version);
                self.revisions.push(updated.version);
            }
            Err(Error::VersionMismatch { .. }) if conditional => {
                assert!(
                    !self.pending.is_empty(),
                    "the session is not at version {} of the last acknowledged write, although no \
                     other write is under way: one was lost or applied twice",
                    self.known.1
                );
                self.look().await;
            }
            Err(Error::OutcomeUnknown { .. }) => {
                self.pending.insert(self.number);
                self.look().await;
            }
            // The client promises that it was not and will not be applied.
            Err(Error::Unavailable { .. } | Error::DeadlineExceeded { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }

    /// Reads the own session: what was acknowledged last is there.
    async fn look(&mut self) {
        let session = read(&self.sessions, &self.own).await;
        self.check_own(&session);
    }

    fn check_own(&mut self, session: &Session) {
        let found = (number_of(session), session.version);
        if found == self.known {
            return;
        }
        assert!(
            self.pending.remove(&found.0),
            "found {found:?}, but {:?} was acknowledged last, and unknown are only {:?}",
            self.known,
            self.pending
        );
        assert!(found.1 > self.known.1, "found {found:?}, known {:?}", self.known);
        self.known = found;
    }

    /// Raises a counter by one, unless somebody else is faster.
    async fn raise(&mut self) {
        let index = usize::try_from(self.random.within(0..COUNTERS)).unwrap();
        let id = self.counters[index].clone();
        let session = read(&self.sessions, &id).await;
        let value = number_of(&session) + 1;
        let update = Update::new().set("n", value.to_string()).expect_version(session.version);
        match self.sessions.update(&id, update).await {
            Ok(updated) => {
                self.revisions.push(updated.version);
                self.raised.entry(index).or_default().push((value, updated.version));
            }
            Err(Error::OutcomeUnknown { .. }) => *self.unknown.entry(index).or_default() += 1,
            Err(
                Error::VersionMismatch { .. }
                | Error::Unavailable { .. }
                | Error::DeadlineExceeded { .. },
            ) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// A linearizable read, repeated until there is an answer.
async fn read(sessions: &Sessions, id: &SessionId) -> Session {
    let patience = Patience::new();
    loop {
        match sessions.get(id).await {
            Ok(session) => return session,
            Err(error @ (Error::Unavailable { .. } | Error::DeadlineExceeded { .. })) => {
                patience.pause("a session is read", &error.to_string()).await;
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

impl Report {
    /// Sees that everything acknowledged is there, through every node, and nothing twice.
    pub(crate) async fn check(mut self, cluster: &Cluster) {
        let acknowledged: usize = self.writers.iter().map(|writer| writer.revisions.len()).sum();
        let unknown: u64 = self.writers.iter().flat_map(|writer| writer.unknown.values()).sum();
        let pending: usize = self.writers.iter().map(|writer| writer.pending.len()).sum();
        println!("{acknowledged} writes acknowledged, {} unknown", unknown as usize + pending);
        let revisions: BTreeSet<u64> =
            self.writers.iter().flat_map(|writer| &writer.revisions).copied().collect();
        assert_eq!(revisions.len(), acknowledged, "two writes were given one revision");
        for id in cluster.ids() {
            let client = Client::builder().endpoints([cluster.address(id)]).build().unwrap();
            let sessions = client.sessions();
            for writer in &mut self.writers {
                let session = read(&sessions, &writer.own).await;
                writer.check_own(&session);
            }
            for index in 0..self.counters.len() {
                let session = read(&sessions, &self.counters[index]).await;
                self.check_counter(index, &session);
            }
        }
    }

    fn check_counter(&self, index: usize, session: &Session) {
        let raised = self.writers.iter().filter_map(|writer| writer.raised.get(&index)).flatten();
        let mut versions = BTreeMap::new();
        for (value, version) in raised {
            let twice = versions.insert(*value, *version);
            assert!(twice.is_none(), "counter {index} was raised to {value} twice");
        }
        assert!(versions.values().is_sorted(), "counter {index} went back: {versions:?}");
        let unknown: u64 =
            self.writers.iter().filter_map(|writer| writer.unknown.get(&index)).sum();
        let (found, acknowledged) = (number_of(session), versions.len() as u64);
        assert!(
            (acknowledged..=acknowledged + unknown).contains(&found),
            "counter {index} is {found} after {acknowledged} acknowledged and {unknown} unknown"
        );
        if let Some((value, version)) = versions.last_key_value() {
            assert!(found >= *value, "counter {index} is {found}, {value} was acknowledged");
            assert!(session.version >= *version, "counter {index} is older than acknowledged");
        }
    }
}
