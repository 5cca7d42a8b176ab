//! A node that was away while the others threw their log away is sent the state instead.
//!
//! The nodes run in this process, where they can be told to make snapshots all the time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use quorate::client::{Client, NewSession, Update};
use quorate::clock::SystemClock;
use quorate::raft::{CheckpointPolicy, NodeStatus, RaftTimeouts};
use quorate::server::{Listeners, Server, ServerError, ServerOptions};
use tempfile::TempDir;

use crate::cluster::{eventually, reserve_port};
use crate::random::Random;

const VALUE_BYTES: usize = 2_000;

/// Three nodes in this process.
struct Local {
    directory: TempDir,
    options: BTreeMap<u64, ServerOptions>,
    running: BTreeMap<u64, Server>,
}

impl Local {
    async fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("quorate-it-").tempdir().unwrap();
        let loopback = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let peers: BTreeMap<u64, SocketAddr> =
            (1..=3).map(|id| (id, loopback(reserve_port()))).collect();
        let initial_cluster: BTreeMap<u64, String> =
            peers.iter().map(|(id, address)| (*id, address.to_string())).collect();
        let options = |id: u64, peer: SocketAddr| ServerOptions {
            node_id: id,
            data_directory: directory.path().join(format!("node-{id}")),
            listen: loopback(reserve_port()),
            peer_listen: peer,
            advertise: None,
            peer_advertise: None,
            initial_cluster: initial_cluster.clone(),
            timeouts: RaftTimeouts::default(),
            checkpoints: CheckpointPolicy {
                log_bytes: 64 << 10,
                age: Duration::from_millis(200),
                snapshot_log_bytes: 128 << 10,
                ..CheckpointPolicy::default()
            },
        };
        let options = peers.into_iter().map(|(id, peer)| (id, options(id, peer))).collect();
        let mut local = Self { directory, options, running: BTreeMap::new() };
        for id in 1..=3 {
            local.run(id).await.unwrap();
        }
        local.ready().await;
        local
    }

    async fn run(&mut self, id: u64) -> Result<(), ServerError> {
        let options = self.options[&id].clone();
        let listeners = Listeners::bind(options.listen, options.peer_listen).await?;
        let server = Server::start(options, listeners, Arc::new(SystemClock)).await?;
        self.running.insert(id, server);
        Ok(())
    }

    async fn stop(&mut self, id: u64) {
        self.running.remove(&id).unwrap().stop().await;
    }

    async fn ready(&self) {
        eventually("all nodes are ready", async || {
            match self.running.values().find(|server| !server.node().is_ready()) {
                None => Ok(()),
                Some(server) => Err(format!("{:?}", server.node().status())),
            }
        })
        .await;
    }

    fn status(&self, id: u64) -> NodeStatus {
        self.running[&id].node().status()
    }

    fn data(&self, id: u64) -> PathBuf {
        self.directory.path().join(format!("node-{id}"))
    }

    fn client(&self) -> Client {
        let endpoints = self.options.values().map(|options| options.listen.to_string());
        Client::builder().endpoints(endpoints).timeout(Duration::from_secs(30)).build().unwrap()
    }

    async fn agree(&self) -> (u64, String) {
        eventually("all nodes are at one revision", async || {
            let all: Vec<NodeStatus> = self.running.keys().map(|id| self.status(*id)).collect();
            let (revision, digest) = (all[0].revision, all[0].state_digest.clone());
            for status in &all {
                assert!(
                    status.revision != revision || status.state_digest == digest,
                    "nodes disagree at revision {revision}"
                );
            }
            if all.iter().all(|status| status.revision == revision) {
                return Ok((revision, digest));
            }
            Err(format!("{:?}", all.iter().map(|status| status.revision).collect::<Vec<_>>()))
        })
        .await
    }

    /// Writes until the log that `id` lacks has been purged by all others.
    async fn outrun(&self, id: u64, last_log_index: u64) {
        let sessions = self.client().sessions();
        let created = sessions.create(NewSession::new()).await.unwrap();
        let mut number = 0_u64;
        eventually("the log is purged", async || {
            for _ in 0..100 {
                number += 1;
                let mut value = vec![b'v'; VALUE_BYTES];
                value.extend(number.to_string().bytes());
                sessions.update(&created.id, Update::new().set("v", value)).await.unwrap();
            }
            let others = self.running.keys().filter(|other| **other != id);
            let purged: Vec<u64> = others.map(|other| self.status(*other).purged_index).collect();
            let gone = purged.iter().all(|purged| *purged > last_log_index + 1);
            if gone { Ok(()) } else { Err(format!("{purged:?}, {last_log_index} is wanted")) }
        })
        .await;
    }

    fn newest_snapshot(&self, id: u64) -> PathBuf {
        let entries = std::fs::read_dir(self.data(id).join("snapshots")).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths.pop().expect("there is a snapshot")
    }
}

#[tokio::test]
async fn a_node_that_was_away_too_long_is_sent_a_snapshot() {
    let (mut random, _) = Random::for_test("snapshot");
    let mut local = Local::start().await;
    let sessions = local.client().sessions();
    let kept = sessions.create(NewSession::new().attribute("k", "kept")).await.unwrap();
    local.agree().await;
    let away = random.within(1..4);
    let last = local.status(away).last_log_index;
    local.stop(away).await;
    local.outrun(away, last).await;
    let deleted = sessions.create(NewSession::new()).await.unwrap();
    sessions.delete(&deleted.id).await.unwrap();

    local.run(away).await.unwrap();
    local.ready().await;
    local.agree().await;
    let status = local.status(away);
    assert!(status.snapshot_index > last, "it did not come by snapshot: {status:?}");
    let endpoint = local.options[&away].listen.to_string();
    let client = Client::builder().endpoints([endpoint]).build().unwrap().sessions();
    assert_eq!(client.get(&kept.id).await.unwrap().attributes["k"], "kept");
    client.get(&deleted.id).await.unwrap_err();
    // And it is one of them again: it goes on from there, also after a restart.
    sessions.update(&kept.id, Update::new().set("k", "changed")).await.unwrap();
    let agreed = local.agree().await;
    local.stop(away).await;
    local.run(away).await.unwrap();
    local.ready().await;
    assert_eq!(local.agree().await, agreed);
    let ids: Vec<u64> = local.running.keys().copied().collect();
    for id in ids {
        local.stop(id).await;
    }
}

#[tokio::test]
async fn a_snapshot_that_is_damaged_is_noticed_when_it_is_needed() {
    let (mut random, _) = Random::for_test("snapshot damaged");
    let mut local = Local::start().await;
    let id = random.within(1..4);
    // More than its log keeps, so that it starts from a checkpoint or snapshot.
    local.outrun(0, 1_200).await;
    let agreed = local.agree().await;

    // As long as the checkpoint is whole, nobody misses the snapshot.
    local.stop(id).await;
    let snapshot = local.newest_snapshot(id);
    let whole = std::fs::read(&snapshot).unwrap();
    let mut damaged = whole.clone();
    let at = usize::try_from(random.within(0..whole.len() as u64)).unwrap();
    damaged[at] ^= 0x10;
    std::fs::write(&snapshot, &damaged).unwrap();
    local.run(id).await.unwrap();
    local.ready().await;
    assert_eq!(local.agree().await, agreed);

    // Without the checkpoint it is all there is; and the log before it is gone.
    local.stop(id).await;
    let snapshot = local.newest_snapshot(id);
    let whole = std::fs::read(&snapshot).unwrap();
    let mut damaged = whole.clone();
    let at = usize::try_from(random.within(0..whole.len() as u64)).unwrap();
    damaged[at] ^= 0x10;
    std::fs::write(&snapshot, &damaged).unwrap();
    let sled = local.data(id).join("sled");
    std::fs::remove_dir_all(&sled).unwrap();
    let message = match local.run(id).await {
        Err(error) => error.to_string(),
        Ok(()) => panic!("byte {at} of {} was not missed", snapshot.display()),
    };
    let name = snapshot.file_name().unwrap().to_str().unwrap();
    assert!(message.contains(name), "{message}");

    // Whole again, it carries the node.
    std::fs::write(&snapshot, &whole).unwrap();
    local.run(id).await.unwrap();
    local.ready().await;
    assert_eq!(local.agree().await, agreed);
    let ids: Vec<u64> = local.running.keys().copied().collect();
    for id in ids {
        local.stop(id).await;
    }
}
