//! `quorate.v1.ClusterService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::convert::{
    cluster_id_out, duration_out, member_out, status_out, timestamp_in, timestamp_out,
};
use super::status::status;
use super::unary::Asked;
use crate::accept::AcceptCounts;
use crate::proto::v1;
use crate::proto::v1::cluster_service_server::ClusterService;
use crate::service::{Admission, Cluster};

pub(super) struct ClusterServer {
    pub(super) cluster: Arc<Cluster>,
    pub(super) admission: Arc<Admission>,
    pub(super) accepted: Arc<AcceptCounts>,
}

/// Who answers, who leads, and what time it is.
pub(super) fn describe(cluster: &Cluster) -> v1::DescribeResponse {
    let node = cluster.node();
    let members = node.members();
    let leader_id = node.leader_id().unwrap_or(0);
    let leader = members.iter().find(|member| member.node_id == leader_id);
    let cluster_id = node.cluster_id();
    v1::DescribeResponse {
        cluster_id: cluster_id_out(cluster_id),
        node_id: node.node_id(),
        leader_id,
        leader_address: leader.map(|member| member.client_address.clone()).unwrap_or_default(),
        cluster_time: node.cluster_time().map(|stamp| timestamp_out(stamp.time)),
        members: members.into_iter().map(member_out).collect(),
    }
}

/// Resident memory of this process, in bytes; 0 where the system does not say.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|statm| statm.split_whitespace().nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0).saturating_mul(rustix::param::page_size() as u64)
}

#[tonic::async_trait]
impl ClusterService for ClusterServer {
    async fn describe(
        &self,
        _request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        Ok(Response::new(describe(&self.cluster)))
    }

    async fn initialize(
        &self,
        request: Request<v1::InitializeRequest>,
    ) -> Result<Response<v1::InitializeResponse>, Status> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.cluster.node());
        let members = message.members;
        let listed = members.into_iter().map(|m| (m.node_id, m.peer_address)).collect();
        let cluster_id = self.cluster.initialize(&call, listed).await.map_err(status)?;
        Ok(Response::new(v1::InitializeResponse { cluster_id: format!("{cluster_id:032x}") }))
    }

    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let (asked, _) = Asked::of(request);
        let call = asked.call(self.cluster.node());
        let mut response = status_out(self.cluster.status(&call), resident_bytes());
        response.client_connections = self.accepted.open() as u64;
        response.refused_connections = self.accepted.refused();
        response.stuck_connections = self.admission.stuck_connections();
        response.answer_bytes = self.admission.held_bytes() as u64;
        response.request_panics = self.admission.panics();
        Ok(Response::new(response))
    }

    async fn set_time(
        &self,
        request: Request<v1::SetTimeRequest>,
    ) -> Result<Response<v1::SetTimeResponse>, Status> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.cluster.node());
        let time = timestamp_in("time", message.time).map_err(status)?;
        let leap = self.cluster.set_time(&call, time).await.map_err(status)?;
        let now = self.cluster.node().cluster_time();
        Ok(Response::new(v1::SetTimeResponse {
            leap: Some(duration_out(leap)),
            cluster_time: now.map(|stamp| timestamp_out(stamp.time)),
        }))
    }
}
