//! What the core costs: nanoseconds an operation and bytes a session.
//!
//! `cargo bench --bench apply` prints a table. Sessions have one attribute of 256 bytes and are
//! touched in random order. Operations include decoding their command, as they do when they come
//! out of the log. Times are the thread's own, so that other work on the machine shows little.
//! Resident bytes are what the process grew by, so they include what the allocator wastes.

#![allow(
    missing_docs,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program that reports"
)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quorate::state::{
    Attribute, Change, Command, Digest, FEATURE_LEVEL, Namespace, Outcome, Query, Request, Restore,
    SessionKey, Stamp, State, Timestamp, decode_command, encode_command, encode_key, encode_record,
};

/// As in the binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const OPERATIONS: u64 = 500_000;

fn main() {
    for count in [1_000_000, 100_000] {
        println!("{count} sessions of 256 bytes");
        let resident = resident_bytes();
        let mut state = create(count);
        report_bytes("resident", resident, count);
        restore(&state, count);
        update(&mut state, count);
        touch(&mut state, count);
        get(&state, count);
        expire(&mut state, count);
    }
}

fn encode(command: &Command) -> bytes::Bytes {
    encode_command(command, FEATURE_LEVEL)
}

fn create(count: u64) -> State {
    let mut state = State::new();
    advance(&mut state, Duration::from_secs(1_000_000_000));
    let namespace = Namespace("default".into());
    let mut took = Duration::ZERO;
    for batch in 0..count / 1_000 {
        // A thousand at a time, over a minute: the encoded commands are not to be seen in memory.
        advance(&mut state, Duration::from_secs(60) / (count / 1_000) as u32);
        let command = |number| {
            encode(&Command::CreateSession {
                request: request(&state, number),
                key: key(&namespace, number),
                principal: None,
                attributes: vec![attribute(number)],
                idle_timeout: None,
                absolute_timeout: None,
            })
        };
        let commands: Vec<_> = (batch * 1_000..(batch + 1) * 1_000).map(command).collect();
        took += apply(&mut state, &commands);
    }
    report("create", took, count);
    state
}

fn update(state: &mut State, count: u64) {
    let namespace = Namespace("default".into());
    let mut took = Duration::ZERO;
    for batch in 0..OPERATIONS / 1_000 {
        // Some 80,000 a second.
        advance(state, Duration::from_millis(12));
        let command = |number| {
            encode(&Command::UpdateSession {
                request: request(state, count + number),
                key: key(&namespace, random(number) % count),
                set: vec![attribute(number)],
                remove: vec![],
                expected_version: None,
                principal: None,
                idle_timeout: None,
                fence: None,
            })
        };
        let commands: Vec<_> = (batch * 1_000..(batch + 1) * 1_000).map(command).collect();
        took += apply(state, &commands);
    }
    report("update", took, OPERATIONS);
}

fn touch(state: &mut State, count: u64) {
    let namespace = Namespace("default".into());
    for name in ["touch, stored", "touch, coalesced"] {
        advance(state, Duration::from_secs(if name == "touch, stored" { 200 } else { 0 }));
        let command = |number| {
            encode(&Command::TouchSession {
                request: request(state, number),
                key: key(&namespace, random(number) % count),
            })
        };
        let commands: Vec<_> = (0..count.min(OPERATIONS)).map(command).collect();
        report(name, apply(state, &commands), count.min(OPERATIONS));
    }
}

fn get(state: &State, count: u64) {
    let namespace = Namespace("default".into());
    let query = |number| Query::GetSession(key(&namespace, random(number) % count));
    let queries: Vec<_> = (0..OPERATIONS).map(query).collect();
    let start = cpu_time();
    let found: usize = queries.iter().map(|query| state.query(query).sessions.len()).sum();
    report("get", cpu_time().saturating_sub(start), OPERATIONS);
    assert_eq!(found as u64, OPERATIONS);
}

/// Makes a copy of a state by way of its stored form.
fn restore(state: &State, count: u64) {
    let start = cpu_time();
    let mut bytes = Vec::new();
    let mut ends = Vec::new();
    for (key, record) in state.records() {
        bytes.extend_from_slice(&encode_key(&key));
        let key_end = bytes.len();
        encode_record(&record, &mut bytes);
        ends.push((key_end, bytes.len()));
    }
    report("encode a record", cpu_time().saturating_sub(start), count);
    println!("  {:40} {:>8} bytes", "stored, with its key", bytes.len() as u64 / count);

    let resident = resident_bytes();
    let start = cpu_time();
    let mut restore = Restore::new(&state.header()).unwrap();
    let mut begin = 0;
    for (key_end, end) in ends {
        restore.insert(&bytes[begin..key_end], &bytes[key_end..end]).unwrap();
        begin = end;
    }
    report("restore: decode", cpu_time().saturating_sub(start), count);
    let copy = restore.finish().unwrap();
    report("restore, in all", cpu_time().saturating_sub(start), count);
    report_bytes("resident, restored", resident, count);
    assert_eq!(copy.digest(), state.digest());
}

fn expire(state: &mut State, count: u64) {
    advance(state, Duration::from_secs(3_600));
    let mut changes = Vec::with_capacity(4 * 1_000);
    let mut steps = Vec::new();
    while state.has_due() {
        let start = cpu_time();
        state.apply(&Command::Tick, false, &mut changes);
        steps.push(cpu_time().saturating_sub(start));
        changes.clear();
    }
    report("expire", steps.iter().sum(), count);
    steps.sort();
    let highest = steps.len() - 1 - steps.len() / 100;
    println!("  {:40} {:>8} µs", "sweep step, 99th percentile", steps[highest].as_micros());
}

/// Decodes and applies, and drops what changed.
fn apply(state: &mut State, commands: &[Bytes]) -> Duration {
    let mut changes: Vec<Change> = Vec::new();
    let start = cpu_time();
    // As many as an entry holds on a busy node.
    for entry in commands.chunks(100) {
        let decoded =
            entry.iter().map(|command| decode_command(command.clone(), FEATURE_LEVEL).unwrap());
        let commands: Vec<Command> = decoded.collect();
        state.fetch(commands.iter());
        for command in &commands {
            let reply = state.apply(command, false, &mut changes);
            assert!(matches!(reply.outcome, Outcome::Written { .. }), "{reply:?}");
            changes.clear();
        }
    }
    cpu_time().saturating_sub(start)
}

fn advance(state: &mut State, by: Duration) {
    let time = state.clock().time.plus(by);
    state.advance(Stamp { time, steady: time });
}

fn request(state: &State, id: u64) -> Request {
    let first_sent = state.clock().time;
    Request { id: random(id), first_sent, expires: Timestamp(first_sent.0 + 10_000) }
}

fn key(namespace: &Namespace, number: u64) -> SessionKey {
    let mut digest = [0; 16];
    digest[..8].copy_from_slice(&random(number).to_be_bytes());
    digest[8..].copy_from_slice(&number.to_be_bytes());
    // A name of its own for each, as each command brings its own.
    let namespace = Namespace(Arc::from(&*namespace.0));
    SessionKey { namespace, digest: Digest(digest) }
}

fn attribute(number: u64) -> Attribute {
    Attribute { name: "data".into(), value: vec![number as u8; 256].into() }
}

/// As scattered as the digests of ids are (SplitMix64).
fn random(number: u64) -> u64 {
    let mut value = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Time that this thread has run for.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}

fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn report(what: &str, took: Duration, operations: u64) {
    println!("  {what:40} {:>8} ns", took.as_nanos() / u128::from(operations));
}

fn report_bytes(what: &str, before: u64, count: u64) {
    // The second count finds memory that the first has left, so only the first is of use.
    if count == 1_000_000 {
        let grown = resident_bytes().saturating_sub(before) / count;
        println!("  {what:40} {grown:>8} bytes a session");
    }
}
