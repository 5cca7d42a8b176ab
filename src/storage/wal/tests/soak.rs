//! Figures: run with `cargo test --release --lib wal::tests::soak -- --ignored --nocapture`.

use std::time::Instant;

use super::*;

/// A directory on the disk that builds go to, rather than one that may be in memory.
fn on_disk() -> tempfile::TempDir {
    let near = std::env::current_exe().unwrap();
    tempfile::tempdir_in(near.parent().unwrap()).unwrap()
}

#[expect(clippy::disallowed_methods, reason = "prints how long things take")]
fn now() -> Instant {
    Instant::now()
}

#[test]
#[ignore = "soak: measures the disk for some seconds"]
fn latency_and_throughput() {
    let directory = on_disk();
    let (wal, _) = Wal::open(Arc::new(RealFiles), directory.path(), WalOptions::default()).unwrap();
    let mut next = 1;
    for outstanding in [1, 8, 64, 256] {
        let (sender, receiver) = channel();
        let before = wal.statistics();
        let begun = now();
        let mut times = Vec::new();
        let submit = |index: u64| {
            let (sender, sent) = (sender.clone(), now());
            let done = Box::new(move |outcome: Result<(), WalError>| {
                outcome.unwrap();
                sender.send(sent.elapsed()).unwrap();
            });
            wal.append(index, vec![numbered(index, 292)], done);
        };
        for _ in 0..outstanding {
            submit(next);
            next += 1;
        }
        while begun.elapsed() < Duration::from_secs(4) {
            times.push(receiver.recv_timeout(PATIENCE).unwrap());
            submit(next);
            next += 1;
        }
        let elapsed = begun.elapsed();
        for _ in 0..outstanding {
            receiver.recv_timeout(PATIENCE).unwrap();
        }
        let statistics = wal.statistics();
        times.sort_unstable();
        let rank = |percent: usize| times[times.len() * percent / 100];
        println!(
            "{outstanding:>4} outstanding: {:>8.0}/s, p50 {:?}, p99 {:?}; sync p50 {:?}, p99 {:?}; \
             {:.1} records a sync, {} waits for a segment",
            times.len() as f64 / elapsed.as_secs_f64(),
            rank(50),
            rank(99),
            statistics.sync_p50,
            statistics.sync_p99,
            (statistics.records - before.records) as f64 / (statistics.syncs - before.syncs) as f64,
            statistics.segment_waits - before.segment_waits,
        );
    }
}

#[test]
#[ignore = "soak: writes half a gigabyte"]
fn recovery_of_half_a_gigabyte() {
    let directory = on_disk();
    let open = || Wal::open(Arc::new(RealFiles), directory.path(), WalOptions::default()).unwrap();
    let begun = now();
    let (wal, _) = open();
    println!("a new log: {:?}", begun.elapsed());
    let mut last = 0;
    while wal.statistics().bytes < 500_000_000 {
        let records: Vec<WalRecord> = (1..=1000).map(|at| numbered(last + at, 300)).collect();
        append(&wal, last + 1, records).unwrap();
        last += 1000;
    }
    drop(wal);
    let begun = now();
    let (wal, recovered) = open();
    println!("recovered {last} records in {:?}", begun.elapsed());
    assert_eq!(recovered.last_index, Some(last));
    let begun = now();
    let mut index = 1;
    while index <= last {
        index += wal.read(index..last + 1, 2_000_000).unwrap().len() as u64;
    }
    println!("read them back in {:?}", begun.elapsed());
}
