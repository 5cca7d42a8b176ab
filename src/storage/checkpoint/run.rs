//! Runs: sorted, immutable sequences of records, cut into blocks.
//!
//! A record is `key length (u32 LE), value length (u32 LE) or REMOVED, key, value`. The records
//! of a run follow each other without gaps and the stream is cut into blocks of one size, so a
//! record of a megabyte is simply spread over many blocks, and no value in the store beneath is
//! ever larger than a block.

use std::sync::Arc;

use super::CheckpointError;
use super::block::{
    BlockStore, CHECKSUM_BYTES, StoreError, block_checksum, block_key, chain_checksum,
};

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 64 * 1024;
/// Longest value, in bytes: several times the largest session with its metadata.
pub const VALUE_BYTES_MAX: usize = 16 * 1024 * 1024;

const LENGTHS_BYTES: usize = 8;
const REMOVED: u32 = u32::MAX;

/// What a root knows about a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) id: u64,
    pub(super) blocks: u32,
    /// Removals included.
    pub(super) records: u64,
    /// Of all records, without checksums.
    pub(super) bytes: u64,
    /// Chained over the blocks' checksums.
    pub(super) checksum: u64,
}

/// Writes one run, block by block.
pub(super) struct RunWriter {
    store: Arc<dyn BlockStore>,
    run: Run,
    block_bytes: usize,
    /// Room for the checksum, then the payload of the block under way.
    block: Vec<u8>,
}

impl RunWriter {
    pub(super) fn new(store: Arc<dyn BlockStore>, id: u64, block_bytes: usize) -> Self {
        let mut block = Vec::with_capacity(CHECKSUM_BYTES + block_bytes);
        block.resize(CHECKSUM_BYTES, 0);
        let run = Run { id, blocks: 0, records: 0, bytes: 0, checksum: id };
        Self { store, run, block_bytes, block }
    }

    /// Appends a record; `None` removes what older runs hold. The caller keeps the order.
    pub(super) fn push(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), CheckpointError> {
        let value_bytes = value.map_or(0, <[u8]>::len);
        if key.len() > KEY_BYTES_MAX || value_bytes > VALUE_BYTES_MAX {
            return Err(CheckpointError::RecordTooLarge { key: key.len(), value: value_bytes });
        }
        let mut lengths = [0; LENGTHS_BYTES];
        lengths[..4].copy_from_slice(&(key.len() as u32).to_le_bytes());
        let length = if value.is_some() { value_bytes as u32 } else { REMOVED };
        lengths[4..].copy_from_slice(&length.to_le_bytes());
        self.append(&lengths)?;
        self.append(key)?;
        self.append(value.unwrap_or_default())?;
        self.run.records += 1;
        self.run.bytes += (LENGTHS_BYTES + key.len() + value_bytes) as u64;
        Ok(())
    }

    fn append(&mut self, mut bytes: &[u8]) -> Result<(), CheckpointError> {
        loop {
            let room = CHECKSUM_BYTES + self.block_bytes - self.block.len();
            if bytes.len() < room {
                self.block.extend_from_slice(bytes);
                return Ok(());
            }
            let (fitting, rest) = bytes.split_at(room);
            self.block.extend_from_slice(fitting);
            self.write_block()?;
            bytes = rest;
        }
    }

    fn write_block(&mut self) -> Result<(), CheckpointError> {
        let Run { id, blocks, .. } = self.run;
        let checksum = block_checksum(id, blocks, &self.block[CHECKSUM_BYTES..]);
        self.block[..CHECKSUM_BYTES].copy_from_slice(&checksum.to_le_bytes());
        self.store.insert(&block_key(id, blocks), &self.block)?;
        self.block.truncate(CHECKSUM_BYTES);
        self.run.checksum = chain_checksum(self.run.checksum, checksum);
        self.run.blocks = blocks
            .checked_add(1)
            .ok_or_else(|| StoreError::new("write a run", "it has too many blocks"))?;
        Ok(())
    }

    /// Blocks written so far.
    pub(super) fn blocks(&self) -> u32 {
        self.run.blocks
    }

    /// Writes what is left. The run is not durable before the store has been synced.
    pub(super) fn finish(mut self) -> Result<Run, CheckpointError> {
        if self.block.len() > CHECKSUM_BYTES {
            self.write_block()?;
        }
        Ok(self.run)
    }
}

/// Reads one run from its beginning, and verifies all of it on the way.
pub(super) struct RunReader {
    store: Arc<dyn BlockStore>,
    run: Arc<Run>,
    next_block: u32,
    checksum: u64,
    records: u64,
    buffer: Vec<u8>,
    /// Where the current record, then its value and then the next record begin in the buffer.
    key: usize,
    value: usize,
    end: usize,
    removed: bool,
}

impl RunReader {
    pub(super) fn new(store: Arc<dyn BlockStore>, run: Arc<Run>) -> Self {
        Self {
            store,
            next_block: 0,
            checksum: run.id,
            records: 0,
            run,
            buffer: Vec::new(),
            key: 0,
            value: 0,
            end: 0,
            removed: false,
        }
    }

    /// The key of the current record.
    pub(super) fn key(&self) -> &[u8] {
        &self.buffer[self.key..self.value]
    }

    /// The value of the current record; `None` if it removes.
    pub(super) fn value(&self) -> Option<&[u8]> {
        (!self.removed).then(|| &self.buffer[self.value..self.end])
    }

    /// Goes to the next record; false behind the last one, once the whole run has proved intact.
    pub(super) fn advance(&mut self) -> Result<bool, CheckpointError> {
        if self.end == self.buffer.len() && self.next_block == self.run.blocks {
            if self.checksum != self.run.checksum || self.records != self.run.records {
                return Err(self.corrupt("its blocks are not those that the root names"));
            }
            return Ok(false);
        }
        self.fill(LENGTHS_BYTES)?;
        let lengths = &self.buffer[self.end..self.end + LENGTHS_BYTES];
        let key_bytes = u32::from_le_bytes([lengths[0], lengths[1], lengths[2], lengths[3]]);
        let value_bytes = u32::from_le_bytes([lengths[4], lengths[5], lengths[6], lengths[7]]);
        self.removed = value_bytes == REMOVED;
        let key_bytes = key_bytes as usize;
        let value_bytes = if self.removed { 0 } else { value_bytes as usize };
        if key_bytes > KEY_BYTES_MAX || value_bytes > VALUE_BYTES_MAX {
            return Err(self.corrupt("a record is too long"));
        }
        self.fill(LENGTHS_BYTES + key_bytes + value_bytes)?;
        self.key = self.end + LENGTHS_BYTES;
        self.value = self.key + key_bytes;
        self.end = self.value + value_bytes;
        self.records += 1;
        Ok(true)
    }

    /// Reads blocks until `bytes` more are in the buffer behind the current record.
    fn fill(&mut self, bytes: usize) -> Result<(), CheckpointError> {
        while self.buffer.len() - self.end < bytes {
            if self.next_block == self.run.blocks {
                return Err(self.corrupt("it ends within a record"));
            }
            self.buffer.drain(..self.end);
            self.end = 0;
            self.read_block()?;
        }
        Ok(())
    }

    fn read_block(&mut self) -> Result<(), CheckpointError> {
        let block = self.next_block;
        let start = self.buffer.len();
        if !self.store.read(&block_key(self.run.id, block), &mut self.buffer)? {
            return Err(self.corrupt(&format!("block {block} is missing")));
        }
        let Some((checksum, payload)) = self.buffer[start..].split_first_chunk::<CHECKSUM_BYTES>()
        else {
            return Err(self.corrupt(&format!("block {block} is cut short")));
        };
        let checksum = u64::from_le_bytes(*checksum);
        if checksum != block_checksum(self.run.id, block, payload) {
            return Err(self.corrupt(&format!("block {block} does not match its checksum")));
        }
        self.buffer.drain(start..start + CHECKSUM_BYTES);
        self.checksum = chain_checksum(self.checksum, checksum);
        self.next_block += 1;
        Ok(())
    }

    fn corrupt(&self, what: &str) -> CheckpointError {
        CheckpointError::Corrupt { reason: format!("run {}: {what}", self.run.id) }
    }
}

/// Receives key and value; `None` removes the key.
pub(super) type MergeSink<'a> = dyn FnMut(&[u8], Option<&[u8]>) -> Result<(), CheckpointError> + 'a;

/// Several runs read as one: in the order of their keys, of each key the newest record only.
///
/// - `order` is a binary heap of the readers that are not at their end; a parent's (key, age)
///   comes before its children's, where of equal keys the newer run comes first.
pub(super) struct Merge {
    /// Oldest first.
    readers: Vec<RunReader>,
    order: Vec<usize>,
    /// The key given last: older records of it are skipped.
    last: Vec<u8>,
    started: bool,
}

impl Merge {
    /// `runs` are given oldest first.
    pub(super) fn new(
        store: &Arc<dyn BlockStore>,
        runs: &[Arc<Run>],
    ) -> Result<Self, CheckpointError> {
        let mut readers = Vec::with_capacity(runs.len());
        let mut order = Vec::with_capacity(runs.len());
        for run in runs {
            let mut reader = RunReader::new(store.clone(), run.clone());
            if reader.advance()? {
                order.push(readers.len());
            }
            readers.push(reader);
        }
        let mut merge = Self { readers, order, last: Vec::new(), started: false };
        for position in (0..merge.order.len() / 2).rev() {
            merge.sink(position);
        }
        Ok(merge)
    }

    /// Hands the next key's newest record to `record`, and returns how many bytes it and its
    /// older records have; `None` at the end.
    pub(super) fn step(
        &mut self,
        record: &mut MergeSink<'_>,
    ) -> Result<Option<u64>, CheckpointError> {
        let Some(&newest) = self.order.first() else { return Ok(None) };
        let reader = &self.readers[newest];
        if self.started && reader.key() < self.last.as_slice() {
            return Err(reader.corrupt("its records are not in order"));
        }
        record(reader.key(), reader.value())?;
        self.started = true;
        self.last.clear();
        self.last.extend_from_slice(reader.key());
        let mut passed = 0;
        while let Some(&top) = self.order.first() {
            let reader = &mut self.readers[top];
            if reader.key() != self.last.as_slice() {
                break;
            }
            passed += (LENGTHS_BYTES + reader.end - reader.key) as u64;
            if !reader.advance()? {
                self.order.swap_remove(0);
            }
            self.sink(0);
        }
        Ok(Some(passed))
    }

    /// Restores the order below `position`.
    fn sink(&mut self, mut position: usize) {
        loop {
            let mut first = position;
            for child in [2 * position + 1, 2 * position + 2] {
                if child < self.order.len() && self.precedes(child, first) {
                    first = child;
                }
            }
            if first == position {
                return;
            }
            self.order.swap(position, first);
            position = first;
        }
    }

    fn precedes(&self, left: usize, right: usize) -> bool {
        let (left, right) = (self.order[left], self.order[right]);
        match self.readers[left].key().cmp(self.readers[right].key()) {
            std::cmp::Ordering::Less => true,
            std::cmp::Ordering::Equal => left > right,
            std::cmp::Ordering::Greater => false,
        }
    }
}
