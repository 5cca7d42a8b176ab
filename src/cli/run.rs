//! Running nodes in this process until somebody says stop.
//!
//! Each node has a thread and a single-threaded runtime of its own, so that `quorate dev` is three
//! nodes as three processes would be, less the processes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc as results;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit, umask};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::logging::Logging;
use super::serve::ServeOptions;
use crate::clock::{Clock as _, SystemClock};
use crate::raft::{CheckpointPolicy, Node, RaftTimeouts};
use crate::server::{Listeners, Server, ServerError, ServerOptions};

/// How often a node that has just started is asked whether it is ready.
const READY_INTERVAL: Duration = Duration::from_millis(10);

/// How long all nodes together have to stop. Nothing acknowledged depends on it: it is for clients
/// to read their last answers, and for a last checkpoint.
const STOP_GRACE: Duration = Duration::from_secs(20);

/// How long a runtime is waited for whose node has stopped.
const RUNTIME_GRACE: Duration = Duration::from_secs(1);

/// What the main thread hears.
enum Report {
    /// A node serves.
    Ready,
    /// A node cannot go on, or could not start.
    Failed(String),
    /// A node's thread has ended.
    Ended,
    /// The first signal to stop.
    Signal,
}

/// Of a node that may have so many files open.
fn server_options(options: ServeOptions, files_max: usize) -> ServerOptions {
    ServerOptions {
        node_id: options.node_id,
        data_directory: options.data_dir,
        listen: options.listen,
        peer_listen: options.peer_listen,
        advertise: Some(options.advertise),
        peer_advertise: Some(options.peer_advertise),
        initial_cluster: options
            .initial_cluster
            .into_iter()
            .map(|member| (member.node_id, member.peer_address))
            .collect(),
        timeouts: RaftTimeouts {
            heartbeat_interval: options.heartbeat_interval,
            election_timeout: options.election_timeout,
        },
        checkpoints: CheckpointPolicy::default(),
        files_max,
    }
}

/// Runs nodes until SIGINT or SIGTERM, or until one of them cannot go on. `ready` is called once
/// all of them serve; it must not block.
///
/// The main thread waits for reports and for nothing else, so that the process ends whatever has
/// become of a node's thread: at the latest when those that are told to stop have had their time,
/// and at once at a second signal.
pub(super) fn run(nodes: Vec<ServeOptions>, logging: &Logging, ready: impl FnOnce()) -> ExitCode {
    let (reports, inbox) = results::channel();
    if let Err(error) = listen_for_signals(reports.clone()) {
        logging.say(&format!("quorate: cannot listen for signals: {error}"));
        return ExitCode::FAILURE;
    }
    let files_max = raise_file_limit() / nodes.len().max(1);
    // What a node writes by itself it closes to others by itself. sled's files need this.
    umask(Mode::RWXG | Mode::RWXO);
    let (stop, stopping) = watch::channel(false);
    let mut waiting = nodes.len();
    let mut running = nodes.len();
    for options in nodes {
        let options = server_options(options, files_max);
        if let Err(error) = spawn_node(options, stopping.clone(), reports.clone()) {
            logging.say(&format!("quorate: cannot start a thread: {error}"));
            return ExitCode::FAILURE;
        }
    }
    let mut ready = Some(ready);
    let mut code = ExitCode::SUCCESS;
    let mut deadline = None;
    while running > 0 {
        let Some(report) = next_report(&inbox, deadline) else {
            logging.say(&format!(
                "quorate: not stopped within {STOP_GRACE:?}; the process ends without that. \
                 Nothing acknowledged is lost by it"
            ));
            return ExitCode::FAILURE;
        };
        match report {
            Report::Ready => {
                waiting -= 1;
                if waiting == 0
                    && let Some(ready) = ready.take()
                {
                    ready();
                }
            }
            Report::Ended => running -= 1,
            Report::Signal => {
                stop.send_replace(true);
                deadline.get_or_insert(SystemClock.monotonic() + STOP_GRACE);
            }
            Report::Failed(reason) => {
                logging.say(&format!("quorate: {reason}"));
                code = ExitCode::FAILURE;
                stop.send_replace(true);
                deadline.get_or_insert(SystemClock.monotonic() + STOP_GRACE);
            }
        }
    }
    code
}

/// The next report; `None` if there is none by the deadline.
fn next_report(inbox: &results::Receiver<Report>, deadline: Option<Duration>) -> Option<Report> {
    match deadline {
        None => inbox.recv().ok(),
        Some(deadline) => inbox.recv_timeout(deadline.saturating_sub(SystemClock.monotonic())).ok(),
    }
}

/// Starts a node's thread, which says when it ends, however it does.
fn spawn_node(
    options: ServerOptions,
    stopping: watch::Receiver<bool>,
    reports: results::Sender<Report>,
) -> std::io::Result<()> {
    let node_id = options.node_id;
    std::thread::Builder::new().name(format!("node-{node_id}")).spawn(move || {
        let ran = catch_unwind(AssertUnwindSafe(|| run_node(options, stopping, &reports)));
        let failed = ran.unwrap_or_else(|_| Err(format!("node {node_id}: its thread panicked")));
        // The receiver lives for as long as the process.
        if let Err(reason) = failed {
            let _ = reports.send(Report::Failed(reason));
        }
        let _ = reports.send(Report::Ended);
    })?;
    Ok(())
}

/// Allows as many open files as this process may have: each segment of a log takes two, each
/// connection one, and the usual soft limit of 1024 is there for programs that use `select`.
/// Returns how many that are.
fn raise_file_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let mut files = limit.current;
    if limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        match setrlimit(Resource::Nofile, raised) {
            Ok(()) => {
                files = limit.maximum;
                tracing::debug!(?files, "limit of open files raised");
            }
            Err(error) => tracing::warn!(%error, ?files, "limit of open files kept"),
        }
    }
    files.and_then(|files| usize::try_from(files).ok()).unwrap_or(usize::MAX)
}

fn run_node(
    options: ServerOptions,
    stopping: watch::Receiver<bool>,
    reports: &results::Sender<Report>,
) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start a runtime: {error}"))?;
    let served = runtime.block_on(serve_node(options, stopping, reports));
    // A call that hangs in the disk would keep it for ever.
    runtime.shutdown_timeout(RUNTIME_GRACE);
    served
}

async fn serve_node(
    options: ServerOptions,
    mut stopping: watch::Receiver<bool>,
    reports: &results::Sender<Report>,
) -> Result<(), String> {
    let waits_for_init = options.initial_cluster.is_empty();
    let started = async {
        let listeners = Listeners::bind(options.listen, options.peer_listen).await?;
        Server::start(options, listeners, Arc::new(SystemClock)).await
    };
    let server = started.await.map_err(|error: ServerError| error.to_string())?;
    let node_id = server.node().node_id();
    let ready = tokio::spawn(report_ready(server.node().clone(), reports.clone()));
    tracing::info!(node_id, address = %server.address(), "listening");
    if waits_for_init && server.node().cluster_id().is_none() {
        tracing::info!(
            node_id,
            "no --initial-cluster, no cluster yet: waiting for `quorate cluster init`"
        );
    }
    let failed = tokio::select! {
        reason = server.failed() => Some(reason),
        _ = stopping.wait_for(|stop| *stop) => None,
    };
    ready.abort();
    match failed {
        Some(reason) => {
            let _ = reports.send(Report::Failed(format!("node {node_id}: {reason}")));
        }
        None => tracing::info!(node_id, "stopping"),
    }
    server.stop().await;
    Ok(())
}

async fn report_ready(node: Arc<Node>, reports: results::Sender<Report>) {
    while !node.is_ready() {
        tokio::time::sleep(READY_INTERVAL).await;
    }
    tracing::info!(node_id = node.node_id(), leader_id = node.leader_id(), "ready");
    // Nobody waits any more if a node has failed.
    let _ = reports.send(Report::Ready);
}

/// Reports the first SIGINT or SIGTERM; a second one ends the process at once. SIGHUP, which comes
/// from terminals that close and logs that are rotated, ends nothing.
///
/// It has a thread and a runtime of its own, so that it works whatever the nodes do.
fn listen_for_signals(reports: results::Sender<Report>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate, mut hangup) = {
        let _entered = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        )
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            let mut stopping = false;
            let mut hung_up = false;
            loop {
                let signal = tokio::select! {
                    _ = interrupt.recv() => Signal::INT,
                    _ = terminate.recv() => Signal::TERM,
                    _ = hangup.recv() => {
                        if !std::mem::replace(&mut hung_up, true) {
                            tracing::info!(
                                "SIGHUP is ignored: logs go to standard error, and SIGTERM stops"
                            );
                        }
                        continue;
                    }
                };
                if std::mem::replace(&mut stopping, true) {
                    std::process::exit(128 + signal.as_raw());
                }
                // The main thread is there for as long as the process.
                let _ = reports.send(Report::Signal);
            }
        });
    })?;
    Ok(())
}
