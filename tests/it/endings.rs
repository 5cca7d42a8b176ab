//! How commands end that hold or wait for something: by a signal, or because it is lost, and
//! without leaving anything behind.

use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::cluster::{Cluster, Output, PATIENCE, eventually, quorate};
use crate::lock::show;

const NOWHERE: &str = "0123456789abcdef0123456789abcdef";

/// The signals that ask a command to end. SIGHUP is not among them where these tests were started
/// with `nohup`, as then commands do not heed it.
pub(crate) fn signals() -> Vec<(&'static str, Signal)> {
    let mut signals = vec![("INT", Signal::INT), ("QUIT", Signal::QUIT), ("TERM", Signal::TERM)];
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    if u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 0 {
        signals.push(("HUP", Signal::HUP));
    }
    signals
}

/// A command that runs beside the test.
struct Process(Child);

impl Process {
    fn start(cluster: &Cluster, words: &[&str]) -> Self {
        let mut command = Command::from(quorate());
        command.arg(format!("--endpoints={}", cluster.addresses().join(","))).args(words);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(command.kill_on_drop(true).spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.0.id().unwrap()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    async fn ended(self) -> Output {
        let ended = tokio::time::timeout(PATIENCE, self.0.wait_with_output()).await;
        let ended = ended.expect("the command ends").unwrap();
        Output {
            code: ended.status.code().unwrap_or(-1),
            stdout: String::from_utf8(ended.stdout).unwrap(),
            stderr: String::from_utf8(ended.stderr).unwrap(),
        }
    }
}

async fn granted(cluster: &Cluster) -> String {
    let lease = cluster.cli(&["lease", "grant", "--ttl=10m"]).await;
    assert_eq!(lease.code, 0, "{lease:?}");
    lease.stdout.trim_end().to_owned()
}

/// The first in line.
async fn waiter(cluster: &Cluster) -> Value {
    eventually("somebody waits", async || {
        let lock = show(cluster, "job").await;
        let waiter = lock.as_ref().map(|lock| lock["waiters"][0].clone());
        waiter.filter(|waiter| !waiter.is_null()).ok_or_else(|| format!("{lock:?}"))
    })
    .await
}

/// What hangs from a lease: held locks, waits, members of rings.
async fn hanging(cluster: &Cluster, lease: &str) -> [Value; 3] {
    let shown = cluster.cli(&["lease", "show", lease, "--output=json"]).await.json();
    ["held_locks", "waits", "ring_members"].map(|name| shown["lease"][name].clone())
}

#[tokio::test]
async fn who_is_told_to_end_leaves_the_line() {
    let cluster = Cluster::start("endings line").await;
    let (holder, other) = (granted(&cluster).await, granted(&cluster).await);
    let acquire = ["lock", "acquire", "job", "--lease", &holder];
    assert_eq!(cluster.cli(&acquire).await.code, 0);
    let acquire = ["lock", "acquire", "job", "--lease", &other, "--wait=10m"];
    let exec = ["lock", "exec", "job", "--ttl=10m", "--wait=10m", "--", "/bin/true"];
    for words in [&acquire[..], &exec] {
        for (name, signal) in signals() {
            let waiting = Process::start(&cluster, words);
            waiter(&cluster).await;
            waiting.signal(signal);
            let ended = waiting.ended().await;
            assert_eq!(ended.code, 128 + signal.as_raw(), "{name}: {ended:?}");
            assert_eq!((&*ended.stdout, &*ended.stderr), ("", ""), "{name}");
            // At once: it was waited for.
            let lock = show(&cluster, "job").await.unwrap();
            assert_eq!(lock["waiter_count"], 0, "{name}: {lock}");
        }
    }
    assert_eq!(hanging(&cluster, &other).await, [0, 0, 0].map(Value::from));
    assert_eq!(cluster.cli(&["lease", "list"]).await.stdout.lines().count(), 3);
}

#[tokio::test]
async fn who_loses_his_lease_in_line_has_not_got_the_lock() {
    let cluster = Cluster::start("endings lease").await;
    let holder = granted(&cluster).await;
    let acquire = ["lock", "acquire", "job", "--lease", &holder];
    assert_eq!(cluster.cli(&acquire).await.code, 0);
    let exec = ["lock", "exec", "job", "--wait=10m", "--", "/bin/true"];
    let waiting = Process::start(&cluster, &exec);
    let lease = waiter(&cluster).await["lease_id"].as_str().unwrap().to_owned();
    assert_eq!(cluster.cli(&["lease", "revoke", &lease]).await.code, 0);
    let ended = waiting.ended().await;
    assert_eq!(ended.code, 75, "{ended:?}");
    assert!(ended.stderr.contains("was not obtained"), "{ended:?}");
}

#[tokio::test]
async fn leases_are_renewed_until_the_end() {
    let cluster = Cluster::start("endings renewal").await;
    let lease = granted(&cluster).await;
    for (name, signal) in signals() {
        let mut renewing = Process::start(&cluster, &["lease", "keep-alive", &lease]);
        let mut line = String::new();
        let output = renewing.0.stdout.take().unwrap();
        let mut output = tokio::io::BufReader::new(output);
        tokio::io::AsyncBufReadExt::read_line(&mut output, &mut line).await.unwrap();
        assert!(line.contains("renewed"), "{line}");
        renewing.signal(signal);
        let ended = renewing.ended().await;
        assert_eq!((ended.code, &*ended.stderr), (0, ""), "{name}");
    }
    for words in [&[&*lease, NOWHERE][..], &[NOWHERE, &lease]] {
        let words = [&["lease", "keep-alive", "--once"], words].concat();
        let once = cluster.cli(&words).await;
        assert_eq!(once.code, 3, "{once:?}");
        assert_eq!(once.stdout.lines().count(), 2, "{once:?}");
        assert!(once.stderr.contains("1 of 2"), "{once:?}");
    }
    assert_eq!(cluster.cli(&["lease", "keep-alive", "--once", &lease]).await.code, 0);
}

#[tokio::test]
async fn a_member_leaves_with_its_command_and_the_command_with_its_member() {
    let cluster = Cluster::start("endings ring").await;
    let join = ["ring", "join", "shop", "one", "--ttl=3s", "--address=a:1"];
    let joined = async || {
        eventually("the member is there", async || {
            let ring = cluster.cli(&["ring", "show", "shop"]).await;
            if ring.code == 0 { Ok(ring) } else { Err(format!("{ring:?}")) }
        })
        .await
    };
    for (name, signal) in signals() {
        let member = Process::start(&cluster, &join);
        let ring = joined().await;
        assert!(ring.stderr.starts_with("1 member,"), "{ring:?}");
        member.signal(signal);
        let ended = member.ended().await;
        assert_eq!((ended.code, &*ended.stderr), (0, ""), "{name}: {ended:?}");
        let gone = cluster.cli(&["ring", "show", "shop"]).await;
        assert_eq!(gone.code, 3, "{name}: {gone:?}");
        assert!(gone.stderr.contains("ring shop"), "{gone:?}");
    }
    let member = Process::start(&cluster, &join);
    joined().await;
    assert_eq!(cluster.cli(&["ring", "leave", "shop", "one"]).await.code, 0);
    let ended = member.ended().await;
    assert_eq!(ended.code, 4, "{ended:?}");
    assert!(ended.stderr.contains("somebody has removed it"), "{ended:?}");
    let gone = cluster.cli(&["ring", "leave", "shop", "one"]).await;
    assert_eq!(gone.code, 3, "{gone:?}");
    assert!(gone.stderr.contains("member one of ring shop"), "{gone:?}");
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    let cluster = Cluster::start("endings names").await;
    let lease = granted(&cluster).await;
    let cases: [(&[&str], i32, &str); 9] = [
        (&["lease", "show", NOWHERE], 3, NOWHERE),
        (&["lease", "revoke", NOWHERE], 3, NOWHERE),
        (&["lock", "show", "job"], 3, "lock job"),
        (&["lock", "release", "job", "--token=7"], 4, "lock job"),
        (&["lock", "break", "job", "--token=7"], 4, "lock job"),
        (&["lock", "acquire", "job", "--lease", NOWHERE], 4, NOWHERE),
        (&["ring", "locate", "shop", "key"], 3, "ring shop"),
        (&["ring", "join", "shop", "one", "--lease", NOWHERE], 3, NOWHERE),
        (&["ring", "join", "shop", "one", "--lease", &lease, "a=1", "a=2"], 2, "tag a"),
    ];
    for (words, code, name) in cases {
        let refused = cluster.cli(words).await;
        assert_eq!((refused.code, refused.stderr.lines().count()), (code, 1), "{refused:?}");
        assert!(refused.stderr.contains(name), "{refused:?}");
        assert!(refused.stderr.matches("what hung from it").count() <= 1, "{refused:?}");
    }
}
