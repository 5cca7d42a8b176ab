//! `quorate.v1.SessionService`: decode, call the service, encode.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::convert::{
    addressed_in, batch_get_in, batch_out, create_in, created_out, deleted_out, found_out, get_in,
    list_in, listed_out, touched_out, unfenced, update_in, updated_out,
};
use super::status::status;
use crate::proto::v1;
use crate::proto::v1::session_service_server::SessionService;
use crate::service::{Call, Caller, Error, Sessions};

pub(super) struct SessionServer {
    pub(super) sessions: Arc<Sessions>,
}

/// What the caller set as `grpc-timeout`.
pub(super) fn timeout_of<T>(request: &Request<T>) -> Option<Duration> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value.saturating_mul(3600)),
        "M" => Duration::from_secs(value.saturating_mul(60)),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// How much earlier than at the caller's own deadline an answer is due: later it would meet a
/// caller, or a transport on the way, that has given up without hearing the reason.
const ANSWER_MARGIN_MAX: Duration = Duration::from_millis(50);

impl SessionServer {
    fn call<T>(&self, request: &Request<T>) -> Call {
        let timeout = timeout_of(request);
        let timeout = timeout.map(|timeout| timeout - (timeout / 4).min(ANSWER_MARGIN_MAX));
        Call::within(self.sessions.node(), Caller, timeout)
    }
}

type Reply<T> = Result<Response<T>, Status>;

/// Runs a use case that answers by callback, and waits for the answer.
async fn answered<T: Send + 'static>(
    run: impl FnOnce(Box<dyn FnOnce(Result<T, Error>) + Send>),
) -> Result<T, Status> {
    let (done, answer) = oneshot::channel();
    // A caller that has gone away does not want the answer.
    run(Box::new(move |result| drop(done.send(result))));
    match answer.await {
        Ok(result) => result.map_err(status),
        Err(_) => Err(Status::unavailable("the node is stopping")),
    }
}

#[tonic::async_trait]
impl SessionService for SessionServer {
    async fn create_session(
        &self,
        request: Request<v1::CreateSessionRequest>,
    ) -> Reply<v1::CreateSessionResponse> {
        let call = self.call(&request);
        let new = create_in(request.into_inner()).map_err(status)?;
        let created = answered(|done| self.sessions.create(&call, new, done)).await?;
        Ok(Response::new(created_out(created)))
    }

    async fn get_session(
        &self,
        request: Request<v1::GetSessionRequest>,
    ) -> Reply<v1::GetSessionResponse> {
        let call = self.call(&request);
        let (get, wanted) = get_in(request.into_inner()).map_err(status)?;
        let found = answered(|done| self.sessions.get(&call, get, done)).await?;
        Ok(Response::new(found_out(&found, &wanted)))
    }

    async fn batch_get_sessions(
        &self,
        request: Request<v1::BatchGetSessionsRequest>,
    ) -> Reply<v1::BatchGetSessionsResponse> {
        let call = self.call(&request);
        let (get, wanted) = batch_get_in(request.into_inner()).map_err(status)?;
        let listed = answered(|done| self.sessions.batch_get(&call, get, done)).await?;
        Ok(Response::new(batch_out(&listed, &wanted)))
    }

    async fn update_session(
        &self,
        request: Request<v1::UpdateSessionRequest>,
    ) -> Reply<v1::UpdateSessionResponse> {
        let call = self.call(&request);
        let update = update_in(request.into_inner()).map_err(status)?;
        let updated = answered(|done| self.sessions.update(&call, update, done)).await?;
        Ok(Response::new(updated_out(&updated)))
    }

    async fn touch_session(
        &self,
        request: Request<v1::TouchSessionRequest>,
    ) -> Reply<v1::TouchSessionResponse> {
        let call = self.call(&request);
        let v1::TouchSessionRequest { context, namespace, session } = request.into_inner();
        let to = addressed_in(context, namespace, session).map_err(status)?;
        let touched = answered(|done| {
            self.sessions.touch(&call, &to.context, to.namespace, &to.session, done);
        })
        .await?;
        Ok(Response::new(touched_out(&touched)))
    }

    async fn delete_session(
        &self,
        request: Request<v1::DeleteSessionRequest>,
    ) -> Reply<v1::DeleteSessionResponse> {
        let call = self.call(&request);
        let v1::DeleteSessionRequest { context, namespace, session, expected_version, fence } =
            request.into_inner();
        unfenced(fence).map_err(status)?;
        let to = addressed_in(context, namespace, session).map_err(status)?;
        let deleted = answered(|done| {
            let sessions = &self.sessions;
            sessions.delete(&call, &to.context, to.namespace, &to.session, expected_version, done);
        })
        .await?;
        Ok(Response::new(deleted_out(&deleted)))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Reply<v1::ListSessionsResponse> {
        let call = self.call(&request);
        let list = list_in(request.into_inner()).map_err(status)?;
        let listed = answered(|done| self.sessions.list(&call, list, done)).await?;
        Ok(Response::new(listed_out(&listed)))
    }
}
