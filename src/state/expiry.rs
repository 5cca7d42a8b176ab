//! Deadlines: what is due, and how it is removed.
//!
//! Nothing has to be removed in time, as everybody who looks at a record compares its deadline with
//! the clock. So the sweep can take its time: each `Tick` removes a bounded number of records, and
//! the writes queued behind it wait for no more than that, however many sessions ended in the same
//! instant. A command that meets a record that is due removes it first, so that its end is an event
//! before whatever the command does, in the order in which they happened.
//!
//! The end of a session or lease leaves a tombstone, which has a deadline too, a minute later.
//! There are two clocks: first comes what earlier calls have left over (`settle`), then what lives
//! by the steady clock, then what lives by cluster time, each in the order of its deadlines.

use std::time::Duration;

use super::State;
use super::command::{Cause, Change, Outcome, RecordKey, Reply, SessionKey};
use super::session::TouchNeed;
use super::settle::Step;
use super::time::{Deadlines, Stamp, Timestamp};

impl State {
    /// The earliest deadline on each clock. Once either has come, a `Tick` is wanted.
    pub fn next_deadlines(&self) -> Deadlines {
        Deadlines {
            time: self.records.next_deadline(),
            steady: self.records.next_steady_deadline(),
        }
    }

    /// Whether anything is due at the clock and has not been swept, or has been left over by a
    /// bounded step: another `Tick` is wanted.
    pub fn has_due(&self) -> bool {
        self.due_in(self.clock).is_some_and(|wait| wait.is_zero())
    }

    /// How long it is from `now` until a `Tick` is wanted: zero if one is, `None` if nothing has a
    /// deadline. `now` may be ahead of what was applied.
    pub fn due_in(&self, now: Stamp) -> Option<Duration> {
        if self.records.has_backlog() {
            return Some(Duration::ZERO);
        }
        self.next_deadlines().remaining(now.max(self.clock))
    }

    /// What has to be done about an access to a session at `now`, which is cluster time as the
    /// caller knows it and may be ahead of what was applied.
    pub fn touch_need(&self, key: &SessionKey, now: Timestamp) -> TouchNeed {
        match self.live_session(key) {
            Some(session) => TouchNeed::of(session, now.max(self.clock.time)),
            None => TouchNeed::NotFound,
        }
    }

    /// Removes what is due and grants what that sets free, at most `EXPIRE_BATCH_MAX` records. All
    /// that is removed before the first grant has one revision.
    pub(super) fn sweep(&mut self, changes: &mut Vec<Change>) -> Reply {
        let mut step = Step::new(changes);
        while step.has_left() && self.sweep_one(&mut step) {}
        let outcome = Outcome::Written { version: self.revision, deadline: None };
        Reply { revision: self.revision, outcome }
    }

    /// Sweeps what is first. Returns whether there was anything.
    fn sweep_one(&mut self, step: &mut Step<'_>) -> bool {
        if let Some((namespace, backlog)) = self.records.first_backlog() {
            self.work_off(namespace, backlog, step);
            return true;
        }
        let steady = self.records.first_steady();
        let time = || self.records.first_deadline();
        let due = steady.filter(|(deadline, _)| *deadline <= self.clock.steady);
        let due = due.or_else(|| time().filter(|(deadline, _)| *deadline <= self.clock.time));
        let Some((_, key)) = due else { return false };
        match key {
            // These count themselves, as they lead to more.
            RecordKey::Lease(key) => self.expire_lease(&key, step),
            RecordKey::Claim(key) => assert!(self.end_met(&key, step), "what is due is over"),
            RecordKey::Ring(_) | RecordKey::Member(_) => unreachable!("they have no deadlines"),
            RecordKey::Session(key) => {
                step.take();
                self.raise(step);
                self.expire_session(&key, step.changes);
            }
            RecordKey::Tombstone(key) => {
                step.take();
                self.raise(step);
                self.put_tombstone(&key, None, Cause::Forgotten, step.changes);
            }
            RecordKey::LeaseTombstone(key) => {
                step.take();
                self.raise(step);
                self.put_lease_tombstone(&key, None, Cause::Forgotten, step.changes);
            }
        }
        true
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
