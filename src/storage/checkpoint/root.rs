//! The root of a checkpoint: the one record that makes runs a state.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::CheckpointError;
use super::run::Run;
use crate::storage::envelope::{self, Magic};

const MAGIC: Magic = *b"QRCKROOT";
const VERSION: u8 = 1;

/// Largest header, in bytes. It is rewritten with every checkpoint, and beyond this sled would
/// put the root into a file of its own.
pub const HEADER_BYTES_MAX: usize = 64 * 1024;

/// What a finished checkpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRoot {
    /// Counts the checkpoints of this store, from 1.
    pub generation: u64,
    /// The log index that the state is as of.
    pub index: u64,
    /// Opaque: log id, membership, header of the state.
    pub header: Bytes,
}

/// A root as it is stored.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    generation: u64,
    index: u64,
    header: Bytes,
    next_run: u64,
    runs: Vec<StoredRun>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredRun {
    id: u64,
    blocks: u32,
    records: u64,
    bytes: u64,
    checksum: u64,
}

/// A root with its runs (oldest first) and the first run id that it leaves unused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) public: CheckpointRoot,
    pub(super) runs: Vec<Run>,
    pub(super) next_run: u64,
}

impl Root {
    pub(super) fn encode(&self) -> Result<Vec<u8>, CheckpointError> {
        let header = self.public.header.clone();
        if header.len() > HEADER_BYTES_MAX {
            return Err(CheckpointError::HeaderTooLarge { bytes: header.len() });
        }
        let runs = self.runs.iter().map(|run| StoredRun {
            id: run.id,
            blocks: run.blocks,
            records: run.records,
            bytes: run.bytes,
            checksum: run.checksum,
        });
        let stored = Stored {
            generation: self.public.generation,
            index: self.public.index,
            header,
            next_run: self.next_run,
            runs: runs.collect(),
        };
        envelope::seal(MAGIC, VERSION, &stored)
            .map_err(|error| CheckpointError::Corrupt { reason: format!("root: {error}") })
    }

    /// Decodes the root of that generation.
    pub(super) fn decode(generation: u64, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let corrupt = |reason: String| CheckpointError::Corrupt {
            reason: format!("root of generation {generation}: {reason}"),
        };
        let stored: Stored =
            envelope::unseal(MAGIC, VERSION, bytes).map_err(|error| corrupt(error.to_string()))?;
        if stored.generation != generation {
            return Err(corrupt(format!("says that it is of {}", stored.generation)));
        }
        let mut runs: Vec<Run> = Vec::with_capacity(stored.runs.len());
        for StoredRun { id, blocks, records, bytes, checksum } in stored.runs {
            if id >= stored.next_run || runs.iter().any(|run| run.id == id) {
                return Err(corrupt(format!("run {id} cannot be")));
            }
            runs.push(Run { id, blocks, records, bytes, checksum });
        }
        let Stored { generation, index, header, next_run, .. } = stored;
        Ok(Self { public: CheckpointRoot { generation, index, header }, runs, next_run })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Root {
        Root {
            public: CheckpointRoot {
                generation: 3,
                index: 1000,
                header: Bytes::from_static(b"header"),
            },
            runs: vec![
                Run { id: 9, blocks: 300, records: 5000, bytes: 70_000, checksum: 1 << 60 },
                Run { id: 4, blocks: 1, records: 2, bytes: 30, checksum: 5 },
            ],
            next_run: 10,
        }
    }

    /// These bytes are on disks: if this fails, the format changed.
    #[test]
    fn golden_bytes() {
        let bytes = root().encode().unwrap();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "5152434b524f4f540103fbe803066865616465720a0209fb2c01fb8813fc70110100\
                        fd00000000000000100401021e05";
        assert_eq!(hex[..hex.len() - 8], expected.replace(' ', ""));
        assert_eq!(Root::decode(3, &bytes).unwrap(), root());
    }

    #[test]
    fn roots_that_cannot_be_are_refused() {
        let bytes = root().encode().unwrap();
        assert!(Root::decode(4, &bytes).is_err(), "another generation");
        let twice = Root { runs: vec![root().runs[0].clone(), root().runs[0].clone()], ..root() };
        assert!(Root::decode(3, &twice.encode().unwrap()).is_err(), "a run twice");
        let future = Root { next_run: 5, ..root() };
        assert!(Root::decode(3, &future.encode().unwrap()).is_err(), "a run not yet made");
        let mut large = root();
        large.public.header = Bytes::from(vec![0; HEADER_BYTES_MAX + 1]);
        assert!(matches!(large.encode(), Err(CheckpointError::HeaderTooLarge { .. })));
    }
}
