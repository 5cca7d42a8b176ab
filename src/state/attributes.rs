//! A session's attributes, packed one behind the other.
//!
//! A million sessions have a million attributes or more. A map of strings would cost several
//! allocations and some 150 bytes for each, so all of a session's attributes share one run of
//! bytes: length, name, length, value, ordered by name. Reading one walks the run, at most
//! `SESSION_ATTRIBUTES_MAX` steps; reading several walks it once, beside their names; an update
//! merges old and new in one pass.

use std::cmp::Ordering;
use std::fmt;

use super::command::Attribute;
use super::packing::{Reader, put_bytes};

/// The attributes of a session, ordered by name: an iterator over names and values.
#[derive(Clone, Copy)]
pub struct Attributes<'a> {
    packed: Reader<'a>,
}

impl<'a> Attributes<'a> {
    pub(super) fn new(packed: Reader<'a>) -> Self {
        Self { packed }
    }

    /// The value of the attribute called `name`.
    pub fn find(self, name: &str) -> Option<&'a [u8]> {
        let mut rest = self.skip_while(|(other, _)| *other < name);
        rest.next().filter(|(other, _)| *other == name).map(|(_, value)| value)
    }

    /// Those of `names` that there are. The names have to be ordered, without repetitions.
    pub fn named<'n>(self, names: &'n [String]) -> impl Iterator<Item = (&'a str, &'a [u8])> + 'n
    where
        'a: 'n,
    {
        let mut rest = self;
        let mut names = names.iter().map(String::as_str).peekable();
        std::iter::from_fn(move || {
            while names.peek().is_some() {
                let (name, value) = rest.next()?;
                while names.next_if(|wanted| *wanted < name).is_some() {}
                if names.next_if_eq(&name).is_some() {
                    return Some((name, value));
                }
            }
            None
        })
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (&'a str, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.packed.is_empty() {
            return None;
        }
        Some((self.packed.str(), self.packed.bytes()))
    }
}

/// Names and lengths only: values are the users' and do not belong into a log.
impl fmt::Debug for Attributes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.map(|(name, value)| (name, value.len()))).finish()
    }
}

/// How many attributes, and the sum of the lengths of their names and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) count: usize,
    pub(super) bytes: usize,
}

impl Totals {
    fn add(&mut self, name: &str, value: &[u8]) {
        self.count += 1;
        self.bytes += name.len() + value.len();
    }
}

/// Whether `set` is ordered by name without repetitions, and so is `remove`, and nothing is in
/// both. Everything packed relies on it.
pub(super) fn is_well_formed(set: &[Attribute], remove: &[String]) -> bool {
    set.is_sorted_by(|a, b| a.name < b.name)
        && remove.is_sorted_by(|a, b| a < b)
        && remove.iter().all(|name| set.binary_search_by(|a| a.name.as_str().cmp(name)).is_err())
}

/// Packs `old`, with `set` set and `remove` removed, behind what is in `out`.
pub(super) fn merge(
    mut old: Attributes<'_>,
    set: &[Attribute],
    remove: &[String],
    out: &mut Vec<u8>,
) -> Totals {
    let mut totals = Totals::default();
    let mut put = |name: &str, value: &[u8]| {
        totals.add(name, value);
        put_bytes(out, name.as_bytes());
        put_bytes(out, value);
    };
    let (mut set, mut remove) = (set.iter().peekable(), remove.iter().peekable());
    let mut kept = old.next();
    loop {
        let order = match (kept, set.peek()) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((name, _)), Some(new)) => name.cmp(new.name.as_str()),
        };
        if order.is_ge()
            && let Some(new) = set.next()
        {
            put(&new.name, &new.value);
        }
        if order.is_le()
            && let Some((name, value)) = kept
        {
            while remove.next_if(|gone| gone.as_str() < name).is_some() {}
            let removed = remove.peek().is_some_and(|gone| *gone == name);
            if order.is_lt() && !removed {
                put(name, value);
            }
            kept = old.next();
        }
    }
    totals
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn packed(attributes: &BTreeMap<String, Bytes>) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, value) in attributes {
            put_bytes(&mut out, name.as_bytes());
            put_bytes(&mut out, value);
        }
        out
    }

    fn list(attributes: &BTreeMap<String, Bytes>) -> Vec<Attribute> {
        let each = |(name, value): (&String, &Bytes)| Attribute {
            name: name.clone(),
            value: value.clone(),
        };
        attributes.iter().map(each).collect()
    }

    fn some_attributes() -> impl Strategy<Value = BTreeMap<String, Bytes>> {
        let value = prop::collection::vec(any::<u8>(), 0..4).prop_map(Bytes::from);
        prop::collection::btree_map("[a-d]{1,2}", value, 0..8)
    }

    proptest! {
        #[test]
        fn merging_is_what_a_map_does(
            old in some_attributes(),
            set in some_attributes(),
            remove in prop::collection::btree_set("[a-d]{1,2}", 0..8),
        ) {
            let remove: Vec<String> =
                remove.into_iter().filter(|name| !set.contains_key(name)).collect();
            prop_assert!(is_well_formed(&list(&set), &remove));
            let mut expected = old.clone();
            expected.extend(set.clone());
            expected.retain(|name, _| !remove.contains(name));

            let before = packed(&old);
            let mut out = Vec::new();
            let before = Attributes::new(Reader::new(&before));
            let totals = merge(before, &list(&set), &remove, &mut out);
            prop_assert_eq!(&out, &packed(&expected));
            let bytes = expected.iter().map(|(name, value)| name.len() + value.len()).sum();
            prop_assert_eq!(totals, Totals { count: expected.len(), bytes });
            let merged = Attributes::new(Reader::new(&out));
            for name in ["a", "b", "ca", "dd", "zz"] {
                let value = expected.get(name).map(|value| value.as_ref());
                prop_assert_eq!(merged.find(name), value);
            }
            let wanted: Vec<String> = set.into_keys().collect();
            let named: Vec<_> = merged.named(&wanted).collect();
            let found = wanted.iter().filter_map(|name| Some((&**name, merged.find(name)?)));
            prop_assert_eq!(named, found.collect::<Vec<_>>());
        }
    }

    #[test]
    fn disorder_is_seen() {
        let attribute = |name: &str| Attribute { name: name.into(), value: Bytes::new() };
        let (a, b) = (attribute("a"), attribute("b"));
        let name = |name: &str| name.to_string();
        assert!(is_well_formed(&[a.clone(), b.clone()], &[name("c"), name("d")]));
        assert!(!is_well_formed(&[b.clone(), a.clone()], &[]));
        assert!(!is_well_formed(&[a.clone(), a.clone()], &[]));
        assert!(!is_well_formed(&[], &[name("d"), name("c")]));
        assert!(!is_well_formed(&[], &[name("c"), name("c")]));
        assert!(!is_well_formed(&[a, b], &[name("b")]));
    }
}
