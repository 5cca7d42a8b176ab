//! How a cluster comes to be, once.
//!
//! Only the lowest listed node forms a cluster by itself, and only after every listed node has
//! answered that it is empty. It draws the cluster's id, makes each node a member durably, and
//! then lets Raft begin with a membership that names every node's incarnation. A crash in the
//! middle is harmless: who was adopted stays adopted, and the lowest node goes on where it was.
//!
//! A node whose disk was emptied finds itself in the membership under another incarnation. It may
//! have voted and acknowledged what it no longer knows, so it must never take part under its old
//! id: it stops, and says what to do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::errors::{InitializeError, RaftError};
use serde::{Deserialize, Serialize};

use super::network::{client, connect};
use super::node::{Node, random_cluster_id};
use super::recovery::RecoveryError;
use super::types::Member;
use crate::proto::peer;
use crate::storage::envelope;

/// How often nodes that wait for each other ask again.
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// How long one question may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// In place of the election timeout, for connections of formation: nothing is urgent here, and
/// nodes that have just started on a busy machine may be slow.
const PATIENCE: Duration = Duration::from_secs(4);
/// Version of the envelope around a founding.
const FOUNDING_VERSION: u8 = 1;

/// The cluster that a node belongs to, as it was founded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Founding {
    pub(super) cluster_id: u128,
    pub(super) members: BTreeMap<u64, Member>,
    /// Whether this node's log has been made. From then on a node without it has lost what it
    /// acknowledged.
    pub(super) has_log: bool,
}

#[derive(Serialize, Deserialize)]
struct FoundingV1 {
    members: Vec<(u64, String, String, u64)>,
    has_log: bool,
}

impl Founding {
    pub(super) fn encode(&self) -> Bytes {
        let members = self
            .members
            .iter()
            .map(|(node, member)| {
                let Member { peer_address, client_address, incarnation } = member.clone();
                (*node, peer_address, client_address, incarnation)
            })
            .collect();
        let bytes =
            envelope::encode(FOUNDING_VERSION, &FoundingV1 { members, has_log: self.has_log });
        bytes.expect("what is known of a few members is small").into()
    }

    pub(super) fn decode(cluster_id: u128, bytes: &[u8]) -> Result<Self, RecoveryError> {
        let founding: FoundingV1 =
            envelope::decode(FOUNDING_VERSION, bytes).map_err(RecoveryError::new)?;
        let members = founding
            .members
            .into_iter()
            .map(|(node, peer_address, client_address, incarnation)| {
                (node, Member { peer_address, client_address, incarnation })
            })
            .collect();
        Ok(Self { cluster_id, members, has_log: founding.has_log })
    }
}

pub(super) fn member_out((node_id, member): (u64, Member)) -> peer::Member {
    let Member { peer_address, client_address, incarnation } = member;
    peer::Member { node_id, peer_address, client_address, incarnation }
}

pub(super) fn member_in(member: peer::Member) -> (u64, Member) {
    let peer::Member { node_id, peer_address, client_address, incarnation } = member;
    (node_id, Member { peer_address, client_address, incarnation })
}

/// Takes part in the formation of the node's initial cluster until there is one.
pub(super) async fn run(node: Arc<Node>) {
    let listed = node.options.initial_cluster.clone();
    let lowest = listed.keys().next() == Some(&node.options.node_id);
    let mut said = String::new();
    loop {
        if let Some(replica) = node.replica()
            && !(lowest && replica.is_pristine())
        {
            return;
        }
        match attempt(&node, &listed, lowest).await {
            Ok(()) => {}
            Err(Obstacle::Final(reason)) => return node.halt.because(&reason),
            Err(Obstacle::Waiting(reason)) => {
                if said != reason {
                    tracing::info!(reason, "waiting for the cluster to form");
                    said = reason;
                }
            }
        }
        tokio::time::sleep(ASK_INTERVAL).await;
    }
}

enum Obstacle {
    /// Try again.
    Waiting(String),
    /// Only an operator can help.
    Final(String),
}

async fn attempt(
    node: &Arc<Node>,
    listed: &BTreeMap<u64, String>,
    lowest: bool,
) -> Result<(), Obstacle> {
    let found = ask_all(node, listed).await;
    for answer in found.values().flatten() {
        check_for_impostor(node, answer)?;
    }
    if !lowest {
        return Err(Obstacle::Waiting("the lowest listed node forms the cluster".to_owned()));
    }
    let founded = found_with(node, listed, found).await;
    founded.map(|_| ()).map_err(|error| Obstacle::Waiting(error.to_string()))
}

/// Stops a node whose id belongs to another life of it.
fn check_for_impostor(node: &Node, answer: &peer::IdentifyResponse) -> Result<(), Obstacle> {
    let cluster_id = cluster_id_of(answer);
    let own_cluster = node.founding().map(|founding| founding.cluster_id);
    if cluster_id == 0 || own_cluster == Some(cluster_id) {
        return Ok(());
    }
    if let Some(own) = own_cluster {
        return Err(Obstacle::Final(format!(
            "node {} at {} belongs to cluster {cluster_id:032x}, this node to {own:032x}; correct \
             --initial-cluster or --data-dir",
            answer.node_id, answer.peer_address
        )));
    }
    let id = node.options.node_id;
    match answer.members.iter().find(|member| member.node_id == id) {
        Some(member) if member.incarnation == node.incarnation => Ok(()),
        Some(member) => Err(Obstacle::Final(format!(
            "the cluster {cluster_id:032x} knows node {id} with other data than {} holds \
             (incarnation {:016x} there, {:016x} here); a node whose disk was lost must not come \
             back under its old id, as it has forgotten its votes and what it acknowledged: bring \
             back its data directory, or leave it out",
            node.options.data_directory.display(),
            member.incarnation,
            node.incarnation,
        ))),
        None => Err(Obstacle::Final(format!(
            "node {} already belongs to cluster {cluster_id:032x}, of which node {id} is not a \
             member; start this node without --initial-cluster and add it to that cluster",
            answer.node_id
        ))),
    }
}

fn cluster_id_of(answer: &peer::IdentifyResponse) -> u128 {
    u128::from(answer.cluster_id_high) << 64 | u128::from(answer.cluster_id_low)
}

type Answers = BTreeMap<u64, Result<peer::IdentifyResponse, String>>;

/// Asks every other listed node who it is.
async fn ask_all(node: &Node, listed: &BTreeMap<u64, String>) -> Answers {
    let own = node.options.node_id;
    let questions = listed.iter().filter(|(id, _)| **id != own).map(|(id, address)| async move {
        let answer = ask(own, *id, address).await;
        let answer = answer.and_then(|answer| {
            if answer.node_id == *id {
                Ok(answer)
            } else {
                Err(format!("{address} is node {}, not node {id}", answer.node_id))
            }
        });
        (*id, answer)
    });
    futures_util::future::join_all(questions).await.into_iter().collect()
}

async fn ask(
    from_node: u64,
    to_node: u64,
    address: &str,
) -> Result<peer::IdentifyResponse, String> {
    let channel = connect(address, PATIENCE).map_err(|error| error.to_string())?;
    let mut request = tonic::Request::new(peer::IdentifyRequest { from_node, to_node });
    request.set_timeout(ASK_TIMEOUT);
    let answer = client(channel).identify(request).await.map_err(|status| {
        format!("node {to_node} at {address} does not answer ({})", status.code())
    })?;
    Ok(answer.into_inner())
}

/// Why no cluster was formed; each in one line that says which node stands in the way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormationError {
    /// There is one already.
    #[error("already initialized: node {node_id} belongs to cluster {cluster_id:032x}")]
    AlreadyInitialized {
        /// Who belongs to it.
        node_id: u64,
        /// Which.
        cluster_id: u128,
    },
    /// Something is in the way that may go.
    #[error("{0}")]
    Refused(String),
}

impl From<String> for FormationError {
    fn from(reason: String) -> Self {
        Self::Refused(reason)
    }
}

/// Forms a cluster of the listed nodes; for an operator.
pub(super) async fn found(
    node: &Arc<Node>,
    listed: &BTreeMap<u64, String>,
) -> Result<u128, FormationError> {
    let own = node.options.node_id;
    if !listed.contains_key(&own) {
        let reason = format!("node {own}, which was asked, is not among the listed nodes");
        return Err(FormationError::Refused(reason));
    }
    let found = ask_all(node, listed).await;
    found_with(node, listed, found).await
}

/// Goes on with what the listed nodes answered, as far as it can. Idempotent.
async fn found_with(
    node: &Arc<Node>,
    listed: &BTreeMap<u64, String>,
    found: Answers,
) -> Result<u128, FormationError> {
    let founding = match node.founding() {
        Some(founding) => {
            if node.replica().is_some_and(|replica| !replica.is_pristine()) {
                return Err(FormationError::AlreadyInitialized {
                    node_id: node.options.node_id,
                    cluster_id: founding.cluster_id,
                });
            }
            founding
        }
        None => draw(node, listed, found)?,
    };
    node.accept(&founding)?;
    adopt_all(node, &founding).await?;
    let replica = node.become_member().await.map_err(|error| error.to_string())?;
    match replica.raft.initialize(founding.members.clone()).await {
        // Not allowed: it has begun meanwhile.
        Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
        Err(error) => return Err(error.to_string().into()),
    }
    tracing::info!(
        cluster_id = %format_args!("{:032x}", founding.cluster_id),
        nodes = founding.members.len(),
        "cluster formed"
    );
    Ok(founding.cluster_id)
}

/// Draws a new cluster, if every listed node is empty.
fn draw(
    node: &Node,
    listed: &BTreeMap<u64, String>,
    found: Answers,
) -> Result<Founding, FormationError> {
    let own = node.options.node_id;
    let mut members = BTreeMap::from([(
        own,
        Member {
            peer_address: listed.get(&own).cloned().unwrap_or_default(),
            client_address: node.options.client_address.clone(),
            incarnation: node.incarnation,
        },
    )]);
    for (id, answer) in found {
        let answer = answer?;
        let cluster_id = cluster_id_of(&answer);
        if cluster_id != 0 || answer.initialized {
            return Err(FormationError::AlreadyInitialized { node_id: id, cluster_id });
        }
        members.insert(
            id,
            Member {
                peer_address: listed.get(&id).cloned().unwrap_or_default(),
                client_address: answer.client_address,
                incarnation: answer.incarnation,
            },
        );
    }
    let cluster_id = random_cluster_id().map_err(|error| error.to_string())?;
    Ok(Founding { cluster_id, members, has_log: false })
}

async fn adopt_all(node: &Node, founding: &Founding) -> Result<(), String> {
    for (id, member) in &founding.members {
        if *id == node.options.node_id {
            continue;
        }
        let channel = connect(&member.peer_address, PATIENCE).map_err(|error| error.to_string())?;
        let mut request = tonic::Request::new(peer::AdoptRequest {
            cluster_id_high: (founding.cluster_id >> 64) as u64,
            cluster_id_low: founding.cluster_id as u64,
            members: founding.members.clone().into_iter().map(member_out).collect(),
            to_node: *id,
            to_incarnation: member.incarnation,
        });
        request.set_timeout(ASK_TIMEOUT);
        client(channel).adopt(request).await.map_err(|status| {
            format!(
                "node {id} does not join: {}; if its disk was emptied while the cluster was \
                     being formed, empty the data directories of all listed nodes",
                status.message()
            )
        })?;
    }
    Ok(())
}
