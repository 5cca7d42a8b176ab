//! Without a majority nothing is promised: requests fail in time and say so.

use std::time::Duration;

use quorate::client::{Error, NewSession, Update};
use quorate::proto::v1::{Consistency, UpdateSessionRequest};
use tonic::Code;

use crate::cluster::{Cluster, PATIENCE, eventually};
use crate::direct::{reason, select};

/// Deadline of requests that cannot succeed.
const SHORT: Duration = Duration::from_secs(2);

#[tokio::test]
async fn without_a_majority_requests_fail_in_time_and_local_reads_are_answered() {
    let mut cluster = Cluster::start("majority").await;
    let sessions = cluster.client().sessions();
    let created = sessions.create(NewSession::new().attribute("n", "0")).await.unwrap();
    cluster.agree().await;
    let survivor = cluster.leader().await;
    for id in cluster.others(survivor) {
        cluster.kill(id);
    }

    let client = cluster.client_within(SHORT).sessions();
    let write = client.update(&created.id, Update::new().set("n", "1"));
    let write = tokio::time::timeout(PATIENCE, write).await.expect("a write ends");
    assert!(
        matches!(
            write,
            Err(Error::OutcomeUnknown { .. }
                | Error::Unavailable { .. }
                | Error::DeadlineExceeded { .. })
        ),
        "{write:?}"
    );
    let read = tokio::time::timeout(PATIENCE, client.get(&created.id)).await.expect("a read ends");
    assert!(
        matches!(read, Err(Error::Unavailable { .. } | Error::DeadlineExceeded { .. })),
        "{read:?}"
    );

    // Without the library in between: a code and a reason that say the same.
    let direct = cluster.direct(survivor).without_timeout();
    let update = UpdateSessionRequest {
        session: Some(select(&created.id)),
        set_attributes: [("n".to_owned(), "2".into())].into(),
        ..UpdateSessionRequest::default()
    };
    let answers = async { tokio::join!(direct.update(update), direct.get(&created.id)) };
    let (write, read) = tokio::time::timeout(PATIENCE, answers).await.expect("both end");
    let (write, read) = (write.unwrap_err(), read.unwrap_err());
    match write.code() {
        Code::Unavailable => assert_eq!(reason(&write), "NO_LEADER", "{write:?}"),
        Code::DeadlineExceeded => assert_eq!(reason(&write), "OUTCOME_UNKNOWN", "{write:?}"),
        _ => panic!("{write:?}"),
    }
    assert_eq!((read.code(), reason(&read).as_str()), (Code::Unavailable, "NO_LEADER"));

    let local = direct.get_with(&created.id, Consistency::Local).await.unwrap();
    assert_eq!(local.session.unwrap().version, created.version);

    let id = created.id.reveal();
    for command in [vec!["session", "get", id], vec!["session", "set", id, "n=3"]] {
        let output = cluster.cli(&[&["--timeout=1s"], command.as_slice()].concat()).await;
        assert_eq!(output.code, 75, "{output:?}");
        assert_eq!(output.stdout, "");
        assert!(output.stderr.starts_with("quorate: "), "{output:?}");
    }
    let endpoint = format!("--endpoints={}", cluster.address(survivor));
    let arguments = [&endpoint, "session", "get", "--local", "--output=json", id];
    let output = crate::cluster::run(arguments.map(str::to_owned).to_vec(), Vec::new()).await;
    assert_eq!(output.code, 0, "{output:?}");
    eventually("the survivor's health says that it does not serve", async || {
        match direct.serving().await {
            Ok(false) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;

    for id in cluster.others(survivor) {
        cluster.spawn(id);
    }
    cluster.all_serving().await;
    let session = sessions.get(&created.id).await.unwrap();
    let n = &session.attributes["n"][..];
    assert!([b"0", b"1", b"2", b"3"].iter().any(|value| &value[..] == n), "{session:?}");
    sessions.update(&created.id, Update::new().set("n", "4")).await.unwrap();
    assert_eq!(sessions.get(&created.id).await.unwrap().attributes["n"], "4");
    cluster.agree().await;
}
