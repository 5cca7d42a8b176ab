//! The generated protobuf types, and their descriptors for reflection.

#![allow(missing_docs, clippy::all, unreachable_pub)]

/// The public API.
pub mod v1 {
    tonic::include_proto!("quorate.v1");
}

/// What nodes say to each other.
#[cfg(feature = "server")]
pub(crate) mod peer {
    tonic::include_proto!("quorate.peer.v1");
}

/// What outlives a process.
#[cfg(feature = "server")]
pub(crate) mod stored {
    tonic::include_proto!("quorate.stored.v1");
}

/// All descriptors, serialized.
#[cfg(feature = "server")]
pub(crate) const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
