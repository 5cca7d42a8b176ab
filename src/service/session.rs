//! Sessions: the use cases.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::error::{Error, ErrorKind};
use super::field::{invalid_page_token, page_size, parse_hex, valid_name, valid_namespace};
use super::request::{Call, Consistency, RequestContext, RequestIds, read};
use crate::limits::{
    ATTRIBUTE_NAMES_MAX, ATTRIBUTE_VALUE_BYTES_MAX, PAGE_SIZE_MAX, SESSION_ATTRIBUTES_MAX,
    SESSION_BYTES_MAX, TIMEOUT_MAX, TIMEOUT_MIN,
};
use crate::raft::{Node, WriteError};
use crate::session_id;
use crate::state::{
    Attribute, Command, Digest, Fence, Namespace, Outcome, Query, QueryReply, Rejection, Reply,
    Revision, Session, SessionKey, State, Timeout, Timestamp, TouchNeed,
};

/// Names a session from outside.
#[derive(Clone, PartialEq, Eq)]
pub enum SessionSelector {
    /// By the secret.
    Id(String),
    /// By its digest, in hex.
    Handle(String),
}

/// A session to be created.
#[derive(Clone, Default)]
pub struct NewSession {
    /// Identity of the request.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// Empty to have one minted.
    pub id: String,
    /// Empty for none.
    pub principal: String,
    /// Names and values.
    pub attributes: BTreeMap<String, Bytes>,
    /// `None` for the namespace's default.
    pub idle_timeout: Option<Timeout>,
    /// `None` for the namespace's default.
    pub absolute_timeout: Option<Timeout>,
}

/// A session was created.
#[derive(Clone)]
pub struct Created {
    /// Of the change; also the version.
    pub revision: Revision,
    /// The id, if it was minted here.
    pub minted_id: Option<String>,
    /// Safe to show.
    pub handle: Digest,
    /// `None` for never.
    pub expires: Option<Timestamp>,
}

/// A session to be read.
#[derive(Clone)]
pub struct GetSession {
    /// Empty for `default`.
    pub namespace: String,
    /// Which.
    pub session: SessionSelector,
    /// How fresh.
    pub consistency: Consistency,
    /// Whether reading it counts as an access.
    pub touch: bool,
}

/// Which attributes a reader wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All of them.
    All,
    /// Metadata only.
    None,
    /// These, ordered and without repetitions.
    Named(Vec<String>),
}

impl Wanted {
    /// What `metadata_only` and `attribute_names` of a request say.
    ///
    /// # Errors
    ///
    /// If there are too many names, or one can be no attribute's.
    pub fn of(metadata_only: bool, mut names: Vec<String>) -> Result<Self, Error> {
        if metadata_only {
            return Ok(Self::None);
        }
        if names.is_empty() {
            return Ok(Self::All);
        }
        if names.len() > ATTRIBUTE_NAMES_MAX {
            let (found, limit) = (names.len() as u64, ATTRIBUTE_NAMES_MAX as u64);
            let error = Error::over_limit("attribute_names", "names", found, limit);
            return Err(error.remedy("name fewer, or leave it empty for all attributes"));
        }
        for name in &names {
            valid_name("attribute_names", name)?;
        }
        names.sort_unstable();
        names.dedup();
        Ok(Self::Named(names))
    }

    /// Bytes of memory that the names take while a read waits.
    pub fn weight(&self) -> usize {
        match self {
            Self::All | Self::None => 0,
            Self::Named(names) => names.iter().map(|name| size_of::<String>() + name.len()).sum(),
        }
    }
}

/// A session as it was found, shared with the state.
#[derive(Clone)]
pub struct Found {
    /// Of the state that was read.
    pub revision: Revision,
    /// Where it is.
    pub namespace: Namespace,
    /// Which.
    pub handle: Digest,
    /// What.
    pub session: Arc<Session>,
}

/// Sessions to be read at one revision.
#[derive(Clone)]
pub struct BatchGet {
    /// Empty for `default`.
    pub namespace: String,
    /// Which.
    pub sessions: Vec<SessionSelector>,
    /// How fresh.
    pub consistency: Consistency,
}

impl BatchGet {
    /// Bytes of memory that the selected keys take while the read waits.
    pub fn weight(&self) -> usize {
        self.sessions.len() * size_of::<SessionKey>()
    }
}

/// A change to a session.
#[derive(Clone)]
pub struct SessionUpdate {
    /// Identity of the request.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// Which.
    pub session: SessionSelector,
    /// Attributes to set.
    pub set: BTreeMap<String, Bytes>,
    /// Attributes to remove.
    pub remove: Vec<String>,
    /// Compare and set.
    pub expected_version: Option<u64>,
    /// `Some("")` for none, `None` for unchanged.
    pub principal: Option<String>,
    /// `None` for unchanged.
    pub idle_timeout: Option<Timeout>,
    /// Only while this token holds the lock.
    pub fence: Option<SessionFence>,
}

/// A lock that must be held for a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionFence {
    /// The lock's name.
    pub lock: String,
    /// The fencing token.
    pub token: u64,
}

/// A session to be deleted.
#[derive(Clone)]
pub struct DeleteSession {
    /// Identity of the request.
    pub context: RequestContext,
    /// Empty for `default`.
    pub namespace: String,
    /// Which.
    pub session: SessionSelector,
    /// Compare and delete.
    pub expected_version: Option<u64>,
    /// Only while this token holds the lock.
    pub fence: Option<SessionFence>,
}

/// A session was changed.
#[derive(Clone, Copy, Debug)]
pub struct Updated {
    /// Of the change; also the version.
    pub revision: Revision,
    /// `None` for never.
    pub expires: Option<Timestamp>,
}

/// A session was touched.
#[derive(Clone, Copy, Debug)]
pub struct Touched {
    /// Of the state in which it was alive.
    pub revision: Revision,
    /// Its version.
    pub version: Revision,
    /// `None` for never.
    pub expires: Option<Timestamp>,
}

/// A session was deleted.
#[derive(Clone, Copy, Debug)]
pub struct Deleted {
    /// Of the change.
    pub revision: Revision,
}

/// A page of sessions.
#[derive(Clone)]
pub struct ListSessions {
    /// Empty for `default`.
    pub namespace: String,
    /// Empty for all.
    pub principal: String,
    /// 0 for the default.
    pub page_size: u32,
    /// Empty for the first page.
    pub page_token: String,
    /// How fresh.
    pub consistency: Consistency,
}

/// Several sessions.
#[derive(Clone)]
pub struct Listed {
    /// Of the state that was read.
    pub revision: Revision,
    /// Where they are.
    pub namespace: Namespace,
    /// In the order of the request, or of their handles.
    pub sessions: Vec<(Digest, Arc<Session>)>,
    /// Behind which the next page begins, if there is one.
    pub next: Option<Digest>,
}

/// The digest under which a session id is known below this layer.
pub fn session_digest(namespace: &str, id: &str) -> Digest {
    let mut hash = Sha256::new();
    hash.update(b"quorate.session.v1\0");
    hash.update(namespace.as_bytes());
    hash.update(b"\0");
    hash.update(id.as_bytes());
    let full = hash.finalize();
    let mut digest = [0; 16];
    digest.copy_from_slice(&full[..16]);
    Digest(digest)
}

/// The session use cases of one node.
pub struct Sessions {
    node: Arc<Node>,
    request_ids: RequestIds,
}

impl Sessions {
    /// For one node; `seed` is random.
    pub fn new(node: Arc<Node>, seed: u64) -> Self {
        Self { node, request_ids: RequestIds::new(seed) }
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Creates a session.
    pub fn create(
        &self,
        call: &Call<'_>,
        new: NewSession,
        done: impl FnOnce(Result<Created, Error>) + Send + 'static,
    ) {
        let resend = new.context.resend;
        let (command, digest, minted_id) = match self.create_command(call, new) {
            Ok(built) => built,
            Err(error) => return done(Err(error)),
        };
        self.node.write(&command, resend, call.deadline.0, move |result| {
            done(written(result).map(|written| Created {
                revision: written.revision,
                minted_id,
                handle: digest,
                expires: written.deadline,
            }));
        });
    }

    fn create_command(
        &self,
        call: &Call<'_>,
        new: NewSession,
    ) -> Result<(Command, Digest, Option<String>), Error> {
        let request = self.request_ids.complete(&self.node, call, &new.context)?;
        let namespace = valid_namespace(new.namespace)?;
        let minted_id = if new.id.is_empty() {
            if new.context.resend {
                return Err(Error::invalid(
                    "id",
                    "INVALID_SESSION_ID",
                    "a create that names no id must not be resent; mint the id in the client",
                ));
            }
            Some(mint_id()?)
        } else {
            valid_id(&new.id)?;
            None
        };
        let digest = session_digest(&namespace.0, minted_id.as_deref().unwrap_or(&new.id));
        let command = Command::CreateSession {
            request,
            key: SessionKey { namespace, digest },
            principal: valid_principal(new.principal)?,
            attributes: valid_attributes("attributes", new.attributes)?,
            idle_timeout: valid_timeout("idle_timeout", new.idle_timeout)?,
            absolute_timeout: valid_timeout("absolute_timeout", new.absolute_timeout)?,
        };
        Ok((command, digest, minted_id))
    }

    /// Reads a session.
    pub fn get(
        &self,
        call: &Call<'_>,
        get: GetSession,
        done: impl FnOnce(Result<Found, Error>) + Send + 'static,
    ) {
        let key = match session_key(get.namespace, &get.session) {
            Ok(key) => key,
            Err(error) => return done(Err(error)),
        };
        if get.touch {
            return self.get_and_touch(call, key, get.consistency, done);
        }
        let query = Query::GetSession(key.clone());
        read(
            &self.node,
            call,
            get.consistency,
            move |state| state.query(&query),
            move |reply| done(reply.and_then(|reply| found(reply, key))),
        );
    }

    fn get_and_touch(
        &self,
        call: &Call<'_>,
        key: SessionKey,
        consistency: Consistency,
        done: impl FnOnce(Result<Found, Error>) + Send + 'static,
    ) {
        let node = self.node.clone();
        let deadline = call.deadline.0;
        let request = match self.request_ids.complete(&self.node, call, &RequestContext::default())
        {
            Ok(request) => request,
            Err(error) => return done(Err(error)),
        };
        let query = Query::GetSession(key.clone());
        let now = request.first_sent;
        let touched = key.clone();
        let look = move |state: &State| (state.touch_need(&touched, now), state.query(&query));
        read(&self.node, call, consistency, look, move |looked| {
            let (need, reply) = match looked {
                Ok(looked) => looked,
                Err(error) => return done(Err(error)),
            };
            let touch = Command::TouchSession { request, key: key.clone() };
            match need {
                TouchNeed::Wait { .. } => {
                    node.write(&touch, false, deadline, move |result| {
                        done(written(result).and_then(|_| found(reply, key)));
                    });
                }
                TouchNeed::Propose { .. } => {
                    node.write(&touch, false, deadline, |_| {});
                    done(found(reply, key));
                }
                TouchNeed::None { .. } | TouchNeed::NotFound => done(found(reply, key)),
            }
        });
    }

    /// Reads several sessions at one revision; those that do not exist are left out.
    pub fn batch_get(
        &self,
        call: &Call<'_>,
        get: BatchGet,
        done: impl FnOnce(Result<Listed, Error>) + Send + 'static,
    ) {
        let keys = match batch_keys(get.namespace, &get.sessions) {
            Ok(keys) => keys,
            Err(error) => return done(Err(error)),
        };
        let (namespace, keys) = keys;
        let look = move |state: &State| {
            let sessions: Vec<_> = keys
                .into_iter()
                .flat_map(|key| state.query(&Query::GetSession(key)).sessions)
                .collect();
            (state.revision(), sessions)
        };
        read(&self.node, call, get.consistency, look, move |looked| {
            done(looked.map(|(revision, sessions)| Listed {
                revision,
                namespace,
                sessions,
                next: None,
            }));
        });
    }

    /// Changes a session.
    pub fn update(
        &self,
        call: &Call<'_>,
        update: SessionUpdate,
        done: impl FnOnce(Result<Updated, Error>) + Send + 'static,
    ) {
        let resend = update.context.resend;
        let command = match self.update_command(call, update) {
            Ok(command) => command,
            Err(error) => return done(Err(error)),
        };
        self.node.write(&command, resend, call.deadline.0, move |result| {
            done(
                written(result).map(|written| Updated {
                    revision: written.revision,
                    expires: written.deadline,
                }),
            );
        });
    }

    fn update_command(&self, call: &Call<'_>, update: SessionUpdate) -> Result<Command, Error> {
        let request = self.request_ids.complete(&self.node, call, &update.context)?;
        let key = session_key(update.namespace, &update.session)?;
        let mut remove = update.remove;
        remove.sort_unstable();
        remove.dedup();
        if remove.len() > SESSION_ATTRIBUTES_MAX {
            return Err(Error::over_limit(
                "remove_attributes",
                "names",
                remove.len() as u64,
                SESSION_ATTRIBUTES_MAX as u64,
            ));
        }
        for name in &remove {
            valid_name("remove_attributes", name)?;
            if update.set.contains_key(name) {
                return Err(Error::invalid(
                    "remove_attributes",
                    "INVALID_ATTRIBUTE",
                    format!("attribute {name:?} is both set and removed"),
                ));
            }
        }
        Ok(Command::UpdateSession {
            request,
            key,
            set: valid_attributes("set_attributes", update.set)?,
            remove,
            expected_version: update.expected_version.map(Revision),
            principal: update.principal.map(valid_principal).transpose()?,
            idle_timeout: valid_timeout("idle_timeout", update.idle_timeout)?,
            fence: valid_fence(update.fence)?,
        })
    }

    /// Slides a session's deadline; costs a log entry only when the stored one has become old.
    pub fn touch(
        &self,
        call: &Call<'_>,
        context: &RequestContext,
        namespace: String,
        session: &SessionSelector,
        done: impl FnOnce(Result<Touched, Error>) + Send + 'static,
    ) {
        let request = self.request_ids.complete(&self.node, call, context);
        let (request, key) = match request.and_then(|r| Ok((r, session_key(namespace, session)?))) {
            Ok(built) => built,
            Err(error) => return done(Err(error)),
        };
        let (node, deadline) = (self.node.clone(), call.deadline.0);
        // An access counts from when it is made here, not from when a resend was first sent.
        let Some(now) = self.node.cluster_time().map(|stamp| stamp.time) else {
            return done(Err(self.node.unavailable().into()));
        };
        let looked_at = key.clone();
        let look = move |state: &State| (state.revision(), state.touch_need(&looked_at, now));
        self.node.read(deadline, look, move |looked| {
            let (revision, need) = match looked {
                Ok(looked) => looked,
                Err(error) => return done(Err(error.into())),
            };
            let touch = Command::TouchSession { request, key };
            match need {
                TouchNeed::NotFound => done(Err(Error::session_not_found())),
                TouchNeed::None { version, deadline } => {
                    done(Ok(Touched { revision, version, expires: deadline }));
                }
                TouchNeed::Propose { version, deadline: expires } => {
                    node.write(&touch, false, deadline, |_| {});
                    done(Ok(Touched { revision, version, expires }));
                }
                TouchNeed::Wait { .. } => node.write(&touch, false, deadline, move |result| {
                    done(written(result).map(|written| Touched {
                        revision: written.revision,
                        version: written.version,
                        expires: written.deadline,
                    }));
                }),
            }
        });
    }

    /// Ends a session.
    pub fn delete(
        &self,
        call: &Call<'_>,
        delete: DeleteSession,
        done: impl FnOnce(Result<Deleted, Error>) + Send + 'static,
    ) {
        let resend = delete.context.resend;
        let command = match self.delete_command(call, delete) {
            Ok(command) => command,
            Err(error) => return done(Err(error)),
        };
        self.node.write(&command, resend, call.deadline.0, move |result| {
            done(written(result).map(|written| Deleted { revision: written.revision }));
        });
    }

    fn delete_command(&self, call: &Call<'_>, delete: DeleteSession) -> Result<Command, Error> {
        Ok(Command::DeleteSession {
            request: self.request_ids.complete(&self.node, call, &delete.context)?,
            key: session_key(delete.namespace, &delete.session)?,
            expected_version: delete.expected_version.map(Revision),
            fence: valid_fence(delete.fence)?,
        })
    }

    /// Lists sessions in the order of their handles.
    pub fn list(
        &self,
        call: &Call<'_>,
        list: ListSessions,
        done: impl FnOnce(Result<Listed, Error>) + Send + 'static,
    ) {
        let consistency = list.consistency;
        let (namespace, query) = match list_query(list) {
            Ok(built) => built,
            Err(error) => return done(Err(error)),
        };
        read(
            &self.node,
            call,
            consistency,
            move |state| state.query(&query),
            move |reply| {
                done(reply.map(|QueryReply { revision, sessions, next }| Listed {
                    revision,
                    namespace,
                    sessions,
                    next,
                }));
            },
        );
    }
}

struct Written {
    revision: Revision,
    version: Revision,
    deadline: Option<Timestamp>,
}

fn written(result: Result<Reply, WriteError>) -> Result<Written, Error> {
    let Reply { revision, outcome } = result?;
    match outcome {
        Outcome::Written { version, deadline } => Ok(Written { revision, version, deadline }),
        Outcome::Rejected(rejection) => Err(Error::rejected(rejection)),
        _ => Err(Error::rejected(Rejection::MalformedCommand)),
    }
}

fn found(reply: QueryReply, key: SessionKey) -> Result<Found, Error> {
    let (handle, session) =
        reply.sessions.into_iter().next().ok_or_else(Error::session_not_found)?;
    Ok(Found { revision: reply.revision, namespace: key.namespace, handle, session })
}

fn mint_id() -> Result<String, Error> {
    session_id::mint().map_err(|error| {
        Error::new(ErrorKind::Internal, "NO_RANDOMNESS", format!("no session id: {error}"))
    })
}

fn batch_keys(
    namespace: String,
    sessions: &[SessionSelector],
) -> Result<(Namespace, Vec<SessionKey>), Error> {
    if sessions.len() > PAGE_SIZE_MAX {
        let found = sessions.len() as u64;
        return Err(Error::over_limit("sessions", "sessions", found, PAGE_SIZE_MAX as u64));
    }
    let namespace = valid_namespace(namespace)?;
    let keys = sessions
        .iter()
        .map(|session| {
            let digest = selected(&namespace, session)?;
            Ok(SessionKey { namespace: namespace.clone(), digest })
        })
        .collect::<Result<_, Error>>()?;
    Ok((namespace, keys))
}

fn list_query(list: ListSessions) -> Result<(Namespace, Query), Error> {
    let namespace = valid_namespace(list.namespace)?;
    let limit = page_size(list.page_size)?;
    let after = match list.page_token.as_str() {
        "" => None,
        token => Some(Digest(parse_hex(token).ok_or_else(invalid_page_token)?)),
    };
    let principal = valid_principal(list.principal)?;
    let query = Query::ListSessions { namespace: namespace.clone(), principal, after, limit };
    Ok((namespace, query))
}

fn session_key(namespace: String, session: &SessionSelector) -> Result<SessionKey, Error> {
    let namespace = valid_namespace(namespace)?;
    let digest = selected(&namespace, session)?;
    Ok(SessionKey { namespace, digest })
}

fn selected(namespace: &Namespace, session: &SessionSelector) -> Result<Digest, Error> {
    match session {
        SessionSelector::Id(id) => {
            valid_id(id)?;
            Ok(session_digest(&namespace.0, id))
        }
        SessionSelector::Handle(handle) => parse_hex(handle).map(Digest).ok_or_else(|| {
            Error::invalid(
                "session.handle",
                "INVALID_HANDLE",
                "a handle is 32 lowercase hex characters, as `quorate session list` prints them",
            )
        }),
    }
}

fn valid_id(id: &str) -> Result<(), Error> {
    if !session_id::has_valid_length(id) || !session_id::has_valid_characters(id) {
        return Err(Error::invalid(
            "session.id",
            "INVALID_SESSION_ID",
            "a session id has 16 to 128 characters of A-Z a-z 0-9 - _ . ~ ! $ & ' * + ^ ` | # %",
        ));
    }
    Ok(())
}

fn valid_fence(fence: Option<SessionFence>) -> Result<Option<Fence>, Error> {
    let Some(SessionFence { lock, token }) = fence else { return Ok(None) };
    valid_name("fence.lock", &lock)?;
    if token == 0 {
        return Err(Error::invalid(
            "fence.token",
            "INVALID_FENCE",
            "fence.token is 0; set it to the token that AcquireLock answered",
        ));
    }
    Ok(Some(Fence { lock: lock.into(), token: Revision(token) }))
}

fn valid_principal(principal: String) -> Result<Option<Arc<str>>, Error> {
    if principal.is_empty() {
        return Ok(None);
    }
    valid_name("principal", &principal)?;
    Ok(Some(principal.into()))
}

fn valid_attributes(
    field: &'static str,
    attributes: BTreeMap<String, Bytes>,
) -> Result<Vec<Attribute>, Error> {
    if attributes.len() > SESSION_ATTRIBUTES_MAX {
        let found = attributes.len() as u64;
        return Err(Error::over_limit(field, "attributes", found, SESSION_ATTRIBUTES_MAX as u64));
    }
    let mut total = 0;
    let mut valid = Vec::with_capacity(attributes.len());
    for (name, value) in attributes {
        valid_name(field, &name)?;
        if value.len() > ATTRIBUTE_VALUE_BYTES_MAX {
            return Err(Error::over_limit(
                field,
                "bytes in a value",
                value.len() as u64,
                ATTRIBUTE_VALUE_BYTES_MAX as u64,
            ));
        }
        total += name.len() + value.len();
        valid.push(Attribute { name, value });
    }
    if total > SESSION_BYTES_MAX {
        return Err(Error::over_limit(field, "bytes", total as u64, SESSION_BYTES_MAX as u64));
    }
    Ok(valid)
}

fn valid_timeout(field: &'static str, timeout: Option<Timeout>) -> Result<Option<Timeout>, Error> {
    let outside = |length: Duration| !(TIMEOUT_MIN..=TIMEOUT_MAX).contains(&length);
    match timeout {
        Some(Timeout::After(length)) if outside(length) => Err(Error::invalid(
            field,
            "INVALID_TIMEOUT",
            format!("{field} has to be between 1 s and 10 years, or never"),
        )),
        timeout => Ok(timeout),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_a_read_wants_are_few_and_in_order() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let of = |wanted: &[&str]| Wanted::of(false, names(wanted));
        assert_eq!(of(&["b", "a", "b"]), Ok(Wanted::Named(names(&["a", "b"]))));
        assert_eq!(of(&[]), Ok(Wanted::All));
        assert_eq!(Wanted::of(true, names(&["a"])), Ok(Wanted::None));
        assert!(of(&["a"; ATTRIBUTE_NAMES_MAX]).is_ok());
        let error = of(&["a"; ATTRIBUTE_NAMES_MAX + 1]).unwrap_err();
        assert_eq!(error.reason, "LIMIT_EXCEEDED");
        assert!(error.message.contains("attribute_names") && error.message.contains("256"));
        assert_eq!(of(&[""]).unwrap_err().reason, "INVALID_NAME");
        assert_eq!(of(&[&"a".repeat(257)]).unwrap_err().reason, "LIMIT_EXCEEDED");
    }
}
