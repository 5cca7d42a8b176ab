//! The log in memory: where each record lies on disk, and the newest of them themselves.
//!
//! Invariants:
//! - Records `first .. next` are held. `located` covers a prefix of them, `cache` a suffix, and
//!   there is no gap between: what has no place on disk yet is always in the cache.
//! - `located` costs 16 bytes a record; the cache is bounded by bytes, but for records that are
//!   not on disk yet.

use std::collections::VecDeque;
use std::ops::Range;

use super::WalRecord;

/// What a cached record costs beside its own bytes, roughly: two `Bytes` and their counters.
const CACHED_OVERHEAD_BYTES: usize = 128;

/// Where a record lies. `bytes` and `header_bytes` share a word; a batch is below 16 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) segment: u32,
    pub(super) offset: u32,
    pub(super) checksum: u32,
    lengths: u32,
}

impl Location {
    pub(super) fn new(
        segment: u32,
        offset: u32,
        checksum: u32,
        header_bytes: u8,
        bytes: u32,
    ) -> Location {
        assert!(bytes < 1 << 24 && u32::from(header_bytes) <= bytes);
        Location { segment, offset, checksum, lengths: u32::from(header_bytes) << 24 | bytes }
    }

    /// Bytes of header and payload.
    pub(super) fn bytes(&self) -> usize {
        (self.lengths & 0x00ff_ffff) as usize
    }

    /// Bytes of the header.
    pub(super) fn header_bytes(&self) -> usize {
        (self.lengths >> 24) as usize
    }
}

struct Cached {
    record: WalRecord,
    /// Number of the call that appended it, which tells it from one that had its index before.
    appended_by: u64,
}

/// What a read finds: places first, then records.
#[derive(Default)]
pub(super) struct Found {
    pub(super) located: Vec<Location>,
    pub(super) cached: Vec<WalRecord>,
}

/// See the module.
pub(super) struct Log {
    /// Unknown until a record or a purge says where the log begins.
    first: Option<u64>,
    located: VecDeque<Location>,
    cache: VecDeque<Cached>,
    /// Index of the front of `cache`; of the next record if that is empty.
    cache_first: u64,
    cache_bytes: usize,
    cache_bytes_max: usize,
}

impl Log {
    /// An empty log.
    pub(super) fn new(cache_bytes_max: usize) -> Log {
        Log {
            first: None,
            located: VecDeque::new(),
            cache: VecDeque::new(),
            cache_first: 0,
            cache_bytes: 0,
            cache_bytes_max,
        }
    }

    /// Index of the next record, once the log has begun.
    pub(super) fn next(&self) -> Option<u64> {
        self.first.map(|_| self.cache_first + self.cache.len() as u64)
    }

    /// Index of the first record held, or of the next if none is.
    pub(super) fn first(&self) -> Option<u64> {
        self.first
    }

    /// Index of the last record held.
    pub(super) fn last(&self) -> Option<u64> {
        let (first, next) = (self.first?, self.next()?);
        (first < next).then(|| next - 1)
    }

    /// Place of a record that is on disk.
    pub(super) fn location(&self, index: u64) -> Option<Location> {
        let position = index.checked_sub(self.first?)?;
        self.located.get(usize::try_from(position).ok()?).copied()
    }

    /// Says where an empty log begins.
    pub(super) fn begin(&mut self, index: u64) {
        assert!(self.cache.is_empty() && self.located.is_empty());
        self.first = Some(index);
        self.cache_first = index;
    }

    /// Adds a record that is not on disk yet.
    pub(super) fn append(&mut self, index: u64, record: WalRecord, appended_by: u64) {
        if self.first.is_none() {
            self.begin(index);
        }
        assert_eq!(self.next(), Some(index));
        self.cache_bytes += cost(&record);
        self.cache.push_back(Cached { record, appended_by });
    }

    /// Adds a record that recovery found on disk; it is not cached.
    pub(super) fn append_located(&mut self, index: u64, location: Location) {
        if self.first.is_none() {
            self.begin(index);
        }
        assert!(self.next() == Some(index) && self.cache.is_empty());
        self.located.push_back(location);
        self.cache_first += 1;
    }

    /// Notes where a record was written, unless it has been dropped or replaced since.
    pub(super) fn locate(&mut self, index: u64, appended_by: u64, location: Location) {
        let Some(first) = self.first else { return };
        let Some(position) = index.checked_sub(self.cache_first) else { return };
        match self.cache.get(position as usize) {
            Some(cached) if cached.appended_by == appended_by => {
                assert_eq!(index, first + self.located.len() as u64, "written out of order");
                self.located.push_back(location);
            }
            _ => {}
        }
    }

    /// Lets go of the oldest cached records that are on disk, as far as the bound asks for it.
    pub(super) fn evict(&mut self) {
        let Some(first) = self.first else { return };
        let located_end = first + self.located.len() as u64;
        while self.cache_bytes > self.cache_bytes_max && self.cache_first < located_end {
            self.drop_oldest_cached();
        }
    }

    /// Drops records from `index` on. From before the first, as recovery may meet it where older
    /// segments are gone, the log goes on at `index`.
    pub(super) fn truncate_from(&mut self, index: u64) {
        let (Some(first), Some(next)) = (self.first, self.next()) else { return };
        if index >= next {
            return;
        }
        let first = first.min(index);
        self.first = Some(first);
        self.located.truncate((index - first) as usize);
        while self.cache_first + self.cache.len() as u64 > index {
            match self.cache.pop_back() {
                Some(cached) => self.cache_bytes -= cost(&cached.record),
                None => self.cache_first = index,
            }
        }
    }

    /// Drops records up to and including `index`; the log goes on behind it even if it ended
    /// before.
    pub(super) fn purge_to(&mut self, index: u64) {
        let begin = index + 1;
        let (Some(first), Some(next)) = (self.first, self.next()) else {
            return self.begin(begin);
        };
        if begin <= first {
            return;
        }
        let located = (begin - first).min(self.located.len() as u64);
        self.located.drain(..located as usize);
        while !self.cache.is_empty() && self.cache_first < begin {
            self.drop_oldest_cached();
        }
        self.first = Some(begin);
        if begin >= next {
            self.cache_first = begin;
        }
    }

    /// Finds records of `range`, as far as they are held, in order: at least one if there is one,
    /// then as many as stay within `bytes_max`.
    pub(super) fn find(&self, range: Range<u64>, bytes_max: usize) -> Found {
        let mut found = Found::default();
        let (Some(first), Some(next)) = (self.first, self.next()) else { return found };
        let mut bytes_left = bytes_max;
        let mut nothing_yet = true;
        for index in range.start.max(first)..range.end.min(next) {
            let cached = index.checked_sub(self.cache_first);
            let cached = cached.map(|position| &self.cache[position as usize].record);
            let bytes = match cached {
                Some(record) => record.bytes(),
                None => self.located[(index - first) as usize].bytes(),
            };
            if bytes > bytes_left && !nothing_yet {
                break;
            }
            bytes_left = bytes_left.saturating_sub(bytes);
            nothing_yet = false;
            match cached {
                Some(record) => found.cached.push(record.clone()),
                None => found.located.push(self.located[(index - first) as usize]),
            }
        }
        found
    }

    fn drop_oldest_cached(&mut self) {
        if let Some(cached) = self.cache.pop_front() {
            self.cache_bytes -= cost(&cached.record);
            self.cache_first += 1;
        }
    }
}

fn cost(record: &WalRecord) -> usize {
    record.bytes() + CACHED_OVERHEAD_BYTES
}
