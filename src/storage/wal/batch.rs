//! The batch: what one write and one sync put on disk, whole or not at all.
//!
//! ```text
//! header, 64 bytes       table, 20 bytes a frame          data               zeros up to
//! magic … checksum       kind, length, index, checksum    frame after frame  the next 4 KiB
//! ```
//!
//! Each byte is checksummed once: the header's checksum covers the header, which holds the
//! table's, which covers the table, which holds one for the data of each frame. So a single record
//! can be read back and verified by what the memory index knows, without reading its batch.
//!
//! A batch starts on a block of its own. A sync writes whole pages, and a device may rewrite whole
//! physical sectors of 4 KiB: if two batches shared one, a power cut in the later could take the
//! earlier, acknowledged one along. It also makes batches easy to find behind damage.
//!
//! All integers are little-endian. The golden bytes in the tests pin the layout.

use bytes::Bytes;

/// Batches begin at multiples of this, in bytes.
pub(super) use crate::storage::file::BLOCK_BYTES;
use crate::storage::file::BlockBuffer;

/// Bytes of a batch's header.
pub(super) const HEADER_BYTES: usize = 64;
/// Bytes of one entry of a batch's table.
pub(super) const FRAME_BYTES: usize = 20;

const MAGIC: [u8; 4] = *b"qrwb";
const VERSION: u16 = 1;
/// Stands for "no index" where one is expected; an index is always below it.
const NO_INDEX: u64 = u64::MAX;

/// What a frame says. The numbers are on disk: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// The record at `index`.
    Record = 1,
    /// The vote is now this.
    Vote = 2,
    /// Records up to `index` are committed; the data is the caller's word for it.
    Committed = 3,
    /// Records from `index` on are dropped.
    Truncate = 4,
    /// Records up to `index` are dropped; the data is the caller's word for it.
    Purge = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Record,
            2 => Kind::Vote,
            3 => Kind::Committed,
            4 => Kind::Truncate,
            5 => Kind::Purge,
            _ => return None,
        })
    }
}

/// One statement, on its way to disk.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    /// Zero for a vote.
    pub(super) index: u64,
    /// At most 255 bytes, and only a record has one.
    pub(super) header: Bytes,
    pub(super) payload: Bytes,
}

impl Frame {
    pub(super) fn new(kind: Kind, index: u64, payload: Bytes) -> Frame {
        Frame { kind, index, header: Bytes::new(), payload }
    }

    /// Bytes that the frame adds to a batch.
    pub(super) fn bytes(&self) -> usize {
        FRAME_BYTES + self.header.len() + self.payload.len()
    }
}

/// One statement, as the table of a batch describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameEntry {
    pub(super) kind: Kind,
    pub(super) index: u64,
    /// How much of `bytes` is a record's header.
    pub(super) header_bytes: u8,
    /// Bytes of data, header included.
    pub(super) bytes: u32,
    pub(super) checksum: u32,
    /// Where the data begins, counted from the start of the batch.
    pub(super) offset: u32,
}

/// What ties a batch to its place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// One more than that of the batch before it; the first of a log is 1. A batch is written only
    /// after the one before it was synced, so it is proof of all that came before.
    pub(super) sequence: u64,
    /// The segment's salt, which no client can know: bytes that a client sent can never pass for a
    /// batch, wherever they end up.
    pub(super) salt: u64,
    /// Number of the segment.
    pub(super) segment: u32,
    /// Index of the record that was due when this batch began, once the log has begun.
    pub(super) next_index: Option<u64>,
}

/// A batch's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) place: Place,
    pub(super) frames: u32,
    pub(super) data_bytes: u32,
    table_checksum: u32,
}

impl Header {
    /// Decodes the first [`HEADER_BYTES`] of a batch, or says what is wrong with them.
    pub(super) fn decode(bytes: &[u8]) -> Result<Header, &'static str> {
        assert!(bytes.len() >= HEADER_BYTES);
        if bytes[..4] != MAGIC {
            return Err("no batch begins here");
        }
        if crc32fast::hash(&bytes[..60]) != u32_at(bytes, 60) {
            return Err("the checksum of a batch's header is wrong");
        }
        if u16::from_le_bytes([bytes[4], bytes[5]]) != VERSION {
            return Err("the batch is of a format that this version does not know");
        }
        let next_index = u64_at(bytes, 40);
        Ok(Header {
            place: Place {
                sequence: u64_at(bytes, 8),
                salt: u64_at(bytes, 16),
                segment: u32_at(bytes, 24),
                next_index: (next_index != NO_INDEX).then_some(next_index),
            },
            frames: u32_at(bytes, 28),
            data_bytes: u32_at(bytes, 32),
            table_checksum: u32_at(bytes, 36),
        })
    }

    fn encode(&self, bytes: &mut [u8]) {
        bytes[..HEADER_BYTES].fill(0);
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.place.sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.place.salt.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.place.segment.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.frames.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.data_bytes.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.table_checksum.to_le_bytes());
        let next_index = self.place.next_index.unwrap_or(NO_INDEX);
        bytes[40..48].copy_from_slice(&next_index.to_le_bytes());
        let checksum = crc32fast::hash(&bytes[..60]);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
    }

    /// Bytes of the batch without the padding behind it.
    pub(super) fn bytes(&self) -> u64 {
        HEADER_BYTES as u64
            + u64::from(self.frames) * FRAME_BYTES as u64
            + u64::from(self.data_bytes)
    }

    /// Decodes the table of the batch that `batch` begins with, and verifies that all its data
    /// are there. `batch` holds at least [`Header::bytes`].
    pub(super) fn frames(&self, batch: &[u8]) -> Result<Vec<FrameEntry>, &'static str> {
        assert!(batch.len() as u64 >= self.bytes());
        let table = &batch[HEADER_BYTES..][..self.frames as usize * FRAME_BYTES];
        if crc32fast::hash(table) != self.table_checksum {
            return Err("the checksum of a batch's table is wrong");
        }
        let mut frames = Vec::with_capacity(self.frames as usize);
        let mut offset = HEADER_BYTES + table.len();
        let end = offset + self.data_bytes as usize;
        for entry in table.chunks_exact(FRAME_BYTES) {
            let Some(kind) = Kind::from_byte(entry[0]) else {
                return Err("the batch says something that this version does not know");
            };
            let frame = FrameEntry {
                kind,
                header_bytes: entry[1],
                bytes: u32_at(entry, 4),
                index: u64_at(entry, 8),
                checksum: u32_at(entry, 16),
                offset: offset as u32,
            };
            let bytes = frame.bytes as usize;
            if bytes > end - offset || usize::from(frame.header_bytes) > bytes {
                return Err("the table of a batch contradicts its header");
            }
            if frame.index == NO_INDEX {
                return Err("the table of a batch has an index that cannot be");
            }
            if crc32fast::hash(&batch[offset..offset + bytes]) != frame.checksum {
                return Err("the checksum of a batch's data is wrong");
            }
            offset += bytes;
            frames.push(frame);
        }
        if offset != end {
            return Err("the table of a batch contradicts its header");
        }
        Ok(frames)
    }
}

/// Encodes a batch into `buffer`, and pads it to a whole block. Returns the entries of its table.
///
/// The caller keeps batches below 4 GiB and indexes below `u64::MAX`.
pub(super) fn encode(place: Place, frames: &[Frame], buffer: &mut BlockBuffer) -> Vec<FrameEntry> {
    let bytes = HEADER_BYTES + frames.iter().map(Frame::bytes).sum::<usize>();
    assert!(u32::try_from(bytes).is_ok(), "a batch of {bytes} bytes");
    buffer.reset(bytes.next_multiple_of(BLOCK_BYTES));
    let (used, padding) = buffer.split_at_mut(bytes);
    padding.fill(0);
    let (header, rest) = used.split_at_mut(HEADER_BYTES);
    let (table, data) = rest.split_at_mut(frames.len() * FRAME_BYTES);
    let data_start = HEADER_BYTES + table.len();
    let mut entries = Vec::with_capacity(frames.len());
    let mut end = 0;
    for (frame, slot) in frames.iter().zip(table.chunks_exact_mut(FRAME_BYTES)) {
        assert!(frame.index < NO_INDEX && frame.header.len() <= usize::from(u8::MAX));
        let start = end;
        for part in [&frame.header, &frame.payload] {
            data[end..end + part.len()].copy_from_slice(part);
            end += part.len();
        }
        let entry = FrameEntry {
            kind: frame.kind,
            index: frame.index,
            header_bytes: frame.header.len() as u8,
            bytes: (end - start) as u32,
            checksum: crc32fast::hash(&data[start..end]),
            offset: (data_start + start) as u32,
        };
        slot[0] = entry.kind as u8;
        slot[1] = entry.header_bytes;
        slot[2..4].fill(0);
        slot[4..8].copy_from_slice(&entry.bytes.to_le_bytes());
        slot[8..16].copy_from_slice(&entry.index.to_le_bytes());
        slot[16..20].copy_from_slice(&entry.checksum.to_le_bytes());
        entries.push(entry);
    }
    let sound = Header {
        place,
        frames: frames.len() as u32,
        data_bytes: end as u32,
        table_checksum: crc32fast::hash(table),
    };
    sound.encode(header);
    entries
}

/// Reads a little-endian integer out of a slice known to hold it.
pub(super) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut integer = [0; 4];
    integer.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(integer)
}

/// Reads a little-endian integer out of a slice known to hold it.
pub(super) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut integer = [0; 8];
    integer.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(integer)
}
