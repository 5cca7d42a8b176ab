//! Sessions: what is sent, what comes back, and the calls.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::Client;
use super::error::{Error, mismatched};
use super::id::{Handle, Selector, SessionId};
use super::time::{Timeout, duration_from_proto, duration_to_proto, system_time};
use crate::proto::v1;
use crate::proto::v1::Consistency;
use crate::proto::v1::pipeline_request::Request;
use crate::proto::v1::pipeline_response::Response;

/// A session to be created.
#[derive(Clone, Debug, Default)]
pub struct NewSession {
    id: Option<SessionId>,
    principal: String,
    attributes: BTreeMap<String, Bytes>,
    idle_timeout: Option<Timeout>,
    absolute_timeout: Option<Timeout>,
}

impl NewSession {
    /// One with a fresh id, no attributes and the namespace's timeouts.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives it this id instead of a fresh one.
    pub fn id(mut self, id: SessionId) -> Self {
        self.id = Some(id);
        self
    }

    /// The user that it belongs to.
    pub fn principal(mut self, principal: impl Into<String>) -> Self {
        self.principal = principal.into();
        self
    }

    /// One attribute, at most 256 KiB.
    pub fn attribute(mut self, name: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.attributes.insert(name.into(), value.into());
        self
    }

    /// Ends the session when it has not been used for so long.
    pub fn idle_timeout(mut self, timeout: impl Into<Timeout>) -> Self {
        self.idle_timeout = Some(timeout.into());
        self
    }

    /// Ends the session at this age, whatever happens.
    pub fn absolute_timeout(mut self, timeout: impl Into<Timeout>) -> Self {
        self.absolute_timeout = Some(timeout.into());
        self
    }
}

/// A session that has been created.
#[derive(Clone, Debug)]
pub struct Created {
    /// The secret for the user's cookie.
    pub id: SessionId,
    /// What to call the session where the secret must not be shown.
    pub handle: Handle,
    /// The session's version, and the revision of the change.
    pub version: u64,
    /// When it ends unless it is used; `None` for never.
    pub expires: Option<SystemTime>,
}

/// A session as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Where it lives.
    pub namespace: String,
    /// Its name for people and logs.
    pub handle: Handle,
    /// The user that it belongs to; empty for none.
    pub principal: String,
    /// Its data; empty where only metadata was asked for.
    pub attributes: BTreeMap<String, Bytes>,
    /// Revision of the last change to the data.
    pub version: u64,
    /// When it was created, in cluster time.
    pub created: Option<SystemTime>,
    /// Its last access that was stored.
    pub last_access: Option<SystemTime>,
    /// Sliding timeout; `None` for never.
    pub idle_timeout: Option<Duration>,
    /// Greatest age; `None` for any.
    pub absolute_timeout: Option<Duration>,
    /// When it ends unless it is used; `None` for never.
    pub expires: Option<SystemTime>,
    /// Sum of the lengths of attribute names and values.
    pub size_bytes: u64,
}

impl From<v1::Session> for Session {
    fn from(session: v1::Session) -> Self {
        Self {
            namespace: session.namespace,
            handle: Handle::trusted(session.handle),
            principal: session.principal,
            attributes: session.attributes,
            version: session.version,
            created: system_time(session.create_time),
            last_access: system_time(session.last_access_time),
            idle_timeout: duration_from_proto(session.idle_timeout),
            absolute_timeout: duration_from_proto(session.absolute_timeout),
            expires: system_time(session.expire_time),
            size_bytes: session.size_bytes,
        }
    }
}

/// What a read found, and where in history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found<T> {
    /// Revision of the state that it was read from.
    pub revision: u64,
    /// What was read.
    pub value: T,
}

/// How to read.
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    local: bool,
    min_revision: u64,
    max_staleness: Option<Duration>,
    attribute_names: Vec<String>,
    metadata_only: bool,
    touch: bool,
}

impl ReadOptions {
    /// Linearizable, with all attributes, not counted as an access.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what the asked node has applied, once that includes `min_revision`; may be stale.
    pub fn local(mut self, min_revision: u64) -> Self {
        self.local = true;
        self.min_revision = min_revision;
        self
    }

    /// Refuses a local read of what can be older than this, by what the asked node has heard;
    /// another node is asked then. Of no use to a read that is not local.
    pub fn max_staleness(mut self, age: Duration) -> Self {
        self.max_staleness = Some(age);
        self
    }

    /// Only this attribute, and others so named.
    pub fn attribute(mut self, name: impl Into<String>) -> Self {
        self.attribute_names.push(name.into());
        self
    }

    /// No attributes.
    pub fn metadata_only(mut self) -> Self {
        self.metadata_only = true;
        self
    }

    /// Counts as an access, as a touch would. Ignored when several sessions are read at once.
    pub fn touch(mut self) -> Self {
        self.touch = true;
        self
    }

    fn consistency(&self) -> i32 {
        if self.local { Consistency::Local.into() } else { Consistency::Unspecified.into() }
    }
}

/// A change to a session.
#[derive(Clone, Debug, Default)]
pub struct Update {
    set: BTreeMap<String, Bytes>,
    remove: Vec<String>,
    expected_version: Option<u64>,
    principal: Option<String>,
    idle_timeout: Option<Timeout>,
    fence: Option<v1::Fence>,
}

impl Update {
    /// One that changes nothing yet; sent like this it still counts as a write.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets an attribute, at most 256 KiB. Others stay as they are.
    pub fn set(mut self, name: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.set.insert(name.into(), value.into());
        self
    }

    /// Removes an attribute, if it exists.
    pub fn remove(mut self, name: impl Into<String>) -> Self {
        self.remove.push(name.into());
        self
    }

    /// Applies only if the session has this version still.
    pub fn expect_version(mut self, version: u64) -> Self {
        self.expected_version = Some(version);
        self
    }

    /// Hands the session to a user; to nobody with an empty name.
    pub fn principal(mut self, principal: impl Into<String>) -> Self {
        self.principal = Some(principal.into());
        self
    }

    /// Changes the idle timeout.
    pub fn idle_timeout(mut self, timeout: impl Into<Timeout>) -> Self {
        self.idle_timeout = Some(timeout.into());
        self
    }

    /// Applies only while this fencing token holds the lock of that name, in the same namespace.
    pub fn fence(mut self, lock: impl Into<String>, token: u64) -> Self {
        self.fence = Some(v1::Fence { lock: lock.into(), token });
        self
    }
}

/// What the end of a session depends on.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    expected_version: Option<u64>,
    fence: Option<v1::Fence>,
}

impl DeleteOptions {
    /// On nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies only if the session has this version still.
    pub fn expect_version(mut self, version: u64) -> Self {
        self.expected_version = Some(version);
        self
    }

    /// Applies only while this fencing token holds the lock of that name, in the same namespace.
    pub fn fence(mut self, lock: impl Into<String>, token: u64) -> Self {
        self.fence = Some(v1::Fence { lock: lock.into(), token });
        self
    }
}

/// A session that has been changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Updated {
    /// The session's new version, and the revision of the change.
    pub version: u64,
    /// When it ends unless it is used; `None` for never.
    pub expires: Option<SystemTime>,
}

/// A session that has been found alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touched {
    /// Revision of the state in which it was alive.
    pub revision: u64,
    /// The session's version: a copy of that version is current.
    pub version: u64,
    /// When it ends unless it is used; `None` for never.
    pub expires: Option<SystemTime>,
}

/// Which sessions to list.
#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    principal: String,
    page_size: u32,
    local: bool,
}

impl ListOptions {
    /// All of the namespace, in pages of the server's choice.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only those of this user.
    pub fn principal(mut self, principal: impl Into<String>) -> Self {
        self.principal = principal.into();
        self
    }

    /// Sessions on a page, 1 to 1,000.
    pub fn page_size(mut self, size: u32) -> Self {
        self.page_size = size;
        self
    }

    /// Takes what the asked node has applied; may be stale.
    pub fn local(mut self) -> Self {
        self.local = true;
        self
    }
}

/// One page of a list.
#[derive(Clone, Debug)]
pub struct Page {
    /// Revision of the state that it was read from; each page has its own.
    pub revision: u64,
    /// In the order of their handles, without attributes.
    pub sessions: Vec<Session>,
    /// What the next page is asked for with; `None` on the last.
    pub next: Option<String>,
}

/// The calls on sessions; see [`Client::sessions`].
#[derive(Clone, Debug)]
pub struct Sessions {
    client: Client,
}

impl Sessions {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Creates a session, with a fresh secret unless it has been given an id.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyExists`] when the id is taken, or was until a minute ago.
    pub async fn create(&self, session: NewSession) -> Result<Created, Error> {
        // Minted here, not by the server: only so a retry names the same session.
        let id = match session.id {
            Some(id) => id,
            None => SessionId::mint()?,
        };
        let request = Request::CreateSession(v1::CreateSessionRequest {
            context: None,
            namespace: self.namespace(),
            id: id.reveal().to_owned(),
            principal: session.principal,
            attributes: session.attributes,
            idle_timeout: session.idle_timeout.map(Timeout::into_proto),
            absolute_timeout: session.absolute_timeout.map(Timeout::into_proto),
        });
        match self.client.call(request).await? {
            Response::CreateSession(created) => Ok(Created {
                id,
                handle: Handle::trusted(created.handle),
                version: created.revision,
                expires: system_time(created.expire_time),
            }),
            _ => Err(mismatched()),
        }
    }

    /// Reads a session, linearizably.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when there is none, or it has expired.
    pub async fn get(&self, session: impl Into<Selector>) -> Result<Session, Error> {
        Ok(self.get_with(session, ReadOptions::new()).await?.value)
    }

    /// Reads a session from what the connected node has applied, once that includes
    /// `min_revision` (0 for whatever it is): sooner than [`Sessions::get`], and perhaps stale.
    ///
    /// # Errors
    ///
    /// As [`Sessions::get`].
    pub async fn get_local(
        &self,
        session: impl Into<Selector>,
        min_revision: u64,
    ) -> Result<Session, Error> {
        Ok(self.get_with(session, ReadOptions::new().local(min_revision)).await?.value)
    }

    /// Reads a session as `options` say.
    ///
    /// # Errors
    ///
    /// As [`Sessions::get`].
    pub async fn get_with(
        &self,
        session: impl Into<Selector>,
        options: ReadOptions,
    ) -> Result<Found<Session>, Error> {
        let request = Request::GetSession(v1::GetSessionRequest {
            namespace: self.namespace(),
            session: Some(session.into().into_proto()),
            consistency: options.consistency(),
            min_revision: options.min_revision,
            max_staleness: options.max_staleness.map(duration_to_proto),
            attribute_names: options.attribute_names,
            metadata_only: options.metadata_only,
            touch: options.touch,
        });
        match self.client.call(request).await? {
            Response::GetSession(v1::GetSessionResponse { revision, session: Some(session) }) => {
                Ok(Found { revision, value: session.into() })
            }
            _ => Err(mismatched()),
        }
    }

    /// Reads up to 1,000 sessions at one revision. Those that do not exist are left out; the
    /// others come in the order asked for.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] or [`Error::LimitExceeded`] when they are too many.
    pub async fn batch_get(
        &self,
        sessions: impl IntoIterator<Item: Into<Selector>>,
        options: ReadOptions,
    ) -> Result<Found<Vec<Session>>, Error> {
        let selectors = sessions.into_iter().map(|session| session.into().into_proto());
        let request = Request::BatchGetSessions(v1::BatchGetSessionsRequest {
            namespace: self.namespace(),
            sessions: selectors.collect(),
            consistency: options.consistency(),
            min_revision: options.min_revision,
            max_staleness: options.max_staleness.map(duration_to_proto),
            attribute_names: options.attribute_names,
            metadata_only: options.metadata_only,
        });
        match self.client.call(request).await? {
            Response::BatchGetSessions(found) => Ok(Found {
                revision: found.revision,
                value: found.sessions.into_iter().map(Session::from).collect(),
            }),
            _ => Err(mismatched()),
        }
    }

    /// Changes single attributes, and slides the idle deadline. Never creates.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::VersionMismatch`] when a version was expected and the
    /// session has another; [`Error::Fenced`] when its fence does not hold;
    /// [`Error::OutcomeUnknown`].
    pub async fn update(
        &self,
        session: impl Into<Selector>,
        update: Update,
    ) -> Result<Updated, Error> {
        let request = Request::UpdateSession(v1::UpdateSessionRequest {
            context: None,
            namespace: self.namespace(),
            session: Some(session.into().into_proto()),
            set_attributes: update.set,
            remove_attributes: update.remove,
            expected_version: update.expected_version,
            principal: update.principal,
            idle_timeout: update.idle_timeout.map(Timeout::into_proto),
            fence: update.fence,
        });
        match self.client.call(request).await? {
            Response::UpdateSession(updated) => {
                Ok(Updated { version: updated.revision, expires: system_time(updated.expire_time) })
            }
            _ => Err(mismatched()),
        }
    }

    /// Slides the idle deadline, and changes nothing else.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when there is no such session.
    pub async fn touch(&self, session: impl Into<Selector>) -> Result<Touched, Error> {
        let request = Request::TouchSession(v1::TouchSessionRequest {
            context: None,
            namespace: self.namespace(),
            session: Some(session.into().into_proto()),
        });
        match self.client.call(request).await? {
            Response::TouchSession(touched) => Ok(Touched {
                revision: touched.revision,
                version: touched.version,
                expires: system_time(touched.expire_time),
            }),
            _ => Err(mismatched()),
        }
    }

    /// Ends a session for good. Returns the revision of that.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] when there is no such session.
    pub async fn delete(&self, session: impl Into<Selector>) -> Result<u64, Error> {
        self.delete_with(session, DeleteOptions::new()).await
    }

    /// Ends a session for good if it has this version still. Returns the revision of that.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::VersionMismatch`].
    pub async fn delete_version(
        &self,
        session: impl Into<Selector>,
        version: u64,
    ) -> Result<u64, Error> {
        self.delete_with(session, DeleteOptions::new().expect_version(version)).await
    }

    /// Ends a session for good as `options` say. Returns the revision of that.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::VersionMismatch`]; [`Error::Fenced`].
    pub async fn delete_with(
        &self,
        session: impl Into<Selector>,
        options: DeleteOptions,
    ) -> Result<u64, Error> {
        let request = Request::DeleteSession(v1::DeleteSessionRequest {
            context: None,
            namespace: self.namespace(),
            session: Some(session.into().into_proto()),
            expected_version: options.expected_version,
            fence: options.fence,
        });
        match self.client.call(request).await? {
            Response::DeleteSession(deleted) => Ok(deleted.revision),
            _ => Err(mismatched()),
        }
    }

    /// One page of the namespace's sessions: the first, or with `page.next` of one the next.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when the token is not one of this list's.
    pub async fn list(&self, options: &ListOptions, next: Option<String>) -> Result<Page, Error> {
        let local = if options.local { Consistency::Local } else { Consistency::Unspecified };
        let request = Request::ListSessions(v1::ListSessionsRequest {
            namespace: self.namespace(),
            principal: options.principal.clone(),
            page_size: options.page_size,
            page_token: next.unwrap_or_default(),
            consistency: local.into(),
            max_staleness: None,
        });
        match self.client.call(request).await? {
            Response::ListSessions(page) => Ok(Page {
                revision: page.revision,
                sessions: page.sessions.into_iter().map(Session::from).collect(),
                next: Some(page.next_page_token).filter(|token| !token.is_empty()),
            }),
            _ => Err(mismatched()),
        }
    }

    fn namespace(&self) -> String {
        self.client.namespace.to_string()
    }
}
