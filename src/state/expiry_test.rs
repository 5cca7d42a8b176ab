//! A million sessions that are due at once.

use super::*;

fn key(number: u64) -> SessionKey {
    let mut digest = Digest([0; 16]);
    // As scattered as digests are.
    let hash = xxhash_rust::xxh3::xxh3_128(&number.to_le_bytes());
    digest.0.copy_from_slice(&hash.to_le_bytes());
    SessionKey { namespace: Namespace("web".into()), digest }
}

fn request(state: &State) -> Request {
    let clock = state.clock().time;
    Request { id: state.revision().0, first_sent: clock, expires: clock }
}

fn create(state: &mut State, number: u64) -> Outcome {
    let command = Command::CreateSession {
        request: request(state),
        key: key(number),
        principal: None,
        attributes: vec![],
        idle_timeout: None,
        absolute_timeout: None,
    };
    state.apply(&command, false, &mut Vec::new()).outcome
}

fn update(state: &mut State, number: u64) -> Outcome {
    let command = Command::UpdateSession {
        request: request(state),
        key: key(number),
        set: vec![],
        remove: vec![],
        expected_version: None,
        principal: None,
        idle_timeout: None,
        fence: None,
    };
    state.apply(&command, false, &mut Vec::new()).outcome
}

fn is_found(state: &State, number: u64) -> bool {
    !state.query(&Query::GetSession(key(number))).sessions.is_empty()
}

fn advance(state: &mut State, by: std::time::Duration) {
    let time = state.clock().time.plus(by);
    state.advance(Stamp { time, steady: time });
}

#[test]
fn a_million_at_once_are_gone_at_once_and_removed_in_steps() {
    const COUNT: u64 = 1_000_000;
    const BATCH: u64 = crate::limits::EXPIRE_BATCH_MAX as u64;
    let mut state = State::new();
    advance(&mut state, std::time::Duration::from_secs(1_000_000));
    for number in 0..COUNT {
        assert!(matches!(create(&mut state, number), Outcome::Written { .. }));
    }
    assert!(!state.has_due());
    advance(&mut state, std::time::Duration::from_secs(32 * 60));

    let (mut steps, mut expired) = (0, 0);
    let mut changes = Vec::new();
    while state.has_due() {
        // None is seen, whichever were swept, and none comes back.
        let number = steps * 7_919 % COUNT;
        assert!(!is_found(&state, number));
        let SessionKey { namespace, digest } = key(number);
        assert_eq!(state.touch_need(&key(number), state.clock().time), TouchNeed::NotFound);
        if steps % 100 == 0 {
            let after = Some(digest);
            let query = Query::ListSessions { namespace, principal: None, after, limit: 1_000 };
            let found = state.query(&query).sessions;
            assert!(found.iter().all(|(_, session)| session.create_time() == state.clock().time));
        }
        // Writes go on, and each step is short.
        let new = COUNT + steps;
        assert!(matches!(create(&mut state, new), Outcome::Written { .. }));
        assert!(matches!(update(&mut state, new), Outcome::Written { .. }));
        assert!(is_found(&state, new));

        let before = state.revision();
        changes.clear();
        state.apply(&Command::Tick, false, &mut changes);
        steps += 1;
        assert_eq!(state.revision().0, before.0 + 1);
        let due = BATCH.min(COUNT - expired);
        assert_eq!(changes.len() as u64, 2 * due);
        assert!(changes.iter().all(|change| change.revision == state.revision()));
        expired += due;
        assert_eq!(state.tombstones(), expired);
    }
    assert_eq!((expired, steps), (COUNT, COUNT.div_ceil(BATCH)));
    assert_eq!(state.sessions(), steps);
}
