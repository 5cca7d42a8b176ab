//! Errors as gRPC says them, once for all services.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::proto::v1;
use crate::service::{Error, ErrorKind};

const DOMAIN: &str = "quorate";

pub(super) fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        ErrorKind::Aborted => Code::Aborted,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Unimplemented => Code::Unimplemented,
        ErrorKind::Internal => Code::Internal,
    }
}

pub(super) fn status(error: Error) -> Status {
    let mut details = ErrorDetails::new();
    let metadata: std::collections::HashMap<String, String> =
        error.metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    details.set_error_info(error.reason, DOMAIN, metadata);
    if let Some(after) = error.retry_after {
        details.set_retry_info(Some(after));
    }
    Status::with_error_details(code(error.kind), error.message, details)
}

/// The same for one request of a pipeline.
pub(super) fn pipeline_error(error: Error) -> v1::PipelineError {
    let status = status(error);
    v1::PipelineError {
        code: status.code() as u32,
        message: status.message().to_owned(),
        status_details: bytes::Bytes::copy_from_slice(status.details()),
    }
}

/// A request that holds nothing to do.
pub(super) fn empty_request() -> Error {
    Error::invalid("request", "EMPTY_REQUEST", "the message holds no request that is known here")
}
