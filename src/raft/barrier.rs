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
//! A round on a follower is a question to the leader; its answer is the log index that this node
//! has to apply first. What is decided when stands in `rounds`; here it is carried out.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::clock::ClusterClock;
use super::exchange::{Exchanges, Lost};
use super::leadership::{Leadership, View};
use super::log::LogStore;
use super::machine::Core;
use super::network::Announced;
use super::rounds::{Action, Outlook, Progress, Reader, Rounds};
pub(crate) use super::rounds::{BarrierError, Passed};
use super::sweeper::Sweeper;
use super::types::Member;
use crate::proto::peer;
use crate::proto::peer::exchange_request::Request as Question;
use crate::proto::peer::exchange_response::Response as Answer;

pub(crate) struct Barriers {
    rounds: Mutex<Rounds>,
    /// Wakes the task that steps; see [`Barriers::after`].
    wanted: Notify,
    parts: BarrierParts,
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
    pub(crate) announced: Arc<Announced>,
}

impl Barriers {
    pub(crate) fn new(parts: BarrierParts) -> Arc<Self> {
        let rounds = Mutex::new(Rounds::new(parts.own_id));
        Arc::new(Self { rounds, wanted: Notify::new(), parts })
    }

    fn lock(&self) -> MutexGuard<'_, Rounds> {
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends every access to the rounds: whatever has happened, the task that steps is awake if
    /// there is a step to take.
    fn after(&self, rounds: MutexGuard<'_, Rounds>) {
        let wanted = rounds.wants_a_step();
        drop(rounds);
        if wanted {
            self.wanted.notify_one();
        }
    }

    /// Calls `passed` once a read of the local state reflects everything acknowledged before now,
    /// or by the deadline (local monotonic time) with an error.
    pub(crate) fn wait(&self, deadline: Duration, passed: Passed) {
        self.join(Reader { deadline, as_leader: false, passed });
    }

    /// Like `wait`, for a follower, which waits by itself until the index is applied there: fails
    /// at once if this node does not lead.
    pub(crate) fn wait_as_leader(&self, deadline: Duration, passed: Passed) {
        self.join(Reader { deadline, as_leader: true, passed });
    }

    fn join(&self, reader: Reader) {
        let mut rounds = self.lock();
        let refused = rounds.join(reader).err();
        self.after(rounds);
        match refused {
            Some(reader) => (reader.passed)(Err(BarrierError::Overloaded)),
            None => self.parts.sweeper.wake(),
        }
    }

    /// Begins rounds for as long as the node lives.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut changes = self.parts.leadership.changes();
        let mut applied = self.parts.core.applied();
        loop {
            // Marked as seen before the step looks at it, so that what comes later wakes.
            applied.borrow_and_update();
            let (actions, sleep) = {
                let mut rounds = self.lock();
                let outlook = self.outlook();
                rounds.step(&outlook)
            };
            self.perform(actions);
            let pause = sleep.until.map(|until| until.saturating_sub(self.parts.clock.monotonic()));
            tokio::select! {
                () = self.wanted.notified() => {}
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let route = self.parts.leadership.route();
                    self.lock().leader_changed(&route, self.parts.clock.monotonic());
                }
                _ = applied.changed(), if sleep.watches_applied => {}
                () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
            }
        }
    }

    fn progress(&self) -> Progress {
        Progress { now: self.parts.clock.monotonic(), last_applied: self.parts.core.last_applied() }
    }

    fn outlook(&self) -> Outlook {
        Outlook {
            progress: self.progress(),
            view: self.parts.leadership.view(),
            announced_next: self.parts.announced.next_index(),
        }
    }

    fn perform(self: &Arc<Self>, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Answer(readers, result) => {
                    for reader in readers {
                        (reader.passed)(result);
                    }
                }
                Action::AskVoters { round, view } => self.ask_voters(round, &view),
                Action::AskLeader { round, leader, member } => {
                    self.ask_leader(round, leader, &member);
                }
            }
        }
    }

    fn ask_voters(self: &Arc<Self>, round: u64, view: &View) {
        for (voter, member) in &view.peers {
            let (this, voter) = (self.clone(), *voter);
            let question = Question::Confirm(peer::ExchangeConfirm { term: view.term });
            let answered = move |answer: Result<Answer, Lost>| {
                let yes = matches!(answer, Ok(Answer::Confirmed(true)));
                let own_term = this.parts.log.vote().map(|vote| vote.leader_id.term);
                let mut rounds = this.lock();
                let actions = rounds.confirmed(round, voter, yes, this.progress(), own_term);
                this.after(rounds);
                this.perform(actions);
            };
            self.parts.exchanges.ask(voter, member, question, Box::new(answered));
        }
    }

    fn ask_leader(self: &Arc<Self>, round: u64, leader: u64, member: &Member) {
        let this = self.clone();
        let answered = move |answer: Result<Answer, Lost>| {
            let index = match answer {
                Ok(Answer::Barrier(index)) => Some(index),
                _ => None,
            };
            let mut rounds = this.lock();
            let actions = rounds.named(round, index, this.progress());
            this.after(rounds);
            this.perform(actions);
        };
        let question = Question::Barrier(peer::ExchangeBarrier {});
        self.parts.exchanges.ask(leader, member, question, Box::new(answered));
    }

    /// Whether this node has voted for nobody after `term`.
    pub(crate) fn confirm(&self, term: u64) -> bool {
        self.parts.log.vote().is_none_or(|vote| vote.leader_id.term <= term)
    }

    /// Lets followers learn at once of commits that are held back.
    pub(crate) fn flush_commits(&self) {
        self.parts.flush_commits.notify_waiters();
    }

    /// Answers whoever has waited until the deadline, and gives up rounds that got no answer.
    /// Returns whether anything is pending.
    pub(crate) fn expire(self: &Arc<Self>, now: Duration) -> bool {
        let mut rounds = self.lock();
        let actions = rounds.expire(now);
        let pending = !rounds.is_idle();
        self.after(rounds);
        self.perform(actions);
        pending
    }
}
