//! The cluster.

use super::{duration_out, timestamp_out};
use crate::proto::v1;
use crate::raft::{MemberStatus, NodeStatus, Role};

pub(in crate::wire) fn member_out(member: MemberStatus) -> v1::Member {
    v1::Member {
        node_id: member.node_id,
        peer_address: member.peer_address,
        client_address: member.client_address,
        incarnation: format!("{:016x}", member.incarnation),
        voter: member.voter,
    }
}

pub(in crate::wire) fn cluster_id_out(cluster_id: Option<u128>) -> String {
    cluster_id.map(|id| format!("{id:032x}")).unwrap_or_default()
}

fn role_out(role: Role) -> v1::NodeRole {
    match role {
        Role::Uninitialized => v1::NodeRole::Uninitialized,
        Role::Leader => v1::NodeRole::Leader,
        Role::Follower => v1::NodeRole::Follower,
        Role::Candidate => v1::NodeRole::Candidate,
        Role::Learner => v1::NodeRole::Learner,
    }
}

pub(in crate::wire) fn status_out(status: NodeStatus, resident_bytes: u64) -> v1::StatusResponse {
    v1::StatusResponse {
        cluster_id: cluster_id_out(status.cluster_id),
        node_id: status.node_id,
        role: role_out(status.role) as i32,
        term: status.term,
        leader_id: status.leader_id.unwrap_or(0),
        last_log_index: status.last_log_index,
        committed_index: status.committed_index,
        applied_index: status.applied_index,
        snapshot_index: status.snapshot_index,
        purged_index: status.purged_index,
        revision: status.revision,
        state_digest: status.state_digest,
        cluster_time: status.cluster_time.map(|stamp| timestamp_out(stamp.time)),
        sessions: status.sessions,
        checkpoint_lag_entries: status.checkpoint_lag_entries,
        checkpoint_lag_bytes: status.checkpoint_lag_bytes,
        checkpoint_age: status.checkpoint_age.map(duration_out),
        fsync_p99: Some(duration_out(status.fsync_p99)),
        resident_bytes,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        members: status.members.into_iter().map(member_out).collect(),
        feature_level: status.feature_level,
        supported_feature_level: status.supported_feature_level,
        feature_level_obstacle: status.feature_level_obstacle.unwrap_or_default(),
        halted_reason: status.halted_reason.unwrap_or_default(),
        warnings: status.warnings,
        ..v1::StatusResponse::default()
    }
}
