//! openraft's types ⇄ the messages of `quorate.peer.v1`, and ⇄ bytes in the log.

use bytes::Bytes;
use openraft::raft::StreamAppendError;
use openraft::vote::RaftLeaderId as _;
use serde::{Deserialize, Serialize};

use super::types::{
    Entry, EntryPayload, LogId, Member, Membership, Pack, StoredMembership, TypeConfig, Vote,
    log_id, term_of,
};
use crate::proto::peer;
use crate::storage::envelope;
use crate::storage::wal::WalRecord;

type StreamAppendResult = openraft::raft::StreamAppendResult<TypeConfig>;

/// A message or a stored value that cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error("malformed {0}")]
pub(crate) struct Malformed(pub(crate) &'static str);

pub(crate) fn log_id_out(from: &LogId) -> peer::LogId {
    peer::LogId { term: term_of(from), index: from.index }
}

pub(crate) fn log_id_in(from: peer::LogId) -> LogId {
    log_id(from.term, from.index)
}

pub(crate) fn vote_out(vote: &Vote) -> peer::VoteState {
    peer::VoteState {
        term: vote.leader_id.term(),
        node: *vote.leader_id.node_id(),
        committed: vote.committed,
    }
}

pub(crate) fn vote_in(vote: Option<peer::VoteState>) -> Result<Vote, Malformed> {
    let vote = vote.ok_or(Malformed("vote"))?;
    Ok(if vote.committed {
        Vote::new_committed(vote.term, vote.node)
    } else {
        Vote::new(vote.term, vote.node)
    })
}

pub(crate) fn entry_out(entry: Entry) -> peer::LogEntry {
    let (kind, payload) = payload_out(entry.payload);
    peer::LogEntry { log_id: Some(log_id_out(&entry.log_id)), kind: kind as i32, payload }
}

pub(crate) fn entry_in(from: peer::LogEntry) -> Result<Entry, Malformed> {
    let log_id = log_id_in(from.log_id.ok_or(Malformed("log id"))?);
    let kind = peer::EntryKind::try_from(from.kind).map_err(|_| Malformed("entry kind"))?;
    Ok(Entry { log_id, payload: payload_in(kind, from.payload)? })
}

fn payload_out(payload: EntryPayload) -> (peer::EntryKind, Bytes) {
    match payload {
        EntryPayload::Blank => (peer::EntryKind::Blank, Bytes::new()),
        EntryPayload::Normal(pack) => (peer::EntryKind::Commands, pack.0),
        EntryPayload::Membership(membership) => {
            (peer::EntryKind::Membership, membership_encode(&membership))
        }
    }
}

fn payload_in(kind: peer::EntryKind, payload: Bytes) -> Result<EntryPayload, Malformed> {
    match kind {
        peer::EntryKind::Blank => Ok(EntryPayload::Blank),
        peer::EntryKind::Commands => Ok(EntryPayload::Normal(Pack(payload))),
        peer::EntryKind::Membership => Ok(EntryPayload::Membership(membership_decode(&payload)?)),
        peer::EntryKind::Unspecified => Err(Malformed("entry kind")),
    }
}

pub(crate) fn append_result_out(result: StreamAppendResult) -> peer::AppendResult {
    use peer::append_result::Result as Outcome;
    let outcome = match result {
        Ok(matched) => Outcome::Matched(peer::Matched { log_id: matched.as_ref().map(log_id_out) }),
        Err(StreamAppendError::Conflict(conflict)) => Outcome::Conflict(log_id_out(&conflict)),
        Err(StreamAppendError::HigherVote(vote)) => Outcome::HigherVote(vote_out(&vote)),
    };
    peer::AppendResult { result: Some(outcome) }
}

pub(crate) fn append_result_in(
    result: Option<peer::AppendResult>,
) -> Result<StreamAppendResult, Malformed> {
    use peer::append_result::Result as Outcome;
    Ok(match result.and_then(|result| result.result).ok_or(Malformed("append result"))? {
        Outcome::Matched(matched) => Ok(matched.log_id.map(log_id_in)),
        Outcome::Conflict(conflict) => Err(StreamAppendError::Conflict(log_id_in(conflict))),
        Outcome::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote_in(Some(vote))?)),
    })
}

/// Version of the envelope around Raft's metadata.
const METADATA_VERSION: u8 = 1;
/// Bytes of the header that each log record carries before its payload.
const RECORD_HEADER_BYTES: usize = 9;

/// A log record: entry kind and term, then the payload. The index is the log's.
pub(crate) fn record_out(entry: Entry) -> WalRecord {
    let mut header = [0; RECORD_HEADER_BYTES];
    header[1..].copy_from_slice(&term_of(&entry.log_id).to_le_bytes());
    let (kind, payload) = payload_out(entry.payload);
    header[0] = kind as u8;
    WalRecord { header: Bytes::copy_from_slice(&header), payload }
}

pub(crate) fn record_in(index: u64, record: WalRecord) -> Result<Entry, Malformed> {
    let header: &[u8; RECORD_HEADER_BYTES] =
        record.header.as_ref().try_into().map_err(|_| Malformed("log record"))?;
    let [kind, term @ ..] = header;
    let kind = peer::EntryKind::try_from(i32::from(*kind)).map_err(|_| Malformed("entry kind"))?;
    let log_id = log_id(u64::from_le_bytes(*term), index);
    Ok(Entry { log_id, payload: payload_in(kind, record.payload)? })
}

/// Raft's metadata as stored. Mirrors openraft's types, so that its releases cannot change what
/// is on our disks. Variants are appended, never changed.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Metadata {
    Vote { term: u64, node: u64, committed: bool },
    LogId { term: u64, index: u64 },
    Membership(MembershipV1),
    Checkpoint(CheckpointV1),
}

/// Voter sets (two while a change is under way) and all members.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MembershipV1 {
    configs: Vec<Vec<u64>>,
    members: Vec<MemberV1>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct MemberV1 {
    node_id: u64,
    peer_address: String,
    client_address: String,
    incarnation: u64,
}

/// What a checkpoint or snapshot holds besides the state's records.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CheckpointV1 {
    log_id: Option<(u64, u64)>,
    membership_log_id: Option<(u64, u64)>,
    membership: MembershipV1,
    state: Vec<u8>,
}

/// A point of the log at which the state was taken.
#[derive(Clone, Debug)]
pub(crate) struct Boundary {
    /// The last entry applied; `None` if there was none.
    pub(crate) log_id: Option<LogId>,
    pub(crate) membership: StoredMembership,
    /// The state's own header.
    pub(crate) state: Bytes,
}

impl Boundary {
    /// Log index of the last entry applied; 0 also if there was none.
    pub(crate) fn index(&self) -> u64 {
        self.log_id.map_or(0, |log_id| log_id.index)
    }

    /// Log index of the first entry not applied.
    pub(crate) fn next_index(&self) -> u64 {
        self.log_id.map_or(0, |log_id| log_id.index + 1)
    }
}

fn encode(metadata: &Metadata) -> Bytes {
    let bytes = envelope::encode(METADATA_VERSION, metadata);
    bytes.expect("what is known of a few members is small").into()
}

fn decode(bytes: &[u8], what: &'static str) -> Result<Metadata, Malformed> {
    envelope::decode(METADATA_VERSION, bytes).map_err(|_| Malformed(what))
}

pub(crate) fn vote_encode(vote: &Vote) -> Bytes {
    let vote = vote_out(vote);
    encode(&Metadata::Vote { term: vote.term, node: vote.node, committed: vote.committed })
}

pub(crate) fn vote_decode(bytes: &[u8]) -> Result<Vote, Malformed> {
    match decode(bytes, "vote")? {
        Metadata::Vote { term, node, committed } => {
            vote_in(Some(peer::VoteState { term, node, committed }))
        }
        _ => Err(Malformed("vote")),
    }
}

pub(crate) fn log_id_encode(from: &LogId) -> Bytes {
    encode(&Metadata::LogId { term: term_of(from), index: from.index })
}

pub(crate) fn log_id_decode(bytes: &[u8]) -> Result<LogId, Malformed> {
    match decode(bytes, "log id")? {
        Metadata::LogId { term, index } => Ok(log_id(term, index)),
        _ => Err(Malformed("log id")),
    }
}

fn membership_v1(membership: &Membership) -> MembershipV1 {
    MembershipV1 {
        configs: membership
            .get_joint_config()
            .iter()
            .map(|config| config.iter().copied().collect())
            .collect(),
        members: membership
            .nodes()
            .map(|(node_id, member)| MemberV1 {
                node_id: *node_id,
                peer_address: member.peer_address.clone(),
                client_address: member.client_address.clone(),
                incarnation: member.incarnation,
            })
            .collect(),
    }
}

fn membership_from_v1(from: MembershipV1) -> Result<Membership, Malformed> {
    let configs = from.configs.into_iter().map(|config| config.into_iter().collect()).collect();
    let members: std::collections::BTreeMap<u64, Member> = from
        .members
        .into_iter()
        .map(|member| {
            let MemberV1 { node_id, peer_address, client_address, incarnation } = member;
            (node_id, Member { peer_address, client_address, incarnation })
        })
        .collect();
    Membership::new(configs, members).map_err(|_| Malformed("membership"))
}

fn membership_encode(membership: &Membership) -> Bytes {
    encode(&Metadata::Membership(membership_v1(membership)))
}

fn membership_decode(bytes: &[u8]) -> Result<Membership, Malformed> {
    match decode(bytes, "membership")? {
        Metadata::Membership(membership) => membership_from_v1(membership),
        _ => Err(Malformed("membership")),
    }
}

pub(crate) fn boundary_encode(boundary: &Boundary) -> Bytes {
    encode(&Metadata::Checkpoint(CheckpointV1 {
        log_id: boundary.log_id.as_ref().map(|id| (term_of(id), id.index)),
        membership_log_id: boundary.membership.log_id().as_ref().map(|id| (term_of(id), id.index)),
        membership: membership_v1(boundary.membership.membership()),
        state: boundary.state.to_vec(),
    }))
}

pub(crate) fn boundary_decode(bytes: &[u8]) -> Result<Boundary, Malformed> {
    let Metadata::Checkpoint(from) = decode(bytes, "checkpoint header")? else {
        return Err(Malformed("checkpoint header"));
    };
    let membership = membership_from_v1(from.membership)?;
    Ok(Boundary {
        log_id: from.log_id.map(|(term, index)| log_id(term, index)),
        membership: StoredMembership::new(
            from.membership_log_id.map(|(term, index)| log_id(term, index)),
            membership,
        ),
        state: from.state.into(),
    })
}
