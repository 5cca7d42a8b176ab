//! A state from its header and records, as checkpoints and snapshots keep it.
//!
//! Records may come in any order. They are collected first and the trees built in one go from what
//! was sorted, which takes a fraction of the time of a million insertions, and leaves the trees
//! full. Count and digest have to be those of the header.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::State;
use super::codec::{CodecError, decode_header, decode_record_with, encode_header, split_key};
use super::command::{Digest, Namespace, Record, RecordKey, Revision};
use super::coordination::{Coordination, CoordinationRecords};
use super::digest::{StateDigest, of_state};
use super::namespace::NamespaceRecords;
use super::session::Session;
use super::time::Stamp;
use super::tombstone::Tombstone;

/// What a state is besides its records, and what its records must add up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateHeader {
    /// The level in force, which it takes to understand the state.
    pub feature_level: u32,
    /// The latest stamp.
    pub clock: Stamp,
    /// The revision of the last change.
    pub revision: Revision,
    /// How many records there are.
    pub records: u64,
    /// Sum of their hashes.
    pub(super) sum: u64,
}

impl StateHeader {
    /// The header in its stored form.
    pub(super) fn encode(&self) -> Bytes {
        encode_header(self)
    }

    /// Reads the stored form.
    ///
    /// Errors: the bytes are no header, or one above this build's feature level.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        decode_header(bytes)
    }

    /// The digest of the state.
    pub fn digest(&self) -> StateDigest {
        of_state(self.feature_level, self.revision, self.sum)
    }
}

/// A state that is being restored.
#[derive(Debug)]
pub struct Restore {
    header: StateHeader,
    namespaces: BTreeMap<Namespace, Collected>,
    scratch: Vec<u8>,
}

/// The records of one namespace, in the order in which they came.
#[derive(Debug, Default)]
struct Collected {
    sessions: Vec<(Digest, Arc<Session>)>,
    tombstones: Vec<(Digest, Arc<Tombstone>)>,
    coordination: CoordinationRecords,
}

impl Restore {
    /// Begins with the header.
    ///
    /// Errors: the bytes are no header, or one above this build's feature level.
    pub fn new(header: &[u8]) -> Result<Self, CodecError> {
        let header = decode_header(header)?;
        Ok(Self { header, namespaces: BTreeMap::new(), scratch: Vec::new() })
    }

    /// Adds a record.
    ///
    /// Errors: the bytes are no record, or one that this build does not know.
    pub fn insert(&mut self, key: &[u8], value: &[u8]) -> Result<(), CodecError> {
        let (namespace, name) = split_key(key)?;
        let namespace = match self.namespaces.get_key_value(namespace) {
            Some((namespace, _)) => namespace.clone(),
            None => Namespace(Arc::from(namespace)),
        };
        let key = name.key(namespace.clone());
        let record = decode_record_with(&key, value, &mut self.scratch)?;
        let collected = self.namespaces.entry(namespace).or_default();
        let coordination = &mut collected.coordination;
        match (key, record) {
            (RecordKey::Session(key), Record::Session(session)) => {
                collected.sessions.push((key.digest, session));
            }
            (RecordKey::Tombstone(key), Record::Tombstone(tombstone)) => {
                collected.tombstones.push((key.digest, tombstone));
            }
            (RecordKey::Lease(key), Record::Lease(lease)) => {
                coordination.leases.push((key.id, lease));
            }
            (RecordKey::LeaseTombstone(key), Record::LeaseTombstone(tombstone)) => {
                coordination.tombstones.push((key.id, tombstone));
            }
            (RecordKey::Claim(key), Record::Claim(claim)) => {
                coordination.claims.push(((key.lock.name, key.order), claim));
            }
            (RecordKey::Ring(key), Record::Ring(ring)) => {
                coordination.rings.push((key.name, ring));
            }
            (RecordKey::Member(key), Record::Member(member)) => {
                coordination.members.push(((key.ring.name, key.name), member));
            }
            _ => unreachable!("a record is decoded to the kind of its key"),
        }
        Ok(())
    }

    /// Builds the state.
    ///
    /// Errors: a key came twice, or the records are not those that the header was written for.
    pub fn finish(self) -> Result<State, CodecError> {
        let StateHeader { feature_level, clock, revision, .. } = self.header;
        let mut state = State { feature_level, clock, revision, ..State::default() };
        for (name, collected) in self.namespaces {
            let Collected { sessions, tombstones, coordination } = collected;
            let mut records = NamespaceRecords::build(sessions, tombstones)
                .ok_or(CodecError::Malformed("a key that occurs twice"))?;
            records.coordination = Coordination::build(coordination)
                .ok_or(CodecError::Malformed("leases, claims or rings that do not go together"))?;
            state.records.add_namespace(name, records);
        }
        let restored = state.state_header();
        let compare = |what, found, expected| match found == expected {
            true => Ok(()),
            false => Err(CodecError::Mismatch { what, found, expected }),
        };
        compare("the number of records", restored.records, self.header.records)?;
        compare("the digest of the records", restored.sum, self.header.sum)?;
        Ok(state)
    }
}
