//! What a person is told when something is wrong: what it is, and not that something was slow.

use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

use crate::cluster::{Cluster, Options, Output, PATIENCE, eventually, quorate, reserve_port, run};

/// Words for the binary, with these endpoints before them.
fn through(endpoints: &str, words: &[&str]) -> Vec<String> {
    let endpoints = format!("--endpoints={endpoints}");
    std::iter::once(&*endpoints).chain(words.iter().copied()).map(str::to_owned).collect()
}

/// A command that failed, and said why in one line with all of these words.
fn told(output: &Output, code: i32, words: &[&str]) {
    assert_eq!((output.code, &*output.stdout), (code, ""), "{output:?}");
    assert_eq!(output.stderr.lines().count(), 1, "{output:?}");
    for word in words {
        assert!(output.stderr.contains(word), "no {word:?} in {output:?}");
    }
}

#[tokio::test]
async fn a_wrong_endpoint_is_told_at_once() {
    let cluster = Cluster::start("told endpoints").await;
    // None of these waits for its timeout, which nobody would live to see.
    let list = ["--timeout=1h", "session", "list"];
    let write = ["--timeout=1h", "session", "create"];
    let peer = cluster.peer_address(2);
    let closed = [format!("127.0.0.1:{}", reserve_port()), format!("127.0.0.1:{}", reserve_port())];
    for words in [list, write] {
        told(&run(through(&peer, &words), Vec::new()).await, 75, &[&peer, "port for peers"]);
        let refused = run(through(&closed.join(","), &words), Vec::new()).await;
        told(&refused, 75, &[&closed[0], &closed[1], "refused", "--endpoints"]);
    }
    let malformed: [(&str, &str); 5] = [
        ("::1:7400", "[::1]:7400"),
        ("127.0.0.1:7400:7401", "host:port"),
        ("localhost", "host:port"),
        ("a b:1", "host:port"),
        (",", "endpoint"),
    ];
    for (endpoint, remedy) in malformed {
        told(&run(through(endpoint, &list), Vec::new()).await, 2, &[remedy]);
    }
    // One that is right is enough, however the list is written.
    let mixed = format!("{}, {peer} ,http://{},", closed[0], cluster.address(1));
    let listed = run(through(&mixed, &["session", "list"]), Vec::new()).await;
    assert_eq!((listed.code, &*listed.stderr), (0, ""), "{listed:?}");
}

#[tokio::test]
async fn a_lost_majority_is_told_by_who_is_left() {
    let mut cluster = Cluster::start("told majority").await;
    let id = cluster.cli(&["session", "create"]).await.stdout.trim_end().to_owned();
    let left = cluster.leader().await;
    for other in cluster.others(left) {
        cluster.kill(other);
    }
    let node = format!("node {left} at {} answers, but no majority", cluster.address(left));
    let get = ["--timeout=2s", "session", "get", &id];
    let set = ["--timeout=2s", "session", "set", &id, "a=b"];
    for (command, reason) in [(&get[..], &*node), (&set[..], "no majority of the")] {
        // On a busy machine a command may give up before the node has said why.
        let output = eventually("a node says why", async || {
            let output = cluster.cli(command).await;
            if output.stderr.contains(reason) { Ok(output) } else { Err(output.stderr) }
        })
        .await;
        told(&output, 75, &[reason]);
    }
    let local = cluster.cli(&["session", "get", &id, "--local"]).await;
    assert_eq!((local.code, &*local.stderr), (0, ""), "{local:?}");

    // One that has just started has not heard of the cluster's time, which is no reason to form
    // one.
    cluster.kill(left);
    cluster.spawn(left);
    eventually("the node answers", async || {
        let told = cluster.cli(&set).await;
        let answers = told.stderr.contains("answers");
        if answers && !told.stderr.contains("cluster init") { Ok(()) } else { Err(told.stderr) }
    })
    .await;
}

#[tokio::test]
async fn a_status_needs_no_advertised_address() {
    let mut cluster = Cluster::prepare("told status", Options::default()).await;
    for id in cluster.ids() {
        let mut arguments = cluster.arguments(id);
        arguments.push(format!("--advertise=127.0.0.1:{}", reserve_port()));
        cluster.spawn_with(id, &arguments);
    }
    cluster.all_serving().await;
    cluster.agree().await;
    let status = cluster.cli(&["cluster", "status", "--output=json"]).await;
    assert_eq!((status.code, &*status.stderr), (0, ""), "{status:?}");
    for (line, id) in status.stdout.lines().zip(1..) {
        let node: Value = serde_json::from_str(line).unwrap();
        assert_eq!(node["node_id"], id);
        assert_eq!(node["client_address"], cluster.address(id));
        assert_ne!(node["role"], "unreachable");
    }
    assert_eq!(status.stdout.lines().count(), 3, "{status:?}");
}

#[tokio::test]
async fn a_variable_that_is_empty_is_not_set() {
    let cluster = Cluster::start("told variables").await;
    let empty = ["ENDPOINTS", "NAMESPACE", "TIMEOUT", "OUTPUT", "LOG"];
    let run = async |words: &[&str], variables: &[(&str, &str)]| {
        let mut command = Command::from(quorate());
        command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command.envs(variables.iter().map(|(name, value)| (format!("QUORATE_{name}"), value)));
        let ended = tokio::time::timeout(PATIENCE, command.output()).await.unwrap().unwrap();
        Output {
            code: ended.status.code().unwrap_or(-1),
            stdout: String::from_utf8(ended.stdout).unwrap(),
            stderr: String::from_utf8(ended.stderr).unwrap(),
        }
    };
    let endpoints = format!("--endpoints={}", cluster.address(1));
    let variables = empty.map(|name| (name, ""));
    let listed = run(&[&endpoints, "session", "list"], &variables).await;
    assert_eq!((listed.code, &*listed.stderr), (0, ""), "{listed:?}");
    // Each of them means nothing to a node either: what is complained of comes after all of them.
    let data = cluster.path().join("empty");
    let data = format!("--data-dir={}", data.display());
    let serve = ["serve", "--node-id=1", &data, "--listen=0.0.0.0:1", "--peer-listen=0.0.0.0:1"];
    let names = "NODE_ID DATA_DIR LISTEN PEER_LISTEN ADVERTISE PEER_ADVERTISE INITIAL_CLUSTER \
                 INSECURE HEARTBEAT_INTERVAL ELECTION_TIMEOUT LOG_FORMAT LOG CONFIG";
    let mut variables: Vec<(&str, &str)> =
        names.split_whitespace().map(|name| (name, "")).collect();
    told(&run(&serve, &variables).await, 2, &["--listen", "--insecure"]);
    variables.retain(|(name, _)| *name != "INSECURE");
    for (value, complaint) in [("1", "--advertise"), ("true", "--advertise"), ("0", "--insecure")] {
        let variables = [&variables[..], &[("INSECURE", value)]].concat();
        told(&run(&serve, &variables).await, 2, &[complaint]);
    }
}

#[tokio::test]
async fn a_bench_tells_of_an_outage() {
    let mut cluster = Cluster::start("told bench").await;
    let mut command = Command::from(quorate());
    command.arg(format!("--endpoints={}", cluster.addresses().join(",")));
    command.args(["bench", "--clients=8", "--sessions=100", "--duration=2s", "--timeline"]);
    command.arg("--output=json").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut bench = command.kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(bench.stderr.take().unwrap()).lines();
    let mut line = async || {
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap();
        line.unwrap()
    };
    // Once it measures, all nodes go, and stay away.
    assert!(line().await.unwrap().contains(" errors"));
    cluster.kill_all();
    let mut complaint = String::new();
    while let Some(line) = line().await {
        complaint = line;
    }
    let ended = tokio::time::timeout(PATIENCE, bench.wait_with_output()).await.unwrap().unwrap();
    let report: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!(ended.status.code(), Some(75), "{report} {complaint}");
    assert!(complaint.contains("never ended: 8, the oldest for "), "{complaint}");
    assert_eq!(report["unfinished"], 8, "{report}");
    assert!(report["operations"].as_u64().unwrap() > 0, "{report}");
    // They were waited for, for longer than any request took that has ended.
    assert!(report["latency_us"]["max"].as_u64().unwrap() > 1_000_000, "{report}");
}
