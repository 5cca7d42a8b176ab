//! Acquires that were cancelled before they came.
//!
//! A Cancel may overtake the Acquire that it is about, or be about one that got lost; it cannot
//! tell. So the lease keeps the Acquire's request id until no Acquire that was sent before the
//! Cancel can still come, and refuses it if it does.
//!
//! These are kept apart from the requests that a lease remembers, and there are more of them. What
//! is pushed out of here puts every Acquire of its time in doubt, first sendings too, and whoever
//! is told so cancels and tries again. If a few requests on a busy lease could push them out, one
//! Cancel would lead to the next.

use super::command::Rejection;
use super::command::Request;
use super::packing::{Reader, put_varint};
use super::time::Timestamp;
use crate::limits::{REQUEST_LIFETIME_MAX, VOIDS_PER_LEASE_MAX};

/// An Acquire that is not to be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Void {
    /// Its request id.
    pub(super) id: u64,
    /// It was sent at or before this time,
    pub(super) sent: Timestamp,
    /// and cannot come after this one.
    pub(super) expires: Timestamp,
}

/// The Acquires that a lease refuses.
///
/// - At most `VOIDS_PER_LEASE_MAX`, in the order in which they were cancelled.
/// - An Acquire that was cancelled before it came, and can still come, is among them or was sent at
///   or before `forgotten`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Voids {
    list: Vec<Void>,
    /// Zero if nothing was forgotten before its time.
    forgotten: Timestamp,
}

impl Voids {
    pub(super) fn list(&self) -> &[Void] {
        &self.list
    }

    pub(super) fn forgotten(&self) -> Timestamp {
        self.forgotten
    }

    /// Makes what was stored; `None` if it is more than can be kept.
    pub(super) fn restore(list: Vec<Void>, forgotten: Timestamp) -> Option<Self> {
        (list.len() <= VOIDS_PER_LEASE_MAX).then_some(Self { list, forgotten })
    }

    pub(super) fn contains(&self, id: u64) -> bool {
        self.list.iter().any(|void| void.id == id)
    }

    /// Keeps out an Acquire of that id, as the Cancel `cancel` wants that is applied at `clock`.
    pub(super) fn add(&mut self, id: u64, cancel: &Request, clock: Timestamp) {
        self.list.retain(|void| void.expires >= clock);
        if self.list.len() == VOIDS_PER_LEASE_MAX {
            let oldest = self.list.remove(0);
            self.forgotten = self.forgotten.max(oldest.sent);
        }
        // Those who stamp the two may disagree by a little about the time.
        let sent = cancel.first_sent.max(clock);
        self.list.push(Void { id, sent, expires: sent.plus(REQUEST_LIFETIME_MAX) });
    }

    /// Refuses an Acquire that was cancelled, or may have been.
    pub(super) fn check(&self, request: &Request) -> Result<(), Rejection> {
        if self.contains(request.id) {
            return Err(Rejection::AcquireEnded);
        }
        if self.forgotten > Timestamp(0) && request.first_sent <= self.forgotten {
            return Err(Rejection::OutcomeUnknown);
        }
        Ok(())
    }

    pub(super) fn pack(&self, out: &mut Vec<u8>) {
        put_varint(out, self.forgotten.0);
        put_varint(out, self.list.len() as u64);
        for void in &self.list {
            out.extend_from_slice(&void.id.to_le_bytes());
            put_varint(out, void.sent.0);
            put_varint(out, void.expires.0);
        }
    }

    pub(super) fn unpack(packed: &mut Reader<'_>) -> Self {
        let forgotten = Timestamp(packed.varint());
        let length = packed.varint() as usize;
        let void = |_| Void {
            id: u64::from_le_bytes(packed.fixed()),
            sent: Timestamp(packed.varint()),
            expires: Timestamp(packed.varint()),
        };
        Self { list: (0..length).map(void).collect(), forgotten }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pushed_out_leaves_its_mark() {
        let request = |id, sent| Request {
            id,
            first_sent: Timestamp(sent),
            expires: Timestamp(sent + 60_000),
        };
        let mut voids = Voids::default();
        let count = VOIDS_PER_LEASE_MAX as u64;
        for id in 0..count {
            voids.add(id, &request(10_000 + id, 500 + id), Timestamp(600));
        }
        assert_eq!(voids.check(&request(0, 100)), Err(Rejection::AcquireEnded));
        assert_eq!(voids.check(&request(count, 100)), Ok(()));
        voids.add(count, &request(20_000, 800), Timestamp(800));
        assert_eq!(voids.list().len(), VOIDS_PER_LEASE_MAX);
        assert_eq!(voids.check(&request(0, 100)), Err(Rejection::OutcomeUnknown));
        // The mark is the time of the Cancel, or when it was applied if that is later.
        assert_eq!(voids.check(&request(0, 600)), Err(Rejection::OutcomeUnknown));
        assert_eq!(voids.check(&request(0, 601)), Ok(()));
        // Those that can no longer come go without a mark.
        voids.add(count + 1, &request(20_001, 70_000), Timestamp(70_000));
        assert_eq!((voids.list().len(), voids.forgotten()), (1, Timestamp(600)));

        let mut packed = Vec::new();
        voids.pack(&mut packed);
        assert_eq!(Voids::unpack(&mut Reader::new(&packed)), voids);
    }
}
