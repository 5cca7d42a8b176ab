//! Rings through every layer: three nodes in one process, asked one by one.

use std::time::Duration;

use quorate::client::{
    Client, Error, LeaseOptions, NewRingMember, Ring, RingReadOptions, Transport,
};
use quorate::proto::v1;
use quorate::proto::v1::ring_service_client::RingServiceClient;
use quorate::server::Server;
use tonic::transport::Channel;

use crate::nodes::{PATIENCE, eventually, three_nodes};

const RING: &str = "billing";

fn addresses(servers: &[Server]) -> Vec<String> {
    servers.iter().map(|server| server.address().to_string()).collect()
}

/// A client of the cluster, and one call by call of each node alone.
async fn clients(servers: &[Server]) -> (Client, Vec<RingServiceClient<Channel>>) {
    let builder = Client::builder().endpoints(addresses(servers)).timeout(PATIENCE);
    let client = builder.connect().await.unwrap();
    let mut direct = Vec::new();
    for address in addresses(servers) {
        direct.push(RingServiceClient::connect(format!("http://{address}")).await.unwrap());
    }
    (client, direct)
}

fn get_ring(consistency: v1::Consistency) -> v1::GetRingRequest {
    v1::GetRingRequest {
        ring: RING.to_owned(),
        consistency: consistency.into(),
        ..Default::default()
    }
}

fn names(ring: &v1::GetRingResponse) -> Vec<&str> {
    ring.members.iter().map(|member| member.name.as_str()).collect()
}

/// Waits until a node has only the first member left, and the ring's revision has passed `before`:
/// the other is hidden first, and swept then.
async fn swept(node: &mut RingServiceClient<Channel>, before: u64) -> u64 {
    eventually("the second member is swept", async || {
        let found = node.get_ring(get_ring(v1::Consistency::Local)).await.unwrap().into_inner();
        if names(&found) != ["one"] || found.ring_revision <= before {
            return None;
        }
        assert_eq!(found.shares[0].fraction, 1.0);
        Some(found.ring_revision)
    })
    .await
}

/// Every node places the keys as this client does by itself.
async fn agree(ring: &Ring, nodes: &mut [RingServiceClient<Channel>]) {
    let keys: Vec<String> = (0..100).map(|number| format!("key-{number}")).collect();
    let expected: Vec<Vec<String>> = keys
        .iter()
        .map(|key| ring.locate_distinct(key, 2).into_iter().map(|it| it.name.clone()).collect())
        .collect();
    for node in nodes {
        let request = v1::LocateKeysRequest {
            ring: RING.to_owned(),
            keys: keys.iter().map(|key| key.clone().into()).collect(),
            count: 2,
            ..Default::default()
        };
        let located = node.locate_keys(request).await.unwrap().into_inner();
        let found: Vec<_> = located.placements.into_iter().map(|it| it.members).collect();
        assert_eq!(found, expected);
        assert_eq!(located.ring_revision, ring.revision());
        assert_eq!(located.algorithm_version, quorate::placement::ALGORITHM_VERSION);
    }
}

#[tokio::test]
async fn a_member_leaves_with_its_lease_on_every_node() {
    let directory = tempfile::tempdir().unwrap();
    let servers = three_nodes(directory.path()).await;
    let (client, mut nodes) = clients(&servers).await;
    let rings = client.rings();

    // One that is kept alive and one that is not.
    let kept = client.leases().grant(LeaseOptions::new()).await.unwrap();
    let ttl = Duration::from_secs(3);
    let (left_alone, _) = client.leases().grant_only(LeaseOptions::new().ttl(ttl)).await.unwrap();
    let one = NewRingMember::new("one").address("10.0.0.1:80").weight(3).tag("zone", "east");
    let first = rings.join(RING, kept.id(), one).await.unwrap();
    let two = NewRingMember::new("two").address("10.0.0.2:80");
    let second = rings.join(RING, left_alone, two).await.unwrap();
    assert!(first.revision < second.revision);
    assert!(second.timing.remaining <= ttl);
    assert_eq!(client.leases().get(left_alone).await.unwrap().value.ring_members, 1);

    let mut ring = rings.get(RING).await.unwrap();
    assert_eq!(ring.revision(), second.revision);
    assert!(!ring.is_stale(second.revision));
    assert_eq!(ring.member("one").unwrap().tags["zone"], "east");
    agree(&ring, &mut nodes).await;
    for node in &mut nodes {
        let found = node.get_ring(get_ring(v1::Consistency::Linearizable)).await.unwrap();
        let found = found.into_inner();
        assert_eq!(names(&found), ["one", "two"]);
        let shares: Vec<f64> = found.shares.iter().map(|share| share.fraction).collect();
        let own: Vec<f64> = ring.shares().into_iter().map(|(_, share)| share).collect();
        assert_eq!(shares, own);
        assert!((shares[0] - 0.75).abs() < 0.1, "{shares:?}");
    }

    // Nobody renews the second lease: each node removes the member, and they agree on when.
    let mut revisions = Vec::new();
    for node in &mut nodes {
        revisions.push(swept(node, second.revision).await);
    }
    assert!(revisions.iter().all(|revision| *revision == revisions[0]), "{revisions:?}");

    // Whoever holds the ring learns by its revision that it is stale.
    assert!(ring.is_stale(revisions[0]));
    assert_eq!(ring.members().len(), 2);
    assert!(ring.refresh().await.unwrap());
    assert_eq!(ring.revision(), revisions[0]);
    assert_eq!(ring.locate("any key").unwrap().name, "one");
    assert!(!ring.refresh().await.unwrap());
    agree(&ring, &mut nodes).await;

    // The last one goes with its lease, and the ring with it.
    kept.revoke().await.unwrap();
    for node in &mut nodes {
        let empty = node.get_ring(get_ring(v1::Consistency::Linearizable)).await.unwrap_err();
        assert_eq!(empty.code(), tonic::Code::NotFound);
    }
    assert!(ring.refresh().await.unwrap());
    assert!(ring.locate("any key").is_none());
    for server in servers {
        server.stop().await;
    }
}

#[tokio::test]
async fn what_cannot_be_done_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let servers = three_nodes(directory.path()).await;
    for transport in [Transport::Pipeline, Transport::Unary] {
        let builder = Client::builder().endpoints(addresses(&servers)).transport(transport);
        let client = builder.timeout(PATIENCE).connect().await.unwrap();
        let rings = client.rings();
        let reason = |error: Error| error.reason().to_owned();

        let empty = rings.get(RING).await.unwrap_err();
        assert!(matches!(empty, Error::NotFound { .. }), "{empty:?}");
        assert_eq!(reason(empty), "RING_EMPTY");
        let options = RingReadOptions::new();
        let located = rings.locate(RING, ["key"], 1, options).await;
        assert_eq!(reason(located.unwrap_err()), "RING_EMPTY");

        let lease = client.leases().grant(LeaseOptions::new()).await.unwrap();
        let other = client.leases().grant(LeaseOptions::new()).await.unwrap();
        let joined = rings.join(RING, lease.id(), NewRingMember::new("one")).await.unwrap();
        let taken = rings.join(RING, other.id(), NewRingMember::new("one")).await.unwrap_err();
        assert!(matches!(taken, Error::AlreadyExists { .. }), "{taken:?}");
        assert_eq!(reason(taken), "MEMBER_EXISTS");
        let weightless = NewRingMember::new("two").weight(0);
        let weightless = rings.join(RING, other.id(), weightless).await.unwrap_err();
        assert_eq!(reason(weightless), "INVALID_WEIGHT");
        let nameless = rings.join(RING, other.id(), NewRingMember::new("")).await.unwrap_err();
        assert_eq!(reason(nameless), "INVALID_NAME");
        let none: [&str; 0] = [];
        let nothing = rings.locate(RING, none, 1, options).await.unwrap_err();
        assert_eq!(reason(nothing), "INVALID_KEYS");

        // It joins again as it is: nothing has changed for anybody.
        let again = rings.join(RING, lease.id(), NewRingMember::new("one")).await.unwrap();
        assert_eq!(again.revision, joined.revision);
        let heavier = NewRingMember::new("one").weight(2);
        let heavier = rings.join(RING, lease.id(), heavier).await.unwrap();
        assert!(heavier.revision > joined.revision);

        let not_its_own = rings.leave(RING, "one", Some(other.id())).await.unwrap_err();
        assert_eq!(reason(not_its_own), "MEMBER_NOT_FOUND");
        rings.leave(RING, "one", Some(lease.id())).await.unwrap();
        let gone = rings.leave(RING, "one", None).await.unwrap_err();
        assert_eq!(reason(gone), "MEMBER_NOT_FOUND");
        lease.revoke().await.unwrap();
        other.revoke().await.unwrap();
    }
    for server in servers {
        server.stop().await;
    }
}
