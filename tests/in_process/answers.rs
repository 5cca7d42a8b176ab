//! What a node holds for those who ask much, take little, or say nothing.

use std::net::SocketAddr;

use quorate::client::{Client, NewSession};
use quorate::limits::{
    ANSWER_BYTES_OF_NODE_MAX, ANSWER_SHARE_OF_FREE, ATTRIBUTE_NAMES_MAX, FILES_RESERVED_MIN,
    PEER_CONNECTIONS_MAX,
};
use quorate::proto::v1;
use quorate::proto::v1::cluster_service_client::ClusterServiceClient;
use quorate::proto::v1::pipeline_request::Request;
use quorate::proto::v1::pipeline_response::Response;
use quorate::proto::v1::pipeline_service_client::PipelineServiceClient;
use quorate::proto::v1::session_service_client::SessionServiceClient;
use quorate::server::Server;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

use crate::nodes::{PATIENCE, eventually, three_nodes, three_nodes_with};

async fn client(servers: &[Server]) -> Client {
    let endpoints = servers.iter().map(|server| server.address().to_string());
    Client::builder().endpoints(endpoints).timeout(PATIENCE).connect().await.unwrap()
}

async fn channel(address: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

fn selector(id: &str) -> v1::SessionSelector {
    let selector = Some(v1::session_selector::Selector::Id(id.to_owned()));
    v1::SessionSelector { selector }
}

async fn status(channel: &Channel) -> v1::StatusResponse {
    let mut cluster = ClusterServiceClient::new(channel.clone());
    cluster.status(v1::StatusRequest {}).await.unwrap().into_inner()
}

#[tokio::test]
async fn what_a_read_names_is_limited_and_read_once() {
    let directory = tempfile::tempdir().unwrap();
    let servers = three_nodes(directory.path()).await;
    let large = vec![7; 256 * 1024];
    let new = NewSession::new().attribute("a", large.clone()).attribute("b", "b");
    let id = client(&servers).await.sessions().create(new).await.unwrap().id;
    let mut raw = SessionServiceClient::new(channel(servers[0].address()).await);
    let get = |names: usize| v1::GetSessionRequest {
        session: Some(selector(id.reveal())),
        attribute_names: vec!["a".to_owned(); names],
        ..v1::GetSessionRequest::default()
    };
    let found = raw.get_session(get(ATTRIBUTE_NAMES_MAX)).await.unwrap().into_inner();
    let attributes = found.session.unwrap().attributes;
    assert_eq!(attributes.len(), 1);
    assert_eq!(attributes["a"], large);
    let refused = raw.get_session(get(ATTRIBUTE_NAMES_MAX + 1)).await.unwrap_err();
    let info = refused.get_details_error_info().unwrap();
    assert_eq!((refused.code(), &*info.reason), (Code::InvalidArgument, "LIMIT_EXCEEDED"));
    assert_eq!(info.metadata["field"], "attribute_names");
    assert_eq!(info.metadata["limit"], "256");
}

#[tokio::test]
async fn an_answer_is_as_large_as_stock_clients_take_or_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let servers = three_nodes(directory.path()).await;
    let sessions = client(&servers).await.sessions();
    let large = NewSession::new().attribute("large", vec![7; 60_000]).attribute("theme", "dark");
    let mut ids = Vec::new();
    for _ in 0..80 {
        ids.push(sessions.create(large.clone()).await.unwrap().id);
    }
    let mut raw = SessionServiceClient::new(channel(servers[0].address()).await);
    let get = |names: &[&str], metadata_only: bool, count: usize| v1::BatchGetSessionsRequest {
        sessions: ids[..count].iter().map(|id| selector(id.reveal())).collect(),
        attribute_names: names.iter().map(ToString::to_string).collect(),
        metadata_only,
        ..v1::BatchGetSessionsRequest::default()
    };
    let refused = raw.batch_get_sessions(get(&[], false, 80)).await.unwrap_err();
    let info = refused.get_details_error_info().unwrap();
    assert_eq!((refused.code(), &*info.reason), (Code::InvalidArgument, "LIMIT_EXCEEDED"));
    assert_eq!(info.metadata["field"], "sessions");
    assert!(refused.message().contains("attribute_names"), "{refused:?}");
    for small in [get(&[], true, 80), get(&["theme"], false, 80), get(&[], false, 60)] {
        let count = small.sessions.len();
        let found = raw.batch_get_sessions(small).await.unwrap().into_inner();
        assert_eq!(found.sessions.len(), count);
    }
}

#[tokio::test]
async fn answers_that_nobody_reads_are_not_made() {
    let directory = tempfile::tempdir().unwrap();
    let servers = three_nodes(directory.path()).await;
    let mut new = NewSession::new();
    for name in ["a", "b", "c"] {
        new = new.attribute(name, vec![7; 256 * 1024]);
    }
    let client = client(&servers).await;
    let id = client.sessions().create(new).await.unwrap().id;
    let address = servers[0].address();
    let (lazy, eager) = (channel(address).await, channel(address).await);
    const PIPELINES: u64 = 8;
    const REQUESTS: u64 = 12;
    let mut streams = Vec::new();
    for pipeline in 0..PIPELINES {
        // Linearizable and local ones.
        let consistency = if pipeline % 2 == 0 { 0 } else { v1::Consistency::Local as i32 };
        let session = Some(selector(id.reveal()));
        let get = move |number: u64| v1::PipelineRequest {
            correlation_id: number,
            timeout: Some(prost_types::Duration { seconds: 50, nanos: 0 }),
            request: Some(Request::GetSession(v1::GetSessionRequest {
                session: session.clone(),
                consistency,
                ..v1::GetSessionRequest::default()
            })),
        };
        let requests = tokio_stream::iter((1..=REQUESTS).map(get)).chain(tokio_stream::pending());
        let mut raw = PipelineServiceClient::new(lazy.clone());
        streams.push(raw.pipeline(requests).await.unwrap().into_inner());
    }
    let share = (ANSWER_BYTES_OF_NODE_MAX / (ANSWER_SHARE_OF_FREE + 1)) as u64;
    let held = eventually("the connection holds its share", async || {
        let held = status(&eager).await.answer_bytes;
        (held >= share).then_some(held)
    })
    .await;
    assert!(held < share + (1 << 20), "{held} bytes are held");
    // Others are served meanwhile, whatever they want.
    let mut raw = SessionServiceClient::new(eager.clone());
    for _ in 0..20 {
        let session = Some(selector(id.reveal()));
        let get = v1::GetSessionRequest { session, ..v1::GetSessionRequest::default() };
        let found = raw.get_session(get).await.unwrap().into_inner().session.unwrap();
        assert_eq!(found.attributes.len(), 3);
    }
    // And whoever begins to read gets every answer.
    for mut stream in streams {
        let mut seen = 0;
        while seen < REQUESTS {
            let response = stream.message().await.unwrap().unwrap().response.unwrap();
            match response {
                Response::Hello(_) => {}
                Response::GetSession(found) => {
                    assert_eq!(found.session.unwrap().attributes.len(), 3);
                    seen += 1;
                }
                other => panic!("{other:?}"),
            }
        }
    }
    eventually("nothing is held", async || (status(&eager).await.answer_bytes == 0).then_some(()))
        .await;
}

#[tokio::test]
async fn connections_that_say_nothing_take_no_files_from_the_node() {
    let directory = tempfile::tempdir().unwrap();
    let reserved = FILES_RESERVED_MIN + PEER_CONNECTIONS_MAX;
    let servers = three_nodes_with(directory.path(), reserved + 4).await;
    let observer = channel(servers[0].address()).await;
    eventually("it answers", async || Some(status(&observer).await)).await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(TcpStream::connect(servers[0].address()).await.unwrap());
    }
    eventually("all are in", async || {
        (status(&observer).await.client_connections == 4).then_some(())
    })
    .await;
    let mut byte = [0];
    let mut refused = TcpStream::connect(servers[0].address()).await.unwrap();
    assert!(matches!(refused.read(&mut byte).await, Ok(0) | Err(_)));
    let found = status(&observer).await;
    assert_eq!((found.client_connections, found.refused_connections), (4, 1));
    // Those who say nothing make room before long.
    for mut silent in silent {
        // The server may have greeted first.
        let mut greeting = Vec::new();
        let reading = silent.read_to_end(&mut greeting);
        drop(tokio::time::timeout(PATIENCE, reading).await.expect("it is closed"));
    }
    eventually("others get in", async || {
        (status(&observer).await.client_connections == 1).then_some(())
    })
    .await;
    let sessions = client(&servers[..1]).await.sessions();
    sessions.create(NewSession::new()).await.unwrap();
}

#[tokio::test]
async fn a_client_may_cancel_many_calls_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let servers = three_nodes(directory.path()).await;
    let id = client(&servers).await.sessions().create(NewSession::new()).await.unwrap().id;
    let channel = channel(servers[0].address()).await;
    let get = || v1::GetSessionRequest {
        session: Some(selector(id.reveal())),
        ..v1::GetSessionRequest::default()
    };
    for _ in 0..3 {
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..500 {
            let mut raw = SessionServiceClient::new(channel.clone());
            let get = get();
            calls.spawn(async move { raw.get_session(get).await });
        }
        // They have been sent, or are about to be.
        tokio::task::yield_now().await;
        calls.abort_all();
        while let Some(ended) = calls.join_next().await {
            if let Ok(answer) = ended {
                answer.unwrap();
            }
        }
        let mut raw = SessionServiceClient::new(channel.clone());
        raw.get_session(get()).await.unwrap();
    }
}
