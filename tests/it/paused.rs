//! A leader that is stopped while another takes over wakes up believing that it leads. It must not
//! show what was true before, nor end what was kept alive meanwhile.

use quorate::client::{Client, NewSession, SessionId, Update};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::cluster::{Cluster, Patience, ended};
use crate::direct::{Direct, is_transient};
use crate::keeper::{Kept, Promise};
use crate::random::size;

/// Reads of each kind that wait at the stopped node.
const READS_WAITING: usize = 16;
/// Reads of each kind right after it goes on.
const READS_AT_ONCE: usize = 50;
/// Idle timeout of a session that only the others keep alive.
const IDLE_MILLIS: u64 = 4_000;

#[tokio::test]
async fn a_leader_that_slept_does_not_show_the_past() {
    pauses(size("QUORATE_TEST_PAUSES", 3)).await;
}

#[tokio::test]
#[ignore = "soak: thirty pauses take a minute"]
async fn a_leader_that_slept_often_does_not_show_the_past() {
    pauses(size("QUORATE_TEST_PAUSES", 30)).await;
}

async fn pauses(count: u64) {
    let mut cluster = Cluster::start("paused").await;
    for _ in 0..count {
        pause(&mut cluster).await;
    }
    cluster.agree().await;
}

async fn pause(cluster: &mut Cluster) {
    let sessions = cluster.client().sessions();
    let changed = sessions.create(NewSession::new().attribute("n", "old")).await.unwrap();
    let deleted = sessions.create(NewSession::new()).await.unwrap();
    let old = cluster.leader().await;
    let kept = Promise::make(&cluster.direct(old), IDLE_MILLIS).await;
    let sleeper = cluster.direct(old).without_timeout();
    // The connection is there before the node stops, so that requests reach its socket.
    sleeper.get(&changed.id).await.unwrap();

    cluster.pause(old);
    let others = cluster.others(old);
    let directs: Vec<Direct> = others.iter().map(|id| cluster.direct(*id)).collect();
    let (stop, stopping) = watch::channel(false);
    let keeping = tokio::spawn(kept.keep(directs, cluster.random.fork(), stopping));
    cluster.leader_other_than(old).await;
    let awake: Vec<String> = others.iter().map(|id| cluster.address(*id)).collect();
    let awake = Client::builder().endpoints(awake).build().unwrap().sessions();
    let updated = awake.update(&changed.id, Update::new().set("n", "new")).await.unwrap();
    awake.delete(&deleted.id).await.unwrap();

    let expected = Expected {
        direct: sleeper,
        changed: changed.id,
        version: updated.version,
        deleted: deleted.id,
    };
    let mut waiting = JoinSet::new();
    for _ in 0..READS_WAITING {
        let expected = expected.clone();
        waiting.spawn(async move { tokio::join!(expected.changed(), expected.deleted()) });
    }
    // Lets them be written to the socket of the node that does not read it.
    tokio::task::yield_now().await;
    cluster.resume(old);
    let mut answered = (0..READS_AT_ONCE).map(|_| async {
        let (changed, deleted) = tokio::join!(expected.changed(), expected.deleted());
        changed && deleted
    });
    let _ = futures_util::future::join_all(&mut answered).await;
    ended(waiting).await;
    let patience = Patience::new();
    while !(expected.changed().await && expected.deleted().await) {
        patience.pause("the node that slept serves", "it answers with errors").await;
    }
    stop.send_replace(true);
    let (kept, end) = keeping.await.unwrap();
    match end {
        Kept::Lapsed => println!("the machine was too slow to keep a session for {IDLE_MILLIS} ms"),
        Kept::Alive => {
            kept.keep(vec![cluster.direct(old)], cluster.random.fork(), watch::channel(true).1)
                .await;
        }
    }
    cluster.all_serving().await;
}

/// What no read may contradict, and the node that is asked.
#[derive(Clone)]
struct Expected {
    direct: Direct,
    changed: SessionId,
    version: u64,
    deleted: SessionId,
}

impl Expected {
    /// Whether the changed session was found; if so, as it is.
    async fn changed(&self) -> bool {
        match self.direct.get(&self.changed).await {
            Ok(found) => {
                let session = found.session.unwrap();
                assert_eq!(session.attributes["n"], "new", "the past is shown: {session:?}");
                assert_eq!(session.version, self.version);
                true
            }
            Err(status) => refused(&status),
        }
    }

    /// Whether the deleted session was looked for; if so, it was not there.
    async fn deleted(&self) -> bool {
        match self.direct.get(&self.deleted).await {
            Ok(found) => panic!("a deleted session is shown: {found:?}"),
            Err(status) if status.code() == Code::NotFound => true,
            Err(status) => refused(&status),
        }
    }
}

fn refused(status: &Status) -> bool {
    assert!(is_transient(status), "{status:?}");
    false
}
