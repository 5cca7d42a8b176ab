//! Bytes on disk. Nothing here knows what a session is: keys, values and headers are opaque.
//!
//! Reading order: `directory` says whose disk it is; `wal` is the log, on the files of `file`;
//! `checkpoint` is the durable copy of the state, on `sled`; `snapshot` the same as one file;
//! `timekeeping` is a note of what the time was. Small files go through `durable`, small values
//! through `envelope`; `outside` tells what the system refused from what is damaged; `thread`
//! starts threads that nobody loses sight of.

pub mod checkpoint;
pub mod directory;
pub mod durable;
pub mod envelope;
pub mod file;
pub mod outside;
pub mod sled;
pub mod snapshot;
pub mod thread;
pub mod timekeeping;
pub mod wal;
