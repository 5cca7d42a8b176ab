//! From commands to entries: the queue before Raft.
//!
//! Whatever has queued while the entries before were under way is packed into the next entry; no
//! timer is involved. What waits is packed in the order of arrival, except that leases go first
//! (`lanes`), and several entries are proposed at a time. On a node that does not lead, packs go to
//! the leader instead, which proposes each as one entry.
//!
//! Every command names its request, so one whose fate is unknown (the leader is gone, the stream
//! broke) is sent again, marked as a resend, until its deadline: it happens once or says that it
//! cannot tell. Whoever waits is answered by the deadline in any case.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use super::clock::ClusterClock;
use super::exchange::{Exchanges, Lost};
use super::lanes::{Lane, Lanes, PROPOSAL_OVERHEAD_BYTES, Waiter};
use super::leadership::{Leadership, Route};
use super::level::Levels;
use super::sweeper::Sweeper;
use super::types::{Pack, Raft};
use crate::limits::{ENTRIES_IN_FLIGHT_MAX, ENTRY_BYTES_MAX};
use crate::proto::peer;
use crate::proto::peer::exchange_request::Request as Question;
use crate::proto::peer::exchange_response::Response as Answer;
use crate::state::{self, Outcome, Proposal, Rejection, Reply};

/// A pack that a leader has not answered for so long is sent again, perhaps to another leader.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause before a pack that was turned away is proposed again, if no new leader shows up sooner.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Why a command was not answered by the state machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProposeError {
    #[error("the node has as many commands under way as it can hold")]
    Overloaded,
    #[error("no leader was found in time; nothing was changed")]
    NoLeader,
    #[error("no majority answered in time; whether the command was applied is not known")]
    OutcomeUnknown,
}

pub(crate) type Done = Box<dyn FnOnce(Result<Reply, ProposeError>) + Send>;

struct UnderWay {
    /// The earliest deadline of its waiters.
    deadline: Duration,
    /// When to stop waiting for another node's answer.
    gives_up: Option<Duration>,
    /// The node that it was sent to, if not this one.
    target: Option<u64>,
    waiters: Vec<Option<Waiter>>,
}

#[derive(Default)]
struct Queue {
    waiting: Lanes,
    under_way: HashMap<u64, UnderWay>,
    last_pack: u64,
    last_number: u64,
    /// Of all that is waiting or under way.
    count: usize,
    bytes: usize,
    /// Set while turned away: no proposals before this local monotonic time.
    not_before: Duration,
    slowed: bool,
}

pub(crate) struct Proposals {
    queue: Mutex<Queue>,
    arrived: Notify,
    raft: Raft,
    leadership: Arc<Leadership>,
    levels: Arc<Levels>,
    exchanges: Arc<Exchanges>,
    clock: Arc<ClusterClock>,
    sweeper: Arc<Sweeper>,
    /// Whether the log has outrun the checkpoints too far.
    lagging: Box<dyn Fn() -> bool + Send + Sync>,
}

impl Proposals {
    pub(crate) fn new(
        raft: Raft,
        leadership: Arc<Leadership>,
        levels: Arc<Levels>,
        exchanges: Arc<Exchanges>,
        clock: Arc<ClusterClock>,
        sweeper: Arc<Sweeper>,
        lagging: Box<dyn Fn() -> bool + Send + Sync>,
    ) -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::default(),
            arrived: Notify::new(),
            raft,
            leadership,
            levels,
            exchanges,
            clock,
            sweeper,
            lagging,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an encoded command. `done` is called once, by the deadline (local monotonic time).
    pub(crate) fn propose(
        &self,
        command: Bytes,
        resend: bool,
        deadline: Duration,
        lane: Lane,
        done: Done,
    ) {
        let bytes = command.len();
        let mut queue = self.lock();
        if !lane.admits(queue.count, queue.bytes, bytes) {
            drop(queue);
            done(Err(ProposeError::Overloaded));
            return;
        }
        queue.count += 1;
        queue.bytes += bytes;
        queue.last_number += 1;
        let number = queue.last_number;
        let proposal = Proposal { command, resend };
        queue.waiting.push(Waiter { number, lane, proposal, deadline, done });
        let first = queue.waiting.len() == 1;
        drop(queue);
        if first {
            self.arrived.notify_one();
            self.sweeper.wake();
        }
    }

    /// Packs and proposes for as long as the node lives.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut changes = self.leadership.changes();
        loop {
            let route = self.leadership.route();
            let (waiting, room, not_before) = {
                let queue = self.lock();
                let room = queue.under_way.len() < ENTRIES_IN_FLIGHT_MAX;
                (!queue.waiting.is_empty(), room, queue.not_before)
            };
            let pause = not_before.saturating_sub(self.clock.monotonic());
            if waiting && room && pause.is_zero() && route != Route::Unknown {
                if route == Route::Local {
                    self.slow_down().await;
                }
                self.send_pack(route).await;
                continue;
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
                () = tokio::time::sleep(pause), if waiting && room && !pause.is_zero() => {}
            }
        }
    }

    /// Holds proposals back while the checkpoints are too far behind the log.
    async fn slow_down(&self) {
        if !(self.lagging)() {
            let slowed = std::mem::take(&mut self.lock().slowed);
            if slowed {
                tracing::info!("checkpoints have caught up; proposals run at full speed");
            }
            return;
        }
        let slowed = std::mem::replace(&mut self.lock().slowed, true);
        if !slowed {
            tracing::warn!("checkpoints lag too far behind the log; proposals are slowed");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    async fn send_pack(self: &Arc<Self>, route: Route) {
        let target = match &route {
            Route::Remote(node, _) => Some(*node),
            Route::Local | Route::Unknown => None,
        };
        let Some((id, proposals)) = self.pack(target) else { return };
        match route {
            Route::Local => self.lead(id, &proposals).await,
            Route::Remote(node, member) => self.forward(id, node, &member, &proposals),
            Route::Unknown => {}
        }
    }

    /// Moves what is waiting into a pack, up to the size of an entry.
    fn pack(&self, target: Option<u64>) -> Option<(u64, Vec<Proposal>)> {
        let now = self.clock.monotonic();
        let mut queue = self.lock();
        let taken = queue.waiting.take();
        let deadline = taken.iter().map(|waiter| waiter.deadline).min()?;
        let proposals = taken.iter().map(|waiter| waiter.proposal.clone()).collect();
        let waiters = taken.into_iter().map(Some).collect();
        queue.last_pack += 1;
        let id = queue.last_pack;
        let gives_up = target.map(|_| now + FORWARD_TIMEOUT);
        queue.under_way.insert(id, UnderWay { deadline, gives_up, target, waiters });
        Some((id, proposals))
    }

    /// Takes back what was sent to a node that does not lead any more.
    fn take_back(&self) {
        let leader = match self.leadership.route() {
            Route::Remote(node, _) => Some(node),
            Route::Local => None,
            Route::Unknown => return,
        };
        let astray: Vec<u64> = self
            .lock()
            .under_way
            .iter()
            .filter(|(_, pack)| pack.target.is_some() && pack.target != leader)
            .map(|(id, _)| *id)
            .collect();
        for id in astray {
            self.turned_away(id, true);
        }
    }

    async fn lead(self: &Arc<Self>, id: u64, proposals: &[Proposal]) {
        let level = self.levels.in_force();
        let entry = state::encode_entry(self.leadership.stamp(), level, proposals);
        let (responder, answered) = openraft::impls::ProgressResponder::complete_only();
        if self.raft.client_write_ff(Pack(entry), Some(responder)).await.is_err() {
            self.turned_away(id, false);
            return;
        }
        let this = self.clone();
        tokio::spawn(async move {
            match answered.await {
                Ok(Ok(response)) => this.answered(id, response.data.0),
                Ok(Err(error)) => this.turned_away(id, is_unknown(&error)),
                // Raft has stopped without a word.
                Err(_) => this.turned_away(id, true),
            }
        });
    }

    fn forward(
        self: &Arc<Self>,
        id: u64,
        node: u64,
        member: &super::types::Member,
        proposals: &[Proposal],
    ) {
        let commands = proposals
            .iter()
            .map(|Proposal { command, resend }| peer::ForwardedCommand {
                command: command.clone(),
                resend: *resend,
            })
            .collect();
        let feature_level = self.levels.in_force();
        let question = Question::Commands(peer::ExchangeCommands { commands, feature_level });
        let this = self.clone();
        let answered = move |answer: Result<Answer, Lost>| match answer {
            Ok(Answer::Replies(replies)) => {
                let replies: Result<Vec<Reply>, _> =
                    replies.replies.iter().map(|reply| state::decode_reply(reply)).collect();
                match replies {
                    Ok(replies) => this.answered(id, replies),
                    Err(_) => this.turned_away(id, true),
                }
            }
            Ok(Answer::NotLeader(_) | Answer::Overloaded(_)) => this.turned_away(id, false),
            Ok(Answer::LevelTooHigh(peer::LevelTooHigh { in_force })) => {
                tracing::info!(node, in_force, "the leader has yet to apply a raise of the level");
                this.turned_away(id, false);
            }
            Err(Lost::Unsent) => this.turned_away(id, false),
            Ok(_) | Err(Lost::Unanswered) => this.turned_away(id, true),
        };
        self.exchanges.ask(node, member, question, Box::new(answered));
    }

    fn answered(&self, id: u64, replies: Vec<Reply>) {
        let Some(under_way) = self.finish(id) else { return };
        if replies.len() != under_way.waiters.len() {
            self.requeue(under_way, true);
            return;
        }
        for (waiter, reply) in under_way.waiters.into_iter().zip(replies) {
            let Some(waiter) = waiter else { continue };
            // An earlier sending may have been applied in time.
            let late = reply.outcome == Outcome::Rejected(Rejection::RequestExpired);
            if late && waiter.proposal.resend {
                (waiter.done)(Err(ProposeError::OutcomeUnknown));
            } else {
                (waiter.done)(Ok(reply));
            }
        }
    }

    fn turned_away(&self, id: u64, unknown: bool) {
        if let Some(under_way) = self.finish(id) {
            self.requeue(under_way, unknown);
        }
    }

    /// Takes a pack off the table; its waiters still count until they are answered or requeued.
    fn finish(&self, id: u64) -> Option<UnderWay> {
        let mut queue = self.lock();
        let under_way = queue.under_way.remove(&id)?;
        for waiter in under_way.waiters.iter().flatten() {
            queue.count -= 1;
            queue.bytes -= waiter.proposal.command.len();
        }
        drop(queue);
        self.arrived.notify_one();
        Some(under_way)
    }

    fn requeue(&self, under_way: UnderWay, unknown: bool) {
        let not_before = self.clock.monotonic() + RETRY_PAUSE;
        let mut queue = self.lock();
        queue.not_before = queue.not_before.max(not_before);
        let mut waiters: Vec<Waiter> = under_way.waiters.into_iter().flatten().collect();
        for waiter in &mut waiters {
            waiter.proposal.resend |= unknown;
            queue.count += 1;
            queue.bytes += waiter.proposal.command.len();
        }
        queue.waiting.put_back(waiters.into_iter());
        drop(queue);
        self.arrived.notify_one();
        self.sweeper.wake();
    }

    /// Proposes commands that another node has forwarded, as one entry.
    ///
    /// They take this feature level at most. A leader that has yet to apply the raise to it refuses
    /// them, and is sent them again.
    pub(crate) async fn lead_for(&self, proposals: Vec<Proposal>, feature_level: u32) -> Answer {
        let bytes: usize =
            proposals.iter().map(|proposal| proposal.command.len() + PROPOSAL_OVERHEAD_BYTES).sum();
        if self.leadership.route() != Route::Local {
            return Answer::NotLeader(peer::NotLeader {});
        }
        if !self.levels.covers(feature_level) {
            let in_force = self.levels.in_force();
            return Answer::LevelTooHigh(peer::LevelTooHigh { in_force });
        }
        if bytes > 2 * ENTRY_BYTES_MAX {
            return Answer::Overloaded(peer::Overloaded {});
        }
        self.slow_down().await;
        let level = self.levels.in_force();
        let entry = state::encode_entry(self.leadership.stamp(), level, &proposals);
        let (responder, answered) = openraft::impls::ProgressResponder::complete_only();
        if self.raft.client_write_ff(Pack(entry), Some(responder)).await.is_err() {
            return Answer::NotLeader(peer::NotLeader {});
        }
        match answered.await {
            Ok(Ok(response)) => Answer::Replies(peer::ExchangeReplies {
                replies: response.data.0.iter().map(state::encode_reply).collect(),
            }),
            Ok(Err(error)) if !is_unknown(&error) => Answer::NotLeader(peer::NotLeader {}),
            _ => Answer::OutcomeUnknown(peer::OutcomeUnknown {}),
        }
    }

    /// Answers whoever has waited until the deadline, and gives up on nodes that do not answer.
    /// Returns whether anything is pending.
    pub(crate) fn expire(&self, now: Duration) -> bool {
        let mut given_up = Vec::new();
        let mut queue = self.lock();
        let mut expired = queue.waiting.expire(now);
        let waiting_expired = expired.len();
        for (id, under_way) in &mut queue.under_way {
            if under_way.gives_up.is_some_and(|at| at <= now) {
                given_up.push(*id);
            }
            if under_way.deadline > now {
                continue;
            }
            under_way.deadline = Duration::MAX;
            for slot in &mut under_way.waiters {
                match slot {
                    Some(waiter) if waiter.deadline <= now => expired.extend(slot.take()),
                    Some(waiter) => under_way.deadline = under_way.deadline.min(waiter.deadline),
                    None => {}
                }
            }
        }
        for waiter in &expired {
            queue.count -= 1;
            queue.bytes -= waiter.proposal.command.len();
        }
        let pending = !queue.waiting.is_empty() || !queue.under_way.is_empty();
        drop(queue);
        for (position, waiter) in expired.into_iter().enumerate() {
            let never_sent = position < waiting_expired && !waiter.proposal.resend;
            (waiter.done)(Err(if never_sent {
                ProposeError::NoLeader
            } else {
                ProposeError::OutcomeUnknown
            }));
        }
        for id in given_up {
            self.turned_away(id, true);
        }
        pending
    }
}

fn is_unknown(error: &openraft::errors::ClientWriteError<super::types::TypeConfig>) -> bool {
    !matches!(error, openraft::errors::ClientWriteError::ForwardToLeader(_))
}
