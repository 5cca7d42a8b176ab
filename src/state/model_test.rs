//! The state against a small model that is obviously right, under random commands and clocks.
//!
//! The model keeps plain maps and works out by scanning what the state keeps indexes for. Beside
//! it, oracles remember what the state need not: every request ever applied, every access ever
//! answered, every end. They know nothing of marks, slack or tombstones, only of what was promised.
//!
//! Two replicas take the same steps; one of them is now and then replaced by a restored copy.
//! A failure prints the smallest history that proptest could find, and the seed that repeats it.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::model::{MINUTE, Model, raised};
use super::script_test::restored;
use super::*;

/// What a step of a history does. Numbers pick among what is there at the time.
#[derive(Clone, Debug)]
enum Step {
    Advance(u64),
    /// Sends a new request; whether its first sending arrives now or may come later.
    Send {
        deed: Deed,
        age: u64,
        lifetime: u64,
        arrives: bool,
    },
    /// A request that was sent before arrives, as a resend or, if it has not arrived, as it was.
    Arrive {
        which: prop::sample::Index,
        resend: bool,
    },
    /// A read counts as an access, if `touch_need` allows to answer it at once. The reader's time
    /// may be ahead of the state's.
    Access {
        key: SessionKey,
        ahead: u64,
    },
    Tick,
    Restore,
}

#[derive(Clone, Debug)]
enum Deed {
    Create {
        key: SessionKey,
        principal: Option<Arc<str>>,
        attributes: BTreeMap<String, String>,
        idle: Option<Timeout>,
        absolute: Option<Timeout>,
    },
    Update {
        key: SessionKey,
        set: BTreeMap<String, String>,
        remove: Option<String>,
        expect: Expect,
        principal: Option<Option<Arc<str>>>,
        idle: Option<Timeout>,
    },
    Touch(SessionKey),
    Delete(SessionKey, Expect),
}

#[derive(Clone, Debug)]
enum Expect {
    Nothing,
    Current,
    Wrong,
}

fn some_key() -> impl Strategy<Value = SessionKey> {
    // One that is busy, so that it has to forget requests, and some that are not.
    let busy = Just(("web", 1));
    let others = (prop_oneof![Just("web"), Just("shop")], 0..3u8);
    prop_oneof![3 => busy, 1 => others].prop_map(|(namespace, number)| SessionKey {
        namespace: Namespace(namespace.into()),
        digest: Digest([number; 16]),
    })
}

fn some_timeout() -> impl Strategy<Value = Option<Timeout>> {
    prop_oneof![
        8 => Just(None),
        1 => Just(Some(Timeout::Never)),
        4 => prop_oneof![Just(1_000), Just(8_001), Just(59_999), Just(1_200_000)]
            .prop_map(|length| Some(Timeout::After(Duration::from_millis(length)))),
    ]
}

fn some_principal() -> impl Strategy<Value = Option<Arc<str>>> {
    prop_oneof![Just(None), Just(Some("al".into())), Just(Some("alice".into()))]
}

fn some_attributes() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map("[a-c]", "[0-9]{0,2}", 0..3)
}

fn some_expect() -> impl Strategy<Value = Expect> {
    prop_oneof![3 => Just(Expect::Nothing), 1 => Just(Expect::Current), 1 => Just(Expect::Wrong)]
}

fn some_deed() -> impl Strategy<Value = Deed> {
    let create = (some_key(), some_principal(), some_attributes(), some_timeout(), some_timeout())
        .prop_map(|(key, principal, attributes, idle, absolute)| Deed::Create {
            key,
            principal,
            attributes,
            idle,
            absolute,
        });
    let principal = prop::option::weighted(0.3, some_principal());
    let remove = prop::option::of("[a-c]");
    let update = (some_key(), some_attributes(), remove, some_expect(), principal, some_timeout())
        .prop_map(|(key, set, remove, expect, principal, idle)| Deed::Update {
            key,
            set,
            remove,
            expect,
            principal,
            idle,
        });
    prop_oneof![
        4 => create,
        12 => update,
        3 => some_key().prop_map(Deed::Touch),
        1 => (some_key(), some_expect()).prop_map(|(key, expect)| Deed::Delete(key, expect)),
    ]
}

fn some_step() -> impl Strategy<Value = Step> {
    let advance = prop_oneof![
        10 => 0..3u64,
        6 => 100..2_000u64,
        2 => 5_000..20_000u64,
        1 => Just(MINUTE),
        1 => MINUTE..3 * MINUTE,
    ];
    let age = prop_oneof![8 => Just(0), 1 => 0..1_000u64, 1 => 0..70_000u64];
    let lifetime = prop_oneof![8 => Just(MINUTE), 1 => 1..MINUTE, 1 => 0..MINUTE + 10];
    let send = (some_deed(), age, lifetime, prop::bool::weighted(0.8))
        .prop_map(|(deed, age, lifetime, arrives)| Step::Send { deed, age, lifetime, arrives });
    let arrive = (any::<prop::sample::Index>(), prop::bool::weighted(0.6))
        .prop_map(|(which, resend)| Step::Arrive { which, resend });
    prop_oneof![
        6 => advance.prop_map(Step::Advance),
        20 => send,
        10 => arrive,
        3 => (some_key(), 0..3_000u64).prop_map(|(key, ahead)| Step::Access { key, ahead }),
        1 => Just(Step::Tick),
        1 => Just(Step::Restore),
    ]
}

/// A request and what became of it.
struct Sent {
    command: Command,
    /// Its first sending is still under way.
    is_under_way: bool,
    /// What it did.
    revision: Option<Revision>,
}

/// Two replicas, the model and the oracles.
#[derive(Default)]
struct World {
    states: [State; 2],
    model: Model,
    sent: Vec<Sent>,
    /// The records as a reader of the changes knows them.
    mirror: BTreeMap<RecordKey, Record>,
    /// Latest access of each session that was answered.
    accesses: BTreeMap<SessionKey, u64>,
    /// When each key was last removed.
    ends: BTreeMap<SessionKey, u64>,
}

impl World {
    fn step(&mut self, step: Step) {
        match step {
            Step::Advance(by) => {
                let clock = self.model.clock + by;
                self.model.clock = clock;
                for state in &mut self.states {
                    // Part of a leap, so that the clocks differ.
                    let stamp = Stamp { time: Timestamp(clock), steady: Timestamp(clock / 2) };
                    state.advance(stamp);
                    state.advance(Stamp::default());
                    assert_eq!(state.clock(), stamp);
                }
            }
            Step::Send { deed, age, lifetime, arrives } => {
                let first_sent = self.model.clock.saturating_sub(age);
                let request = Request {
                    id: self.sent.len() as u64,
                    first_sent: Timestamp(first_sent),
                    expires: Timestamp(first_sent + lifetime),
                };
                let command = self.command(deed, request);
                self.sent.push(Sent { command, is_under_way: true, revision: None });
                if arrives {
                    self.arrive(self.sent.len() - 1, false);
                }
            }
            Step::Arrive { which, resend } if !self.sent.is_empty() => {
                // Only the latest can still come, so that most do something.
                let recent = self.sent.len().min(24);
                let index = self.sent.len() - 1 - which.index(recent);
                self.arrive(index, resend || !self.sent[index].is_under_way);
            }
            Step::Arrive { .. } => {}
            Step::Access { key, ahead } => self.access(&key, self.model.clock + ahead),
            Step::Tick => {
                let expected = self.model.tick();
                assert_eq!(self.apply(&Command::Tick, false), expected);
            }
            Step::Restore => self.states[1] = restored(&self.states[1]),
        }
        self.check();
    }

    fn command(&self, deed: Deed, request: Request) -> Command {
        let attributes = |attributes: BTreeMap<String, String>| {
            let each = |(name, value): (String, String)| Attribute { name, value: value.into() };
            attributes.into_iter().map(each).collect()
        };
        let version = |key: &SessionKey, expect: Expect| {
            let current = self.model.sessions.get(key).map_or(0, |session| session.version);
            match expect {
                Expect::Nothing => None,
                Expect::Current => Some(Revision(current)),
                Expect::Wrong => Some(Revision(current + 1_000)),
            }
        };
        match deed {
            Deed::Create { key, principal, attributes: set, idle, absolute } => {
                Command::CreateSession {
                    request,
                    key,
                    principal,
                    attributes: attributes(set),
                    idle_timeout: idle,
                    absolute_timeout: absolute,
                }
            }
            Deed::Update { key, set, remove, expect, principal, idle } => Command::UpdateSession {
                request,
                expected_version: version(&key, expect),
                key,
                remove: remove.into_iter().filter(|name| !set.contains_key(name)).collect(),
                set: attributes(set),
                principal,
                idle_timeout: idle,
                fence: None,
            },
            Deed::Touch(key) => Command::TouchSession { request, key },
            Deed::Delete(key, expect) => {
                let expected_version = version(&key, expect);
                Command::DeleteSession { request, expected_version, key, fence: None }
            }
        }
    }

    fn arrive(&mut self, index: usize, resend: bool) {
        self.sent[index].is_under_way &= resend;
        let command = self.sent[index].command.clone();
        let before = self.model.revision;
        let expected = self.model.apply(&command, resend);
        let reply = self.apply(&command, resend);
        assert_eq!(reply, expected, "{command:?}");

        let (request, key, is_remembered) = match &command {
            Command::CreateSession { request, key, .. }
            | Command::UpdateSession { request, key, .. }
            | Command::DeleteSession { request, key, .. } => (request, key, true),
            Command::TouchSession { request, key } => (request, key, false),
            _ => unreachable!("not sent"),
        };
        let is_written = matches!(reply.outcome, Outcome::Written { .. });
        if is_written && self.model.sessions.contains_key(key) && reply.revision.0 > before {
            self.accesses.insert(key.clone(), self.model.clock);
        }
        // Once, or nobody can tell.
        if !is_remembered {
            return;
        }
        let sent = &mut self.sent[index];
        match (sent.revision, &reply.outcome) {
            (Some(revision), Outcome::Written { version, .. }) => {
                assert_eq!((*version, reply.revision), (revision, revision), "{request:?} again");
            }
            (Some(_), Outcome::Rejected(rejection)) => {
                let is_honest =
                    matches!(rejection, Rejection::OutcomeUnknown | Rejection::RequestExpired);
                assert!(is_honest, "{rejection:?} for {request:?}, which was applied");
            }
            (None, Outcome::Written { version, .. }) => {
                assert_eq!((version.0, reply.revision), (self.model.revision, *version));
                sent.revision = Some(*version);
            }
            (None, Outcome::Rejected(_)) => {}
            (_, outcome) => panic!("{outcome:?}"),
        }
    }

    fn access(&mut self, key: &SessionKey, now: u64) {
        let [needs, copies] = self.states.each_ref().map(|it| it.touch_need(key, Timestamp(now)));
        assert_eq!(needs, copies);
        let session = self.model.session(key);
        match needs {
            TouchNeed::NotFound => assert!(session.is_none()),
            TouchNeed::None { version, deadline } | TouchNeed::Propose { version, deadline } => {
                let session = session.expect("it was found");
                assert_eq!(
                    (version.0, deadline.map(|it| it.0)),
                    (session.version, session.deadline())
                );
                let access = self.accesses.entry(key.clone()).or_default();
                *access = now.max(*access);
            }
            TouchNeed::Wait { .. } => assert!(session.is_some()),
        }
    }

    /// Applies a command on both replicas, and compares and follows what they say.
    fn apply(&mut self, command: &Command, resend: bool) -> Reply {
        let bytes = encode_command(command, FEATURE_LEVEL);
        let [one, two] = self.states.each_mut().map(|state| {
            let mut changes = Vec::new();
            let command = decode_command(bytes.clone(), FEATURE_LEVEL).unwrap();
            (state.apply(&command, resend, &mut changes), changes)
        });
        assert_eq!(one.0, two.0, "{command:?}");
        assert_eq!(one.1.len(), two.1.len());
        let mut last = Revision(0);
        for (change, copy) in one.1.into_iter().zip(two.1) {
            assert_eq!((change.revision, change.cause), (copy.revision, copy.cause));
            assert_eq!(change.key, copy.key);
            assert_eq!((&change.before, &change.after), (&copy.before, &copy.after));
            assert!(last <= change.revision && change.revision <= self.states[0].revision());
            last = change.revision;
            self.follow(command, change);
        }
        one.0
    }

    fn follow(&mut self, command: &Command, change: Change) {
        let clock = self.model.clock;
        let before = match &change.after {
            Some(record) => self.mirror.insert(change.key.clone(), record.clone()),
            None => self.mirror.remove(&change.key),
        };
        assert_eq!(before, change.before, "{:?}", change.key);
        let RecordKey::Session(key) = change.key else { return };
        match change.cause {
            Cause::Expired => {
                let Some(Record::Session(session)) = change.before else { unreachable!() };
                let access = self.accesses.remove(&key).expect("it was created");
                let idle = session.idle_timeout().deadline(Timestamp(access));
                let cap = session.absolute_timeout().deadline(session.create_time());
                let earliest = idle.into_iter().chain(cap).min().expect("it can end");
                assert!(clock >= earliest.0, "{key} ended at {clock}, before {earliest}");
                self.ends.insert(key, clock);
            }
            Cause::Deleted => {
                self.accesses.remove(&key);
                self.ends.insert(key, clock);
            }
            Cause::Created => {
                let Command::CreateSession { request, .. } = command else { unreachable!() };
                if let Some(end) = self.ends.get(&key) {
                    assert!(request.first_sent.0 > *end, "{key} came back");
                }
            }
            _ => {}
        }
    }

    fn check(&self) {
        let [state, copy] = &self.states;
        assert_eq!(state.digest(), copy.digest());
        assert_eq!(state.header(), copy.header());
        assert_eq!(state.revision().0, self.model.revision);
        state.records.check();
        copy.records.check();
        let records: BTreeMap<_, _> = state.records().collect();
        assert_eq!(records, self.mirror);
        let deadlines = records.values().filter_map(|record| match record {
            Record::Session(session) => session.deadline(),
            Record::Tombstone(tombstone) => Some(tombstone.deadline()),
            _ => None,
        });
        assert_eq!(state.next_deadlines().time, deadlines.min());
        for namespace in ["web", "shop"] {
            for principal in [None, Some("al"), Some("alice")] {
                self.check_list(state, namespace, principal);
                self.check_list(copy, namespace, principal);
            }
        }
    }

    fn check_list(&self, state: &State, namespace: &str, principal: Option<&str>) {
        let mut expected = self.model.live().filter(|(key, session)| {
            &*key.namespace.0 == namespace
                && (principal.is_none() || session.principal.as_deref() == principal)
        });
        let mut after = None;
        loop {
            let reply = state.query(&Query::ListSessions {
                namespace: Namespace(namespace.into()),
                principal: principal.map(Arc::from),
                after,
                limit: 2,
            });
            for (digest, session) in &reply.sessions {
                let (key, model) = expected.next().expect("no more than there are");
                assert_eq!(key.digest, *digest);
                model.compare(session);
                let found = state.query(&Query::GetSession(key.clone())).sessions;
                assert_eq!(found, [(*digest, session.clone())]);
            }
            after = reply.next;
            if after.is_none() {
                break;
            }
        }
        assert!(expected.next().is_none(), "a session is not listed");
    }
}

/// Histories up to `length`; PROPTEST_RNG_SEED repeats one run, PROPTEST_CASES asks for more.
fn check_histories(cases: u32, length: usize) {
    let mut config = ProptestConfig { failure_persistence: None, ..Default::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = cases;
    }
    let seed = match config.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => RandomState::new().hash_one(0),
    };
    config.rng_seed = RngSeed::Fixed(seed);
    println!("PROPTEST_RNG_SEED={seed} cargo test --lib state::model_test repeats this");
    let steps = prop::collection::vec(some_step(), 1..length);
    proptest!(config, |(steps in steps)| {
        let mut world = World { states: [raised(), raised()], ..World::default() };
        // As it would be, and so that requests can be older than the history.
        world.step(Step::Advance(1_000_000));
        for step in steps {
            world.step(step);
        }
    });
}

#[test]
fn does_what_the_model_does() {
    check_histories(1_000, 300);
}

#[test]
#[ignore = "soak: PROPTEST_CASES=100000 cargo test --lib state::model_test -- --ignored"]
fn does_what_the_model_does_for_long() {
    check_histories(20_000, 1_000);
}
