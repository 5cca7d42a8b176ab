//! A great many leases that are due at once, one lease that a great many claims hang from, and a
//! queue that is as long as a queue can be: no step may grow with them.

use std::time::Duration;

use super::*;
use crate::limits::{CLAIMS_PER_LEASE_MAX, EXPIRE_BATCH_MAX, LEASE_RENEWALS_MAX, LEASES_MAX};

fn namespace() -> Namespace {
    Namespace("web".into())
}

fn lease_key(number: u64) -> LeaseKey {
    // As scattered as ids are.
    let hash = xxhash_rust::xxh3::xxh3_128(&number.to_le_bytes());
    LeaseKey { namespace: namespace(), id: LeaseId(hash.to_le_bytes()) }
}

fn lock_key(name: &str) -> LockKey {
    LockKey { namespace: namespace(), name: name.into() }
}

fn request(state: &State) -> Request {
    let clock = state.clock().time;
    Request { id: state.revision().0, first_sent: clock, expires: clock }
}

fn grant(state: &mut State, number: u64, ttl: Duration) {
    let command = Command::GrantLease {
        request: request(state),
        key: lease_key(number),
        owner: "".into(),
        ttl,
    };
    let reply = state.apply(&command, false, &mut Vec::new());
    assert!(matches!(reply.outcome, Outcome::LeaseGranted { .. }), "{reply:?}");
}

fn acquire(state: &mut State, name: &str, number: u64, wait: Duration) -> Outcome {
    let command = Command::AcquireLock {
        request: request(state),
        lock: lock_key(name),
        lease: lease_key(number).id,
        mode: LockMode::Exclusive,
        wait,
        lock_delay: Duration::ZERO,
    };
    state.apply(&command, false, &mut Vec::new()).outcome
}

fn release(state: &mut State, name: &str, token: Revision, changes: &mut Vec<Change>) -> Reply {
    let (request, lock) = (request(state), lock_key(name));
    state.apply(&Command::ReleaseLock { request, lock, lease: None, token }, false, changes)
}

fn advance(state: &mut State, by: Duration) {
    let Stamp { time, steady } = state.clock();
    state.advance(Stamp { time: time.plus(by), steady: steady.plus(by) });
}

/// Ticks until nothing is due, and returns how many that took. Each step is short.
fn tick_until_done(state: &mut State, mut between: impl FnMut(&mut State)) -> usize {
    let mut steps = 0;
    let mut changes = Vec::new();
    while state.has_due() {
        between(state);
        changes.clear();
        state.apply(&Command::Tick, false, &mut changes);
        steps += 1;
        assert!((1..=2 * EXPIRE_BATCH_MAX).contains(&changes.len()), "{}", changes.len());
    }
    steps
}

#[test]
fn a_namespace_has_as_many_leases_as_it_may() {
    const TTL: Duration = Duration::from_secs(20);
    let mut state = State::new();
    advance(&mut state, Duration::from_secs(1_000_000));
    for number in 0..LEASES_MAX as u64 {
        grant(&mut state, number, TTL);
    }
    let another = LEASES_MAX as u64;
    let one_more = |state: &mut State| {
        let request = request(state);
        let key = lease_key(another);
        let command = Command::GrantLease { request, key, owner: "".into(), ttl: TTL };
        let mut changes = Vec::new();
        (state.apply(&command, false, &mut changes).outcome, changes.len())
    };
    let refused = Outcome::Rejected(Rejection::TooManyLeases(LEASES_MAX as u64));
    assert_eq!(one_more(&mut state), (refused.clone(), 0));
    let revoke = Command::RevokeLease { request: request(&state), key: lease_key(0) };
    assert_eq!(state.apply(&revoke, false, &mut Vec::new()).outcome, Outcome::Done);
    grant(&mut state, another - 1 + 7, TTL);
    assert_eq!(one_more(&mut state), (refused, 0));
    // Those whose time is over are in nobody's way, and nobody waits for all of them to go.
    advance(&mut state, TTL);
    let (outcome, changes) = one_more(&mut state);
    assert!(matches!(outcome, Outcome::LeaseGranted { .. }), "{outcome:?}");
    assert_eq!(changes, 3, "one is removed, its tombstone put, another granted");
}

#[test]
fn a_hundred_thousand_leases_end_at_once_and_are_removed_in_steps() {
    const COUNT: u64 = 100_000;
    const TTL: Duration = Duration::from_secs(20);
    let mut state = State::new();
    advance(&mut state, Duration::from_secs(1_000_000));
    for number in 0..COUNT {
        grant(&mut state, number, TTL);
        // Every tenth holds a lock that the one behind it waits for.
        let name = format!("lock {}", number / 10);
        if number % 10 < 2 {
            acquire(&mut state, &name, number, TTL);
        }
    }
    grant(&mut state, COUNT, 100 * TTL);
    assert!(matches!(acquire(&mut state, "lock 7", COUNT, 10 * TTL), Outcome::LockWaiting { .. }));
    assert!(!state.has_due());
    advance(&mut state, TTL);

    let mut number = 0;
    let steps = tick_until_done(&mut state, |state| {
        // None is seen, whichever were swept, and nobody is renewed.
        number = (number + 7_919) % COUNT;
        assert!(state.lease(&lease_key(number)).is_none());
        let lock = state.lock(&lock_key(&format!("lock {}", number / 10)), 10);
        assert!(lock.is_none_or(|lock| number / 10 == 7 && lock.waiters_count == 1));
        let ids = vec![lease_key(number).id];
        let renew = Command::RenewLeases { namespace: namespace(), ids, expires: None };
        let outcome = state.apply(&renew, false, &mut Vec::new()).outcome;
        assert_eq!(outcome, Outcome::LeasesRenewed(vec![None]));
        // Others go on.
        let Outcome::LockGranted { token, .. } = acquire(state, "free", COUNT, Duration::ZERO)
        else {
            panic!("not granted");
        };
        assert_eq!(release(state, "free", token, &mut Vec::new()).outcome, Outcome::Done);
    });
    // The leases, their claims, and one grant.
    let work = (COUNT + COUNT / 5 + 1) as usize;
    let least = work.div_ceil(EXPIRE_BATCH_MAX);
    assert!((least - steps / EXPIRE_BATCH_MAX - 1..=least).contains(&steps), "{steps} of {least}");
    assert_eq!((state.leases(), state.claims()), (1, 1));
    let lock = state.lock(&lock_key("lock 7"), 10).unwrap();
    assert_eq!(lock.holders[0].claim.lease, lease_key(COUNT).id);
}

#[test]
fn all_renewals_of_one_command_are_one_revision() {
    let mut state = State::new();
    let count = LEASE_RENEWALS_MAX as u64;
    for number in 0..=count {
        grant(&mut state, number, Duration::from_secs(20));
    }
    advance(&mut state, Duration::from_secs(7));
    let renew = |numbers: std::ops::Range<u64>| Command::RenewLeases {
        namespace: namespace(),
        ids: numbers.map(|number| lease_key(number).id).collect(),
        expires: None,
    };
    let before = state.revision();
    let mut changes = Vec::new();
    let reply = state.apply(&renew(0..count), false, &mut changes);
    let deadline = Some(state.clock().steady.plus(Duration::from_secs(20)));
    assert_eq!(reply.outcome, Outcome::LeasesRenewed(vec![deadline; LEASE_RENEWALS_MAX]));
    assert_eq!((reply.revision.0, changes.len()), (before.0 + 1, LEASE_RENEWALS_MAX));
    let reply = state.apply(&renew(0..count + 1), false, &mut Vec::new());
    assert_eq!(reply.outcome, Outcome::Rejected(Rejection::MalformedCommand));
}

#[test]
fn a_lease_with_all_the_claims_it_can_have_ends_in_steps() {
    let mut state = State::new();
    advance(&mut state, Duration::from_secs(1));
    let wait = Duration::from_secs(600);
    grant(&mut state, 0, Duration::from_secs(3_600));
    grant(&mut state, 1, Duration::from_secs(3_600));
    // Half of them in one queue, half hold a lock each that another waits for.
    let half = CLAIMS_PER_LEASE_MAX / 2;
    for number in 0..half {
        acquire(&mut state, "queue", 0, wait);
        acquire(&mut state, &format!("lock {number}"), 0, wait);
        acquire(&mut state, &format!("lock {number}"), 1, wait);
    }
    let revoke = Command::RevokeLease { request: request(&state), key: lease_key(0) };
    let mut changes = Vec::new();
    let before = state.revision();
    let reply = state.apply(&revoke, false, &mut changes);
    assert_eq!((reply.outcome, reply.revision.0), (Outcome::Done, before.0 + 1));
    assert!(changes.len() <= EXPIRE_BATCH_MAX + 2, "{}", changes.len());
    assert!(state.lease(&lease_key(0)).is_none());
    // What holds is not worth anything any more, swept or not.
    assert!(state.lock(&lock_key("queue"), 1).is_none());
    let mut copy = script_test::restored(&state);
    let steps = tick_until_done(&mut state, |_| {});
    assert_eq!(tick_until_done(&mut copy, |_| {}), steps);
    assert_eq!(copy.digest(), state.digest());
    let work = CLAIMS_PER_LEASE_MAX + half;
    assert!(steps <= work / EXPIRE_BATCH_MAX + 1, "{steps}");
    assert_eq!(state.claims(), half as u64);
    assert_eq!(state.lease(&lease_key(1)).unwrap().claims, half as u64);
    let view = state.lock(&lock_key("lock 7"), 1).unwrap();
    assert_eq!((view.holders_count, view.waiters_count), (1, 0));
}

#[test]
fn a_hand_over_changes_no_more_than_it_is_about() {
    let mut state = State::new();
    for number in 0..10_000 {
        grant(&mut state, number, Duration::from_secs(3_600));
        acquire(&mut state, "door", number, Duration::from_secs(600));
    }
    let mut token = state.lock(&lock_key("door"), 1).unwrap().holders[0].claim.token().unwrap();
    let mut changes = Vec::new();
    for number in 1..10_000 {
        changes.clear();
        assert_eq!(release(&mut state, "door", token, &mut changes).outcome, Outcome::Done);
        // The one who goes, the lease that remembers it, the one who comes.
        let [gone, remembered, granted] = &changes[..] else { panic!("{changes:?}") };
        let causes = [gone.cause, remembered.cause, granted.cause];
        assert_eq!(causes, [Cause::Released, Cause::Remembered, Cause::Granted]);
        let Some(Record::Claim(claim)) = &granted.after else { panic!("{granted:?}") };
        assert_eq!(claim.lease, lease_key(number).id, "the next in line");
        token = claim.token().unwrap();
    }
}

/// Time that this thread has run for.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}

/// What a hand-over costs in a queue of so many, each of whom lines up again.
fn hand_over_cost(count: u64) -> Duration {
    const HAND_OVERS: u64 = 50_000;
    let wait = Duration::from_secs(600);
    let mut state = State::new();
    for number in 0..=count {
        grant(&mut state, number, Duration::from_secs(3_600));
        acquire(&mut state, "door", number, wait);
    }
    let mut token = state.lock(&lock_key("door"), 1).unwrap().holders[0].claim.token().unwrap();
    let mut changes = Vec::new();
    let start = cpu_time();
    for number in 0..HAND_OVERS {
        changes.clear();
        assert_eq!(release(&mut state, "door", token, &mut changes).outcome, Outcome::Done);
        token = changes.iter().find(|it| it.cause == Cause::Granted).unwrap().revision;
        acquire(&mut state, "door", number % (count + 1), wait);
    }
    (cpu_time() - start) / HAND_OVERS as u32
}

#[test]
#[ignore = "soak: measures, so it wants the machine for itself"]
fn a_long_queue_makes_a_hand_over_little_dearer() {
    let (short, long) = (hand_over_cost(64), hand_over_cost(10_000));
    println!("a hand-over: {short:?} with 64 waiting, {long:?} with 10,000");
    // Trees are deeper and caches colder; what a hand-over costs in all is many times this.
    assert!(long < 2 * short);
}
