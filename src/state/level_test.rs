//! What belongs to a feature level: the limits that the state consults.

use std::collections::BTreeSet;
use std::path::Path;

use super::*;
use crate::limits;

/// Lists limits by name and value.
macro_rules! limits {
    ($($name:ident)*) => { [$((stringify!($name), format!("{:?}", limits::$name))),*] };
}

/// Of level 3. Where one differs, nodes of the build before do something else with the same entry:
/// raise `FEATURE_LEVEL`, let the state use the old value below it, and then change this.
const LIMITS: &str = "\
CLAIMS_PER_LEASE_MAX 16384
EXPIRE_BATCH_MAX 256
IDLE_TIMEOUT_DEFAULT 1800s
LEASES_MAX 1000000
LEASE_RENEWALS_MAX 1000
LEASE_TTL_MAX 86400s
LEASE_TTL_MIN 1s
LOCK_DELAY_MAX 60s
LOCK_PERMITS_MAX 1000000
LOCK_POSITION_MAX 1000
LOCK_WAITERS_MAX 100000
LOCK_WAIT_MAX 600s
MEMBERS_PER_LEASE_MAX 1024
NAME_BYTES_MAX 256
REMEMBERED_REQUESTS_MAX 8
REQUEST_LIFETIME_MAX 60s
REQUEST_SKEW_MAX 5s
RING_MEMBERS_MAX 1000
RING_MEMBER_TAGS_MAX 64
RING_MEMBER_TAG_BYTES_MAX 2048
RING_TAG_VALUE_BYTES_MAX 1024
RING_WEIGHT_MAX 1000
SESSION_ATTRIBUTES_MAX 256
SESSION_BYTES_MAX 1048576
TOMBSTONE_LIFETIME 60s
VOIDS_PER_LEASE_MAX 256
";

fn limits_by_name() -> Vec<(&'static str, String)> {
    limits! {
        CLAIMS_PER_LEASE_MAX EXPIRE_BATCH_MAX IDLE_TIMEOUT_DEFAULT LEASES_MAX LEASE_RENEWALS_MAX
        LEASE_TTL_MAX LEASE_TTL_MIN LOCK_DELAY_MAX LOCK_PERMITS_MAX LOCK_POSITION_MAX
        LOCK_WAITERS_MAX LOCK_WAIT_MAX MEMBERS_PER_LEASE_MAX NAME_BYTES_MAX REMEMBERED_REQUESTS_MAX
        REQUEST_LIFETIME_MAX REQUEST_SKEW_MAX RING_MEMBERS_MAX RING_MEMBER_TAGS_MAX
        RING_MEMBER_TAG_BYTES_MAX RING_TAG_VALUE_BYTES_MAX RING_WEIGHT_MAX SESSION_ATTRIBUTES_MAX
        SESSION_BYTES_MAX TOMBSTONE_LIFETIME VOIDS_PER_LEASE_MAX
    }
    .into()
}

#[test]
fn limits_that_the_state_consults_belong_to_its_level() {
    let each = |(name, value): (&str, String)| format!("{name} {value}\n");
    let found: String = limits_by_name().into_iter().map(each).collect();
    assert_eq!((FEATURE_LEVEL, found.as_str()), (3, LIMITS));
}

/// What only reads consult: nodes need not agree on it.
const OF_QUERIES: [&str; 1] = ["PAGE_LOOKS_MAX"];

#[test]
fn every_limit_that_the_state_consults_is_listed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/state");
    let mut consulted = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let is_test = name.ends_with("_test.rs") || name == "model.rs";
        if is_test || !name.ends_with(".rs") {
            continue;
        }
        let source = std::fs::read_to_string(path).unwrap();
        for used in source.split("limits::").skip(1) {
            let end = used.find(';').unwrap_or(used.len());
            let names =
                used[..end].split(|letter: char| !letter.is_ascii_uppercase() && letter != '_');
            consulted.extend(names.filter(|name| name.len() > 1).map(str::to_owned));
        }
    }
    for name in OF_QUERIES {
        assert!(consulted.remove(name), "{name} is consulted no more");
    }
    let listed = limits_by_name().into_iter().map(|(name, _)| name.to_owned()).collect();
    assert_eq!(consulted, listed);
}
