//! `quorate.v1` ⇄ the types of the service layer.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;

use crate::proto::v1;
use crate::raft::{MemberStatus, NodeStatus, Role};
use crate::service::{
    BatchGet, Consistency, Created, Deleted, Error, Found, GetSession, ListSessions, Listed,
    NewSession, RequestContext, SessionSelector, SessionUpdate, Touched, Updated,
};
use crate::state::{Digest, Namespace, Session, Timeout, Timestamp};

pub(super) fn timestamp_out(timestamp: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: i64::try_from(timestamp.0 / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(timestamp.0 % 1000).unwrap_or(0) * 1_000_000,
    }
}

/// Cluster time has milliseconds; what is finer is cut off.
fn timestamp_in(
    field: &'static str,
    timestamp: Option<prost_types::Timestamp>,
) -> Result<Option<Timestamp>, Error> {
    let Some(timestamp) = timestamp else { return Ok(None) };
    let seconds = u64::try_from(timestamp.seconds).ok();
    let nanos = u64::try_from(timestamp.nanos).ok().filter(|nanos| *nanos < 1_000_000_000);
    let millis = seconds
        .and_then(|seconds| seconds.checked_mul(1000))
        .and_then(|millis| millis.checked_add(nanos? / 1_000_000));
    millis.map(|millis| Some(Timestamp(millis))).ok_or_else(|| {
        Error::invalid(field, "INVALID_TIMESTAMP", format!("{field} is not a time after 1970"))
    })
}

pub(super) fn duration_out(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

/// A duration that is not negative.
pub(super) fn duration_in(
    field: &'static str,
    duration: prost_types::Duration,
) -> Result<Duration, Error> {
    Duration::try_from(duration).map_err(|_| {
        Error::invalid(field, "INVALID_DURATION", format!("{field} is negative or malformed"))
    })
}

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

fn context_in(context: Option<v1::RequestContext>) -> Result<RequestContext, Error> {
    let Some(context) = context else { return Ok(RequestContext::default()) };
    Ok(RequestContext {
        request_id: context.request_id,
        resend: context.resend,
        first_sent: timestamp_in("context.first_sent_time", context.first_sent_time)?,
        expires: timestamp_in("context.expire_time", context.expire_time)?,
    })
}

fn consistency_in(consistency: i32, min_revision: u64) -> Result<Consistency, Error> {
    match v1::Consistency::try_from(consistency) {
        Ok(v1::Consistency::Unspecified | v1::Consistency::Linearizable) => {
            Ok(Consistency::Linearizable)
        }
        Ok(v1::Consistency::Local) => Ok(Consistency::Local { min_revision }),
        Err(_) => Err(Error::invalid(
            "consistency",
            "INVALID_CONSISTENCY",
            format!("consistency {consistency} is not known here"),
        )),
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

pub(super) fn create_in(request: v1::CreateSessionRequest) -> Result<NewSession, Error> {
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

pub(super) fn created_out(created: Created) -> v1::CreateSessionResponse {
    v1::CreateSessionResponse {
        revision: created.revision.0,
        id: created.minted_id.unwrap_or_default(),
        handle: created.handle.to_string(),
        expire_time: created.expires.map(timestamp_out),
    }
}

/// Which attributes a reader wants.
pub(super) enum Wanted {
    All,
    None,
    Named(Vec<String>),
}

impl Wanted {
    fn of(metadata_only: bool, names: Vec<String>) -> Self {
        match (metadata_only, names.is_empty()) {
            (true, _) => Self::None,
            (false, true) => Self::All,
            (false, false) => Self::Named(names),
        }
    }

    fn attributes(&self, session: &Session) -> BTreeMap<String, Bytes> {
        let owned = |(name, value): (&str, &[u8])| (name.to_owned(), Bytes::copy_from_slice(value));
        match self {
            Self::All => session.attributes().map(owned).collect(),
            Self::None => BTreeMap::new(),
            Self::Named(names) => names
                .iter()
                .filter_map(|name| Some(owned((name, session.attribute(name)?))))
                .collect(),
        }
    }
}

pub(super) fn get_in(request: v1::GetSessionRequest) -> Result<(GetSession, Wanted), Error> {
    let get = GetSession {
        namespace: request.namespace,
        session: selector_in(request.session)?,
        consistency: consistency_in(request.consistency, request.min_revision)?,
        touch: request.touch,
    };
    Ok((get, Wanted::of(request.metadata_only, request.attribute_names)))
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
        attributes: wanted.attributes(session),
        version: session.version().0,
        create_time: Some(timestamp_out(session.create_time())),
        last_access_time: Some(timestamp_out(session.last_access_time())),
        idle_timeout: timeout_out(session.idle_timeout()),
        absolute_timeout: timeout_out(session.absolute_timeout()),
        expire_time: session.deadline().map(timestamp_out),
        size_bytes: session.size_bytes(),
    }
}

pub(super) fn found_out(found: &Found, wanted: &Wanted) -> v1::GetSessionResponse {
    v1::GetSessionResponse {
        revision: found.revision.0,
        session: Some(session_out(&found.namespace, found.handle, &found.session, wanted)),
    }
}

pub(super) fn batch_get_in(
    request: v1::BatchGetSessionsRequest,
) -> Result<(BatchGet, Wanted), Error> {
    let get = BatchGet {
        namespace: request.namespace,
        sessions: request
            .sessions
            .into_iter()
            .map(|selector| selector_in(Some(selector)))
            .collect::<Result<_, _>>()?,
        consistency: consistency_in(request.consistency, request.min_revision)?,
    };
    Ok((get, Wanted::of(request.metadata_only, request.attribute_names)))
}

fn sessions_out(listed: &Listed, wanted: &Wanted) -> Vec<v1::Session> {
    let each = |(handle, session): &(Digest, std::sync::Arc<Session>)| {
        session_out(&listed.namespace, *handle, session, wanted)
    };
    listed.sessions.iter().map(each).collect()
}

pub(super) fn batch_out(listed: &Listed, wanted: &Wanted) -> v1::BatchGetSessionsResponse {
    v1::BatchGetSessionsResponse {
        revision: listed.revision.0,
        sessions: sessions_out(listed, wanted),
    }
}

/// A fence that was ignored would be worse than none.
pub(super) fn unfenced(fence: Option<v1::Fence>) -> Result<(), Error> {
    fence.map_or(Ok(()), |_| Err(Error::unimplemented("fences")))
}

pub(super) fn update_in(request: v1::UpdateSessionRequest) -> Result<SessionUpdate, Error> {
    unfenced(request.fence)?;
    Ok(SessionUpdate {
        context: context_in(request.context)?,
        namespace: request.namespace,
        session: selector_in(request.session)?,
        set: request.set_attributes,
        remove: request.remove_attributes,
        expected_version: request.expected_version,
        principal: request.principal,
        idle_timeout: timeout_in("idle_timeout", request.idle_timeout)?,
    })
}

pub(super) fn updated_out(updated: &Updated) -> v1::UpdateSessionResponse {
    v1::UpdateSessionResponse {
        revision: updated.revision.0,
        expire_time: updated.expires.map(timestamp_out),
    }
}

/// What Touch and Delete have in common.
pub(super) struct Addressed {
    pub(super) context: RequestContext,
    pub(super) namespace: String,
    pub(super) session: SessionSelector,
}

pub(super) fn addressed_in(
    context: Option<v1::RequestContext>,
    namespace: String,
    session: Option<v1::SessionSelector>,
) -> Result<Addressed, Error> {
    Ok(Addressed { context: context_in(context)?, namespace, session: selector_in(session)? })
}

pub(super) fn touched_out(touched: &Touched) -> v1::TouchSessionResponse {
    v1::TouchSessionResponse {
        revision: touched.revision.0,
        version: touched.version.0,
        expire_time: touched.expires.map(timestamp_out),
    }
}

pub(super) fn deleted_out(deleted: &Deleted) -> v1::DeleteSessionResponse {
    v1::DeleteSessionResponse { revision: deleted.revision.0 }
}

pub(super) fn list_in(request: v1::ListSessionsRequest) -> Result<ListSessions, Error> {
    Ok(ListSessions {
        namespace: request.namespace,
        principal: request.principal,
        page_size: request.page_size,
        page_token: request.page_token,
        consistency: consistency_in(request.consistency, 0)?,
    })
}

pub(super) fn listed_out(listed: &Listed) -> v1::ListSessionsResponse {
    let last = listed.sessions.last().filter(|_| listed.more);
    v1::ListSessionsResponse {
        revision: listed.revision.0,
        sessions: sessions_out(listed, &Wanted::None),
        next_page_token: last.map(|(handle, _)| handle.to_string()).unwrap_or_default(),
    }
}

pub(super) fn member_out(member: MemberStatus) -> v1::Member {
    v1::Member {
        node_id: member.node_id,
        peer_address: member.peer_address,
        client_address: member.client_address,
        incarnation: format!("{:016x}", member.incarnation),
        voter: member.voter,
    }
}

pub(super) fn cluster_id_out(cluster_id: Option<u128>) -> String {
    cluster_id.map(|id| format!("{id:032x}")).unwrap_or_default()
}

fn role_out(role: Role) -> v1::NodeRole {
    match role {
        Role::Uninitialized => v1::NodeRole::Uninitialized,
        Role::Leader => v1::NodeRole::Leader,
        Role::Follower => v1::NodeRole::Follower,
        Role::Candidate => v1::NodeRole::Candidate,
        Role::Learner => v1::NodeRole::Learner,
    }
}

pub(super) fn status_out(status: NodeStatus, resident_bytes: u64) -> v1::StatusResponse {
    v1::StatusResponse {
        cluster_id: cluster_id_out(status.cluster_id),
        node_id: status.node_id,
        role: role_out(status.role) as i32,
        term: status.term,
        leader_id: status.leader_id.unwrap_or(0),
        last_log_index: status.last_log_index,
        committed_index: status.committed_index,
        applied_index: status.applied_index,
        snapshot_index: status.snapshot_index,
        purged_index: status.purged_index,
        revision: status.revision,
        state_digest: status.state_digest,
        cluster_time: status.cluster_time.map(|stamp| timestamp_out(stamp.time)),
        sessions: status.sessions,
        checkpoint_lag_entries: status.checkpoint_lag_entries,
        checkpoint_lag_bytes: status.checkpoint_lag_bytes,
        checkpoint_age: status.checkpoint_age.map(duration_out),
        fsync_p99: Some(duration_out(status.fsync_p99)),
        resident_bytes,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        members: status.members.into_iter().map(member_out).collect(),
        halted_reason: status.halted_reason.unwrap_or_default(),
    }
}
