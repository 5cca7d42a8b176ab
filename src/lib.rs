//! Quorate: a Raft-replicated session store.

pub mod limits;
pub mod proto;
#[cfg(feature = "server")]
pub mod state;
#[cfg(feature = "server")]
pub mod storage;
