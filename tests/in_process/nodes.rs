//! The nodes, and waiting for them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quorate::clock::{Clock, SystemClock};
use quorate::raft::{CheckpointPolicy, RaftTimeouts};
use quorate::server::{Listeners, Server, ServerOptions};

/// How long anything may take. Only a hang takes so long, even on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const ANY_PORT: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Files that a node may have open where that does not matter.
pub(crate) const FILES_MAX: usize = 1_024;

/// Starts nodes 1 to 3, which form a cluster by themselves, in directories `node-<id>`.
pub(crate) async fn three_nodes(directory: &Path) -> Vec<Server> {
    three_nodes_with(directory, FILES_MAX).await
}

/// The same, each with so many files.
pub(crate) async fn three_nodes_with(directory: &Path, files_max: usize) -> Vec<Server> {
    let mut bound = Vec::new();
    for _ in 0..3 {
        bound.push(Listeners::bind(ANY_PORT, ANY_PORT).await.unwrap());
    }
    nodes_on(bound, directory, files_max, Arc::new(SystemClock)).await
}

/// Starts as many nodes as listeners were bound, with a clock that they share.
pub(crate) async fn nodes_on(
    bound: Vec<Listeners>,
    directory: &Path,
    files_max: usize,
    clock: Arc<dyn Clock>,
) -> Vec<Server> {
    let initial_cluster: BTreeMap<u64, String> = (1..)
        .zip(&bound)
        .map(|(id, listeners)| (id, listeners.peer_address().unwrap().to_string()))
        .collect();
    let mut servers = Vec::new();
    for (id, listeners) in (1..).zip(bound) {
        let options = ServerOptions {
            node_id: id,
            data_directory: directory.join(format!("node-{id}")),
            listen: ANY_PORT,
            peer_listen: ANY_PORT,
            advertise: None,
            peer_advertise: None,
            initial_cluster: initial_cluster.clone(),
            timeouts: RaftTimeouts::default(),
            checkpoints: CheckpointPolicy::default(),
            files_max,
        };
        servers.push(Server::start(options, listeners, clock.clone()).await.unwrap());
    }
    servers
}

/// Asks until there is an answer.
pub(crate) async fn eventually<T>(what: &str, mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let tries = async {
        loop {
            if let Some(found) = attempt().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, tries).await {
        Ok(found) => found,
        Err(_) => panic!("{what}: not within {PATIENCE:?}"),
    }
}
