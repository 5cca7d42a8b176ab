//! Which read waits for what: the decisions of `barrier`, without its waiting.
//!
//! What happens comes in by methods (a read arrives, a voter answers, an entry is applied), what
//! is to be done goes out as [`Action`]s, and time is an argument.
//!
//! - A read joins only a round that has not been sent yet.
//! - A round names the log index that its reads have to see. It is read after the round has taken
//!   its reads: it covers what the leader has applied, and also what it has told others is
//!   committed, because a node that was told may have shown it already.
//! - A round confirms the term in which it began, and only if this node's own vote is still of
//!   that term when the last confirmation arrives.
//! - Rounds that wait for their index to be applied keep their places among those under way, so
//!   that a node that lags does not gather readers.
//! - Whoever works for these decisions may sleep exactly while [`Rounds::wants_a_step`] is false.
//!   Every method that changes anything may make it true; nothing else is to be remembered.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::leadership::{Route, View};
use super::types::{LogId, Member, term_of};
use crate::limits::{BARRIERS_IN_FLIGHT_MAX, READS_PENDING_MAX};

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

pub(super) struct Reader {
    /// Local monotonic time.
    pub(super) deadline: Duration,
    /// A follower asks: only a leader may answer, and the follower does the waiting.
    pub(super) as_leader: bool,
    pub(super) passed: Passed,
}

/// What is to be done once nothing is locked.
pub(super) enum Action {
    /// Tell these readers.
    Answer(Vec<Reader>, Result<u64, BarrierError>),
    /// Ask the other members whether they have voted for nobody after this term.
    AskVoters { round: u64, view: Arc<View> },
    /// Ask the leader for the index.
    AskLeader { round: u64, leader: u64, member: Member },
}

/// How far this node is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    /// Local monotonic time.
    pub(super) now: Duration,
    pub(super) last_applied: Option<LogId>,
}

impl Progress {
    fn applied_next(&self) -> u64 {
        self.last_applied.map_or(0, |log_id| log_id.index + 1)
    }
}

/// What this node knows at the time of a step. It has to be looked up while the rounds are locked,
/// so that it is no older than any read that waits.
pub(super) struct Outlook {
    pub(super) progress: Progress,
    pub(super) view: Arc<View>,
    /// One more than the highest index that this node has told others is committed.
    pub(super) announced_next: u64,
}

impl Outlook {
    /// A leader that has applied an entry of its own term has applied everything that was
    /// acknowledged before its term.
    fn leads_in_its_term(&self) -> bool {
        self.progress.last_applied.is_some_and(|log_id| term_of(&log_id) == self.view.term)
    }
}

/// What ends the sleep after a step, beside an event.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sleep {
    /// Local monotonic time.
    pub(super) until: Option<Duration>,
    /// Whether an entry that is applied matters.
    pub(super) watches_applied: bool,
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
    /// That this node has applied the log up to this index.
    Applied(u64),
}

struct Confirmation {
    /// Index that is linearizable to read once the term is confirmed.
    index: u64,
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

/// All reads that wait on one node.
pub(super) struct Rounds {
    own_id: u64,
    waiting: Vec<Reader>,
    open: BTreeMap<u64, Round>,
    last_round: u64,
    /// Readers in `open`.
    under_way: usize,
    /// Rounds in stage `Applied`.
    applying: usize,
    /// No round begins before this local monotonic time.
    not_before: Duration,
    /// What the last step said of its sleep.
    watches_applied: bool,
}

impl Rounds {
    pub(super) fn new(own_id: u64) -> Self {
        Self {
            own_id,
            waiting: Vec::new(),
            open: BTreeMap::new(),
            last_round: 0,
            under_way: 0,
            applying: 0,
            not_before: Duration::ZERO,
            watches_applied: false,
        }
    }

    /// Whether a step could do anything, or would sleep in another way than the last one said.
    pub(super) fn wants_a_step(&self) -> bool {
        self.could_begin() || (self.applying > 0 && !self.watches_applied)
    }

    fn could_begin(&self) -> bool {
        !self.waiting.is_empty() && self.open.len() < BARRIERS_IN_FLIGHT_MAX
    }

    /// A read arrives; it is given back if there is no room for it.
    pub(super) fn join(&mut self, reader: Reader) -> Result<(), Reader> {
        if self.waiting.len() + self.under_way >= READS_PENDING_MAX {
            return Err(reader);
        }
        self.waiting.push(reader);
        Ok(())
    }

    /// Ends and begins whatever can be ended or begun.
    pub(super) fn step(&mut self, outlook: &Outlook) -> (Vec<Action>, Sleep) {
        let mut actions = Vec::new();
        self.settle(outlook.progress, &mut actions);
        let mut sleep = Sleep::default();
        while self.could_begin() {
            if outlook.progress.now < self.not_before {
                sleep.until = Some(self.not_before);
                break;
            }
            match &outlook.view.route {
                Route::Local if !outlook.leads_in_its_term() => {
                    sleep.watches_applied = true;
                    break;
                }
                Route::Local => self.begin_as_leader(outlook, &mut actions),
                Route::Remote(leader, member) => {
                    self.begin_as_follower(outlook.progress.now, *leader, member, &mut actions);
                }
                Route::Unknown => break,
            }
        }
        sleep.watches_applied |= self.applying > 0;
        self.watches_applied = sleep.watches_applied;
        (actions, sleep)
    }

    fn begin_as_leader(&mut self, outlook: &Outlook, actions: &mut Vec<Action>) {
        let readers = std::mem::take(&mut self.waiting);
        let progress = outlook.progress;
        let index = progress.applied_next().max(outlook.announced_next).saturating_sub(1);
        let confirmation = Confirmation {
            index,
            view: outlook.view.clone(),
            confirmed: BTreeSet::from([self.own_id]),
            outstanding: outlook.view.peers.len(),
        };
        let alone = confirmation.has_majority();
        let round = self.open_round(progress.now, readers, Stage::Confirmed(confirmation));
        if alone {
            self.pass(round, index, progress, actions);
        } else {
            actions.push(Action::AskVoters { round, view: outlook.view.clone() });
        }
    }

    fn begin_as_follower(
        &mut self,
        now: Duration,
        leader: u64,
        member: &Member,
        actions: &mut Vec<Action>,
    ) {
        let waiting = std::mem::take(&mut self.waiting).into_iter();
        let (refused, readers): (Vec<_>, Vec<_>) = waiting.partition(|reader| reader.as_leader);
        if !refused.is_empty() {
            actions.push(Action::Answer(refused, Err(BarrierError::NotLeader)));
        }
        if !readers.is_empty() {
            let round = self.open_round(now, readers, Stage::Named(leader));
            actions.push(Action::AskLeader { round, leader, member: member.clone() });
        }
    }

    fn open_round(&mut self, now: Duration, readers: Vec<Reader>, stage: Stage) -> u64 {
        self.last_round += 1;
        self.under_way += readers.len();
        let round = Round { readers, gives_up: now + ROUND_TIMEOUT, stage };
        self.open.insert(self.last_round, round);
        self.last_round
    }

    /// A voter has answered, or will not. `own_term` is that of this node's own vote.
    pub(super) fn confirmed(
        &mut self,
        round: u64,
        voter: u64,
        yes: bool,
        progress: Progress,
        own_term: Option<u64>,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        let stage = self.open.get_mut(&round).map(|round| &mut round.stage);
        let Some(Stage::Confirmed(confirmation)) = stage else { return actions };
        if yes {
            confirmation.confirmed.insert(voter);
        }
        confirmation.outstanding = confirmation.outstanding.saturating_sub(1);
        let index = confirmation.index;
        if confirmation.has_majority() {
            if own_term == Some(confirmation.view.term) {
                self.pass(round, index, progress, &mut actions);
            } else {
                self.retry(round, progress.now);
            }
        } else if confirmation.outstanding == 0 {
            self.retry(round, progress.now);
        }
        actions
    }

    /// The leader has named an index, or will not.
    pub(super) fn named(
        &mut self,
        round: u64,
        index: Option<u64>,
        progress: Progress,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        let stage = self.open.get(&round).map(|round| &round.stage);
        let Some(Stage::Named(_)) = stage else { return actions };
        match index {
            Some(index) => self.pass(round, index, progress, &mut actions),
            None => self.retry(round, progress.now),
        }
        actions
    }

    /// A round knows its index: its readers pass now, or when that is applied here.
    fn pass(&mut self, id: u64, index: u64, progress: Progress, actions: &mut Vec<Action>) {
        let Some(round) = self.open.get_mut(&id) else { return };
        if index < progress.applied_next() {
            let readers = self.close(id);
            actions.push(Action::Answer(readers, Ok(index)));
            return;
        }
        let asked: Vec<Reader> = round.readers.extract_if(.., |reader| reader.as_leader).collect();
        round.stage = Stage::Applied(index);
        round.gives_up = Duration::MAX;
        self.applying += 1;
        self.under_way -= asked.len();
        if !asked.is_empty() {
            actions.push(Action::Answer(asked, Ok(index)));
        }
    }

    /// Lets those pass whose index is applied.
    fn settle(&mut self, progress: Progress, actions: &mut Vec<Action>) {
        if self.applying == 0 {
            return;
        }
        let is_settled = |round: &Round| match round.stage {
            Stage::Applied(index) if index < progress.applied_next() => Some(index),
            _ => None,
        };
        let settled: Vec<(u64, u64)> =
            self.open.iter().filter_map(|(id, round)| Some((*id, is_settled(round)?))).collect();
        for (id, index) in settled {
            let readers = self.close(id);
            actions.push(Action::Answer(readers, Ok(index)));
        }
    }

    /// Another node leads, or nobody does: begins anew what was asked of one that does not.
    pub(super) fn leader_changed(&mut self, route: &Route, now: Duration) {
        let leader = match route {
            Route::Remote(node, _) => Some(*node),
            Route::Local => None,
            Route::Unknown => return,
        };
        let is_astray =
            |round: &Round| matches!(round.stage, Stage::Named(asked) if Some(asked) != leader);
        let astray: Vec<u64> =
            self.open.iter().filter(|(_, round)| is_astray(round)).map(|(id, _)| *id).collect();
        for id in astray {
            self.retry(id, now);
        }
        self.not_before = Duration::ZERO;
    }

    fn retry(&mut self, id: u64, now: Duration) {
        let readers = self.close(id);
        if readers.is_empty() {
            return;
        }
        self.waiting.extend(readers);
        self.not_before = self.not_before.max(now + RETRY_PAUSE);
    }

    fn close(&mut self, id: u64) -> Vec<Reader> {
        let Some(round) = self.open.remove(&id) else { return Vec::new() };
        self.under_way -= round.readers.len();
        if matches!(round.stage, Stage::Applied(_)) {
            self.applying -= 1;
        }
        round.readers
    }

    /// Takes out whoever has waited until the deadline, and gives up rounds that got no answer.
    pub(super) fn expire(&mut self, now: Duration) -> Vec<Action> {
        let is_late = |reader: &mut Reader| reader.deadline <= now;
        let mut late: Vec<Reader> = self.waiting.extract_if(.., is_late).collect();
        let waited = late.len();
        let mut failed = Vec::new();
        for (id, round) in &mut self.open {
            late.extend(round.readers.extract_if(.., is_late));
            if round.gives_up <= now || round.readers.is_empty() {
                failed.push(*id);
            }
        }
        self.under_way -= late.len() - waited;
        for id in failed {
            self.retry(id, now);
        }
        if late.is_empty() {
            return Vec::new();
        }
        vec![Action::Answer(late, Err(BarrierError::NoLeader))]
    }

    /// Whether anybody waits.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.open.is_empty()
    }
}
