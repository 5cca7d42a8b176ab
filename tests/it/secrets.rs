//! A leaked disk is not a leaked login, and neither is a leaked trace.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
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

/// What others than the owner may open, with its permissions.
fn open_to_others(data: &Path) -> Vec<String> {
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    let inside = all_files(data).into_iter().flat_map(|file| {
        let above = file.ancestors().take_while(|path| *path != data).map(Path::to_owned);
        above.collect::<Vec<_>>()
    });
    let all = inside.chain([data.to_owned()]);
    let open = all.filter(|path| mode(path) & 0o077 != 0);
    open.map(|path| format!("{} {:o}", path.display(), mode(&path))).collect()
}

#[tokio::test]
async fn nobody_else_may_read_what_a_node_keeps() {
    let mut cluster = Cluster::start("permissions").await;
    let sessions = cluster.client().sessions();
    let value = vec![b'v'; 2_000];
    sessions.create(NewSession::new().attribute("a", value)).await.unwrap();
    let digest = cluster.agree().await;
    let id = cluster.random.within(1..4);
    let data = cluster.data(id).to_owned();
    for _ in 0..2 {
        // While it runs, and with the checkpoint that it makes when it stops.
        assert_eq!(open_to_others(&data), Vec::<String>::new());
        assert_eq!(cluster.stop(id).await.code(), Some(0));
        assert_eq!(open_to_others(&data), Vec::<String>::new());
        // As a version that did not care left them.
        for file in all_files(&data) {
            fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        }
        for directory in ["", "wal", "sled", "sled/blobs", "snapshots"] {
            fs::set_permissions(data.join(directory), Permissions::from_mode(0o755)).unwrap();
        }
        cluster.spawn(id);
        cluster.serving(id).await;
    }
    assert_eq!(cluster.agree().await, digest);
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
