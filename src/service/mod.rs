//! Use cases, free of any protocol: validate, authorise, mint and digest ids, build a command or a
//! query, and say in stable words what came of it.
//!
//! Answers come by callback. A stream that carries thousands of requests has neither a task nor a
//! wake-up for each; a single call wraps the callback in a future.

mod caller;
mod cluster;
mod error;
mod request;
mod session;

pub use caller::Caller;
pub use cluster::Cluster;
pub use error::{Error, ErrorKind};
pub use request::{Call, Deadline, RequestContext};
pub use session::{
    BatchGet, Consistency, Created, Deleted, Found, GetSession, ListSessions, Listed, NewSession,
    SessionSelector, SessionUpdate, Sessions, Touched, Updated, session_digest,
};
