//! The bytes on disk. If one of these fails, old logs cannot be read any more.

use super::super::batch::{self, Frame, Kind, Place};
use super::super::segment::{Preparation, Segment};
use super::*;
use crate::storage::file::BlockBuffer;

fn hex(bytes: &[u8]) -> String {
    let lines = bytes.chunks(16).map(|line| {
        let digits: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        digits.join(" ")
    });
    lines.collect::<Vec<String>>().join("\n")
}

fn example() -> (Place, Vec<Frame>) {
    let place =
        Place { sequence: 7, salt: 0x1122_3344_5566_7788, segment: 3, next_index: Some(258) };
    let record =
        Frame { kind: Kind::Record, index: 258, header: blob("head"), payload: blob("payload") };
    let frames = vec![
        Frame::new(Kind::Vote, 0, blob("v")),
        record,
        Frame::new(Kind::Committed, 257, blob("c")),
        Frame::new(Kind::Truncate, 258, Bytes::new()),
        Frame::new(Kind::Purge, 200, blob("p")),
    ];
    (place, frames)
}

#[test]
fn a_batch_has_these_bytes() {
    let (place, frames) = example();
    let mut buffer = BlockBuffer::default();
    let entries = batch::encode(place, &frames, &mut buffer);
    assert_eq!(buffer.len(), BLOCK_BYTES);
    let used = HEADER_BYTES + 5 * batch::FRAME_BYTES + 14;
    assert!(buffer[used..].iter().all(|byte| *byte == 0));
    assert_eq!(hex(&buffer[..used]), GOLDEN_BATCH);

    let header = Header::decode(&buffer).unwrap();
    assert_eq!(header.place, place);
    assert_eq!(header.bytes(), used as u64);
    assert_eq!(header.frames(&buffer).unwrap(), entries);
    assert_eq!(&buffer[entries[1].offset as usize..][..11], b"headpayload");
}

const GOLDEN_BATCH: &str = "\
71 72 77 62 01 00 00 00 07 00 00 00 00 00 00 00
88 77 66 55 44 33 22 11 03 00 00 00 05 00 00 00
0e 00 00 00 2f e1 22 63 02 01 00 00 00 00 00 00
00 00 00 00 00 00 00 00 00 00 00 00 ec a1 92 16
02 00 00 00 01 00 00 00 00 00 00 00 00 00 00 00
84 3b 64 6b 01 04 00 00 0b 00 00 00 02 01 00 00
00 00 00 00 68 87 a7 76 03 00 00 00 01 00 00 00
01 01 00 00 00 00 00 00 6f df b9 06 04 00 00 00
00 00 00 00 02 01 00 00 00 00 00 00 00 00 00 00
05 00 00 00 01 00 00 00 c8 00 00 00 00 00 00 00
b1 9e 07 82 76 68 65 61 64 70 61 79 6c 6f 61 64
63 70";

#[test]
fn a_segment_has_these_bytes() {
    let files = FaultyFiles::new();
    create_dir_durably(&files, directory()).unwrap();
    let preparation = Preparation::begin(&files, directory(), 3, 0x1122_3344, 16384).unwrap();
    let prepared = preparation.finish(&files, directory()).unwrap();
    let content = files.content(&directory().join("0000000003.wal"));
    assert_eq!(content.len(), 16384);
    assert!(content[36..].iter().all(|byte| *byte == 0));
    assert_eq!(hex(&content[..36]), GOLDEN_SEGMENT);

    let opened = Segment::open(&files, directory(), 3).unwrap();
    assert_eq!((opened.salt, opened.length), (prepared.salt, prepared.length));
    assert_eq!(number_of(&file_name(3)), Some(3));
    assert_eq!(number_of("3.wal"), None);
    assert_eq!(number_of("0000000003.wal.tmp"), None);
}

const GOLDEN_SEGMENT: &str = "\
71 75 6f 72 77 61 6c 00 01 00 00 00 03 00 00 00
44 33 22 11 00 00 00 00 00 40 00 00 00 00 00 00
1d 3d 7c f5";

#[test]
fn no_flipped_bit_of_a_batch_goes_unnoticed() {
    let (place, frames) = example();
    let mut buffer = BlockBuffer::default();
    batch::encode(place, &frames, &mut buffer);
    let used = Header::decode(&buffer).unwrap().bytes() as usize;
    for offset in 0..used {
        for bit in 0..8 {
            buffer[offset] ^= 1 << bit;
            let header = Header::decode(&buffer);
            assert!(header.is_err() || header.unwrap().frames(&buffer).is_err(), "byte {offset}");
            buffer[offset] ^= 1 << bit;
        }
    }
}

#[test]
fn a_batch_that_lies_with_right_checksums_is_an_error_and_no_panic() {
    let (place, frames) = example();
    let mut sound = BlockBuffer::default();
    batch::encode(place, &frames, &mut sound);
    // Any value in any field, under checksums that fit.
    let mut random = Random(17);
    for _ in 0..20_000 {
        let mut buffer = sound.to_vec();
        let offset = random.below(HEADER_BYTES as u64 + 5 * 20) as usize;
        buffer[offset] = random.next() as u8;
        let table = crc32fast::hash(&buffer[HEADER_BYTES..][..5 * 20]);
        buffer[36..40].copy_from_slice(&table.to_le_bytes());
        let header = crc32fast::hash(&buffer[..60]);
        buffer[60..64].copy_from_slice(&header.to_le_bytes());
        if let Ok(header) = Header::decode(&buffer)
            && header.bytes() <= buffer.len() as u64
        {
            let _ = header.frames(&buffer);
        }
    }
}
