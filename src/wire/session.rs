//! `quorate.v1.SessionService`: decode, call the service, encode.

use std::sync::Arc;

use tonic::{Request, Response};

use super::convert::{
    batch_get_in, batch_out, create_in, created_out, delete_in, deleted_out, found_out, get_in,
    list_in, listed_out, touch_in, touched_out, update_in, updated_out,
};
use super::status::status;
use super::unary::{Asked, Reply, answered};
use crate::proto::v1;
use crate::proto::v1::session_service_server::SessionService;
use crate::service::{Found, Listed, Sessions};

pub(super) struct SessionServer {
    pub(super) sessions: Arc<Sessions>,
}

#[tonic::async_trait]
impl SessionService for SessionServer {
    async fn create_session(
        &self,
        request: Request<v1::CreateSessionRequest>,
    ) -> Reply<v1::CreateSessionResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.sessions.node());
        let new = create_in(message).map_err(status)?;
        let created = answered(|done| self.sessions.create(&call, new, done)).await?;
        Ok(Response::new(created_out(created)))
    }

    async fn get_session(
        &self,
        request: Request<v1::GetSessionRequest>,
    ) -> Reply<v1::GetSessionResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.sessions.node());
        let (get, wanted) = get_in(message).map_err(status)?;
        let (weight, sessions) = (wanted.weight(), &self.sessions);
        let out = move |found: Found| Ok(found_out(&found, &wanted));
        asked.find(weight, |done| sessions.get(&call, get, done), out).await
    }

    async fn batch_get_sessions(
        &self,
        request: Request<v1::BatchGetSessionsRequest>,
    ) -> Reply<v1::BatchGetSessionsResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.sessions.node());
        let (get, wanted) = batch_get_in(message).map_err(status)?;
        let weight = wanted.weight() + get.weight();
        let out = move |listed: Listed| batch_out(&listed, &wanted);
        asked.find(weight, |done| self.sessions.batch_get(&call, get, done), out).await
    }

    async fn update_session(
        &self,
        request: Request<v1::UpdateSessionRequest>,
    ) -> Reply<v1::UpdateSessionResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.sessions.node());
        let update = update_in(message).map_err(status)?;
        let updated = answered(|done| self.sessions.update(&call, update, done)).await?;
        Ok(Response::new(updated_out(&updated)))
    }

    async fn touch_session(
        &self,
        request: Request<v1::TouchSessionRequest>,
    ) -> Reply<v1::TouchSessionResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.sessions.node());
        let touch = touch_in(message).map_err(status)?;
        let touched = answered(|done| {
            self.sessions.touch(&call, &touch.context, touch.namespace, &touch.session, done);
        })
        .await?;
        Ok(Response::new(touched_out(&touched)))
    }

    async fn delete_session(
        &self,
        request: Request<v1::DeleteSessionRequest>,
    ) -> Reply<v1::DeleteSessionResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.sessions.node());
        let delete = delete_in(message).map_err(status)?;
        let deleted = answered(|done| self.sessions.delete(&call, delete, done)).await?;
        Ok(Response::new(deleted_out(&deleted)))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Reply<v1::ListSessionsResponse> {
        let (asked, message) = Asked::of(request);
        let call = asked.call(self.sessions.node());
        let list = list_in(message).map_err(status)?;
        let out = |listed: Listed| Ok(listed_out(&listed));
        asked.find(0, |done| self.sessions.list(&call, list, done), out).await
    }
}
