//! A store in memory whose power can be cut at any call, for tests.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use super::block::{BlockStore, StoreError};

/// Where the generation noted last is kept: outside of what [`BlockStore::keys`] is asked for.
const ACKNOWLEDGED: &[u8] = b"acknowledged";

/// What a disk holds.
pub(super) type Disk = BTreeMap<Vec<u8>, Vec<u8>>;

/// SplitMix64: small, seeded, and the same everywhere.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

#[derive(Default)]
struct Inner {
    /// What a power cut leaves for sure.
    durable: Disk,
    /// What has been written since the last sync, in order.
    pending: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    /// What reads see.
    current: Disk,
    /// Writes, removes and syncs so far.
    calls: u64,
    /// The call at which the power fails.
    cut: Option<u64>,
}

/// A [`BlockStore`] in memory.
#[derive(Default)]
pub(super) struct FaultyStore(Mutex<Inner>);

impl FaultyStore {
    pub(super) fn new(disk: Disk, cut: Option<u64>) -> Self {
        let (durable, current) = (disk.clone(), disk);
        Self(Mutex::new(Inner { durable, current, cut, ..Inner::default() }))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    pub(super) fn calls(&self) -> u64 {
        self.inner().calls
    }

    /// What the next start finds: of the writes that were not synced none, all, the first so many,
    /// or any of them. Of several writes to one key a later one can be lost, an earlier one kept.
    pub(super) fn after_power_cut(&self, random: &mut Random) -> Disk {
        let inner = self.inner();
        let mut disk = inner.durable.clone();
        let kind = random.below(4);
        let first = random.below(inner.pending.len() as u64 + 1);
        for (position, (key, value)) in inner.pending.iter().enumerate() {
            let kept = match kind {
                0 => false,
                1 => true,
                2 => (position as u64) < first,
                _ => random.below(2) == 0,
            };
            if kept {
                apply(&mut disk, key, value.as_deref());
            }
        }
        disk
    }

    pub(super) fn current(&self) -> Disk {
        self.inner().current.clone()
    }

    fn call(&self) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let mut inner = self.inner();
        if inner.cut.is_some_and(|cut| inner.calls >= cut) {
            return Err(StoreError::new("call the faulty store", "the power is cut"));
        }
        inner.calls += 1;
        Ok(inner)
    }

    fn write(&self, key: &[u8], value: Option<&[u8]>) -> Result<(), StoreError> {
        let mut inner = self.call()?;
        inner.pending.push((key.to_vec(), value.map(<[u8]>::to_vec)));
        apply(&mut inner.current, key, value);
        // The call at which the power fails may still have done its work.
        match inner.cut {
            Some(cut) if inner.calls == cut => {
                Err(StoreError::new("write", "the power is cut at this call"))
            }
            _ => Ok(()),
        }
    }
}

fn apply(disk: &mut Disk, key: &[u8], value: Option<&[u8]>) {
    match value {
        Some(value) => disk.insert(key.to_vec(), value.to_vec()),
        None => disk.remove(key),
    };
}

impl BlockStore for FaultyStore {
    fn read(&self, key: &[u8], into: &mut Vec<u8>) -> Result<bool, StoreError> {
        let inner = self.inner();
        let value = inner.current.get(key);
        into.extend_from_slice(value.map_or(&[], Vec::as_slice));
        Ok(value.is_some())
    }

    fn insert(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.write(key, Some(value))
    }

    fn remove(&self, key: &[u8]) -> Result<(), StoreError> {
        self.write(key, None)
    }

    fn keys(&self, range: Range<&[u8]>, limit: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        let range = range.start.to_vec()..range.end.to_vec();
        Ok(self.inner().current.range(range).map(|(key, _)| key.clone()).take(limit).collect())
    }

    fn sync(&self) -> Result<(), StoreError> {
        let mut inner = self.call()?;
        if inner.cut == Some(inner.calls) {
            return Err(StoreError::new("sync", "the power is cut in its midst"));
        }
        let pending = std::mem::take(&mut inner.pending);
        for (key, value) in pending {
            apply(&mut inner.durable, &key, value.as_deref());
        }
        Ok(())
    }

    fn acknowledge(&self, generation: u64) -> Result<(), StoreError> {
        let mut inner = self.call()?;
        let cut = inner.cut == Some(inner.calls);
        // Like any file that is renamed into place: it holds the old or the new contents.
        if !cut || generation.is_multiple_of(2) {
            let bytes = generation.to_be_bytes();
            apply(&mut inner.durable, ACKNOWLEDGED, Some(&bytes));
            apply(&mut inner.current, ACKNOWLEDGED, Some(&bytes));
        }
        if cut { Err(StoreError::new("acknowledge", "the power is cut")) } else { Ok(()) }
    }

    fn acknowledged(&self) -> Result<u64, StoreError> {
        let inner = self.inner();
        let bytes = inner.current.get(ACKNOWLEDGED).and_then(|bytes| bytes.first_chunk::<8>());
        Ok(bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes)))
    }

    fn disk_bytes(&self) -> u64 {
        self.inner().current.values().map(|value| value.len() as u64).sum()
    }
}
