//! The circles of rings that were asked for, so that a look-up does not have to arrange the
//! members.
//!
//! A circle of a thousand members takes a tenth of a second, so it is built on a thread of its own,
//! once for all who wait for it, and kept until the ring has changed and somebody asks again. What
//! is kept is bounded by the bytes of all circles together; the one that was not used for the
//! longest time goes first. Circles are built one after the other, so that more rings than are kept
//! take one processor from the node and not all of them. The state knows nothing of all this: the
//! ring's revision says whether a circle is still the ring's.
//!
//! Invariants:
//! - At most one circle is being built, and a ring is in line for at most one more. Somebody waits
//!   only for a ring that is.
//! - A circle is as good as any that was asked for before it: rings do not go back.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::error::{Error, ErrorKind};
use crate::placement::Circle;
use crate::state::{Revision, RingKey, RingView};

/// Most bytes of all circles that are kept: those of twelve rings of a thousand members.
const BYTES_KEPT_MAX: usize = 256 * 1024 * 1024;

/// A ring as it was read, and its circle.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) view: Arc<RingView>,
    pub(super) circle: Circle,
    shares: OnceLock<Vec<f64>>,
}

impl Placed {
    fn build(view: Arc<RingView>) -> Result<Self, Error> {
        let members = view.members.iter().map(|it| (it.name.clone(), it.member.data().weight));
        let circle = Circle::new(members).map_err(|error| {
            Error::new(ErrorKind::Internal, "NO_CIRCLE", format!("the ring is damaged: {error}"))
        })?;
        Ok(Self { view, circle, shares: OnceLock::new() })
    }

    /// From 0 to 1, of all members by name. Takes longer than the circle did, but only once.
    pub(super) fn shares(&self) -> &[f64] {
        self.shares.get_or_init(|| self.circle.shares().iter().map(|it| it.fraction()).collect())
    }

    /// Whether the shares are known.
    pub(super) fn has_shares(&self) -> bool {
        self.shares.get().is_some()
    }
}

/// Which of two states of one ring is the later. Without a change that is stored, members can only
/// go: so their number tells the rest.
type Age = (Revision, Reverse<usize>);

fn age(view: &RingView) -> Age {
    (view.revision, Reverse(view.members.len()))
}

type Waiter = Box<dyn FnOnce(Result<Arc<Placed>, Error>) + Send>;

/// The circles of one node.
pub(super) struct Circles {
    bytes_max: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    places: BTreeMap<RingKey, Place>,
    /// Bytes of all that are ready.
    bytes: usize,
    uses: u64,
    /// Whether a circle is being built.
    building: bool,
    /// Rings that are to be built after that.
    line: VecDeque<RingKey>,
}

impl Default for Circles {
    fn default() -> Self {
        Self { bytes_max: BYTES_KEPT_MAX, kept: Mutex::default() }
    }
}

#[derive(Default)]
struct Place {
    ready: Option<Arc<Placed>>,
    /// Whether it is being built, or in line for it.
    pending: bool,
    waiting: Vec<(Arc<RingView>, Waiter)>,
    used: u64,
}

impl Circles {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        // Nothing panics while it holds the lock.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The circle of all stored members of a ring at this revision, if it is there.
    pub(super) fn at(&self, key: &RingKey, revision: Revision) -> Option<Arc<Placed>> {
        let mut kept = self.lock();
        kept.uses += 1;
        let uses = kept.uses;
        let place = kept.places.get_mut(key)?;
        place.used = uses;
        let is_it = |it: &&Arc<Placed>| it.view.revision == revision && it.view.is_settled;
        place.ready.as_ref().filter(is_it).cloned()
    }

    /// Calls `done` with the circle of `view`, or of a later state of the ring: at once if it is
    /// there, and otherwise on the thread that has built it.
    pub(super) fn of(self: &Arc<Self>, key: RingKey, view: RingView, done: Waiter) {
        let mut kept = self.lock();
        kept.uses += 1;
        let uses = kept.uses;
        let place = kept.places.entry(key.clone()).or_default();
        // Many wait for one build, and mostly with the same ring: they share it.
        let last = place.waiting.last().map(|(last, _)| last);
        let same = last.filter(|last| age(last) == age(&view)).cloned();
        let view = same.unwrap_or_else(|| Arc::new(view));
        place.used = uses;
        if let Some(ready) = place.ready.clone().filter(|it| age(&it.view) >= age(&view)) {
            drop(kept);
            return done(Ok(ready));
        }
        place.waiting.push((view, done));
        if !std::mem::replace(&mut place.pending, true) {
            kept.line.push_back(key);
        }
        self.build_next(&mut kept);
    }

    /// Builds what is first in line, unless something is being built.
    fn build_next(self: &Arc<Self>, kept: &mut Kept) {
        if kept.building {
            return;
        }
        while let Some(key) = kept.line.pop_front() {
            let waiting = kept.places.get(&key).into_iter().flat_map(|place| &place.waiting);
            let newest = waiting.map(|(view, _)| view).max_by_key(|view| age(view)).cloned();
            if let Some(view) = newest {
                kept.building = true;
                return self.build(key, view);
            }
        }
    }

    fn build(self: &Arc<Self>, key: RingKey, view: Arc<RingView>) {
        let circles = self.clone();
        tokio::task::spawn_blocking(move || {
            let age = age(&view);
            // A panic ends this circle, and not those that wait in line behind it.
            let built = catch_unwind(AssertUnwindSafe(|| Placed::build(view)));
            let built = built.unwrap_or_else(|_| Err(Error::panicked()));
            circles.finish(key, age, built.map(Arc::new));
        });
    }

    fn finish(self: &Arc<Self>, key: RingKey, built: Age, placed: Result<Arc<Placed>, Error>) {
        let mut kept = self.lock();
        let place = kept.places.entry(key.clone()).or_default();
        let (served, waiting): (Vec<_>, Vec<_>) =
            place.waiting.drain(..).partition(|(view, _)| age(view) <= built);
        place.pending = !waiting.is_empty();
        place.waiting = waiting;
        let again = place.pending;
        if let Ok(placed) = &placed {
            let before = place.ready.replace(placed.clone());
            let gone = before.map_or(0, |before| before.circle.size_bytes());
            kept.bytes = kept.bytes + placed.circle.size_bytes() - gone;
        }
        kept.make_room(&key, self.bytes_max);
        if again {
            kept.line.push_back(key);
        }
        kept.building = false;
        self.build_next(&mut kept);
        drop(kept);
        for (_, done) in served {
            done(placed.clone());
        }
    }
}

impl Kept {
    /// Drops what was not used for the longest time, but not that of `latest`.
    fn make_room(&mut self, latest: &RingKey, bytes_max: usize) {
        while self.bytes > bytes_max {
            let others = self
                .places
                .iter()
                .filter(|(key, place)| *key != latest && place.ready.is_some() && !place.pending);
            let Some(key) = others.min_by_key(|(_, place)| place.used).map(|(key, _)| key.clone())
            else {
                return;
            };
            let ready = self.places.remove(&key).and_then(|place| place.ready);
            self.bytes -= ready.map_or(0, |ready| ready.circle.size_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::state::{
        Command, LeaseId, LeaseKey, MemberData, MemberKey, Namespace, Outcome, Request, State,
        Timestamp,
    };

    fn key(name: &str) -> RingKey {
        RingKey { namespace: Namespace("web".into()), name: name.into() }
    }

    fn apply(state: &mut State, command: impl FnOnce(Request) -> Command) {
        let clock = state.clock().time;
        let request = Request { id: state.revision().0, first_sent: clock, expires: clock };
        let reply = state.apply(&command(request), false, &mut Vec::new());
        assert!(!matches!(reply.outcome, Outcome::Rejected(_)), "{reply:?}");
    }

    fn grant(state: &mut State, lease: LeaseId) {
        let key = LeaseKey { namespace: Namespace("web".into()), id: lease };
        apply(state, |request| Command::GrantLease {
            request,
            key,
            owner: "".into(),
            ttl: Duration::from_secs(60),
        });
    }

    /// Adds `count` members with a lease of their own to a ring.
    fn fill(state: &mut State, name: &str, lease: LeaseId, count: usize) {
        for number in 0..count {
            let name = MemberKey { ring: key(name), name: format!("{lease}-{number}").into() };
            let data = MemberData { address: "".into(), weight: 1, tags: BTreeMap::new() };
            apply(state, |request| Command::JoinRing { request, member: name, lease, data });
        }
    }

    fn wait(circles: &Arc<Circles>, state: &State, name: &str) -> Arc<Placed> {
        let (send, receive) = mpsc::channel();
        let view = state.ring(&key(name)).unwrap();
        circles.of(key(name), view, Box::new(move |placed| send.send(placed.unwrap()).unwrap()));
        receive.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    #[tokio::test]
    async fn a_circle_is_kept_until_its_ring_changes() {
        let (mut state, circles) = (State::new(), Arc::new(Circles::default()));
        let lease = LeaseId([1; 16]);
        grant(&mut state, lease);
        fill(&mut state, "ring", lease, 2);
        let first = wait(&circles, &state, "ring");
        assert_eq!(first.circle.members().len(), 2);
        assert!(Arc::ptr_eq(&first, &wait(&circles, &state, "ring")));
        let revision = state.settled_ring_revision(&key("ring")).unwrap();
        assert!(Arc::ptr_eq(&first, &circles.at(&key("ring"), revision).unwrap()));

        let data = MemberData { address: "".into(), weight: 9, tags: BTreeMap::new() };
        let member = MemberKey { ring: key("ring"), name: format!("{lease}-0").into() };
        apply(&mut state, |request| Command::JoinRing { request, member, lease, data });
        let revision = state.settled_ring_revision(&key("ring")).unwrap();
        assert!(circles.at(&key("ring"), revision).is_none());
        let second = wait(&circles, &state, "ring");
        assert!(second.shares()[0] > 0.8, "{:?}", second.shares());
        assert_eq!(circles.lock().bytes, second.circle.size_bytes());
    }

    /// Without a change of its revision: the member is hidden before it is swept.
    #[tokio::test]
    async fn a_member_that_is_due_leaves_the_circle() {
        let (mut state, circles) = (State::new(), Arc::new(Circles::default()));
        let (one, other) = (LeaseId([1; 16]), LeaseId([2; 16]));
        grant(&mut state, one);
        state.advance(crate::state::Stamp { time: Timestamp(9_000), steady: Timestamp(9_000) });
        grant(&mut state, other);
        fill(&mut state, "ring", one, 1);
        fill(&mut state, "ring", other, 1);
        let first = wait(&circles, &state, "ring");
        assert_eq!(first.circle.members().len(), 2);
        let later = Timestamp(60_000);
        state.advance(crate::state::Stamp { time: later, steady: later });
        assert_eq!(state.settled_ring_revision(&key("ring")), None);
        let second = wait(&circles, &state, "ring");
        assert_eq!(second.view.revision, first.view.revision);
        assert_eq!(second.circle.members().len(), 1);
        assert!(circles.at(&key("ring"), second.view.revision).is_none());
    }

    #[tokio::test]
    async fn what_is_kept_is_bounded() {
        let mut state = State::new();
        let names: Vec<String> = (0..5).map(|number| format!("ring-{number}")).collect();
        for (name, number) in names.iter().zip(1..) {
            grant(&mut state, LeaseId([number; 16]));
            fill(&mut state, name, LeaseId([number; 16]), 10);
        }
        let one = 10 * 10 * crate::placement::POINTS_PER_MEMBER as usize;
        let circles = Arc::new(Circles { bytes_max: 5 * one - 1, kept: Mutex::default() });
        for name in &names[..4] {
            wait(&circles, &state, name);
        }
        wait(&circles, &state, &names[0]);
        wait(&circles, &state, &names[4]);
        let kept = circles.lock();
        assert_eq!(kept.bytes, 4 * one);
        let found: Vec<_> = kept.places.keys().map(|key| key.name.to_string()).collect();
        assert_eq!(found, ["ring-0", "ring-2", "ring-3", "ring-4"]);
        // Ten rings of the largest size are, by default.
        let largest = one * crate::limits::RING_MEMBERS_MAX / 10;
        assert!(10 * largest < Circles::default().bytes_max);
    }

    /// Whoever comes while one is built joins it or gets in line, and each is built once.
    #[tokio::test(flavor = "multi_thread")]
    async fn one_circle_is_built_at_a_time() {
        let (mut state, circles) = (State::new(), Arc::new(Circles::default()));
        let names = ["one", "two", "three"];
        for (name, number) in names.iter().zip(1..) {
            grant(&mut state, LeaseId([number; 16]));
            fill(&mut state, name, LeaseId([number; 16]), 10);
        }
        let (send, receive) = mpsc::channel();
        for name in names.repeat(8) {
            let (send, view) = (send.clone(), state.ring(&key(name)).unwrap());
            circles.of(key(name), view, Box::new(move |it| send.send((name, it)).unwrap()));
            let kept = circles.lock();
            let pending = kept.places.values().filter(|place| place.pending).count();
            assert_eq!(kept.line.len() + usize::from(kept.building), pending);
        }
        let mut found = BTreeMap::new();
        for _ in 0..3 * 8 {
            let (name, placed) = receive.recv_timeout(Duration::from_secs(60)).unwrap();
            let placed = placed.unwrap();
            let first = found.entry(name).or_insert_with(|| placed.clone());
            assert!(Arc::ptr_eq(first, &placed), "{name} was built twice");
        }
        let kept = circles.lock();
        assert!(!kept.building && kept.line.is_empty());
        assert!(kept.places.values().all(|place| !place.pending && place.waiting.is_empty()));
    }
}
