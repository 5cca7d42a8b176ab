//! A node as a process runs it: listeners, the node, the services, and their end.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::clock::Clock;
use crate::limits::{CLIENT_CONNECTIONS_MAX, FILES_RESERVED_MIN, PEER_CONNECTIONS_MAX};
use crate::raft::{CheckpointPolicy, Node, NodeError, NodeOptions, RaftTimeouts};
use crate::wire;

/// How long clients have to read their last answers when a node stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);

/// What a server is started with.
#[derive(Clone)]
pub struct ServerOptions {
    /// The node's number in the cluster, from 1.
    pub node_id: u64,
    /// Where it keeps everything.
    pub data_directory: PathBuf,
    /// Where it listens for clients.
    pub listen: SocketAddr,
    /// Where it listens for other nodes.
    pub peer_listen: SocketAddr,
    /// Where clients reach it, if not where it listens.
    pub advertise: Option<String>,
    /// Where other nodes reach it, if not where it listens.
    pub peer_advertise: Option<String>,
    /// The nodes that form a cluster by themselves, by their peer addresses; empty to wait for
    /// `cluster init`.
    pub initial_cluster: BTreeMap<u64, String>,
    /// Raft's pace.
    pub timeouts: RaftTimeouts,
    /// When checkpoints are due.
    pub checkpoints: CheckpointPolicy,
    /// How many files the node may have open.
    pub files_max: usize,
}

impl ServerOptions {
    /// How many connections of clients leave enough files for everything else.
    fn client_connections_max(&self) -> usize {
        let reserved = (FILES_RESERVED_MIN + PEER_CONNECTIONS_MAX).max(self.files_max / 2);
        self.files_max.saturating_sub(reserved).clamp(1, CLIENT_CONNECTIONS_MAX)
    }
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} ({flag}): {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// The flag that named it.
        flag: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The node did not start.
    #[error(transparent)]
    Node(#[from] NodeError),
}

/// A running node.
pub struct Server {
    node: Arc<Node>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    /// Comes when clients are served no more.
    served: oneshot::Receiver<()>,
}

/// Listeners that are bound and not served yet.
pub struct Listeners {
    clients: TcpListener,
    peers: TcpListener,
}

impl Listeners {
    /// Binds both; a port of 0 is chosen by the system.
    ///
    /// # Errors
    ///
    /// If an address is in use or not this machine's.
    pub async fn bind(listen: SocketAddr, peer_listen: SocketAddr) -> Result<Self, ServerError> {
        Ok(Self {
            clients: bind(listen, "--listen").await?,
            peers: bind(peer_listen, "--peer-listen").await?,
        })
    }

    /// Where peers are listened for.
    ///
    /// # Errors
    ///
    /// If the operating system does not say.
    pub fn peer_address(&self) -> io::Result<SocketAddr> {
        self.peers.local_addr()
    }
}

async fn bind(address: SocketAddr, flag: &'static str) -> Result<TcpListener, ServerError> {
    let failed = |source| ServerError::Listen { address, flag, source };
    TcpListener::bind(address).await.map_err(failed)
}

impl Server {
    /// Starts a node on the runtime it is called on.
    ///
    /// # Errors
    ///
    /// See [`ServerError`]; the message is for the operator.
    pub async fn start(
        options: ServerOptions,
        listeners: Listeners,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, ServerError> {
        let failed =
            |source| ServerError::Listen { address: options.listen, flag: "--listen", source };
        let connections_max = options.client_connections_max();
        let address = listeners.clients.local_addr().map_err(failed)?;
        let peer_address = listeners.peers.local_addr().map_err(failed)?;
        let node = Node::start(
            NodeOptions {
                node_id: options.node_id,
                data_directory: options.data_directory,
                peer_address: options.peer_advertise.unwrap_or_else(|| peer_address.to_string()),
                client_address: options.advertise.unwrap_or_else(|| address.to_string()),
                initial_cluster: options.initial_cluster,
                timeouts: options.timeouts,
                checkpoints: options.checkpoints,
                clock,
            },
            listeners.peers,
        )
        .await?;
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = wire::serve(node.clone(), listeners.clients, connections_max, async move {
            // A server that is dropped stops as well.
            let _ = stopped.await;
        });
        let (ended, served) = oneshot::channel::<()>();
        let serving_node = node.clone();
        node.supervise("client listener", async move {
            if let Err(error) = serving.await {
                serving_node.halt(&format!("the client listener failed: {error}"));
            }
            // Dropped with whatever else becomes of this task.
            drop(ended);
        });
        Ok(Self { node, address, stop: Some(stop), served })
    }

    /// Where clients are listened for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Waits until the node cannot go on, and returns why.
    pub async fn failed(&self) -> String {
        self.node.halted().await
    }

    /// Drains and stops.
    pub async fn stop(mut self) {
        self.node.begin_stop();
        if let Some(stop) = self.stop.take() {
            // Nobody listens any more if serving has ended by itself.
            let _ = stop.send(());
        }
        // Whoever has not read the last answers by then is cut off with the node's other tasks.
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, &mut self.served).await;
        self.node.stop().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A server that is dropped stops serving.
        self.node.begin_stop();
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::clock::SystemClock;

    const PATIENCE: Duration = Duration::from_secs(60);
    const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    /// A cluster of one that serves.
    async fn serving(directory: &std::path::Path) -> Server {
        let listeners = Listeners::bind(ANY_PORT, ANY_PORT).await.unwrap();
        let options = ServerOptions {
            node_id: 1,
            data_directory: directory.to_owned(),
            listen: ANY_PORT,
            peer_listen: ANY_PORT,
            advertise: None,
            peer_advertise: None,
            initial_cluster: [(1, listeners.peer_address().unwrap().to_string())].into(),
            timeouts: RaftTimeouts::default(),
            checkpoints: CheckpointPolicy::default(),
            files_max: 1_024,
        };
        let server = Server::start(options, listeners, Arc::new(SystemClock)).await.unwrap();
        let serves = async {
            while !server.node().is_ready() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, serves).await.expect("it serves");
        server
    }

    async fn halted(server: &Server) -> String {
        let reason = tokio::time::timeout(PATIENCE, server.failed()).await.expect("it halts");
        assert!(!server.node().is_ready(), "halted for {reason}, and says that it serves");
        reason
    }

    /// Kills each long-lived task of a node in turn, on a node of its own.
    #[tokio::test]
    async fn a_node_of_which_any_task_ends_halts_whole_and_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let server = serving(&directory.path().join("names")).await;
        // These have done their work, or wait for somebody to join.
        let finite = ["formation", "joining"];
        let names = server.node().task_names().into_iter().filter(|name| !finite.contains(name));
        let names: Vec<&str> = names.collect();
        for expected in ["leadership", "ticker", "raft", "peer listener", "client listener"] {
            assert!(names.contains(&expected), "{expected} is not among {names:?}");
        }
        server.stop().await;
        let killings = names.iter().map(async |name| {
            let server = serving(&directory.path().join(name)).await;
            server.node().kill_task(name);
            assert_eq!(halted(&server).await, format!("task {name} ended"));
            server.stop().await;
        });
        futures_util::future::join_all(killings).await;
    }

    /// The same for what is not a task of ours.
    #[tokio::test]
    async fn a_node_of_which_a_thread_or_raft_itself_is_gone_halts_whole() {
        let directory = tempfile::tempdir().unwrap();
        for (part, reason) in [
            ("log", "thread quorate-wal panicked: killed by a test"),
            ("checkpoints", "thread checkpoint panicked: killed by a test"),
            ("raft", "task raft ended"),
        ] {
            let server = serving(&directory.path().join(part)).await;
            server.node().kill_part(part).await;
            assert_eq!(halted(&server).await, reason);
            server.stop().await;
        }
    }

    #[tokio::test]
    async fn a_node_that_is_told_to_stop_gives_no_reason() {
        let directory = tempfile::tempdir().unwrap();
        let server = serving(&directory.path().join("node")).await;
        let node = server.node().clone();
        server.stop().await;
        assert_eq!(node.status().halted_reason, None);
    }
}
