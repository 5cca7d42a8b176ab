//! What can go wrong, in the caller's terms, and how an answer of the server becomes that.
//!
//! Two questions are kept apart. *What happened* is the public [`Error`]. *May it be sent again* is
//! the private [`Failure`] of one attempt; only the retry loop sees it.

use std::collections::HashMap;
use std::error::Error as _;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::proto::v1::PipelineError;

/// Domain of the reasons that are ours.
const DOMAIN: &str = "quorate";

/// Why a request failed.
///
/// `reason` is the server's stable name of the cause (`SESSION_NOT_FOUND`, `VERSION_MISMATCH`, …),
/// empty where it gave none; `message` is for people.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such thing, or it has expired.
    #[error("{message}")]
    NotFound {
        /// Such as `SESSION_NOT_FOUND`.
        reason: String,
        /// The server's message.
        message: String,
    },
    /// It is there already, or its id is retired (`SESSION_EXISTS`, `SESSION_ID_RETIRED`).
    #[error("{message}")]
    AlreadyExists {
        /// Such as `SESSION_EXISTS`.
        reason: String,
        /// The server's message.
        message: String,
    },
    /// The session's version is not the expected one.
    #[error("{message}")]
    VersionMismatch {
        /// The version that it has, where the server told.
        current: Option<u64>,
        /// The server's message.
        message: String,
    },
    /// The lock is not free, and the request was not to wait for it.
    #[error("{message}")]
    LockHeld {
        /// The server's message.
        message: String,
    },
    /// The lock did not become free while the request was to wait for it.
    #[error("{message}")]
    WaitExpired {
        /// The server's message, or the client's own.
        message: String,
    },
    /// The token does not hold the lock: that was released, lost or broken before.
    #[error("{message}")]
    LockNotHeld {
        /// The server's message.
        message: String,
    },
    /// The lease has ended, or could not be renewed in time; what hung from it is lost.
    #[error("{message}")]
    LeaseLost {
        /// The server's message, or the client's own.
        message: String,
    },
    /// The token of a fence does not hold its lock any more. Nothing was changed.
    #[error("{message}")]
    Fenced {
        /// The server's message.
        message: String,
    },
    /// The state of the cluster or of a record does not allow it.
    #[error("{message}")]
    Refused {
        /// Such as `ALREADY_INITIALIZED`.
        reason: String,
        /// The server's message.
        message: String,
    },
    /// The request makes no sense as it is.
    #[error("{message}")]
    InvalidArgument {
        /// The field at fault, where known.
        field: Option<String>,
        /// Such as `INVALID_SESSION_ID`.
        reason: String,
        /// The server's message, or the client's own.
        message: String,
    },
    /// A limit stands in the way: of a size or number, or the load that a node takes.
    #[error("{message}")]
    LimitExceeded {
        /// The limit's name, where known.
        limit: Option<String>,
        /// Such as `LIMIT_EXCEEDED`.
        reason: String,
        /// The server's message, or the client's own.
        message: String,
    },
    /// No node could take the request in time. It has not been applied.
    #[error("{message}")]
    Unavailable {
        /// Such as `NO_LEADER`.
        reason: String,
        /// The last thing that went wrong.
        message: String,
    },
    /// The deadline passed first. The request has not been applied.
    #[error("{message}")]
    DeadlineExceeded {
        /// What was waited for.
        message: String,
    },
    /// The request may or may not have been applied, and nobody can tell any more.
    #[error("{message}")]
    OutcomeUnknown {
        /// The last thing that went wrong.
        message: String,
    },
    /// The client was configured with something that cannot work.
    #[error("{message}")]
    Configuration {
        /// What, and what would.
        message: String,
    },
    /// The server broke the protocol, or failed in a way that has no better name.
    #[error("{message}")]
    Internal {
        /// The server's reason, if any.
        reason: String,
        /// What happened.
        message: String,
    },
}

impl Error {
    /// The server's stable name of the cause; empty where there is none.
    pub fn reason(&self) -> &str {
        match self {
            Self::NotFound { reason, .. }
            | Self::AlreadyExists { reason, .. }
            | Self::Refused { reason, .. }
            | Self::InvalidArgument { reason, .. }
            | Self::LimitExceeded { reason, .. }
            | Self::Unavailable { reason, .. }
            | Self::Internal { reason, .. } => reason,
            Self::VersionMismatch { .. } => "VERSION_MISMATCH",
            Self::LockHeld { .. } => "LOCK_HELD",
            Self::WaitExpired { .. } => "LOCK_WAIT_EXPIRED",
            Self::LockNotHeld { .. } => "LOCK_NOT_HELD",
            Self::LeaseLost { .. } => "LEASE_NOT_FOUND",
            Self::Fenced { .. } => "FENCED",
            Self::OutcomeUnknown { .. } => "OUTCOME_UNKNOWN",
            Self::DeadlineExceeded { .. } | Self::Configuration { .. } => "",
        }
    }

    /// The variant's name in words, to count errors by.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "not found",
            Self::AlreadyExists { .. } => "already exists",
            Self::VersionMismatch { .. } => "version mismatch",
            Self::LockHeld { .. } => "lock held",
            Self::WaitExpired { .. } => "wait expired",
            Self::LockNotHeld { .. } => "lock not held",
            Self::LeaseLost { .. } => "lease lost",
            Self::Fenced { .. } => "fenced",
            Self::Refused { .. } => "refused",
            Self::InvalidArgument { .. } => "invalid argument",
            Self::LimitExceeded { .. } => "limit exceeded",
            Self::Unavailable { .. } => "unavailable",
            Self::DeadlineExceeded { .. } => "deadline exceeded",
            Self::OutcomeUnknown { .. } => "outcome unknown",
            Self::Configuration { .. } => "configuration",
            Self::Internal { .. } => "internal",
        }
    }

    pub(super) fn invalid(field: &str, reason: &str, message: impl Into<String>) -> Self {
        Self::InvalidArgument {
            field: Some(field.to_owned()),
            reason: reason.to_owned(),
            message: message.into(),
        }
    }

    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::Unavailable { reason: String::new(), message: message.into() }
    }

    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::Internal { reason: String::new(), message: message.into() }
    }
}

/// The answer is to another kind of request than was sent.
pub(super) fn mismatched() -> Error {
    Error::internal("the server's answer does not fit the request")
}

/// How one attempt failed: what the retry loop needs to know.
#[derive(Debug)]
pub(super) enum Failure {
    /// The answer is final.
    Final(Error),
    /// The server did not apply it, and says that another attempt may fare better.
    NotApplied {
        error: Error,
        /// How long the server asks to wait first.
        delay: Option<Duration>,
        /// Whether another node is the better choice: this one is fine but overloaded if not.
        elsewhere: bool,
    },
    /// The attempt never left this process.
    NotSent(Error),
    /// Whether it was applied is not known.
    Unknown(Error),
    /// It was applied, and its outcome is still to come: it is to be asked for again.
    Pending(Error),
}

impl Failure {
    /// The connection was lost, or given up, with the request under way.
    pub(super) fn lost(message: &str) -> Self {
        Self::Unknown(Error::unavailable(message))
    }

    /// The same, saying which node it was that failed, or could do nothing.
    pub(super) fn of_node(mut self, node: &str) -> Self {
        let (Self::NotApplied { error, .. } | Self::NotSent(error) | Self::Unknown(error)) =
            &mut self
        else {
            return self;
        };
        match error {
            Error::Unavailable { reason, message } if reason == "NO_LEADER" => {
                *message = format!("{node} answers, but no majority of the voters does");
            }
            Error::Unavailable { message, .. } | Error::DeadlineExceeded { message } => {
                *message = format!("{node}: {message}");
            }
            _ => {}
        }
        self
    }

    /// An error that came through the pipeline.
    pub(super) fn from_pipeline(error: PipelineError) -> Self {
        let code = i32::try_from(error.code).map_or(Code::Unknown, Code::from_i32);
        Self::from_status(&Status::with_details(code, error.message, error.status_details))
    }

    /// An error of a unary call, or of the transport beneath it.
    pub(super) fn from_status(status: &Status) -> Self {
        // Only statuses that this process made up have a source: what arrived has none.
        if status.source().is_some() {
            return Self::Unknown(Error::unavailable(transport_message(status)));
        }
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == DOMAIN);
        let empty = HashMap::new();
        let (reason, metadata) =
            info.map_or(("", &empty), |info| (info.reason.as_str(), &info.metadata));
        let delay = details.retry_info().and_then(|info| info.retry_delay);
        Self::classify(status.code(), status.message(), reason, metadata, delay)
    }

    fn classify(
        code: Code,
        message: &str,
        reason: &str,
        metadata: &HashMap<String, String>,
        delay: Option<Duration>,
    ) -> Self {
        let message = if message.is_empty() { code.description() } else { message }.to_owned();
        let named = |name: &str| metadata.get(name).cloned();
        let owned = reason.to_owned();
        match (code, reason) {
            // The state machine's own verdict: no resend will learn more.
            (Code::Aborted, "OUTCOME_UNKNOWN") => Self::Final(Error::OutcomeUnknown { message }),
            (_, "REQUEST_EXPIRED") => Self::Final(Error::DeadlineExceeded { message }),
            (_, "VERSION_MISMATCH") => Self::Final(Error::VersionMismatch {
                current: metadata.get("current_version").and_then(|v| v.parse().ok()),
                message,
            }),
            (_, "LOCK_HELD") => Self::Final(Error::LockHeld { message }),
            (_, "LOCK_WAIT_EXPIRED") => Self::Final(Error::WaitExpired { message }),
            (_, "LOCK_NOT_HELD") => Self::Final(Error::LockNotHeld { message }),
            (_, "FENCED") => Self::Final(Error::Fenced { message }),
            (_, "STILL_WAITING") => Self::Pending(Error::DeadlineExceeded { message }),
            (Code::Unavailable, "NO_LEADER" | "NOT_INITIALIZED" | "HALTED" | "TOO_STALE") => {
                Self::NotApplied {
                    error: Error::Unavailable { reason: owned, message },
                    delay,
                    elsewhere: true,
                }
            }
            (Code::Unavailable, _) => Self::Unknown(Error::Unavailable { reason: owned, message }),
            (Code::DeadlineExceeded | Code::Cancelled, _) => {
                Self::Unknown(Error::DeadlineExceeded { message })
            }
            (Code::ResourceExhausted, _) => {
                let error = Error::LimitExceeded { limit: named("limit"), reason: owned, message };
                match delay {
                    Some(_) => Self::NotApplied { error, delay, elsewhere: false },
                    None => Self::Final(error),
                }
            }
            (Code::NotFound, _) => Self::Final(Error::NotFound { reason: owned, message }),
            (Code::AlreadyExists, _) => {
                Self::Final(Error::AlreadyExists { reason: owned, message })
            }
            (Code::InvalidArgument | Code::OutOfRange, _) => Self::Final(Error::InvalidArgument {
                field: named("field"),
                reason: owned,
                message,
            }),
            (
                Code::FailedPrecondition
                | Code::Aborted
                | Code::PermissionDenied
                | Code::Unauthenticated,
                _,
            ) => Self::Final(Error::Refused { reason: owned, message }),
            _ => Self::Final(Error::Internal {
                reason: owned,
                message: format!("{message} ({code:?})"),
            }),
        }
    }
}

/// The innermost cause, which says more than "transport error".
pub(super) fn transport_message(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipeline_error(code: Code, reason: &str, metadata: &[(&str, &str)]) -> PipelineError {
        let details = tonic_types::ErrorDetails::with_error_info(
            reason,
            DOMAIN,
            metadata
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect::<HashMap<String, String>>(),
        );
        let status = Status::with_error_details(code, "said the server", details);
        PipelineError {
            code: i32::from(code).cast_unsigned(),
            message: status.message().to_owned(),
            status_details: status.details().to_vec().into(),
        }
    }

    #[test]
    fn details_of_the_server_are_decoded() {
        let error = pipeline_error(
            Code::FailedPrecondition,
            "VERSION_MISMATCH",
            &[("current_version", "42")],
        );
        assert!(matches!(
            Failure::from_pipeline(error),
            Failure::Final(Error::VersionMismatch { current: Some(42), message })
                if message == "said the server"
        ));

        let error =
            pipeline_error(Code::InvalidArgument, "INVALID_NAME", &[("field", "principal")]);
        assert!(matches!(
            Failure::from_pipeline(error),
            Failure::Final(Error::InvalidArgument { field: Some(field), reason, .. })
                if field == "principal" && reason == "INVALID_NAME"
        ));
    }

    #[test]
    fn only_what_may_be_retried_is_not_final() {
        let failure = |code, reason| Failure::from_pipeline(pipeline_error(code, reason, &[]));
        for reason in ["NO_LEADER", "HALTED"] {
            let failure = failure(Code::Unavailable, reason);
            assert!(matches!(failure, Failure::NotApplied { elsewhere: true, .. }), "{reason}");
        }
        assert!(matches!(failure(Code::Unavailable, "SHUTTING_DOWN"), Failure::Unknown(_)));
        assert!(matches!(failure(Code::DeadlineExceeded, ""), Failure::Unknown(_)));
        assert!(matches!(
            failure(Code::Aborted, "OUTCOME_UNKNOWN"),
            Failure::Final(Error::OutcomeUnknown { .. })
        ));
        assert!(matches!(
            failure(Code::FailedPrecondition, "REQUEST_EXPIRED"),
            Failure::Final(Error::DeadlineExceeded { .. })
        ));
        assert!(matches!(
            failure(Code::ResourceExhausted, "LIMIT_EXCEEDED"),
            Failure::Final(Error::LimitExceeded { .. })
        ));
        assert!(matches!(
            failure(Code::DeadlineExceeded, "STILL_WAITING"),
            Failure::Pending(Error::DeadlineExceeded { .. })
        ));
        for reason in ["LOCK_HELD", "LOCK_WAIT_EXPIRED", "LOCK_NOT_HELD", "FENCED"] {
            match failure(Code::FailedPrecondition, reason) {
                Failure::Final(error) => assert_eq!(error.reason(), reason),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(
            failure(Code::NotFound, "SESSION_NOT_FOUND"),
            Failure::Final(Error::NotFound { .. })
        ));
    }

    #[test]
    fn overload_is_retried_after_the_delay_that_the_server_names() {
        let details = tonic_types::ErrorDetails::with_retry_info(Some(Duration::from_millis(30)));
        let status = Status::with_error_details(Code::ResourceExhausted, "busy", details);
        assert!(matches!(
            Failure::from_status(&status),
            Failure::NotApplied { delay: Some(delay), elsewhere: false, .. }
                if delay == Duration::from_millis(30)
        ));
    }

    #[test]
    fn details_that_are_no_protobuf_do_no_harm() {
        let error = PipelineError {
            code: 5,
            message: "gone".to_owned(),
            status_details: bytes::Bytes::from_static(b"\xff\xff\xff"),
        };
        assert!(matches!(
            Failure::from_pipeline(error),
            Failure::Final(Error::NotFound { reason, .. }) if reason.is_empty()
        ));
    }
}
