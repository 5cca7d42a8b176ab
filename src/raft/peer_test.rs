//! Whom a node listens to.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tonic::Code;
use tonic::transport::Channel;

use super::checkpointer::CheckpointPolicy;
use super::network::{client, connect};
use super::node::{Node, NodeOptions};
use super::replica::{RaftTimeouts, Replica};
use crate::clock::SystemClock;
use crate::proto::peer;
use crate::proto::peer::peer_service_client::PeerServiceClient;
use crate::state::FEATURE_LEVEL;

const PATIENCE: Duration = Duration::from_secs(60);
const OWN: u64 = 1;
const STRANGER: u64 = 9;
/// Far beyond any log of these tests.
const LATER: peer::LogId = peer::LogId { term: 99, index: 1_000 };

struct One {
    node: Arc<Node>,
    peer: PeerServiceClient<Channel>,
    _directory: tempfile::TempDir,
}

impl One {
    /// A cluster of one, which leads.
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener = tokio::net::TcpListener::bind(any_port).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let timeouts = RaftTimeouts::default();
        let options = NodeOptions {
            node_id: OWN,
            data_directory: directory.path().join("node"),
            peer_address: address.clone(),
            client_address: "127.0.0.1:1".to_owned(),
            initial_cluster: BTreeMap::from([(OWN, address.clone())]),
            timeouts,
            checkpoints: CheckpointPolicy::default(),
            clock: Arc::new(SystemClock),
        };
        let node = Node::start(options, listener).await.unwrap();
        let ready = async {
            while !node.is_ready() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ready).await.expect("it leads");
        let peer = client(connect(&address, timeouts.election_timeout).unwrap());
        Self { node, peer, _directory: directory }
    }

    fn replica(&self) -> Arc<Replica> {
        self.node.replica().unwrap()
    }

    fn header(&self, from_node: u64, membership: Option<peer::LogId>) -> peer::Header {
        let identity = self.replica().identity;
        peer::Header {
            cluster_id_high: (identity.cluster_id >> 64) as u64,
            cluster_id_low: identity.cluster_id as u64,
            from_node,
            from_incarnation: 17,
            to_node: OWN,
            to_incarnation: identity.incarnation,
            clock: None,
            membership,
            feature_level: Some(FEATURE_LEVEL),
        }
    }
}

fn vote(node: u64) -> Option<peer::VoteState> {
    Some(peer::VoteState { term: 0, node, committed: false })
}

#[tokio::test]
async fn a_sender_that_is_no_member_is_refused_unless_it_may_know_better() {
    let mut one = One::start().await;
    for (membership, expected) in [
        (None, Code::FailedPrecondition),
        (Some(peer::LogId { term: 0, index: 0 }), Code::FailedPrecondition),
        (Some(LATER), Code::Ok),
    ] {
        let request = peer::VoteRequest {
            header: Some(one.header(STRANGER, membership)),
            vote: vote(STRANGER),
            ..Default::default()
        };
        let answer = one.peer.vote(request).await;
        let code = answer.as_ref().map_or_else(tonic::Status::code, |_| Code::Ok);
        assert_eq!(code, expected, "{membership:?}: {answer:?}");
    }
    one.node.stop().await;
}

#[tokio::test]
async fn nobody_speaks_for_another_node() {
    let mut one = One::start().await;
    let header = one.header(STRANGER, Some(LATER));
    let asked = peer::VoteRequest { header: Some(header), vote: vote(OWN), ..Default::default() };
    let refused = one.peer.vote(asked).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    let beat =
        peer::HeartbeatRequest { header: Some(header), vote: vote(OWN), ..Default::default() };
    let refused = one.peer.heartbeat(beat).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    let append =
        peer::AppendRequest { header: Some(header), vote: vote(OWN), ..Default::default() };
    let refused = one.peer.append(tokio_stream::iter([append])).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    let install = peer::InstallSnapshotRequest {
        header: Some(header),
        vote: vote(OWN),
        ..Default::default()
    };
    let refused = one.peer.install_snapshot(tokio_stream::iter([install])).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    one.node.stop().await;
}

#[tokio::test]
async fn one_garbled_clock_does_not_end_time() {
    let mut one = One::start().await;
    let before = one.node.cluster_time().unwrap();
    let clock =
        peer::Clock { time: u64::MAX, steady: u64::MAX, synced: true, ..Default::default() };
    let header = peer::Header { clock: Some(clock), ..one.header(STRANGER, Some(LATER)) };
    let asked =
        peer::VoteRequest { header: Some(header), vote: vote(STRANGER), ..Default::default() };
    one.peer.vote(asked).await.expect("the message counts");
    let after = one.node.cluster_time().unwrap();
    assert!(after.time.since(before.time) < PATIENCE, "{before:?} {after:?}");
    assert_eq!(one.node.status().warnings.len(), 1);
    one.node.stop().await;
}
