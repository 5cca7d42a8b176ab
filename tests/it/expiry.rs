//! Sessions expire everywhere at the same point of history, in the same order, and not early,
//! whoever leads.

use std::collections::BTreeSet;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::cluster::{Cluster, Options, ended};
use crate::direct::Direct;
use crate::keeper::{Kept, Promise};
use crate::random::size;

/// Sessions that nobody touches.
const FORGOTTEN: u64 = 24;
/// Sessions that somebody touches all the time.
const KEPT: u64 = 4;
/// Short enough that they expire during the test, long enough to be kept on a slow machine.
const KEPT_IDLE_MILLIS: u64 = 5_000;

#[tokio::test]
async fn sessions_expire_at_one_revision_everywhere() {
    expiries(size("QUORATE_TEST_KILLS", 2)).await;
}

#[tokio::test]
#[ignore = "soak: ten kills take a minute"]
async fn sessions_expire_at_one_revision_everywhere_through_many_kills() {
    expiries(size("QUORATE_TEST_KILLS", 10)).await;
}

async fn expiries(kills: u64) {
    let log = "info,openraft=off,quorate::changes=debug";
    let mut cluster = Cluster::start_with("expiry", Options { log, ..Options::default() }).await;
    let directs: Vec<Direct> = cluster.ids().into_iter().map(|id| cluster.direct(id)).collect();
    let (stop, stopping) = watch::channel(false);
    let mut keeping = JoinSet::new();
    for _ in 0..KEPT {
        let promise = Promise::make(cluster.random.choose(&directs), KEPT_IDLE_MILLIS).await;
        let random = cluster.random.fork();
        keeping.spawn(promise.keep(directs.clone(), random, stopping.clone()));
    }
    let mut watching = JoinSet::new();
    for _ in 0..FORGOTTEN {
        let idle = cluster.random.within(1_000..2_000 + 3_000 * kills);
        let promise = Promise::make(cluster.random.choose(&directs), idle).await;
        watching.spawn(promise.watch(directs.clone(), cluster.random.fork()));
    }
    for _ in 0..kills {
        let leader = cluster.leader().await;
        cluster.kill(leader);
        cluster.leader_other_than(leader).await;
        cluster.spawn(leader);
        cluster.serving(leader).await;
    }
    let mut expected: BTreeSet<String> =
        ended(watching).await.into_iter().map(|promise| promise.handle).collect();
    stop.send_replace(true);
    for (promise, end) in ended(keeping).await {
        if end == Kept::Lapsed {
            println!("the machine was too slow to keep a session for {KEPT_IDLE_MILLIS} ms");
            expected.insert(promise.handle);
        }
    }
    // The sessions that were kept have their deadline too, but these are over.
    cluster.agree().await;
    let histories: Vec<Vec<(u64, String)>> = cluster
        .ids()
        .into_iter()
        .map(|id| {
            let mut history = expired(&cluster.trace(id));
            history.retain(|(_, handle)| expected.contains(handle));
            history
        })
        .collect();
    for (id, history) in cluster.ids().into_iter().zip(&histories) {
        assert_eq!(history, &histories[0], "node {id} expired other sessions, or in another order");
        assert!(history.is_sorted_by_key(|(revision, _)| *revision), "{history:?}");
        let handles: BTreeSet<String> = history.iter().map(|(_, handle)| handle.clone()).collect();
        assert_eq!(handles, expected, "node {id}");
        assert_eq!(history.len(), expected.len(), "node {id} expired a session twice");
    }
}

/// Revision and handle of each session that expired, in the order of the trace. A node that was
/// started again tells some of it again.
fn expired(trace: &str) -> Vec<(u64, String)> {
    let mut seen = BTreeSet::new();
    let mut history = Vec::new();
    for line in trace.lines() {
        // A line may have been cut off by the node's end.
        let Ok(line) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        let fields = &line["fields"];
        if line["target"] != "quorate::changes"
            || fields["cause"] != "expired"
            || fields["kind"] != "session"
        {
            continue;
        }
        let revision = fields["revision"].as_u64().unwrap();
        let change = (revision, fields["handle"].as_str().unwrap().to_owned());
        if seen.insert(change.clone()) {
            history.push(change);
        }
    }
    history
}
