//! The table of a namespace's sessions: found by digest in one or two steps, listed in its order.
//!
//! Digests are as good as random, so their first bits say where a session is, as in a hash table,
//! and yet neighbours in a list are neighbours in memory. Buckets are short sorted runs. There are
//! about an eighth as many as sessions; they are split and merged one at a time, in the order of
//! linear hashing (Litwin, VLDB 1980), so no insertion moves the sessions of more than one of them.
//! (Now and then the vector of buckets doubles: three megabytes are copied at a million sessions.)
//! A B-tree of a million sessions takes five dependent cache misses to walk down, which was a fifth
//! of all that a node did for an update.
//!
//! Linear hashing numbers buckets by the lowest bits of a hash. Here they are those of the digest
//! read backwards, so what shares a bucket shares its first bits, and a split cuts a run in two.
//!
//! Whoever chooses ids can make a bucket long, if he finds ids whose SHA-256 begin alike: among a
//! million sessions each takes some 2^17 hashes. The search in a bucket is binary, but an insertion
//! moves what is behind it: 40 µs at 200,000 sessions in one bucket.

use std::slice;
use std::sync::Arc;

use super::command::Digest;
use super::session::Session;

/// Sessions that a bucket holds on average, at most: an entry is 24 bytes, so mostly three or four
/// cache lines, of which a search looks at two.
const LOAD: usize = 8;
/// Buckets grow by so many entries, as doubling would waste a quarter of them; long ones by more.
const GROWTH: usize = 4;
/// Bytes of a session that are fetched ahead: what most sessions have, and not the cache's worth of
/// a large one that may not even be read.
const FETCH_BYTES_MAX: usize = 2048;

type Entry = (Digest, Arc<Session>);

/// The sessions of one namespace, ordered by digest.
///
/// - There is at least one bucket. With n of them and 2^k the highest power of two up to n, the
///   bucket of a digest is the number in its first k + 1 bits read backwards, or in its first k
///   where that is n or more.
/// - A bucket is ordered by digest.
/// - At most `LOAD` sessions for each bucket and, unless there is just one, at least `LOAD / 2`.
#[derive(Debug)]
pub(super) struct SessionTable {
    buckets: Vec<Vec<Entry>>,
    length: usize,
}

impl Default for SessionTable {
    fn default() -> Self {
        Self { buckets: vec![Vec::new()], length: 0 }
    }
}

impl SessionTable {
    /// Of sessions that are ordered by digest, without repetitions.
    pub(super) fn build(sessions: Vec<Entry>) -> Self {
        let length = sessions.len();
        let mut table = Self { buckets: Vec::new(), length };
        table.buckets.resize_with(length.div_ceil(LOAD).max(1), || Vec::with_capacity(LOAD));
        for (digest, session) in sessions {
            let bucket = table.bucket_of(&digest);
            table.buckets[bucket].push((digest, session));
        }
        table.buckets.iter_mut().for_each(Vec::shrink_to_fit);
        table
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub(super) fn get(&self, digest: &Digest) -> Option<&Arc<Session>> {
        let bucket = &self.buckets[self.bucket_of(digest)];
        position(bucket, digest).ok().map(|position| &bucket[position].1)
    }

    /// Puts a session in the place of what was there. Returns what was there.
    pub(super) fn insert(&mut self, digest: Digest, session: Arc<Session>) -> Option<Arc<Session>> {
        let bucket = self.bucket_of(&digest);
        let bucket = &mut self.buckets[bucket];
        match position(bucket, &digest) {
            Ok(position) => Some(std::mem::replace(&mut bucket[position].1, session)),
            Err(position) => {
                if bucket.len() == bucket.capacity() {
                    bucket.reserve_exact(GROWTH.max(bucket.len() / 4));
                }
                bucket.insert(position, (digest, session));
                self.length += 1;
                if self.length > LOAD * self.buckets.len() {
                    self.split();
                }
                None
            }
        }
    }

    pub(super) fn remove(&mut self, digest: &Digest) -> Option<Arc<Session>> {
        let bucket = self.bucket_of(digest);
        let bucket = &mut self.buckets[bucket];
        let position = position(bucket, digest).ok()?;
        let (_, session) = bucket.remove(position);
        self.length -= 1;
        if self.buckets.len() > 1 && self.length < LOAD / 2 * self.buckets.len() {
            self.merge();
        }
        Some(session)
    }

    /// Those behind `after`, or all, in order.
    pub(super) fn range(&self, after: Option<Digest>) -> Range<'_> {
        let mut range = Range { table: self, prefix: 0, entries: [].iter() };
        if let Some(after) = after {
            range.prefix = first_bits(&after, self.depth() + 1);
            let bucket = range.next_bucket().expect("the prefix of a digest has a bucket");
            range.entries = bucket[bucket.partition_point(|(digest, _)| *digest <= after)..].iter();
        }
        range
    }

    /// Has the processor fetch the sessions of many keys into its caches at once: looked up one by
    /// one, each would wait for several accesses to memory, one after the other.
    pub(super) fn fetch(&self, digests: &[Digest]) {
        let mut seen = 0;
        for digest in digests {
            seen += self.buckets[self.bucket_of(digest)].len();
        }
        for digest in digests {
            let first = self.buckets[self.bucket_of(digest)].first();
            seen += first.map_or(0, |(digest, _)| usize::from(digest.0[0]));
        }
        let sessions: Vec<&Arc<Session>> =
            digests.iter().filter_map(|digest| self.get(digest)).collect();
        for session in &sessions {
            seen += session.body().len();
        }
        for session in &sessions {
            // A byte of each cache line.
            let ahead = session.body().iter().take(FETCH_BYTES_MAX).step_by(64);
            seen += ahead.map(|byte| usize::from(*byte)).sum::<usize>();
        }
        std::hint::black_box(seen);
    }

    /// The number of bits that all buckets' digests share.
    fn depth(&self) -> u32 {
        self.buckets.len().ilog2()
    }

    fn bucket_of(&self, digest: &Digest) -> usize {
        self.bucket_at(first_bits(digest, self.depth() + 1))
    }

    /// The bucket of the digests that begin with `prefix`, of `depth` + 1 bits.
    fn bucket_at(&self, prefix: u64) -> usize {
        let bits = self.depth() + 1;
        let bucket = (prefix.reverse_bits() >> (u64::BITS - bits)) as usize;
        if bucket < self.buckets.len() { bucket } else { bucket & !(1 << (bits - 1)) }
    }

    /// Cuts the next bucket in two.
    fn split(&mut self) {
        let depth = self.depth();
        let count = self.buckets.len();
        let low = &mut self.buckets[count - (1 << depth)];
        let middle =
            low.partition_point(|(digest, _)| first_bits(digest, depth + 1).is_multiple_of(2));
        let mut high = Vec::with_capacity(low.len() - middle + GROWTH / 2);
        high.extend(low.drain(middle..));
        low.shrink_to(middle + GROWTH / 2);
        self.buckets.push(high);
    }

    /// Joins the bucket that was split last.
    fn merge(&mut self) {
        let high = self.buckets.pop().expect("there is more than one bucket");
        let count = self.buckets.len();
        let low = &mut self.buckets[count - (1 << count.ilog2())];
        low.reserve_exact(high.len());
        low.extend(high);
        if self.buckets.capacity() > 4 * count {
            self.buckets.shrink_to(2 * count);
        }
    }
}

/// The first 1 to 63 bits of a digest.
fn first_bits(digest: &Digest, bits: u32) -> u64 {
    let (first, _) = digest.0.split_first_chunk().expect("a digest has 16 bytes");
    u64::from_be_bytes(*first) >> (u64::BITS - bits)
}

/// Where a digest is in a bucket, or belongs.
fn position(bucket: &[Entry], digest: &Digest) -> Result<usize, usize> {
    let wanted = u128::from_be_bytes(digest.0);
    bucket.binary_search_by(|(digest, _)| u128::from_be_bytes(digest.0).cmp(&wanted))
}

/// Sessions of a table, in order of their digests.
#[derive(Clone, Debug)]
pub(super) struct Range<'a> {
    table: &'a SessionTable,
    /// That of the next bucket, of `depth` + 1 bits.
    prefix: u64,
    entries: slice::Iter<'a, Entry>,
}

impl<'a> Range<'a> {
    fn next_bucket(&mut self) -> Option<&'a [Entry]> {
        let bits = self.table.depth() + 1;
        if self.prefix >> bits > 0 {
            return None;
        }
        let bucket = self.table.bucket_at(self.prefix);
        // The bucket of a prefix that is one bit shorter stands for two of them.
        let twin = self.table.bucket_at(self.prefix ^ 1);
        self.prefix = if twin == bucket { (self.prefix | 1) + 1 } else { self.prefix + 1 };
        Some(&self.table.buckets[bucket])
    }
}

impl<'a> Iterator for Range<'a> {
    type Item = (&'a Digest, &'a Arc<Session>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((digest, session)) = self.entries.next() {
                return Some((digest, session));
            }
            self.entries = self.next_bucket()?.iter();
        }
    }
}

#[cfg(test)]
impl SessionTable {
    /// Compares what is stored with what is said of it above.
    pub(super) fn check(&self) {
        let mut length = 0;
        for (number, bucket) in self.buckets.iter().enumerate() {
            assert!(bucket.is_sorted_by(|a, b| a.0 < b.0), "bucket {number}");
            assert!(bucket.iter().all(|(digest, _)| self.bucket_of(digest) == number));
            length += bucket.len();
        }
        assert_eq!(self.length, length);
        assert!(length <= LOAD * self.buckets.len());
        assert!(self.buckets.len() == 1 || length >= LOAD / 2 * self.buckets.len());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::ops::Bound;

    use proptest::prelude::*;

    use super::super::command::{Namespace, Revision, SessionKey};
    use super::*;

    /// Digests that differ in their first bits, and some that hardly do.
    fn some_digest() -> impl Strategy<Value = Digest> {
        let even = any::<[u8; 16]>();
        let alike = (0..4u8, 0..4u8).prop_map(|(first, last)| {
            let mut bytes = [0xa5; 16];
            bytes[2] = first;
            bytes[15] = last;
            bytes
        });
        prop_oneof![4 => even, 1 => alike].prop_map(Digest)
    }

    fn session(digest: Digest, version: u64) -> Arc<Session> {
        let key = SessionKey { namespace: Namespace(Arc::from("n")), digest };
        Arc::new(Session::new(&key, Revision(version), None, vec![0; 200].into()))
    }

    fn versions<'a>(
        sessions: impl Iterator<Item = (&'a Digest, &'a Arc<Session>)>,
    ) -> Vec<(Digest, u64)> {
        sessions.map(|(digest, session)| (*digest, session.version().0)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn it_is_an_ordered_map(
            steps in prop::collection::vec((some_digest(), 0..3u8), 0..600),
            starts in prop::collection::vec(some_digest(), 4),
        ) {
            let (mut table, mut model) = (SessionTable::default(), BTreeMap::new());
            // First it grows, then it shrinks.
            let growing = steps.iter().map(|(digest, kind)| (*digest, *kind > 0));
            let shrinking = steps.iter().map(|(digest, kind)| (*digest, *kind > 1));
            for (step, (digest, insert)) in growing.chain(shrinking).enumerate() {
                let (before, expected) = if insert {
                    let session = session(digest, step as u64);
                    (table.insert(digest, session.clone()), model.insert(digest, session))
                } else {
                    (table.remove(&digest), model.remove(&digest))
                };
                prop_assert_eq!(before, expected);
                table.check();
                prop_assert_eq!(table.get(&digest), model.get(&digest));
                prop_assert_eq!(table.is_empty(), model.is_empty());
            }
            prop_assert_eq!(versions(table.range(None)), versions(model.iter()));
            for start in starts.iter().chain(model.keys().take(9)) {
                let behind = model.range((Bound::Excluded(*start), Bound::Unbounded));
                prop_assert_eq!(versions(table.range(Some(*start))), versions(behind));
            }
            let digests: Vec<Digest> = model.keys().chain(&starts).copied().collect();
            table.fetch(&digests);

            let sessions = model.iter().map(|(digest, session)| (*digest, session.clone()));
            let built = SessionTable::build(sessions.collect());
            built.check();
            prop_assert_eq!(versions(built.range(None)), versions(model.iter()));

            // All the way down, in the order in which they came.
            let mut seen = BTreeSet::new();
            for (digest, _) in steps.iter().filter(|(digest, _)| seen.insert(*digest)) {
                prop_assert_eq!(table.remove(digest), model.remove(digest));
                table.check();
                prop_assert_eq!(versions(table.range(None)), versions(model.iter()));
            }
            prop_assert_eq!((table.length, table.buckets.len()), (0, 1));
        }
    }
}
