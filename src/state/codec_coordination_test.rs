//! Golden bytes of what is stored of leases, locks and rings; see `codec_test`.

use std::time::Duration;

use proptest::prelude::*;

use super::codec_test::{golden, key, request};
use super::script_test::restored;
use super::*;

const LEASE: LeaseId = LeaseId(*b"lease-0123456789");
const OTHER: LeaseId = LeaseId(*b"other-0123456789");

fn lease_key(id: LeaseId) -> LeaseKey {
    LeaseKey { namespace: Namespace("web".into()), id }
}

fn lock(name: &str) -> LockKey {
    LockKey { namespace: Namespace("web".into()), name: name.into() }
}

fn grant(id: u64, lease: LeaseId) -> Command {
    let (key, ttl) = (lease_key(lease), Duration::from_secs(2));
    Command::GrantLease { request: request(id), key, owner: "billing-7".into(), ttl }
}

fn acquire(id: u64, name: &str, lease: LeaseId, mode: LockMode) -> Command {
    Command::AcquireLock {
        request: request(id),
        lock: lock(name),
        lease,
        mode,
        wait: Duration::from_secs(3),
        lock_delay: Duration::from_secs(60),
    }
}

fn member(ring: &str, name: &str) -> MemberKey {
    let ring = RingKey { namespace: Namespace("web".into()), name: ring.into() };
    MemberKey { ring, name: name.into() }
}

fn join(id: u64, name: &str, lease: LeaseId) -> Command {
    let tag = |name: &str, value: &str| (name.to_string(), value.to_string());
    let tags = [tag("zone", "east"), tag("build", "")].into();
    let data = MemberData { address: "10.0.0.1:80".into(), weight: 300, tags };
    Command::JoinRing { request: request(id), member: member("shards", name), lease, data }
}

fn leave(id: u64, lease: Option<LeaseId>) -> Command {
    Command::LeaveRing { request: request(id), member: member("shards", "one"), lease }
}

fn fence() -> Option<Fence> {
    Some(Fence { lock: "door".into(), token: Revision(300) })
}

fn renew(expires: Option<Timestamp>) -> Command {
    let ids = vec![LEASE, OTHER, LEASE];
    Command::RenewLeases { namespace: Namespace("web".into()), ids, expires }
}

fn commands() -> Vec<(&'static str, Command)> {
    let release = |lease| Command::ReleaseLock {
        request: request(17),
        lock: lock("door"),
        lease,
        token: Revision(300),
    };
    vec![
        ("grant", grant(7, LEASE)),
        ("renew", renew(None)),
        ("renew, level 3", renew(Some(Timestamp(300)))),
        ("revoke", Command::RevokeLease { request: request(9), key: lease_key(LEASE) }),
        ("acquire exclusive", acquire(10, "door", LEASE, LockMode::Exclusive)),
        ("acquire shared", acquire(11, "door", LEASE, LockMode::Shared)),
        ("acquire permits", acquire(12, "pool", LEASE, LockMode::Permits { of: 300, take: 2 })),
        ("release", release(Some(LEASE))),
        ("release by token only", release(None)),
        (
            "cancel",
            Command::CancelAcquire {
                request: request(18),
                lock: lock("door"),
                lease: LEASE,
                acquire: 10,
            },
        ),
        (
            "break",
            Command::BreakLock {
                request: request(19),
                lock: lock("door"),
                token: Revision(300),
                delay: true,
            },
        ),
        ("join", join(22, "one", LEASE)),
        ("leave", leave(23, Some(LEASE))),
        ("leave whichever", leave(24, None)),
        (
            "update with a fence",
            Command::UpdateSession {
                request: request(20),
                key: key(),
                set: vec![],
                remove: vec![],
                expected_version: None,
                principal: None,
                idle_timeout: None,
                fence: fence(),
            },
        ),
        (
            "delete with a fence",
            Command::DeleteSession {
                request: request(21),
                key: key(),
                expected_version: None,
                fence: fence(),
            },
        ),
    ]
}

/// A state with a lease that remembers, one that was revoked and one that has expired, and a claim
/// of each mode and in each state.
fn state() -> State {
    let mut state = State::new();
    let expired = LeaseId([9; 16]);
    let revoked = LeaseId([8; 16]);
    let first = [grant(1, expired), acquire(2, "delayed", expired, LockMode::Shared)];
    let second = [
        Command::Tick,
        grant(3, revoked),
        Command::RevokeLease { request: request(4), key: lease_key(revoked) },
        grant(5, LEASE),
        acquire(6, "door", LEASE, LockMode::Exclusive),
        acquire(7, "door", LEASE, LockMode::Shared),
        acquire(8, "pool", LEASE, LockMode::Permits { of: 5, take: 2 }),
        Command::CancelAcquire {
            request: request(9),
            lock: lock("door"),
            lease: LEASE,
            acquire: 10,
        },
    ];
    for (time, commands) in [(1_000, &first[..]), (3_000, &second[..])] {
        state.advance(Stamp { time: Timestamp(time), steady: Timestamp(time - 100) });
        for command in commands {
            let reply = state.apply(command, true, &mut Vec::new());
            assert!(!matches!(reply.outcome, Outcome::Rejected(_)), "{command:?}: {reply:?}");
        }
    }
    state
}

#[test]
fn commands_have_their_bytes() {
    for (name, command) in commands() {
        let golden = golden(&format!("command {name}"), &encode_command(&command, FEATURE_LEVEL));
        assert_eq!(decode_command(golden, FEATURE_LEVEL).unwrap(), command);
    }
}

#[test]
fn nothing_above_the_level_in_force_is_written() {
    let bytes = encode_command(&renew(Some(Timestamp(300))), FEATURE_LEVEL_BASE);
    assert_eq!(bytes, encode_command(&renew(None), FEATURE_LEVEL));
    assert_eq!(decode_command(bytes, FEATURE_LEVEL_BASE).unwrap(), renew(None));
}

#[test]
fn what_is_above_the_level_in_force_is_not_taken_for_garbage() {
    let bytes = encode_command(&renew(Some(Timestamp(300))), FEATURE_LEVEL);
    let error = decode_command(bytes, FEATURE_LEVEL_BASE).unwrap_err();
    assert!(matches!(error, CodecError::FeatureLevel { found: 3 }), "{error}");
    // A kind of command that this build does not know, as a later one writes it.
    let later = [&[0x18, FEATURE_LEVEL as u8 + 1][..], &[0xa2, 0x3f, 0]].concat();
    let error = decode_command(later.into(), FEATURE_LEVEL).unwrap_err();
    assert!(matches!(error, CodecError::FeatureLevel { .. }), "{error}");
    // One that no build knows at the level that it names.
    let garbage = Bytes::from_static(&[0xa2, 0x3f, 0]);
    let error = decode_command(garbage, FEATURE_LEVEL).unwrap_err();
    assert!(matches!(error, CodecError::Malformed(_)), "{error}");
}

#[test]
fn replies_have_their_bytes() {
    let mut outcomes = vec![
        Outcome::Done,
        Outcome::LeaseGranted { deadline: Timestamp(300) },
        Outcome::LeasesRenewed(vec![Some(Timestamp(300)), None]),
        Outcome::LeasesRenewed(vec![]),
        Outcome::LockGranted {
            token: Revision(300),
            time: Timestamp(302),
            lease_deadline: Timestamp(301),
        },
        Outcome::LockWaiting { position: 300 },
        Outcome::RingJoined { lease_deadline: Timestamp(301) },
    ];
    let rejections = [
        Rejection::Fenced,
        Rejection::LeaseNotFound,
        Rejection::LeaseExists,
        Rejection::LeaseIdRetired,
        Rejection::TooManyLeases(300),
        Rejection::LockHeld,
        Rejection::LockNotHeld,
        Rejection::LockModeMismatch(LockKind::ReadWrite),
        Rejection::LockModeMismatch(LockKind::Counted { permits: 300 }),
        Rejection::AcquireEnded,
        Rejection::TooManyWaiters(300),
        Rejection::TooManyClaims(300),
        Rejection::MemberExists,
        Rejection::MemberNotFound,
        Rejection::TooManyMembers(300),
        Rejection::TooManyMembersOfLease(300),
    ];
    outcomes.extend(rejections.map(Outcome::Rejected));
    for outcome in outcomes {
        let name = format!("reply {outcome:?}");
        let reply = Reply { revision: Revision(4), outcome };
        assert_eq!(decode_reply(&golden(&name, &encode_reply(&reply))).unwrap(), reply);
    }
}

#[test]
fn records_have_their_bytes() {
    let state = state();
    let header = golden("header with leases", &state.header());
    golden("digest with leases", &state.digest().0.to_be_bytes());
    let mut restore = Restore::new(&header).unwrap();
    let mut names = Vec::new();
    for (key, record) in state.records() {
        let name = match &record {
            Record::Lease(_) => "lease".into(),
            Record::LeaseTombstone(stone) => format!("lease tombstone {:?}", stone.end()),
            Record::Claim(claim) => {
                let state = match claim.state {
                    ClaimState::Waiting { .. } => "waiting",
                    ClaimState::Held { .. } => "held",
                    ClaimState::Delayed { .. } => "delayed",
                };
                format!("claim {:?} {state}", claim.mode)
            }
            record => panic!("{record:?}"),
        };
        let mut value = Vec::new();
        encode_record(&record, &mut value);
        let golden_key = golden(&format!("{name} key"), &encode_key(&key));
        let golden_value = golden(&name, &value);
        assert_eq!(decode_key(&golden_key).unwrap(), key);
        assert_eq!(decode_record(&key, &golden_value).unwrap(), record);
        restore.insert(&golden_key, &golden_value).unwrap();
        names.push(name);
    }
    assert_eq!(names.len(), 7, "{names:?}");
    assert_eq!(restore.finish().unwrap().header(), state.header());
}

#[test]
fn records_of_rings_have_their_bytes() {
    let mut state = State::new();
    state.advance(Stamp { time: Timestamp(1_000), steady: Timestamp(900) });
    for command in [grant(1, LEASE), join(2, "one", LEASE), join(3, "two", LEASE)] {
        let reply = state.apply(&command, false, &mut Vec::new());
        assert!(!matches!(reply.outcome, Outcome::Rejected(_)), "{command:?}: {reply:?}");
    }
    let header = golden("header with a ring", &state.header());
    golden("digest with a ring", &state.digest().0.to_be_bytes());
    let mut restore = Restore::new(&header).unwrap();
    let mut names = Vec::new();
    for (key, record) in state.records() {
        let name = format!("{} with a ring", key.kind());
        let mut value = Vec::new();
        encode_record(&record, &mut value);
        if let Record::Ring(_) | Record::Member(_) = record
            && !names.contains(&name)
        {
            assert_eq!(
                decode_key(&golden(&format!("{name} key"), &encode_key(&key))).unwrap(),
                key
            );
            assert_eq!(decode_record(&key, &golden(&name, &value)).unwrap(), record);
        }
        restore.insert(&encode_key(&key), &value).unwrap();
        names.push(name);
    }
    assert_eq!(names.len(), 4, "{names:?}");
    assert_eq!(restore.finish().unwrap().header(), state.header());
}

#[test]
fn keys_of_rings_are_distinct() {
    let ring = |name: &str| RingKey { namespace: Namespace("a".into()), name: name.into() };
    let keys = [
        RecordKey::Ring(ring("bc")),
        RecordKey::Ring(RingKey { namespace: Namespace("ab".into()), name: "c".into() }),
        RecordKey::Member(MemberKey { ring: ring("b"), name: "c".into() }),
        RecordKey::Member(MemberKey { ring: ring("bc"), name: "".into() }),
        RecordKey::Member(MemberKey { ring: ring("b"), name: "c\0".into() }),
    ];
    let encoded: std::collections::BTreeSet<_> = keys.iter().map(encode_key).collect();
    assert_eq!(encoded.len(), keys.len());
    assert!(keys.iter().all(|key| decode_key(&encode_key(key)).unwrap() == *key));
}

/// A ring without members, members without their ring, and a ring that was last changed before one
/// of them was.
#[test]
fn rings_that_do_not_go_together_are_refused() {
    let mut state = State::new();
    for command in [grant(1, LEASE), join(2, "one", LEASE)] {
        state.apply(&command, false, &mut Vec::new());
    }
    let restored = |change: &dyn Fn(&RecordKey, &mut Vec<u8>) -> bool| {
        let mut restore = Restore::new(&state.header()).unwrap();
        for (key, record) in state.records() {
            let mut value = Vec::new();
            encode_record(&record, &mut value);
            if change(&key, &mut value) {
                restore.insert(&encode_key(&key), &value).unwrap();
            }
        }
        restore.finish()
    };
    assert!(restored(&|_, _| true).is_ok());
    let is_ring = |key: &RecordKey| matches!(key, RecordKey::Ring(_));
    let is_member = |key: &RecordKey| matches!(key, RecordKey::Member(_));
    let malformed = |restored| matches!(restored, Err(CodecError::Malformed(_)));
    assert!(malformed(restored(&|key, _| !is_ring(key))));
    assert!(malformed(restored(&|key, _| !is_member(key))));
    assert!(malformed(restored(&|key, value| {
        if is_ring(key) {
            *value.last_mut().unwrap() -= 1;
        }
        true
    })));
}

#[test]
fn keys_of_claims_are_distinct() {
    let key = |namespace: &str, name: &str| {
        let lock = LockKey { namespace: Namespace(namespace.into()), name: name.into() };
        RecordKey::Claim(ClaimKey { lock, order: Revision(1) })
    };
    let keys = [key("a", "bc"), key("ab", "c"), key("abc", ""), key("a", "b\0c")];
    let encoded: std::collections::BTreeSet<_> = keys.iter().map(encode_key).collect();
    assert_eq!(encoded.len(), keys.len());
    assert!(keys.iter().all(|key| decode_key(&encode_key(key)).unwrap() == *key));
}

#[test]
fn claims_that_do_not_go_together_are_refused() {
    let state = state();
    let put = |key: &RecordKey, record: &Record, restore: &mut Restore| {
        let mut value = Vec::new();
        encode_record(record, &mut value);
        restore.insert(&encode_key(key), &value).unwrap();
    };
    let claims: Vec<_> =
        state.records().filter(|(key, _)| matches!(key, RecordKey::Claim(_))).collect();
    let (shared, permits) = (&claims[0], &claims[3]);
    assert!(matches!(&shared.1, Record::Claim(claim) if claim.mode == LockMode::Shared));
    let RecordKey::Claim(ClaimKey { lock, .. }) = &shared.0 else { unreachable!() };
    // A permit of a lock that others share.
    let stray = RecordKey::Claim(ClaimKey { lock: lock.clone(), order: Revision(99) });
    let mut restore = Restore::new(&state.header()).unwrap();
    put(&shared.0, &shared.1, &mut restore);
    put(&stray, &permits.1, &mut restore);
    assert!(matches!(restore.finish(), Err(CodecError::Malformed(_))));
    // A token that two have.
    let mut restore = Restore::new(&state.header()).unwrap();
    put(&shared.0, &shared.1, &mut restore);
    put(&stray, &shared.1, &mut restore);
    assert!(matches!(restore.finish(), Err(CodecError::Malformed(_))));
    // A lease that both lives and has ended.
    let mut restore = Restore::new(&state.header()).unwrap();
    for (key, record) in state.records() {
        if let Record::LeaseTombstone(_) = record {
            put(&RecordKey::LeaseTombstone(lease_key(LEASE)), &record, &mut restore);
            break;
        }
        put(&key, &record, &mut restore);
    }
    assert!(matches!(restore.finish(), Err(CodecError::Malformed(_))));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// Bytes with a few of them changed, added or cut off decode to something or are refused; and
    /// what can be decoded can be applied.
    #[test]
    fn damage_does_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        length in any::<prop::sample::Index>(),
    ) {
        let damage = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            for (index, byte) in &changes {
                let index = index.index(bytes.len());
                bytes[index] = *byte;
            }
            bytes.truncate(length.index(2 * bytes.len()));
            Bytes::from(bytes)
        };
        let mut state = state();
        state.apply(&join(30, "three", LEASE), false, &mut Vec::new());
        for (_, command) in commands() {
            let bytes = damage(&encode_command(&command, FEATURE_LEVEL));
            if let Ok(command) = decode_command(bytes, FEATURE_LEVEL) {
                let reply = state.apply(&command, false, &mut Vec::new());
                state.records.check();
                let _ = decode_reply(&damage(&encode_reply(&reply)));
            }
        }
        restored(&state);
        // With any digest, so that what was damaged comes as far as it can.
        let mut restore = Restore::new(&damage(&state.header()))
            .unwrap_or_else(|_| Restore::new(&state.header()).unwrap());
        for (key, record) in state.records() {
            let mut value = Vec::new();
            encode_record(&record, &mut value);
            let _ = restore.insert(&damage(&encode_key(&key)), &damage(&value));
        }
        if let Ok(mut state) = restore.finish() {
            state.records.check();
            state.apply(&Command::Tick, false, &mut Vec::new());
        }
    }
}
