//! What a command ends with when it does not succeed: one line for people, one code for scripts.

use std::io;
use std::process::ExitCode;

use crate::client;

/// Why a command failed. Its `Display` is one line that says what to do about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The command cannot mean anything as it was given.
    #[error("{0}")]
    Usage(String),
    /// It was understood and went wrong.
    #[error("{0}")]
    Failed(String),
    /// What it is about is not there.
    #[error("{0}")]
    NotFound(String),
    /// It was had, and is no more.
    #[error("{0}")]
    Lost(String),
    /// The request did not succeed.
    #[error("{}", describe(.0))]
    Request(#[from] client::Error),
    /// Nobody answered.
    #[error("{0}")]
    Unavailable(String),
    /// Whoever read the results has heard enough; said to nobody.
    #[error("the reader of the results has gone")]
    BrokenPipe,
}

impl Failure {
    /// The failure of a request about `what`, which is named where that is not there, not as it was
    /// thought to be, or not to be had so.
    pub(crate) fn naming(mut error: client::Error, what: &str) -> Self {
        use client::Error;
        if let Error::NotFound { message, .. }
        | Error::AlreadyExists { message, .. }
        | Error::LockNotHeld { message }
        | Error::LockHeld { message }
        | Error::WaitExpired { message }
        | Error::LeaseLost { message }
        | Error::Refused { message, .. } = &mut error
        {
            *message = format!("{what}: {message}");
        }
        Self::Request(error)
    }

    /// 1 failed, 2 usage, 3 not found, 4 conflict or refused, 75 unavailable, timed out or, of a
    /// lock, not free.
    pub(crate) fn code(&self) -> u8 {
        use client::Error;
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::NotFound(_) => 3,
            Self::Lost(_) => 4,
            Self::Unavailable(_) => 75,
            Self::BrokenPipe => 0,
            Self::Request(error) => match error {
                Error::InvalidArgument { .. } | Error::Configuration { .. } => 2,
                Error::NotFound { .. } => 3,
                Error::AlreadyExists { .. }
                | Error::VersionMismatch { .. }
                | Error::LockNotHeld { .. }
                | Error::LeaseLost { .. }
                | Error::Fenced { .. }
                | Error::Refused { .. } => 4,
                Error::Unavailable { .. }
                | Error::DeadlineExceeded { .. }
                | Error::LockHeld { .. }
                | Error::WaitExpired { .. }
                | Error::OutcomeUnknown { .. } => 75,
                Error::LimitExceeded { .. } | Error::Internal { .. } => 1,
            },
        }
    }
}

impl From<&Failure> for ExitCode {
    fn from(failure: &Failure) -> Self {
        Self::from(failure.code())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// The error and its remedy, on one line whatever the server said.
fn describe(error: &client::Error) -> String {
    use client::Error;
    let message = error.to_string().replace(['\n', '\r'], " ");
    let remedy = match error {
        Error::NotFound { reason, .. } if reason == "SESSION_NOT_FOUND" => {
            "it may have expired, been deleted, or be in another --namespace"
        }
        Error::AlreadyExists { reason, .. } if reason == "SESSION_ID_RETIRED" => {
            "take another id, or wait a minute"
        }
        Error::VersionMismatch { .. } => "read it again",
        Error::NotFound { reason, .. } if reason == "RING_EMPTY" => {
            "its members' leases may have ended, or it is in another --namespace"
        }
        Error::NotFound { reason, .. } if reason == "LEASE_NOT_FOUND" => {
            "it may have run out, been revoked, or be in another --namespace"
        }
        Error::NotFound { reason, .. } if reason == "LOCK_NOT_FOUND" => "so it is free",
        Error::LockHeld { .. } => "wait for it with --wait, or see who has it: `quorate lock show`",
        Error::WaitExpired { .. } => "see who has it with `quorate lock show`",
        Error::LockNotHeld { .. } => "see who has it with `quorate lock show`",
        Error::LeaseLost { .. } => "what hung from it is lost: start again with a new lease",
        Error::Fenced { .. } => "somebody else may have the lock now: acquire it again",
        Error::Unavailable { reason, .. } if reason == "NOT_INITIALIZED" => {
            "form the cluster with `quorate cluster init`"
        }
        Error::Refused { reason, .. } if reason == "NOT_INITIALIZED" => {
            "form the cluster with `quorate cluster init`"
        }
        Error::Unavailable { reason, .. } if reason == "NO_LEADER" => {
            "is a majority of the nodes up? see `quorate cluster status`"
        }
        Error::Unavailable { reason, .. } if reason == "HALTED" => {
            "its log says more; see `quorate cluster status`"
        }
        Error::Unavailable { .. } => "is it running, and is --endpoints right?",
        Error::DeadlineExceeded { .. } => "try again, or give it a longer --timeout",
        Error::OutcomeUnknown { .. } => "read before you repeat it",
        _ => return message,
    };
    format!("{message}; {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Error;

    #[test]
    fn exit_codes_are_those_that_scripts_rely_on() {
        let text = String::new;
        let cases: [(Failure, u8); 18] = [
            (Failure::Lost(text()), 4),
            (Failure::Failed(text()), 1),
            (Failure::Usage(text()), 2),
            (Failure::Unavailable(text()), 75),
            (Failure::BrokenPipe, 0),
            (Error::InvalidArgument { field: None, reason: text(), message: text() }.into(), 2),
            (Error::NotFound { reason: text(), message: text() }.into(), 3),
            (Error::AlreadyExists { reason: text(), message: text() }.into(), 4),
            (Error::VersionMismatch { current: None, message: text() }.into(), 4),
            (Error::Refused { reason: text(), message: text() }.into(), 4),
            (Error::LockNotHeld { message: text() }.into(), 4),
            (Error::LeaseLost { message: text() }.into(), 4),
            (Error::Fenced { message: text() }.into(), 4),
            (Error::LockHeld { message: text() }.into(), 75),
            (Error::WaitExpired { message: text() }.into(), 75),
            (Error::Unavailable { reason: text(), message: text() }.into(), 75),
            (Error::DeadlineExceeded { message: text() }.into(), 75),
            (Error::OutcomeUnknown { message: text() }.into(), 75),
        ];
        for (failure, code) in cases {
            assert_eq!(failure.code(), code, "{failure:?}");
        }
    }

    #[test]
    fn a_message_is_one_line_with_a_remedy() {
        let error = Error::NotFound {
            reason: "SESSION_NOT_FOUND".into(),
            message: "session not found\nat all".into(),
        };
        let message = Failure::from(error).to_string();
        assert!(message.starts_with("session not found at all; "), "{message}");
        assert!(!message.contains('\n'));
        let message = "the session is at version 7".to_owned();
        let error = Error::VersionMismatch { current: Some(7), message };
        let message = Failure::from(error).to_string();
        assert_eq!(message, "the session is at version 7; read it again");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let not_found = |reason: &str| Error::NotFound {
            reason: reason.into(),
            message: "there is no such thing".into(),
        };
        for reason in ["LEASE_NOT_FOUND", "LOCK_NOT_FOUND", "RING_EMPTY", "MEMBER_NOT_FOUND"] {
            let failure = Failure::naming(not_found(reason), "lease 17");
            assert_eq!(failure.code(), 3);
            let message = failure.to_string();
            assert!(message.starts_with("lease 17: there is no such thing"), "{message}");
        }
        let lost = Error::LeaseLost { message: "it has ended".into() };
        let message = Failure::naming(lost, "lease 17").to_string();
        assert_eq!(
            message,
            "lease 17: it has ended; what hung from it is lost: start again with a new lease"
        );
    }

    #[test]
    fn a_closed_pipe_is_no_error() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(matches!(failure, Failure::BrokenPipe));
    }
}
