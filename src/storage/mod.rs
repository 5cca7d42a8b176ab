//! Bytes on disk. Nothing here knows what a session is: keys, values and headers are opaque.

pub mod checkpoint;
pub mod directory;
pub mod durable;
pub mod envelope;
pub mod file;
pub mod sled;
pub mod snapshot;
pub mod wal;
