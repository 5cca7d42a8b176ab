//! What goes into the state machine and what comes out: commands, queries, replies, changes.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::claim::{Claim, ClaimKey, LockKey, LockKind, LockMode};
use super::lease::{Lease, LeaseId, LeaseKey, LeaseTombstone};
use super::ring::{Member, MemberData, MemberKey, Ring, RingKey};
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

/// Makes a write to a session depend on a lock of its namespace: it is applied only while this
/// token holds that lock and its lease is alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The lock's name.
    pub lock: Arc<str>,
    /// The fencing token.
    pub token: Revision,
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
        /// A lock that must be held.
        fence: Option<Fence>,
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
        /// A lock that must be held.
        fence: Option<Fence>,
    },
    /// Grants a lease.
    GrantLease {
        /// What makes it happen once. The lease keeps its id for good.
        request: Request,
        /// The new lease.
        key: LeaseKey,
        /// Who holds it, for people to read: at most 256 bytes, may be empty.
        owner: Arc<str>,
        /// How long it lives without a renewal: 1 s to 24 h.
        ttl: Duration,
    },
    /// Renews leases. It is idempotent, so it need not be remembered.
    RenewLeases {
        /// The namespace of them all.
        namespace: Namespace,
        /// At most `LEASE_RENEWALS_MAX`.
        ids: Vec<LeaseId>,
        /// Cluster time after which it is refused: a straggler must not lengthen what its owner
        /// believes to have ended. `None` below the feature level that has it.
        expires: Option<Timestamp>,
    },
    /// Ends a lease, and whatever hangs from it.
    RevokeLease {
        /// What makes it happen once.
        request: Request,
        /// The lease.
        key: LeaseKey,
    },
    /// Claims a lock, or a share of it. One claim is made for (lock, lease, request id), however
    /// often and by whichever way this comes.
    AcquireLock {
        /// Identifies the claim.
        request: Request,
        /// The lock.
        lock: LockKey,
        /// The lease that the claim hangs from.
        lease: LeaseId,
        /// What is wanted.
        mode: LockMode,
        /// How long to wait for it, on the steady clock from when this is applied: zero for not at
        /// all, at most 10 min.
        wait: Duration,
        /// How long the share is kept back if the holder is lost: at most 60 s.
        lock_delay: Duration,
    },
    /// Gives a lock back.
    ReleaseLock {
        /// What makes it happen once.
        request: Request,
        /// The lock.
        lock: LockKey,
        /// The lease that holds it, which remembers: without it, a resend that finds the lock given
        /// back is answered `OutcomeUnknown`. A token of another lease releases nothing.
        lease: Option<LeaseId>,
        /// The fencing token of the grant.
        token: Revision,
    },
    /// Undoes an Acquire, wherever it has got to: removes the waiter, takes the grant back, or
    /// keeps it from being applied if it comes after this. Idempotent.
    CancelAcquire {
        /// Bounds its life.
        request: Request,
        /// The lock.
        lock: LockKey,
        /// The lease of the Acquire.
        lease: LeaseId,
        /// The request id of the Acquire.
        acquire: u64,
    },
    /// Takes a lock from its holder, who learns of it when its token is worth nothing; or ends a
    /// lock-delay. By its nature it happens once: a token that is broken is not held. Nobody
    /// remembers it, so a resend that finds the token broken is answered `OutcomeUnknown`.
    BreakLock {
        /// Bounds its life.
        request: Request,
        /// The lock.
        lock: LockKey,
        /// The fencing token of the grant.
        token: Revision,
        /// Whether the holder's lock-delay is kept.
        delay: bool,
    },
    /// Makes somebody a member of a ring, or changes what the member says of itself.
    JoinRing {
        /// What makes it happen once; remembered on the lease.
        request: Request,
        /// The member: ring and name.
        member: MemberKey,
        /// The lease that it hangs from.
        lease: LeaseId,
        /// What it says of itself.
        data: MemberData,
    },
    /// Removes a member from its ring.
    LeaveRing {
        /// What makes it happen once; remembered on the lease of the member.
        request: Request,
        /// The member: ring and name.
        member: MemberKey,
        /// Only if it hangs from this lease. Without it, a resend that finds nobody of that name,
        /// or somebody who has joined since, is answered `OutcomeUnknown`.
        lease: Option<LeaseId>,
    },
    /// Removes what has expired, at most `EXPIRE_BATCH_MAX` records of it.
    Tick,
    /// Raises the state's feature level, to which its entry's has to be set.
    RaiseFeatureLevel {
        /// The level that all members know. One that is in force already changes nothing.
        to: u32,
    },
}

impl Command {
    /// What it is, without what it holds.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::CreateSession { .. } => "CreateSession",
            Self::UpdateSession { .. } => "UpdateSession",
            Self::TouchSession { .. } => "TouchSession",
            Self::DeleteSession { .. } => "DeleteSession",
            Self::GrantLease { .. } => "GrantLease",
            Self::RenewLeases { .. } => "RenewLeases",
            Self::RevokeLease { .. } => "RevokeLease",
            Self::AcquireLock { .. } => "AcquireLock",
            Self::ReleaseLock { .. } => "ReleaseLock",
            Self::CancelAcquire { .. } => "CancelAcquire",
            Self::BreakLock { .. } => "BreakLock",
            Self::JoinRing { .. } => "JoinRing",
            Self::LeaveRing { .. } => "LeaveRing",
            Self::Tick => "Tick",
            Self::RaiseFeatureLevel { .. } => "RaiseFeatureLevel",
        }
    }

    /// The session that it is about, if it is about one.
    pub fn key(&self) -> Option<&SessionKey> {
        match self {
            Self::CreateSession { key, .. }
            | Self::UpdateSession { key, .. }
            | Self::TouchSession { key, .. }
            | Self::DeleteSession { key, .. } => Some(key),
            _ => None,
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
    /// For a List: behind which the next page begins, if there is one.
    pub next: Option<Digest>,
}

/// What a command answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The revision of the change, or of the state that refused it.
    pub revision: Revision,
    /// What happened.
    pub outcome: Outcome,
}

/// What happened to a command. It was applied, now or by an earlier sending of the same request,
/// unless it was `Rejected`. Deadlines of leases are on the steady clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A session was written.
    Written {
        /// The session's version after it.
        version: Revision,
        /// When the session expires; `None` for never, or after a delete.
        deadline: Option<Timestamp>,
    },
    /// A lease was revoked, a lock released or broken, an Acquire cancelled, a ring left.
    Done,
    /// A lease is there.
    LeaseGranted {
        /// When it ends unless it is renewed.
        deadline: Timestamp,
    },
    /// Of each lease, in the order of the command, its new deadline, or `None` if it is gone.
    LeasesRenewed(Vec<Option<Timestamp>>),
    /// The lock is held. The reply's revision is the token, too.
    LockGranted {
        /// The fencing token.
        token: Revision,
        /// Cluster time of the grant.
        time: Timestamp,
        /// When the lease ends unless it is renewed.
        lease_deadline: Timestamp,
    },
    /// The claim waits. The reply's revision is its order, by which its changes can be followed.
    LockWaiting {
        /// Its place in the queue, from 1, counted no further than `LOCK_POSITION_MAX`. Those who
        /// have given up and have not been swept count.
        position: u32,
    },
    /// The member is on its ring. The reply's revision is that of the change, or, if there was
    /// nothing to change, the ring's.
    RingJoined {
        /// When the lease ends unless it is renewed.
        lease_deadline: Timestamp,
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
    /// It expires more than `REQUEST_LIFETIME_MAX` after its first sending.
    RequestLifetimeTooLong,
    /// It claims to have been sent more than `REQUEST_SKEW_MAX` from now.
    ClockAhead,
    /// It may have been applied and forgotten: a resend, or a first sending behind its resend.
    OutcomeUnknown,
    /// The session would grow to so many bytes.
    SessionTooLarge(u64),
    /// The session would have so many attributes.
    TooManyAttributes(u64),
    /// The token of the fence does not hold the lock, or its lease has ended.
    Fenced,
    /// There is no such lease, or it has ended.
    LeaseNotFound,
    /// A lease of that id exists, granted by another request.
    LeaseExists,
    /// A lease of that id ended less than `TOMBSTONE_LIFETIME` ago.
    LeaseIdRetired,
    /// The namespace has so many leases.
    TooManyLeases(u64),
    /// Somebody holds the lock or waits for it, and the claim was not to wait.
    LockHeld,
    /// The token does not hold the lock: it was released or lost, or never did.
    LockNotHeld,
    /// The lock exists, and is of this kind.
    LockModeMismatch(LockKind),
    /// This very Acquire was applied before and is over: released, cancelled, broken, timed out.
    AcquireEnded,
    /// So many wait for the lock.
    TooManyWaiters(u64),
    /// So many claims hang from the lease.
    TooManyClaims(u64),
    /// A member of that name hangs from another lease, which is alive.
    MemberExists,
    /// The ring has no member of that name, or that hangs from another lease than was named.
    MemberNotFound,
    /// The ring has so many members.
    TooManyMembers(u64),
    /// So many members of rings hang from the lease.
    TooManyMembersOfLease(u64),
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
    /// A lease.
    Lease(LeaseKey),
    /// What remains of a lease for a while.
    LeaseTombstone(LeaseKey),
    /// A claim on a lock.
    Claim(ClaimKey),
    /// A ring.
    Ring(RingKey),
    /// A member of a ring.
    Member(MemberKey),
}

impl RecordKey {
    /// What kind of record it names, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Session(_) => "session",
            Self::Tombstone(_) => "tombstone",
            Self::Lease(_) => "lease",
            Self::LeaseTombstone(_) => "lease tombstone",
            Self::Claim(_) => "claim",
            Self::Ring(_) => "ring",
            Self::Member(_) => "member",
        }
    }
}

/// A record, shared with the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A session.
    Session(Arc<Session>),
    /// What remains of one.
    Tombstone(Arc<Tombstone>),
    /// A lease.
    Lease(Arc<Lease>),
    /// What remains of one.
    LeaseTombstone(Arc<LeaseTombstone>),
    /// A claim on a lock.
    Claim(Arc<Claim>),
    /// A ring.
    Ring(Arc<Ring>),
    /// A member of a ring.
    Member(Arc<Member>),
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
    /// The deadline of a session or lease passed.
    Expired,
    /// A tombstone whose time was over was dropped.
    Forgotten,
    /// A lease was granted; or a claim holds its lock, at once or when its turn came.
    Granted,
    /// A lease was renewed.
    Renewed,
    /// A lease was revoked.
    Revoked,
    /// A lease remembers what was done with it; nothing else of it changed.
    Remembered,
    /// A claim waits for its lock.
    Queued,
    /// A holder gave its lock back.
    Released,
    /// An Acquire was cancelled, whether its claim held the lock or waited.
    Cancelled,
    /// A waiter's deadline passed.
    TimedOut,
    /// The lease of a claim or member expired. A holder is lost, and `Delayed` if it wants a
    /// lock-delay.
    LeaseExpired,
    /// The lease of a claim or member was revoked. A holder is lost.
    LeaseRevoked,
    /// An operator took the lock from its holder. `Delayed` if a lock-delay was to be kept.
    Broken,
    /// A lock-delay was over.
    DelayOver,
    /// A member joined its ring.
    Joined,
    /// A member left its ring.
    Left,
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
            Self::Granted => "granted",
            Self::Renewed => "renewed",
            Self::Revoked => "revoked",
            Self::Remembered => "remembered",
            Self::Queued => "queued",
            Self::Released => "released",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed out",
            Self::LeaseExpired => "lease expired",
            Self::LeaseRevoked => "lease revoked",
            Self::Broken => "broken",
            Self::DelayOver => "delay over",
            Self::Joined => "joined",
            Self::Left => "left",
        })
    }
}
