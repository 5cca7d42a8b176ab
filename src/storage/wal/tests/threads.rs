//! The real thing: threads, real files, readers beside writers.

use std::thread;

use super::super::floor::Notebook;
use super::*;

/// Removes records, votes and purges while others read; nothing that is read may be wrong.
#[test]
fn readers_beside_a_writer_see_records_whole_and_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let options =
        WalOptions { segment_bytes: 1 << 20, cache_bytes_max: 100_000, ..WalOptions::default() };
    let open = || Wal::open(Arc::new(RealFiles), directory.path(), options.clone()).unwrap();
    let (wal, _) = open();
    let finished = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = (0..3)
        .map(|seed| {
            let (wal, finished) = (wal.clone(), Arc::clone(&finished));
            thread::spawn(move || {
                let mut random = Random(seed);
                let mut seen = 0;
                while finished.load(Ordering::SeqCst) == 0 {
                    let last = wal.last_index().unwrap_or(0);
                    let from = random.below(last + 1);
                    let records = match wal.read(from..from + 200, 60_000) {
                        Err(WalError::Purged { asked, first }) => {
                            assert!(asked == from && first > from);
                            continue;
                        }
                        read => read.unwrap(),
                    };
                    let mut numbers = records.iter().map(|record| {
                        let number = u64::from_le_bytes(record.header[..].try_into().unwrap());
                        assert_eq!(*record, numbered(number, (number % 977) as usize));
                        number
                    });
                    let first = numbers.next();
                    assert!(first.is_none_or(|first| first >= from));
                    seen += numbers.fold(first.unwrap_or(0), |before, number| {
                        assert_eq!(number, before + 1, "seed {seed}");
                        number
                    });
                }
                seen
            })
        })
        .collect();

    const RECORDS: u64 = 20_000;
    let mut outcomes = Vec::new();
    for index in 1..=RECORDS {
        let (done, outcome) = promise();
        wal.append(index, vec![numbered(index, (index % 977) as usize)], done);
        outcomes.push(outcome);
        match index % 1000 {
            0 => wait_for(|done| wal.save_vote(blob("vote"), done)).unwrap(),
            500 if index > 5000 => wal.purge_to(index - 5000, blob("marker"), promise().0),
            _ => wal.save_committed(index, blob("committed")),
        }
    }
    for outcome in outcomes {
        outcome.recv_timeout(PATIENCE).unwrap().unwrap();
    }
    finished.store(1, Ordering::SeqCst);
    assert!(readers.into_iter().all(|reader| reader.join().unwrap() > 0));
    let statistics = wal.statistics();
    assert_eq!(statistics.records, RECORDS);
    assert!(statistics.syncs > 10 && statistics.sync_p99 >= statistics.sync_p50);
    assert!(statistics.bytes_on_disk < 8 << 20, "purged segments are gone: {statistics:?}");
    drop(wal);

    let (wal, recovered) = open();
    assert_eq!((recovered.first_index, recovered.last_index), (14_501, Some(RECORDS)));
    assert_eq!(read_all(&wal).len(), 5_500);
}

/// Waits until something is so, with a deadline.
#[expect(clippy::disallowed_methods, reason = "nobody waits without end")]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !is_so() {
        assert!(std::time::Instant::now() < deadline, "not in time: {what}");
        thread::yield_now();
    }
}

/// Waits until a file of the log has so many bytes, or is not there.
fn wait_for_length(path: &Path, bytes: Option<u64>) {
    let what = format!("{} has {bytes:?} bytes", path.display());
    wait_until(&what, || std::fs::metadata(path).ok().map(|metadata| metadata.len()) == bytes);
}

#[test]
fn the_next_segment_is_prepared_as_the_active_one_fills() {
    const MIB: u64 = 1 << 20;
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { segment_bytes: 4 * MIB, ..WalOptions::default() };
    let (wal, _) = Wal::open(Arc::new(RealFiles), directory.path(), options).unwrap();
    let unfinished = directory.path().join("0000000002.wal.tmp");
    let finished = directory.path().join(file_name(2));
    // With a third of the way to three quarters behind it, a third of four pieces: two.
    append(&wal, 1, vec![numbered(1, MIB as usize)]).unwrap();
    wait_for_length(&unfinished, Some(2 * MIB));
    append(&wal, 2, vec![numbered(2, MIB as usize)]).unwrap();
    wait_for_length(&unfinished, Some(3 * MIB));
    assert!(!finished.exists());
    append(&wal, 3, vec![numbered(3, MIB as usize)]).unwrap();
    wait_for_length(&unfinished, None);
    wait_for_length(&finished, Some(4 * MIB));
}

/// A part that fails is begun anew, and nothing of what the failed sync forgot is relied on.
#[test]
fn a_segment_that_failed_in_part_is_prepared_anew() {
    for seed in 0..20 {
        let files = FaultyFiles::new();
        let (wal, _) = open(&files).unwrap();
        // The first sync is that of the batch, the second that of the part that it asks for.
        files.fail_sync_at(2);
        append(&wal, 1, vec![numbered(1, 100)]).unwrap();
        wait_until("the part's sync has failed", || files.failed_sync().is_some());
        for index in 2..40 {
            append(&wal, index, vec![numbered(index, 3000)]).unwrap();
        }
        assert!(segment_names(&files).len() > 2, "{:?}", segment_names(&files));
        drop(wal);
        let (wal, recovered) = open(&files.power_cut(&mut Random(seed))).unwrap();
        assert_eq!((recovered.last_index, recovered.repaired_tail), (Some(39), None), "{seed}");
        assert_eq!(wal.read(39..40, 1).unwrap(), [numbered(39, 3000)]);
    }
}

/// What a stop leaves half prepared is begun anew.
#[test]
fn a_half_prepared_segment_is_no_obstacle() {
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { segment_bytes: 4 << 20, ..WalOptions::default() };
    let open = || Wal::open(Arc::new(RealFiles), directory.path(), options.clone()).unwrap();
    let (wal, _) = open();
    append(&wal, 1, vec![numbered(1, 1 << 20)]).unwrap();
    let unfinished = directory.path().join("0000000002.wal.tmp");
    wait_for_length(&unfinished, Some(2 << 20));
    drop(wal);
    assert!(unfinished.exists());
    let (wal, recovered) = open();
    assert!(!unfinished.exists());
    assert_eq!(recovered.last_index, Some(1));
    append(&wal, 2, (2..9).map(|index| numbered(index, 1 << 20)).collect()).unwrap();
    drop(wal);
    let (wal, recovered) = open();
    assert_eq!(recovered.last_index, Some(8));
    assert_eq!(wal.read(1..9, usize::MAX).unwrap().len(), 8);
}

/// What is left beside a log that is gone must not pass for one.
#[test]
fn a_segment_in_preparation_is_no_log() {
    let directory = tempfile::tempdir().unwrap();
    assert!(!is_present(directory.path()));
    let (wal, _) = Wal::open(Arc::new(RealFiles), directory.path(), WalOptions::default()).unwrap();
    assert!(is_present(directory.path()));
    append(&wal, 1, vec![numbered(1, 100)]).unwrap();
    let unfinished = directory.path().join("0000000002.wal.tmp");
    wait_for_length(&unfinished, Some(1 << 20));
    drop(wal);
    std::fs::remove_file(directory.path().join(file_name(1))).unwrap();
    assert!(unfinished.exists() && !is_present(directory.path()));
}

/// A log that nobody closes: what its last batch says is proven once it has been idle, and noted.
#[test]
fn a_log_that_comes_to_rest_is_sealed_and_its_floor_is_noted() {
    let files = FaultyFiles::new();
    let options = WalOptions { idle_after: Duration::from_millis(5), ..small() };
    let (wal, _) = Wal::open(Arc::new(files.clone()), directory(), options).unwrap();
    for index in 1..=3 {
        append(&wal, index, vec![numbered(index, 100)]).unwrap();
        let is_sealed = || batches(&files).last().is_some_and(|last| last.header.frames == 0);
        wait_until("the log is sealed", is_sealed);
        let acknowledged = batches(&files).pop().unwrap().header.place.sequence - 1;
        let is_noted = || Notebook::open(&files, directory()).unwrap().1.sequence == acknowledged;
        wait_until("the floor is noted", is_noted);
    }
    // As often as there was something to prove.
    assert_eq!(wal.statistics().syncs, 6);
}

/// Without a pause the floor is noted as well, once in a while.
#[test]
fn a_log_that_is_never_idle_notes_its_floor() {
    let files = FaultyFiles::new();
    let options = WalOptions { idle_after: Duration::from_millis(1), ..small() };
    let (wal, _, mut writer) =
        Wal::open_by_hand(Arc::new(files.clone()), directory(), options).unwrap();
    let mut index = 0;
    let noted = || Notebook::open(&files, directory()).unwrap().1;
    wait_until("the floor is noted", || {
        index += 1;
        wal.append(index, vec![numbered(index, 10)], promise().0);
        assert!(writer.turn());
        noted().sequence > 0
    });
    assert!(batches(&files).iter().all(|batch| batch.header.frames > 0), "nothing is sealed");
    let sealed_at = noted();
    assert_eq!((sealed_at.sequence, sealed_at.next_index), (index, index + 1));
}

#[test]
fn completions_run_in_order_and_may_call_the_log() {
    let files = FaultyFiles::new();
    let (wal, _) = open(&files).unwrap();
    let (sender, order) = channel();
    let (again, last) = (wal.clone(), sender.clone());
    for index in 1..=3 {
        let sender = sender.clone();
        let done = Box::new(move |outcome: Result<(), WalError>| {
            sender.send((index, outcome.is_ok())).unwrap();
        });
        wal.append(index, vec![numbered(index, 10)], done);
    }
    let chained: Completion = Box::new(move |_| {
        let done = Box::new(move |outcome: Result<(), WalError>| {
            last.send((5, outcome.is_ok())).unwrap();
        });
        again.append(4, vec![numbered(4, 10)], done);
    });
    wal.save_vote(blob("vote"), chained);
    for index in [1, 2, 3, 5] {
        assert_eq!(order.recv_timeout(PATIENCE).unwrap(), (index, true));
    }
}

/// Waiting callers, queued ones and later ones all hear of a disk that fails.
#[test]
fn a_disk_that_fails_is_heard_of_by_everybody() {
    let files = FaultyFiles::new();
    let (wal, _) = open(&files).unwrap();
    append(&wal, 1, vec![numbered(1, 10)]).unwrap();
    files.stop_at(2);
    let outcomes: Vec<_> = (2..200)
        .map(|index| {
            let (done, outcome) = promise();
            wal.append(index, vec![numbered(index, 10)], done);
            outcome
        })
        .collect();
    for outcome in outcomes {
        match outcome.recv_timeout(PATIENCE).unwrap() {
            // Those behind the failure were refused as out of order or as too late.
            Err(WalError::Io { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    match wait_for(|done| wal.save_vote(blob("late"), done)) {
        Err(WalError::Io { error, .. }) => assert!(error.to_string().contains("power")),
        other => panic!("{other:?}"),
    }
    wal.close();
}

#[test]
fn dropping_the_last_handle_writes_what_is_queued() {
    let files = FaultyFiles::new();
    let (wal, _) = open(&files).unwrap();
    for index in 1..=50 {
        wal.append(index, vec![numbered(index, 500)], promise().0);
    }
    let clone = wal.clone();
    drop(wal);
    clone.append(51, vec![numbered(51, 500)], promise().0);
    drop(clone);
    let (_, recovered) = open(&files.power_cut(&mut Random(3))).unwrap();
    assert_eq!((recovered.last_index, recovered.repaired_tail), (Some(51), None));
}

/// With its own threads the order of I/O is not known, so the power goes at any time at all.
#[test]
fn a_threaded_log_keeps_what_it_acknowledged() {
    for seed in 0..60 {
        let mut random = Random(seed);
        let files = FaultyFiles::new();
        files.stop_at(30 + random.below(150));
        let mut acknowledged = 0;
        if let Ok((wal, _)) = open(&files) {
            let mut waiting = Vec::new();
            for index in 1..=400 {
                let (done, outcome) = promise();
                wal.append(index, vec![numbered(index, random.below(900) as usize)], done);
                waiting.push((index, outcome));
                if random.one_in(8) {
                    for (index, outcome) in waiting.drain(..) {
                        if outcome.recv_timeout(PATIENCE).unwrap().is_ok() {
                            acknowledged = index;
                        }
                    }
                }
                if random.one_in(20) {
                    wal.purge_to(index / 2, blob("marker"), promise().0);
                }
            }
        }
        let (_, recovered) = open(&files.power_cut(&mut random)).unwrap();
        assert!(recovered.last_index.unwrap_or(0) >= acknowledged, "seed {seed}");
    }
}

/// A log that stops by itself tells whoever watches, also while nobody waits for it.
#[test]
fn the_end_of_a_thread_does_not_go_unnoticed() {
    let open = || {
        let directory = tempfile::tempdir().unwrap();
        let (told, lines) = std::sync::mpsc::channel();
        let threads = ThreadWatch::new(move |line| told.send(line.to_owned()).unwrap());
        let options = WalOptions { threads, ..WalOptions::default() };
        let (wal, _) = Wal::open(Arc::new(RealFiles), directory.path(), options).unwrap();
        (directory, wal, lines)
    };
    let (_directory, wal, lines) = open();
    wal.save_vote(Bytes::from_static(b"vote"), Box::new(|_| panic!("not in a completion")));
    // The sender goes with the threads.
    wal.close();
    drop(wal);
    let told: Vec<String> = lines.iter().collect();
    assert_eq!(told, ["thread quorate-wal panicked: not in a completion"]);

    let (_directory, wal, lines) = open();
    wal.close();
    drop(wal);
    assert_eq!(lines.iter().count(), 0, "a log that is closed has not failed");
}
