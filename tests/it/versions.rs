//! Two versions in one cluster, as while it is upgraded: nodes go from one to the other and back
//! and are killed, and each version leads in turn, while clients write through all nodes. Nodes of
//! both make the same of every entry; once the feature level is raised, one of the older version
//! halts.
//!
//! `QUORATE_OLD_BINARY` names the binary of the version before.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use quorate::client::{Client, Error, LeaseOptions, NewSession, SessionId, Update};
use tokio::task::JoinSet;

use crate::cluster::{Cluster, Options, ended, eventually};
use crate::random::size;

fn old_binary() -> Option<PathBuf> {
    let path = std::env::var_os("QUORATE_OLD_BINARY").map(PathBuf::from);
    Some(path.expect("QUORATE_OLD_BINARY names the binary of the version before"))
}

/// Whether clients go on, and how often they got through a round.
#[derive(Default)]
struct Load {
    stopping: AtomicBool,
    rounds: AtomicU64,
}

impl Load {
    /// Waits until clients got through so many more rounds.
    async fn progress(&self, more: u64) {
        let wanted = self.rounds.load(Ordering::Relaxed) + more;
        eventually("clients get on", async || {
            let found = self.rounds.load(Ordering::Relaxed);
            if found >= wanted { Ok(()) } else { Err(format!("{found} rounds of {wanted}")) }
        })
        .await;
    }
}

/// Everything that is stored, through any node, until it is told to stop. What fails while nodes
/// come and go is left as it is.
async fn work(client: Client, worker: u64, load: Arc<Load>) {
    while !load.stopping.load(Ordering::Relaxed) {
        if round(&client, worker).await.is_ok() {
            load.rounds.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn round(client: &Client, worker: u64) -> Result<(), Error> {
    let (sessions, leases, locks) = (client.sessions(), client.leases(), client.locks());
    let id = SessionId::mint()?;
    sessions.create(NewSession::new().id(id.clone()).principal("al")).await?;
    sessions.update(&id, Update::new().set("n", worker.to_string())).await?;
    let options = || LeaseOptions::new().ttl(Duration::from_secs(5));
    let (lease, _) = leases.grant_only(options()).await?;
    let (other, _) = leases.grant_only(options()).await?;
    leases.keep_alive(&[lease, other]).await?;
    let name = format!("lock-{}", worker % 2);
    let grant = locks.lock(&name).wait(Duration::from_secs(1)).acquire_for(lease).await?;
    let fenced = Update::new().set("m", "1").fence(&name, grant.token);
    sessions.update(&id, fenced).await?;
    if worker.is_multiple_of(3) {
        locks.break_lock(&name, grant.token, false).await?;
    } else {
        locks.release(&name, grant.token, Some(lease)).await?;
    }
    client.rings().leave("ring", "nobody", None).await.map(drop).or_else(|error| match error {
        Error::NotFound { .. } | Error::OutcomeUnknown { .. } => Ok(()),
        error => Err(error),
    })?;
    leases.revoke(lease).await?;
    sessions.delete(&id).await?;
    Ok(())
}

/// Lets others lead until this one does.
async fn let_lead(cluster: &mut Cluster, wanted: u64) {
    loop {
        let leader = cluster.leader().await;
        if leader == wanted {
            return;
        }
        cluster.kill(leader);
        cluster.leader_other_than(leader).await;
        cluster.spawn(leader);
        cluster.serving(leader).await;
    }
}

async fn restart_as(cluster: &mut Cluster, id: u64, binary: Option<PathBuf>) {
    cluster.kill(id);
    cluster.set_binary(id, binary);
    cluster.spawn(id);
    cluster.serving(id).await;
}

/// Clients of all nodes, from when they are started until they are told to stop.
struct Clients {
    load: Arc<Load>,
    workers: JoinSet<()>,
}

impl Clients {
    fn start(cluster: &Cluster) -> Self {
        let load = Arc::new(Load::default());
        let mut workers = JoinSet::new();
        for worker in 0..8 {
            let client = cluster.client_within(Duration::from_secs(5));
            workers.spawn(work(client, worker, load.clone()));
        }
        Self { load, workers }
    }

    async fn stop(self) {
        self.load.stopping.store(true, Ordering::Relaxed);
        ended(self.workers).await;
    }
}

/// One or two nodes of this version beside those of the one before, each leading in turn.
async fn mix(cluster: &mut Cluster) {
    let clients = Clients::start(cluster);
    let new = cluster.random.within(1..4);
    restart_as(cluster, new, None).await;
    clients.load.progress(20).await;
    let_lead(cluster, new).await;
    clients.load.progress(20).await;
    let old = cluster.others(new)[0];
    let_lead(cluster, old).await;
    clients.load.progress(20).await;
    let second = cluster.others(new)[1];
    restart_as(cluster, second, None).await;
    let_lead(cluster, second).await;
    clients.load.progress(20).await;
    clients.stop().await;
    cluster.agree().await;
    for (id, status) in cluster.statuses().await {
        assert_eq!(status.halted_reason, "", "node {id}");
        assert!(status.feature_level <= 2, "node {id} raised the level beside an older version");
    }
    let_lead(cluster, new).await;
    eventually("the leader says whom it waits for", async || {
        let leader = cluster.leader().await;
        let status = cluster.direct(leader).status().await.map_err(|it| it.to_string())?;
        let told = status.feature_level_obstacle;
        let expected = format!("node {old} runs a version");
        if leader == old || told.contains(&expected) { Ok(()) } else { Err(told) }
    })
    .await;
    for id in [new, second] {
        restart_as(cluster, id, old_binary()).await;
    }
}

#[tokio::test]
#[ignore = "soak: needs QUORATE_OLD_BINARY, the binary of the version before"]
async fn versions_agree_and_the_last_one_raises_the_level() {
    let mut cluster = Cluster::prepare("versions", Options::default()).await;
    for id in cluster.ids() {
        cluster.set_binary(id, old_binary());
        cluster.spawn(id);
    }
    cluster.all_serving().await;
    for _ in 0..size("QUORATE_TEST_ROUNDS", 5) {
        mix(&mut cluster).await;
    }

    // All the way: the last one makes the level go up.
    let clients = Clients::start(&cluster);
    for id in cluster.ids() {
        restart_as(&mut cluster, id, None).await;
        clients.load.progress(20).await;
    }
    eventually("the level is raised everywhere", async || {
        let statuses = cluster.statuses().await;
        let levels: Vec<u32> = statuses.values().map(|status| status.feature_level).collect();
        let raised = levels.len() == 3 && levels.iter().all(|level| *level > 2);
        if raised { Ok(()) } else { Err(format!("{levels:?}")) }
    })
    .await;
    clients.load.progress(50).await;
    clients.stop().await;
    cluster.agree().await;

    // Back with one: it does not come to serve, and says why; the others go on.
    cluster.kill(3);
    cluster.set_binary(3, old_binary());
    cluster.spawn(3);
    let told = eventually("the node of the version before says that it cannot go on", async || {
        let trace = cluster.trace(3);
        let line = trace.lines().rev().find(|line| line.contains("feature level 3"));
        line.map(str::to_owned).ok_or_else(|| trace.lines().last().unwrap_or_default().to_owned())
    })
    .await;
    assert!(told.contains("upgrade this node"), "{told}");
    assert!(!matches!(cluster.direct(3).serving().await, Ok(true)));
    let clients = Clients::start(&cluster);
    clients.load.progress(20).await;
    clients.stop().await;

    // Upgraded again, it catches up.
    cluster.kill(3);
    cluster.set_binary(3, None);
    cluster.spawn(3);
    cluster.serving(3).await;
    cluster.agree().await;
}
