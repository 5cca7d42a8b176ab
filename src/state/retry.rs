//! Requests that a record remembers, so that a retry is safe.
//!
//! A client whose reply was lost sends its request again, perhaps to another node, perhaps after
//! another leader took over. Whether the first sending was applied is known to the record that it
//! would have changed, and only there: a session keeps the last few requests that changed it, each
//! with the revision of the change, and its tombstone inherits them. There is no table beside the
//! records that could grow, or be forgotten in a snapshot.
//!
//! A request says when it was first sent and when it expires, at most a minute later. One that has
//! expired is refused, so it need not be remembered any longer. If more requests change a record
//! within their lifetime than it can remember, the oldest is forgotten and the `forgotten` mark
//! rises to the time at which it was first sent. A resend that is not remembered was then either
//! never applied, or forgotten; where its own time is at or before the mark we cannot tell, and say
//! so.
//!
//! A first sending needs no such doubt, or nobody could write to a session that others write to
//! many times a second. Unless it was overtaken: its resend, by another way, may have been applied
//! before it and be forgotten when it arrives. So there is a second mark, which rises only when a
//! request is forgotten that was applied as a resend, and binds first sendings too. Resends are
//! rare, and a request has one first sending.
//!
//! Only what was applied is remembered. A request that was refused may be refused again or, when
//! the state has moved on, be applied by its resend: once, in any case.

use super::State;
use super::command::{Rejection, Request, Revision};
use super::level::{RESENDS_ARE_DOUBTED, SKEW_IS_BOUNDED};
use super::packing::{Reader, put_varint};
use super::time::Timestamp;
use crate::limits::{REMEMBERED_REQUESTS_MAX, REQUEST_LIFETIME_MAX, REQUEST_SKEW_MAX};

impl State {
    /// Refuses a request whose time is over, which would have to be remembered for longer than
    /// anything is, or whose sender's clock is ahead: applied and forgotten, such a one would put
    /// everything in doubt that is sent until the clock has come as far.
    pub(super) fn check_request(&self, request: &Request) -> Result<(), Rejection> {
        let Request { first_sent, expires, .. } = *request;
        let clock = self.clock.time;
        let bounded = self.knows(SKEW_IS_BOUNDED);
        // What comes from a clock that is ahead must not outlive the tombstone of what it made, so
        // the room for clocks is taken from the end of the longest lifetime, whoever asks for it.
        let applied_for = REQUEST_LIFETIME_MAX.saturating_sub(REQUEST_SKEW_MAX);
        let last = if bounded { expires.min(first_sent.plus(applied_for)) } else { expires };
        if clock > last || first_sent > expires {
            return Err(Rejection::RequestExpired);
        }
        if bounded && first_sent > clock.plus(REQUEST_SKEW_MAX) {
            return Err(Rejection::ClockAhead);
        }
        let dated = if bounded { first_sent } else { clock.min(first_sent) };
        if expires > dated.plus(REQUEST_LIFETIME_MAX) {
            return Err(Rejection::RequestLifetimeTooLong);
        }
        Ok(())
    }

    /// The answer to a command on `lock`, or on a member of a ring, that found nothing under what
    /// it names, and which nobody would remember: refused, or in doubt where an earlier sending may
    /// have been what removed it.
    pub(super) fn not_found_by(&self, resend: bool, refusal: Rejection) -> Rejection {
        let doubted = resend && self.knows(RESENDS_ARE_DOUBTED);
        if doubted { Rejection::OutcomeUnknown } else { refusal }
    }
}

/// A request that changed a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Remembered {
    pub(super) id: u64,
    pub(super) first_sent: Timestamp,
    pub(super) expires: Timestamp,
    /// The revision of the change.
    pub(super) revision: Revision,
    /// Whether it was applied as a resend, so that its first sending may still come.
    pub(super) resend: bool,
}

/// What a record remembers.
///
/// - At most `REMEMBERED_REQUESTS_MAX`, in the order in which they were applied.
/// - A request that was applied to the record and can still come is among them, or was first sent
///   at or before `forgotten`; if it was applied as a resend, at or before `forgotten_resend`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Requests {
    recent: [Remembered; REMEMBERED_REQUESTS_MAX],
    length: usize,
    /// Zero if nothing was forgotten before its time.
    forgotten: Timestamp,
    forgotten_resend: Timestamp,
}

impl Requests {
    pub(super) fn recent(&self) -> &[Remembered] {
        &self.recent[..self.length]
    }

    pub(super) fn forgotten(&self) -> Timestamp {
        self.forgotten
    }

    pub(super) fn forgotten_resend(&self) -> Timestamp {
        self.forgotten_resend
    }

    /// Makes what was stored; `None` if it is nothing that can be remembered.
    pub(super) fn restore(
        recent: impl Iterator<Item = Remembered>,
        forgotten: Timestamp,
        forgotten_resend: Timestamp,
    ) -> Option<Self> {
        let mut requests = Self { forgotten, forgotten_resend, ..Self::default() };
        for remembered in recent {
            let lifetime = remembered.expires.0.checked_sub(remembered.first_sent.0)?;
            if lifetime > u64::MAX / 2 {
                return None;
            }
            *requests.recent.get_mut(requests.length)? = remembered;
            requests.length += 1;
        }
        Some(requests)
    }

    /// Judges a request by what is remembered: `Some` with the revision of its change if it was
    /// applied, `None` if it was not.
    ///
    /// Errors: `OutcomeUnknown` for one that may have been applied and forgotten.
    pub(super) fn judge(
        &self,
        request: &Request,
        resend: bool,
    ) -> Result<Option<Revision>, Rejection> {
        let same = |remembered: &&Remembered| remembered.id == request.id;
        if let Some(remembered) = self.recent().iter().find(same) {
            return Ok(Some(remembered.revision));
        }
        let mark = if resend { self.forgotten } else { self.forgotten_resend };
        if mark > Timestamp(0) && request.first_sent <= mark {
            return Err(Rejection::OutcomeUnknown);
        }
        Ok(None)
    }

    /// Remembers a request that was applied at `revision`.
    pub(super) fn remember(
        &mut self,
        request: &Request,
        resend: bool,
        revision: Revision,
        clock: Timestamp,
    ) {
        self.drop_expired(clock);
        if self.length == REMEMBERED_REQUESTS_MAX {
            // A mark of zero means that there is none.
            let first_sent = self.recent[0].first_sent.max(Timestamp(1));
            self.forgotten = self.forgotten.max(first_sent);
            if self.recent[0].resend {
                self.forgotten_resend = self.forgotten_resend.max(first_sent);
            }
            self.recent.rotate_left(1);
            self.length -= 1;
        }
        let Request { id, first_sent, expires } = *request;
        self.recent[self.length] = Remembered { id, first_sent, expires, revision, resend };
        self.length += 1;
    }

    /// Drops those that can no longer come.
    pub(super) fn drop_expired(&mut self, clock: Timestamp) {
        let mut kept = 0;
        for index in 0..self.length {
            if self.recent[index].expires >= clock {
                self.recent[kept] = self.recent[index];
                kept += 1;
            }
        }
        self.recent[kept..self.length].fill(Remembered::default());
        self.length = kept;
    }

    pub(super) fn pack(&self, out: &mut Vec<u8>) {
        put_varint(out, self.length as u64);
        put_varint(out, self.forgotten.0);
        put_varint(out, self.forgotten_resend.0);
        for remembered in self.recent() {
            out.extend_from_slice(&remembered.id.to_le_bytes());
            put_varint(out, remembered.first_sent.0);
            let lifetime = remembered.expires.0 - remembered.first_sent.0;
            put_varint(out, 2 * lifetime + u64::from(remembered.resend));
            put_varint(out, remembered.revision.0);
        }
    }

    pub(super) fn unpack(packed: &mut Reader<'_>) -> Self {
        let length = packed.varint() as usize;
        let forgotten = Timestamp(packed.varint());
        let forgotten_resend = Timestamp(packed.varint());
        let mut requests = Self { length, forgotten, forgotten_resend, ..Self::default() };
        for remembered in &mut requests.recent[..length] {
            remembered.id = u64::from_le_bytes(packed.fixed());
            remembered.first_sent = Timestamp(packed.varint());
            let lifetime = packed.varint();
            remembered.expires = Timestamp(remembered.first_sent.0 + lifetime / 2);
            remembered.resend = lifetime % 2 == 1;
            remembered.revision = Revision(packed.varint());
        }
        requests
    }
}
