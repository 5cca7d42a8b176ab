//! A node as a process runs it: listeners, the node, the services, and their end.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::clock::Clock;
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
    serving: JoinHandle<Result<(), String>>,
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
        let serving = wire::serve(node.clone(), listeners.clients, async move {
            // A server that is dropped stops serving as well.
            let _ = stopped.await;
        });
        let serving = tokio::spawn(async move { serving.await.map_err(|error| error.to_string()) });
        Ok(Self { node, address, stop: Some(stop), serving })
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
    pub async fn failed(&mut self) -> String {
        tokio::select! {
            reason = self.node.halted() => reason,
            served = &mut self.serving => match served {
                Ok(Ok(())) => "the client listener closed".to_owned(),
                Ok(Err(error)) => format!("the client listener failed: {error}"),
                Err(error) => format!("the client listener failed: {error}"),
            },
        }
    }

    /// Drains and stops.
    pub async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            // Nobody listens any more if serving has ended by itself.
            let _ = stop.send(());
        }
        if tokio::time::timeout(DRAIN_TIMEOUT, &mut self.serving).await.is_err() {
            self.serving.abort();
        }
        self.node.stop().await;
    }
}
