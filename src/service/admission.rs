//! Room for answers: the memory of a node that those take who do not take their answers.
//!
//! What is asked counts while it is under way, and its answer until the connection has taken it:
//! each for the node, and for its connection, whose part is its *share*. A read is evaluated only
//! when there is room for what it finds; until then it waits as the few bytes that it is, and its
//! barrier stays good, as the state only becomes newer. So that what waits never stands in the way
//! of itself, what is asked and what is answered have limits of their own, as has what comes in.
//!
//! - A limit is exceeded by one answer, or one request, at most, on each thread that makes them.
//! - A share of the answers is a small part of what is free. So there is room for those who take
//!   their answers, however much a few dozen others leave lying.
//! - When these are so many that room becomes short all the same, the one that holds the most and
//!   has taken nothing for [`STUCK_AFTER`] is closed, one after the other until it is short no
//!   more.
//! - What waits on a connection is admitted in its order, and a few reads at a time, so that those
//!   for which room is made at once do not keep the node from everything else.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;

use super::error::Error;
use crate::limits::{
    ANSWER_BYTES_OF_NODE_MAX, ANSWER_SHARE_OF_FREE, ASKED_BYTES_OF_CONNECTION_MAX,
    ASKED_BYTES_OF_CONNECTION_MIN, ASKED_BYTES_OF_NODE_MAX, INCOMING_BYTES_OF_CONNECTION_MIN,
    INCOMING_BYTES_OF_NODE_MAX,
};

/// What a request counts for while it is under way, in bytes, beside the names in it. An answer
/// that is not larger is not counted anew.
pub const ASKED_WEIGHT: usize = 512;

/// What may be held beyond the limit for answers that could not wait, as a part of the limit.
const EXCESS: usize = 16;
/// How late the deadline of a read that waits for room may be noticed.
const ATTEND_INTERVAL: Duration = Duration::from_millis(25);
/// Room is short when less than this part of the limit is free.
const SHORT_OF: usize = 8;
/// Reads that are admitted, and bytes that they find, before others have their turn: some
/// milliseconds' work.
const TURN_READS_MAX: usize = 8;
const TURN_BYTES_MAX: usize = 4 * 1024 * 1024;
/// How long a connection may take nothing while room is short.
const STUCK_AFTER: Duration = Duration::from_secs(2);

/// Bytes that are held: of requests under way, with what is small of their answers, and of other
/// answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Of requests.
    pub asked: usize,
    /// Of answers.
    pub answers: usize,
}

impl Count {
    /// Of requests.
    pub fn asked(asked: usize) -> Self {
        Self { asked, answers: 0 }
    }

    /// Of answers.
    pub fn answers(answers: usize) -> Self {
        Self { asked: 0, answers }
    }
}

/// What all connections together hold of one kind, and how much that may be.
struct Pot {
    limit: usize,
    held: AtomicUsize,
    /// A share is at most this part of what is free,
    part: usize,
    /// and at most this,
    share_most: usize,
    /// but always this.
    share_least: usize,
}

impl Pot {
    fn of_requests() -> Self {
        Self {
            limit: ASKED_BYTES_OF_NODE_MAX,
            held: AtomicUsize::new(0),
            part: 4,
            share_most: ASKED_BYTES_OF_CONNECTION_MAX,
            share_least: ASKED_BYTES_OF_CONNECTION_MIN,
        }
    }

    fn of_incoming() -> Self {
        Self {
            limit: INCOMING_BYTES_OF_NODE_MAX,
            held: AtomicUsize::new(0),
            part: 2,
            share_most: INCOMING_BYTES_OF_NODE_MAX,
            share_least: INCOMING_BYTES_OF_CONNECTION_MIN,
        }
    }

    fn of_answers() -> Self {
        Self {
            limit: ANSWER_BYTES_OF_NODE_MAX,
            held: AtomicUsize::new(0),
            part: ANSWER_SHARE_OF_FREE,
            share_most: ANSWER_BYTES_OF_NODE_MAX,
            share_least: 0,
        }
    }

    fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    fn free(&self) -> usize {
        self.limit.saturating_sub(self.held())
    }

    /// Whether there is room for whoever holds `held` already.
    fn has_room_for(&self, held: usize) -> bool {
        held < (self.free() / self.part).min(self.share_most).max(self.share_least)
    }
}

/// The room for answers of one node.
pub struct Admission {
    /// Of requests that have not come whole.
    incoming: Pot,
    asked: Pot,
    answers: Pot,
    shares: Mutex<Vec<Weak<Share>>>,
    /// Those on which something waits.
    waiting: Mutex<VecDeque<Arc<Share>>>,
    anybody_waits: AtomicBool,
    /// Room has been made, or somebody has begun to wait.
    changed: Notify,
    stuck: AtomicU64,
    panics: AtomicU64,
}

/// One connection's part of the room.
pub struct Share {
    admission: Arc<Admission>,
    incoming: AtomicUsize,
    asked: AtomicUsize,
    answers: AtomicUsize,
    /// How often the connection has taken something.
    taken: AtomicU64,
    parked: Mutex<VecDeque<Parked>>,
    parked_count: AtomicUsize,
    /// Whether it is among the waiting.
    is_listed: AtomicBool,
    /// Whether somebody waits to be allowed to ask.
    asks: AtomicBool,
    may_ask: Notify,
    is_closed: AtomicBool,
    close: Box<dyn Fn() + Send + Sync>,
}

/// A read that waits for room.
struct Parked {
    /// Local monotonic time.
    deadline: Duration,
    run: Box<dyn FnOnce(Result<(), Error>) + Send>,
}

impl Admission {
    /// With the limits of a node.
    pub fn new() -> Arc<Self> {
        Self::within(Pot::of_requests(), Pot::of_answers())
    }

    fn within(asked: Pot, answers: Pot) -> Arc<Self> {
        Arc::new(Self {
            incoming: Pot::of_incoming(),
            asked,
            answers,
            shares: Mutex::default(),
            waiting: Mutex::default(),
            anybody_waits: AtomicBool::new(false),
            changed: Notify::new(),
            stuck: AtomicU64::new(0),
            panics: AtomicU64::new(0),
        })
    }

    /// A share for a new connection, which `close` ends from outside.
    pub fn share(self: &Arc<Self>, close: impl Fn() + Send + Sync + 'static) -> Arc<Share> {
        let share = Arc::new(Share {
            admission: self.clone(),
            incoming: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
            answers: AtomicUsize::new(0),
            taken: AtomicU64::new(0),
            parked: Mutex::default(),
            parked_count: AtomicUsize::new(0),
            is_listed: AtomicBool::new(false),
            asks: AtomicBool::new(false),
            may_ask: Notify::new(),
            is_closed: AtomicBool::new(false),
            close: Box::new(close),
        });
        let mut shares = lock(&self.shares);
        if shares.len() == shares.capacity() {
            // Before it grows, so that what it costs is paid by as many connections.
            shares.retain(|share| share.strong_count() > 0);
        }
        shares.push(Arc::downgrade(&share));
        share
    }

    /// Bytes that are held for requests and answers.
    pub fn held_bytes(&self) -> usize {
        self.incoming.held() + self.asked.held() + self.answers.held()
    }

    /// Connections that were closed because they did not take their answers.
    pub fn stuck_connections(&self) -> u64 {
        self.stuck.load(Ordering::Relaxed)
    }

    /// Notes that a request was ended by a panic.
    pub fn note_panic(&self) {
        self.panics.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests that were ended by a panic.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    /// Admits whoever waits, as room is made, for as long as the node lives.
    pub async fn run(self: Arc<Self>, now: impl Fn() -> Duration) {
        let mut ticks = tokio::time::interval(ATTEND_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watch = StuckWatch::default();
        loop {
            if !self.anybody_waits.load(Ordering::Acquire) {
                self.changed.notified().await;
                ticks.reset_immediately();
            }
            tokio::select! {
                biased;
                _ = ticks.tick() => {
                    let now = now();
                    self.expire(now);
                    self.close_stuck(&mut watch, now);
                }
                () = self.changed.notified() => {}
            }
            if self.attend() {
                self.changed.notify_one();
                tokio::task::yield_now().await;
            }
        }
    }

    /// Admits those who wait, as far as there is room and for one turn. Returns whether that may
    /// not have been all.
    fn attend(&self) -> bool {
        let mut turn = Turn::default();
        let listed = lock(&self.waiting).len();
        for _ in 0..listed {
            if turn.is_over() {
                break;
            }
            let Some(share) = lock(&self.waiting).pop_front() else { break };
            share.is_listed.store(false, Ordering::Release);
            share.admit_parked(&mut turn);
            if share.asks.load(Ordering::Acquire) && share.has_room_to_ask() {
                share.asks.store(false, Ordering::Release);
                share.may_ask.notify_waiters();
            }
            if share.asks.load(Ordering::Acquire) || share.has_parked() {
                share.relist();
            }
        }
        let waiting = lock(&self.waiting);
        self.anybody_waits.store(!waiting.is_empty(), Ordering::Release);
        turn.is_over() && !waiting.is_empty()
    }

    /// Answers those who have waited until their deadline.
    fn expire(&self, now: Duration) {
        let listed: Vec<_> = lock(&self.waiting).iter().cloned().collect();
        for share in listed {
            for parked in share.unpark_expired(now) {
                self.run_parked(parked, Err(Error::unread_answers()));
            }
        }
    }

    fn run_parked(&self, parked: Parked, admitted: Result<(), Error>) {
        if catch_unwind(AssertUnwindSafe(|| (parked.run)(admitted))).is_err() {
            self.note_panic();
        }
    }

    fn close_stuck(&self, watch: &mut StuckWatch, now: Duration) {
        if self.answers.free() >= self.answers.limit / SHORT_OF {
            watch.seen.clear();
            return;
        }
        let shares: Vec<_> = lock(&self.shares).iter().filter_map(Weak::upgrade).collect();
        // However little each holds: there may be many.
        let is_in_the_way =
            |share: &&Arc<Share>| share.answers() > 0 && !share.is_closed.load(Ordering::Relaxed);
        let holding = shares.iter().filter(is_in_the_way);
        let seen = holding.map(|it| Holding {
            connection: Arc::as_ptr(it) as usize,
            taken: it.taken.load(Ordering::Relaxed),
            bytes: it.answers(),
        });
        let Some(stuck) = watch.stuck(seen.collect(), now) else { return };
        let is_stuck = |share: &&Arc<Share>| Arc::as_ptr(share) as usize == stuck;
        if let Some(share) = shares.iter().find(is_stuck) {
            // Not within the line: what is in a line happens only if somebody wants it.
            let connections_closed = self.stuck.fetch_add(1, Ordering::Relaxed) + 1;
            tracing::warn!(
                bytes = share.answers(),
                connections_closed,
                "a client does not read its answers while others need the room; its connection is \
                 closed"
            );
            share.is_closed.store(true, Ordering::Relaxed);
            (share.close)();
        }
    }
}

impl Share {
    /// The room of the node.
    pub fn admission(&self) -> &Arc<Admission> {
        &self.admission
    }

    /// Bytes of answers that are held for the connection.
    fn answers(&self) -> usize {
        self.answers.load(Ordering::Relaxed)
    }

    /// What is held for the connection.
    pub fn held(&self) -> Count {
        Count { asked: self.asked.load(Ordering::Relaxed), answers: self.answers() }
    }

    /// Counts so much more.
    pub fn hold(&self, count: Count) {
        if count.asked > 0 {
            self.asked.fetch_add(count.asked, Ordering::Relaxed);
            self.admission.asked.held.fetch_add(count.asked, Ordering::Relaxed);
        }
        if count.answers > 0 {
            self.answers.fetch_add(count.answers, Ordering::Relaxed);
            self.admission.answers.held.fetch_add(count.answers, Ordering::Relaxed);
        }
    }

    /// Counts so much less.
    pub fn release(&self, count: Count) {
        if count.asked > 0 {
            self.asked.fetch_sub(count.asked, Ordering::Relaxed);
            self.admission.asked.held.fetch_sub(count.asked, Ordering::Relaxed);
        }
        if count.answers > 0 {
            self.answers.fetch_sub(count.answers, Ordering::Relaxed);
            self.admission.answers.held.fetch_sub(count.answers, Ordering::Relaxed);
        }
        if self.admission.anybody_waits.load(Ordering::Acquire) {
            self.admission.changed.notify_one();
        }
    }

    /// Counts what the connection has taken less.
    pub fn take(&self, count: Count) {
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.release(count);
    }

    /// Counts what has come of a request that has not come whole, where so much counted before.
    /// False if there is no room for more, which then counts for nothing.
    pub fn receive(&self, before: usize, bytes: usize) -> bool {
        let incoming = &self.admission.incoming;
        if bytes > before {
            if !incoming.has_room_for(self.incoming.load(Ordering::Relaxed)) {
                return false;
            }
            self.incoming.fetch_add(bytes - before, Ordering::Relaxed);
            incoming.held.fetch_add(bytes - before, Ordering::Relaxed);
        } else if bytes < before {
            self.incoming.fetch_sub(before - bytes, Ordering::Relaxed);
            incoming.held.fetch_sub(before - bytes, Ordering::Relaxed);
        }
        true
    }

    /// Whether there is room for what a read finds.
    fn has_room(&self) -> bool {
        self.admission.answers.has_room_for(self.answers())
    }

    /// Whether the connection may ask for more.
    fn has_room_to_ask(&self) -> bool {
        self.admission.asked.has_room_for(self.asked.load(Ordering::Relaxed))
    }

    /// Whether an answer of so many bytes can be held at all, when it was made where it could not
    /// wait for room.
    pub fn can_hold(&self, bytes: usize) -> bool {
        let answers = &self.admission.answers;
        answers.held().saturating_add(bytes) <= answers.limit + answers.limit / EXCESS
    }

    fn has_parked(&self) -> bool {
        self.parked_count.load(Ordering::Acquire) > 0
    }

    /// Whether a read may be evaluated now; otherwise it has to be parked.
    pub(super) fn admits(&self) -> bool {
        !self.has_parked() && self.has_room()
    }

    /// Calls `run` once there is room, or by the deadline (local monotonic time) with an error.
    pub(super) fn park(
        self: &Arc<Self>,
        deadline: Duration,
        run: impl FnOnce(Result<(), Error>) + Send + 'static,
    ) {
        self.parked_count.fetch_add(1, Ordering::AcqRel);
        lock(&self.parked).push_back(Parked { deadline, run: Box::new(run) });
        self.list();
    }

    /// Waits until the connection may ask for more.
    pub async fn room_to_ask(self: &Arc<Self>) {
        // Mostly there is.
        while !self.has_room_to_ask() {
            let mut may_ask = std::pin::pin!(self.may_ask.notified());
            may_ask.as_mut().enable();
            if self.has_room_to_ask() {
                return;
            }
            self.asks.store(true, Ordering::Release);
            self.list();
            may_ask.await;
        }
    }

    fn list(self: &Arc<Self>) {
        self.relist();
        self.admission.anybody_waits.store(true, Ordering::Release);
        self.admission.changed.notify_one();
    }

    fn relist(self: &Arc<Self>) {
        if !self.is_listed.swap(true, Ordering::AcqRel) {
            lock(&self.admission.waiting).push_back(self.clone());
        }
    }

    fn unpark_expired(&self, now: Duration) -> Vec<Parked> {
        let is_over = |parked: &Parked| parked.deadline <= now;
        let mut parked = lock(&self.parked);
        if !parked.iter().any(is_over) {
            return Vec::new();
        }
        let all = std::mem::take(&mut *parked);
        let (over, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(is_over);
        *parked = rest.into();
        self.parked_count.fetch_sub(over.len(), Ordering::AcqRel);
        over
    }

    fn admit_parked(&self, turn: &mut Turn) {
        while self.has_room() && !turn.is_over() {
            let Some(parked) = lock(&self.parked).pop_front() else { return };
            self.parked_count.fetch_sub(1, Ordering::AcqRel);
            let before = self.answers();
            self.admission.run_parked(parked, Ok(()));
            turn.reads += 1;
            turn.bytes += self.answers().saturating_sub(before);
        }
    }
}

/// What has been admitted without a pause.
#[derive(Default)]
struct Turn {
    reads: usize,
    /// Those of their answers.
    bytes: usize,
}

impl Turn {
    fn is_over(&self) -> bool {
        self.reads >= TURN_READS_MAX || self.bytes >= TURN_BYTES_MAX
    }
}

/// Who holds how much.
struct Holding {
    connection: usize,
    /// How often it has taken something.
    taken: u64,
    bytes: usize,
}

/// Tells who has taken nothing for too long.
#[derive(Default)]
struct StuckWatch {
    /// How often each connection had taken something when it was seen last, and since when that
    /// is so.
    seen: HashMap<usize, (u64, Duration)>,
}

impl StuckWatch {
    /// The one that holds the most of those.
    fn stuck(&mut self, holding: Vec<Holding>, now: Duration) -> Option<usize> {
        let before = std::mem::take(&mut self.seen);
        self.seen.extend(holding.iter().map(|it| {
            let same = before.get(&it.connection).filter(|(taken, _)| *taken == it.taken);
            (it.connection, (it.taken, same.map_or(now, |(_, since)| *since)))
        }));
        let is_stuck = |it: &&Holding| {
            let (_, since) = self.seen[&it.connection];
            now.saturating_sub(since) >= STUCK_AFTER
        };
        let stuck = holding.iter().filter(is_stuck).max_by_key(|it| it.bytes);
        stuck.map(|it| it.connection)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    const KIB: usize = 1024;
    const LATER: Duration = Duration::from_secs(60);

    /// A hundred bytes of each, of which a connection may have fifty.
    fn small() -> Arc<Admission> {
        let pot = || Pot { limit: 100, held: 0.into(), part: 1, share_most: 50, share_least: 0 };
        Admission::within(pot(), pot())
    }

    fn share(admission: &Arc<Admission>) -> Arc<Share> {
        admission.share(|| {})
    }

    /// Takes room for large answers until there is none, as a client does that reads nothing.
    fn fill(share: &Share) {
        while share.admits() {
            share.hold(Count::answers(700 * KIB));
        }
    }

    #[test]
    fn those_who_take_nothing_leave_room_to_those_who_do() {
        let admission = Admission::new();
        // One by one, which is worse than all at once.
        let many: Vec<_> = (0..64).map(|_| share(&admission)).collect();
        many.iter().for_each(|share| fill(share));
        let alone = ANSWER_BYTES_OF_NODE_MAX / ANSWER_SHARE_OF_FREE;
        assert!(many[0].answers() < alone + 700 * KIB, "{:?}", many[0].held());
        let free = admission.answers.free();
        assert!(free > 22 * 1024 * KIB, "{free} bytes are left");
        let reader = share(&admission);
        // Its answers are taken at once, and all of them find room.
        for _ in 0..1_000 {
            assert!(reader.admits() && reader.has_room_to_ask());
            reader.hold(Count::answers(700 * KIB));
            reader.take(Count::answers(700 * KIB));
        }
        assert_eq!(reader.held(), Count::default());
    }

    #[test]
    fn the_limit_is_exceeded_by_one_answer_at_most() {
        let admission = Admission::new();
        for _ in 0..1_000 {
            fill(&share(&admission));
        }
        let most = ANSWER_BYTES_OF_NODE_MAX + 700 * KIB;
        assert!(admission.held_bytes() < most, "{}", admission.held_bytes());
        // Who asks is heard even then, and may wait.
        let late = share(&admission);
        assert!(!late.admits() && late.has_room_to_ask());
        assert!(!late.can_hold(16 * 1024 * KIB) && late.can_hold(KIB));
    }

    #[test]
    fn those_who_ask_without_end_leave_others_room_to_ask() {
        let admission = Admission::new();
        let ask = |share: &Share| {
            let mut asked = 0;
            while share.has_room_to_ask() {
                share.hold(Count::asked(ASKED_WEIGHT));
                asked += 1;
            }
            asked
        };
        // More than one pipeline's requests, and less than all.
        let alone = ask(&share(&admission));
        assert!((4_096..10_000).contains(&alone), "{alone}");
        for _ in 0..200 {
            let asked = ask(&share(&admission));
            assert!(asked >= ASKED_BYTES_OF_CONNECTION_MIN / ASKED_WEIGHT);
        }
        let most = ASKED_BYTES_OF_NODE_MAX + 200 * ASKED_BYTES_OF_CONNECTION_MIN;
        assert!(admission.held_bytes() <= most);
        // What is asked never stands in the way of its answers.
        assert!(share(&admission).admits());
    }

    #[test]
    fn what_waits_is_admitted_in_its_order_or_told_at_its_deadline() {
        let admission = small();
        let share = share(&admission);
        share.hold(Count::answers(50));
        let order = Arc::new(Mutex::new(Vec::new()));
        let park = |number: u64, deadline: u64| {
            let order = order.clone();
            share.park(Duration::from_secs(deadline), move |admitted| {
                lock(&order).push((number, admitted.err().map(|error| error.reason)));
            });
        };
        park(1, 60);
        park(2, 5);
        park(3, 60);
        admission.attend();
        assert!(lock(&order).is_empty());
        admission.expire(Duration::from_secs(5));
        assert_eq!(*lock(&order), [(2, Some("OVERLOADED"))]);
        share.take(Count::answers(50));
        // Whoever comes now is behind those who wait.
        assert!(!share.admits());
        admission.attend();
        assert_eq!(lock(&order)[1..], [(1, None), (3, None)]);
        assert!(share.admits());
        assert!(!admission.anybody_waits.load(Ordering::Acquire));
    }

    #[test]
    fn a_few_are_admitted_before_others_have_their_turn() {
        let admission = small();
        let shares = [share(&admission), share(&admission)];
        let ran = Arc::new(Mutex::new(Vec::new()));
        for (number, share) in shares.iter().enumerate() {
            for _ in 0..2 * TURN_READS_MAX {
                let ran = ran.clone();
                share.park(LATER, move |_| lock(&ran).push(number));
            }
        }
        for turn in 1..=4 {
            assert_eq!(admission.attend(), turn < 4);
            assert_eq!(lock(&ran).len(), turn * TURN_READS_MAX);
        }
        let firsts: Vec<_> = lock(&ran).chunks(TURN_READS_MAX).map(|turn| turn[0]).collect();
        assert_eq!(firsts, [0, 1, 0, 1]);
        assert!(!admission.anybody_waits.load(Ordering::Acquire));
    }

    #[test]
    fn a_turn_ends_with_a_few_large_reads() {
        let admission = Admission::new();
        let share = share(&admission);
        let ran = Arc::new(AtomicUsize::new(0));
        for _ in 0..4 {
            let (found, ran) = (share.clone(), ran.clone());
            share.park(LATER, move |_| {
                // More than its connection may hold while others hold much as well.
                found.hold(Count::answers(TURN_BYTES_MAX));
                ran.fetch_add(1, Ordering::Relaxed);
            });
        }
        for turn in 1..=4 {
            assert_eq!(admission.attend(), turn < 4);
            assert_eq!(ran.load(Ordering::Relaxed), turn);
            share.take(Count::answers(TURN_BYTES_MAX));
        }
    }

    #[tokio::test]
    async fn what_one_turn_leaves_is_admitted_in_the_next() {
        let admission = small();
        let share = share(&admission);
        let running = tokio::spawn(admission.clone().run(|| Duration::ZERO));
        let (done, mut all) = tokio::sync::mpsc::unbounded_channel();
        for number in 0..10 * TURN_READS_MAX {
            let done = done.clone();
            share.park(LATER, move |_| done.send(number).unwrap());
        }
        for number in 0..10 * TURN_READS_MAX {
            let next = tokio::time::timeout(LATER, all.recv()).await;
            assert_eq!(next.unwrap(), Some(number));
        }
        running.abort();
    }

    #[test]
    fn a_read_that_panics_ends_nobody_else() {
        let admission = small();
        let share = share(&admission);
        share.hold(Count::answers(50));
        let ran = Arc::new(AtomicUsize::new(0));
        let counted = ran.clone();
        share.park(LATER, |_| panic!("a defect"));
        share.park(LATER, move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        share.take(Count::answers(50));
        admission.attend();
        assert_eq!((ran.load(Ordering::Relaxed), admission.panics()), (1, 1));
    }

    #[tokio::test]
    async fn who_may_not_ask_is_told_when_it_may() {
        let admission = small();
        let share = share(&admission);
        let running = tokio::spawn(admission.clone().run(|| Duration::ZERO));
        share.hold(Count::asked(50));
        let asks = share.clone();
        let asking = tokio::spawn(async move { asks.room_to_ask().await });
        while !share.asks.load(Ordering::Acquire) {
            tokio::task::yield_now().await;
        }
        assert!(!asking.is_finished());
        share.take(Count::asked(50));
        tokio::time::timeout(LATER, asking).await.unwrap().unwrap();
        running.abort();
    }

    #[test]
    fn who_takes_nothing_while_room_is_short_is_closed() {
        let admission = Admission::new();
        let (closed, last) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(0)));
        let shares: Vec<_> = (0..30)
            .map(|number| {
                let (closed, last) = (closed.clone(), last.clone());
                admission.share(move || {
                    closed.fetch_add(1, Ordering::Relaxed);
                    *lock(&last) = number;
                })
            })
            .collect();
        let mut watch = StuckWatch::default();
        let mut look = |seconds: u64| {
            admission.close_stuck(&mut watch, Duration::from_secs(seconds));
            closed.load(Ordering::Relaxed)
        };
        shares[0].hold(Count::answers(100 * KIB * KIB));
        // There is room enough.
        assert_eq!((look(0), look(100)), (0, 0));
        for share in &shares[1..] {
            share.hold(Count::answers(KIB * KIB));
        }
        assert_eq!((look(200), look(201)), (0, 0));
        // The largest goes first, but it takes something.
        shares[0].take(Count::answers(1));
        shares[7].hold(Count::answers(1));
        assert_eq!((look(202), *lock(&last)), (1, 7));
        shares[7].release(Count::answers(KIB * KIB + 1));
        assert_eq!(look(203), 2);
        assert_eq!((look(204), *lock(&last)), (3, 0));
        // That makes room, and there is no need for more.
        shares[0].release(Count::answers(100 * KIB * KIB - 1));
        assert_eq!((look(300), admission.stuck_connections()), (3, 3));
    }

    #[test]
    fn those_who_take_nothing_are_closed_however_little_each_holds() {
        let admission = Admission::new();
        let closed = Arc::new(Mutex::new(Vec::new()));
        let shares: Vec<_> = (0..600)
            .map(|number| {
                let closed = closed.clone();
                admission.share(move || lock(&closed).push(number))
            })
            .collect();
        shares.iter().for_each(|share| share.hold(Count::answers(255 * KIB)));
        let reader = share(&admission);
        let mut watch = StuckWatch::default();
        for look in 0..1_000 {
            admission.close_stuck(&mut watch, STUCK_AFTER * look);
            for number in lock(&closed).drain(..) {
                shares[number].release(Count::answers(255 * KIB));
            }
        }
        assert!(reader.admits(), "{} bytes are left", admission.answers.free());
        // No more than had to.
        let left = shares.iter().filter(|share| share.answers() > 0).count();
        assert!(left >= 448, "{left} are left");
    }
}
