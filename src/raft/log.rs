//! Raft's log and vote on the write-ahead log.
//!
//! openraft asks for votes and entries to go through one ordered queue; the write-ahead log is
//! that queue. `append` returns once the records are queued (and readable), its callback runs when
//! they are on disk. Truncations and purges are queued without waiting: whatever is asked for
//! later stands behind them.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use openraft::OptionalSend;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};

use super::convert;
use super::types::{Entry, LogId, TypeConfig, Vote};
use crate::limits::ENTRY_BYTES_MAX;
use crate::storage::wal::{Recovered, Wal, WalError, WalRecord};

/// Bytes of entries that one append to a peer may carry: two entries of the largest size.
const APPEND_BYTES_MAX: usize = 2 * ENTRY_BYTES_MAX;

/// How far the local log is known to be on disk, for those who must not run ahead of it.
///
/// A truncation starts a new epoch: what was queued before it says nothing about the records that
/// take the place of those truncated.
#[derive(Default)]
pub(crate) struct Durable {
    state: Mutex<DurableState>,
    changed: Condvar,
}

#[derive(Default)]
struct DurableState {
    /// One more than the highest index on disk.
    next_index: u64,
    epoch: u64,
    failed: bool,
    /// How many threads wait. Mostly none do, and to wake nobody costs a system call as well.
    waiting: usize,
}

impl Durable {
    fn lock(&self) -> MutexGuard<'_, DurableState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn epoch(&self) -> u64 {
        self.lock().epoch
    }

    fn advance(&self, epoch: u64, next_index: u64) {
        let mut state = self.lock();
        if state.epoch == epoch {
            state.next_index = state.next_index.max(next_index);
            if state.waiting > 0 {
                self.changed.notify_all();
            }
        }
    }

    /// Begins an epoch in which nothing at or behind `next_index` is on disk yet.
    fn truncate(&self, next_index: u64) -> u64 {
        let mut state = self.lock();
        state.next_index = state.next_index.min(next_index);
        state.epoch += 1;
        state.epoch
    }

    /// A log that holds everything: for state machines that are fed past their log.
    #[cfg(test)]
    pub(crate) fn of_everything() -> Arc<Self> {
        let this = Self::default();
        this.advance(0, u64::MAX);
        Arc::new(this)
    }

    /// Says that nothing more will become durable.
    pub(crate) fn fail(&self) {
        self.lock().failed = true;
        self.changed.notify_all();
    }

    /// Blocks until every record before `next_index` is on disk. False if the log has failed or
    /// closed before.
    pub(crate) fn wait(&self, next_index: u64) -> bool {
        let mut state = self.lock();
        state.waiting += 1;
        let mut state = self
            .changed
            .wait_while(state, |state| !state.failed && state.next_index < next_index)
            .unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state.next_index >= next_index
    }
}

/// The log store: a handle, cheap to clone.
#[derive(Clone)]
pub(crate) struct LogStore {
    wal: Wal,
    durable: Arc<Durable>,
    shared: Arc<Mutex<Shared>>,
}

/// What openraft asks back.
struct Shared {
    vote: Option<Vote>,
    /// That of the vote that is on its way to disk, or of the last one.
    promised_term: u64,
    committed: Option<LogId>,
    purged: Option<LogId>,
    last: Option<LogId>,
}

impl LogStore {
    pub(crate) fn new(wal: Wal, recovered: &Recovered) -> io::Result<Self> {
        let decode = |bytes: &Option<bytes::Bytes>| {
            bytes.as_deref().map(convert::log_id_decode).transpose().map_err(invalid)
        };
        let purged = recovered.purged.as_ref().map(|(_, marker)| marker.clone());
        let mut shared = Shared {
            vote: recovered
                .vote
                .as_deref()
                .map(convert::vote_decode)
                .transpose()
                .map_err(invalid)?,
            promised_term: 0,
            committed: decode(&recovered.committed)?,
            purged: decode(&purged)?,
            last: None,
        };
        shared.promised_term = shared.vote.map_or(0, |vote| vote.leader_id.term);
        shared.last = shared.purged;
        if let Some(last) = wal.last_index() {
            let record = read_one(&wal, last)?;
            shared.last = Some(record.log_id);
        }
        let durable = Arc::new(Durable::default());
        // A purge counts as well: it may be all that a log holds.
        durable.advance(0, shared.last.map_or(0, |last| last.index + 1));
        Ok(Self { wal, durable, shared: Arc::new(Mutex::new(shared)) })
    }

    pub(crate) fn durable(&self) -> Arc<Durable> {
        self.durable.clone()
    }

    /// Whether anything was ever written: a vote, or an entry.
    pub(crate) fn is_pristine(&self) -> bool {
        let shared = self.lock();
        shared.vote.is_none() && shared.last.is_none()
    }

    /// The term of the last entry; zero without one.
    pub(crate) fn last_term(&self) -> u64 {
        self.lock().last.map_or(0, |last| super::types::term_of(&last))
    }

    /// As far as the log knows by itself.
    pub(crate) fn committed_index(&self) -> Option<u64> {
        self.lock().committed.map(|committed| committed.index)
    }

    pub(crate) fn vote(&self) -> Option<Vote> {
        self.lock().vote
    }

    /// The latest term that this node has voted in, or is about to: the leader of any before it
    /// is followed no more.
    pub(crate) fn promised_term(&self) -> u64 {
        self.lock().promised_term
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what a leader asks whose log lacks committed entries, which no vote can bring about:
    /// a disk, or an old copy of one, must have. It has another entry at `index` than this node.
    fn check_contradiction(&self, index: u64) -> io::Result<()> {
        let shared = self.lock();
        let indexes = [shared.committed, shared.purged].map(|log_id| log_id.map(|id| id.index));
        let Some(committed) = indexes.into_iter().flatten().max() else { return Ok(()) };
        if index > committed {
            return Ok(());
        }
        let last = shared.last.map_or(committed, |last| last.index);
        Err(io::Error::other(format!(
            "the leader's log contradicts what is committed: its entry {index} is another than the \
             one here, and here those up to {committed} are committed and were acknowledged. A \
             node that had them, most likely the leader, has lost the newest part of its log, by a \
             disk that failed or an old copy of its data directory. Stop all nodes before more is \
             overwritten, and keep this node's data directory, which has the entries up to {last}; \
             README says how to go on under \"Logs that contradict each other\""
        )))
    }

    fn read(&self, from: u64, until: u64, bytes_max: usize) -> io::Result<Read> {
        let records = match self.wal.read(from..until, bytes_max) {
            Ok(records) => records,
            Err(WalError::Purged { first, .. }) => return Ok(Read::Purged { first }),
            Err(error) => return Err(log_failed(error)),
        };
        let entries = (from..)
            .zip(records)
            .map(|(index, record)| convert::record_in(index, record).map_err(invalid));
        entries.collect::<io::Result<_>>().map(Read::Entries)
    }
}

/// What a range of the log came to. Whether its beginning is still there is seen in the one look
/// that finds the records, so that a purge beside it cannot shift them.
enum Read {
    Entries(Vec<Entry>),
    Purged { first: u64 },
}

fn read_one(wal: &Wal, index: u64) -> io::Result<Entry> {
    let records = wal.read(index..index + 1, 0).map_err(log_failed)?;
    let record =
        records.into_iter().next().ok_or_else(|| invalid(convert::Malformed("log record")))?;
    convert::record_in(index, record).map_err(invalid)
}

fn invalid(error: convert::Malformed) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn log_failed(error: WalError) -> io::Error {
    io::Error::other(error)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let next = self.lock().last.map_or(0, |last| last.index + 1);
        let from = match range.start_bound() {
            Bound::Included(index) => *index,
            Bound::Excluded(index) => index + 1,
            Bound::Unbounded => 0,
        };
        let until = match range.end_bound() {
            Bound::Included(index) => index + 1,
            Bound::Excluded(index) => *index,
            Bound::Unbounded => next,
        };
        let (mut from, until) = (from, until.min(next));
        let mut entries = Vec::new();
        while from < until {
            match self.read(from, until, usize::MAX)? {
                Read::Entries(read) if read.is_empty() => break,
                Read::Entries(read) => {
                    from += read.len() as u64;
                    entries.extend(read);
                }
                // What was purged may be missing at the beginning, but not behind it.
                Read::Purged { first } => {
                    entries.clear();
                    from = first;
                }
            }
        }
        Ok(entries)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.lock().vote)
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        Ok(match self.read(start, end, APPEND_BYTES_MAX)? {
            Read::Entries(entries) => entries,
            // An error here would end the leader. The follower is sent nothing, which `network`
            // notices: it ends the stream, and openraft sends a snapshot instead.
            Read::Purged { .. } => Vec::new(),
        })
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let shared = self.lock();
        Ok(LogState { last_purged_log_id: shared.purged, last_log_id: shared.last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.lock().promised_term = vote.leader_id.term;
        let (done, saved) = tokio::sync::oneshot::channel();
        self.wal
            .save_vote(convert::vote_encode(vote), Box::new(move |result| drop(done.send(result))));
        saved.await.map_err(|_| io::Error::other("the log is closed"))?.map_err(log_failed)?;
        self.lock().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        let Some(committed) = committed else { return Ok(()) };
        let before = self.lock().committed;
        if let Some(before) = before
            && committed.index <= before.index
        {
            // Terms only grow along a log. openraft does not look again at what it has committed,
            // and would take another leader's entry for the one that is here.
            let is_other = committed.leader_id > before.leader_id;
            return if is_other { self.check_contradiction(committed.index) } else { Ok(()) };
        }
        self.wal.save_committed(committed.index, convert::log_id_encode(&committed));
        self.lock().committed = Some(committed);
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.lock().committed)
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut first = None;
        let mut last = None;
        let records: Vec<WalRecord> = entries
            .into_iter()
            .map(|entry| {
                first.get_or_insert(entry.log_id.index);
                last = Some(entry.log_id);
                convert::record_out(entry)
            })
            .collect();
        let (Some(first), Some(last)) = (first, last) else {
            callback.io_completed(Ok(()));
            return Ok(());
        };
        self.lock().last = Some(last);
        let durable = self.durable.clone();
        let epoch = durable.epoch();
        self.wal.append(
            first,
            records,
            Box::new(move |result| {
                match &result {
                    Ok(()) => durable.advance(epoch, last.index + 1),
                    Err(_) => durable.fail(),
                }
                callback.io_completed(result.map_err(log_failed));
            }),
        );
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let next_index = last.map_or(0, |last| last.index + 1);
        self.check_contradiction(next_index)?;
        // Nothing that is truncated was ever committed, so nobody waits for it.
        let durable = self.durable.clone();
        let epoch = durable.truncate(next_index);
        let done = Box::new(move |result: Result<(), WalError>| match result {
            Ok(()) => durable.advance(epoch, next_index),
            Err(_) => durable.fail(),
        });
        self.wal.truncate_from(next_index, done);
        let mut shared = self.lock();
        if shared.last.is_some_and(|held| held.index >= next_index) {
            shared.last = last;
        }
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let durable = self.durable.clone();
        let epoch = durable.epoch();
        // A purge can lie ahead of the log, when a snapshot has taken the place of all of it.
        self.wal.purge_to(
            upto.index,
            convert::log_id_encode(&upto),
            Box::new(move |result| match result {
                Ok(()) => durable.advance(epoch, upto.index + 1),
                Err(_) => durable.fail(),
            }),
        );
        let mut shared = self.lock();
        shared.purged = Some(upto);
        if shared.last.is_none_or(|last| last.index <= upto.index) {
            shared.last = Some(upto);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::types::{EntryPayload, log_id};
    use crate::storage::file::RealFiles;
    use crate::storage::wal::WalOptions;

    /// What a leader that has lost committed entries asks of a node that has them.
    #[tokio::test]
    async fn what_is_committed_is_not_dropped_and_the_refusal_says_what_it_means() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Wal::open(Arc::new(RealFiles), directory.path(), WalOptions::default());
        let (wal, recovered) = open().unwrap();
        let mut log = LogStore::new(wal.clone(), &recovered).unwrap();
        let entry = |index| Entry { log_id: log_id(1, index), payload: EntryPayload::Blank };
        log.append((0..=202).map(entry), IOFlushed::noop()).await.unwrap();
        log.save_committed(Some(log_id(1, 199))).await.unwrap();
        log.purge(log_id(1, 3)).await.unwrap();
        for last in [Some(log_id(1, 198)), Some(log_id(1, 101)), Some(log_id(1, 2)), None] {
            let error = log.truncate_after(last).await.unwrap_err().to_string();
            let from = last.map_or(0, |last| last.index + 1);
            for part in [
                "contradicts what is committed",
                &format!("its entry {from} is another"),
                "up to 199 are committed",
                "Stop all nodes",
                "entries up to 202",
                "Logs that contradict each other",
            ] {
                assert!(error.contains(part), "{part} in {error}");
            }
        }
        // Where openraft does not notice: it asks nothing of entries that it has committed.
        log.save_committed(Some(log_id(1, 150))).await.unwrap();
        for index in [100, 199] {
            let error = log.save_committed(Some(log_id(2, index))).await.unwrap_err().to_string();
            assert!(error.contains(&format!("its entry {index} is another")), "{error}");
        }
        assert_eq!(log.read_committed().await.unwrap(), Some(log_id(1, 199)));
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(log_id(1, 202)));
        assert!(log.durable().wait(203), "the log goes on");
        log.truncate_after(Some(log_id(1, 199))).await.unwrap();
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(log_id(1, 199)));
        wal.close();
    }
}
