//! One node, asked without the client library: nothing is retried, and nothing goes elsewhere.

use std::time::Duration;

use quorate::client::SessionId;
use quorate::proto::v1;
use quorate::proto::v1::cluster_service_client::ClusterServiceClient;
use quorate::proto::v1::session_service_client::SessionServiceClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;

/// Stubs of one node. The connection is made when it is needed, as often as it is.
#[derive(Clone)]
pub(crate) struct Direct {
    channel: Channel,
    timeout: Option<Duration>,
}

impl Direct {
    pub(crate) fn new(address: &str) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let channel = endpoint.connect_timeout(Duration::from_secs(2)).connect_lazy();
        Self { channel, timeout: Some(Duration::from_secs(5)) }
    }

    /// The same, with another deadline for its calls.
    pub(crate) fn with_timeout(&self, timeout: Duration) -> Self {
        Self { channel: self.channel.clone(), timeout: Some(timeout) }
    }

    /// The same, with no deadline but the server's own, so that the answer is the server's too.
    pub(crate) fn without_timeout(&self) -> Self {
        Self { channel: self.channel.clone(), timeout: None }
    }

    fn call<M>(&self, message: M) -> Request<M> {
        let mut call = Request::new(message);
        if let Some(timeout) = self.timeout {
            call.set_timeout(timeout);
        }
        call
    }

    /// Ends a call at its deadline whatever it waits for. The transport's own timer covers what
    /// precedes the answer's headers: a node that is paused behind them would be waited for.
    async fn within<M>(
        &self,
        calling: impl Future<Output = Result<Response<M>, Status>>,
    ) -> Result<M, Status> {
        let answered = match self.timeout {
            Some(timeout) => tokio::time::timeout(timeout, calling)
                .await
                .unwrap_or_else(|_| Err(Status::deadline_exceeded("the node fell silent"))),
            None => calling.await,
        };
        answered.map(Response::into_inner)
    }

    pub(crate) fn sessions(&self) -> SessionServiceClient<Channel> {
        SessionServiceClient::new(self.channel.clone())
    }

    pub(crate) async fn create(
        &self,
        request: v1::CreateSessionRequest,
    ) -> Result<v1::CreateSessionResponse, Status> {
        self.within(self.sessions().create_session(self.call(request))).await
    }

    pub(crate) async fn update(
        &self,
        request: v1::UpdateSessionRequest,
    ) -> Result<v1::UpdateSessionResponse, Status> {
        self.within(self.sessions().update_session(self.call(request))).await
    }

    pub(crate) async fn touch(
        &self,
        request: v1::TouchSessionRequest,
    ) -> Result<v1::TouchSessionResponse, Status> {
        self.within(self.sessions().touch_session(self.call(request))).await
    }

    pub(crate) async fn delete(
        &self,
        request: v1::DeleteSessionRequest,
    ) -> Result<v1::DeleteSessionResponse, Status> {
        self.within(self.sessions().delete_session(self.call(request))).await
    }

    pub(crate) async fn get(&self, id: &SessionId) -> Result<v1::GetSessionResponse, Status> {
        self.get_with(id, v1::Consistency::Linearizable).await
    }

    pub(crate) async fn get_with(
        &self,
        id: &SessionId,
        consistency: v1::Consistency,
    ) -> Result<v1::GetSessionResponse, Status> {
        let request = v1::GetSessionRequest {
            session: Some(select(id)),
            consistency: consistency.into(),
            ..v1::GetSessionRequest::default()
        };
        self.within(self.sessions().get_session(self.call(request))).await
    }

    pub(crate) async fn status(&self) -> Result<v1::StatusResponse, Status> {
        let mut client = ClusterServiceClient::new(self.channel.clone());
        self.within(client.status(self.call(v1::StatusRequest {}))).await
    }

    pub(crate) async fn describe(&self) -> Result<v1::DescribeResponse, Status> {
        let mut client = ClusterServiceClient::new(self.channel.clone());
        self.within(client.describe(self.call(v1::DescribeRequest {}))).await
    }

    /// Whether `grpc.health.v1` says that the node serves.
    pub(crate) async fn serving(&self) -> Result<bool, Status> {
        let mut client = HealthClient::new(self.channel.clone());
        let request = HealthCheckRequest { service: "quorate.v1.SessionService".to_owned() };
        let answer = self.within(client.check(self.call(request))).await?;
        Ok(answer.status() == ServingStatus::Serving)
    }
}

pub(crate) fn select(id: &SessionId) -> v1::SessionSelector {
    use v1::session_selector::Selector;
    v1::SessionSelector { selector: Some(Selector::Id(id.reveal().to_owned())) }
}

/// The server's stable reason; empty where it gave none.
pub(crate) fn reason(status: &Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

/// Whether the node said that it could not serve just then, rather than what it found.
pub(crate) fn is_transient(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
    )
}

/// Cluster time in milliseconds.
pub(crate) fn millis(time: prost_types::Timestamp) -> i64 {
    time.seconds * 1_000 + i64::from(time.nanos) / 1_000_000
}
