//! The checkpoint store in a process of its own, killed while it writes.
//!
//! It is here and not beside the store because it starts processes: between fork and exec a child
//! holds copies of the locks of whatever its parent has open, which tests of those do not expect.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use bytes::Bytes;
use quorate::storage::checkpoint::{CheckpointOptions, CheckpointStore};

use crate::random::Random;

/// Where the process that is to be killed finds its directory.
const KILLED: &str = "QUORATE_TEST_KILLED";
const KILLS: u32 = 12;
const KILLED_TEST: &str = "checkpoint::real_sled_survives_a_kill_at_any_moment";

/// Says which checkpoint it finds whole, then writes one after the other and says so, until it is
/// killed.
fn write_until_killed(directory: &Path) {
    let (mut checkpoints, root) =
        CheckpointStore::open(directory, CheckpointOptions::default()).unwrap();
    let found = root.map_or(0, |root| root.index);
    let mut count = 0;
    let load = checkpoints.load(&mut |_, value| {
        count += 1;
        assert_eq!(value, found.to_be_bytes().repeat(40), "a mixture");
        Ok(())
    });
    load.unwrap();
    assert_eq!(count, if found == 0 { 0 } else { records(found) });
    println!("found {found}");
    for round in found + 1.. {
        let change = |number: u64| {
            let value = Bytes::from(round.to_be_bytes().repeat(40));
            (Bytes::from(number.to_be_bytes().to_vec()), Some(value))
        };
        let removals = (records(round)..5_000u64).map(|number| (change(number).0, None));
        let mut changes = (0..records(round)).map(change).chain(removals);
        checkpoints.write(&mut changes, round, Bytes::new()).unwrap();
        println!("acknowledged {round}");
    }
}

/// How many a checkpoint holds: now and then enough to be folded and removed.
fn records(round: u64) -> u64 {
    if round.is_multiple_of(5) { 5_000 } else { 500 }
}

/// The number behind a word, which the test harness may have put something in front of.
fn number_after(word: &str, line: &str) -> Option<u64> {
    line.rsplit_once(word).and_then(|(_, number)| number.trim().parse().ok())
}

/// A process of its own is killed while it writes, again and again over one directory.
#[test]
fn real_sled_survives_a_kill_at_any_moment() {
    if let Some(directory) = std::env::var_os(KILLED) {
        return write_until_killed(Path::new(&directory));
    }
    let directory = tempfile::tempdir().unwrap();
    let (mut random, _) = Random::for_test("real_sled_survives_a_kill_at_any_moment");
    let mut last = 0;
    // The last child only looks at what the one before has left.
    for kill in 0..=KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", KILLED_TEST, "--nocapture"])
            .env(KILLED, directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok);
        let found = lines.by_ref().find_map(|line| number_after("found ", &line));
        let found = found.expect("the child opened the store and found one checkpoint whole");
        assert!(found == last || found == last + 1, "kill {kill}: {found} after {last}");
        if kill == KILLS {
            child.kill().unwrap();
            child.wait().unwrap();
            return;
        }
        let mut acknowledged = lines.filter_map(|line| number_after("acknowledged ", &line));
        let some = acknowledged.by_ref().take(random.within(1..9) as usize).last();
        // Anywhere within the next checkpoint or two.
        for _ in 0..random.within(0..4_000_000) {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        last = acknowledged.last().or(some).expect("the child wrote");
    }
}
