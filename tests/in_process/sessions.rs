//! A session, from its beginning to its end, on all nodes.

use std::time::Duration;

use quorate::client::{Client, Error, NewSession, Update};
use quorate::storage::directory::DataDirectory;

use crate::nodes::three_nodes;

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
