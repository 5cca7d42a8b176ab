//! The command line as scripts use it: exit codes, JSON, and messages of one line.

use serde_json::{Value, json};

use crate::cluster::{Cluster, Output, reserve_port, run, write_file};

fn text(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn ok(output: Output) -> Output {
    assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{output:?}");
    output
}

/// A command that failed as scripts expect: the code, nothing to read, one line of reasons.
fn failed(output: &Output, code: i32, reason: &str) {
    assert_eq!(output.code, code, "{output:?}");
    assert_eq!(output.stdout, "", "{output:?}");
    assert!(output.stderr.contains(reason), "no {reason:?} in {output:?}");
    assert!(!output.stderr.contains("panicked"), "{output:?}");
    if output.stderr.starts_with("quorate: ") {
        assert_eq!(output.stderr.lines().count(), 1, "{output:?}");
    } else {
        // The parser of arguments shows how it should be written.
        assert!(code == 2 && output.stderr.starts_with("error: "), "{output:?}");
    }
}

#[tokio::test]
async fn a_session_lives_as_json() {
    let cluster = Cluster::start("cli json").await;
    let created = ok(cluster
        .cli(&[
            "session",
            "create",
            "--output=json",
            "--principal=alice",
            "--idle-timeout=30m",
            "--absolute-timeout=never",
            "theme=dark",
        ])
        .await)
    .json();
    let id = created["id"].as_str().unwrap();
    let handle = created["handle"].as_str().unwrap();
    let version = created["revision"].as_u64().unwrap();
    assert_eq!(handle.len(), 32);
    assert!(created["expire_time"].as_str().unwrap().ends_with('Z'), "{created}");

    let binary = cluster.path().join("photo");
    write_file(&binary, b"\xff\x00\xfe");
    let photo = format!("photo=@{}", binary.display());
    let expect = format!("--expect-version={version}");
    let set = ["session", "set", id, "--output=json", "--remove=theme", &expect, &photo, "note=-"];
    let updated = ok(cluster.cli_with(&set, b"two words".to_vec()).await).json();
    let version = updated["revision"].as_u64().unwrap();
    failed(&cluster.cli(&set).await, 4, &format!("at version {version}"));

    let by_handle = format!("--handle={handle}");
    let ways: [(&[&str], &str); 4] = [
        (&["session", "get", id, "--output=json"], ""),
        (&["session", "get", "-", "--output=json"], id),
        (&["session", "get", &by_handle, "--output=json"], ""),
        (&["session", "get", "--local", "--id", id, "--output=json"], ""),
    ];
    for (arguments, stdin) in ways {
        let found = if arguments.contains(&"--local") {
            // Stale on purpose: it is asked until it has caught up.
            crate::cluster::eventually("a local read catches up", async || {
                let found = ok(cluster.cli(arguments).await).json();
                let caught_up = found["session"]["version"].as_u64() == Some(version);
                if caught_up { Ok(found) } else { Err(found.to_string()) }
            })
            .await
        } else {
            ok(cluster.cli_with(arguments, stdin.into()).await).json()
        };
        let session = &found["session"];
        assert!(found["revision"].as_u64().unwrap() >= version, "{found}");
        assert_eq!(session["namespace"], "default");
        assert_eq!(session["handle"], handle);
        assert_eq!(session["principal"], "alice");
        assert_eq!(session["version"], version);
        assert_eq!(session["idle_timeout"], "1800s");
        assert_eq!(session["absolute_timeout"], Value::Null);
        assert_eq!(
            session["attributes"],
            json!({ "note": "two words", "photo": { "base64": "/wD+" } })
        );
        assert!(!found.to_string().contains(id), "a secret is printed");
    }

    let touched = ok(cluster.cli(&["session", "touch", id, "--output=json"]).await).json();
    assert_eq!(touched["version"], version);
    let other = ok(cluster.cli(&["session", "create", "--principal=bob"]).await);
    assert_eq!(other.stdout.trim_end().len(), 43, "not 256 bits of base64url: {other:?}");
    let list = ok(cluster.cli(&["session", "list", "--output=json"]).await);
    assert_eq!(list.stdout.lines().count(), 2, "{list:?}");
    let list = ok(cluster.cli(&["session", "list", "--principal=bob", "--output=json"]).await);
    assert_eq!(list.json()["principal"], "bob");
    let list = cluster.cli(&["session", "list", "--limit=1"]).await;
    assert_eq!((list.code, list.stdout.lines().count()), (0, 2), "{list:?}");
    assert!(list.stderr.contains("--limit"), "{list:?}");
    let elsewhere = ok(cluster.cli(&["session", "list", "--namespace=x", "--output=json"]).await);
    assert_eq!(elsewhere.stdout, "");

    let deleted = ok(cluster.cli(&["session", "delete", id, "--output=json"]).await).json();
    assert!(deleted["revision"].as_u64().unwrap() > version);
    for command in [&["get", id][..], &["touch", id], &["delete", id], &["set", id, "a=b"]] {
        let arguments = [&["session"], command].concat();
        failed(&cluster.cli(&arguments).await, 3, "session not found");
    }
    failed(&cluster.cli(&["session", "create", "--id", id]).await, 4, "less than a minute ago");
    let other = other.stdout.trim_end();
    failed(&cluster.cli(&["session", "create", "--id", other]).await, 4, "exists already");
    // From standard input, and in another namespace, the same secret is another session.
    let arguments = ["session", "create", "--id=-", "--namespace=elsewhere"];
    let again = ok(cluster.cli_with(&arguments, format!("{id}\n").into_bytes()).await);
    assert_eq!(again.stdout.trim_end(), id);
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_a_reason() {
    let cluster = Cluster::start("cli refusals").await;
    let id = ok(cluster.cli(&["session", "create"]).await).stdout.trim_end().to_owned();
    let id = id.as_str();
    let unknown = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    let long = "n".repeat(257);
    let long_name = format!("{long}=x");
    let long_principal = format!("--principal={long}");
    let large = cluster.path().join("large");
    write_file(&large, &vec![b'x'; 256 * 1024 + 1]);
    let large = format!("a=@{}", large.display());
    let quarter = cluster.path().join("quarter");
    write_file(&quarter, &vec![b'x'; 250 * 1024]);
    let quarters: Vec<String> =
        (0..5).map(|number| format!("a{number}=@{}", quarter.display())).collect();
    let many: Vec<String> = (0..257).map(|number| format!("a{number}=x")).collect();
    let long_id = "i".repeat(129);
    let create = ["session", "create"];
    let set = ["session", "set", id];
    let cases: Vec<(Vec<String>, i32, &str)> = vec![
        (text(&["session", "get", unknown]), 3, "session not found"),
        (text(&["session", "get", "short"]), 2, "16 to 128"),
        (text(&["session", "get", &long_id]), 2, "16 to 128"),
        (text(&["session", "get", "not a session id"]), 2, "id"),
        (text(&["session", "get", "--handle=xyz"]), 2, "handle"),
        (text(&["session", "get", "--handle=00000000000000000000000000000000"]), 3, "not found"),
        (text(&["session", "get"]), 2, "name a session"),
        (text(&["session", "set", "--handle=xyz", "a=b"]), 2, "handle"),
        (text(&["session", "set", id, "--expect-version=1000000", "a=b"]), 4, "version"),
        (text(&["session", "set", id, "--expect-version=x", "a=b"]), 2, "--expect-version"),
        (text(&[&set[..], &["novalue"]].concat()), 2, "name=value"),
        (text(&[&set[..], &["=x"]].concat()), 2, "1 to 256"),
        (text(&[&set[..], &[&long_name]].concat()), 2, "1 to 256"),
        (text(&[&set[..], &["a=@/no/such/file"]].concat()), 1, "/no/such/file"),
        (text(&[&set[..], &[&large]].concat()), 2, "262144"),
        (text(&[&set[..], &["a=-", "b=-"]].concat()), 2, "standard input"),
        (text(&[&create[..], &[&long_principal]].concat()), 2, "256"),
        (text(&[&create[..], &["--idle-timeout=0s"]].concat()), 2, "timeout"),
        (text(&[&create[..], &["--idle-timeout=999ms"]].concat()), 2, "timeout"),
        (text(&[&create[..], &["--idle-timeout=soon"]].concat()), 2, "timeout"),
        (text(&[&create[..], &["--absolute-timeout=11years"]].concat()), 2, "timeout"),
        (text(&[&create[..], &["--namespace=UPPER"]].concat()), 2, "namespace"),
        (text(&[&create[..], &["--namespace="]].concat()), 2, "namespace"),
        (text(&[&create[..], &["--timeout=0s"]].concat()), 2, "--timeout"),
        (text(&[&create[..], &["--id=short"]].concat()), 2, "16 to 128"),
        ([text(&create), quarters.clone()].concat(), 2, "1048576"),
        ([text(&create), many.clone()].concat(), 2, "256"),
        (text(&["session", "nonsense"]), 2, "nonsense"),
        (text(&["cluster", "init", "--members=1"]), 2, "host:port"),
    ];
    for (arguments, code, reason) in cases {
        let shown: Vec<&str> = arguments.iter().map(|a| &a[..a.len().min(60)]).take(5).collect();
        println!("{shown:?}");
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        failed(&cluster.cli(&words).await, code, reason);
    }
    // A session that would grow beyond its limit is refused by its state.
    for part in &quarters[..4] {
        ok(cluster.cli(&["session", "set", id, part]).await);
    }
    failed(&cluster.cli(&["session", "set", id, &quarters[4]]).await, 4, "1048576");

    let nobody = format!("--endpoints=127.0.0.1:{}", reserve_port());
    let list = [nobody.as_str(), "--timeout=1s", "session", "list"];
    failed(&run(text(&list), Vec::new()).await, 75, "--endpoints");
    let status = [nobody.as_str(), "--timeout=1s", "cluster", "status"];
    let status = run(text(&status), Vec::new()).await;
    assert_eq!(status.code, 75, "{status:?}");
    assert!(status.stdout.contains("unreachable"), "{status:?}");
}

#[tokio::test]
async fn the_state_of_every_node_is_told() {
    let mut cluster = Cluster::start("cli status").await;
    ok(cluster.cli(&["session", "create"]).await);
    let (revision, digest) = cluster.agree().await;
    let status = ok(cluster.cli(&["cluster", "status", "--output=json"]).await);
    let nodes: Vec<Value> =
        status.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(nodes.len(), 3);
    for (node, id) in nodes.iter().zip(1..) {
        assert_eq!(node["node_id"], id);
        assert_eq!(node["client_address"], cluster.address(id));
        assert_eq!(node["cluster_id"], nodes[0]["cluster_id"]);
        assert_eq!(node["revision"], revision);
        assert_eq!(node["state_digest"], digest);
        assert_eq!(node["sessions"], 1);
        assert_eq!(node["halted_reason"], "");
        assert_eq!(node["members"].as_array().unwrap().len(), 3);
    }
    let leaders = nodes.iter().filter(|node| node["role"] == "leader").count();
    assert_eq!(leaders, 1, "{nodes:?}");
    let table = ok(cluster.cli(&["cluster", "status"]).await).stdout;
    assert_eq!(table.lines().count(), 4, "{table}");

    let leader = cluster.leader().await;
    let down = cluster.others(leader)[0];
    cluster.kill(down);
    let status = cluster.cli(&["cluster", "status", "--output=json"]).await;
    assert_eq!(status.code, 0, "{status:?}");
    assert!(status.stderr.contains(&cluster.address(down)), "{status:?}");
    let roles: Vec<Value> = status
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|node| node["node_id"] == down)
        .map(|node| node["role"].clone())
        .collect();
    assert_eq!(roles, ["unreachable"]);
}
