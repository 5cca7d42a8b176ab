//! Tests of the log as a whole, and what they share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::batch::{BLOCK_BYTES, HEADER_BYTES, Header};
use super::segment::{FIRST_BATCH, file_name, number_of};
use super::*;
use crate::storage::file::faulty::{FaultyFiles, Random};
use crate::storage::file::{RealFiles, create_dir_durably};

mod codec;
mod crash;
mod damage;
mod soak;
mod threads;

const DIRECTORY: &str = "data/log";
/// Longest that any test waits for anything.
const PATIENCE: Duration = Duration::from_secs(30);

fn directory() -> &'static Path {
    Path::new(DIRECTORY)
}

fn small() -> WalOptions {
    // Whether a log is idle is for each test to say.
    let idle_after = Duration::from_secs(3600);
    WalOptions { segment_bytes: 32 * 1024, salt: Some(0x5a17), idle_after, ..WalOptions::default() }
}

fn record(header: &str, payload: &[u8]) -> WalRecord {
    let header = Bytes::copy_from_slice(header.as_bytes());
    WalRecord { header, payload: Bytes::copy_from_slice(payload) }
}

/// A record whose content says what it is, of about so many bytes.
fn numbered(number: u64, bytes: usize) -> WalRecord {
    let payload: Vec<u8> =
        (0..bytes as u64).map(|at| (number.wrapping_mul(31).wrapping_add(at * 7)) as u8).collect();
    WalRecord { header: Bytes::copy_from_slice(&number.to_le_bytes()), payload: payload.into() }
}

/// A completion, and where its outcome arrives.
fn promise() -> (Completion, Receiver<Result<(), WalError>>) {
    let (sender, receiver) = channel();
    let done = Box::new(move |outcome| {
        // The test may have stopped listening.
        let _ = sender.send(outcome);
    });
    (done, receiver)
}

/// Runs a call that takes a completion, and waits for that.
fn wait_for(call: impl FnOnce(Completion)) -> Result<(), WalError> {
    let (done, outcome) = promise();
    call(done);
    outcome.recv_timeout(PATIENCE).expect("a completion within the deadline")
}

fn append(wal: &Wal, first: u64, records: Vec<WalRecord>) -> Result<(), WalError> {
    wait_for(|done| wal.append(first, records, done))
}

/// All that is held.
fn read_all(wal: &Wal) -> Vec<WalRecord> {
    let records = wal.read(wal.first_index()..u64::MAX, usize::MAX);
    records.expect("what is held can be read")
}

fn blob(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn open(files: &FaultyFiles) -> Result<(Wal, Recovered), WalError> {
    Wal::open(Arc::new(files.clone()), directory(), small())
}

fn segment_names(files: &FaultyFiles) -> Vec<String> {
    let names = files.list(directory()).unwrap();
    names.into_iter().filter(|name| number_of(name).is_some()).collect()
}

/// A batch on disk.
#[derive(Clone, Debug)]
struct Found {
    path: PathBuf,
    offset: u64,
    header: Header,
}

/// All batches on disk, in order.
fn batches(files: &FaultyFiles) -> Vec<Found> {
    let mut found = Vec::new();
    for name in segment_names(files) {
        let path = directory().join(name);
        let content = files.content(&path);
        let mut offset = FIRST_BATCH as usize;
        while offset < content.len() {
            let Ok(header) = Header::decode(&content[offset..]) else { break };
            found.push(Found { path: path.clone(), offset: offset as u64, header });
            offset += (header.bytes() as usize).next_multiple_of(BLOCK_BYTES);
        }
    }
    found
}

#[test]
fn a_new_log_is_empty_and_takes_records_from_any_index() {
    for first in [0, 1, 77] {
        let files = FaultyFiles::new();
        let (wal, recovered) = open(&files).unwrap();
        assert_eq!(recovered, Recovered::default());
        assert_eq!((wal.first_index(), wal.last_index()), (0, None));
        assert_eq!(wal.read(0..100, 100).unwrap(), []);
        append(&wal, first, vec![record("h", b"one"), record("", b"")]).unwrap();
        assert_eq!((wal.first_index(), wal.last_index()), (first, Some(first + 1)));
        drop(wal);
        let (wal, recovered) = open(&files).unwrap();
        assert_eq!((recovered.first_index, recovered.last_index), (first, Some(first + 1)));
        let records = wal.read(first..first + 2, usize::MAX).unwrap();
        assert_eq!(records, [record("h", b"one"), record("", b"")]);
    }
}

#[test]
fn words_and_records_come_back() {
    let files = FaultyFiles::new();
    let (wal, _) = open(&files).unwrap();
    wait_for(|done| wal.save_vote(blob("vote 1"), done)).unwrap();
    append(&wal, 1, (1..=10).map(|index| numbered(index, 100)).collect()).unwrap();
    wal.save_committed(4, blob("committed 4"));
    wal.save_committed(3, blob("older, ignored"));
    wal.save_committed(11, blob("not held, ignored"));
    wait_for(|done| wal.save_vote(blob("vote 2"), done)).unwrap();
    wait_for(|done| wal.truncate_after(8, done)).unwrap();
    wait_for(|done| wal.purge_to(2, blob("purged 2"), done)).unwrap();
    wait_for(|done| wal.purge_to(1, blob("less, ignored"), done)).unwrap();
    append(&wal, 9, vec![numbered(900, 10)]).unwrap();
    wal.save_committed(9, blob("committed 9"));
    wal.close();

    let (wal, recovered) = open(&files).unwrap();
    let expected = Recovered {
        vote: Some(blob("vote 2")),
        committed: Some(blob("committed 9")),
        purged: Some((2, blob("purged 2"))),
        first_index: 3,
        last_index: Some(9),
        repaired_tail: None,
    };
    assert_eq!(recovered, expected);
    let mut records: Vec<WalRecord> = (3..=8).map(|index| numbered(index, 100)).collect();
    records.push(numbered(900, 10));
    assert_eq!(read_all(&wal), records);
    match wal.read(2..9, usize::MAX) {
        Err(WalError::Purged { asked: 2, first: 3 }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_batch_costs_one_write_and_one_sync_however_much_is_queued() {
    let files = FaultyFiles::new();
    let options = WalOptions { segment_bytes: 1024 * 1024, ..small() };
    let (wal, _, mut writer) =
        Wal::open_by_hand(Arc::new(files.clone()), directory(), options).unwrap();
    let before = (files.operations(), files.syncs());
    let outcomes: Vec<_> = (0..500)
        .map(|index| {
            let (done, outcome) = promise();
            wal.append(index, vec![numbered(index, 300)], done);
            wal.save_committed(index, blob("c"));
            outcome
        })
        .collect();
    wait_nothing(&outcomes);
    assert!(writer.turn());
    for outcome in outcomes {
        outcome.try_recv().unwrap().unwrap();
    }
    assert_eq!((files.operations(), files.syncs()), (before.0 + 2, before.1 + 1));
    let statistics = wal.statistics();
    assert_eq!((statistics.syncs, statistics.records), (1, 500));
    assert_eq!(statistics.bytes_queued, 0);
}

fn wait_nothing(outcomes: &[Receiver<Result<(), WalError>>]) {
    assert!(outcomes.iter().all(|outcome| outcome.try_recv().is_err()), "nothing is synced yet");
}

#[test]
fn committed_alone_wakes_nobody_and_rides_along() {
    let files = FaultyFiles::new();
    let (wal, _, mut writer) =
        Wal::open_by_hand(Arc::new(files.clone()), directory(), small()).unwrap();
    wal.append(1, vec![numbered(1, 10)], promise().0);
    assert!(writer.turn());
    let before = files.operations();
    wal.save_committed(1, blob("committed 1"));
    assert!(writer.turn());
    assert_eq!(files.operations(), before, "no I/O for committed alone");
    wal.save_vote(blob("vote"), promise().0);
    assert!(writer.turn());
    drop(writer);
    let (_, recovered) = open(&files.power_cut(&mut Random(1))).unwrap();
    assert_eq!(recovered.committed, Some(blob("committed 1")));
}

#[test]
fn an_idle_log_is_sealed_once_with_all_that_it_knows() {
    let files = FaultyFiles::new();
    let open = |files: &FaultyFiles| {
        Wal::open_by_hand(Arc::new(files.clone()), directory(), small()).unwrap()
    };
    let (wal, _, mut writer) = open(&files);
    let untouched = files.operations();
    assert!(writer.idle());
    assert_eq!(files.operations(), untouched, "there is nothing to prove in an empty log");
    wal.append(1, vec![numbered(1, 10)], promise().0);
    assert!(writer.turn());
    wal.save_committed(1, blob("committed 1"));
    assert!(writer.idle());
    let sealed = files.operations();
    assert!(writer.idle());
    assert_eq!(files.operations(), sealed, "once is enough");
    assert_eq!(batches(&files).len(), 2);
    let files = files.power_cut(&mut Random(1));
    let (wal, recovered, mut writer) = open(&files);
    assert_eq!(recovered.committed, Some(blob("committed 1")));
    let opened = files.operations();
    assert!(writer.idle());
    wal.close();
    writer.turn();
    assert_eq!(files.operations(), opened, "what was found sealed stays so");
}

#[test]
fn what_breaks_the_contract_is_refused_and_changes_nothing() {
    let files = FaultyFiles::new();
    let (wal, _) = open(&files).unwrap();
    append(&wal, 5, vec![numbered(5, 1), numbered(6, 1), numbered(7, 1)]).unwrap();
    let refused = |outcome: Result<(), WalError>| match outcome {
        Err(WalError::Refused(_)) => {}
        other => panic!("{other:?}"),
    };
    refused(append(&wal, 7, vec![numbered(7, 1)]));
    refused(append(&wal, 9, vec![numbered(9, 1)]));
    let too_large = wal.record_bytes_max() - 8 + 1;
    refused(append(&wal, 8, vec![numbered(8, 1), numbered(9, too_large)]));
    refused(append(&wal, 8, vec![record(&"h".repeat(256), b"")]));
    refused(wait_for(|done| wal.save_vote(Bytes::from(vec![0; BLOB_BYTES_MAX + 1]), done)));
    wal.save_committed(6, blob("6"));
    refused(wait_for(|done| wal.truncate_after(5, done)));
    wait_for(|done| wal.purge_to(5, blob("5"), done)).unwrap();
    refused(wait_for(|done| wal.purge_to(u64::MAX, blob("max"), done)));
    wait_for(|done| wal.truncate_after(6, done)).unwrap();
    wait_for(|done| wal.truncate_after(100, done)).unwrap();
    assert_eq!(read_all(&wal), [numbered(6, 1)]);
    append(&wal, 7, vec![numbered(70, too_large - 1)]).unwrap();
    wal.close();
    match append(&wal, 8, vec![numbered(8, 1)]) {
        Err(WalError::Closed) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(wal.read(7..8, 0).unwrap(), [numbered(70, too_large - 1)]);
    let (wal, recovered) = open(&files).unwrap();
    assert_eq!((recovered.first_index, recovered.last_index), (6, Some(7)));
    assert_eq!(wal.read(7..8, 0).unwrap(), [numbered(70, too_large - 1)]);
}

#[test]
fn everything_can_be_truncated_and_a_purge_can_run_ahead() {
    let files = FaultyFiles::new();
    let (wal, _) = open(&files).unwrap();
    append(&wal, 0, vec![numbered(0, 1), numbered(1, 1)]).unwrap();
    wait_for(|done| wal.truncate_from(0, done)).unwrap();
    assert_eq!((wal.first_index(), wal.last_index()), (0, None));
    append(&wal, 0, vec![numbered(10, 1)]).unwrap();
    wait_for(|done| wal.purge_to(99, blob("snapshot"), done)).unwrap();
    assert_eq!((wal.first_index(), wal.last_index()), (100, None));
    drop(wal);
    let (wal, recovered) = open(&files).unwrap();
    assert_eq!((recovered.first_index, recovered.last_index), (100, None));
    wal.save_committed(99, blob("covered by the purge"));
    append(&wal, 100, vec![numbered(100, 1)]).unwrap();
    drop(wal);
    let (_, recovered) = open(&files).unwrap();
    assert_eq!((recovered.first_index, recovered.last_index), (100, Some(100)));
    assert_eq!(recovered.committed, Some(blob("covered by the purge")));
}

#[test]
fn a_log_of_many_segments_is_read_from_disk_and_purged_from_the_front() {
    let files = FaultyFiles::new();
    let options = WalOptions { cache_bytes_max: 2000, ..small() };
    let open = || Wal::open(Arc::new(files.clone()), directory(), options.clone()).unwrap();
    let (wal, _) = open();
    wait_for(|done| wal.save_vote(blob("of the first segment"), done)).unwrap();
    for index in 1..=100 {
        append(&wal, index, vec![numbered(index, 1000 + index as usize * 30)]).unwrap();
    }
    let expected = |range: std::ops::RangeInclusive<u64>| -> Vec<WalRecord> {
        range.map(|index| numbered(index, 1000 + index as usize * 30)).collect()
    };
    assert_eq!(wal.read(1..101, usize::MAX).unwrap(), expected(1..=100));
    assert_eq!(wal.read(40..80, 0).unwrap(), expected(40..=40));
    let three = expected(40..=42).iter().map(WalRecord::bytes).sum();
    assert_eq!(wal.read(40..80, three).unwrap(), expected(40..=42));
    assert_eq!(wal.read(40..80, three - 1).unwrap(), expected(40..=41));
    assert!(segment_names(&files).len() >= 13);
    let lag = wal.bytes_after(50);
    assert!((200_000..400_000).contains(&lag), "{lag}");
    assert_eq!((wal.bytes_after(100), wal.bytes_after(1000)), (0, 0));
    assert!(wal.bytes_after(0) > lag);

    wait_for(|done| wal.purge_to(60, blob("60"), done)).unwrap();
    wal.close();
    drop(wal);
    assert!(segment_names(&files).len() <= 8, "{:?}", segment_names(&files));
    let (wal, recovered) = open();
    assert_eq!(recovered.vote, Some(blob("of the first segment")));
    assert_eq!(recovered.purged, Some((60, blob("60"))));
    assert_eq!((recovered.first_index, recovered.last_index), (61, Some(100)));
    assert_eq!(read_all(&wal), expected(61..=100));
}

#[test]
fn large_records_fit_the_default_segments() {
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { cache_bytes_max: 0, ..WalOptions::default() };
    let open = || Wal::open(Arc::new(RealFiles), directory.path(), options.clone()).unwrap();
    let (wal, _) = open();
    let size = 4 * 1024 * 1024 + 7;
    assert!(wal.record_bytes_max() > size + 8);
    append(&wal, 1, (1..=5).map(|index| numbered(index, size)).collect()).unwrap();
    let read = |wal: &Wal| {
        for index in 1..=5 {
            assert_eq!(wal.read(index..6, size).unwrap(), [numbered(index, size)]);
        }
    };
    read(&wal);
    drop(wal);
    read(&open().0);
}
