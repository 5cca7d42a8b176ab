//! A node that was away while the others threw their log away is sent the state instead.
//!
//! The nodes run in this process, where they can be told to make snapshots all the time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use quorate::client::{Client, NewSession, Update};
use quorate::clock::SystemClock;
use quorate::proto::v1::StatusResponse;
use quorate::raft::{CheckpointPolicy, RaftTimeouts};
use quorate::server::{Listeners, Server, ServerError, ServerOptions};
use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::cluster::{eventually, reserve_port};
use crate::direct::Direct;
use crate::random::Random;

const VALUE_BYTES: usize = 2_000;

/// Three nodes in this process, each on a runtime of its own, as `quorate dev` has them: when that
/// ends, so does everything of the node.
struct Local {
    directory: TempDir,
    options: BTreeMap<u64, ServerOptions>,
    running: BTreeMap<u64, Running>,
}

struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
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
            files_max: 1_024,
        };
        let options = peers.into_iter().map(|(id, peer)| (id, options(id, peer))).collect();
        let mut local = Self { directory, options, running: BTreeMap::new() };
        for id in 1..=3 {
            local.run(id).await.unwrap();
        }
        local.ready().await;
        local
    }

    /// Starts a node, and returns when it runs or says why it does not.
    async fn run(&mut self, id: u64) -> Result<(), ServerError> {
        let options = self.options[&id].clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, told) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let started = async {
                    let listeners = Listeners::bind(options.listen, options.peer_listen).await?;
                    Server::start(options, listeners, Arc::new(SystemClock)).await
                };
                match started.await {
                    Ok(server) => {
                        // Whoever does not wait has dropped the sender as well.
                        let _ = tell.send(Ok(()));
                        let _ = stopped.await;
                        server.stop().await;
                    }
                    Err(error) => drop(tell.send(Err(error))),
                }
            });
        });
        let started = told.await.unwrap();
        self.running.insert(id, Running { stop, thread });
        if started.is_err() {
            self.stop(id).await;
        }
        started
    }

    async fn stop(&mut self, id: u64) {
        let Running { stop, thread } = self.running.remove(&id).unwrap();
        drop(stop);
        tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap();
    }

    fn direct(&self, id: u64) -> Direct {
        Direct::new(&self.options[&id].listen.to_string())
    }

    async fn ready(&self) {
        for id in self.running.keys() {
            let direct = self.direct(*id);
            eventually(&format!("node {id} serves"), async || match direct.serving().await {
                Ok(true) => Ok(()),
                other => Err(format!("{other:?}")),
            })
            .await;
        }
    }

    async fn status(&self, id: u64) -> StatusResponse {
        self.direct(id).status().await.unwrap()
    }

    async fn statuses(&self) -> Vec<StatusResponse> {
        futures_util::future::join_all(self.running.keys().map(|id| self.status(*id))).await
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
            let all = self.statuses().await;
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
            let mut statuses = self.statuses().await;
            statuses.retain(|status| status.node_id != id);
            let gone = statuses.iter().all(|status| status.purged_index > last_log_index + 1);
            if gone { Ok(()) } else { Err(format!("{last_log_index} is there: {statuses:#?}")) }
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

impl Drop for Local {
    fn drop(&mut self) {
        for (_, Running { stop, thread }) in std::mem::take(&mut self.running) {
            drop(stop);
            // A node that panicked has said so.
            let _ = thread.join();
        }
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
    let last = local.status(away).await.last_log_index;
    local.stop(away).await;
    local.outrun(away, last).await;
    let deleted = sessions.create(NewSession::new()).await.unwrap();
    sessions.delete(&deleted.id).await.unwrap();

    local.run(away).await.unwrap();
    local.ready().await;
    local.agree().await;
    let status = local.status(away).await;
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
}

#[tokio::test]
async fn a_snapshot_that_is_damaged_is_noticed_when_it_is_needed() {
    let (mut random, _) = Random::for_test("snapshot damaged");
    let mut local = Local::start().await;
    let id = random.within(1..4);
    // More than its log keeps, so that it starts from a checkpoint or snapshot.
    local.outrun(0, 1_200).await;
    let agreed = local.agree().await;

    // As long as the checkpoint is whole, nobody misses the snapshot, whichever bit is wrong.
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
    std::fs::write(&snapshot, &whole).unwrap();
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
}
