//! Three nodes in one process: the shortest way through every layer.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quorate::client::{Client, Error, NewSession, Update};
use quorate::clock::SystemClock;
use quorate::raft::{CheckpointPolicy, RaftTimeouts};
use quorate::server::{Listeners, Server, ServerOptions};
use quorate::storage::directory::DataDirectory;

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

async fn three_nodes(directory: &std::path::Path) -> Vec<Server> {
    let mut bound = Vec::new();
    for _ in 0..3 {
        bound.push(Listeners::bind(ANY_PORT, ANY_PORT).await.unwrap());
    }
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
        };
        servers.push(Server::start(options, listeners, Arc::new(SystemClock)).await.unwrap());
    }
    servers
}

#[tokio::test]
async fn a_session_lives_and_ends() {
    let directory = tempfile::tempdir().unwrap();
    let servers = three_nodes(directory.path()).await;
    let endpoints: Vec<String> =
        servers.iter().map(|server| server.address().to_string()).collect();
    let client = Client::builder()
        .endpoints(endpoints.clone())
        .timeout(Duration::from_secs(20))
        .connect()
        .await
        .unwrap();
    let sessions = client.sessions();
    let new = NewSession::new().principal("alice").attribute("theme", "dark");
    let created = sessions.create(new).await.unwrap();
    sessions.update(&created.id, Update::new().set("cart", "apples")).await.unwrap();
    for endpoint in &endpoints {
        let client = Client::builder().endpoints([endpoint.clone()]).connect().await.unwrap();
        let session = client.sessions().get(&created.id).await.unwrap();
        assert_eq!(session.principal, "alice");
        assert_eq!(session.attributes.len(), 2);
    }
    sessions.delete(&created.id).await.unwrap();
    for endpoint in &endpoints {
        let client = Client::builder().endpoints([endpoint.clone()]).connect().await.unwrap();
        let gone = client.sessions().get(&created.id).await;
        assert!(matches!(gone, Err(Error::NotFound { .. })), "{gone:?}");
    }
    for (server, id) in servers.into_iter().zip(1..) {
        server.stop().await;
        // While others still hold their connections to it.
        let path = directory.path().join(format!("node-{id}"));
        DataDirectory::open(&path, 1).unwrap();
    }
}
