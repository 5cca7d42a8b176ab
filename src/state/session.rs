//! The session record, and the rule by which its deadline slides.
//!
//! There may be millions of them, so they are small: a head with what changes or is compared often,
//! and one run of bytes for the rest (the facts of its creation, timeouts, principal, remembered
//! requests, attributes). Accessors take that apart again, which costs tens of nanoseconds; a
//! session with one attribute of 256 bytes costs some 400 bytes, and its entries in the table and
//! the indexes 50 to 80 more, by how full the trees' nodes are. Records never change: a change
//! makes a new one and shares the old with whoever still holds it, a reader or a checkpoint.
//!
//! # How a deadline slides
//!
//! If each access wrote a log entry, reads would cost as much as writes. So every stored deadline
//! has slack: with g the granularity (an eighth of the idle timeout, at most a minute), an access
//! at t stores t + idle + 2g, and further accesses store nothing while at least idle + g is left.
//! One that comes later than that is proposed (`TouchNeed::Propose`) but need not be waited for, as
//! the session has its whole idle timeout before it anyway; only where less than idle is left must
//! the answer wait until it is stored (`TouchNeed::Wait`). So no session ends earlier than idle
//! after any access that was answered, and one that is abandoned ends at most 2g late. The price is
//! that `last_access_time` is up to g behind.

use std::fmt;
use std::num::NonZeroU64;
use std::time::Duration;

use super::attributes::{Attributes, Totals, merge};
use super::command::{Attribute, Revision, SessionKey};
use super::digest;
use super::packing::{Reader, put_bytes, put_varint};
use super::retry::Requests;
use super::time::{Timeout, Timestamp, millis};

/// The coarsest granularity of stored accesses.
pub const TOUCH_GRANULARITY_MAX: Duration = Duration::from_secs(60);

/// How far apart the accesses are that get stored, for a session of this idle timeout.
pub fn touch_granularity(idle_timeout: Timeout) -> Duration {
    match idle_timeout {
        Timeout::Never => TOUCH_GRANULARITY_MAX,
        // Whole milliseconds, as in all times of the state.
        Timeout::After(length) => {
            Duration::from_millis(millis(length) / 8).min(TOUCH_GRANULARITY_MAX)
        }
    }
}

/// A session as stored.
///
/// - `version` is the revision of the last change to attributes, principal or idle timeout.
/// - `deadline` is at most `create_time` + absolute timeout and, unless that caps it, at least
///   `last_access_time` + idle timeout.
/// - `body` is canonical: sessions with the same content have the same bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Session {
    /// Of key and content; the session's share in the digest of the state.
    hash: u64,
    version: Revision,
    /// `None` for never.
    deadline: Option<NonZeroU64>,
    /// `Times`, the rest of `Facts`, attributes.
    body: Box<[u8]>,
}

/// What a session's body begins with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) create_time: Timestamp,
    pub(super) created_revision: Revision,
    pub(super) last_access_time: Timestamp,
    pub(super) idle_timeout: Timeout,
    pub(super) absolute_timeout: Timeout,
}

/// What a session's body holds before the attributes.
#[derive(Clone)]
pub(super) struct Facts<'a> {
    pub(super) times: Times,
    pub(super) principal: Option<&'a str>,
    pub(super) requests: Requests,
}

impl Session {
    /// Makes a session, of a body that `Facts` packed.
    pub(super) fn new(
        key: &SessionKey,
        version: Revision,
        deadline: Option<Timestamp>,
        body: Box<[u8]>,
    ) -> Self {
        let deadline = deadline.map(|deadline| {
            NonZeroU64::new(deadline.0).expect("a deadline is at least a millisecond after zero")
        });
        let fields = [version.0, deadline.map_or(0, NonZeroU64::get)];
        let hash = digest::of_record(digest::SESSION, key, &fields, &body);
        Self { hash, version, deadline, body }
    }

    /// The same session after an access at `clock`; `None` if what is stored may stand for it.
    pub(super) fn touched(&self, key: &SessionKey, clock: Timestamp) -> Option<Self> {
        let deadline = self.touch_deadline(clock)?;
        let (mut times, rest) = Times::unpack(&self.body);
        times.last_access_time = times.last_access_time.max(clock);
        let mut body = Vec::with_capacity(self.body.len() + 16);
        times.pack(&mut body);
        body.extend_from_slice(rest.rest());
        Some(Self::new(key, self.version, deadline, body.into_boxed_slice()))
    }

    /// The deadline to store for an access at `clock`; `None` if what is stored may stand for it.
    fn touch_deadline(&self, clock: Timestamp) -> Option<Option<Timestamp>> {
        let times = self.times();
        let deadline = times.sliding().slid(self.deadline(), clock);
        let granularity = touch_granularity(times.idle_timeout);
        let is_recent = clock.since(times.last_access_time) <= granularity;
        if deadline == self.deadline() && is_recent { None } else { Some(deadline) }
    }

    /// The user it belongs to.
    pub fn principal(&self) -> Option<&str> {
        let (_, mut rest) = Times::unpack(&self.body);
        unpack_principal(&mut rest)
    }

    /// Its attributes, ordered by name.
    pub fn attributes(&self) -> Attributes<'_> {
        self.split().1
    }

    /// The value of the attribute called `name`.
    pub fn attribute(&self, name: &str) -> Option<&[u8]> {
        self.attributes().find(name)
    }

    /// Sum of the lengths of attribute names and values.
    pub fn size_bytes(&self) -> u64 {
        self.attributes().map(|(name, value)| (name.len() + value.len()) as u64).sum()
    }

    /// Revision of the last change to its data; accesses do not count.
    pub fn version(&self) -> Revision {
        self.version
    }

    /// Revision of its creation.
    pub fn created_revision(&self) -> Revision {
        self.times().created_revision
    }

    /// When it was created.
    pub fn create_time(&self) -> Timestamp {
        self.times().create_time
    }

    /// The last access that was stored; up to the touch granularity behind.
    pub fn last_access_time(&self) -> Timestamp {
        self.times().last_access_time
    }

    /// How long it lives without an access.
    pub fn idle_timeout(&self) -> Timeout {
        self.times().idle_timeout
    }

    /// How long it lives at most.
    pub fn absolute_timeout(&self) -> Timeout {
        self.times().absolute_timeout
    }

    /// When it is gone unless it is accessed before; `None` for never.
    pub fn deadline(&self) -> Option<Timestamp> {
        self.deadline.map(|deadline| Timestamp(deadline.get()))
    }

    /// Whether its deadline has passed.
    pub fn is_due(&self, clock: Timestamp) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= clock)
    }

    pub(super) fn requests(&self) -> Requests {
        self.split().0.requests
    }

    /// Takes the body apart.
    pub(super) fn split(&self) -> (Facts<'_>, Attributes<'_>) {
        let (times, mut rest) = Times::unpack(&self.body);
        let principal = unpack_principal(&mut rest);
        let requests = Requests::unpack(&mut rest);
        (Facts { times, principal, requests }, Attributes::new(rest))
    }

    pub(super) fn times(&self) -> Times {
        Times::unpack(&self.body).0
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    /// Everything but version and deadline, packed.
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }
}

/// Without the values of attributes, which are the users'.
impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (facts, attributes) = self.split();
        f.debug_struct("Session")
            .field("principal", &facts.principal)
            .field("version", &self.version)
            .field("deadline", &self.deadline())
            .field("times", &facts.times)
            .field("requests", &facts.requests.recent())
            .field("attributes", &attributes)
            .finish_non_exhaustive()
    }
}

impl Times {
    pub(super) fn sliding(&self) -> Sliding {
        let cap = self.absolute_timeout.deadline(self.create_time);
        Sliding { idle_timeout: self.idle_timeout, cap }
    }

    fn pack(&self, out: &mut Vec<u8>) {
        put_varint(out, self.create_time.0);
        put_varint(out, self.created_revision.0);
        // Never before the creation, and mostly little behind it; wrapping, so that nothing is lost
        // of one that was stored otherwise.
        put_varint(out, self.last_access_time.0.wrapping_sub(self.create_time.0));
        put_varint(out, packed_timeout(self.idle_timeout));
        put_varint(out, packed_timeout(self.absolute_timeout));
    }

    fn unpack(body: &[u8]) -> (Self, Reader<'_>) {
        let mut packed = Reader::new(body);
        let create_time = Timestamp(packed.varint());
        let times = Self {
            create_time,
            created_revision: Revision(packed.varint()),
            last_access_time: Timestamp(create_time.0.wrapping_add(packed.varint())),
            idle_timeout: unpacked_timeout(packed.varint()),
            absolute_timeout: unpacked_timeout(packed.varint()),
        };
        (times, packed)
    }
}

impl Facts<'_> {
    /// Packs these facts and, behind them, the attributes `old` with `set` set and `remove`
    /// removed. Uses `scratch` to do so.
    pub(super) fn pack(
        &self,
        old: Attributes<'_>,
        set: &[Attribute],
        remove: &[String],
        scratch: &mut Vec<u8>,
    ) -> (Box<[u8]>, Totals) {
        scratch.clear();
        self.times.pack(scratch);
        put_bytes(scratch, self.principal.unwrap_or_default().as_bytes());
        self.requests.pack(scratch);
        let totals = merge(old, set, remove, scratch);
        (Box::from(scratch.as_slice()), totals)
    }
}

fn unpack_principal<'a>(packed: &mut Reader<'a>) -> Option<&'a str> {
    Some(packed.str()).filter(|principal| !principal.is_empty())
}

/// Milliseconds, at least one; zero for never.
pub(super) fn packed_timeout(timeout: Timeout) -> u64 {
    match timeout {
        Timeout::Never => 0,
        Timeout::After(length) => millis(length).max(1),
    }
}

pub(super) fn unpacked_timeout(packed: u64) -> Timeout {
    match packed {
        0 => Timeout::Never,
        length => Timeout::After(Duration::from_millis(length)),
    }
}

/// How a session's deadline moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sliding {
    pub(super) idle_timeout: Timeout,
    /// Where the absolute timeout ends; `None` for never.
    pub(super) cap: Option<Timestamp>,
}

impl Sliding {
    /// The deadline to store for an access at `clock`, whatever is stored.
    pub(super) fn renewed(&self, clock: Timestamp) -> Option<Timestamp> {
        let granularity = touch_granularity(self.idle_timeout);
        let idle = self.idle_timeout.deadline(clock.plus(2 * granularity));
        match (idle, self.cap) {
            (Some(idle), Some(cap)) => Some(idle.min(cap)),
            (idle, cap) => idle.or(cap),
        }
    }

    /// The deadline to store for an access at `clock`, where `stored` is.
    pub(super) fn slid(&self, stored: Option<Timestamp>, clock: Timestamp) -> Option<Timestamp> {
        let granularity = touch_granularity(self.idle_timeout);
        if self.leaves_less_than(granularity, stored, clock) { self.renewed(clock) } else { stored }
    }

    /// Whether from `clock` on `stored` leaves less than the idle timeout and `slack`, and it could
    /// be more.
    fn leaves_less_than(
        &self,
        slack: Duration,
        stored: Option<Timestamp>,
        clock: Timestamp,
    ) -> bool {
        let wanted = self.idle_timeout.deadline(clock.plus(slack));
        // At the cap, or without an idle timeout, nothing can slide.
        stored != self.cap && stored < wanted
    }
}

/// What has to be done about an access, judged by what is stored. With a session comes its version,
/// and when it expires (`None` for never).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields of all variants are explained above")]
pub enum TouchNeed {
    /// There is no such session, or it has expired.
    NotFound,
    /// Nothing: a stored access is recent enough to stand for this one.
    None { version: Revision, deadline: Option<Timestamp> },
    /// A Touch is to be proposed; the session lives long enough that nobody needs to wait for it.
    Propose { version: Revision, deadline: Option<Timestamp> },
    /// A Touch is to be proposed, and its outcome to be waited for.
    Wait { version: Revision, deadline: Option<Timestamp> },
}

impl TouchNeed {
    /// Judges an access at `now` to a session that, as far as the state knows, has not expired.
    pub(super) fn of(session: &Session, now: Timestamp) -> Self {
        let (version, deadline) = (session.version(), session.deadline());
        // Where cluster time has come to the deadline and the state has not heard of it yet, the
        // Touch must find out which of them is first in the log.
        let is_short = session.times().sliding().leaves_less_than(Duration::ZERO, deadline, now);
        if session.is_due(now) || is_short {
            Self::Wait { version, deadline }
        } else if session.touch_deadline(now).is_some() {
            Self::Propose { version, deadline }
        } else {
            Self::None { version, deadline }
        }
    }
}
