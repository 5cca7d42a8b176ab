//! Bytes ⇄ domain types. No decisions.

mod cluster;
mod convert;
mod front;
mod pipeline;
mod session;
mod status;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;

use crate::limits::REQUEST_BYTES_MAX;
use crate::proto::DESCRIPTORS;
use crate::proto::v1::cluster_service_server::ClusterServiceServer;
use crate::proto::v1::pipeline_service_server::PipelineServiceServer;
use crate::proto::v1::session_service_server::SessionServiceServer;
use crate::raft::Node;
use crate::service::{Cluster, Sessions};

/// How often the health service looks at the node.
const HEALTH_INTERVAL: Duration = Duration::from_millis(50);

/// Serves clients on `listener` until `shutdown`, then drains.
///
/// # Errors
///
/// If the listener fails.
pub async fn serve(
    node: Arc<Node>,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed)?;
    let sessions = Arc::new(Sessions::new(node.clone(), u64::from_le_bytes(seed)));
    let cluster = Arc::new(Cluster::new(node.clone()));
    let (health, health_service) = tonic_health::server::health_reporter();
    let watching = tokio::spawn(watch_health(node, health));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name("quorate.v1.SessionService")
        .with_service_name("quorate.v1.ClusterService")
        .with_service_name("quorate.v1.PipelineService")
        .build_v1()?;
    let pipelines = pipeline::Pipelines::new(sessions.clone(), cluster.clone());
    let draining = pipelines.draining();
    let shutdown = async move {
        shutdown.await;
        draining.notify_waiters();
    };
    let session_server = SessionServiceServer::new(session::SessionServer { sessions })
        .max_decoding_message_size(REQUEST_BYTES_MAX);
    let served = tonic::transport::Server::builder()
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .max_concurrent_streams(4096)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .layer(front::Front { sessions: session_server })
        .add_service(health_service)
        .add_service(reflection)
        .add_service(ClusterServiceServer::new(cluster::ClusterServer { cluster }))
        .add_service(
            PipelineServiceServer::new(pipelines).max_decoding_message_size(REQUEST_BYTES_MAX),
        )
        .serve_with_incoming_shutdown(
            // The server only sets this itself on listeners that it has opened.
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            shutdown,
        )
        .await;
    watching.abort();
    Ok(served?)
}

/// Keeps `grpc.health.v1` true: SERVING while the node belongs to a cluster, knows a leader and has
/// applied what it knows to be committed.
async fn watch_health(node: Arc<Node>, health: tonic_health::server::HealthReporter) {
    use tonic_health::ServingStatus;
    let mut last = None;
    loop {
        let status =
            if node.is_ready() { ServingStatus::Serving } else { ServingStatus::NotServing };
        if last != Some(status) {
            last = Some(status);
            for service in ["", "quorate.v1.SessionService", "quorate.v1.PipelineService"] {
                health.set_service_status(service, status).await;
            }
        }
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
}
