//! The tests' own randomness: one seed, printed, decides every choice.

use std::ops::Range;

/// SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// Seeded by `QUORATE_TEST_SEED`, or else freshly; says which, for who reads of a failure.
    pub(crate) fn for_test(name: &str) -> (Self, u64) {
        let seed = match std::env::var("QUORATE_TEST_SEED") {
            Ok(text) => text.parse().expect("QUORATE_TEST_SEED is a number"),
            Err(_) => u64::from(getrandom::u32().unwrap()),
        };
        println!("{name}: QUORATE_TEST_SEED={seed}");
        (Self(seed), seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number of the range, which is not empty.
    pub(crate) fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// One of them; there is at least one.
    pub(crate) fn choose<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let index = self.within(0..items.len() as u64);
        &items[usize::try_from(index).unwrap()]
    }

    /// A generator of its own, for a task.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }
}

/// A size of a test: the one given, unless the environment has another.
pub(crate) fn size(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable} is a number")),
        Err(_) => default,
    }
}
