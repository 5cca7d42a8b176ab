//! One task that keeps all leases of a client and its clones alive.
//!
//! A lease is due when the cluster said that it should be renewed; those that are nearly due go
//! with it, many in one message. Each answer names the next time, with jitter, so leases that went
//! together do not stay together, and no client invents a rhythm of its own. A message that fails
//! is sent again after a pause that doubles, for as long as the lease is to be relied on: an
//! election is no reason to give up.
//!
//! The task begins with the first lease and ends with the last. Caveat: it runs on the runtime that
//! granted the lease with which it began; where that one is shut down, leases that another runtime
//! uses are renewed again only once one more is granted there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use super::Client;
use super::error::{Error, mismatched};
use super::id::{LeaseId, mix};
use super::lease::{Held, Renewal};
use super::liveness::{CLOCK_CHECK, Loss};
use super::retry::{Patience, Progress};
use crate::limits::LEASE_RENEWALS_MAX;

/// Leases that are due within this part of their interval go with those that are due now: less than
/// the jitter of the cluster's answers, so that these go on spreading them.
const TOGETHER_FRACTION: u32 = 32;
/// Pauses after a message that failed double from the first to the last of these.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The least that a message is given, however near the deadline is.
const PATIENCE_MIN: Duration = Duration::from_millis(100);

/// What the leases of a client have come to, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Renewals {
    /// Leases that are kept alive now.
    pub leases: usize,
    /// Messages that were sent, resends left out.
    pub messages: u64,
    /// Renewals that were acknowledged.
    pub renewed: u64,
    /// Messages that failed, whether or not another succeeded in time.
    pub failed: u64,
    /// Leases that were lost, other than given up.
    pub lost: u64,
    /// Messages that have no answer yet.
    pub under_way: usize,
    /// How long the oldest of those has been under way.
    pub oldest: Duration,
    /// The longest that any message took, or has taken so far.
    pub slowest: Duration,
}

/// When a lease is renewed next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    /// On the monotonic clock.
    due: Duration,
    /// From when on it goes with others that are due.
    ready: Duration,
    failures: u32,
}

impl Schedule {
    /// That of a lease for which this was said about what was sent at `sent`.
    pub(super) fn new(sent: Duration, renew_after: Duration) -> Self {
        let due = sent + renew_after;
        let ready = due.saturating_sub(renew_after / TOGETHER_FRACTION);
        Self { due, ready, failures: 0 }
    }

    /// That after a message which failed just now.
    fn again(self, id: LeaseId, now: Duration) -> Self {
        let full = PAUSE_MIN.saturating_mul(1 << self.failures.min(10)).min(PAUSE_MAX);
        let random = u32::try_from(mix(id.number() as u64) % 1_024).unwrap_or(0);
        let due = now + full / 2 + full / 2 * random / 1_024;
        Self { due, ready: due, failures: self.failures.saturating_add(1) }
    }
}

/// The leases that are kept alive.
#[derive(Default)]
pub(super) struct Keeper {
    registry: Mutex<Registry>,
    /// Told when there is something to look at.
    wake: Notify,
    messages: AtomicU64,
    renewed: AtomicU64,
    failed: AtomicU64,
    lost: AtomicU64,
}

type Key = (LeaseId, Arc<str>);

struct Kept {
    held: Weak<Held>,
    schedule: Schedule,
    under_way: bool,
}

/// Nothing here costs more the more leases there are, but for the logarithm.
///
/// - What is not under way is in both queues, at the times of its schedule; nothing else is.
#[derive(Default)]
struct Registry {
    leases: BTreeMap<Key, Kept>,
    by_due: BTreeSet<(Duration, Key)>,
    by_ready: BTreeSet<(Duration, Key)>,
    /// When the messages under way were sent, by number.
    sent: BTreeMap<u64, Duration>,
    /// The longest that a message took.
    slowest: Duration,
    /// Whether the task is there.
    running: bool,
}

impl Registry {
    fn enqueue(&mut self, key: &Key, schedule: Schedule) {
        self.by_due.insert((schedule.due, key.clone()));
        self.by_ready.insert((schedule.ready, key.clone()));
    }

    fn remove(&mut self, key: &Key) -> bool {
        let Some(Kept { schedule, under_way, .. }) = self.leases.remove(key) else {
            return false;
        };
        if !under_way {
            self.by_due.remove(&(schedule.due, key.clone()));
            self.by_ready.remove(&(schedule.ready, key.clone()));
        }
        true
    }

    /// The next that is ready, which is under way from now on. Its owner may have gone meanwhile.
    fn take_ready(&mut self, now: Duration) -> Option<Option<Arc<Held>>> {
        if self.by_ready.first().is_none_or(|(ready, _)| *ready > now) {
            return None;
        }
        let (_, key) = self.by_ready.pop_first()?;
        let Some(kept) = self.leases.get_mut(&key) else { return Some(None) };
        kept.under_way = true;
        let held = kept.held.upgrade();
        self.by_due.remove(&(kept.schedule.due, key));
        Some(held)
    }

    /// An answer has come, or none will: what was under way is due at another time.
    fn schedule(&mut self, key: &Key, next: impl FnOnce(Schedule) -> Schedule) {
        // Unless it was given up meanwhile.
        let Some(kept) = self.leases.get_mut(key) else { return };
        kept.under_way = false;
        kept.schedule = next(kept.schedule);
        let schedule = kept.schedule;
        self.enqueue(key, schedule);
    }
}

impl Keeper {
    /// Keeps `held` alive from now on.
    pub(super) fn add(self: &Arc<Self>, client: &Client, held: &Arc<Held>, schedule: Schedule) {
        let mut registry = self.lock();
        let key = held.key();
        registry.enqueue(&key, schedule);
        let kept = Kept { held: Arc::downgrade(held), schedule, under_way: false };
        registry.leases.insert(key, kept);
        let is_first = registry.by_due.first().is_some_and(|(due, _)| *due == schedule.due);
        let start = !std::mem::replace(&mut registry.running, true);
        drop(registry);
        if start {
            let running = Running { keeper: self.clone(), has_ended: false };
            tokio::spawn(run(client.clone(), running));
        } else if is_first {
            self.wake.notify_one();
        }
    }

    /// Leaves the lease to itself.
    pub(super) fn remove(&self, key: &Key) {
        let mut registry = self.lock();
        // The task ends with the last.
        if registry.remove(key) && registry.leases.is_empty() {
            drop(registry);
            self.wake.notify_one();
        }
    }

    /// What has come of all of it, by `now` on the monotonic clock.
    pub(super) fn renewals(&self, now: Duration) -> Renewals {
        let registry = self.lock();
        let first_sent = registry.sent.values().min();
        let oldest = first_sent.map_or(Duration::ZERO, |sent| now.saturating_sub(*sent));
        Renewals {
            leases: registry.leases.len(),
            under_way: registry.sent.len(),
            oldest,
            slowest: registry.slowest.max(oldest),
            messages: self.messages.load(Ordering::Relaxed),
            renewed: self.renewed.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
        }
    }

    /// The leases to be renewed now, as messages, and how long until the next are due. `None` once
    /// there are no leases: then the task is taken for gone.
    fn due(&self, now: Duration) -> Option<(Vec<Vec<Arc<Held>>>, Duration)> {
        let mut registry = self.lock();
        registry.running = !registry.leases.is_empty();
        if !registry.running {
            return None;
        }
        let mut ready = Vec::new();
        if registry.by_due.first().is_some_and(|(due, _)| *due <= now) {
            while let Some(held) = registry.take_ready(now) {
                ready.extend(held);
            }
        }
        let next = registry.by_due.first().map_or(CLOCK_CHECK, |(due, _)| due.saturating_sub(now));
        drop(registry);
        // Out of the lock: letting go of the last handle removes a lease from the registry.
        Some((self.gather(ready), next.min(CLOCK_CHECK)))
    }

    /// Messages of one namespace each.
    fn gather(&self, ready: Vec<Arc<Held>>) -> Vec<Vec<Arc<Held>>> {
        let mut messages = Vec::new();
        let mut open: BTreeMap<Arc<str>, Vec<Arc<Held>>> = BTreeMap::new();
        for held in ready {
            if held.liveness.loss().is_some() {
                self.lose(&held);
                continue;
            }
            let message = open.entry(held.namespace().clone()).or_default();
            message.push(held);
            if message.len() == LEASE_RENEWALS_MAX {
                messages.push(std::mem::take(message));
            }
        }
        messages.extend(open.into_values().filter(|message| !message.is_empty()));
        messages
    }

    /// Nothing keeps this one alive any more.
    fn lose(&self, held: &Held) {
        if self.lock().remove(&held.key()) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        // Nothing panics while it holds the lock.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message under way. Should its task be dropped before it has ended, as when its runtime is shut
/// down, it is under way no more, and its leases are as due as they were.
struct UnderWay {
    keeper: Arc<Keeper>,
    number: u64,
    leases: Vec<Arc<Held>>,
}

impl UnderWay {
    fn begin(keeper: Arc<Keeper>, leases: Vec<Arc<Held>>, sent: Duration) -> Self {
        let number = keeper.messages.fetch_add(1, Ordering::Relaxed);
        keeper.lock().sent.insert(number, sent);
        Self { keeper, number, leases }
    }

    /// It has ended, after so long: what becomes of its leases is for the caller to say.
    fn end(mut self, took: Duration) -> Vec<Arc<Held>> {
        let mut registry = self.keeper.lock();
        registry.slowest = registry.slowest.max(took);
        drop(registry);
        std::mem::take(&mut self.leases)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut registry = self.keeper.lock();
        registry.sent.remove(&self.number);
        for held in &self.leases {
            registry.schedule(&held.key(), |schedule| schedule);
        }
    }
}

/// Says that the task has gone, should it end otherwise than for want of leases.
struct Running {
    keeper: Arc<Keeper>,
    has_ended: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended {
            self.keeper.lock().running = false;
        }
    }
}

async fn run(client: Client, mut running: Running) {
    let keeper = running.keeper.clone();
    let clock = client.pool.time.clock().clone();
    loop {
        let wake = keeper.wake.notified();
        let Some((messages, next)) = keeper.due(clock.monotonic()) else {
            running.has_ended = true;
            return;
        };
        if messages.is_empty() {
            // Either way it is looked at again.
            let _ = tokio::time::timeout(next, wake).await;
            continue;
        }
        for message in messages {
            tokio::spawn(renew(client.clone(), message));
        }
    }
}

/// Renews these with one message and notes what became of each.
async fn renew(client: Client, leases: Vec<Arc<Held>>) {
    let keeper = client.keeper.clone();
    let clock = client.pool.time.clock().clone();
    let sent = clock.monotonic();
    let under_way = UnderWay::begin(keeper.clone(), leases, sent);
    let answered = exchange(&client, &under_way.leases).await;
    let mut renewals: BTreeMap<LeaseId, Renewal> = match answered {
        Ok(renewals) => renewals.into_iter().map(|renewal| (renewal.id, renewal)).collect(),
        Err(error) => {
            tracing::debug!(leases = under_way.leases.len(), %error, "could not renew");
            keeper.failed.fetch_add(1, Ordering::Relaxed);
            BTreeMap::new()
        }
    };
    let now = clock.monotonic();
    let leases = under_way.end(now.saturating_sub(sent));
    for held in &leases {
        let key = held.key();
        match renewals.remove(&held.id) {
            Some(Renewal { timing: Some(timing), .. }) => {
                held.liveness.extend(sent, timing.remaining.min(held.ttl));
                keeper.lock().schedule(&key, |_| Schedule::new(sent, timing.renew_after));
                keeper.renewed.fetch_add(1, Ordering::Relaxed);
            }
            Some(Renewal { timing: None, .. }) => {
                held.liveness.lose(Loss::Ended);
                keeper.lose(held);
            }
            None if held.liveness.loss().is_some() => keeper.lose(held),
            None => keeper.lock().schedule(&key, |schedule| schedule.again(held.id, now)),
        }
    }
    drop(leases);
    keeper.wake.notify_one();
}

/// One message, for as long as it can be of use: its leases are lost after that.
async fn exchange(client: &Client, leases: &[Arc<Held>]) -> Result<Vec<Renewal>, Error> {
    let remaining = || leases.iter().map(|held| held.liveness.remaining());
    // One that is as good as lost does not make the others give up early.
    let longest = remaining().max().unwrap_or_default();
    let left = remaining().filter(|left| *left >= longest / 4).min().unwrap_or_default();
    let total = left.max(PATIENCE_MIN);
    let patience = Patience {
        total,
        // Several nodes can be tried in the time that is left.
        attempt: client.attempt_timeout.min(total / 3).max(PATIENCE_MIN),
        lifetime: total,
    };
    let Some(first) = leases.first() else { return Err(mismatched()) };
    let ids: Vec<LeaseId> = leases.iter().map(|held| held.id).collect();
    let mut progress = Progress::default();
    client.renew_leases(first.namespace(), &ids, patience, &mut progress).await
}
