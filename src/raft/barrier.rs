//! Read barriers: when may a read of the local state be called linearizable?
//!
//! ReadIndex (Ongaro's thesis, §6.4), with a confirmation of our own. A leader that has applied an
//! entry of its own term has applied every write acknowledged before; it only has to know that
//! nobody else leads. So it asks the voters whether they have voted for anybody after its term. A
//! majority that has not, asked after the read began, means that nobody had been elected by then.
//! openraft's own barrier also counts replication answers, and dates an answer by the newest
//! empty append under way rather than by the one that it answers; a leader that was stopped and
//! resumed could take an old answer for a new one.
//!
//! - A read joins only a round that has not been sent yet.
//! - A round confirms the term in which it began, and only if this node's own vote is still of
//!   that term when the last confirmation arrives.
//! - A round on a follower is a question to the leader; its answer is the log index that this
//!   node has to apply first.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::clock::ClusterClock;
use super::exchange::{Exchanges, Lost};
use super::leadership::{Leadership, Route, View};
use super::log::LogStore;
use super::machine::Core;
use super::sweeper::Sweeper;
use super::types::Member;
use crate::limits::{BARRIERS_IN_FLIGHT_MAX, READS_PENDING_MAX};
use crate::proto::peer;
use crate::proto::peer::exchange_request::Request as Question;
use crate::proto::peer::exchange_response::Response as Answer;

/// A round that has not been answered for so long has failed; its reads join another.
const ROUND_TIMEOUT: Duration = Duration::from_millis(500);
/// Pause before reads whose round failed begin another, if nothing changes sooner.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// Why a read was not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BarrierError {
    #[error("the node has as many reads waiting as it can hold")]
    Overloaded,
    #[error("no majority confirmed a leader in time")]
    NoLeader,
    #[error("this node does not lead")]
    NotLeader,
}

/// Called with the log index that is (for a local read) or has to be (for a follower's) applied.
pub(crate) type Passed = Box<dyn FnOnce(Result<u64, BarrierError>) + Send>;

struct Reader {
    /// Local monotonic time.
    deadline: Duration,
    /// Whether only a leader may answer: a follower asks.
    as_leader: bool,
    passed: Passed,
}

struct Round {
    readers: Vec<Reader>,
    gives_up: Duration,
    stage: Stage,
}

/// What a round waits for.
enum Stage {
    /// On a leader: that enough voters confirm its term.
    Confirmed(Confirmation),
    /// On a follower: that this leader names a log index.
    Named(u64),
    /// On a follower: that this node has applied the log up to this index.
    Applied(u64),
}

struct Confirmation {
    term: u64,
    /// Next index at which a read is linearizable once the term is confirmed.
    next_index: u64,
    view: Arc<View>,
    confirmed: BTreeSet<u64>,
    outstanding: usize,
}

impl Confirmation {
    fn has_majority(&self) -> bool {
        self.view
            .voters
            .iter()
            .all(|voters| 2 * voters.intersection(&self.confirmed).count() > voters.len())
    }
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Reader>,
    rounds: HashMap<u64, Round>,
    last_round: u64,
    under_way: usize,
    not_before: Duration,
}

pub(crate) struct Barriers {
    own_id: u64,
    queue: Mutex<Queue>,
    arrived: Notify,
    core: Arc<Core>,
    log: LogStore,
    leadership: Arc<Leadership>,
    exchanges: Arc<Exchanges>,
    clock: Arc<ClusterClock>,
    sweeper: Arc<Sweeper>,
    flush_commits: Arc<Notify>,
}

/// What barriers work with.
pub(crate) struct BarrierParts {
    pub(crate) own_id: u64,
    pub(crate) core: Arc<Core>,
    pub(crate) log: LogStore,
    pub(crate) leadership: Arc<Leadership>,
    pub(crate) exchanges: Arc<Exchanges>,
    pub(crate) clock: Arc<ClusterClock>,
    pub(crate) sweeper: Arc<Sweeper>,
    pub(crate) flush_commits: Arc<Notify>,
}

impl Barriers {
    pub(crate) fn new(parts: BarrierParts) -> Arc<Self> {
        let BarrierParts {
            own_id,
            core,
            log,
            leadership,
            exchanges,
            clock,
            sweeper,
            flush_commits,
        } = parts;
        Arc::new(Self {
            own_id,
            queue: Mutex::default(),
            arrived: Notify::new(),
            core,
            log,
            leadership,
            exchanges,
            clock,
            sweeper,
            flush_commits,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `passed` once a read of the local state reflects everything acknowledged before now,
    /// or by the deadline (local monotonic time) with an error.
    pub(crate) fn wait(&self, deadline: Duration, passed: Passed) {
        self.join(Reader { deadline, as_leader: false, passed });
    }

    /// Like `wait`, for a follower: fails at once if this node does not lead.
    pub(crate) fn wait_as_leader(&self, deadline: Duration, passed: Passed) {
        self.join(Reader { deadline, as_leader: true, passed });
    }

    fn join(&self, reader: Reader) {
        let mut queue = self.lock();
        if queue.waiting.len() + queue.under_way >= READS_PENDING_MAX {
            drop(queue);
            (reader.passed)(Err(BarrierError::Overloaded));
            return;
        }
        queue.waiting.push(reader);
        let first = queue.waiting.len() == 1;
        drop(queue);
        if first {
            self.arrived.notify_one();
            self.sweeper.wake();
        }
    }

    /// Begins rounds for as long as the node lives.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut changes = self.leadership.changes();
        let mut applied = self.core.applied();
        loop {
            let view = self.leadership.view();
            let (waiting, room, not_before) = {
                let queue = self.lock();
                let room = queue.rounds.len() < BARRIERS_IN_FLIGHT_MAX;
                (!queue.waiting.is_empty(), room, queue.not_before)
            };
            let pause = not_before.saturating_sub(self.clock.monotonic());
            let applying = self.settle();
            let mut new_leader = false;
            if waiting && room && pause.is_zero() {
                match &view.route {
                    Route::Local => {
                        if self.begin_as_leader(&view) {
                            continue;
                        }
                        new_leader = true;
                    }
                    Route::Remote(leader, member) => {
                        self.begin_as_follower(*leader, member);
                        continue;
                    }
                    Route::Unknown => {}
                }
            }
            tokio::select! {
                () = self.arrived.notified() => {}
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.lock().not_before = Duration::ZERO;
                    self.take_back();
                }
                // A new leader waits until an entry of its own term is applied.
                _ = applied.changed(), if new_leader || applying => {}
                () = tokio::time::sleep(pause), if waiting && room && !pause.is_zero() => {}
            }
        }
    }

    /// False if this leader has not applied an entry of its term yet.
    fn begin_as_leader(self: &Arc<Self>, view: &Arc<View>) -> bool {
        let Some(last_applied) = self.core.last_applied() else { return false };
        if super::types::term_of(&last_applied) != view.term {
            return false;
        }
        let confirmation = Confirmation {
            term: view.term,
            next_index: last_applied.index + 1,
            view: view.clone(),
            confirmed: BTreeSet::from([self.own_id]),
            outstanding: view.peers.len(),
        };
        let alone = confirmation.has_majority();
        let id = self.open_round(Stage::Confirmed(confirmation), |_| true);
        if alone {
            self.confirmed(id, self.own_id, true);
            return true;
        }
        for (node, member) in &view.peers {
            let (this, node) = (self.clone(), *node);
            let question = Question::Confirm(peer::ExchangeConfirm { term: view.term });
            let answered = move |answer: Result<Answer, Lost>| {
                let confirmed = matches!(answer, Ok(Answer::Confirmed(true)));
                this.confirmed(id, node, confirmed);
            };
            self.exchanges.ask(node, member, question, Box::new(answered));
        }
        true
    }

    fn confirmed(&self, id: u64, node: u64, yes: bool) {
        let mut queue = self.lock();
        let stage = queue.rounds.get_mut(&id).map(|round| &mut round.stage);
        let Some(Stage::Confirmed(confirmation)) = stage else { return };
        if yes {
            confirmation.confirmed.insert(node);
        }
        confirmation.outstanding = confirmation.outstanding.saturating_sub(1);
        let (term, next_index) = (confirmation.term, confirmation.next_index);
        if confirmation.has_majority() {
            let round = queue.close(id);
            drop(queue);
            self.arrived.notify_one();
            if self.log.vote().is_some_and(|vote| vote.leader_id.term == term) {
                pass(round, next_index.saturating_sub(1));
            } else {
                self.retry(round);
            }
        } else if confirmation.outstanding == 0 {
            let round = queue.close(id);
            drop(queue);
            self.retry(round);
        }
    }

    fn begin_as_follower(self: &Arc<Self>, leader: u64, member: &Member) {
        let id = self.open_round(Stage::Named(leader), |reader| !reader.as_leader);
        let this = self.clone();
        let answered = move |answer: Result<Answer, Lost>| {
            if let Ok(Answer::Barrier(index)) = answer {
                this.named(id, index);
            } else {
                let round = this.lock().close(id);
                this.retry(round);
            }
            this.arrived.notify_one();
        };
        let question = Question::Barrier(peer::ExchangeBarrier {});
        self.exchanges.ask(leader, member, question, Box::new(answered));
    }

    /// Opens a round for everybody who waits; those whom it does not serve are turned away.
    fn open_round(&self, stage: Stage, serves: impl Fn(&Reader) -> bool) -> u64 {
        let gives_up = self.clock.monotonic() + ROUND_TIMEOUT;
        let mut queue = self.lock();
        let (readers, refused): (Vec<_>, Vec<_>) =
            std::mem::take(&mut queue.waiting).into_iter().partition(serves);
        queue.last_round += 1;
        let id = queue.last_round;
        queue.under_way += readers.len();
        queue.rounds.insert(id, Round { readers, gives_up, stage });
        drop(queue);
        for reader in refused {
            (reader.passed)(Err(BarrierError::NotLeader));
        }
        id
    }

    /// A follower's round has its index: its readers pass now, or when that is applied. It keeps
    /// its place among the rounds under way, so that a node that lags does not gather readers.
    fn named(&self, id: u64, index: u64) {
        if let Some(round) = self.lock().rounds.get_mut(&id) {
            round.stage = Stage::Applied(index);
            round.gives_up = Duration::MAX;
        }
        self.settle();
    }

    /// Lets those pass whose index is applied. Returns whether others wait for theirs.
    fn settle(&self) -> bool {
        let next_index = self.core.next_index();
        let mut applying = false;
        let mut queue = self.lock();
        let mut settled = Vec::new();
        for (id, round) in &queue.rounds {
            match round.stage {
                Stage::Applied(index) if index < next_index => settled.push((*id, index)),
                Stage::Applied(_) => applying = true,
                Stage::Confirmed(_) | Stage::Named(_) => {}
            }
        }
        let settled: Vec<_> =
            settled.into_iter().map(|(id, index)| (queue.close(id), index)).collect();
        drop(queue);
        for (round, index) in settled {
            pass(round, index);
        }
        applying
    }

    /// Begins anew what was asked of a node that does not lead any more.
    fn take_back(&self) {
        let leader = match self.leadership.route() {
            Route::Remote(node, _) => Some(node),
            Route::Local => None,
            Route::Unknown => return,
        };
        let mut queue = self.lock();
        let astray: Vec<u64> = queue
            .rounds
            .iter()
            .filter(
                |(_, round)| matches!(round.stage, Stage::Named(asked) if Some(asked) != leader),
            )
            .map(|(id, _)| *id)
            .collect();
        let rounds: Vec<_> = astray.into_iter().map(|id| queue.close(id)).collect();
        drop(queue);
        for round in rounds {
            self.retry(round);
        }
    }

    fn retry(&self, round: Option<Round>) {
        let Some(round) = round else { return };
        let not_before = self.clock.monotonic() + RETRY_PAUSE;
        let mut queue = self.lock();
        queue.not_before = queue.not_before.max(not_before);
        queue.waiting.extend(round.readers);
        drop(queue);
        self.arrived.notify_one();
        self.sweeper.wake();
    }

    /// Whether this node has voted for nobody after `term`.
    pub(crate) fn confirm(&self, term: u64) -> bool {
        self.log.vote().is_none_or(|vote| vote.leader_id.term <= term)
    }

    /// Lets followers learn at once of commits that are held back.
    pub(crate) fn flush_commits(&self) {
        self.flush_commits.notify_waiters();
    }

    /// Answers whoever has waited until the deadline, and gives up rounds that got no answer.
    /// Returns whether anything is pending.
    pub(crate) fn expire(&self, now: Duration) -> bool {
        let mut queue = self.lock();
        let mut expired: Vec<Reader> =
            queue.waiting.extract_if(.., |reader| reader.deadline <= now).collect();
        let mut removed = 0;
        let mut failed = Vec::new();
        for (id, round) in &mut queue.rounds {
            let before = expired.len();
            expired.extend(round.readers.extract_if(.., |reader| reader.deadline <= now));
            removed += expired.len() - before;
            if round.gives_up <= now || round.readers.is_empty() {
                failed.push(*id);
            }
        }
        queue.under_way -= removed;
        let failed: Vec<_> = failed.into_iter().map(|id| queue.close(id)).collect();
        let pending = !queue.waiting.is_empty() || !queue.rounds.is_empty() || !failed.is_empty();
        drop(queue);
        fail(expired, BarrierError::NoLeader);
        for round in failed {
            self.retry(round);
        }
        pending
    }
}

impl Queue {
    fn close(&mut self, id: u64) -> Option<Round> {
        let round = self.rounds.remove(&id)?;
        self.under_way -= round.readers.len();
        Some(round)
    }
}

fn pass(round: Option<Round>, index: u64) {
    for reader in round.into_iter().flat_map(|round| round.readers) {
        (reader.passed)(Ok(index));
    }
}

fn fail(readers: Vec<Reader>, error: BarrierError) {
    for reader in readers {
        (reader.passed)(Err(error));
    }
}
