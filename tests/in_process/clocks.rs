//! What a stop of all nodes does to time, on machines whose clocks are wrong afterwards.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quorate::client::{Client, Error, NewSession, SessionId};
use quorate::clock::{Clock, SystemClock};
use quorate::raft::Node;
use quorate::server::{Listeners, Server};

use crate::nodes::{ANY_PORT, FILES_MAX, PATIENCE, eventually, nodes_on};

const HOUR: Duration = Duration::from_secs(3_600);
const IDLE: Duration = Duration::from_secs(30 * 60);

/// The machine's clocks, but for what a boot decides.
struct Boot {
    name: &'static str,
    wall_ahead: Duration,
    is_synchronised: bool,
}

impl Clock for Boot {
    fn monotonic(&self) -> Duration {
        SystemClock.monotonic()
    }

    fn wall(&self) -> u64 {
        SystemClock.wall() + u64::try_from(self.wall_ahead.as_millis()).unwrap()
    }

    fn wall_is_synchronised(&self) -> bool {
        self.is_synchronised
    }

    fn boot_id(&self) -> Option<String> {
        Some(self.name.to_owned())
    }
}

/// Three nodes that are stopped and started together, where they were.
struct Cluster<'a> {
    directory: &'a Path,
    addresses: Vec<(SocketAddr, SocketAddr)>,
    servers: Vec<Server>,
}

impl<'a> Cluster<'a> {
    fn new(directory: &'a Path) -> Self {
        let addresses = vec![(ANY_PORT, ANY_PORT); 3];
        Self { directory, addresses, servers: Vec::new() }
    }

    async fn start(&mut self, boot: Boot) {
        let mut bound = Vec::new();
        for (client, peer) in &mut self.addresses {
            let listeners = eventually("the ports are free", async || {
                Listeners::bind(*client, *peer).await.ok()
            })
            .await;
            *peer = listeners.peer_address().unwrap();
            bound.push(listeners);
        }
        self.servers = nodes_on(bound, self.directory, FILES_MAX, Arc::new(boot)).await;
        eventually("all nodes serve", async || {
            self.servers.iter().all(|server| server.node().is_ready()).then_some(())
        })
        .await;
    }

    async fn stop(&mut self) {
        for server in self.servers.drain(..) {
            server.stop().await;
        }
    }

    async fn client(&self) -> Client {
        let endpoints = self.servers.iter().map(|server| server.address().to_string());
        Client::builder().endpoints(endpoints).timeout(PATIENCE).connect().await.unwrap()
    }

    async fn leader(&self) -> &Arc<Node> {
        eventually("a leader", async || {
            let nodes = self.servers.iter().map(Server::node);
            nodes.into_iter().find(|node| node.leader_id() == Some(node.node_id()))
        })
        .await
    }

    async fn has(&self, id: &SessionId) -> bool {
        match self.client().await.sessions().get(id).await {
            Ok(_) => true,
            Err(Error::NotFound { .. }) => false,
            Err(error) => panic!("{error:?}"),
        }
    }

    async fn create(&self) -> SessionId {
        let new = NewSession::new().idle_timeout(IDLE);
        self.client().await.sessions().create(new).await.unwrap().id
    }
}

#[tokio::test]
async fn a_stop_of_all_ends_nothing_that_the_clocks_alone_call_ended() {
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new(directory.path());
    let right = Boot { name: "first", wall_ahead: Duration::ZERO, is_synchronised: false };
    cluster.start(right).await;
    let id = cluster.create().await;
    // The time is noted once a second.
    for number in 1..=3 {
        let note = directory.path().join(format!("node-{number}")).join("time");
        eventually("the time is noted", async || note.exists().then_some(())).await;
    }
    cluster.stop().await;

    // Set wrong while the nodes were down, and no reboot.
    let wrong = Boot { name: "first", wall_ahead: 2 * HOUR, is_synchronised: true };
    cluster.start(wrong).await;
    assert!(cluster.has(&id).await);
    cluster.stop().await;

    // Rebooted, with clocks from a battery.
    let wrong = Boot { name: "second", wall_ahead: 2 * HOUR, is_synchronised: false };
    cluster.start(wrong).await;
    assert!(cluster.has(&id).await);
    assert_eq!(cluster.leader().await.status().warnings.len(), 1);
    // The operator says that it is right.
    let leap = cluster.leader().await.set_time(None).await.unwrap();
    assert!(leap > HOUR, "{leap:?}");
    assert!(!cluster.has(&id).await);
    let id = cluster.create().await;
    cluster.stop().await;

    // Rebooted, hours later, with clocks that somebody keeps right.
    let right = Boot { name: "third", wall_ahead: 4 * HOUR, is_synchronised: true };
    cluster.start(right).await;
    eventually("it has expired", async || (!cluster.has(&id).await).then_some(())).await;
    cluster.stop().await;
}
