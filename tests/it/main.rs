//! Real processes under test: mostly nodes of the shipped binary that are killed, paused, starved
//! of their disks and started again, and what their clients must never see.
//!
//! Each test prints its seed; `QUORATE_TEST_SEED=… cargo test --test it NAME` runs it again with
//! the same choices. What the kernel and three processes make of them still varies, so a test's
//! verdict never rests on how long something took: it waits for conditions, with deadlines that
//! only a hang exceeds. `cargo test --release --test it -- --ignored` runs the long variants.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![expect(clippy::print_stdout, reason = "the harness keeps it for those who read of a failure")]
#![cfg(all(unix, feature = "server"))]

mod checkpoint;
mod cli;
mod cluster;
mod contention;
mod corruption;
mod direct;
mod endings;
mod expiry;
mod formation;
mod freshness;
mod keeper;
mod kills;
mod lease;
mod load;
mod lock;
mod majority;
mod paused;
mod random;
mod register;
mod secrets;
mod snapshot;
mod told;
mod traces;
mod versions;
