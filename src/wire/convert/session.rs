//! Sessions.

use std::collections::BTreeMap;

use bytes::Bytes;

use prost::Message as _;

use super::{consistency_in, context_in, duration_in, duration_out, timestamp_out};
use crate::limits::ANSWER_BYTES_MAX;
use crate::proto::v1;
use crate::service::{
    BatchGet, Created, DeleteSession, Deleted, Error, Found, GetSession, ListSessions, Listed,
    NewSession, RequestContext, SessionFence, SessionSelector, SessionUpdate, Touched, Updated,
    Wanted,
};
use crate::state::{Digest, Namespace, Session, Timeout};

fn timeout_out(timeout: Timeout) -> Option<prost_types::Duration> {
    match timeout {
        Timeout::Never => None,
        Timeout::After(length) => Some(duration_out(length)),
    }
}

fn timeout_in(field: &'static str, timeout: Option<v1::Timeout>) -> Result<Option<Timeout>, Error> {
    use v1::timeout::Timeout as Choice;
    match timeout.and_then(|timeout| timeout.timeout) {
        None => Ok(None),
        Some(Choice::Never(true)) => Ok(Some(Timeout::Never)),
        Some(Choice::Never(false)) => Err(Error::invalid(
            field,
            "INVALID_TIMEOUT",
            format!("{field}.never is false; leave it out or set it to true"),
        )),
        Some(Choice::After(length)) => Ok(Some(Timeout::After(duration_in(field, length)?))),
    }
}

fn selector_in(selector: Option<v1::SessionSelector>) -> Result<SessionSelector, Error> {
    use v1::session_selector::Selector;
    match selector.and_then(|selector| selector.selector) {
        Some(Selector::Id(id)) => Ok(SessionSelector::Id(id)),
        Some(Selector::Handle(handle)) => Ok(SessionSelector::Handle(handle)),
        None => Err(Error::invalid(
            "session",
            "MISSING_SESSION",
            "session names none: set session.id or session.handle",
        )),
    }
}

pub(in crate::wire) fn create_in(request: v1::CreateSessionRequest) -> Result<NewSession, Error> {
    Ok(NewSession {
        context: context_in(request.context)?,
        namespace: request.namespace,
        id: request.id,
        principal: request.principal,
        attributes: request.attributes,
        idle_timeout: timeout_in("idle_timeout", request.idle_timeout)?,
        absolute_timeout: timeout_in("absolute_timeout", request.absolute_timeout)?,
    })
}

pub(in crate::wire) fn created_out(created: Created) -> v1::CreateSessionResponse {
    v1::CreateSessionResponse {
        revision: created.revision.0,
        id: created.minted_id.unwrap_or_default(),
        handle: created.handle.to_string(),
        expire_time: created.expires.map(timestamp_out),
    }
}

fn attributes_out(session: &Session, wanted: &Wanted) -> BTreeMap<String, Bytes> {
    let owned = |(name, value): (&str, &[u8])| (name.to_owned(), Bytes::copy_from_slice(value));
    match wanted {
        Wanted::All => session.attributes().map(owned).collect(),
        Wanted::None => BTreeMap::new(),
        Wanted::Named(names) => session.attributes().named(names).map(owned).collect(),
    }
}

pub(in crate::wire) fn get_in(
    request: v1::GetSessionRequest,
) -> Result<(GetSession, Wanted), Error> {
    let get = GetSession {
        namespace: request.namespace,
        session: selector_in(request.session)?,
        consistency: consistency_in(
            request.consistency,
            request.min_revision,
            request.max_staleness,
        )?,
        touch: request.touch,
    };
    Ok((get, Wanted::of(request.metadata_only, request.attribute_names)?))
}

fn session_out(
    namespace: &Namespace,
    handle: Digest,
    session: &Session,
    wanted: &Wanted,
) -> v1::Session {
    v1::Session {
        namespace: namespace.0.to_string(),
        handle: handle.to_string(),
        principal: session.principal().unwrap_or_default().to_owned(),
        attributes: attributes_out(session, wanted),
        version: session.version().0,
        create_time: Some(timestamp_out(session.create_time())),
        last_access_time: Some(timestamp_out(session.last_access_time())),
        idle_timeout: timeout_out(session.idle_timeout()),
        absolute_timeout: timeout_out(session.absolute_timeout()),
        expire_time: session.deadline().map(timestamp_out),
        size_bytes: session.size_bytes(),
    }
}

pub(in crate::wire) fn found_out(found: &Found, wanted: &Wanted) -> v1::GetSessionResponse {
    v1::GetSessionResponse {
        revision: found.revision.0,
        session: Some(session_out(&found.namespace, found.handle, &found.session, wanted)),
    }
}

pub(in crate::wire) fn batch_get_in(
    request: v1::BatchGetSessionsRequest,
) -> Result<(BatchGet, Wanted), Error> {
    let get = BatchGet {
        namespace: request.namespace,
        sessions: request
            .sessions
            .into_iter()
            .map(|selector| selector_in(Some(selector)))
            .collect::<Result<_, _>>()?,
        consistency: consistency_in(
            request.consistency,
            request.min_revision,
            request.max_staleness,
        )?,
    };
    Ok((get, Wanted::of(request.metadata_only, request.attribute_names)?))
}

/// Builds no more than fits into an answer: sessions may have a mebibyte each.
pub(in crate::wire) fn batch_out(
    listed: &Listed,
    wanted: &Wanted,
) -> Result<v1::BatchGetSessionsResponse, Error> {
    let mut response =
        v1::BatchGetSessionsResponse { revision: listed.revision.0, sessions: Vec::new() };
    let mut bytes = response.encoded_len();
    for (handle, session) in &listed.sessions {
        let session = session_out(&listed.namespace, *handle, session, wanted);
        // The field's tag is a byte; see `sessions` in the message.
        bytes += 1 + encoded_len_with_length(session.encoded_len());
        if bytes > ANSWER_BYTES_MAX {
            return Err(Error::answer_too_large(
                "sessions",
                "name fewer sessions, or ask for some of their attributes (attribute_names) or \
                 for none (metadata_only)",
            ));
        }
        response.sessions.push(session);
    }
    Ok(response)
}

fn encoded_len_with_length(bytes: usize) -> usize {
    bytes + prost::length_delimiter_len(bytes)
}

fn fence_in(fence: Option<v1::Fence>) -> Option<SessionFence> {
    fence.map(|v1::Fence { lock, token }| SessionFence { lock, token })
}

pub(in crate::wire) fn update_in(
    request: v1::UpdateSessionRequest,
) -> Result<SessionUpdate, Error> {
    Ok(SessionUpdate {
        context: context_in(request.context)?,
        namespace: request.namespace,
        session: selector_in(request.session)?,
        set: request.set_attributes,
        remove: request.remove_attributes,
        expected_version: request.expected_version,
        principal: request.principal,
        idle_timeout: timeout_in("idle_timeout", request.idle_timeout)?,
        fence: fence_in(request.fence),
    })
}

pub(in crate::wire) fn updated_out(updated: &Updated) -> v1::UpdateSessionResponse {
    v1::UpdateSessionResponse {
        revision: updated.revision.0,
        expire_time: updated.expires.map(timestamp_out),
    }
}

/// A session to be touched.
pub(in crate::wire) struct Touch {
    pub(in crate::wire) context: RequestContext,
    pub(in crate::wire) namespace: String,
    pub(in crate::wire) session: SessionSelector,
}

pub(in crate::wire) fn touch_in(request: v1::TouchSessionRequest) -> Result<Touch, Error> {
    Ok(Touch {
        context: context_in(request.context)?,
        namespace: request.namespace,
        session: selector_in(request.session)?,
    })
}

pub(in crate::wire) fn touched_out(touched: &Touched) -> v1::TouchSessionResponse {
    v1::TouchSessionResponse {
        revision: touched.revision.0,
        version: touched.version.0,
        expire_time: touched.expires.map(timestamp_out),
    }
}

pub(in crate::wire) fn delete_in(
    request: v1::DeleteSessionRequest,
) -> Result<DeleteSession, Error> {
    Ok(DeleteSession {
        context: context_in(request.context)?,
        namespace: request.namespace,
        session: selector_in(request.session)?,
        expected_version: request.expected_version,
        fence: fence_in(request.fence),
    })
}

pub(in crate::wire) fn deleted_out(deleted: &Deleted) -> v1::DeleteSessionResponse {
    v1::DeleteSessionResponse { revision: deleted.revision.0 }
}

pub(in crate::wire) fn list_in(request: v1::ListSessionsRequest) -> Result<ListSessions, Error> {
    Ok(ListSessions {
        namespace: request.namespace,
        principal: request.principal,
        page_size: request.page_size,
        page_token: request.page_token,
        consistency: consistency_in(request.consistency, 0, request.max_staleness)?,
    })
}

pub(in crate::wire) fn listed_out(listed: &Listed) -> v1::ListSessionsResponse {
    let each = |(handle, session): &(Digest, std::sync::Arc<Session>)| {
        session_out(&listed.namespace, *handle, session, &Wanted::None)
    };
    v1::ListSessionsResponse {
        revision: listed.revision.0,
        sessions: listed.sessions.iter().map(each).collect(),
        next_page_token: listed.next.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}
