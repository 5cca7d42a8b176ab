//! Running nodes in this process until somebody says stop.
//!
//! Each node has a thread and a single-threaded runtime of its own, so that `quorate dev` is three
//! nodes as three processes would be, less the processes.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc as results;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::watch;

use super::output;
use super::serve::ServeOptions;
use crate::clock::SystemClock;
use crate::raft::{CheckpointPolicy, Node, RaftTimeouts};
use crate::server::{Listeners, Server, ServerError, ServerOptions};

/// How often a node that has just started is asked whether it is ready.
const READY_INTERVAL: Duration = Duration::from_millis(10);

/// What a node's thread reports, in this order.
enum Report {
    Ready,
    /// It has stopped: as it was told, or because it had to.
    Ended(Result<(), String>),
}

impl From<ServeOptions> for ServerOptions {
    fn from(options: ServeOptions) -> Self {
        Self {
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
        }
    }
}

/// Runs nodes until SIGINT or SIGTERM, or until one of them cannot go on. `ready` is called once
/// all of them serve.
pub(super) fn run(nodes: Vec<ServeOptions>, ready: impl FnOnce()) -> ExitCode {
    let (stop, stopping) = watch::channel(false);
    if let Err(error) = stop_on_signals(stop.clone()) {
        output::message(&format!("quorate: cannot listen for signals: {error}"));
        return ExitCode::FAILURE;
    }
    raise_file_limit();
    let (reports, inbox) = results::channel();
    let mut waiting = nodes.len();
    let mut running = nodes.len();
    for options in nodes {
        let (reports, stopping) = (reports.clone(), stopping.clone());
        let name = format!("node-{}", options.node_id);
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            let ended = run_node(options, stopping, &reports);
            // The receiver waits for every node.
            let _ = reports.send(Report::Ended(ended));
        });
        if let Err(error) = spawned {
            output::message(&format!("quorate: cannot start a thread: {error}"));
            return ExitCode::FAILURE;
        }
    }
    let mut ready = Some(ready);
    let mut code = ExitCode::SUCCESS;
    while running > 0 {
        match inbox.recv() {
            Ok(Report::Ready) => {
                waiting -= 1;
                if waiting == 0
                    && let Some(ready) = ready.take()
                {
                    ready();
                }
            }
            Ok(Report::Ended(ended)) => {
                running -= 1;
                if let Err(reason) = ended {
                    output::message(&format!("quorate: {reason}"));
                    code = ExitCode::FAILURE;
                    stop.send_replace(true);
                }
            }
            Err(_) => return ExitCode::FAILURE,
        }
    }
    code
}

/// Allows as many open files as this process may have: each segment of a log takes two, each
/// connection one, and the usual soft limit of 1024 is there for programs that use `select`.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => tracing::debug!(files = ?limit.maximum, "limit of open files raised"),
        Err(error) => tracing::warn!(%error, files = ?limit.current, "limit of open files kept"),
    }
}

fn run_node(
    options: ServeOptions,
    stopping: watch::Receiver<bool>,
    reports: &results::Sender<Report>,
) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start a runtime: {error}"))?;
    runtime.block_on(serve_node(options.into(), stopping, reports))
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
    let mut server = started.await.map_err(|error: ServerError| error.to_string())?;
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
    tracing::info!(node_id, "stopping");
    server.stop().await;
    failed.map_or(Ok(()), |reason| Err(format!("node {node_id}: {reason}")))
}

async fn report_ready(node: Arc<Node>, reports: results::Sender<Report>) {
    while !node.is_ready() {
        tokio::time::sleep(READY_INTERVAL).await;
    }
    tracing::info!(node_id = node.node_id(), leader_id = node.leader_id(), "ready");
    // Nobody waits any more if a node has failed.
    let _ = reports.send(Report::Ready);
}

/// Sets `stop` at the first SIGINT or SIGTERM; a second one ends the process at once.
fn stop_on_signals(stop: watch::Sender<bool>) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if stop.send_replace(true) {
                    std::process::exit(130);
                }
            }
        });
    })?;
    Ok(())
}
