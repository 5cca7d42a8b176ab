//! Leases while leaders are killed: they end when they were to end.

use std::time::Duration;

use quorate::client::{Error, LeaseOptions};
use tokio::time::Instant;

use crate::cluster::{Cluster, PATIENCE, eventually};
use crate::random::size;

#[tokio::test]
async fn a_lease_ends_when_it_was_to_end_whoever_leads() {
    kills_within(size("QUORATE_TEST_KILLS", 2), Duration::from_secs(12)).await;
}

#[tokio::test]
#[ignore = "soak: five kills within one lease take forty seconds"]
async fn a_lease_ends_when_it_was_to_end_through_many_kills() {
    kills_within(size("QUORATE_TEST_KILLS", 5), Duration::from_secs(40)).await;
}

/// Kills so many leaders within the time to live of a lease that nobody renews.
///
/// Cluster time may run up to 1 % fast to catch up with the wall clock, and stands still for a
/// node that has not been told of it yet; so a lease's end is known within a window only. A lease
/// that each new leader gave its whole time to live would end far outside.
async fn kills_within(kills: u64, ttl: Duration) {
    let mut cluster = Cluster::start("lease").await;
    let leases = cluster.client_within(PATIENCE).leases();
    let asked = Instant::now();
    let (id, timing) = leases.grant_only(LeaseOptions::new().ttl(ttl)).await.unwrap();
    let granted = Instant::now();
    assert!(timing.remaining <= ttl, "{timing:?}");
    let mut past = Duration::ZERO;
    for kill in 1..=kills {
        let leader = cluster.leader().await;
        cluster.kill(leader);
        cluster.leader_other_than(leader).await;
        cluster.spawn(leader);
        cluster.serving(leader).await;
        let before = granted.elapsed();
        let found = match leases.get(id).await {
            Ok(found) => found,
            Err(Error::NotFound { .. }) => {
                // A machine so slow is no proof of anything but that the end was not early.
                println!("{kill} kills took longer than {ttl:?}");
                break;
            }
            Err(error) => panic!("{error:?}"),
        };
        let after = asked.elapsed();
        let remaining = found.value.remaining.unwrap();
        // Never early: what was granted last is there, but for the fast clock's part.
        let least = ttl.saturating_sub(after).saturating_sub(after / 50);
        assert!(remaining >= least, "{remaining:?} are left, not {least:?}");
        // Nor anew: time went on while nobody led.
        let most = ttl.saturating_sub(before / 2);
        assert!(remaining <= most, "{remaining:?} are left after {before:?} of {ttl:?}");
        println!("kill {kill}: {remaining:?} left after {after:?}");
        past = after;
    }
    let end = eventually("the lease ends", async || {
        let before = granted.elapsed();
        match leases.get(id).await {
            Err(Error::NotFound { .. }) => Ok(asked.elapsed()),
            Ok(found) => Err(format!("{:?} left after {before:?}", found.value.remaining)),
            Err(error) => Err(error.to_string()),
        }
    })
    .await;
    println!("it ended after {end:?}, {:?} after the last kill", end.saturating_sub(past));
    assert!(end >= ttl - ttl / 50, "it ended after {end:?} of {ttl:?}");
}
