//! What the log on disk says beside its records: the sum of all frames up to some batch.

use bytes::Bytes;

use super::batch::{Frame, Kind};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Words {
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<(u64, Bytes)>,
    pub(super) purged: Option<(u64, Bytes)>,
    /// Index of the next record, once the log has begun.
    pub(super) next: Option<u64>,
}

impl Words {
    /// Takes in one frame; `payload` is asked for only by those that have a word to keep.
    pub(super) fn apply(&mut self, kind: Kind, index: u64, payload: impl FnOnce() -> Bytes) {
        match kind {
            Kind::Record => self.next = Some(index + 1),
            Kind::Vote => self.vote = Some(payload()),
            Kind::Committed => self.committed = Some((index, payload())),
            Kind::Truncate => self.next = self.next.map(|next| next.min(index)),
            Kind::Purge => {
                if self.purged_index().is_none_or(|before| before < index) {
                    self.purged = Some((index, payload()));
                    self.next = self.next.max(Some(index + 1));
                }
            }
        }
    }

    /// The frames that say all of it again, at the start of a segment. `next` is in the header of
    /// the batch.
    pub(super) fn restate(&self) -> Vec<Frame> {
        let mut frames = Vec::new();
        if let Some(vote) = &self.vote {
            frames.push(Frame::new(Kind::Vote, 0, vote.clone()));
        }
        if let Some((index, committed)) = &self.committed {
            frames.push(Frame::new(Kind::Committed, *index, committed.clone()));
        }
        if let Some((index, marker)) = &self.purged {
            frames.push(Frame::new(Kind::Purge, *index, marker.clone()));
        }
        frames
    }

    pub(super) fn purged_index(&self) -> Option<u64> {
        self.purged.as_ref().map(|(index, _)| *index)
    }
}
