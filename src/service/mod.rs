//! Use cases, free of any protocol: validate, authorise, mint and digest ids, build a command or a
//! query, and say in stable words what came of it.
//!
//! Answers come by callback. A stream that carries thousands of requests has neither a task nor a
//! wake-up for each; a single call wraps the callback in a future.

mod admission;
mod caller;
mod circles;
mod cluster;
mod error;
mod field;
mod lease;
mod lock;
mod request;
mod ring;
mod session;

pub use admission::{ASKED_WEIGHT, Admission, Count, Share};
pub use caller::{Caller, Presence, Present};
pub use cluster::Cluster;
pub use error::{Error, ErrorKind};
pub use lease::{
    FoundLeases, GetLease, GrantedLease, LeaseTiming, Leases, ListLeases, NewLease, Renewals,
    Renewed, RevokeLease,
};
pub use lock::{
    AcquireLock, AcquiredLock, BreakLock, CancelAcquire, FoundLocks, GetLock, ListLocks, Locks,
    ReleaseLock,
};
pub use request::{Call, Consistency, Deadline, RequestContext};
pub use ring::{
    FoundRing, GetRing, JoinRing, JoinedRing, LeaveRing, LocateKeys, LocatedKeys, Rings,
};
pub use session::{
    BatchGet, Created, DeleteSession, Deleted, Found, GetSession, ListSessions, Listed, NewSession,
    SessionFence, SessionSelector, SessionUpdate, Sessions, Touched, Updated, Wanted,
    session_digest,
};
