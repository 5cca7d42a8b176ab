//! Deadlines: what is due, and how it is removed.
//!
//! Nothing has to be removed in time, as everybody who looks at a record compares its deadline with
//! the clock. So the sweep can take its time: each `Tick` removes a bounded number of records, and
//! the writes queued behind it wait for no more than that, however many sessions ended in the same
//! instant. A command that meets a record that is due removes it first, so that its end is an event
//! before whatever the command does, in the order in which they happened.
//!
//! The end of a session leaves a tombstone, which has a deadline too, a minute later. Both kinds
//! are swept in the one order of their deadlines.

use super::State;
use super::command::{Cause, Change, Outcome, RecordKey, Reply, SessionKey};
use super::session::TouchNeed;
use super::time::Timestamp;
use crate::limits::EXPIRE_BATCH_MAX;

impl State {
    /// The earliest deadline of sessions and tombstones. Once cluster time has come to it, a `Tick`
    /// is wanted.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.records.next_deadline()
    }

    /// Whether anything is due at the clock and has not been swept: another `Tick` is wanted.
    pub fn has_due(&self) -> bool {
        self.next_deadline().is_some_and(|deadline| deadline <= self.clock.time)
    }

    /// What has to be done about an access to a session at `now`, which is cluster time as the
    /// caller knows it and may be ahead of what was applied.
    pub fn touch_need(&self, key: &SessionKey, now: Timestamp) -> TouchNeed {
        match self.live_session(key) {
            Some(session) => TouchNeed::of(session, now.max(self.clock.time)),
            None => TouchNeed::NotFound,
        }
    }

    /// Removes what is due, at most `EXPIRE_BATCH_MAX` records, in order of deadline, namespace,
    /// kind and digest, all at one revision.
    pub(super) fn sweep(&mut self, changes: &mut Vec<Change>) -> Reply {
        let mut removed = 0;
        while removed < EXPIRE_BATCH_MAX
            && let Some((deadline, key)) = self.records.first_deadline()
            && deadline <= self.clock.time
        {
            if removed == 0 {
                self.revision = self.next_revision();
            }
            match key {
                RecordKey::Session(key) => self.expire_session(&key, changes),
                RecordKey::Tombstone(key) => {
                    self.put_tombstone(&key, None, Cause::Forgotten, changes);
                }
            }
            removed += 1;
        }
        let outcome = Outcome::Written { version: self.revision, deadline: None };
        Reply { revision: self.revision, outcome }
    }

    /// Removes the session or tombstone of `key` if it is due, at a revision of its own.
    pub(super) fn expire_if_due(&mut self, key: &SessionKey, changes: &mut Vec<Change>) {
        let clock = self.clock.time;
        // A key has a session or a tombstone, so where there is the one nobody looks for the other.
        if let Some(session) = self.records.session(key) {
            if session.is_due(clock) {
                self.revision = self.next_revision();
                self.expire_session(key, changes);
            }
        } else if self.records.tombstone(key).is_some_and(|stone| stone.deadline() <= clock) {
            self.revision = self.next_revision();
            self.put_tombstone(key, None, Cause::Forgotten, changes);
        }
    }

    fn expire_session(&mut self, key: &SessionKey, changes: &mut Vec<Change>) {
        let session = self.records.session(key).expect("what is due is there");
        let mut requests = session.requests();
        requests.drop_expired(self.clock.time);
        self.end_session(key, &requests, Cause::Expired, changes);
    }
}
