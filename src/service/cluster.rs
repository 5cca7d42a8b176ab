//! The cluster: the use cases.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::error::{Error, ErrorKind};
use super::request::Call;
use crate::raft::{Node, NodeStatus};

/// The cluster use cases of one node.
pub struct Cluster {
    node: Arc<Node>,
}

impl Cluster {
    /// For one node.
    pub fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The node's figures.
    pub fn status(&self, _call: &Call) -> NodeStatus {
        self.node.status()
    }

    /// Forms a cluster of the listed nodes, by their peer addresses.
    ///
    /// # Errors
    ///
    /// If a node is listed twice or without an address, does not answer, or belongs to a cluster.
    pub async fn initialize(
        &self,
        _call: &Call,
        listed: Vec<(u64, String)>,
    ) -> Result<u128, Error> {
        let mut members = BTreeMap::new();
        for (node_id, address) in listed {
            if node_id == 0 || address.is_empty() {
                return Err(Error::invalid(
                    "members",
                    "INVALID_MEMBERS",
                    "each member needs a node_id from 1 and a peer_address (host:port)",
                ));
            }
            if members.insert(node_id, address).is_some() {
                return Err(Error::invalid(
                    "members",
                    "INVALID_MEMBERS",
                    format!("node {node_id} is listed twice"),
                ));
            }
        }
        self.node.initialize(&members).await.map_err(|message| {
            let initialized = message.starts_with("already initialized");
            let (kind, reason) = if initialized {
                (ErrorKind::FailedPrecondition, "ALREADY_INITIALIZED")
            } else {
                (ErrorKind::FailedPrecondition, "CANNOT_INITIALIZE")
            };
            Error::new(kind, reason, message)
        })
    }
}
