//! The shell around openraft: everything between a command and its place in the log.
//!
//! Reading order: [`node`](Node) owns a node's life; `formation` makes a cluster of empty nodes;
//! `replica` is one Raft group, `recovery` what it finds on disk; `leadership` says where commands
//! go; `lanes` says in which order, and `proposals` packs them into entries; `barrier` makes reads
//! linearizable; `machine` applies, and `following` tells who waits for a lock; `sweeper` answers
//! whoever has waited long enough for any of these; `dirty` collects what has changed, of which
//! `checkpointer` keeps the durable copy; `clock` and `ticker` are time; `log`, `network`,
//! `exchange` and `peer` are the disk and the wire as Raft uses them, by way of `types` and
//! `convert`; `status` and `halt` are for the operator.

mod barrier;
mod checkpointer;
mod clock;
mod convert;
mod dirty;
mod exchange;
mod following;
#[cfg(test)]
mod following_test;
mod formation;
mod halt;
mod lanes;
mod leadership;
mod log;
mod machine;
mod network;
mod node;
mod peer;
mod proposals;
mod recovery;
mod replica;
mod status;
#[cfg(test)]
mod suite_test;
mod sweeper;
mod ticker;
mod types;

pub use checkpointer::CheckpointPolicy;
pub use following::ClaimEnd;
pub use node::{Acquired, Node, NodeError, NodeOptions, ReadError, WriteError};
pub use replica::RaftTimeouts;
pub use status::{MemberStatus, NodeStatus, Role};
