//! What the next checkpoint has to write: the records that have changed since the last one.
//!
//! It grows to hundreds of thousands of records under load, and a table that grows moves all that
//! is in it: fifty milliseconds in which no entry is applied. So it is cut by hash into many small
//! tables, each of which grows by itself.

use std::hash::BuildHasher as _;

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

use crate::state::{Change, Record, RecordKey};

/// Tables; with a million records each has as many as can be moved in a tenth of a millisecond.
const PARTS: usize = 512;

struct Dirty {
    key: RecordKey,
    /// As it is now; `None` if it is gone.
    after: Option<Record>,
    /// Whether there was no such record at the last take, and so there is none in any checkpoint.
    created: bool,
}

/// Changed records, each as it is now.
pub(crate) struct DirtyMap {
    parts: Vec<HashTable<Dirty>>,
    hasher: DefaultHashBuilder,
    len: usize,
}

impl Default for DirtyMap {
    fn default() -> Self {
        let parts = std::iter::repeat_with(HashTable::new).take(PARTS).collect();
        Self { parts, hasher: DefaultHashBuilder::default(), len: 0 }
    }
}

impl DirtyMap {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Takes note of a change. What came and went between two takes leaves nothing to write: a
    /// lock that is acquired and released a thousand times a second has a record under a new key
    /// each time.
    pub(crate) fn note(&mut self, change: Change) {
        let hash = self.hasher.hash_one(&change.key);
        // A table goes by the lowest and the highest bits.
        let part = &mut self.parts[(hash >> 40) as usize % PARTS];
        let is_it = |dirty: &Dirty| dirty.key == change.key;
        match part.entry(hash, is_it, |dirty| self.hasher.hash_one(&dirty.key)) {
            Entry::Vacant(entry) => {
                let created = change.before.is_none();
                entry.insert(Dirty { key: change.key, after: change.after, created });
                self.len += 1;
            }
            Entry::Occupied(entry) if entry.get().created && change.after.is_none() => {
                entry.remove();
                self.len -= 1;
            }
            Entry::Occupied(mut entry) => entry.get_mut().after = change.after,
        }
    }

    /// All of them: the record as it is now, or `None` if it is gone.
    pub(crate) fn into_records(self) -> impl Iterator<Item = (RecordKey, Option<Record>)> {
        self.parts.into_iter().flatten().map(|dirty| (dirty.key, dirty.after))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use super::*;
    use crate::state::{self, Cause, Digest, Namespace, Revision, SessionKey, State};

    fn key(number: u64) -> RecordKey {
        let namespace = Namespace(Arc::from("n"));
        let digest = Digest(u128::from(number).to_le_bytes());
        RecordKey::Tombstone(SessionKey { namespace, digest })
    }

    fn change(record: &Record, number: u64, before: bool, after: bool) -> Change {
        Change {
            revision: Revision(1),
            key: key(number),
            before: before.then(|| record.clone()),
            after: after.then(|| record.clone()),
            cause: Cause::Updated,
        }
    }

    #[test]
    fn what_came_and_went_is_not_written() {
        let record = some_record();
        let mut dirty = DirtyMap::default();
        // Created and gone; created, gone and created; there before and gone; there and created
        // anew.
        let history: [&[(bool, bool)]; 4] = [
            &[(false, true), (true, true), (true, false)],
            &[(false, true), (true, false), (false, true)],
            &[(true, true), (true, false)],
            &[(true, false), (false, true)],
        ];
        for (number, steps) in (0..).zip(history) {
            for (before, after) in steps {
                dirty.note(change(&record, number, *before, *after));
            }
        }
        assert_eq!(dirty.len(), 3);
        let written: HashMap<_, _> =
            dirty.into_records().map(|(key, after)| (key, after.is_some())).collect();
        let written = |number| written.get(&key(number)).copied();
        assert_eq!([0, 1, 2, 3].map(written), [None, Some(true), Some(false), Some(true)]);
    }

    #[test]
    fn many_are_all_there_and_spread() {
        const COUNT: u64 = 100_000;
        let record = some_record();
        let mut dirty = DirtyMap::default();
        for number in 0..COUNT {
            dirty.note(change(&record, number, true, number % 2 == 0));
        }
        for number in 0..COUNT {
            dirty.note(change(&record, number, true, number % 3 == 0));
        }
        assert_eq!(dirty.len(), COUNT as usize);
        let largest = dirty.parts.iter().map(HashTable::len).max().unwrap();
        assert!(largest < 2 * COUNT as usize / PARTS, "{largest}");
        let found: HashMap<_, _> = dirty.into_records().collect();
        for number in 0..COUNT {
            assert_eq!(found[&key(number)].is_some(), number % 3 == 0, "{number}");
        }
    }

    /// Any record: what is in it does not matter here.
    fn some_record() -> Record {
        let mut state = State::new();
        let mut changes = Vec::new();
        let namespace = Namespace(Arc::from("n"));
        let request =
            state::Request { id: 1, first_sent: Default::default(), expires: Default::default() };
        let command = state::Command::CreateSession {
            request,
            key: SessionKey { namespace, digest: Digest([0; 16]) },
            principal: None,
            attributes: Vec::new(),
            idle_timeout: None,
            absolute_timeout: None,
        };
        state.apply(&command, false, &mut changes);
        changes.pop().and_then(|change| change.after).unwrap()
    }
}
