//! How sessions and requests are named.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest as _, Sha256};

use super::error::Error;
use crate::limits::{SESSION_ID_CHARS_MAX, SESSION_ID_CHARS_MIN};
use crate::proto::v1;
use crate::session_id;

/// Hex digits of a lease's id.
const LEASE_ID_CHARS: usize = 32;
/// Hex digits of a handle.
const HANDLE_CHARS: usize = 32;

/// The secret that a user's cookie holds. Whoever has it has the session, so `Debug` hides it and
/// there is no `Display`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SessionId(String);

impl SessionId {
    /// A new id: 256 bits from the operating system, in base64url without padding. It does not
    /// begin with a dash (which costs 0.02 of those bits), so that a shell command can name it.
    ///
    /// # Errors
    ///
    /// When the operating system has no randomness to give.
    pub fn mint() -> Result<Self, Error> {
        session_id::mint().map(Self).map_err(no_randomness)
    }

    /// An id that somebody else made: 16 to 128 characters of `A-Z a-z 0-9 - _ . ~ ! $ & ' * + ^ `
    /// `` ` | # % ``, with at least 128 bits of entropy if it is to be a secret.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when it is too short, too long, or has other characters.
    pub fn new(id: impl Into<String>) -> Result<Self, Error> {
        let id = id.into();
        let invalid = |message| Err(Error::invalid("id", "INVALID_SESSION_ID", message));
        if !session_id::has_valid_length(&id) {
            return invalid(format!(
                "a session id has {SESSION_ID_CHARS_MIN} to {SESSION_ID_CHARS_MAX} characters, \
                 this one {}",
                id.len()
            ));
        }
        if !session_id::has_valid_characters(&id) {
            return invalid("a session id consists of letters, digits and -_.~!$&'*+^`|#%".into());
        }
        Ok(Self(id))
    }

    /// The secret itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The handle of the session that has this id in `namespace`: the first 16 bytes of a SHA-256.
    pub fn handle(&self, namespace: &str) -> Handle {
        let mut hash = Sha256::new();
        for part in [b"quorate.session.v1\0", namespace.as_bytes(), b"\0", self.0.as_bytes()] {
            hash.update(part);
        }
        let mut handle = String::with_capacity(HANDLE_CHARS);
        for byte in &hash.finalize()[..HANDLE_CHARS / 2] {
            handle.push(char::from(b"0123456789abcdef"[usize::from(byte >> 4)]));
            handle.push(char::from(b"0123456789abcdef"[usize::from(byte & 15)]));
        }
        Handle(handle)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionId(…)")
    }
}

/// Digest of a session's id, in hex: names the session and gives nothing away.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(String);

impl Handle {
    /// A handle as printed: 32 hex digits, of which uppercase ones are made lowercase.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when it is anything else.
    pub fn new(handle: impl Into<String>) -> Result<Self, Error> {
        let mut handle = handle.into();
        if handle.len() != HANDLE_CHARS || !handle.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(Error::invalid(
                "handle",
                "INVALID_HANDLE",
                format!("a handle has {HANDLE_CHARS} hex digits"),
            ));
        }
        handle.make_ascii_lowercase();
        Ok(Self(handle))
    }

    /// What a server said; it is shown as it came.
    pub(super) fn trusted(handle: String) -> Self {
        Self(handle)
    }

    /// Its hex digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names one session, in either way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Selector {
    /// By the secret in the user's cookie.
    Id(SessionId),
    /// By its handle.
    Handle(Handle),
}

impl Selector {
    pub(super) fn into_proto(self) -> v1::SessionSelector {
        use v1::session_selector::Selector as Proto;
        let selector = match self {
            Self::Id(id) => Proto::Id(id.0),
            Self::Handle(handle) => Proto::Handle(handle.0),
        };
        v1::SessionSelector { selector: Some(selector) }
    }
}

impl From<SessionId> for Selector {
    fn from(id: SessionId) -> Self {
        Self::Id(id)
    }
}

impl From<&SessionId> for Selector {
    fn from(id: &SessionId) -> Self {
        Self::Id(id.clone())
    }
}

impl From<Handle> for Selector {
    fn from(handle: Handle) -> Self {
        Self::Handle(handle)
    }
}

impl From<&Handle> for Selector {
    fn from(handle: &Handle) -> Self {
        Self::Handle(handle.clone())
    }
}

impl From<&Selector> for Selector {
    fn from(selector: &Selector) -> Self {
        selector.clone()
    }
}

/// Names a lease: 128 random bits. Not a secret, but who knows it can renew and revoke the lease.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(u128);

impl LeaseId {
    /// A new id, from the operating system's randomness.
    ///
    /// # Errors
    ///
    /// When the operating system has none to give.
    pub fn mint() -> Result<Self, Error> {
        let mut bytes = [0; 16];
        fill_random(&mut bytes)?;
        Ok(Self(u128::from_be_bytes(bytes)))
    }

    /// An id as printed: 32 hex digits.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when it is anything else.
    pub fn new(id: &str) -> Result<Self, Error> {
        let digits = id.len() == LEASE_ID_CHARS && id.bytes().all(|c| c.is_ascii_hexdigit());
        let number = digits.then(|| u128::from_str_radix(id, 16).ok()).flatten();
        number.map(Self).ok_or_else(|| {
            Error::invalid(
                "lease_id",
                "INVALID_LEASE_ID",
                format!("a lease's id has {LEASE_ID_CHARS} hex digits"),
            )
        })
    }

    pub(super) fn number(self) -> u128 {
        self.0
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LeaseId({self})")
    }
}

/// Source of request ids: a random start, then a bijection of a counter. So the ids of one client
/// never collide before 2^64 of them, those of two clients no likelier than random ones, and none
/// costs a system call. They are names, not secrets.
#[derive(Debug)]
pub(super) struct RequestIds(AtomicU64);

impl RequestIds {
    pub(super) fn new() -> Result<Self, Error> {
        let mut start = [0; 8];
        fill_random(&mut start)?;
        Ok(Self(AtomicU64::new(u64::from_ne_bytes(start))))
    }

    /// A number that this client has not used yet; never 0.
    pub(super) fn mint(&self) -> u64 {
        loop {
            let id = mix(self.0.fetch_add(1, Ordering::Relaxed));
            if id != 0 {
                return id;
            }
        }
    }
}

/// The finalizer of SplitMix64, which is a bijection.
pub(super) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fill_random(bytes: &mut [u8]) -> Result<(), Error> {
    getrandom::fill(bytes).map_err(no_randomness)
}

fn no_randomness(error: getrandom::Error) -> Error {
    Error::internal(format!("the operating system gives no randomness: {error}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn minted_ids_are_valid_distinct_and_hidden() {
        let first = SessionId::mint().unwrap();
        let second = SessionId::mint().unwrap();
        assert_ne!(first, second);
        assert_eq!(first.reveal().len(), 43);
        assert_eq!(SessionId::new(first.reveal()).unwrap(), first);
        let shown = format!("{first:?} {:?}", Selector::from(&first));
        assert!(!shown.contains(first.reveal()), "{shown}");
    }

    #[test]
    fn ids_and_handles_are_validated() {
        assert!(SessionId::new("a".repeat(15)).is_err());
        assert!(SessionId::new("a".repeat(16)).is_ok());
        assert!(SessionId::new("a".repeat(128)).is_ok());
        assert!(SessionId::new("a".repeat(129)).is_err());
        assert!(SessionId::new("-_.~!$&'*+^`|#%0aZ").is_ok());
        for bad in [" ", "/", "\"", "=", ";", "ä", "\n"] {
            assert!(SessionId::new(format!("0123456789abcdef{bad}")).is_err(), "{bad:?}");
        }
        assert!(Handle::new("0".repeat(31)).is_err());
        assert!(Handle::new("g".repeat(32)).is_err());
        assert_eq!(Handle::new("AB".repeat(16)).unwrap().as_str(), "ab".repeat(16));
    }

    #[test]
    fn a_handle_is_the_digest_that_the_server_stores() {
        let id = SessionId::new("0123456789abcdef").unwrap();
        // printf 'quorate.session.v1\0default\0000123456789abcdef' | sha256sum | cut -c1-32
        assert_eq!(id.handle("default").as_str(), "c2ec290e085c714b47d7b7c7af9c70e8");
        assert_ne!(id.handle("default"), id.handle("other"));
    }

    #[test]
    fn a_lease_id_is_printed_as_it_is_read() {
        let id = LeaseId::new("00112233445566778899aAbBcCdDeEfF").unwrap();
        assert_eq!(id.to_string(), "00112233445566778899aabbccddeeff");
        assert_ne!(LeaseId::mint().unwrap(), LeaseId::mint().unwrap());
        for bad in ["", "+0112233445566778899aabbccddeeff", "0112233445566778899aabbccddeeff"] {
            assert!(LeaseId::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn request_ids_are_distinct_and_never_zero() {
        // Starts where the counter wraps through the one value that maps to 0.
        let ids = RequestIds(AtomicU64::new(u64::MAX - 500));
        let minted: BTreeSet<u64> = (0..1_000).map(|_| ids.mint()).collect();
        assert_eq!(minted.len(), 1_000);
        assert!(!minted.contains(&0));
    }
}
