//! The shell around openraft: everything between a command and its place in the log.
//!
//! Reading order: [`node`](Node) owns a node's life; `formation` makes a cluster of empty nodes;
//! `replica` is one Raft group, `recovery` what it finds on disk; `leadership` says where commands
//! go; `lanes` says in which order, and `proposals` packs them into entries; `barrier` makes reads
//! linearizable, as `rounds` decides, and `freshness` bounds the age of those that are not; `level`
//! says what nodes of different builds may propose; `machine` applies, and `following` tells who
//! waits for a lock; `sweeper` answers whoever has waited long enough for any of these; `dirty`
//! collects what has changed, of which `checkpointer` keeps the durable copy; `clock`, `ticker` and
//! `timekeeper` are time; `log`, `network`, `exchange` and `peer` are the disk and the wire as Raft
//! uses them, by way of `types` and `convert`; `supervisor` spawns all that lives as long as the
//! node; `status`, `troubles` and `halt` are for the operator.

mod barrier;
mod checkpointer;
mod clock;
#[cfg(test)]
mod clock_test;
mod convert;
mod dirty;
mod exchange;
mod following;
#[cfg(test)]
mod following_test;
mod formation;
mod freshness;
mod halt;
mod lanes;
mod leadership;
mod level;
mod log;
mod machine;
mod network;
mod node;
mod peer;
#[cfg(test)]
mod peer_test;
mod proposals;
mod recovery;
mod replica;
mod rounds;
#[cfg(test)]
mod rounds_test;
mod status;
#[cfg(test)]
mod suite_test;
mod supervisor;
mod sweeper;
mod ticker;
mod timekeeper;
mod troubles;
mod types;

pub use checkpointer::CheckpointPolicy;
pub use following::ClaimEnd;
pub use formation::FormationError;
pub use node::{Acquired, Node, NodeError, NodeOptions, ReadError, WriteError};
pub use replica::{RaftTimeouts, SetTimeError};
pub use status::{MemberStatus, NodeStatus, Role};
