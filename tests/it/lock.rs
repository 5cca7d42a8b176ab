//! Leases and locks as scripts use them: what a command under a lock sees, and when it is stopped.

use std::ffi::OsStr;
use std::time::Duration;

use quorate::client::{Error, LeaseOptions, Locks};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::cluster::{Cluster, Output, ended, eventually, quorate};
use crate::random::size;

const SH: &str = "/bin/sh";

/// A lock that exists, as `lock show` prints it.
pub(crate) async fn show(cluster: &Cluster, name: &str) -> Option<Value> {
    let shown = cluster.cli(&["lock", "show", name, "--output=json"]).await;
    match shown.code {
        0 => Some(shown.json()["lock"].clone()),
        3 => None,
        _ => panic!("{shown:?}"),
    }
}

async fn held(cluster: &Cluster, name: &str) -> Value {
    eventually("the lock is held", async || {
        let lock = show(cluster, name).await;
        // One that was lost is there too, for as long as its lock-delay.
        let holds = |holder: &&Value| holder["lock_delay_remaining"].is_null();
        let holders = lock.as_ref().and_then(|lock| lock["holders"].as_array());
        let holder = holders.and_then(|holders| holders.iter().find(holds));
        holder.cloned().ok_or_else(|| format!("{lock:?}"))
    })
    .await
}

async fn exec(cluster: &Cluster, options: &[&str], script: &str) -> Output {
    let words = [&["lock", "exec", "job"], options, &["--", SH, "-c", script]].concat();
    cluster.cli(&words).await
}

#[tokio::test]
async fn a_command_runs_under_a_lock_and_has_its_token() {
    let cluster = Cluster::start("lock exec").await;
    let first = exec(&cluster, &[], "echo $QUORATE_LOCK $QUORATE_FENCING_TOKEN; exit 7").await;
    assert_eq!((first.code, &*first.stderr), (7, ""), "{first:?}");
    let second = exec(&cluster, &["--wait=10s"], "echo $QUORATE_LOCK $QUORATE_FENCING_TOKEN").await;
    assert_eq!((second.code, &*second.stderr), (0, ""), "{second:?}");
    let token = |output: &Output| -> u64 {
        output.stdout.trim_end().strip_prefix("job ").unwrap().parse().unwrap()
    };
    assert!(token(&second) > token(&first), "{first:?} {second:?}");
    assert_eq!(show(&cluster, "job").await, None, "it was given back");
    let missing = cluster.cli(&["lock", "exec", "job", "--", "/no/such/command"]).await;
    assert_eq!(missing.code, 127, "{missing:?}");
    // A signal that ends the command, as a shell says it.
    assert_eq!(exec(&cluster, &[], "kill -KILL $$").await.code, 137);
    // What this process is told, the command is told, and the lock is given back after its end.
    for (name, _) in crate::endings::signals() {
        let script = "while :; do sleep 0.05; done";
        let script = format!("trap 'exit 9' {name}; kill -{name} $PPID; {script}");
        let told = exec(&cluster, &[], &script).await;
        assert_eq!(told.code, 9, "{name}: {told:?}");
        assert_eq!(show(&cluster, "job").await, None);
    }
    assert_eq!(cluster.cli(&["lease", "list"]).await.stdout.lines().count(), 1);
}

/// Runs the binary as process 1 of a namespace of its own; `None` where that is not allowed.
async fn as_first_process(words: Vec<String>) -> Option<Output> {
    for how in ["-pf", "-Urpf"] {
        let unshare = |program: &OsStr, words: &[String]| {
            let mut command = tokio::process::Command::new("unshare");
            command.args([how, "--mount-proc"]).arg(program).args(words).kill_on_drop(true);
            command
        };
        if unshare(OsStr::new("true"), &[]).output().await.is_ok_and(|it| it.status.success()) {
            let running = unshare(quorate().get_program(), &words).output().await.unwrap();
            return Some(Output {
                code: running.status.code().unwrap_or(-1),
                stdout: String::from_utf8(running.stdout).unwrap(),
                stderr: String::from_utf8(running.stderr).unwrap(),
            });
        }
    }
    None
}

#[tokio::test]
async fn as_the_first_process_it_leaves_no_zombies() {
    let cluster = Cluster::start("lock init").await;
    // Those that write their numbers have lost their parent by then or soon after, and have ended
    // once all numbers have been read.
    let script = "numbers=$( (for k in 1 2 3 4 5; do sh -c 'echo $$' & done) ); tries=0; \
                  while [ $tries -lt 600 ]; do \
                  left=0; for n in $numbers; do if [ -e /proc/$n ]; then left=1; fi; done; \
                  if [ $left = 0 ]; then echo $$ $numbers; exit 7; fi; \
                  tries=$((tries + 1)); sleep 0.05; done; exit 9";
    let endpoints = format!("--endpoints={}", cluster.addresses().join(","));
    let words = [&*endpoints, "lock", "exec", "job", "--", SH, "-c", script];
    let running = as_first_process(words.map(str::to_owned).to_vec());
    let ended = tokio::time::timeout(Duration::from_secs(60), running).await.unwrap();
    let Some(ended) = ended else {
        println!("not tried: no namespaces of processes here");
        return;
    };
    // Its own end is that of the command.
    assert_eq!((ended.code, &*ended.stderr), (7, ""), "{ended:?}");
    assert_eq!(ended.stdout.split_whitespace().count(), 6, "{ended:?}");
    assert_eq!(show(&cluster, "job").await, None, "it was given back");
}

#[tokio::test]
async fn who_does_not_get_the_lock_in_time_is_told_so() {
    let cluster = Cluster::start("lock wait").await;
    let lease = cluster.cli(&["lease", "grant", "--ttl=10m", "--owner=al"]).await;
    let lease = lease.stdout.trim_end();
    let acquire = ["lock", "acquire", "job", "--lease", lease, "--shared", "--output=json"];
    let token = cluster.cli(&acquire).await.json()["token"].as_u64().unwrap();
    let holder = held(&cluster, "job").await;
    assert_eq!(holder["token"], token);
    assert_eq!(holder["owner"], "al");
    assert_eq!(holder["lease_id"], lease);
    assert_eq!(holder["mode"], serde_json::json!({ "shared": true }));

    for (options, reason) in [(&[][..], "--wait"), (&["--wait=200ms"], "lock show")] {
        let refused = exec(&cluster, options, "echo ran").await;
        assert_eq!((refused.code, &*refused.stdout), (75, ""), "{refused:?}");
        assert!(refused.stderr.contains(reason), "{refused:?}");
        assert_eq!(refused.stderr.lines().count(), 1, "{refused:?}");
    }
    let mismatch = exec(&cluster, &["--permits=3"], "echo ran").await;
    assert_eq!(mismatch.code, 4, "{mismatch:?}");
    assert!(mismatch.stderr.contains("lock job: the lock is in use"), "{mismatch:?}");
    let shared = exec(&cluster, &["--shared"], "echo ran").await;
    assert_eq!((shared.code, &*shared.stdout), (0, "ran\n"), "{shared:?}");

    // The fence of a session holds for as long as the token does.
    let id = cluster.cli(&["session", "create"]).await.stdout.trim_end().to_owned();
    let fence = format!("--fence=job:{token}");
    let set = ["session", "set", &id, &fence, "a=b"];
    assert_eq!(cluster.cli(&set).await.code, 0);
    let token = format!("--token={token}");
    let release = ["lock", "release", "job", &token, "--lease", lease];
    assert_eq!(cluster.cli(&release).await.code, 0);
    for command in [&release[..], &set, &["session", "delete", &id, &fence]] {
        let refused = cluster.cli(command).await;
        assert_eq!((refused.code, refused.stderr.lines().count()), (4, 1), "{refused:?}");
    }
    assert_eq!(cluster.cli(&["session", "delete", &id]).await.code, 0);

    let renewed = cluster.cli(&["lease", "keep-alive", "--once", lease]).await;
    assert!(renewed.stdout.contains("renewed"), "{renewed:?}");
    assert_eq!(cluster.cli(&["lease", "revoke", lease]).await.code, 0);
    for words in [&["show", lease][..], &["revoke", lease], &["keep-alive", "--once", lease]] {
        let gone = cluster.cli(&[&["lease"], words].concat()).await;
        assert_eq!(gone.code, 3, "{gone:?}");
    }
}

#[tokio::test]
async fn a_command_is_stopped_when_its_lock_is_lost() {
    let cluster = Cluster::start("lock lost").await;
    // One that goes when told so, and says that all is well; one that does not.
    let polite = "trap 'exit 0' TERM; while :; do sleep 0.05; done";
    let stubborn = "trap '' TERM; while :; do sleep 0.05; done";
    for (script, code) in [(polite, 4), (stubborn, 137)] {
        let revoking = async {
            let holder = held(&cluster, "job").await;
            let lease = holder["lease_id"].as_str().unwrap();
            let revoked = cluster.cli(&["lease", "revoke", lease]).await;
            assert_eq!(revoked.code, 0, "{revoked:?}");
        };
        let (stopped, ()) =
            tokio::join!(exec(&cluster, &["--ttl=3s", "--wait=10s"], script), revoking);
        assert_eq!(stopped.code, code, "{stopped:?}");
        assert!(stopped.stderr.contains("the lock is lost"), "{stopped:?}");
    }
}

#[tokio::test]
async fn what_a_command_has_started_goes_with_it() {
    let cluster = Cluster::start("lock group").await;
    let file = cluster.path().join("pid");
    // The command goes when told so; what it has started does not.
    let script = format!(
        "{SH} -c 'trap \"\" TERM; echo $$ > {}; while :; do sleep 0.05; done' & \
         trap 'exit 0' TERM; while :; do sleep 0.05; done",
        file.display()
    );
    let breaking = async {
        let pid = eventually("the grandchild runs", async || {
            let pid = std::fs::read_to_string(&file).unwrap_or_default();
            pid.trim().parse::<u32>().map_err(|error| error.to_string())
        })
        .await;
        let token = held(&cluster, "job").await["token"].clone();
        let token = format!("--token={token}");
        let broken = cluster.cli(&["lock", "break", "job", &token]).await;
        assert_eq!(broken.code, 0, "{broken:?}");
        pid
    };
    let (stopped, pid) = tokio::join!(exec(&cluster, &["--ttl=3s"], &script), breaking);
    assert_eq!(stopped.code, 4, "{stopped:?}");
    for words in ["the lock is lost: somebody has taken it away", "what the command has started"] {
        assert!(stopped.stderr.contains(words), "{stopped:?}");
    }
    eventually("the grandchild is gone", async || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Who has ended may still be listed, until somebody has asked how.
        let lives = !stat.is_empty() && !stat.contains(") Z ");
        if lives { Err(stat) } else { Ok(()) }
    })
    .await;
}

#[tokio::test]
async fn a_command_that_succeeds_without_its_lock_has_not() {
    let cluster = Cluster::start("lock broken").await;
    let go = cluster.path().join("go");
    let wait = format!("until [ -e {} ]; do sleep 0.05; done", go.display());
    // Well-behaved, whichever comes first: the end of its work, or that it is told to go.
    let script = format!("trap 'exit 0' TERM; {wait}");
    let breaking = async {
        let token = held(&cluster, "job").await["token"].clone();
        let token = format!("--token={token}");
        let broken = cluster.cli(&["lock", "break", "job", &token]).await;
        assert_eq!(broken.code, 0, "{broken:?}");
        // Nobody else gets it for as long as a command would have been given to end.
        let shown = cluster.cli(&["lock", "show", "job"]).await;
        assert!(shown.stdout.contains("(lost)"), "{shown:?}");
        assert!(shown.stdout.contains("kept for "), "{shown:?}");
        let listed = cluster.cli(&["lock", "list", "--output=json"]).await.json();
        assert!(listed["first_holder"]["lock_delay_remaining"].is_string(), "{listed}");
        assert!(listed["first_holder"]["request_id"].is_string(), "{listed}");
        crate::cluster::write_file(&go, b"");
    };
    let (ended, ()) = tokio::join!(exec(&cluster, &["--ttl=10m"], &script), breaking);
    assert_eq!(ended.code, 4, "{ended:?}");
    assert!(ended.stderr.contains("taken"), "{ended:?}");
}

#[tokio::test]
async fn who_gives_a_lock_back_to_nobody_does_not_wait_for_long() {
    let mut cluster = Cluster::start("lock parting").await;
    let go = cluster.path().join("go");
    let script = format!("until [ -e {} ]; do sleep 0.05; done", go.display());
    let endpoints = format!("--endpoints={}", cluster.addresses().join(","));
    let words = ["lock", "exec", "job", "--ttl=10m", "--timeout=60s", "--", SH, "-c", &*script];
    let words = std::iter::once(endpoints).chain(words.map(str::to_owned)).collect();
    let running = tokio::spawn(crate::cluster::run(words, Vec::new()));
    held(&cluster, "job").await;
    cluster.kill_all();
    crate::cluster::write_file(&go, b"");
    let ended = tokio::time::timeout(Duration::from_secs(30), running).await;
    let ended = ended.expect("it does not wait for --timeout").unwrap();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stderr.contains("could not give the lock back in time"), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
}

#[tokio::test]
async fn a_guard_behind_a_hundred_others_finds_out_that_it_was_broken() {
    let cluster = Cluster::start("lock verify").await;
    let client = cluster.client();
    let locks = client.locks();
    let lease = client.leases().grant(LeaseOptions::new()).await.unwrap();
    let mut guards = Vec::new();
    for _ in 0..104 {
        guards.push(locks.lock("job").shared().acquire(&lease).await.unwrap());
    }
    for guard in [&guards[0], &guards[102]] {
        guard.verify().await.unwrap();
        locks.break_lock("job", guard.token(), true).await.unwrap();
        let error = guard.verify().await.unwrap_err();
        assert!(matches!(error, Error::LockNotHeld { .. }), "{error:?}");
    }
    guards[103].verify().await.unwrap();
    drop(guards);
    drop(lease);
    client.settled().await;
    assert_eq!(show(&cluster, "job").await, None, "all is given back");
}

#[tokio::test]
async fn locks_and_those_who_wait_for_them_outlive_the_leader() {
    let mut cluster = Cluster::start("lock failover").await;
    let go = cluster.path().join("go");
    let script = format!("until [ -e {} ]; do sleep 0.05; done; echo first", go.display());
    let addresses = cluster.addresses().join(",");
    let spawn = |script: &str| {
        let endpoints = format!("--endpoints={addresses}");
        let words = ["lock", "exec", "job", "--wait=60s", "--ttl=60s", "--", SH, "-c", script];
        let words = std::iter::once(endpoints).chain(words.map(str::to_owned)).collect();
        tokio::spawn(crate::cluster::run(words, Vec::new()))
    };
    let first = spawn(&script);
    let token = held(&cluster, "job").await["token"].clone();
    let second = spawn("echo second");
    eventually("the second one waits", async || {
        let lock = show(&cluster, "job").await;
        let waits = lock.as_ref().is_some_and(|lock| lock["waiter_count"] == 1);
        if waits { Ok(()) } else { Err(format!("{lock:?}")) }
    })
    .await;
    let leader = cluster.leader().await;
    cluster.kill(leader);
    cluster.leader_other_than(leader).await;
    let lock = eventually("the lock is there", async || {
        show(&cluster, "job").await.ok_or_else(|| "not found".to_owned())
    })
    .await;
    assert_eq!((&lock["holders"][0]["token"], &lock["waiter_count"]), (&token, &1.into()));
    crate::cluster::write_file(&go, b"");
    let (first, second) = (first.await.unwrap(), second.await.unwrap());
    assert_eq!((first.code, &*first.stdout), (0, "first\n"), "{first:?}");
    assert_eq!((second.code, &*second.stdout), (0, "second\n"), "{second:?}");
}

/// Waits until so many are in line.
async fn in_line(locks: &Locks, count: u32) {
    eventually("they are in line", async || match locks.get("job", 1).await {
        Ok(found) if found.value.waiter_count == count => Ok(()),
        Err(Error::NotFound { .. }) if count == 0 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

#[tokio::test]
async fn a_hundred_who_wait_keep_their_places_when_the_leader_is_killed() {
    let count = u32::try_from(size("QUORATE_TEST_WAITERS", 100)).unwrap();
    let mut cluster = Cluster::start("line").await;
    let client = cluster.client_within(Duration::from_secs(30));
    let (leases, locks) = (client.leases(), client.locks());
    let options = || LeaseOptions::new().ttl(Duration::from_secs(60));
    let first = leases.grant(options()).await.unwrap();
    let held = locks.lock("job").acquire(&first).await.unwrap();
    let mut waiting = JoinSet::new();
    for place in 0..count {
        // Each through another node, and so with a connection that is cut or not.
        let number = u64::from(place) % 3 + 1;
        let through = [cluster.address(number), cluster.address(number % 3 + 1)];
        let builder = quorate::client::Client::builder().endpoints(through);
        let client = builder.timeout(Duration::from_secs(30)).build().unwrap();
        waiting.spawn(async move {
            let lease = client.leases().grant(options()).await.unwrap();
            let request = client.locks().lock("job").wait(Duration::from_secs(300));
            let guard = request.acquire(&lease).await.unwrap();
            let token = guard.token();
            guard.release().await.unwrap();
            (place, token)
        });
        in_line(&locks, place + 1).await;
    }
    let leader = cluster.leader().await;
    cluster.kill(leader);
    cluster.leader_other_than(leader).await;
    in_line(&locks, count).await;
    let mut last = held.token();
    held.release().await.unwrap();
    let mut served = ended(waiting).await;
    served.sort_unstable();
    for (place, token) in served {
        assert!(token > last, "place {place} was served by token {token}, after {last}");
        last = token;
    }
    in_line(&locks, 0).await;
}
