//! The types with which openraft is instantiated. None of them leaves this layer.

use std::fmt;

use bytes::Bytes;
use openraft::impls::leader_id_std;
use openraft::type_config::alias::{
    CommittedLeaderIdOf, EntryOf, LogIdOf, SnapshotMetaOf, StoredMembershipOf, VoteOf,
};

use super::machine::StateMachine;
use super::supervisor::SupervisedRuntime;
use crate::state::Reply;

openraft::declare_raft_types!(
    /// Quorate's Raft: one leader a term, entries that carry packed commands.
    pub(crate) TypeConfig:
        D = Pack,
        R = PackReply,
        NodeId = u64,
        Node = Member,
        Term = u64,
        LeaderId = leader_id_std::LeaderId<u64, u64>,
        AsyncRuntime = SupervisedRuntime,
);

pub(crate) type Raft = openraft::Raft<TypeConfig, StateMachine>;
pub(crate) type LogId = LogIdOf<TypeConfig>;
pub(crate) type Vote = VoteOf<TypeConfig>;
pub(crate) type Entry = EntryOf<TypeConfig>;
pub(crate) type EntryPayload = openraft::EntryPayload<Pack, u64, Member>;
pub(crate) type StoredMembership = StoredMembershipOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, Member>;
pub(crate) type SnapshotMeta = SnapshotMetaOf<TypeConfig>;
pub(crate) type CommittedLeaderId = CommittedLeaderIdOf<TypeConfig>;

/// The payload of an entry: a serialized `stored.v1.Entry`, encoded once by the leader. The same
/// bytes go to the log, to the peers and into apply.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Pack(pub(crate) Bytes);

impl fmt::Debug for Pack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pack({} bytes)", self.0.len())
    }
}

impl fmt::Display for Pack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The replies to an entry's commands, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PackReply(pub(crate) Vec<Reply>);

impl fmt::Display for PackReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackReply({})", self.0.len())
    }
}

/// What the membership says of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Member {
    /// host:port where other nodes reach it.
    pub peer_address: String,
    /// host:port where clients reach it.
    pub client_address: String,
    /// Random number of its data directory's life. A node under this id with another one is an
    /// impostor: its disk was wiped, and with it the votes and entries that it acknowledged.
    pub incarnation: u64,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{:016x}", self.peer_address, self.incarnation)
    }
}

pub(crate) fn log_id(term: u64, index: u64) -> LogId {
    LogId::new_term_index(term, index)
}

pub(crate) fn term_of(log_id: &LogId) -> u64 {
    log_id.leader_id.term
}
