//! Many processes want one lock, while leaders are killed, holders are paused beyond their lease,
//! and some who wait are killed.
//!
//! Who has the lock raises a counter in a session, by reading it and writing it back under the
//! fence of the lock. No write is on condition of a version: the lock is all that keeps two from
//! raising it to the same value. A holder that was paused writes once more when somebody else has
//! the lock; that must be refused, and its command be ended when it goes on.
//!
//! An observer reads the lock all the time. Who was seen in line before somebody else must have
//! been served before him.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quorate::client::{Client, Error, NewSession, SessionId, Update};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::cluster::{Cluster, Patience, ended, eventually, quorate};
use crate::random::size;

const LOCK: &str = "counter";
/// Outlives an election that begins right before a renewal.
const TTL: &str = "3s";
/// One holder in so many is paused.
const PAUSED: u64 = 10;
/// One contender in so many is killed before its turn is over.
const KILLED: u64 = 15;
/// How often a holder raises the counter.
const RAISES: usize = 2;
/// Told its token, the test does the work; the command ends when it may.
const SCRIPT: &str = "echo $QUORATE_FENCING_TOKEN; read line";
/// Long enough for any election, so that a write's outcome gets known.
const PATIENT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_contended_lock_protects_a_counter_through_kills_and_pauses() {
    contend(size("QUORATE_TEST_CONTENDERS", 8), 2, Pace::Turns(14)).await;
}

#[tokio::test]
#[ignore = "soak: fifty processes contend for a minute"]
async fn a_lock_that_fifty_want_protects_a_counter_through_kills_and_pauses() {
    let contenders = size("QUORATE_TEST_CONTENDERS", 50);
    contend(contenders, 6, Pace::Time(Duration::from_secs(10))).await;
}

/// What lies between two kills of the leader.
#[derive(Clone, Copy)]
enum Pace {
    Turns(u64),
    Time(Duration),
}

/// One contender's turn that came to be.
#[derive(Debug)]
struct Turn {
    owner: String,
    token: u64,
    /// Values that the counter was raised to, with the versions of that.
    raised: Vec<(u64, u64)>,
    /// Whether nobody knows what became of the last write.
    is_unknown: bool,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Released,
    /// Paused by the test beyond its lease.
    Paused,
    /// Killed by the test.
    Killed,
    /// Lost although it did all it could: the machine was too slow to renew.
    Lost,
}

/// What all contenders share.
struct Contest {
    client: Client,
    addresses: String,
    counter: SessionId,
    stop: AtomicBool,
    began: AtomicU64,
    /// Contenders that lost their lease while they waited.
    lost: AtomicU64,
    killed: AtomicU64,
    granted: AtomicU64,
    /// Each line that was seen: the holder's token, and the owners who waited.
    lines: Mutex<BTreeSet<(u64, Vec<String>)>>,
}

async fn contend(contenders: u64, kills: usize, pace: Pace) {
    let mut cluster = Cluster::start("contention").await;
    let client = cluster.client_within(PATIENT);
    let counter = client.sessions().create(NewSession::new().attribute("n", "0")).await.unwrap();
    let contest = Arc::new(Contest {
        client,
        addresses: cluster.addresses().join(","),
        counter: counter.id,
        stop: AtomicBool::new(false),
        began: AtomicU64::new(0),
        lost: AtomicU64::new(0),
        killed: AtomicU64::new(0),
        granted: AtomicU64::new(0),
        lines: Mutex::default(),
    });
    let observing = tokio::spawn(contest.clone().observe());
    let mut contending = JoinSet::new();
    for contender in 0..contenders {
        contending.spawn(contest.clone().run(contender));
    }
    for _ in 0..kills {
        contest.pass(pace, &mut contending).await;
        let leader = cluster.leader().await;
        cluster.kill(leader);
        cluster.leader_other_than(leader).await;
        cluster.spawn(leader);
        cluster.serving(leader).await;
    }
    contest.pass(pace, &mut contending).await;
    contest.stop.store(true, Ordering::Relaxed);
    let turns: Vec<Turn> = ended(contending).await.into_iter().flatten().collect();
    observing.await.unwrap();
    contest.check(&turns).await;
    eventually("nobody has the lock or waits for it", async || {
        match contest.client.locks().get(LOCK, 10).await {
            Err(Error::NotFound { .. }) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    cluster.agree().await;
}

impl Contest {
    /// Lets the contest go on for so long, as long as it does.
    async fn pass(&self, pace: Pace, contending: &mut JoinSet<Vec<Turn>>) {
        let (start, before) = (Instant::now(), self.granted.load(Ordering::Relaxed));
        eventually("the contest goes on", async || {
            if let Some(ended) = contending.try_join_next() {
                panic!("a contender ended: {:?}", ended.err());
            }
            let turns = self.granted.load(Ordering::Relaxed) - before;
            let is_over = match pace {
                Pace::Turns(least) => turns >= least,
                Pace::Time(length) => turns > 0 && start.elapsed() >= length,
            };
            if is_over { Ok(()) } else { Err(format!("{turns} turns")) }
        })
        .await;
    }

    /// Notes who waits in which order, until the contest is over.
    async fn observe(self: Arc<Self>) {
        while !self.stop.load(Ordering::Relaxed) {
            if let Ok(found) = self.client.locks().get(LOCK, 1_000).await {
                let holder = found.value.holders.first().map_or(0, |holder| holder.token);
                let owners = found.value.waiters.into_iter().map(|waiter| waiter.owner).collect();
                self.lines.lock().unwrap().insert((holder, owners));
            }
            Patience::new().pause("the contest ends", "it goes on").await;
        }
    }

    /// Turn by turn, each by a process of its own.
    async fn run(self: Arc<Self>, contender: u64) -> Vec<Turn> {
        let mut turns = Vec::new();
        let mut number = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let owner = format!("{contender}/{number}");
            let is_killed = self.began.fetch_add(1, Ordering::Relaxed) % KILLED == KILLED - 1;
            turns.extend(Contender::start(&self, owner).turn(&self, is_killed).await);
            number += 1;
        }
        turns
    }

    /// What is true of all turns together.
    async fn check(&self, turns: &[Turn]) {
        let count = |end: End| turns.iter().filter(|turn| turn.end == end).count();
        let unknown = turns.iter().filter(|turn| turn.is_unknown).count() as u64;
        let (paused, killed) = (count(End::Paused), self.killed.load(Ordering::Relaxed));
        let lost = count(End::Lost) + self.lost.load(Ordering::Relaxed) as usize;
        println!(
            "{} turns: {paused} paused, {killed} killed, {lost} lost by slowness; \
             {unknown} unknown",
            turns.len()
        );
        assert!(paused > 0 && killed > 0 && count(End::Released) > 0);
        assert!(lost * 10 <= turns.len(), "too slow to show anything: {lost} were lost");

        // One holder after the other: values, versions and tokens grow together.
        let mut history: Vec<(u64, u64, u64)> = Vec::new();
        for turn in turns {
            history
                .extend(turn.raised.iter().map(|(value, version)| (*version, *value, turn.token)));
        }
        history.sort_unstable();
        let grows = |pair: &[(u64, u64, u64)]| pair[0].1 < pair[1].1 && pair[0].2 <= pair[1].2;
        let wrong = history.windows(2).find(|pair| !grows(pair));
        assert!(wrong.is_none(), "(version, value, token): {wrong:?}");
        let found = self.value().await;
        let raised = history.len() as u64;
        assert!(
            (raised..=raised + unknown).contains(&found),
            "the counter is {found} after {raised} that were acknowledged and {unknown} unknown"
        );
        self.check_order(turns);
    }

    /// Those who were seen in line were served in that order.
    fn check_order(&self, turns: &[Turn]) {
        let tokens: BTreeMap<&str, u64> =
            turns.iter().map(|turn| (&*turn.owner, turn.token)).collect();
        assert_eq!(tokens.len(), turns.len());
        let (lines, mut compared) = (self.lines.lock().unwrap(), 0);
        for (holder, owners) in &*lines {
            let served: Vec<(&str, u64)> = owners
                .iter()
                .filter_map(|o| tokens.get_key_value(&**o))
                .map(|(o, t)| (*o, *t))
                .collect();
            compared += served.len().saturating_sub(1);
            assert!(served.is_sorted_by_key(|(_, token)| *token), "not in order: {served:?}");
            let first = served.first().map_or(u64::MAX, |(_, token)| *token);
            assert!(first > *holder, "{served:?} waited for {holder}");
        }
        println!("{} lines seen, {compared} neighbours compared", lines.len());
        assert!(compared > 0);
    }

    fn has_seen(&self, owner: &String) -> bool {
        self.lines.lock().unwrap().iter().any(|(_, owners)| owners.contains(owner))
    }

    /// The token that has the lock.
    async fn holder(&self) -> Option<u64> {
        match self.client.locks().get(LOCK, 1).await {
            Ok(found) => found.value.holders.first().map(|holder| holder.token),
            Err(Error::NotFound { .. }) => None,
            Err(error) => panic!("{error:?}"),
        }
    }

    async fn value(&self) -> u64 {
        let session = self.client.sessions().get(&self.counter).await.unwrap();
        std::str::from_utf8(&session.attributes["n"]).unwrap().parse().unwrap()
    }

    /// Writes a value, under the fence.
    async fn write(&self, value: u64, token: u64) -> Result<u64, Error> {
        let update = Update::new().set("n", value.to_string()).fence(LOCK, token);
        Ok(self.client.sessions().update(&self.counter, update).await?.version)
    }
}

/// A process that wants the lock.
struct Contender {
    owner: String,
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Contender {
    fn start(contest: &Contest, owner: String) -> Self {
        let mut command = Command::from(quorate());
        command.arg(format!("--endpoints={}", contest.addresses));
        command.args(["lock", "exec", LOCK, "--wait=5m", "--timeout=30s"]);
        command.args([format!("--ttl={TTL}"), format!("--owner={owner}")]);
        command.args(["--", "/bin/sh", "-c", SCRIPT]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { owner, child, output }
    }

    /// Takes its turn, if it comes to one.
    async fn turn(mut self, contest: &Contest, is_killed: bool) -> Option<Turn> {
        if is_killed {
            self.seen(contest).await;
            self.child.kill().await.unwrap();
            contest.killed.fetch_add(1, Ordering::Relaxed);
        }
        let mut line = String::new();
        self.output.read_line(&mut line).await.unwrap();
        let Ok(token) = line.trim_end().parse() else {
            let (code, stderr) = self.ended().await;
            let is_lost = code == Some(75) && stderr.contains("could not be renewed in time");
            assert!(is_killed || is_lost, "{code:?}: {stderr}");
            contest.lost.fetch_add(u64::from(is_lost), Ordering::Relaxed);
            return None;
        };
        let owner = std::mem::take(&mut self.owner);
        let mut turn = Turn { owner, token, raised: vec![], is_unknown: false, end: End::Killed };
        let granted = contest.granted.fetch_add(1, Ordering::Relaxed);
        if !is_killed {
            self.work(contest, &mut turn).await;
            if granted % PAUSED == PAUSED - 1 {
                self.pause(contest, &mut turn).await;
            } else {
                self.release(&mut turn).await;
            }
        }
        Some(turn)
    }

    /// Waits until it has been seen in line, or has had its turn.
    async fn seen(&self, contest: &Contest) {
        let patience = Patience::new();
        while !contest.stop.load(Ordering::Relaxed) && !contest.has_seen(&self.owner) {
            patience.pause("the contender is in line", &self.owner).await;
        }
    }

    /// Raises the counter, for as long as that is allowed.
    async fn work(&self, contest: &Contest, turn: &mut Turn) {
        for _ in 0..RAISES {
            let value = contest.value().await + 1;
            match contest.write(value, turn.token).await {
                Ok(version) => turn.raised.push((value, version)),
                Err(Error::Fenced { .. }) => return,
                // It may come true until the lock has been given back.
                Err(Error::OutcomeUnknown { .. }) => {
                    turn.is_unknown = true;
                    return;
                }
                Err(error) => panic!("{error:?}"),
            }
        }
    }

    /// Stops the process until others have had the lock; what it then still writes is refused.
    async fn pause(mut self, contest: &Contest, turn: &mut Turn) {
        turn.end = End::Paused;
        let value = contest.value().await + 1;
        let pid = Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap()).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        let patience = Patience::new();
        while contest.holder().await == Some(turn.token) {
            patience.pause("the lock is given to the next", &turn.owner).await;
        }
        match contest.write(value, turn.token).await {
            Err(Error::Fenced { .. }) => {}
            written => panic!("token {} still writes: {written:?}", turn.token),
        }
        // Held open, or the command would end by itself.
        let _stdin = self.child.stdin.take();
        kill_process(pid, Signal::CONT).unwrap();
        let (code, stderr) = self.ended().await;
        assert_eq!(code, Some(143), "{stderr}");
        assert!(stderr.contains("the lock is lost"), "{stderr}");
    }

    /// Lets the command end, after which the process gives the lock back.
    async fn release(mut self, turn: &mut Turn) {
        // A command that was stopped does not read any more.
        let _ = self.child.stdin.as_mut().unwrap().write_all(b"\n").await;
        let (code, stderr) = self.ended().await;
        let is_lost = stderr.contains("is lost") || stderr.contains("taken away");
        turn.end = if is_lost { End::Lost } else { End::Released };
        assert!(is_lost || code == Some(0), "{code:?}: {stderr}");
    }

    /// Waits until the process has ended: how, and with which words.
    async fn ended(&mut self) -> (Option<i32>, String) {
        let mut stderr = String::new();
        let mut pipe = self.child.stderr.take().unwrap();
        let ending = async { (self.child.wait().await, pipe.read_to_string(&mut stderr).await) };
        let (status, _) = tokio::time::timeout(crate::cluster::PATIENCE, ending).await.unwrap();
        (status.unwrap().code(), stderr)
    }
}
