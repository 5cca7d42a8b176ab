//! What goes into the state machine and what comes out: commands, queries, replies, changes.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use super::session::Session;
use super::time::{Timeout, Timestamp};
use super::tombstone::Tombstone;

/// A counter in the state, raised by one for every command that changes anything and every sweep
/// step. Everything that a user sees uses it; the log index never does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A namespace's name; validated by the service layer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Namespace(pub Arc<str>);

/// So that a map can be asked for a name that nobody owns.
impl Borrow<str> for Namespace {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The first 16 bytes of the SHA-256 of a session id: the only form in which ids get this deep.
/// Displayed in lowercase hex it is the session's handle.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 16]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Names a session: the digest of its id, within a namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey {
    /// The namespace.
    pub namespace: Namespace,
    /// The digest of the id.
    pub digest: Digest,
}

impl fmt::Display for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.digest)
    }
}

/// What makes a command happen once, however often it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// A random number, the same in every sending.
    pub id: u64,
    /// Cluster time of the first sending, as the sender knew it; the same in every sending.
    pub first_sent: Timestamp,
    /// Cluster time after which it is refused; the same in every sending.
    pub expires: Timestamp,
}

/// A name and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// 1 to 256 bytes of UTF-8.
    pub name: String,
    /// Opaque.
    pub value: Bytes,
}

/// A write, as the state machine sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Creates a session.
    CreateSession {
        /// What makes it happen once.
        request: Request,
        /// The new session.
        key: SessionKey,
        /// The user it belongs to.
        principal: Option<Arc<str>>,
        /// Ordered by name, without repetitions.
        attributes: Vec<Attribute>,
        /// `None` for the namespace's default.
        idle_timeout: Option<Timeout>,
        /// `None` for the namespace's default.
        absolute_timeout: Option<Timeout>,
    },
    /// Changes a session's data and slides its deadline.
    UpdateSession {
        /// What makes it happen once.
        request: Request,
        /// The session.
        key: SessionKey,
        /// Attributes to set, ordered by name, without repetitions.
        set: Vec<Attribute>,
        /// Attributes to remove, ordered, without repetitions, none of them in `set`.
        remove: Vec<String>,
        /// Compare and set.
        expected_version: Option<Revision>,
        /// `Some(None)` clears it, `None` leaves it as it is.
        principal: Option<Option<Arc<str>>>,
        /// `None` leaves it as it is.
        idle_timeout: Option<Timeout>,
    },
    /// Slides a session's deadline.
    TouchSession {
        /// Bounds its life; a touch is idempotent and is not remembered.
        request: Request,
        /// The session.
        key: SessionKey,
    },
    /// Ends a session.
    DeleteSession {
        /// What makes it happen once.
        request: Request,
        /// The session.
        key: SessionKey,
        /// Compare and delete.
        expected_version: Option<Revision>,
    },
    /// Removes what has expired, at most `EXPIRE_BATCH_MAX` records of it.
    Tick,
}

impl Command {
    /// The session that it is about.
    pub fn key(&self) -> Option<&SessionKey> {
        match self {
            Self::CreateSession { key, .. }
            | Self::UpdateSession { key, .. }
            | Self::TouchSession { key, .. }
            | Self::DeleteSession { key, .. } => Some(key),
            Self::Tick => None,
        }
    }
}

/// A read, as the state machine sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    /// One session.
    GetSession(SessionKey),
    /// Sessions of a namespace in the order of their digests.
    ListSessions {
        /// The namespace.
        namespace: Namespace,
        /// Only this user's.
        principal: Option<Arc<str>>,
        /// Only those behind this digest.
        after: Option<Digest>,
        /// At most so many.
        limit: usize,
    },
}

/// What a read found. It shares records with the state; nothing is copied.
#[derive(Clone, Debug)]
pub struct QueryReply {
    /// Revision of the state that was read.
    pub revision: Revision,
    /// Live sessions only: at most one for a Get, up to the limit for a List.
    pub sessions: Vec<(Digest, Arc<Session>)>,
    /// For a List: whether there are more behind the last one.
    pub more: bool,
}

/// What a command answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The revision of the change, or of the state that refused it.
    pub revision: Revision,
    /// What happened.
    pub outcome: Outcome,
}

/// What happened to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was applied, now or by an earlier sending of the same request.
    Written {
        /// The session's version after it.
        version: Revision,
        /// When the session expires; `None` for never, or after a delete.
        deadline: Option<Timestamp>,
    },
    /// It was refused, on every node alike, and nothing changed.
    Rejected(Rejection),
}

/// Why a command was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// There is no such session, or it has expired.
    SessionNotFound,
    /// A session of that key exists, created by another request.
    SessionExists,
    /// A session of that key ended less than `TOMBSTONE_LIFETIME` ago.
    SessionIdRetired,
    /// The session is at this version, not at the expected one.
    VersionMismatch(Revision),
    /// It came after the time at which it expires, or claims to be sent after that time.
    RequestExpired,
    /// It expires more than `REQUEST_LIFETIME_MAX` from now, or from its first sending.
    RequestLifetimeTooLong,
    /// It may have been applied and forgotten: a resend, or a first sending behind its resend.
    OutcomeUnknown,
    /// The session would grow to so many bytes.
    SessionTooLarge(u64),
    /// The session would have so many attributes.
    TooManyAttributes(u64),
    /// It could not be decoded. Only a defect leads here; every node refuses it alike.
    MalformedCommand,
}

/// What one record of the state is. Keys and records leave the core together, as changes, and come
/// back together when a checkpoint is loaded.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKey {
    /// A session.
    Session(SessionKey),
    /// What remains of a session for a while.
    Tombstone(SessionKey),
}

/// A record, shared with the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A session.
    Session(Arc<Session>),
    /// What remains of one.
    Tombstone(Arc<Tombstone>),
}

/// What applying a command did to one record.
#[derive(Clone, Debug)]
pub struct Change {
    /// The revision at which it happened.
    pub revision: Revision,
    /// Which record.
    pub key: RecordKey,
    /// The record before; `None` if there was none.
    pub before: Option<Record>,
    /// The record after; `None` if it is gone.
    pub after: Option<Record>,
    /// Why.
    pub cause: Cause,
}

/// Why a record changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A Create.
    Created,
    /// An Update.
    Updated,
    /// A stored access.
    Touched,
    /// A Delete.
    Deleted,
    /// Its deadline passed.
    Expired,
    /// A tombstone whose time was over was dropped.
    Forgotten,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Updated => "updated",
            Self::Touched => "touched",
            Self::Deleted => "deleted",
            Self::Expired => "expired",
            Self::Forgotten => "forgotten",
        })
    }
}
