//! A cluster of processes: started, killed, paused and looked at by node.
//!
//! Ports come from below the range that the kernel gives to outgoing connections, so that the port
//! of a node that is down is not taken by somebody's connection before the node is back. A node
//! that still finds its port in use is started again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use quorate::client::Client;
use quorate::proto::v1::{NodeRole, StatusResponse};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::direct::Direct;
use crate::random::Random;

/// How long anything may take. Only a hang takes so long, even on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// How long one look at a node may take; a paused one does not answer at all.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Clusters under test at once: two cores carry no more.
static CLUSTERS: Semaphore = Semaphore::const_new(2);
const PORTS: std::ops::Range<u32> = 12_000..30_000;
static NEXT_PORT: AtomicU32 = AtomicU32::new(0);
/// Lines of each node's trace that a failure shows.
const TRACE_LINES: usize = 25;
const TRACE_CHARS: usize = 400;

/// What a cluster is started with.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) nodes: u64,
    /// Whether the nodes know each other from the start, or wait for `cluster init`.
    pub(crate) initial_cluster: bool,
    /// The nodes' `--log`.
    pub(crate) log: &'static str,
}

impl Default for Options {
    fn default() -> Self {
        Self { nodes: 3, initial_cluster: true, log: "info,openraft=off" }
    }
}

struct Node {
    client_port: u16,
    peer_port: u16,
    data: PathBuf,
    trace: PathBuf,
    /// The binary that it runs; `None` for that of this build.
    binary: Option<PathBuf>,
    child: Option<Child>,
}

/// Nodes as processes, their files, and who is in charge of them.
pub(crate) struct Cluster {
    pub(crate) random: Random,
    pub(crate) options: Options,
    name: &'static str,
    seed: u64,
    start: Instant,
    directory: TempDir,
    nodes: BTreeMap<u64, Node>,
    /// A process that is to refuse.
    refusing: Option<Child>,
    _permit: SemaphorePermit<'static>,
}

/// What a command left behind.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Output {
    /// Standard output as one JSON value.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A free port, not given out before by this process.
pub(crate) fn reserve_port() -> u16 {
    let count = PORTS.end - PORTS.start;
    // Other processes that test on this machine begin elsewhere.
    let start = std::process::id().wrapping_mul(7_919) % count;
    for _ in 0..count {
        let offset = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(PORTS.start + (start + offset) % count).unwrap();
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("no port is free");
}

/// Polling with a deadline.
pub(crate) struct Patience(Instant);

impl Patience {
    pub(crate) fn new() -> Self {
        Self(Instant::now() + PATIENCE)
    }

    /// Waits a little before the next try; ends the test if it was tried for too long.
    pub(crate) async fn pause(&self, what: &str, obstacle: &str) {
        assert!(Instant::now() < self.0, "{what}: not within {PATIENCE:?}; last: {obstacle}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Tries until it succeeds; what it says of the last failure is shown if it never does.
pub(crate) async fn eventually<T>(
    what: &str,
    mut attempt: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let patience = Patience::new();
    loop {
        match tokio::time::timeout(PATIENCE, attempt()).await.expect(what) {
            Ok(found) => return found,
            Err(obstacle) => patience.pause(what, &obstacle).await,
        }
    }
}

/// What tasks that have been told to end come to; ends the test if one never does.
pub(crate) async fn ended<T: 'static>(tasks: JoinSet<T>) -> Vec<T> {
    tokio::time::timeout(PATIENCE, tasks.join_all()).await.expect("all tasks end")
}

impl Cluster {
    /// A cluster whose nodes all serve.
    pub(crate) async fn start(name: &'static str) -> Self {
        Self::start_with(name, Options::default()).await
    }

    /// The same, with other options.
    pub(crate) async fn start_with(name: &'static str, options: Options) -> Self {
        let mut cluster = Self::prepare(name, options).await;
        for id in cluster.ids() {
            cluster.spawn(id);
        }
        cluster.all_serving().await;
        cluster
    }

    /// A cluster of which no node has been started yet.
    pub(crate) async fn prepare(name: &'static str, options: Options) -> Self {
        let permit = CLUSTERS.acquire().await.unwrap();
        let (random, seed) = Random::for_test(name);
        let directory = tempfile::Builder::new().prefix("quorate-it-").tempdir().unwrap();
        let node = |id| Node {
            client_port: reserve_port(),
            peer_port: reserve_port(),
            data: directory.path().join(format!("node-{id}")),
            trace: directory.path().join(format!("node-{id}.trace")),
            binary: None,
            child: None,
        };
        let nodes = (1..=options.nodes).map(|id| (id, node(id))).collect();
        let start = Instant::now();
        Self {
            random,
            options,
            name,
            seed,
            start,
            directory,
            nodes,
            refusing: None,
            _permit: permit,
        }
    }

    pub(crate) fn ids(&self) -> Vec<u64> {
        self.nodes.keys().copied().collect()
    }

    pub(crate) fn others(&self, id: u64) -> Vec<u64> {
        self.ids().into_iter().filter(|other| *other != id).collect()
    }

    /// Where files of a test may go.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn data(&self, id: u64) -> &Path {
        &self.nodes[&id].data
    }

    pub(crate) fn set_data(&mut self, id: u64, data: PathBuf) {
        self.node(id).data = data;
    }

    /// What the node runs from its next start on; `None` for the binary of this build.
    pub(crate) fn set_binary(&mut self, id: u64, binary: Option<PathBuf>) {
        self.node(id).binary = binary;
    }

    fn node(&mut self, id: u64) -> &mut Node {
        self.nodes.get_mut(&id).unwrap()
    }

    /// Where clients reach the node.
    pub(crate) fn address(&self, id: u64) -> String {
        format!("127.0.0.1:{}", self.nodes[&id].client_port)
    }

    /// Where nodes reach the node.
    pub(crate) fn peer_address(&self, id: u64) -> String {
        format!("127.0.0.1:{}", self.nodes[&id].peer_port)
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        self.ids().into_iter().map(|id| self.address(id)).collect()
    }

    /// `--initial-cluster` of all nodes, or the argument of `cluster init`.
    pub(crate) fn members(&self) -> String {
        let member = |id| format!("{id}={}", self.peer_address(id));
        self.ids().into_iter().map(member).collect::<Vec<_>>().join(",")
    }

    /// Arguments of `quorate serve` for a node.
    pub(crate) fn arguments(&self, id: u64) -> Vec<String> {
        let mut arguments = vec![
            "serve".to_owned(),
            format!("--node-id={id}"),
            format!("--data-dir={}", self.data(id).display()),
            format!("--listen={}", self.address(id)),
            format!("--peer-listen={}", self.peer_address(id)),
            format!("--log={}", self.options.log),
            "--log-format=json".to_owned(),
        ];
        if self.options.initial_cluster {
            arguments.push(format!("--initial-cluster={}", self.members()));
        }
        arguments
    }

    /// Says what happens to a node, for whoever reads of a failure.
    fn tell(&self, what: &str, id: u64) {
        println!("{} after {:.1?}: {what} node {id}", self.name, self.start.elapsed());
    }

    /// Starts a node that is not running, and waits for nothing.
    pub(crate) fn spawn(&mut self, id: u64) {
        let arguments = self.arguments(id);
        self.spawn_with(id, &arguments);
    }

    pub(crate) fn spawn_with(&mut self, id: u64, arguments: &[String]) {
        let trace = &self.nodes[&id].trace;
        let trace = OpenOptions::new().create(true).append(true).open(trace).unwrap();
        self.spawn_telling(id, arguments, trace.into());
    }

    /// The same, with what the node says going elsewhere.
    pub(crate) fn spawn_telling(&mut self, id: u64, arguments: &[String], stderr: Stdio) {
        self.tell("start", id);
        let node = self.node(id);
        assert!(node.child.is_none(), "node {id} is running already");
        let mut command = quorate_of(node.binary.as_deref());
        node.child = Some(command.args(arguments).stderr(stderr).spawn().unwrap());
    }

    /// The same, with so many open files allowed.
    pub(crate) fn spawn_with_files(&mut self, id: u64, files: u32) {
        self.tell(&format!("start, with {files} files, "), id);
        let arguments = self.arguments(id);
        let binary = quorate().get_program().to_owned();
        let node = self.node(id);
        assert!(node.child.is_none(), "node {id} is running already");
        let trace = OpenOptions::new().create(true).append(true).open(&node.trace).unwrap();
        let mut command = Command::new("/bin/sh");
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(trace);
        command.arg("-c").arg(format!("ulimit -n {files} && exec \"$0\" \"$@\""));
        node.child = Some(command.arg(binary).args(arguments).spawn().unwrap());
    }

    /// Runs a node that is to end by itself, beside those of the cluster.
    pub(crate) async fn refused(&mut self, arguments: &[String]) -> Output {
        let path = self.path().join("refused.trace");
        let trace = File::create(&path).unwrap();
        self.refusing = Some(quorate().args(arguments).stderr(trace).spawn().unwrap());
        let status = eventually("the process refuses", async || {
            let status = self.refusing.as_mut().and_then(|child| child.try_wait().unwrap());
            status.ok_or_else(|| std::fs::read_to_string(&path).unwrap())
        })
        .await;
        self.refusing = None;
        Output {
            code: status.code().unwrap_or(-1),
            stdout: String::new(),
            stderr: std::fs::read_to_string(&path).unwrap(),
        }
    }

    pub(crate) fn signal(&mut self, id: u64, signal: Signal) {
        let child = self.node(id).child.as_ref().expect("the node is running");
        kill_process(Pid::from_child(child), signal).unwrap();
    }

    /// `kill -9`, and waits until the process is gone.
    pub(crate) fn kill(&mut self, id: u64) {
        self.tell("kill", id);
        let mut child = self.node(id).child.take().expect("the node is running");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// `kill -9` of all that run, at once.
    pub(crate) fn kill_all(&mut self) {
        let mut children: Vec<Child> =
            self.nodes.values_mut().filter_map(|node| node.child.take()).collect();
        children.extend(self.refusing.take());
        for child in &mut children {
            child.kill().unwrap();
        }
        for child in &mut children {
            child.wait().unwrap();
        }
    }

    /// Stops the node's time: it keeps its connections and says nothing.
    pub(crate) fn pause(&mut self, id: u64) {
        self.tell("pause", id);
        self.signal(id, Signal::STOP);
    }

    pub(crate) fn resume(&mut self, id: u64) {
        self.tell("resume", id);
        self.signal(id, Signal::CONT);
    }

    /// SIGTERM, and what it comes to.
    pub(crate) async fn stop(&mut self, id: u64) -> ExitStatus {
        self.signal(id, Signal::TERM);
        self.exited(id).await
    }

    /// Waits until the node's process ends by itself.
    pub(crate) async fn exited(&mut self, id: u64) -> ExitStatus {
        let mut ended = None;
        // Should it never end, it is killed all the same when the test does.
        let patience = Patience::new();
        while ended.is_none() {
            let node = self.node(id);
            let child = node.child.as_mut().expect("the node is running");
            ended = child.try_wait().unwrap();
            patience.pause("the process ends", "it runs").await;
        }
        self.node(id).child = None;
        ended.unwrap()
    }

    /// Waits until the node serves; starts it again if its port was taken.
    pub(crate) async fn serving(&mut self, id: u64) {
        let direct = self.direct(id).with_timeout(LOOK_TIMEOUT);
        eventually(&format!("node {id} serves"), async || {
            let ended = self.node(id).child.as_mut().and_then(|child| child.try_wait().unwrap());
            if let Some(status) = ended {
                let trace = self.trace(id);
                let taken = trace.lines().last().is_some_and(|l| l.contains("cannot listen on"));
                assert!(taken, "node {id} ended with {status}");
                self.node(id).child = None;
                self.spawn(id);
            }
            match direct.serving().await {
                Ok(true) => Ok(()),
                Ok(false) => Err("NOT_SERVING".to_owned()),
                Err(status) => Err(status.to_string()),
            }
        })
        .await;
    }

    /// Waits until the node serves, or ends by itself: then with what.
    pub(crate) async fn serving_or_ended(&mut self, id: u64) -> Option<ExitStatus> {
        self.health_or_end(id, &[true]).await
    }

    /// The same, but for a node that may be short of what it needs to serve.
    pub(crate) async fn answering_or_ended(&mut self, id: u64) -> Option<ExitStatus> {
        self.health_or_end(id, &[true, false]).await
    }

    async fn health_or_end(&mut self, id: u64, enough: &[bool]) -> Option<ExitStatus> {
        let direct = self.direct(id).with_timeout(LOOK_TIMEOUT);
        eventually(&format!("node {id} serves or ends"), async || {
            let child = self.node(id).child.as_mut().expect("the node is running");
            if let Some(status) = child.try_wait().unwrap() {
                self.node(id).child = None;
                return Ok(Some(status));
            }
            match direct.serving().await {
                Ok(serves) if enough.contains(&serves) => Ok(None),
                other => Err(format!("{other:?}")),
            }
        })
        .await
    }

    pub(crate) async fn all_serving(&mut self) {
        for id in self.ids() {
            self.serving(id).await;
        }
    }

    /// Stubs for one node.
    pub(crate) fn direct(&self, id: u64) -> Direct {
        Direct::new(&self.address(id))
    }

    /// A client of the whole cluster.
    pub(crate) fn client(&self) -> Client {
        self.client_within(Duration::from_secs(10))
    }

    /// A client with this timeout.
    pub(crate) fn client_within(&self, timeout: Duration) -> Client {
        Client::builder().endpoints(self.addresses()).timeout(timeout).build().unwrap()
    }

    /// What the nodes say of themselves, of those that answer.
    pub(crate) async fn statuses(&self) -> BTreeMap<u64, StatusResponse> {
        let asked = self.ids().into_iter().map(async |id| {
            let status = self.direct(id).with_timeout(LOOK_TIMEOUT).status().await;
            status.ok().map(|status| (id, status))
        });
        futures_util::future::join_all(asked).await.into_iter().flatten().collect()
    }

    /// The leader that a majority follows.
    pub(crate) async fn leader(&self) -> u64 {
        self.leader_other_than(0).await
    }

    /// The leader that a majority follows, once it is another than `old`.
    pub(crate) async fn leader_other_than(&self, old: u64) -> u64 {
        let majority = self.nodes.len() / 2 + 1;
        eventually("a majority follows a leader", async || {
            let statuses = self.statuses().await;
            let term = statuses.values().map(|status| status.term).max().unwrap_or_default();
            let leader = statuses
                .values()
                .find(|status| status.role() == NodeRole::Leader && status.term == term)
                .map(|status| status.node_id)
                .filter(|id| *id != old);
            let followed = |leader| {
                let same = |s: &&StatusResponse| s.leader_id == leader && s.term == term;
                statuses.values().filter(same).count() >= majority
            };
            leader.filter(|leader| followed(*leader)).ok_or_else(|| summary(&statuses))
        })
        .await
    }

    /// Waits until all nodes are at one revision, and sees that they agree on the state there.
    pub(crate) async fn agree(&self) -> (u64, String) {
        let count = self.nodes.len();
        eventually("all nodes are at one revision", async || {
            let statuses = self.statuses().await;
            let mut digests = BTreeMap::new();
            for status in statuses.values() {
                let digest = digests.entry(status.revision).or_insert(&status.state_digest);
                assert_eq!(
                    *digest,
                    &status.state_digest,
                    "nodes disagree at revision {}: {}",
                    status.revision,
                    summary(&statuses)
                );
            }
            match digests.into_iter().next() {
                Some((revision, digest))
                    if statuses.len() == count
                        && statuses.values().all(|status| status.revision == revision) =>
                {
                    Ok((revision, digest.clone()))
                }
                _ => Err(summary(&statuses)),
            }
        })
        .await
    }

    /// Everything that the node has written to standard error, in all its lives.
    pub(crate) fn trace(&self, id: u64) -> String {
        let bytes = std::fs::read(&self.nodes[&id].trace).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Runs a command of the binary against all nodes.
    pub(crate) async fn cli(&self, arguments: &[&str]) -> Output {
        self.cli_with(arguments, Vec::new()).await
    }

    /// The same, with something on standard input.
    pub(crate) async fn cli_with(&self, arguments: &[&str], stdin: Vec<u8>) -> Output {
        let endpoints = format!("--endpoints={}", self.addresses().join(","));
        let mut all = vec![endpoints];
        all.extend(arguments.iter().map(|&argument| argument.to_owned()));
        run(all, stdin).await
    }
}

fn summary(statuses: &BTreeMap<u64, StatusResponse>) -> String {
    let line = |status: &StatusResponse| {
        format!(
            "node {}: {:?} of term {}, follows {}, applied {}, revision {}, digest {} {}",
            status.node_id,
            status.role(),
            status.term,
            status.leader_id,
            status.applied_index,
            status.revision,
            status.state_digest,
            status.halted_reason,
        )
    };
    statuses.values().map(line).collect::<Vec<_>>().join("; ")
}

/// The binary of this build, or the one that `QUORATE_TEST_BINARY` names.
pub(crate) fn quorate() -> Command {
    quorate_of(None)
}

fn quorate_of(binary: Option<&Path>) -> Command {
    let tested = || std::env::var_os("QUORATE_TEST_BINARY").map(PathBuf::from);
    let binary = binary.map(Path::to_owned).or_else(tested);
    let mut command = Command::new(binary.unwrap_or(env!("CARGO_BIN_EXE_quorate").into()));
    // Options could come from the environment too, and these are not to.
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Runs the binary to its end.
pub(crate) async fn run(arguments: Vec<String>, stdin: Vec<u8>) -> Output {
    let running = tokio::task::spawn_blocking(move || {
        let mut command = quorate();
        command.args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A command that does not read its input closes it.
        let _ = child.stdin.take().unwrap().write_all(&stdin);
        let output = child.wait_with_output().unwrap();
        Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    });
    tokio::time::timeout(PATIENCE, running).await.expect("the command ends").unwrap()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill_all();
        if !std::thread::panicking() {
            return;
        }
        println!("\n{}: run it again with QUORATE_TEST_SEED={}", self.name, self.seed);
        for id in self.ids() {
            let trace = self.trace(id);
            let lines: Vec<&str> = trace.lines().collect();
            println!("--- node {id}, {} lines:", lines.len());
            for line in &lines[lines.len().saturating_sub(TRACE_LINES)..] {
                println!("{}", line.chars().take(TRACE_CHARS).collect::<String>());
            }
        }
    }
}

/// Makes a file with this content, and its directory.
pub(crate) fn write_file(path: &Path, content: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    File::create(path).unwrap().write_all(content).unwrap();
}
