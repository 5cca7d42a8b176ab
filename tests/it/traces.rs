//! What a process says, when nobody reads it, and what it says when something goes wrong.

use std::fs::{File, OpenOptions};
use std::io::{PipeReader, PipeWriter, Write as _, pipe};
use std::os::unix::process::ExitStatusExt as _;

use quorate::client::{NewSession, Update};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::Signal;
use tonic::transport::Endpoint;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;

use crate::cluster::{Cluster, Options, eventually, quorate};

/// A pipe without room, as it is left by a reader that hangs.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe().unwrap();
    let flags = fcntl_getfl(&writer).unwrap();
    fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
    while writer.write(&[b'\n'; 1024]).is_ok() {}
    fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

fn full_disk() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

/// One node's reader is gone, another's hangs, and the third one's disk is full. Leaders come and
/// go, of which every node has something to say.
#[tokio::test]
async fn nodes_work_and_stop_though_nobody_reads_what_they_say() {
    let options = Options { log: "debug", ..Options::default() };
    let mut cluster = Cluster::prepare("unread", options).await;
    let (gone, unread) = pipe().unwrap();
    drop(gone);
    let (_hangs, hung) = full_pipe();
    let arguments = |id| cluster.arguments(id);
    let (first, second, third) = (arguments(1), arguments(2), arguments(3));
    cluster.spawn_telling(1, &first, unread.into());
    cluster.spawn_telling(2, &second, hung.into());
    cluster.spawn_telling(3, &third, full_disk().into());
    cluster.all_serving().await;
    let sessions = cluster.client().sessions();
    let created = sessions.create(NewSession::new()).await.unwrap();
    for election in [1, 2, 3] {
        let old = cluster.leader().await;
        cluster.pause(old);
        cluster.leader_other_than(old).await;
        cluster.resume(old);
        cluster.all_serving().await;
        sessions.update(&created.id, Update::new().set("n", vec![election])).await.unwrap();
        for id in cluster.ids() {
            let direct = cluster.direct(id);
            let what = format!("node {id} reads");
            let read = eventually(&what, async || {
                direct.get(&created.id).await.map_err(|status| status.to_string())
            })
            .await;
            let session = read.session.unwrap();
            assert_eq!(session.attributes["n"].to_vec(), [election], "read from node {id}");
        }
    }
    for id in cluster.ids() {
        assert!(cluster.stop(id).await.success(), "node {id}");
    }
}

#[tokio::test]
async fn commands_work_though_nobody_reads_what_they_say() {
    let cluster = Cluster::start("unread_commands").await;
    let created = cluster.client().sessions().create(NewSession::new()).await.unwrap();
    let endpoints = format!("--endpoints={}", cluster.addresses().join(","));
    let marker = cluster.path().join("ran");
    let get = vec!["session".to_owned(), "get".to_owned(), created.id.reveal().to_owned()];
    let exec = ["lock", "exec", "n", "--", "/bin/sh", "-c", &format!(": > {}", marker.display())];
    for words in [get, exec.map(str::to_owned).to_vec()] {
        let mut command = quorate();
        command.arg(&endpoints).args(&words).env("QUORATE_LOG", "trace");
        let mut child = command.stderr(full_disk()).spawn().unwrap();
        let status = eventually("the command ends", async || {
            child.try_wait().unwrap().ok_or_else(|| format!("{words:?} runs"))
        });
        assert!(status.await.success(), "{words:?}");
    }
    assert!(marker.exists());
}

#[tokio::test]
async fn a_server_outlives_its_terminal_and_ends_at_once_at_a_second_signal() {
    let options = Options { nodes: 1, ..Options::default() };
    let mut cluster = Cluster::start_with("hangup", options).await;
    cluster.signal(1, Signal::HUP);
    traced(&cluster, 1, "SIGHUP is ignored").await;
    cluster.signal(1, Signal::HUP);
    cluster.serving(1).await;
    // Somebody who does not let go keeps the node from stopping at once.
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.address(1))).unwrap();
    let mut reflection = ServerReflectionClient::new(endpoint.connect().await.unwrap());
    let asks_nothing = tokio_stream::pending::<ServerReflectionRequest>();
    let _held = reflection.server_reflection_info(asks_nothing).await.unwrap();
    cluster.signal(1, Signal::TERM);
    traced(&cluster, 1, "stopping").await;
    let ended = cluster.stop(1).await;
    assert_eq!((ended.code(), ended.signal()), (Some(143), None));
    assert_eq!(cluster.trace(1).matches("SIGHUP is ignored").count(), 1);
}

async fn traced(cluster: &Cluster, id: u64, text: &str) {
    eventually(&format!("node {id} says {text:?}"), async || {
        cluster.trace(id).contains(text).then_some(()).ok_or_else(|| cluster.trace(id))
    })
    .await;
}

#[tokio::test]
async fn a_lost_majority_is_told_in_one_plain_line_when_it_begins_and_when_it_ends() {
    let options = Options { log: "info", ..Options::default() };
    let mut cluster = Cluster::start_with("plain_lines", options).await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    for id in &others {
        cluster.pause(*id);
    }
    let missing = format!("nodes {} and {} do not answer", others[0], others[1]);
    traced(&cluster, leader, &missing).await;
    for id in &others {
        cluster.resume(*id);
    }
    traced(&cluster, leader, "there was no leader for").await;
    for id in others {
        traced(&cluster, id, "this node stood still for").await;
    }
    for id in cluster.ids() {
        assert!(cluster.stop(id).await.success(), "node {id}");
        for line in cluster.trace(id).lines() {
            assert!(line.contains("\"target\":\"quorate::"), "not one of ours: {line}");
        }
    }
    assert_eq!(cluster.trace(leader).matches(&missing).count(), 1);
}
