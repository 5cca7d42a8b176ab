//! What happens in the histories of `coordination_test`.

use proptest::prelude::*;
use proptest::sample::Index;

pub(super) const LEASES: usize = 4;
pub(super) const LOCKS: [&str; 3] = ["book", "door", "pool"];
pub(super) const RINGS: [&str; 2] = ["shards", "queues"];
pub(super) const MEMBERS: [&str; 3] = ["m1", "m2", "m3"];

/// What a step of a history does. Numbers pick among what is there at the time.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Advance { by: u64, jump: u64 },
    Send { deed: Deed, age: u64, arrives: bool },
    Arrive { which: Index, resend: bool },
    Fenced { lock: usize, token: Index },
    Tick,
    TickUntilDone,
    Restore,
}

#[derive(Clone, Debug)]
pub(super) enum Deed {
    Grant { lease: usize, fresh: bool, ttl: u64 },
    Renew(Vec<usize>),
    Revoke(usize),
    Acquire { lock: usize, lease: usize, mode: usize, wait: u64, delay: u64 },
    Release { lock: usize, token: Index, named: bool },
    Cancel { which: Index },
    Break { lock: usize, token: Index, delay: bool },
    Join { ring: usize, member: usize, lease: usize, weight: u32 },
    Leave { ring: usize, member: usize, lease: Option<usize> },
}

fn some_deed() -> impl Strategy<Value = Deed> {
    let lock = || 0..LOCKS.len();
    let lease = || 0..LEASES;
    let wait = prop_oneof![2 => Just(0), 3 => 1..5_000u64, 3 => Just(600_000)];
    let delay = prop_oneof![3 => Just(0), 1 => 1..5_000u64];
    let acquire =
        (lock(), lease(), 0..8usize, wait, delay).prop_map(|(lock, lease, mode, wait, delay)| {
            Deed::Acquire { lock, lease, mode, wait, delay }
        });
    let ttl = prop_oneof![Just(1_000), 1_000..10_000u64, Just(3_600_000)];
    prop_oneof![
        4 => (lease(), any::<bool>(), ttl)
            .prop_map(|(lease, fresh, ttl)| Deed::Grant { lease, fresh, ttl }),
        3 => prop::collection::vec(lease(), 0..5).prop_map(Deed::Renew),
        1 => lease().prop_map(Deed::Revoke),
        14 => acquire,
        8 => (lock(), any::<Index>(), prop::bool::weighted(0.7))
            .prop_map(|(lock, token, named)| Deed::Release { lock, token, named }),
        3 => any::<Index>().prop_map(|which| Deed::Cancel { which }),
        1 => (lock(), any::<Index>(), any::<bool>())
            .prop_map(|(lock, token, delay)| Deed::Break { lock, token, delay }),
        6 => (0..RINGS.len(), 0..MEMBERS.len(), lease(), 1..4u32)
            .prop_map(|(ring, member, lease, weight)| Deed::Join { ring, member, lease, weight }),
        3 => (0..RINGS.len(), 0..MEMBERS.len(), prop::option::weighted(0.7, lease()))
            .prop_map(|(ring, member, lease)| Deed::Leave { ring, member, lease }),
    ]
}

pub(super) fn some_step() -> impl Strategy<Value = Step> {
    let by = prop_oneof![
        6 => 0..50u64,
        4 => 50..2_000u64,
        1 => 2_000..20_000u64,
        1 => 61_000..70_000u64,
    ];
    let jump = prop_oneof![30 => Just(0), 1 => 0..100_000u64];
    let age = prop_oneof![8 => Just(0), 1 => 0..1_000u64, 1 => 0..70_000u64];
    prop_oneof![
        6 => (by, jump).prop_map(|(by, jump)| Step::Advance { by, jump }),
        20 => (some_deed(), age, prop::bool::weighted(0.85))
            .prop_map(|(deed, age, arrives)| Step::Send { deed, age, arrives }),
        6 => (any::<Index>(), prop::bool::weighted(0.6))
            .prop_map(|(which, resend)| Step::Arrive { which, resend }),
        2 => (0..LOCKS.len(), any::<Index>())
            .prop_map(|(lock, token)| Step::Fenced { lock, token }),
        2 => Just(Step::Tick),
        1 => Just(Step::TickUntilDone),
        1 => Just(Step::Restore),
    ]
}
