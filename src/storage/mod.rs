//! Bytes on disk.

pub mod file;
pub mod wal;
