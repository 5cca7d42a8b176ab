//! What rests on the feature level and on the cluster's clock, through every layer.

use std::time::Duration;

use quorate::client::{Client, Error, NewSession, ReadOptions};
use quorate::proto::v1;
use quorate::proto::v1::cluster_service_client::ClusterServiceClient;
use quorate::proto::v1::session_service_client::SessionServiceClient;
use quorate::server::Server;
use quorate::state::FEATURE_LEVEL;
use tonic::{Code, Status};

use crate::nodes::{PATIENCE, eventually, three_nodes};

async fn raised(servers: &[Server]) {
    eventually("all nodes are at the level of this build", async || {
        let statuses = servers.iter().map(|server| server.node().status());
        let well = statuses.into_iter().all(|status| {
            status.feature_level == FEATURE_LEVEL && status.feature_level_obstacle.is_none()
        });
        well.then_some(())
    })
    .await;
}

fn client(servers: &[Server], timeout: Duration) -> Client {
    let addresses = servers.iter().map(|server| server.address().to_string());
    Client::builder().endpoints(addresses).timeout(timeout).build().unwrap()
}

/// Each node's word travels with its answers to heartbeats, nobody's request.
#[tokio::test]
async fn a_new_cluster_comes_to_the_level_of_its_nodes() {
    let directory = tempfile::tempdir().unwrap();
    let servers = three_nodes(directory.path()).await;
    raised(&servers).await;
    let digests = eventually("all nodes have applied the raise", async || {
        let statuses: Vec<_> = servers.iter().map(|server| server.node().status()).collect();
        let same = statuses.iter().all(|it| it.applied_index == statuses[0].applied_index);
        same.then(|| statuses.into_iter().map(|it| it.state_digest).collect::<Vec<_>>())
    })
    .await;
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
    for server in servers {
        server.stop().await;
    }
}

async fn create(server: &Server, sent: i64, lifetime: i64) -> Result<(), Status> {
    let endpoint = format!("http://{}", server.address());
    let mut cluster = ClusterServiceClient::connect(endpoint.clone()).await.unwrap();
    let described = cluster.describe(v1::DescribeRequest {}).await?.into_inner();
    let now = described.cluster_time.ok_or_else(|| Status::unavailable("no time yet"))?;
    let now = now.seconds * 1_000 + i64::from(now.nanos) / 1_000_000;
    let time = |millis: i64| prost_types::Timestamp {
        seconds: millis / 1_000,
        nanos: i32::try_from(millis % 1_000).unwrap() * 1_000_000,
    };
    let context = v1::RequestContext {
        request_id: 7,
        first_sent_time: Some(time(now + sent)),
        expire_time: Some(time(now + sent + lifetime)),
        ..Default::default()
    };
    let request = v1::CreateSessionRequest { context: Some(context), ..Default::default() };
    let mut sessions = SessionServiceClient::connect(endpoint).await.unwrap();
    sessions.create_session(request).await.map(drop)
}

#[tokio::test]
async fn a_clock_may_be_ahead_by_a_little() {
    let directory = tempfile::tempdir().unwrap();
    let servers = three_nodes(directory.path()).await;
    raised(&servers).await;
    for server in &servers {
        // The longest lifetime that there is, of a clock that is right and of one that is ahead.
        for sent in [0, 5, 3_000] {
            eventually("the session is made", async || match create(server, sent, 60_000).await {
                Ok(()) => Some(()),
                Err(status) if status.code() == Code::Unavailable => None,
                Err(status) => panic!("{sent} ms ahead: {status:?}"),
            })
            .await;
        }
        let far = create(server, 55_000, 4_000).await.unwrap_err();
        assert_eq!(far.code(), Code::InvalidArgument, "{far:?}");
        assert!(far.message().contains("first_sent_time is more than 5 s ahead"), "{far:?}");
        let long = create(server, 0, 60_001).await.unwrap_err();
        assert_eq!(long.code(), Code::InvalidArgument, "{long:?}");
    }
    for server in servers {
        server.stop().await;
    }
}

#[tokio::test]
async fn a_local_read_can_bound_its_age() {
    let directory = tempfile::tempdir().unwrap();
    let mut servers = three_nodes(directory.path()).await;
    let all = client(&servers, PATIENCE);
    let created = all.sessions().create(NewSession::new()).await.unwrap();
    let local = || ReadOptions::new().local(created.version);
    for server in &servers {
        let one = client(std::slice::from_ref(server), PATIENCE);
        let bounded = local().max_staleness(PATIENCE);
        let found = one.sessions().get_with(&created.id, bounded).await.unwrap();
        assert_eq!(found.value.version, created.version);
    }
    // The others gone, what the last one has gets older, whether it led or not.
    let last = servers.pop().unwrap();
    for server in servers {
        server.stop().await;
    }
    let one = client(std::slice::from_ref(&last), Duration::from_millis(300));
    let bounded = || local().max_staleness(Duration::from_millis(400));
    eventually("what the node has is too old", async || {
        match one.sessions().get_with(&created.id, bounded()).await {
            Err(Error::Unavailable { reason, .. }) if reason == "TOO_STALE" => Some(()),
            _ => None,
        }
    })
    .await;
    let found = one.sessions().get_with(&created.id, local()).await.unwrap();
    assert_eq!(found.value.version, created.version);
    last.stop().await;
}
