//! Rot: flipped bits, cut files, missing files, and what can be known about them.

use super::super::writer::Writer;
use super::*;

/// A log of several segments with batches of one to four blocks: records `1 ..= RECORDS`.
const RECORDS: u64 = 40;

fn filled(closed: bool) -> FaultyFiles {
    let (files, mut writer) = filled_by_hand();
    if closed {
        writer.close();
    }
    files
}

/// The same, and who writes it: nothing is sealed and no floor is noted.
fn filled_by_hand() -> (FaultyFiles, ByHand) {
    let files = FaultyFiles::new();
    let (wal, _, mut writer) =
        Wal::open_by_hand(Arc::new(files.clone()), directory(), small()).unwrap();
    wal.save_vote(blob("vote"), promise().0);
    for index in 1..=RECORDS {
        wal.append(
            index,
            vec![numbered(index, 200 + (index as usize * 997) % 11_000)],
            promise().0,
        );
        assert!(writer.turn());
    }
    (files, ByHand { wal, writer })
}

/// A log and its crank. The log closes when its handle goes.
struct ByHand {
    wal: Wal,
    writer: Writer,
}

impl ByHand {
    fn idle(&mut self) -> bool {
        self.writer.idle()
    }

    fn close(&mut self) {
        self.wal.close();
        self.writer.turn();
    }
}

/// What a copy of a disk looks like after some damage.
fn damaged(files: &FaultyFiles, damage: impl FnOnce(&FaultyFiles)) -> FaultyFiles {
    let copy = files.process_kill();
    damage(&copy);
    copy
}

fn open_with(files: &FaultyFiles, must_contain: u64) -> Result<Recovered, WalError> {
    let options = WalOptions { must_contain, ..small() };
    Wal::open_by_hand(Arc::new(files.clone()), directory(), options).map(|(_, found, _)| found)
}

fn corrupt_at(outcome: Result<Recovered, WalError>) -> (PathBuf, u64) {
    match outcome {
        Err(WalError::Corrupt { file, offset, .. }) => (file, offset),
        other => panic!("damage was not noticed: {other:?}"),
    }
}

/// A log that refuses to open must be left as it was.
fn refuses(files: &FaultyFiles, must_contain: u64) -> (PathBuf, u64) {
    let before: Vec<Vec<u8>> = contents(files);
    let at = corrupt_at(open_with(files, must_contain));
    assert!(contents(files) == before, "a refused log was changed");
    at
}

fn contents(files: &FaultyFiles) -> Vec<Vec<u8>> {
    segment_names(files).iter().map(|name| files.content(&directory().join(name))).collect()
}

#[test]
fn a_flip_in_any_acknowledged_batch_of_a_closed_log_is_refused_by_file_and_offset() {
    let files = filled(true);
    let all = batches(&files);
    assert!(segment_names(&files).len() > 3);
    let mut random = Random(5);
    let (seal, acknowledged) = all.split_last().unwrap();
    assert_eq!(seal.header.frames, 0);
    for batch in acknowledged {
        // The magic, somewhere in the header, and anywhere.
        let used = batch.header.bytes();
        for offset in [0, random.below(HEADER_BYTES as u64), random.below(used), used - 1] {
            let mask = 1 << random.below(8);
            let copy = damaged(&files, |files| {
                files.flip(&batch.path, batch.offset + offset, mask);
            });
            assert_eq!(refuses(&copy, 0), (batch.path.clone(), batch.offset));
        }
    }
}

#[test]
fn a_flip_in_the_last_batch_of_a_log_that_was_not_closed_is_a_torn_tail() {
    let files = filled(false);
    let last = batches(&files).pop().unwrap();
    let copy = damaged(&files, |files| files.flip(&last.path, last.offset + 70, 1));
    let before = contents(&copy);
    let recovered = open_with(&copy, RECORDS - 1).unwrap();
    assert_eq!(recovered.last_index, Some(RECORDS - 1));
    let bytes = last.header.bytes().next_multiple_of(BLOCK_BYTES as u64);
    let torn = TornTail { file: last.path.clone(), offset: last.offset, bytes };
    assert_eq!(recovered.repaired_tail, Some(torn));
    let content = copy.content(&last.path);
    assert!(content[last.offset as usize..].iter().all(|byte| *byte == 0));
    assert_ne!(contents(&copy), before);
    let again = open_with(&copy, RECORDS - 1).unwrap();
    assert_eq!(again, Recovered { repaired_tail: None, ..recovered });
}

#[test]
fn a_flip_in_the_last_batch_of_an_idle_log_is_refused() {
    let (files, mut writer) = filled_by_hand();
    let last = batches(&files).pop().unwrap();
    assert!(writer.idle());
    let seal = batches(&files).pop().unwrap();
    assert_eq!((seal.header.frames, seal.header.place.sequence), (0, RECORDS + 1));
    for damage in [0, 70, last.header.bytes() - 1] {
        let copy = damaged(&files, |files| files.flip(&last.path, last.offset + damage, 1));
        assert_eq!(refuses(&copy, 0), (last.path.clone(), last.offset));
    }
    // The seal itself is worth nothing.
    let copy = damaged(&files, |files| files.flip(&seal.path, seal.offset, 1));
    let recovered = open_with(&copy, RECORDS).unwrap();
    assert_eq!(recovered.last_index, Some(RECORDS));
    assert_eq!(recovered.repaired_tail.unwrap().offset, seal.offset);
}

/// Zeros from one batch on, in all segments: what a disk leaves that has lost its newest writes.
fn lose_from(files: &FaultyFiles, batch: &Found) {
    for name in segment_names(files) {
        let path = directory().join(name);
        let start = match path.cmp(&batch.path) {
            std::cmp::Ordering::Less => continue,
            std::cmp::Ordering::Equal => batch.offset,
            std::cmp::Ordering::Greater => FIRST_BATCH,
        };
        let bytes = files.content(&path).len() - start as usize;
        files.overwrite(&path, start, &vec![0; bytes]);
    }
}

#[test]
fn a_log_whose_newest_part_reads_as_zeros_is_refused() {
    let (files, mut writer) = filled_by_hand();
    let all = batches(&files);
    // Nothing outside of the log knows better yet.
    let copy = damaged(&files, |files| lose_from(files, &all[20]));
    assert_eq!(open_with(&copy, 0).unwrap().last_index, Some(20));
    assert!(writer.idle());
    for batch in &all {
        let copy = damaged(&files, |files| lose_from(files, batch));
        let error = open_with(&copy, 0).unwrap_err().to_string();
        for part in [format!("record {RECORDS} (batch {RECORDS})"), "was once on disk".into()] {
            assert!(error.contains(&part), "{part} in {error}");
        }
        refuses(&copy, 0);
    }
    let copy = damaged(&files, |files| {
        lose_from(files, &all[20]);
        files.overwrite(&all[20].path, all[20].offset, b"garbage");
    });
    assert_eq!(refuses(&copy, 0), (all[20].path.clone(), all[20].offset));
}

/// Old notes hold, damaged ones do no harm, and whatever was truncated, purged or replaced by a
/// snapshot is not missed.
#[test]
fn a_floor_rises_with_the_log_and_is_no_obstacle() {
    let (files, mut writer) = filled_by_hand();
    let floor = directory().join("floor");
    assert!(writer.idle());
    drop(writer);
    let (wal, _, mut writer) =
        Wal::open_by_hand(Arc::new(files.clone()), directory(), small()).unwrap();
    wal.truncate_from(2, promise().0);
    assert!(writer.turn() && writer.idle());
    wal.purge_to(RECORDS + 100, blob("a snapshot"), promise().0);
    assert!(writer.turn() && writer.idle());
    assert_eq!(open_with(&files.process_kill(), 0).unwrap().first_index, RECORDS + 101);
    let newest = batches(&files).into_iter().rev().find(|batch| batch.header.frames > 0).unwrap();
    refuses(&damaged(&files, |files| lose_from(files, &newest)), 0);

    // Of the two notes either may be spoilt; the other one holds.
    let blocks = [0, BLOCK_BYTES as u64];
    for block in blocks {
        let copy = damaged(&files, |files| files.flip(&floor, block + 20, 1));
        open_with(&copy, 0).unwrap();
        refuses(&damaged(&copy, |files| lose_from(files, &batches(files)[3])), 0);
    }
    let copy = damaged(&files, |files| blocks.iter().for_each(|at| files.flip(&floor, at + 20, 1)));
    let (wal, _, mut writer) =
        Wal::open_by_hand(Arc::new(copy.clone()), directory(), small()).unwrap();
    assert!(writer.idle());
    drop(wal);
    refuses(&damaged(&copy, |files| lose_from(files, &newest)), 0);
}

#[test]
fn a_tail_that_something_vouches_for_is_refused() {
    let files = filled(false);
    let last = batches(&files).pop().unwrap();
    let copy = damaged(&files, |files| files.flip(&last.path, last.offset + 70, 1));
    assert_eq!(refuses(&copy, RECORDS), (last.path.clone(), last.offset));

    // With its own end intact, but less than the checkpoint has seen.
    assert_eq!(open_with(&files, RECORDS).unwrap().last_index, Some(RECORDS));
    let (path, offset) = refuses(&files, RECORDS + 1);
    let end = last.offset + last.header.bytes().next_multiple_of(BLOCK_BYTES as u64);
    assert_eq!((path, offset), (last.path, end));
    assert_eq!(corrupt_at(open_with(&FaultyFiles::new(), 1)).1, 0);
}

#[test]
fn a_lost_block_in_the_middle_is_refused() {
    let files = filled(false);
    let all = batches(&files);
    for batch in &all[..all.len() - 1] {
        let bytes = batch.header.bytes() as usize;
        let copy = damaged(&files, |files| {
            files.overwrite(&batch.path, batch.offset, &vec![0; bytes]);
        });
        // Where the batch was, or, if nothing is left of the segment's tail, where the log goes on.
        let (path, offset) = refuses(&copy, 0);
        assert!(path > batch.path || (path == batch.path && offset == batch.offset));
        assert!(path == batch.path || offset == FIRST_BATCH);
    }
}

#[test]
fn cut_files_are_refused_or_end_the_log() {
    let files = filled(false);
    let names = segment_names(&files);
    let in_use = batches(&files).pop().unwrap();
    let mut random = Random(9);
    for name in &names {
        let path = directory().join(name);
        for _ in 0..20 {
            let length = random.below(32 * 1024);
            let copy = damaged(&files, |files| files.cut(&path, length));
            let lost: Vec<Found> = batches(&files)
                .into_iter()
                .filter(|batch| {
                    let bytes = batch.header.bytes().next_multiple_of(BLOCK_BYTES as u64);
                    batch.path == path && batch.offset + bytes > length
                })
                .collect();
            match open_with(&copy, 0) {
                Err(WalError::Corrupt { file, .. }) => {
                    assert!(length < FIRST_BATCH || (!lost.is_empty() && file >= path));
                }
                Ok(recovered) if path < in_use.path => {
                    assert!(lost.is_empty());
                    assert_eq!(recovered.last_index, Some(RECORDS));
                }
                Ok(recovered) => {
                    assert!(lost.is_empty() || path == in_use.path);
                    assert_eq!(recovered.last_index, Some(RECORDS - lost.len() as u64));
                    assert!(recovered.repaired_tail.is_some());
                    assert_eq!(copy.content(&path).len(), 32 * 1024);
                    assert_eq!(open_with(&copy, 0).unwrap().repaired_tail, None);
                }
                Err(other) => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn missing_segments_are_refused() {
    let files = filled(true);
    let names = segment_names(&files);
    let used = batches(&files).pop().unwrap().path;
    for name in &names {
        let path = directory().join(name);
        let copy = damaged(&files, |files| files.remove(&path).unwrap());
        let outcome = open_with(&copy, RECORDS);
        if path > used {
            assert_eq!(outcome.unwrap().last_index, Some(RECORDS));
        } else {
            corrupt_at(outcome);
        }
    }
}

#[test]
fn flips_in_unused_bytes_lose_nothing() {
    let files = filled(true);
    let all = batches(&files);
    for pair in all.windows(2) {
        let end = pair[0].offset + pair[0].header.bytes();
        let unused = end..end.next_multiple_of(BLOCK_BYTES as u64);
        for offset in [unused.start, unused.end - 1] {
            if offset < unused.end && offset >= unused.start {
                let copy = damaged(&files, |files| files.flip(&pair[0].path, offset, 0x10));
                let recovered = open_with(&copy, RECORDS).unwrap();
                assert_eq!((recovered.last_index, recovered.repaired_tail), (Some(RECORDS), None));
            }
        }
        if pair[0].path != pair[1].path && unused.end < 32 * 1024 {
            let copy = damaged(&files, |files| files.flip(&pair[0].path, 32 * 1024 - 1, 1));
            assert_eq!(open_with(&copy, RECORDS).unwrap().last_index, Some(RECORDS));
        }
    }
}

#[test]
fn a_damaged_segment_header_is_refused() {
    let files = filled(true);
    for name in segment_names(&files) {
        let path = directory().join(name);
        for offset in 0..36 {
            let copy = damaged(&files, |files| files.flip(&path, offset, 4));
            assert_eq!(refuses(&copy, 0), (path.clone(), 0));
        }
    }
}

#[test]
fn a_batch_that_a_client_sent_is_not_taken_for_one() {
    // A torn batch whose payload holds, block by block, what would be valid batches of a log with
    // another salt: an attacker can know everything but that.
    let foreign = FaultyFiles::new();
    let options = WalOptions { salt: Some(1), ..small() };
    let (wal, _, mut writer) =
        Wal::open_by_hand(Arc::new(foreign.clone()), directory(), options).unwrap();
    for index in 1..=6 {
        wal.append(index, vec![numbered(index, 100)], promise().0);
        writer.turn();
    }
    let payload = &foreign.content(&directory().join(file_name(1)))[2 * BLOCK_BYTES..];

    let files = FaultyFiles::new();
    let (wal, _, mut writer) =
        Wal::open_by_hand(Arc::new(files.clone()), directory(), small()).unwrap();
    let shift = HEADER_BYTES + super::super::batch::FRAME_BYTES;
    let mut bytes = vec![0; BLOCK_BYTES - shift];
    bytes.extend_from_slice(&payload[..2 * BLOCK_BYTES]);
    wal.append(1, vec![record("", &bytes)], promise().0);
    writer.turn();
    let batch = batches(&files).pop().unwrap();
    let inside = &files.content(&batch.path)[2 * BLOCK_BYTES..];
    assert!(Header::decode(inside).is_ok(), "the payload does look like a batch");
    files.flip(&batch.path, batch.offset + 80, 1);
    let recovered = open_with(&files, 0).unwrap();
    assert_eq!(recovered.last_index, None);
    assert_eq!(recovered.repaired_tail.unwrap().offset, FIRST_BATCH);
}

#[test]
fn a_record_that_rots_while_the_log_is_open_is_noticed_when_it_is_read() {
    let files = FaultyFiles::new();
    let options = WalOptions { cache_bytes_max: 0, ..small() };
    let (wal, _) = Wal::open(Arc::new(files.clone()), directory(), options).unwrap();
    append(&wal, 1, vec![numbered(1, 100), numbered(2, 100)]).unwrap();
    let batch = batches(&files).pop().unwrap();
    files.flip(&batch.path, batch.offset + batch.header.bytes() - 1, 1);
    match wal.read(1..3, usize::MAX) {
        Err(WalError::Corrupt { file, offset, .. }) => {
            assert_eq!((file, offset), (batch.path, batch.offset + batch.header.bytes() - 108));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(wal.read(1..2, usize::MAX).unwrap(), [numbered(1, 100)]);
}

#[test]
fn a_file_of_a_later_format_is_refused() {
    let files = filled(true);
    let path = directory().join(file_name(1));
    let copy = damaged(&files, |files| {
        let mut header = files.content(&path)[..32].to_vec();
        header[8] = 2;
        files.overwrite(&path, 0, &header);
        files.overwrite(&path, 32, &crc32fast::hash(&header).to_le_bytes());
    });
    let error = open_with(&copy, 0).unwrap_err().to_string();
    assert!(error.contains("format"), "{error}");
}
