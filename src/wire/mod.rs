//! Bytes ⇄ domain types. No decisions.

mod answers;
mod cluster;
mod convert;
mod draining;
mod front;
mod lease;
mod lock;
mod pipeline;
mod received;
mod ring;
mod session;
mod status;
mod unary;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use self::draining::Draining;
use crate::accept::{AcceptPolicy, accept};
use crate::limits::{CALLS_OF_CONNECTION_MAX, FAULTY_CALLS_OF_CONNECTION_MAX, REQUEST_BYTES_MAX};
use crate::proto::DESCRIPTORS;
use crate::proto::v1::cluster_service_server::ClusterServiceServer;
use crate::proto::v1::lease_service_server::LeaseServiceServer;
use crate::proto::v1::lock_service_server::LockServiceServer;
use crate::proto::v1::pipeline_service_server::PipelineServiceServer;
use crate::proto::v1::ring_service_server::RingServiceServer;
use crate::proto::v1::session_service_server::SessionServiceServer;
use crate::raft::Node;
use crate::service::{Admission, Cluster, Leases, Locks, Rings, Sessions};

/// How often the health service looks at the node.
const HEALTH_INTERVAL: Duration = Duration::from_millis(50);

/// Whose health is told.
const HEALTHY: [&str; 6] = [
    "",
    "quorate.v1.SessionService",
    "quorate.v1.LeaseService",
    "quorate.v1.LockService",
    "quorate.v1.RingService",
    "quorate.v1.PipelineService",
];

/// The use cases of one node.
#[derive(Clone)]
struct UseCases {
    sessions: Arc<Sessions>,
    leases: Arc<Leases>,
    locks: Arc<Locks>,
    rings: Arc<Rings>,
    cluster: Arc<Cluster>,
}

impl UseCases {
    fn new(node: &Arc<Node>) -> Result<Self, getrandom::Error> {
        let seed = || {
            let mut seed = [0; 8];
            getrandom::fill(&mut seed).map(|()| u64::from_le_bytes(seed))
        };
        Ok(Self {
            sessions: Arc::new(Sessions::new(node.clone(), seed()?)),
            leases: Arc::new(Leases::new(node.clone(), seed()?)),
            locks: Arc::new(Locks::new(node.clone(), seed()?)),
            rings: Arc::new(Rings::new(node.clone(), seed()?)),
            cluster: Arc::new(Cluster::new(node.clone())),
        })
    }
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name("quorate.v1.SessionService")
        .with_service_name("quorate.v1.LeaseService")
        .with_service_name("quorate.v1.LockService")
        .with_service_name("quorate.v1.RingService")
        .with_service_name("quorate.v1.ClusterService")
        .with_service_name("quorate.v1.PipelineService")
}

/// Serves clients on `listener`, on so many connections at once, until `shutdown`; then drains.
///
/// # Errors
///
/// If the listener fails.
pub async fn serve(
    node: Arc<Node>,
    listener: TcpListener,
    connections_max: usize,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let use_cases = UseCases::new(&node)?;
    let admission = Admission::new();
    let (health, health_service) = tonic_health::server::health_reporter();
    let (drain, draining) = draining::draining();
    node.supervise("health", watch_health(node.clone(), health, draining.clone()));
    let clock = node.clone();
    node.supervise("admission", admission.clone().run(move || clock.monotonic()));
    let pipelines = pipeline::Pipelines::new(use_cases.clone(), draining.clone());
    let front = front(&use_cases, &admission, &draining);
    let policy = AcceptPolicy { port: "client", most: connections_max, replace_silent: None };
    let (connections, accepted) = accept(listener, policy, {
        let admission = admission.clone();
        move |line| {
            let line = line.clone();
            admission.share(move || line.close())
        }
    });
    let shutdown = async move {
        shutdown.await;
        drain.begin();
        node.stop_waiting();
    };
    let rings = ring::RingServer { rings: use_cases.rings };
    let cluster = cluster::ClusterServer { cluster: use_cases.cluster, admission, accepted };
    tonic::transport::Server::builder()
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .max_concurrent_streams(CALLS_OF_CONNECTION_MAX)
        .http2_max_pending_accept_reset_streams(Some(CALLS_OF_CONNECTION_MAX as usize))
        .http2_max_local_error_reset_streams(Some(FAULTY_CALLS_OF_CONNECTION_MAX))
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .layer(front)
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(ClusterServiceServer::new(cluster))
        .add_service(RingServiceServer::new(rings).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(
            PipelineServiceServer::new(pipelines).max_decoding_message_size(REQUEST_BYTES_MAX),
        )
        .serve_with_incoming_shutdown(connections, shutdown)
        .await?;
    Ok(())
}

/// The services that calls are handed to without the router.
fn front(use_cases: &UseCases, admission: &Arc<Admission>, draining: &Draining) -> front::Front {
    let sessions = session::SessionServer { sessions: use_cases.sessions.clone() };
    let leases =
        lease::LeaseServer { leases: use_cases.leases.clone(), draining: draining.clone() };
    let locks = lock::LockServer { locks: use_cases.locks.clone() };
    front::Front {
        sessions: SessionServiceServer::new(sessions).max_decoding_message_size(REQUEST_BYTES_MAX),
        leases: LeaseServiceServer::new(leases).max_decoding_message_size(REQUEST_BYTES_MAX),
        locks: LockServiceServer::new(locks).max_decoding_message_size(REQUEST_BYTES_MAX),
        admission: admission.clone(),
    }
}

/// Keeps `grpc.health.v1` true: SERVING while the node belongs to a cluster, knows a leader and has
/// applied what it knows to be committed, until it drains.
async fn watch_health(node: Arc<Node>, mut health: HealthReporter, mut draining: Draining) {
    let mut drained = std::pin::pin!(draining.begun());
    let mut last = None;
    loop {
        let status =
            if node.is_ready() { ServingStatus::Serving } else { ServingStatus::NotServing };
        if last != Some(status) {
            last = Some(status);
            for service in HEALTHY {
                health.set_service_status(service, status).await;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(HEALTH_INTERVAL) => {}
            () = &mut drained => break,
        }
    }
    end_health(&mut health).await;
    // It ends with the node.
    std::future::pending().await
}

/// Says NOT_SERVING for good, and ends the streams of those who watch once they have heard it: as
/// long as one is open, a node that drains waits for it.
async fn end_health(health: &mut HealthReporter) {
    for service in HEALTHY {
        health.set_service_status(service, ServingStatus::NotServing).await;
        health.clear_service_status(service).await;
        health.set_service_status(service, ServingStatus::NotServing).await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use tonic::Request;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus as Told;
    use tonic_health::pb::health_server::Health as _;
    use tonic_health::server::HealthService;

    use super::*;

    #[tokio::test]
    async fn who_watches_the_health_of_a_node_that_drains_is_told_and_let_go() {
        let mut health = HealthReporter::new();
        let service = HealthService::from_health_reporter(health.clone());
        let asked = || Request::new(HealthCheckRequest::default());
        let watched = service.watch(asked()).await.unwrap().into_inner();
        end_health(&mut health).await;
        let told = watched.map(|told| told.unwrap().status());
        let told = tokio::time::timeout(Duration::from_secs(10), told.collect::<Vec<_>>()).await;
        assert_eq!(told.unwrap().last(), Some(&Told::NotServing));
        let checked = service.check(asked()).await.unwrap().into_inner();
        assert_eq!(checked.status(), Told::NotServing);
    }
}
