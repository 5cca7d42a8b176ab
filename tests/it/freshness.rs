//! What was acknowledged by one node is seen by every other at once.
//!
//! Each round writes through one node and reads through each other, by connections of their own
//! that know no leader: so most requests are forwarded, and most reads rest on a barrier that was
//! asked of another node.

use std::collections::BTreeMap;

use bytes::Bytes;
use quorate::client::SessionId;
use quorate::proto::v1;
use tonic::{Code, Status};

use crate::cluster::{Cluster, eventually};
use crate::direct::{Direct, is_transient, select};
use crate::random::size;

#[tokio::test]
async fn a_write_through_one_node_is_read_through_every_other() {
    rounds(size("QUORATE_TEST_ROUNDS", 100)).await;
}

#[tokio::test]
#[ignore = "soak: a thousand rounds take a minute"]
async fn a_thousand_writes_through_one_node_are_read_through_every_other() {
    rounds(size("QUORATE_TEST_ROUNDS", 1_000)).await;
}

async fn rounds(count: u64) {
    let mut cluster = Cluster::start("freshness").await;
    let directs: Vec<Direct> = cluster.ids().into_iter().map(|id| cluster.direct(id)).collect();
    let mut done = 0;
    let mut disturbed = 0;
    while done < count {
        let writer = usize::try_from(cluster.random.within(0..directs.len() as u64)).unwrap();
        match round(&directs, writer, done).await {
            Ok(()) => done += 1,
            // On a busy machine a leader may change; a write that failed then promises nothing.
            Err(status) => {
                assert!(is_transient(&status), "{status:?}");
                disturbed += 1;
                assert!(disturbed <= count, "more rounds are disturbed than not: {status:?}");
            }
        }
    }
}

/// One session's life: created, updated and deleted through one node.
async fn round(directs: &[Direct], writer: usize, round: u64) -> Result<(), Status> {
    let id = SessionId::mint().unwrap();
    let value = Bytes::from(format!("created in {round}"));
    let create = v1::CreateSessionRequest {
        id: id.reveal().to_owned(),
        attributes: BTreeMap::from([("n".to_owned(), value.clone())]),
        ..v1::CreateSessionRequest::default()
    };
    let created = directs[writer].create(create).await?;
    read_everywhere(directs, &id, created.revision, Some(&value)).await;

    let value = Bytes::from(format!("updated in {round}"));
    let update = v1::UpdateSessionRequest {
        session: Some(select(&id)),
        set_attributes: BTreeMap::from([("n".to_owned(), value.clone())]),
        ..v1::UpdateSessionRequest::default()
    };
    let updated = directs[writer].update(update).await?;
    read_everywhere(directs, &id, updated.revision, Some(&value)).await;

    let delete = v1::DeleteSessionRequest {
        session: Some(select(&id)),
        ..v1::DeleteSessionRequest::default()
    };
    let deleted = directs[writer].delete(delete).await?;
    read_everywhere(directs, &id, deleted.revision, None).await;
    Ok(())
}

async fn read_everywhere(
    directs: &[Direct],
    id: &SessionId,
    revision: u64,
    expected: Option<&Bytes>,
) {
    let reads = directs.iter().map(|direct| read_fresh(direct, id, revision, expected));
    futures_util::future::join_all(reads).await;
}

async fn read_fresh(direct: &Direct, id: &SessionId, revision: u64, expected: Option<&Bytes>) {
    eventually("a read is answered", async || match (direct.get(id).await, expected) {
        (Ok(found), Some(expected)) => {
            let session = found.session.unwrap();
            assert_eq!(session.attributes.get("n"), Some(expected), "stale");
            assert_eq!(session.version, revision, "stale");
            assert!(found.revision >= revision, "{} < {revision}", found.revision);
            Ok(())
        }
        (Ok(found), None) => panic!("a session that was deleted is read: {found:?}"),
        (Err(status), None) if status.code() == Code::NotFound => Ok(()),
        (Err(status), _) if is_transient(&status) => Err(status.to_string()),
        (Err(status), _) => panic!("stale: {status:?}"),
    })
    .await;
}
