//! The cluster: the use cases.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::error::{Error, ErrorKind};
use super::request::Call;
use crate::limits::{FOUNDERS_MAX, NAME_BYTES_MAX};
use crate::raft::{FormationError, Node, NodeStatus, SetTimeError, WriteError};
use crate::state::Timestamp;

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
    pub fn status(&self, _call: &Call<'_>) -> NodeStatus {
        self.node.status()
    }

    /// Forms a cluster of the listed nodes, by their peer addresses.
    ///
    /// # Errors
    ///
    /// If a node is listed twice or without an address, does not answer, or belongs to a cluster.
    pub async fn initialize(
        &self,
        _call: &Call<'_>,
        listed: Vec<(u64, String)>,
    ) -> Result<u128, Error> {
        if listed.len() > FOUNDERS_MAX {
            let (found, limit) = (listed.len() as u64, FOUNDERS_MAX as u64);
            let error = Error::over_limit("members", "nodes", found, limit);
            return Err(error.remedy("a cluster has three or five nodes, seldom seven"));
        }
        let mut members = BTreeMap::new();
        for (node_id, address) in listed {
            if address.len() > NAME_BYTES_MAX {
                let (found, limit) = (address.len() as u64, NAME_BYTES_MAX as u64);
                return Err(Error::over_limit("members", "bytes in an address", found, limit));
            }
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
        self.node.initialize(&members).await.map_err(|error| {
            let reason = match error {
                FormationError::AlreadyInitialized { .. } => "ALREADY_INITIALIZED",
                FormationError::Refused(_) => "CANNOT_INITIALIZE",
            };
            Error::new(ErrorKind::FailedPrecondition, reason, error.to_string())
        })
    }

    /// Sets the cluster's time forward, to the leader's wall clock if `time` is not given. Returns
    /// by how much it leapt.
    ///
    /// # Errors
    ///
    /// If this node does not lead, or `time` lies beyond its wall clock.
    pub async fn set_time(
        &self,
        _call: &Call<'_>,
        time: Option<Timestamp>,
    ) -> Result<Duration, Error> {
        self.node.set_time(time).await.map_err(|error| match error {
            SetTimeError::NotLeader => Error::new(
                ErrorKind::FailedPrecondition,
                "NOT_LEADER",
                "only the leader sets the time, and this node does not lead",
            ),
            SetTimeError::BeyondWallClock => Error::invalid(
                "time",
                "TIME_BEYOND_WALL_CLOCK",
                "time is beyond the leader's wall clock; time cannot be set back, so set that \
                 clock first if it is wrong",
            ),
            SetTimeError::OutcomeUnknown => Error::from(WriteError::OutcomeUnknown),
        })
    }
}
