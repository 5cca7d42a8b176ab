//! One connection to one node, and how it is made.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request as Call, Status};

use super::error::{Error, Failure, transport_message};
use super::pipeline::Pipeline;
use super::{Transport, unary};
use crate::proto::v1::cluster_service_client::ClusterServiceClient;
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;
use crate::proto::v1::{DescribeRequest, DescribeResponse};

/// HTTP/2 windows: a stream of answers never waits for the client's permission to go on.
const STREAM_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// A peer that vanished without a word is noticed after the sum of these.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A node that has greeted us.
pub(super) struct Connection {
    /// As dialled.
    pub(super) address: String,
    /// As the node named itself.
    pub(super) node_id: u64,
    /// When it was made.
    pub(super) since: Instant,
    channel: Channel,
    pipeline: Option<Pipeline>,
    /// A unary connection that lost its peer; pipelines know by themselves.
    lost: AtomicBool,
}

impl Connection {
    /// Connects to `address` and learns what the node there knows, within `timeout`.
    pub(super) async fn dial(
        address: &str,
        transport: Transport,
        timeout: Duration,
    ) -> Result<(Self, DescribeResponse), DialError> {
        let dialling = async {
            let channel = open_channel(address, timeout).await?;
            let (pipeline, hello) = match transport {
                Transport::Pipeline => {
                    let (pipeline, hello) = Pipeline::open(channel.clone()).await?;
                    (Some(pipeline), hello)
                }
                Transport::Unary => (None, describe(channel.clone(), timeout).await?),
            };
            Ok::<_, DialError>((channel, pipeline, hello))
        };
        let dialled = tokio::time::timeout(timeout, dialling).await;
        let (channel, pipeline, hello) =
            dialled.unwrap_or_else(|_| Err(DialError::late(timeout)))?;
        let connection = Self {
            address: address.to_owned(),
            node_id: hello.node_id,
            since: Instant::now(),
            channel,
            pipeline,
            lost: AtomicBool::new(false),
        };
        Ok((connection, hello))
    }

    /// One attempt, of at most `timeout` from `now`.
    pub(super) async fn call(
        &self,
        request: Arc<Request>,
        now: Instant,
        timeout: Duration,
    ) -> Result<Response, Failure> {
        match &self.pipeline {
            Some(pipeline) => pipeline.call(request, now, timeout).await,
            None => self.call_unary(request, timeout).await,
        }
    }

    /// Whether no call can succeed on it any more.
    pub(super) fn is_closed(&self) -> bool {
        match &self.pipeline {
            Some(pipeline) => pipeline.is_closed(),
            None => self.lost.load(Ordering::Relaxed),
        }
    }

    /// Asks the node what it knows now.
    pub(super) async fn describe(&self, timeout: Duration) -> Result<DescribeResponse, Failure> {
        let described = describe(self.channel.clone(), timeout);
        match tokio::time::timeout(timeout, described).await {
            Ok(Ok(described)) => Ok(described),
            Ok(Err(status)) => Err(Failure::from_status(&status)),
            Err(_) => Err(Failure::Unknown(Error::DeadlineExceeded {
                message: format!("{}: no answer within {timeout:?}", self.address),
            })),
        }
    }

    /// The node, for people.
    pub(super) fn name(&self) -> String {
        format!("node {} at {}", self.node_id, self.address)
    }

    async fn call_unary(
        &self,
        request: Arc<Request>,
        timeout: Duration,
    ) -> Result<Response, Failure> {
        let calling = unary::call(self.channel.clone(), request, timeout);
        match tokio::time::timeout(timeout, calling).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(status)) => {
                if std::error::Error::source(&status).is_some() {
                    self.lost.store(true, Ordering::Relaxed);
                }
                Err(Failure::from_status(&status))
            }
            Err(_) => {
                // The channel may be fine, but another is cheap and this one has not shown it.
                self.lost.store(true, Ordering::Relaxed);
                let message = "no answer".to_owned();
                Err(Failure::Unknown(Error::DeadlineExceeded { message }))
            }
        }
    }
}

/// A channel to `address`, connected, for calls outside the pool.
pub(super) async fn open_channel(address: &str, timeout: Duration) -> Result<Channel, DialError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(timeout)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(endpoint.connect().await?)
}

async fn describe(channel: Channel, timeout: Duration) -> Result<DescribeResponse, Status> {
    let mut client = ClusterServiceClient::new(channel);
    Ok(client.describe(timed(DescribeRequest {}, timeout)).await?.into_inner())
}

/// The call with its deadline in the header.
pub(super) fn timed<M>(message: M, timeout: Duration) -> Call<M> {
    let mut call = Call::new(message);
    call.set_timeout(timeout);
    call
}

/// Why there is no connection.
#[derive(Clone, Debug)]
pub(super) struct DialError {
    /// In words, without the address.
    pub(super) message: String,
    /// Whether that is how it is, for as long as nobody changes anything: nobody listens there, or
    /// somebody else.
    pub(super) is_refusal: bool,
}

impl DialError {
    /// Nothing was heard in that time.
    pub(super) fn late(timeout: Duration) -> Self {
        Self { message: format!("no answer within {timeout:?}"), is_refusal: false }
    }

    /// As the caller sees it.
    pub(super) fn at(&self, address: &str) -> Error {
        Error::unavailable(format!("{address}: {}", self.message))
    }
}

impl From<tonic::transport::Error> for DialError {
    fn from(error: tonic::transport::Error) -> Self {
        let refused = |cause: &io::Error| cause.kind() == io::ErrorKind::ConnectionRefused;
        let is_refusal = io_cause(&error).is_some_and(refused);
        Self { message: transport_message(&error), is_refusal }
    }
}

impl From<Status> for DialError {
    fn from(status: Status) -> Self {
        if std::error::Error::source(&status).is_some() {
            let message = format!(
                "it takes connections and does not answer in gRPC ({}); is that a node's port?",
                transport_message(&status)
            );
            return Self { message, is_refusal: false };
        }
        // Of all that nodes serve only their clients' port has these methods.
        if status.code() == Code::Unimplemented {
            let message = "it serves gRPC, but not the clients of Quorate: is that the port for \
                           peers (7500 by default)? name the one for clients (7400 by default)";
            return Self { message: message.to_owned(), is_refusal: true };
        }
        Self { message: status.message().to_owned(), is_refusal: false }
    }
}

fn io_cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    let causes = std::iter::successors(Some(error), |cause| cause.source());
    causes.filter_map(|cause| cause.downcast_ref()).last()
}
