//! Nodes killed under load: nothing acknowledged is lost, and nothing happens twice.

use crate::cluster::Cluster;
use crate::load::Load;
use crate::random::size;

const WRITERS: u64 = 16;

#[tokio::test]
async fn no_write_is_lost_or_doubled_when_leaders_are_killed() {
    leaders_killed(size("QUORATE_TEST_KILLS", 3)).await;
}

#[tokio::test]
#[ignore = "soak: ten kills take a minute"]
async fn no_write_is_lost_or_doubled_when_many_leaders_are_killed() {
    leaders_killed(size("QUORATE_TEST_KILLS", 10)).await;
}

async fn leaders_killed(kills: u64) {
    let mut cluster = Cluster::start("leaders killed").await;
    let mut load = Load::start(&mut cluster, WRITERS).await;
    for _ in 0..kills {
        let writes = cluster.random.within(50..400);
        load.progress(writes).await;
        let leader = cluster.leader().await;
        cluster.kill(leader);
        load.progress(100).await;
        cluster.spawn(leader);
        cluster.serving(leader).await;
    }
    load.progress(100).await;
    load.finish().await.check(&cluster).await;
    cluster.agree().await;
}

#[tokio::test]
async fn everything_acknowledged_is_there_when_all_are_killed_at_once() {
    all_killed(size("QUORATE_TEST_KILLS", 2)).await;
}

#[tokio::test]
#[ignore = "soak: ten kills take a minute"]
async fn everything_acknowledged_is_there_when_all_are_killed_often() {
    all_killed(size("QUORATE_TEST_KILLS", 10)).await;
}

async fn all_killed(kills: u64) {
    let mut cluster = Cluster::start("all killed").await;
    let mut load = Load::start(&mut cluster, WRITERS).await;
    for _ in 0..kills {
        let writes = cluster.random.within(50..400);
        load.progress(writes).await;
        cluster.kill_all();
        let mut ids = cluster.ids();
        let first = *cluster.random.choose(&ids);
        ids.rotate_left(usize::try_from(first).unwrap() % 3);
        for id in ids {
            cluster.spawn(id);
        }
        cluster.all_serving().await;
    }
    load.progress(100).await;
    load.finish().await.check(&cluster).await;
    cluster.agree().await;
}
