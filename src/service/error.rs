//! What went wrong, in words that clients can rely on.

use std::fmt;
use std::time::Duration;

use crate::limits::ANSWER_BYTES_MAX;
use crate::raft::{ReadError, WriteError};
use crate::state::{Cause, Rejection};

/// The class of an error; becomes the gRPC code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request can never be served as it is.
    InvalidArgument,
    /// There is no such thing.
    NotFound,
    /// There is one already.
    AlreadyExists,
    /// The state does not allow it.
    FailedPrecondition,
    /// It cannot be told whether it was done.
    Aborted,
    /// A limit was reached.
    ResourceExhausted,
    /// Time ran out.
    DeadlineExceeded,
    /// Not now; nothing was done.
    Unavailable,
    /// Known to the API, not to this node.
    Unimplemented,
    /// A defect.
    Internal,
}

/// An error with a stable reason, and a message for a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Its class.
    pub kind: ErrorKind,
    /// Stable, in capitals, such as `SESSION_NOT_FOUND`.
    pub reason: &'static str,
    /// One sentence: what is wrong and what helps. Never holds a session id.
    pub message: String,
    /// Facts for programs, such as the field, the limit, the version found.
    pub metadata: Vec<(&'static str, String)>,
    /// When trying again may help.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// An error without metadata.
    pub fn new(kind: ErrorKind, reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind, reason, message: message.into(), metadata: Vec::new(), retry_after: None }
    }

    /// A field that cannot be accepted.
    pub fn invalid(field: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, reason, message).with("field", field)
    }

    /// A field that is beyond a limit.
    pub fn over_limit(field: &'static str, unit: &str, found: u64, limit: u64) -> Self {
        let message = format!("{field} has {found} {unit}; the limit is {limit}");
        Self::new(ErrorKind::InvalidArgument, "LIMIT_EXCEEDED", message)
            .with("field", field)
            .with("limit", limit)
    }

    /// The same error, whose message ends with what helps.
    pub fn remedy(mut self, remedy: &str) -> Self {
        self.message.push_str("; ");
        self.message.push_str(remedy);
        self
    }

    /// An answer of more bytes than a message may have.
    pub fn answer_too_large(field: &'static str, remedy: &str) -> Self {
        let message = format!("the answer would have more than {ANSWER_BYTES_MAX} bytes");
        Self::new(ErrorKind::InvalidArgument, "LIMIT_EXCEEDED", message)
            .with("field", field)
            .with("limit", ANSWER_BYTES_MAX)
            .remedy(remedy)
    }

    fn with(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        self.metadata.push((key, value.to_string()));
        self
    }

    fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// A request, or a part of one, that is refused rather than ignored.
    pub fn unimplemented(what: &str) -> Self {
        let message = format!("this node does not serve {what}");
        Self::new(ErrorKind::Unimplemented, "UNIMPLEMENTED", message)
    }

    /// There is no such session.
    pub fn session_not_found() -> Self {
        Self::new(ErrorKind::NotFound, "SESSION_NOT_FOUND", "session not found")
    }

    /// There is no such lease.
    pub fn lease_not_found() -> Self {
        Self::new(ErrorKind::NotFound, "LEASE_NOT_FOUND", "there is no such lease, or it has ended")
    }

    /// Nobody holds a lock of that name or waits for it.
    pub fn lock_not_found() -> Self {
        Self::new(
            ErrorKind::NotFound,
            "LOCK_NOT_FOUND",
            "nobody holds the lock, waits for it or is kept out of it",
        )
    }

    /// A local read was to be fresher than the node can promise.
    fn too_stale(found: Option<Duration>) -> Self {
        let found = match found {
            Some(found) => format!("may be {found:.0?} old"),
            None => "may be of any age".to_owned(),
        };
        Self::new(
            ErrorKind::Unavailable,
            "TOO_STALE",
            format!(
                "what this node has {found}, by what it heard from a leader that has its majority; \
                 ask another node, allow more max_staleness, or read linearizably"
            ),
        )
    }

    /// The caller dates its requests by a clock that is ahead of the cluster's.
    pub fn clock_ahead() -> Self {
        Self::invalid(
            "context.first_sent_time",
            "CLOCK_AHEAD",
            "context.first_sent_time is more than 5 s ahead of cluster time; learn the time anew \
             from Describe",
        )
    }

    /// A claim that waited is over, for this reason where that is known.
    pub fn acquire_ended(cause: Option<Cause>) -> Self {
        let (reason, message) = match cause {
            Some(Cause::LeaseExpired | Cause::LeaseRevoked) => return Self::lease_not_found(),
            Some(Cause::TimedOut) => {
                ("LOCK_WAIT_EXPIRED", "the lock was not to be had within the time to wait")
            }
            Some(Cause::Cancelled) => ("ACQUIRE_CANCELLED", "this request was cancelled"),
            _ => (
                "ACQUIRE_ENDED",
                "this request has claimed the lock before, and that claim is over; acquire under \
                 a new request id",
            ),
        };
        Self::new(ErrorKind::FailedPrecondition, reason, message)
    }

    /// The caller's time came before the end of its wait.
    pub fn still_waiting() -> Self {
        Self::new(
            ErrorKind::DeadlineExceeded,
            "STILL_WAITING",
            "the request stays in line for the lock; the same request again goes on waiting, \
             CancelAcquire ends it",
        )
    }

    /// The same, because the node goes away.
    pub fn stopped_waiting() -> Self {
        Self::new(
            ErrorKind::Unavailable,
            "NODE_STOPPING",
            "this node is stopping, and the request stays in line for the lock; the same request \
             to another node goes on waiting",
        )
        .retry_after(Duration::ZERO)
    }

    /// Something of which there are as many as there may be.
    pub fn too_many(what: &str, limit: u64) -> Self {
        Self::full(what, limit)
    }

    /// The client has not read its earlier answers.
    pub fn unread_answers() -> Self {
        Self::new(
            ErrorKind::ResourceExhausted,
            "OVERLOADED",
            "the node has no room for more answers on this connection before those are read that \
             it holds already; read them, then ask again",
        )
        .retry_after(Duration::from_millis(100))
    }

    /// Too many requests have come in part.
    pub fn no_room_to_receive() -> Self {
        Self::new(
            ErrorKind::ResourceExhausted,
            "OVERLOADED",
            "the node has no room for more requests that have not come whole; send fewer large \
             requests at once, and try again",
        )
        .retry_after(Duration::from_millis(100))
    }

    /// The caller's time is over, and nothing has answered.
    pub fn deadline_exceeded(changes_something: bool) -> Self {
        let (reason, message) = if changes_something {
            let message = "there was no answer in time; whether the change was made is not known";
            ("OUTCOME_UNKNOWN", message)
        } else {
            ("DEADLINE_EXCEEDED", "there was no answer in time")
        };
        Self::new(ErrorKind::DeadlineExceeded, reason, message)
    }

    /// A defect, which has ended this request and nothing else.
    pub fn panicked() -> Self {
        let message = "this request met a defect of the node, which has logged it; whether a \
                       change was made is not known";
        Self::new(ErrorKind::Internal, "REQUEST_PANICKED", message)
    }

    fn not_initialized() -> Self {
        Self::new(ErrorKind::Unavailable, "NOT_INITIALIZED", "this node belongs to no cluster yet")
            .retry_after(Duration::from_millis(500))
    }

    fn overloaded() -> Self {
        Self::new(
            ErrorKind::ResourceExhausted,
            "OVERLOADED",
            "this node has as many requests under way as it can hold; try again shortly",
        )
        .retry_after(Duration::from_millis(100))
    }

    fn no_leader(nothing_changed: &str) -> Self {
        Self::new(
            ErrorKind::Unavailable,
            "NO_LEADER",
            format!("no majority of the nodes was reachable in time{nothing_changed}"),
        )
        .retry_after(Duration::from_millis(250))
    }

    fn halted(reason: &str) -> Self {
        Self::new(ErrorKind::Unavailable, "HALTED", format!("this node has halted: {reason}"))
    }

    fn full(what: &str, limit: u64) -> Self {
        let message = format!("there are {limit} {what}, and that is the limit");
        Self::new(ErrorKind::ResourceExhausted, "LIMIT_EXCEEDED", message).with("limit", limit)
    }

    /// What the state machine refused.
    pub fn rejected(rejection: Rejection) -> Self {
        use crate::limits;
        match rejection {
            Rejection::SessionNotFound => Self::session_not_found(),
            Rejection::SessionExists => Self::new(
                ErrorKind::AlreadyExists,
                "SESSION_EXISTS",
                "a session with this id exists already",
            ),
            Rejection::SessionIdRetired => Self::new(
                ErrorKind::AlreadyExists,
                "SESSION_ID_RETIRED",
                "a session with this id ended less than a minute ago",
            ),
            Rejection::VersionMismatch(found) => Self::new(
                ErrorKind::FailedPrecondition,
                "VERSION_MISMATCH",
                format!("the session is at version {found}, which is not the one expected"),
            )
            .with("current_version", found),
            Rejection::RequestExpired => Self::new(
                ErrorKind::DeadlineExceeded,
                "REQUEST_EXPIRED",
                "the request came after its expire_time; this sending changed nothing",
            ),
            Rejection::RequestLifetimeTooLong => Self::invalid(
                "context.expire_time",
                "REQUEST_LIFETIME_TOO_LONG",
                "context.expire_time is more than 60 s after context.first_sent_time, or ahead of \
                 cluster time by as much; learn the time anew from Describe",
            ),
            Rejection::ClockAhead => Self::clock_ahead(),
            Rejection::OutcomeUnknown => Self::new(
                ErrorKind::Aborted,
                "OUTCOME_UNKNOWN",
                "this request was sent before, and whether it was applied then is no longer \
                 known; read the session to find out",
            ),
            Rejection::SessionTooLarge(bytes) => Self::new(
                ErrorKind::FailedPrecondition,
                "LIMIT_EXCEEDED",
                format!(
                    "the session would have {bytes} bytes of attributes; the limit is {}",
                    limits::SESSION_BYTES_MAX
                ),
            )
            .with("field", "attributes")
            .with("limit", limits::SESSION_BYTES_MAX),
            Rejection::TooManyAttributes(count) => Self::new(
                ErrorKind::FailedPrecondition,
                "LIMIT_EXCEEDED",
                format!(
                    "the session would have {count} attributes; the limit is {}",
                    limits::SESSION_ATTRIBUTES_MAX
                ),
            )
            .with("field", "attributes")
            .with("limit", limits::SESSION_ATTRIBUTES_MAX),
            Rejection::Fenced => Self::new(
                ErrorKind::FailedPrecondition,
                "FENCED",
                "the token does not hold the lock, or its lease has ended; nothing was changed",
            ),
            Rejection::LeaseNotFound => Self::lease_not_found(),
            Rejection::LeaseExists => {
                Self::new(ErrorKind::AlreadyExists, "LEASE_EXISTS", "a lease of that id exists")
            }
            Rejection::LeaseIdRetired => Self::new(
                ErrorKind::AlreadyExists,
                "LEASE_ID_RETIRED",
                "a lease of that id has ended; grant one under a new id",
            ),
            Rejection::LockHeld => Self::new(
                ErrorKind::FailedPrecondition,
                "LOCK_HELD",
                "the lock is held or waited for, and the request was not to wait",
            ),
            Rejection::LockNotHeld => Self::new(
                ErrorKind::FailedPrecondition,
                "LOCK_NOT_HELD",
                "the token does not hold the lock: it was released or lost, or never did",
            ),
            Rejection::LockModeMismatch(kind) => Self::new(
                ErrorKind::FailedPrecondition,
                "LOCK_MODE_MISMATCH",
                format!("the lock is in use, and of another kind: {kind}"),
            ),
            Rejection::AcquireEnded => Self::acquire_ended(None),
            Rejection::TooManyLeases(limit) => Self::full("leases in the namespace", limit),
            Rejection::TooManyWaiters(limit) => Self::full("waiters for the lock", limit),
            Rejection::TooManyClaims(limit) => Self::full("claims on the lease", limit),
            Rejection::MemberExists => Self::new(
                ErrorKind::AlreadyExists,
                "MEMBER_EXISTS",
                "a member of this name hangs from another lease; take another name, or wait until \
                 that lease has ended",
            ),
            Rejection::MemberNotFound => Self::new(
                ErrorKind::NotFound,
                "MEMBER_NOT_FOUND",
                "the ring has no member of this name, or not on the lease that was named",
            ),
            Rejection::TooManyMembers(limit) => Self::full("members of the ring", limit),
            Rejection::TooManyMembersOfLease(limit) => {
                Self::full("members of rings on the lease", limit)
            }
            Rejection::MalformedCommand => Self::new(
                ErrorKind::Internal,
                "MALFORMED_COMMAND",
                "the nodes could not decode the command; their versions may not fit together",
            ),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.reason)
    }
}

impl std::error::Error for Error {}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::NotInitialized => Self::not_initialized(),
            WriteError::Overloaded => Self::overloaded(),
            WriteError::NoLeader => Self::no_leader("; nothing was changed"),
            WriteError::OutcomeUnknown => Self::new(
                ErrorKind::DeadlineExceeded,
                "OUTCOME_UNKNOWN",
                "no majority of the nodes answered in time; whether the change was made is not \
                 known",
            ),
            WriteError::Halted(reason) => Self::halted(&reason),
        }
    }
}

impl From<ReadError> for Error {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::NotInitialized => Self::not_initialized(),
            ReadError::Overloaded => Self::overloaded(),
            ReadError::NoLeader => Self::no_leader(""),
            ReadError::TooStale(found) => Self::too_stale(found),
            ReadError::Halted(reason) => Self::halted(&reason),
        }
    }
}
