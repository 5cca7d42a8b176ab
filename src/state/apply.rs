//! What commands do to sessions.
//!
//! Each of them goes through the same gates, in this order: is the command well formed; is the
//! request still in its time; has what is there expired (then that is an event of its own, and
//! comes first); was the request applied before; and only then, can it be done. A request that is
//! remembered is answered with what it did, whatever has happened to the session since, even if it
//! is gone. A fence comes before the other conditions: whoever has lost the lock is to learn that
//! first. Everything is judged before anything is changed.

use std::sync::Arc;

use super::State;
use super::attributes::{Attributes, Totals, is_well_formed};
use super::command::{
    Cause, Change, Command, Outcome, Rejection, Reply, Request, Revision, SessionKey,
};
use super::packing::Reader;
use super::retry::Requests;
use super::session::{Facts, Session, Times};
use super::time::Timestamp;
use super::tombstone::Tombstone;
use crate::limits::{SESSION_ATTRIBUTES_MAX, SESSION_BYTES_MAX};

pub(super) type Answer = Result<Reply, Rejection>;

impl State {
    pub(super) fn create_session(
        &mut self,
        command: &Command,
        resend: bool,
        changes: &mut Vec<Change>,
    ) -> Answer {
        let Command::CreateSession {
            request,
            key,
            principal,
            attributes,
            idle_timeout,
            absolute_timeout,
        } = command
        else {
            unreachable!("dispatched by its kind");
        };
        if !is_well_formed(attributes, &[]) {
            return Err(Rejection::MalformedCommand);
        }
        self.admit(request, key, changes)?;
        if let Some(session) = self.records.session(key) {
            let replay = replay(&session.requests(), request, resend, session.deadline())?;
            return replay.ok_or(Rejection::SessionExists);
        }
        if let Some(tombstone) = self.records.tombstone(key) {
            let replay = replay(&tombstone.requests(), request, resend, None)?;
            return replay.ok_or(Rejection::SessionIdRetired);
        }

        let clock = self.clock.time;
        let revision = self.next_revision();
        let mut requests = Requests::default();
        requests.remember(request, resend, revision, clock);
        let times = Times {
            create_time: clock,
            created_revision: revision,
            last_access_time: clock,
            idle_timeout: idle_timeout.unwrap_or(self.policy.idle_timeout),
            absolute_timeout: absolute_timeout.unwrap_or(self.policy.absolute_timeout),
        };
        let facts = Facts { times, principal: principal.as_deref(), requests };
        let nothing = Attributes::new(Reader::new(&[]));
        let (body, totals) = facts.pack(nothing, attributes, &[], &mut self.scratch);
        check_totals(totals)?;
        let deadline = times.sliding().renewed(clock);
        let session = Session::new(key, revision, deadline, body);
        self.revision = revision;
        self.put_session(key, Some(session), Cause::Created, changes);
        Ok(written(revision, deadline))
    }

    pub(super) fn update_session(
        &mut self,
        command: &Command,
        resend: bool,
        changes: &mut Vec<Change>,
    ) -> Answer {
        let Command::UpdateSession {
            request,
            key,
            set,
            remove,
            expected_version,
            principal,
            idle_timeout,
            fence,
        } = command
        else {
            unreachable!("dispatched by its kind");
        };
        if !is_well_formed(set, remove) {
            return Err(Rejection::MalformedCommand);
        }
        self.admit(request, key, changes)?;
        let Some(session) = self.records.session(key) else {
            return self.replay_ended(request, key, resend);
        };
        let (mut facts, attributes) = session.split();
        if let Some(reply) = replay(&facts.requests, request, resend, session.deadline())? {
            return Ok(reply);
        }
        self.check_fence(&key.namespace, fence.as_ref())?;
        check_version(session, *expected_version)?;

        let clock = self.clock.time;
        let revision = self.next_revision();
        let before = facts.times.sliding();
        facts.requests.remember(request, resend, revision, clock);
        facts.times.last_access_time = clock;
        facts.times.idle_timeout = idle_timeout.unwrap_or(facts.times.idle_timeout);
        if let Some(principal) = principal {
            facts.principal = principal.as_deref();
        }
        let (body, totals) = facts.pack(attributes, set, remove, &mut self.scratch);
        check_totals(totals)?;
        let deadline = match facts.times.sliding() {
            after if after == before => after.slid(session.deadline(), clock),
            after => after.renewed(clock),
        };
        let session = Session::new(key, revision, deadline, body);
        self.revision = revision;
        self.put_session(key, Some(session), Cause::Updated, changes);
        Ok(written(revision, deadline))
    }

    /// An access. It is idempotent, and so neither remembered nor looked up.
    pub(super) fn touch_session(
        &mut self,
        request: &Request,
        key: &SessionKey,
        changes: &mut Vec<Change>,
    ) -> Answer {
        self.admit(request, key, changes)?;
        let session = self.records.session(key).ok_or(Rejection::SessionNotFound)?;
        let version = session.version();
        let Some(touched) = session.touched(key, self.clock.time) else {
            let outcome = Outcome::Written { version, deadline: session.deadline() };
            return Ok(Reply { revision: self.revision, outcome });
        };
        let outcome = Outcome::Written { version, deadline: touched.deadline() };
        self.revision = self.next_revision();
        self.put_session(key, Some(touched), Cause::Touched, changes);
        Ok(Reply { revision: self.revision, outcome })
    }

    pub(super) fn delete_session(
        &mut self,
        command: &Command,
        resend: bool,
        changes: &mut Vec<Change>,
    ) -> Answer {
        let Command::DeleteSession { request, key, expected_version, fence } = command else {
            unreachable!("dispatched by its kind");
        };
        self.admit(request, key, changes)?;
        let Some(session) = self.records.session(key) else {
            return self.replay_ended(request, key, resend);
        };
        let mut requests = session.requests();
        if let Some(reply) = replay(&requests, request, resend, session.deadline())? {
            return Ok(reply);
        }
        self.check_fence(&key.namespace, fence.as_ref())?;
        check_version(session, *expected_version)?;
        self.revision = self.next_revision();
        requests.remember(request, resend, self.revision, self.clock.time);
        self.end_session(key, &requests, Cause::Deleted, changes);
        Ok(written(self.revision, None))
    }

    /// Puts a tombstone into a session's place, at the current revision.
    pub(super) fn end_session(
        &mut self,
        key: &SessionKey,
        requests: &Requests,
        cause: Cause,
        changes: &mut Vec<Change>,
    ) {
        let tombstone = Tombstone::new(key, self.clock.time, requests);
        self.put_session(key, None, cause, changes);
        self.put_tombstone(key, Some(tombstone), cause, changes);
    }

    /// The gates before any session is looked at: is the request in its time, and has what is there
    /// expired?
    fn admit(
        &mut self,
        request: &Request,
        key: &SessionKey,
        changes: &mut Vec<Change>,
    ) -> Result<(), Rejection> {
        self.check_request(request)?;
        self.expire_if_due(key, changes);
        Ok(())
    }

    /// The answer to a command whose session is not there.
    fn replay_ended(&self, request: &Request, key: &SessionKey, resend: bool) -> Answer {
        let Some(tombstone) = self.records.tombstone(key) else {
            return Err(Rejection::SessionNotFound);
        };
        let replay = replay(&tombstone.requests(), request, resend, None)?;
        replay.ok_or(Rejection::SessionNotFound)
    }
}

/// The answer to a request that `requests` remember, as of its change, but for the deadline.
fn replay(
    requests: &Requests,
    request: &Request,
    resend: bool,
    deadline: Option<Timestamp>,
) -> Result<Option<Reply>, Rejection> {
    let revision = requests.judge(request, resend)?;
    Ok(revision.map(|revision| written(revision, deadline)))
}

/// The answer to a change of a session's data, which gives it its version.
fn written(revision: Revision, deadline: Option<Timestamp>) -> Reply {
    Reply { revision, outcome: Outcome::Written { version: revision, deadline } }
}

fn check_version(session: &Arc<Session>, expected: Option<Revision>) -> Result<(), Rejection> {
    match expected {
        Some(expected) if expected != session.version() => {
            Err(Rejection::VersionMismatch(session.version()))
        }
        _ => Ok(()),
    }
}

fn check_totals(totals: Totals) -> Result<(), Rejection> {
    if totals.count > SESSION_ATTRIBUTES_MAX {
        return Err(Rejection::TooManyAttributes(totals.count as u64));
    }
    if totals.bytes > SESSION_BYTES_MAX {
        return Err(Rejection::SessionTooLarge(totals.bytes as u64));
    }
    Ok(())
}
