//! A leaked disk is not a leaked login, and neither is a leaked trace.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use quorate::client::{Client, NewSession, SessionId, Transport, Update};

use crate::cluster::{Cluster, Options};

#[tokio::test]
async fn no_session_id_is_on_any_disk_or_in_any_trace() {
    let options = Options { log: "trace", ..Options::default() };
    let mut cluster = Cluster::start_with("secrets", options).await;
    let mut ids = Vec::new();
    let mut handles = Vec::new();
    for transport in [Transport::Pipeline, Transport::Unary] {
        for endpoint in cluster.addresses() {
            let client =
                Client::builder().endpoints([endpoint]).transport(transport).build().unwrap();
            let sessions = client.sessions();
            let created = sessions.create(NewSession::new().attribute("a", "b")).await.unwrap();
            // What is refused is traced too.
            let taken = NewSession::new().id(created.id.clone());
            sessions.create(taken).await.unwrap_err();
            sessions.get(&created.id).await.unwrap();
            sessions.batch_get([&created.id], Default::default()).await.unwrap();
            sessions.touch(&created.id).await.unwrap();
            let stale = Update::new().set("a", "c").expect_version(created.version + 1_000);
            sessions.update(&created.id, stale).await.unwrap_err();
            sessions.update(&created.id, Update::new().set("a", "d")).await.unwrap();
            if cluster.random.within(0..2) == 0 {
                sessions.delete(&created.id).await.unwrap();
            }
            handles.push(created.handle.as_str().to_owned());
            ids.push(created.id);
        }
    }
    cluster.agree().await;
    // A node that stops has made a checkpoint, so there is nothing that is still to be written.
    for id in cluster.ids() {
        assert_eq!(cluster.stop(id).await.code(), Some(0));
    }
    let traces: String = cluster.ids().into_iter().map(|id| cluster.trace(id)).collect();
    // What is looked for in this way would be found.
    assert!(handles.iter().all(|handle| traces.contains(handle.as_str())), "nothing was traced");

    let secrets: Vec<Vec<u8>> = ids.iter().flat_map(forms).collect();
    let mut looked_at = 0;
    for path in all_files(cluster.path()) {
        let content = fs::read(&path).unwrap();
        looked_at += content.len();
        for secret in &secrets {
            assert!(!contains(&content, secret), "{} holds a session id", path.display());
        }
    }
    assert!(looked_at > 1_000_000, "only {looked_at} bytes were looked at");
}

/// An id as it is presented, and the bytes that it stands for.
fn forms(id: &SessionId) -> [Vec<u8>; 2] {
    let bytes = URL_SAFE_NO_PAD.decode(id.reveal()).unwrap();
    [id.reveal().as_bytes().to_vec(), bytes]
}

fn contains(content: &[u8], secret: &[u8]) -> bool {
    let mut rest = content;
    while let Some(at) = rest.iter().position(|byte| *byte == secret[0]) {
        if rest[at..].starts_with(secret) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

fn all_files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(all_files(&path)) } else { found.push(path) }
    }
    found
}
