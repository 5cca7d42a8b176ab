//! Folding: several neighbouring runs are rewritten as one, a bounded stretch at a time.
//!
//! Without it every checkpoint would add a run for ever. Two rules decide what is folded:
//!
//! - All runs into one, as soon as those behind the oldest hold [`FOLD_RATIO`] times the bytes of
//!   the oldest. So records of a dense load are written one and a half times: once as a change,
//!   and half a time by the folds, as there is one for every two states' worth of changes.
//! - Else the newest ones up to a *tier* (a tier is a factor of [`FAN_IN`] in size), once there
//!   are `FAN_IN` of that tier, unless together they are a sizeable part of the oldest and so
//!   will soon be folded into it anyway. So there are few runs to merge at a load even when
//!   checkpoints are tiny, at the price of one more rewriting per tier.
//!
//! A fold under way is not part of any root: a crash forgets it. A checkpoint advances it by a
//! multiple of the bytes that it wrote itself, and at least by a 64th of the whole, so that no
//! checkpoint takes much longer than another and the runs that arrive meanwhile stay few.

use std::ops::Range;
use std::sync::Arc;

use super::CheckpointError;
use super::block::BlockStore;
use super::run::{Merge, Run, RunWriter};

/// Bytes of younger runs per byte of the oldest at which all are folded.
const FOLD_RATIO: u64 = 2;
/// Runs of one tier that are folded at once.
const FAN_IN: usize = 8;
/// Younger runs are not folded among themselves if together they have this part of the oldest.
const SIZEABLE_PART: u64 = 4;
/// Runs at which all are folded, whatever they are: a load reads them side by side.
const RUNS_MAX: usize = 100;
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
    let bytes = |runs: &[Arc<Run>]| runs.iter().map(|run| run.bytes).sum::<u64>();
    let outgrown = bytes(others) >= FOLD_RATIO * oldest.bytes;
    if runs.len() >= RUNS_MAX || (!others.is_empty() && outgrown) {
        return Some(0..runs.len());
    }
    for limit in 0..=others.iter().map(|run| tier(run)).max()? {
        let newest = || runs.iter().rev().take_while(|run| tier(run) <= limit);
        let start = runs.len() - newest().count();
        let of_tier = newest().filter(|run| tier(run) == limit).count();
        if of_tier >= FAN_IN && bytes(&runs[start..]) < oldest.bytes / SIZEABLE_PART {
            return Some(start..runs.len());
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
            let id = id as u64;
            Arc::new(Run { id, blocks: 1, records: 1, bytes, checksum: 0 })
        };
        bytes.iter().enumerate().map(run).collect()
    }

    #[test]
    fn what_is_folded() {
        const M: u64 = 1024 * 1024;
        assert_eq!(choose(&[]), None);
        assert_eq!(choose(&runs(&[M])), None);
        assert_eq!(choose(&runs(&[100 * M, 160 * M, 39 * M])), None);
        assert_eq!(choose(&runs(&[100 * M, 160 * M, 40 * M])), Some(0..3));
        let seven = [100 * M, 1, 1, 1, 1, 1, 1, 1];
        assert_eq!(choose(&runs(&seven)), None);
        assert_eq!(choose(&runs(&[&seven[..], &[1]].concat())), Some(1..9));
        // Smaller ones among the newest go along.
        let mixed = [900 * M, M, M, M, M, M, M, M, 1, M];
        assert_eq!(choose(&runs(&mixed)), Some(1..10));
        // What is nearly enough for a fold of all waits for that.
        let sizeable = [900 * M, 30 * M, 30 * M, 30 * M, 30 * M, 30 * M, 30 * M, 30 * M, 30 * M];
        assert_eq!(choose(&runs(&sizeable)), None);
        assert_eq!(choose(&runs(&[M; 2])), None);
        let many: Vec<_> = [900 * M].into_iter().chain([9 * M; RUNS_MAX - 1]).collect();
        assert_eq!(choose(&runs(&many)), Some(0..RUNS_MAX));
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
            assert!(most < RUNS_MAX, "{most} runs at {change} bytes a checkpoint");
            let total = 2_000 * change;
            // Within the lowest tier a few kilobytes are rewritten at a time, however few are new.
            let least = 2_000 * TIER_BYTES / 4;
            assert!(written <= 5 * total + least, "{} times written", written / total);
        }
    }
}
