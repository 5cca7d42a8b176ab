//! Who follows a claim is told once, of what its own state saw.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::following::{Calls, ClaimEnd, ClaimName, Following, Ticket};
use crate::limits::ACQUIRES_WAITING_MAX;
use crate::state::{
    Cause, Change, Command, LeaseId, LeaseKey, LockKey, LockMode, Namespace, Outcome, Reply,
    Request, Revision, Stamp, State, Timestamp,
};

const LATER: Duration = Duration::from_secs(100);

fn lease(number: u8) -> LeaseId {
    LeaseId([number; 16])
}

fn lock() -> LockKey {
    LockKey { namespace: Namespace("web".into()), name: "door".into() }
}

fn request(id: u64) -> Request {
    Request { id, first_sent: Timestamp(0), expires: Timestamp(60_000) }
}

fn name(number: u8) -> ClaimName {
    ClaimName { lock: lock(), lease: lease(number), request: u64::from(number) }
}

fn acquire(number: u8) -> Command {
    Command::AcquireLock {
        request: request(number.into()),
        lock: lock(),
        lease: lease(number),
        mode: LockMode::Exclusive,
        wait: Duration::from_secs(20),
        lock_delay: Duration::ZERO,
    }
}

fn cancel(number: u8) -> Command {
    Command::CancelAcquire {
        request: request(100),
        lock: lock(),
        lease: lease(number),
        acquire: number.into(),
    }
}

/// A state, who follows it, and what they were told.
struct Node {
    state: State,
    following: Following,
    told: Arc<Mutex<Vec<(u8, ClaimEnd)>>>,
}

impl Node {
    /// Leases 1 to 3, and lease 1 holds the lock.
    fn new() -> (Self, Revision) {
        let mut node =
            Self { state: State::new(), following: Following::default(), told: Arc::default() };
        for number in 1..=3 {
            node.apply(&Command::GrantLease {
                request: request(number.into()),
                key: LeaseKey { namespace: lock().namespace, id: lease(number) },
                owner: "".into(),
                ttl: Duration::from_secs(10 * u64::from(number)),
            });
        }
        let token = node.apply(&acquire(1)).revision;
        (node, token)
    }

    fn apply(&mut self, command: &Command) -> Reply {
        let mut changes: Vec<Change> = Vec::new();
        let reply = self.state.apply(command, false, &mut changes);
        let mut calls = Calls::default();
        self.following.observe(changes.iter(), &self.state, &mut calls);
        calls.make();
        reply
    }

    fn release(&mut self, token: Revision) {
        let command =
            Command::ReleaseLock { request: request(200), lock: lock(), lease: None, token };
        assert_eq!(self.apply(&command).outcome, Outcome::Done);
    }

    fn wait(&self, ticket: Ticket, number: u8, order: Revision, deadline: Duration) {
        let told = self.told.clone();
        let told = Box::new(move |end| told.lock().unwrap().push((number, end)));
        self.following.wait(ticket, order, deadline, &self.state, told).make();
    }

    /// Registers, applies the Acquire, and waits.
    fn follow(&mut self, number: u8) -> Revision {
        let ticket = self.following.register(name(number)).unwrap();
        let reply = self.apply(&acquire(number));
        assert!(matches!(reply.outcome, Outcome::LockWaiting { .. }), "{reply:?}");
        self.wait(ticket, number, reply.revision, LATER);
        reply.revision
    }

    fn told(&self) -> Vec<(u8, ClaimEnd)> {
        std::mem::take(&mut self.told.lock().unwrap())
    }
}

fn granted(token: u64, lease_seconds: u64) -> ClaimEnd {
    let lease_deadline = Timestamp(lease_seconds * 1000);
    ClaimEnd::Granted { token: Revision(token), time: Timestamp(0), lease_deadline }
}

#[test]
fn those_who_wait_are_told_in_their_turn() {
    let (mut node, token) = Node::new();
    node.follow(2);
    node.follow(3);
    assert!(node.told().is_empty());
    node.release(token);
    assert_eq!(node.told(), [(2, granted(8, 20))]);
    assert!(!node.following.is_empty());
    node.apply(&cancel(3));
    assert_eq!(node.told(), [(3, ClaimEnd::Over(Some(Cause::Cancelled)))]);
    assert!(node.following.is_empty());
}

#[test]
fn what_happens_before_the_answer_is_noted() {
    let (mut node, token) = Node::new();
    // The answers are slower than what happens to the claims.
    let (second, third) =
        (node.following.register(name(2)).unwrap(), node.following.register(name(3)).unwrap());
    let second_order = node.apply(&acquire(2)).revision;
    let third_order = node.apply(&acquire(3)).revision;
    node.apply(&cancel(3));
    node.release(token);
    assert!(node.told().is_empty());
    node.wait(second, 2, second_order, LATER);
    node.wait(third, 3, third_order, LATER);
    let cancelled = ClaimEnd::Over(Some(Cause::Cancelled));
    assert!(
        matches!(node.told()[..], [(2, ClaimEnd::Granted { .. }), (3, end)] if end == cancelled)
    );
    assert!(node.following.is_empty());
}

#[test]
fn an_answer_can_come_before_the_change() {
    let (mut node, token) = Node::new();
    let ticket = node.following.register(name(2)).unwrap();
    // Another node leads, and its answer is here before the entry is applied.
    let order = Revision(node.state.revision().0 + 1);
    node.wait(ticket, 2, order, LATER);
    assert!(node.told().is_empty());
    assert_eq!(node.apply(&acquire(2)).revision, order);
    node.release(token);
    assert!(matches!(node.told()[..], [(2, ClaimEnd::Granted { .. })]));
}

#[test]
fn all_who_follow_the_same_claim_are_told() {
    let (mut node, token) = Node::new();
    let order = node.follow(2);
    let ticket = node.following.register(name(2)).unwrap();
    assert_eq!(node.apply(&acquire(2)).revision, order);
    node.wait(ticket, 2, order, LATER);
    node.release(token);
    assert_eq!(node.told().len(), 2);
    assert!(node.following.is_empty());
}

#[test]
fn the_wait_and_the_lease_end_in_the_log() {
    let (mut node, _) = Node::new();
    node.follow(2);
    node.follow(3);
    // Lease 1 renews; both waits end at 20 s, and lease 2 does, too.
    let ids = vec![lease(1)];
    let at = |seconds: u64| {
        let time = Timestamp(seconds * 1000);
        Stamp { time, steady: time }
    };
    for seconds in [9, 18] {
        node.state.advance(at(seconds));
        node.apply(&Command::RenewLeases {
            namespace: lock().namespace,
            ids: ids.clone(),
            expires: None,
        });
    }
    node.state.advance(at(19));
    node.apply(&Command::Tick);
    assert!(node.told().is_empty());
    node.state.advance(at(20));
    node.apply(&Command::Tick);
    let told = node.told();
    assert!(told.contains(&(2, ClaimEnd::Over(Some(Cause::LeaseExpired)))), "{told:?}");
    assert!(told.contains(&(3, ClaimEnd::Over(Some(Cause::TimedOut)))), "{told:?}");
}

#[test]
fn a_snapshot_is_looked_at_again() {
    let (mut node, token) = Node::new();
    // Another node's state goes on, and this one hears of it by a snapshot.
    let second = node.follow(2);
    let third = node.follow(3);
    let late = node.following.register(name(3)).unwrap();
    let silent = Following::default();
    let following = std::mem::replace(&mut node.following, silent);
    node.release(token);
    let mut calls = Calls::default();
    following.installed(&node.state, &mut calls);
    calls.make();
    assert!(matches!(node.told()[..], [(2, ClaimEnd::Granted { .. })]));
    assert!(second < third);
    node.apply(&cancel(3));
    let mut calls = Calls::default();
    following.installed(&node.state, &mut calls);
    calls.make();
    assert_eq!(node.told(), [(3, ClaimEnd::Over(None))]);
    // One whose answer comes after the snapshot, for a claim that ended in it.
    node.following = following;
    node.wait(late, 3, third, LATER);
    assert_eq!(node.told(), [(3, ClaimEnd::Over(None))]);
    assert!(node.following.is_empty());
}

#[test]
fn a_caller_whose_time_is_over_still_waits() {
    let (mut node, token) = Node::new();
    let ticket = node.following.register(name(2)).unwrap();
    let order = node.apply(&acquire(2)).revision;
    node.wait(ticket, 2, order, Duration::from_secs(5));
    assert!(node.following.expire(Duration::from_secs(4)));
    assert!(node.told().is_empty());
    assert!(!node.following.expire(Duration::from_secs(5)));
    assert_eq!(node.told(), [(2, ClaimEnd::StillWaiting)]);
    node.release(token);
    assert!(node.told().is_empty());
}

#[test]
fn a_node_that_stops_lets_go_of_all() {
    let (mut node, _) = Node::new();
    node.follow(2);
    let ticket = node.following.register(name(3)).unwrap();
    node.following.close();
    assert_eq!(node.told(), [(2, ClaimEnd::Stopping)]);
    let order = node.apply(&acquire(3)).revision;
    node.wait(ticket, 3, order, LATER);
    assert_eq!(node.told(), [(3, ClaimEnd::Stopping)]);
}

#[test]
fn there_is_an_end_to_how_many_wait() {
    let following = Following::default();
    let mut last = None;
    for _ in 0..ACQUIRES_WAITING_MAX {
        last = following.register(name(1));
        assert!(last.is_some());
    }
    assert!(following.register(name(1)).is_none());
    assert_eq!(following.forget(last.unwrap()), None);
    assert!(following.register(name(1)).is_some());
}
