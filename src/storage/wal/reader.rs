//! Reads records back that are not in memory any more.

use std::sync::Arc;

use bytes::Bytes;

use super::log::Location;
use super::segment::Segment;
use super::{WalError, WalRecord, io_error};

/// Most bytes that one read asks for, unless a single record is larger: so that a long range does
/// not need its size twice over at once.
const RUN_BYTES_MAX: usize = 1024 * 1024;

/// The segments that hold these places, in the order of the places. Called under the lock, so that
/// a purge cannot take them away in between.
pub(super) fn segments_of(located: &[Location], segments: &[Arc<Segment>]) -> Vec<Arc<Segment>> {
    let mut found: Vec<Arc<Segment>> = Vec::new();
    for location in located {
        if found.last().is_some_and(|last| last.number == location.segment) {
            continue;
        }
        let position = segments.binary_search_by_key(&location.segment, |segment| segment.number);
        let position = position.expect("a record lies in a segment that the log has");
        found.push(Arc::clone(&segments[position]));
    }
    found
}

/// Reads and verifies the records at these places.
pub(super) fn read(
    located: &[Location],
    segments: &[Arc<Segment>],
) -> Result<Vec<WalRecord>, WalError> {
    let mut records = Vec::with_capacity(located.len());
    let mut segments = segments.iter();
    let mut segment = segments.next();
    let mut rest = located;
    while let Some(first) = rest.first() {
        while segment.is_some_and(|segment| segment.number != first.segment) {
            segment = segments.next();
        }
        let segment = segment.expect("every place came with its segment");
        let (run, behind) = rest.split_at(run_length(rest));
        read_run(segment, run, &mut records)?;
        rest = behind;
    }
    Ok(records)
}

/// How many of the places, from the first, one read can fetch: those that lie one behind the
/// other, or almost, in one segment.
fn run_length(located: &[Location]) -> usize {
    let first = located[0];
    let start = first.offset as usize;
    let mut end = start + first.bytes();
    let mut length = 1;
    for next in &located[1..] {
        let next_end = next.offset as usize + next.bytes();
        let near = next.segment == first.segment && (next.offset as usize) >= end;
        if !near || next_end - start > RUN_BYTES_MAX {
            break;
        }
        end = next_end;
        length += 1;
    }
    length
}

fn read_run(
    segment: &Segment,
    run: &[Location],
    records: &mut Vec<WalRecord>,
) -> Result<(), WalError> {
    let (first, last) = (run[0], run[run.len() - 1]);
    let start = first.offset as usize;
    let mut buffer = vec![0; last.offset as usize + last.bytes() - start];
    segment
        .file
        .read_exact_at(&mut buffer, start as u64)
        .map_err(|error| io_error("read", &segment.path, error))?;
    let buffer = Bytes::from(buffer);
    for location in run {
        let offset = location.offset as usize - start;
        let bytes = buffer.slice(offset..offset + location.bytes());
        if crc32fast::hash(&bytes) != location.checksum {
            return Err(WalError::Corrupt {
                file: segment.path.clone(),
                offset: u64::from(location.offset),
                reason: "a record has changed since it was written".to_owned(),
            });
        }
        let header = bytes.slice(..location.header_bytes());
        let payload = bytes.slice(location.header_bytes()..);
        records.push(WalRecord { header, payload });
    }
    Ok(())
}
