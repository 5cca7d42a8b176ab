//! What a ring promises, against the definition where there is one and by counting where not.

use std::collections::BTreeMap;

use super::*;

const KEYS: u64 = 1_000_000;

/// A small seeded generator (splitmix64), so that every failure can be replayed.
struct Random(u64);

impl Random {
    /// From `QUORATE_SEED`, or the same each time.
    fn seeded() -> Self {
        let seed = std::env::var("QUORATE_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or(2026);
        println!("QUORATE_SEED={seed}");
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn weight(&mut self) -> u32 {
        let bound = [1, 3, 10, 1_000][self.below(4) as usize];
        1 + self.below(bound) as u32
    }
}

/// Few points at chosen positions, so that those of different members meet.
fn crowded(random: &mut Random) -> Circle {
    let members: Vec<Member> = (0..1 + random.below(6))
        .map(|number| Member { name: format!("{number}").into(), weight: random.weight() })
        .collect();
    let spread = [4, 40, u64::MAX][random.below(3) as usize];
    let base = random.next();
    let mut points = Vec::new();
    for owner in 0..members.len() as u16 {
        for _ in 0..1 + random.below(12) {
            points.push((base.wrapping_add(random.below(spread)), owner));
        }
    }
    Circle::with_points(members, points)
}

/// All members in the order of the definition: by cost, then by name.
fn by_definition(circle: &Circle, key: u64) -> Vec<u16> {
    let mut nearest: BTreeMap<u16, u64> = BTreeMap::new();
    for (position, owner) in circle.positions.iter().zip(&circle.owners) {
        let distance = position.wrapping_sub(key);
        nearest.entry(*owner).and_modify(|d| *d = distance.min(*d)).or_insert(distance);
    }
    let mut order: Vec<(u16, u64)> = nearest.into_iter().collect();
    order.sort_by(|(one, a), (other, b)| {
        let [v, w] = [one, other].map(|owner| u128::from(circle.weight(*owner)));
        (u128::from(*a) * w).cmp(&(u128::from(*b) * v)).then(one.cmp(other))
    });
    order.into_iter().map(|(owner, _)| owner).collect()
}

fn owners(found: Vec<Candidate>) -> Vec<u16> {
    found.into_iter().map(|found| found.owner).collect()
}

#[test]
fn lookups_keep_to_the_definition() {
    let mut random = Random::seeded();
    for _ in 0..2_000 {
        let circle = crowded(&mut random);
        for _ in 0..20 {
            let near = circle.positions[random.below(circle.positions.len() as u64) as usize];
            let key = match random.below(3) {
                0 => random.next(),
                1 => near,
                _ => near.wrapping_sub(random.below(50)),
            };
            let expected = by_definition(&circle, key);
            assert_eq!(circle.nearest(key), Some(expected[0]), "{key} on {circle:?}");
            for count in 0..=expected.len() + 1 {
                let found = owners(circle.nearest_distinct(key, count));
                let expected = &expected[..count.min(expected.len())];
                assert_eq!(found, expected, "{count} of {key} on {circle:?}");
            }
        }
    }
}

#[test]
fn a_walk_covers_the_circle_and_agrees_with_lookups() {
    let mut random = Random::seeded();
    for _ in 0..2_000 {
        let circle = crowded(&mut random);
        let mut next = u128::from(u64::MAX);
        shares::walk(&circle, |owner, served| {
            assert_eq!(u128::from(*served.end()), next, "{served:?} of {circle:?}");
            next = u128::from(*served.start()).wrapping_sub(1);
            let inside = served.start() + random.below((served.end() - served.start()).max(1));
            for position in [*served.start(), inside, *served.end()] {
                assert_eq!(circle.nearest(position), Some(owner), "{position} on {circle:?}");
            }
        });
        assert_eq!(next, u128::MAX, "the walk ends at 0: {circle:?}");
        let sum: u128 = circle.shares().iter().map(|share| share.positions).sum();
        assert_eq!(sum, POSITIONS);
    }
}

#[test]
fn with_equal_weights_it_is_the_textbook_ring() {
    let circle = Circle::new((0..20).map(|number| (format!("node-{number}"), 3))).unwrap();
    let mut random = Random::seeded();
    for _ in 0..10_000 {
        let key = random.next();
        let at = circle.positions.partition_point(|position| *position < key);
        let expected = circle.owners[at % circle.owners.len()];
        assert_eq!(circle.nearest(key), Some(expected));
    }
}

#[test]
fn the_order_of_the_members_does_not_matter_and_names_break_ties() {
    let mut members: Vec<(String, u32)> =
        (1..=9).map(|number| (format!("m{number}"), number)).collect();
    let circle = Circle::new(members.clone()).unwrap();
    members.reverse();
    members.swap(1, 5);
    let other = Circle::new(members).unwrap();
    assert_eq!(circle.members(), other.members());
    assert_eq!((circle.positions, circle.owners), (other.positions, other.owners));

    let member = |name: &str, weight| Member { name: name.into(), weight };
    let same = [member("a", 1), member("b", 1), member("c", 2)];
    // At the one position that they share, and at equal costs before it.
    let circle = Circle::with_points(same.to_vec(), vec![(50, 1), (50, 0), (60, 2)]);
    assert_eq!(owners(circle.nearest_distinct(50, 3)), [0, 1, 2]);
    assert_eq!(owners(circle.nearest_distinct(40, 3)), [0, 1, 2], "10/1 and 20/2");
    assert_eq!(owners(circle.nearest_distinct(39, 3)), [2, 0, 1], "11/1 and 21/2");
}

fn ring(weights: &[u32]) -> Vec<(String, u32)> {
    let named = |(number, weight): (usize, &u32)| (format!("instance-{number}"), *weight);
    weights.iter().enumerate().map(named).collect()
}

/// Who serves each of a million keys.
fn placements(circle: &Circle) -> Vec<Arc<str>> {
    let place = |number: u64| circle.locate(format!("session-{number}").as_bytes());
    (0..KEYS).map(|number| place(number).unwrap().name.clone()).collect()
}

fn counts(placements: &[Arc<str>]) -> BTreeMap<Arc<str>, f64> {
    let mut counts = BTreeMap::new();
    for name in placements {
        *counts.entry(name.clone()).or_insert(0.0) += 1.0 / KEYS as f64;
    }
    counts
}

const WEIGHTS: [[u32; 10]; 4] = [
    [1; 10],
    [100; 10],
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    [10, 1_000, 10, 200, 200, 30, 100, 999, 10, 500],
];

#[test]
fn a_million_keys_are_shared_by_weight() {
    for weights in WEIGHTS {
        let circle = Circle::new(ring(&weights)).unwrap();
        let counts = counts(&placements(&circle));
        let total: u32 = weights.iter().sum();
        let mut worst = 0.0_f64;
        for share in circle.shares() {
            let ideal = f64::from(share.member.weight) / f64::from(total);
            let counted = counts[&share.member.name];
            worst = worst.max((counted / ideal - 1.0).abs());
            assert!((counted / ideal - 1.0).abs() < 0.10, "{share:?}: {counted} not {ideal}");
            // What the circle says is what is counted, but for the chance of a million draws.
            let chance = (ideal / KEYS as f64).sqrt();
            assert!((share.fraction() - counted).abs() < 5.0 * chance, "{share:?}: {counted}");
        }
        println!("{weights:?}: the worst share is {:.1} % off", worst * 100.0);
    }
}

#[test]
fn a_change_moves_no_keys_but_the_member_s_own() {
    for weights in WEIGHTS {
        let mut members = ring(&weights);
        let before = placements(&Circle::new(members.clone()).unwrap());
        members.push(("another".to_owned(), weights[4]));
        let joined = Circle::new(members.clone()).unwrap();
        let after = placements(&joined);
        let moved = before.iter().zip(&after).filter(|(before, after)| before != after);
        let moved: Vec<_> = moved.map(|(_, after)| after).collect();
        // Read backwards it is a member that leaves: only its own keys find another.
        assert!(moved.iter().all(|to| ***to == *"another"), "{weights:?}");
        let total = weights.iter().sum::<u32>() + weights[4];
        let ideal = f64::from(weights[4]) / f64::from(total);
        let fraction = moved.len() as f64 / KEYS as f64;
        assert!(fraction < ideal + 0.01, "{weights:?}: {fraction} for a share of {ideal}");
        println!("{weights:?}: a join moved {:.2} % for {:.2} %", fraction * 100.0, ideal * 100.0);

        let heavier = weights[4] + weights[4].div_ceil(2);
        members.last_mut().unwrap().1 = heavier.min(RING_WEIGHT_MAX);
        let raised = placements(&Circle::new(members).unwrap());
        let moved = after.iter().zip(&raised).filter(|(before, after)| before != after);
        assert!({ moved }.all(|(_, to)| **to == *"another"), "more weight only draws");
    }
}

#[test]
fn whoever_is_next_takes_over() {
    let members = ring(&[5, 1, 40, 3, 3, 17]);
    let circle = Circle::new(members.clone()).unwrap();
    for number in 0..2_000 {
        let key = format!("key-{number}").into_bytes();
        let order = circle.locate_distinct(&key, 6);
        assert_eq!(order.len(), 6);
        assert_eq!(circle.locate(&key), Some(order[0]));
        if number < 40 {
            let left = members.iter().filter(|(name, _)| **name != *order[0].name).cloned();
            let left = Circle::new(left).unwrap();
            assert_eq!(left.locate_distinct(&key, 9), order[1..]);
        }
    }
}

#[test]
fn an_empty_ring_and_a_single_member_are_rings() {
    let empty = Circle::new::<&str>([]).unwrap();
    assert_eq!(empty.locate(b"key"), None);
    assert!(empty.locate_distinct(b"key", 3).is_empty() && empty.shares().is_empty());
    let single = Circle::new([("a", 1_000)]).unwrap();
    assert_eq!(single.locate(b"").unwrap().name.as_ref(), "a");
    assert!(single.locate_distinct(b"key", 0).is_empty());
    assert_eq!(single.locate_distinct(b"key", usize::MAX).len(), 1);
    assert_eq!(single.shares()[0].fraction(), 1.0);
}

#[test]
fn what_cannot_be_placed_is_refused() {
    let refused = |members: Vec<(String, u32)>| Circle::new(members).unwrap_err();
    let name = |name: &str| name.to_owned();
    assert_eq!(refused(vec![(name(""), 1)]), PlacementError::Name { bytes: 0 });
    assert_eq!(refused(vec![("é".repeat(129), 1)]), PlacementError::Name { bytes: 258 });
    for weight in [0, 1_001] {
        let expected = PlacementError::Weight { name: "a".into(), weight };
        assert_eq!(refused(vec![(name("a"), weight)]), expected);
    }
    let twice = vec![(name("a"), 1), (name("b"), 1), (name("a"), 2)];
    assert_eq!(refused(twice), PlacementError::Duplicate { name: "a".into() });
    let many = (0..=RING_MEMBERS_MAX).map(|number| (format!("{number}"), 1)).collect();
    assert_eq!(refused(many), PlacementError::TooMany { members: 1_001 });
}

#[test]
#[ignore = "soak: prints what shares, builds and look-ups come to"]
#[expect(clippy::disallowed_methods, reason = "it measures")]
fn figures() {
    use std::time::Instant;
    let mut random = Random::seeded();
    let off = |circle: &Circle| {
        let total: u32 = circle.members().iter().map(|member| member.weight).sum();
        let off = |share: Share<'_>| {
            (share.fraction() * f64::from(total) / f64::from(share.member.weight) - 1.0).abs()
        };
        circle.shares().into_iter().map(off).fold(0.0, f64::max)
    };
    let steep = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
    for weights in [[1; 10], steep, [1_000, 1, 1, 1, 1, 1, 1, 1, 1, 1]] {
        let mut worst: Vec<f64> = Vec::new();
        for _ in 0..500 {
            let salt = random.next();
            let named = ring(&weights).into_iter();
            let named = named.map(|(name, weight)| (format!("{salt:x}-{name}"), weight));
            worst.push(off(&Circle::new(named).unwrap()));
        }
        worst.sort_by(f64::total_cmp);
        let beyond = worst.iter().filter(|off| **off > 0.1).count();
        println!("{weights:?}: median {:.3}, worst {:.3}", worst[250], worst[499]);
        println!("  {beyond} of 500 rings have a share more than 10 % off");
    }
    for count in [10, 100, 1_000] {
        let members: Vec<(String, u32)> =
            (0..count).map(|number| (format!("node-{number}"), random.weight())).collect();
        let began = Instant::now();
        let circle = Circle::new(members).unwrap();
        let build = began.elapsed();
        let bytes = circle.positions.len() * 10;
        let keys: Vec<String> = (0..100_000).map(|number| format!("session-{number}")).collect();
        let lookup = |locate: &dyn Fn(&[u8]) -> usize| {
            let began = Instant::now();
            let found: usize = keys.iter().map(|key| locate(key.as_bytes())).sum();
            assert!(found >= keys.len());
            began.elapsed() / keys.len() as u32
        };
        let one = lookup(&|key| circle.locate(key).iter().count());
        let three = lookup(&|key| circle.locate_distinct(key, 3).len());
        let began = Instant::now();
        let off = off(&circle);
        let shares = began.elapsed();
        println!("{count} members: {bytes} bytes, built in {build:?}, shares in {shares:?}");
        println!("  one member {one:?}, three {three:?}, worst share {:.1} % off", off * 100.0);
    }
}
