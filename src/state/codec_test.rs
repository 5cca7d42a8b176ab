//! Golden bytes of everything that is stored, and what decoding does with bytes that are not.
//!
//! The bytes in `testscripts/stored.golden` are in logs and checkpoints out there. A test that
//! fails here says that those could not be read any more: never change a line, only add some, which
//! `UPDATE_GOLDENFILES=1` does for names that have none.

use std::io::Write as _;
use std::time::Duration;

use proptest::prelude::*;

use super::script_test::restored;
use super::*;

pub(super) fn key() -> SessionKey {
    SessionKey { namespace: Namespace("web".into()), digest: Digest(*b"0123456789abcdef") }
}

pub(super) fn request(id: u64) -> Request {
    Request { id, first_sent: Timestamp(1_000), expires: Timestamp(11_000) }
}

fn attribute(name: &str, value: &'static [u8]) -> Attribute {
    Attribute { name: name.into(), value: Bytes::from_static(value) }
}

fn create() -> Command {
    Command::CreateSession {
        request: request(7),
        key: key(),
        principal: Some("alice".into()),
        attributes: vec![attribute("lang", b"en"), attribute("raw", &[0, 255])],
        idle_timeout: Some(Timeout::After(Duration::from_secs(60))),
        absolute_timeout: Some(Timeout::Never),
    }
}

fn update() -> Command {
    Command::UpdateSession {
        request: request(8),
        key: key(),
        set: vec![attribute("theme", b"dark")],
        remove: vec!["lang".into()],
        expected_version: Some(Revision(1)),
        principal: Some(None),
        idle_timeout: None,
        fence: None,
    }
}

fn delete() -> Command {
    Command::DeleteSession { request: request(9), key: key(), expected_version: None, fence: None }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The golden bytes called `name`, which `found` must be.
pub(super) fn golden(name: &str, found: &[u8]) -> Bytes {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/state/testscripts/stored.golden");
    let line = |line: &str| line.strip_prefix(name)?.strip_prefix(": ").map(str::to_string);
    let lines = std::fs::read_to_string(path).unwrap();
    let found = hex(found);
    let golden = lines.lines().find_map(line).unwrap_or_else(|| {
        assert!(std::env::var_os("UPDATE_GOLDENFILES").is_some(), "missing: {name}: {found}");
        let mut file = std::fs::File::options().append(true).open(path).unwrap();
        file.write_all(format!("{name}: {found}\n").as_bytes()).unwrap();
        found.clone()
    });
    assert_eq!(found, golden, "{name}");
    bytes(&golden)
}

pub(super) fn bytes(hex: &str) -> Bytes {
    let digit = |index| u8::from_str_radix(&hex[index..index + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(digit).collect()
}

/// The golden bytes called `name`, which an earlier level wrote and this one does not any more.
fn earlier(name: &str) -> Bytes {
    let lines = include_str!("testscripts/stored.golden").lines();
    let line = |line: &'static str| line.strip_prefix(name)?.strip_prefix(": ");
    bytes(lines.filter_map(line).next().unwrap())
}

/// A state in which one session was created and changed, and another was deleted.
fn state() -> State {
    let mut state = State::new();
    state.advance(Stamp { time: Timestamp(1_000), steady: Timestamp(900) });
    let mut other = key();
    other.digest.0[0] = b'x';
    let create_other = Command::CreateSession {
        request: request(10),
        key: other.clone(),
        principal: None,
        attributes: vec![],
        idle_timeout: None,
        absolute_timeout: None,
    };
    let delete_other = Command::DeleteSession {
        request: request(11),
        key: other,
        expected_version: None,
        fence: None,
    };
    for command in [create(), update(), create_other, delete_other] {
        let reply = state.apply(&command, true, &mut Vec::new());
        assert!(matches!(reply.outcome, Outcome::Written { .. }), "{command:?}: {reply:?}");
    }
    state
}

#[test]
fn commands() {
    let touch = Command::TouchSession { request: request(1 << 63), key: key() };
    let commands = [
        ("create", create()),
        ("update", update()),
        ("touch", touch),
        ("delete", delete()),
        ("tick", Command::Tick),
        ("raise", Command::RaiseFeatureLevel { to: 300 }),
    ];
    for (name, command) in commands {
        let golden = golden(&format!("command {name}"), &encode_command(&command, FEATURE_LEVEL));
        assert_eq!(decode_command(golden, FEATURE_LEVEL).unwrap(), command);
    }
}

#[test]
fn entries() {
    let stamp = Stamp { time: Timestamp(300), steady: Timestamp(200) };
    let command = encode_command(&Command::Tick, FEATURE_LEVEL);
    let proposals = vec![
        Proposal { command: command.clone(), resend: false },
        Proposal { command, resend: true },
    ];
    let golden = golden("entry, level 2", &encode_entry(stamp, 2, &proposals));
    let entry = decode_entry(golden).unwrap();
    let expected = Entry { stamp, feature_level: 2, proposals: proposals.clone() };
    assert_eq!(entry, expected);
    assert_eq!(decode_entry(earlier("entry")).unwrap(), Entry { feature_level: 1, ..expected });
    let later = decode_entry(encode_entry(stamp, FEATURE_LEVEL + 1, &proposals)).unwrap_err();
    assert!(matches!(later, CodecError::FeatureLevel { .. }), "{later}");
    assert!(later.to_string().contains("upgrade this node"), "{later}");
}

#[test]
fn commands_are_sliced_not_copied() {
    let command = encode_command(&create(), FEATURE_LEVEL);
    let proposals = [Proposal { command, resend: false }];
    let entry = encode_entry(Stamp::default(), FEATURE_LEVEL, &proposals);
    let within = |bytes: &Bytes| entry.as_ptr_range().contains(&bytes.as_ptr());
    let decoded = decode_entry(entry.clone()).unwrap();
    assert!(within(&decoded.proposals[0].command));
    let command = decode_command(decoded.proposals[0].command.clone(), FEATURE_LEVEL).unwrap();
    let Command::CreateSession { attributes, .. } = command else { panic!("{command:?}") };
    assert!(attributes.iter().all(|attribute| within(&attribute.value)));
}

#[test]
fn replies() {
    let written = |version, deadline| Outcome::Written { version: Revision(version), deadline };
    let outcomes = [
        written(3, Some(Timestamp(300))),
        written(3, None),
        Outcome::Rejected(Rejection::SessionNotFound),
        Outcome::Rejected(Rejection::SessionExists),
        Outcome::Rejected(Rejection::SessionIdRetired),
        Outcome::Rejected(Rejection::VersionMismatch(Revision(5))),
        Outcome::Rejected(Rejection::RequestExpired),
        Outcome::Rejected(Rejection::RequestLifetimeTooLong),
        Outcome::Rejected(Rejection::OutcomeUnknown),
        Outcome::Rejected(Rejection::SessionTooLarge(300)),
        Outcome::Rejected(Rejection::TooManyAttributes(257)),
        Outcome::Rejected(Rejection::MalformedCommand),
        Outcome::Rejected(Rejection::ClockAhead),
    ];
    for outcome in outcomes {
        let reply = Reply { revision: Revision(4), outcome: outcome.clone() };
        let golden = golden(&format!("reply {outcome:?}"), &encode_reply(&reply));
        assert_eq!(decode_reply(&golden).unwrap(), reply);
    }
}

#[test]
fn states() {
    let state = state();
    let header = golden("header, level 2", &state.header());
    assert_eq!(StateHeader::decode(&header).unwrap().digest(), state.digest());
    let earlier = earlier("header");
    assert_eq!(StateHeader::decode(&earlier).unwrap().feature_level, FEATURE_LEVEL_BASE);
    // Digests are in headers, so the hash of a record is part of the format.
    golden("digest", &state.digest().0.to_be_bytes());
    let mut raised = restored(&state);
    raised.raise_feature_level(3).unwrap();
    let header = golden("header, level 3", &raised.header());
    assert_eq!(StateHeader::decode(&header).unwrap().digest(), raised.digest());
    golden("digest, level 3", &raised.digest().0.to_be_bytes());
    // What an earlier level wrote is restored to the same, and then is of the lowest that is left.
    let mut restore = Restore::new(&earlier).unwrap();
    for (key, record) in state.records() {
        let kind = match &key {
            RecordKey::Session(_) => "session",
            RecordKey::Tombstone(_) => "tombstone",
            key => panic!("{key:?}"),
        };
        let mut value = Vec::new();
        encode_record(&record, &mut value);
        let golden_key = golden(&format!("{kind} key"), &encode_key(&key));
        let golden_value = golden(kind, &value);
        assert_eq!(decode_key(&golden_key).unwrap(), key);
        assert_eq!(decode_record(&key, &golden_value).unwrap(), record);
        restore.insert(&golden_key, &golden_value).unwrap();
    }
    assert_eq!(restore.finish().unwrap().header(), state.header());
}

#[test]
fn a_state_that_is_not_its_headers_is_refused() {
    let state = state();
    let records: Vec<_> = state
        .records()
        .map(|(key, record)| {
            let mut value = Vec::new();
            encode_record(&record, &mut value);
            (encode_key(&key), value)
        })
        .collect();
    let restore = |records: &[(Bytes, Vec<u8>)]| {
        let mut restore = Restore::new(&state.header())?;
        for (key, value) in records {
            restore.insert(key, value)?;
        }
        restore.finish().map(|_| ())
    };
    restore(&records).unwrap();
    let missing = restore(&records[1..]).unwrap_err();
    assert!(matches!(missing, CodecError::Mismatch { found: 1, expected: 2, .. }), "{missing}");
    let twice = restore(&[&records[..], &records[1..]].concat()).unwrap_err();
    assert!(matches!(twice, CodecError::Malformed(_)), "{twice}");
    let mut swapped = records.clone();
    swapped[0].1 = records[1].1.clone();
    let swapped = restore(&swapped).unwrap_err();
    assert!(matches!(swapped, CodecError::Malformed(_)), "{swapped}");
    // A key and another's session: as many records, but not these.
    let mut moved = records.clone();
    let mut key = moved[0].0.to_vec();
    key[5] ^= 1;
    moved[0].0 = key.into();
    let moved = restore(&moved).unwrap_err();
    assert!(matches!(moved, CodecError::Mismatch { .. }), "{moved}");

    let mut header = state.header().to_vec();
    // The first field is the feature level.
    assert_eq!(header[..2], [0x08, FEATURE_LEVEL_BASE as u8]);
    header[1] = FEATURE_LEVEL as u8 + 1;
    let newer = Restore::new(&header).unwrap_err();
    let CodecError::FeatureLevel { found } = newer else { panic!("{newer}") };
    assert_eq!(found, FEATURE_LEVEL + 1);
}

#[test]
fn what_has_no_order_is_refused() {
    let mut wrong = create();
    let Command::CreateSession { attributes, .. } = &mut wrong else { unreachable!() };
    attributes.reverse();
    let command = decode_command(encode_command(&wrong, FEATURE_LEVEL), FEATURE_LEVEL).unwrap();
    let mut state = State::new();
    let reply = state.apply(&command, false, &mut Vec::new());
    assert_eq!(reply.outcome, Outcome::Rejected(Rejection::MalformedCommand));
    assert_eq!(reply, state.reject_malformed());
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
        for command in [create(), update(), delete()] {
            let bytes = damage(&encode_command(&command, FEATURE_LEVEL));
            if let Ok(command) = decode_command(bytes, FEATURE_LEVEL) {
                state.apply(&command, false, &mut Vec::new());
                state.records.check();
            }
            let command = encode_command(&command, FEATURE_LEVEL);
            let proposals = [Proposal { command, resend: true }];
            let _ = decode_entry(damage(&encode_entry(state.clock(), FEATURE_LEVEL, &proposals)));
        }
        restored(&state);
        let reply = state.reject_malformed();
        let _ = decode_reply(&damage(&encode_reply(&reply)));
        if let Ok(mut restore) = Restore::new(&damage(&state.header())) {
            for (key, record) in state.records() {
                let mut value = Vec::new();
                encode_record(&record, &mut value);
                let _ = restore.insert(&damage(&encode_key(&key)), &damage(&value));
            }
            if let Ok(state) = restore.finish() {
                state.records.check();
            }
        }
    }
}
