//! Folding: several neighbouring runs are rewritten as one, a bounded stretch at a time.
//!
//! Without it every checkpoint would add a run for ever. Two rules decide what is folded:
//!
//! - All runs into one, as soon as those behind the oldest hold as many bytes as the oldest. So
//!   the disk holds at most about twice the live records (and the fold under way), and a record
//!   that changes is rewritten about twice: once as a change, once by the fold that it helped to
//!   bring about.
//! - Else the newest ones up to a *tier* (a tier is a factor of [`FAN_IN`] in size), once there
//!   are `FAN_IN` of that tier. So there are few runs to merge at a load even when checkpoints
//!   are tiny, at the price of one more rewriting per tier.
//!
//! A fold under way is not part of any root: a crash forgets it. A checkpoint advances it by a
//! multiple of the bytes that it wrote itself, and at least by a 64th of the whole, so that no
//! checkpoint takes much longer than another and the runs that arrive meanwhile stay few.

use std::ops::Range;
use std::sync::Arc;

use super::CheckpointError;
use super::block::BlockStore;
use super::run::{Merge, Run, RunWriter};

/// Runs of one tier that are folded at once.
const FAN_IN: usize = 8;
/// Runs that are folded even if they are of many tiers in an unlucky order.
const RUNS_MAX: usize = 40;
/// Runs up to this size are of the lowest tier.
const TIER_BYTES: u64 = 64 * 1024;
/// Bytes folded for each byte of changes, at least.
const FOLD_BYTES_PER_BYTE: u64 = 4;
/// Bytes folded by a checkpoint, at least: some 20 ms of work.
const FOLD_BYTES_MIN: u64 = 4 * 1024 * 1024;
/// Most checkpoints that one fold takes.
const FOLD_STEPS_MAX: u64 = 64;

/// Which neighbouring runs, given oldest first, are best folded now.
pub(super) fn choose(runs: &[Arc<Run>]) -> Option<Range<usize>> {
    let (oldest, others) = runs.split_first()?;
    if !others.is_empty() && others.iter().map(|run| run.bytes).sum::<u64>() >= oldest.bytes {
        return Some(0..runs.len());
    }
    let highest = runs.iter().map(|run| tier(run)).max()?;
    for limit in 0..=highest {
        let newest = || runs.iter().rev().take_while(|run| tier(run) <= limit);
        let of_tier = newest().filter(|run| tier(run) == limit).count();
        if of_tier >= FAN_IN || newest().count() >= RUNS_MAX {
            return Some(runs.len() - newest().count()..runs.len());
        }
    }
    None
}

fn tier(run: &Run) -> u32 {
    (run.bytes / TIER_BYTES).checked_ilog(FAN_IN as u64).map_or(0, |tier| tier + 1)
}

/// A fold under way.
pub(super) struct Fold {
    sources: Vec<Arc<Run>>,
    /// Nothing lies below the sources, so removals have done their work.
    lowest: bool,
    merge: Merge,
    writer: RunWriter,
    bytes: u64,
}

impl Fold {
    /// Begins to fold `sources`, oldest first, into what `writer` makes.
    pub(super) fn new(
        store: &Arc<dyn BlockStore>,
        sources: Vec<Arc<Run>>,
        lowest: bool,
        writer: RunWriter,
    ) -> Result<Self, CheckpointError> {
        let merge = Merge::new(store, &sources)?;
        let bytes = sources.iter().map(|run| run.bytes).sum();
        Ok(Self { sources, lowest, merge, writer, bytes })
    }

    /// Goes on, as far as a checkpoint that wrote `written` bytes should; true at the end. Adds
    /// what was read to `folded`.
    pub(super) fn advance(
        &mut self,
        written: u64,
        folded: &mut u64,
    ) -> Result<bool, CheckpointError> {
        let budget = written
            .saturating_mul(FOLD_BYTES_PER_BYTE)
            .max(FOLD_BYTES_MIN)
            .max(self.bytes / FOLD_STEPS_MAX);
        let end = *folded + budget;
        let Self { merge, writer, lowest, .. } = self;
        while *folded < end {
            let step = merge.step(&mut |key, value| match value {
                None if *lowest => Ok(()),
                value => writer.push(key, value),
            })?;
            match step {
                Some(bytes) => *folded += bytes,
                None => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Blocks written so far.
    pub(super) fn blocks(&self) -> u32 {
        self.writer.blocks()
    }

    /// The runs that were folded, and the one that takes their place.
    pub(super) fn finish(self) -> Result<(Vec<Arc<Run>>, Run), CheckpointError> {
        Ok((self.sources, self.writer.finish()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(bytes: &[u64]) -> Vec<Arc<Run>> {
        let run = |(id, &bytes)| {
            Arc::new(Run { id: id as u64, blocks: 1, records: 1, bytes, checksum: 0 })
        };
        bytes.iter().enumerate().map(run).collect()
    }

    #[test]
    fn what_is_folded() {
        const M: u64 = 1024 * 1024;
        assert_eq!(choose(&[]), None);
        assert_eq!(choose(&runs(&[M])), None);
        assert_eq!(choose(&runs(&[100 * M, 60 * M, 39 * M])), None);
        assert_eq!(choose(&runs(&[100 * M, 60 * M, 40 * M])), Some(0..3));
        let seven = [100 * M, 1, 1, 1, 1, 1, 1, 1];
        assert_eq!(choose(&runs(&seven)), None);
        assert_eq!(choose(&runs(&[&seven[..], &[1]].concat())), Some(1..9));
        // A larger run among the newest lifts the tier, and with it what is folded.
        let mixed = [900 * M, M, M, M, M, M, M, M, 1, M];
        assert_eq!(choose(&runs(&mixed)), Some(1..10));
    }

    /// However checkpoints come, the runs stay few and what is written stays proportionate.
    #[test]
    fn runs_stay_few() {
        for change in [1u64, 3_000, 300_000, 30_000_000] {
            let state = 300_000_000;
            let (mut sizes, mut written, mut most) = (vec![], 0u64, 0);
            for _ in 0..2_000 {
                sizes.push(change);
                written += change;
                while let Some(range) = choose(&runs(&sizes)) {
                    let folded = sizes[range.clone()].iter().sum::<u64>().min(state);
                    written += folded;
                    sizes.splice(range, [folded]);
                }
                most = most.max(sizes.len());
            }
            assert!(most <= RUNS_MAX, "{most} runs at {change} bytes a checkpoint");
            let total = 2_000 * change;
            // Within the lowest tier a few kilobytes are rewritten at a time, however few are new.
            let least = 2_000 * TIER_BYTES / 4;
            assert!(written <= 5 * total + least, "{} times written", written / total);
        }
    }
}
