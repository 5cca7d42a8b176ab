//! How clusters come to be, once, and whom they refuse.

use quorate::client::{Error, NewSession};

use crate::cluster::{Cluster, Options, eventually, reserve_port, write_file};

/// The last thing that a node that ended has said.
fn last_words(trace: &str) -> &str {
    trace.lines().last().unwrap_or_default()
}

#[tokio::test]
async fn nodes_form_one_cluster_in_whatever_order_they_start() {
    let mut cluster = Cluster::prepare("start order", Options::default()).await;
    let mut ids = cluster.ids();
    ids.rotate_left(usize::try_from(cluster.random.within(0..3)).unwrap());
    if cluster.random.within(0..2) == 0 {
        ids.reverse();
    }
    println!("started in the order {ids:?}");
    for id in &ids[..2] {
        cluster.spawn(*id);
    }
    for id in &ids[..2] {
        let direct = cluster.direct(*id);
        eventually("a node waits for the others", async || match direct.serving().await {
            Ok(false) if cluster.trace(*id).contains("waiting for the cluster to form") => Ok(()),
            Ok(true) => panic!("node {id} serves although one has never been there"),
            other => Err(format!("{other:?}")),
        })
        .await;
    }
    let client = cluster.client_within(std::time::Duration::from_secs(1));
    let early = client.sessions().create(NewSession::new()).await;
    assert!(matches!(early, Err(Error::Unavailable { .. })), "{early:?}");

    cluster.spawn(ids[2]);
    cluster.all_serving().await;
    let created = cluster.client().sessions().create(NewSession::new()).await.unwrap();
    let cluster_ids = cluster_ids(&cluster).await;
    assert_eq!(cluster_ids.len(), 1, "{cluster_ids:?}");

    // The same flags another time lead back into the same cluster.
    for id in cluster.ids() {
        let status = cluster.stop(id).await;
        assert_eq!(status.code(), Some(0), "node {id}");
    }
    for id in ids {
        cluster.spawn(id);
    }
    cluster.all_serving().await;
    assert_eq!(self::cluster_ids(&cluster).await, cluster_ids);
    cluster.client().sessions().get(&created.id).await.unwrap();
}

async fn cluster_ids(cluster: &Cluster) -> std::collections::BTreeSet<String> {
    let statuses = cluster.statuses().await;
    assert_eq!(statuses.len(), cluster.ids().len());
    statuses.into_values().map(|status| status.cluster_id).collect()
}

#[tokio::test]
async fn a_node_whose_disk_was_emptied_is_refused_under_its_old_id() {
    let mut cluster = Cluster::start("emptied").await;
    let sessions = cluster.client().sessions();
    let created = sessions.create(NewSession::new()).await.unwrap();
    for id in cluster.ids() {
        cluster.kill(id);
        let kept = cluster.path().join(format!("kept-{id}"));
        std::fs::rename(cluster.data(id), &kept).unwrap();
        cluster.spawn(id);
        let status = cluster.exited(id).await;
        assert_eq!(status.code(), Some(1));
        let trace = cluster.trace(id);
        let message = last_words(&trace);
        for part in
            ["must not come back under its old id", "incarnation", "bring back its data directory"]
        {
            assert!(message.contains(part), "{message}");
        }
        std::fs::remove_dir_all(cluster.data(id)).unwrap();
        std::fs::rename(&kept, cluster.data(id)).unwrap();
        cluster.spawn(id);
        cluster.serving(id).await;
        sessions.get(&created.id).await.unwrap();
    }
    cluster.agree().await;
}

#[tokio::test]
async fn a_node_that_cannot_be_what_it_is_told_says_why() {
    let mut cluster =
        Cluster::start_with("refusals", Options { nodes: 1, ..Options::default() }).await;
    let spare = |port: u16| format!("127.0.0.1:{port}");
    let arguments = |id: u64, data: &std::path::Path, listen: String, peer: String| {
        vec![
            "serve".to_owned(),
            format!("--node-id={id}"),
            format!("--data-dir={}", data.display()),
            format!("--listen={listen}"),
            format!("--peer-listen={peer}"),
        ]
    };
    let free = || spare(reserve_port());
    let own = cluster.data(1).to_owned();
    let fresh = cluster.path().join("fresh");
    let file = cluster.path().join("file");
    write_file(&file, b"not a directory");
    let foreign = cluster.path().join("foreign");
    write_file(&foreign.join("thesis.txt"), b"not to be lost");

    let cases = [
        ("in use by another process", arguments(1, &own, free(), free())),
        ("cannot listen on", arguments(2, &fresh, cluster.address(1), free())),
        ("cannot listen on", arguments(2, &fresh, free(), cluster.peer_address(1))),
        ("cannot create in data directory", arguments(2, &file.join("x"), free(), free())),
        ("thesis.txt", arguments(2, &foreign, free(), free())),
    ];
    for (expected, arguments) in cases {
        let output = cluster.refused(&arguments).await;
        assert_eq!(output.code, 1, "{output:?}");
        let message = last_words(&output.stderr);
        assert!(message.starts_with("quorate: ") && message.contains(expected), "{message}");
    }
    assert_eq!(std::fs::read_dir(&foreign).unwrap().count(), 1, "something was added");
    assert!(!has_entries(&fresh), "a node without a port left files");

    cluster.stop(1).await;
    let output = cluster.refused(&arguments(2, &own, free(), free())).await;
    assert_eq!(output.code, 1, "{output:?}");
    let message = last_words(&output.stderr);
    assert!(message.contains("belongs to node 1") && message.contains("--node-id"), "{message}");
}

fn has_entries(path: &std::path::Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some())
}

#[tokio::test]
async fn an_operator_forms_a_cluster_once() {
    let options = Options { initial_cluster: false, ..Options::default() };
    let mut cluster = Cluster::prepare("init", options).await;
    for id in cluster.ids() {
        cluster.spawn(id);
    }
    for id in cluster.ids() {
        let direct = cluster.direct(id);
        eventually("the node answers", async || {
            direct.serving().await.map_err(|status| status.to_string())
        })
        .await;
    }
    let output = cluster.cli(&["session", "create", "--timeout=1s"]).await;
    assert_eq!(output.code, 75, "{output:?}");
    assert!(output.stderr.contains("quorate cluster init"), "{output:?}");

    let members = cluster.members();
    let init = ["cluster", "init", "--members", &members, "--output=json"];
    // A member that is not there: nothing is formed by halves.
    let absent = format!("{members},4=127.0.0.1:{}", reserve_port());
    let output = cluster.cli(&["cluster", "init", "--members", &absent]).await;
    assert_ne!(output.code, 0, "{output:?}");
    let output = cluster.cli(&init).await;
    assert_eq!(output.code, 0, "{output:?}");
    let cluster_id = output.json()["cluster_id"].as_str().unwrap().to_owned();
    cluster.all_serving().await;
    assert_eq!(cluster_ids(&cluster).await.into_iter().collect::<Vec<_>>(), [cluster_id]);
    let output = cluster.cli(&init).await;
    assert_eq!(output.code, 4, "{output:?}");
    assert!(output.stderr.contains("already initialized"), "{output:?}");

    let created = cluster.client().sessions().create(NewSession::new()).await.unwrap();
    // They find each other again without being told.
    cluster.kill_all();
    for id in cluster.ids() {
        cluster.spawn(id);
    }
    cluster.all_serving().await;
    cluster.client().sessions().get(&created.id).await.unwrap();
}

#[tokio::test]
async fn a_node_of_another_cluster_takes_no_part() {
    let mut cluster = Cluster::start("foreign node").await;
    let sessions = cluster.client().sessions();
    let created = sessions.create(NewSession::new()).await.unwrap();
    let theirs = cluster_ids(&cluster).await;
    // The same nodes form another cluster with empty disks.
    cluster.kill_all();
    let kept: Vec<_> =
        cluster.ids().into_iter().map(|id| cluster.path().join(format!("first-{id}"))).collect();
    for (id, kept) in cluster.ids().into_iter().zip(&kept) {
        std::fs::rename(cluster.data(id), kept).unwrap();
        cluster.spawn(id);
    }
    cluster.all_serving().await;
    assert!(cluster_ids(&cluster).await.is_disjoint(&theirs), "two clusters have one id");
    // One node of the second cluster finds itself between two of the first.
    cluster.kill_all();
    for (id, kept) in cluster.ids().into_iter().zip(kept) {
        if id != 3 {
            cluster.set_data(id, kept);
        }
        cluster.spawn(id);
    }
    cluster.serving(1).await;
    cluster.serving(2).await;
    sessions.get(&created.id).await.unwrap();
    for _ in 0..20 {
        sessions.create(NewSession::new()).await.unwrap();
    }
    let stranger = cluster.direct(3);
    match stranger.serving().await {
        Ok(serving) => assert!(!serving, "a node of another cluster serves"),
        Err(_) => assert_eq!(cluster.exited(3).await.code(), Some(1)),
    }
    if let Ok(found) = stranger.get(&created.id).await {
        panic!("a node of another cluster gives away a session: {found:?}");
    }
    for id in [1, 2] {
        let status = &cluster.statuses().await[&id];
        assert!(status.halted_reason.is_empty(), "{status:?}");
        assert!(theirs.contains(&status.cluster_id));
    }
}
