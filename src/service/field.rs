//! What the fields of requests may hold, as far as several use cases have them.

use super::error::Error;
use crate::limits::{NAME_BYTES_MAX, NAMESPACE_BYTES_MAX, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX};
use crate::state::{LeaseId, LockKey, Namespace};

/// 16 bytes as 32 lowercase hex characters.
pub(super) fn parse_hex(hex: &str) -> Option<[u8; 16]> {
    if hex.len() != 32 || hex.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return None;
    }
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high << 4 | low).ok()?;
    }
    Some(bytes)
}

/// A namespace; empty for `default`.
pub(super) fn valid_namespace(namespace: String) -> Result<Namespace, Error> {
    if namespace.is_empty() {
        return Ok(Namespace("default".into()));
    }
    let allowed = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-')
    };
    if namespace.len() > NAMESPACE_BYTES_MAX || !namespace.bytes().all(allowed) {
        return Err(Error::invalid(
            "namespace",
            "INVALID_NAMESPACE",
            "a namespace has 1 to 63 characters of a-z 0-9 . _ -",
        ));
    }
    Ok(Namespace(namespace.into()))
}

/// The name of anything but a namespace.
pub(super) fn valid_name(field: &'static str, name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(Error::invalid(field, "INVALID_NAME", format!("{field}: a name is empty")));
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(Error::over_limit(
            field,
            "bytes in a name",
            name.len() as u64,
            NAME_BYTES_MAX as u64,
        ));
    }
    Ok(())
}

/// A label for people; it may be empty.
pub(super) fn valid_label(field: &'static str, label: &str) -> Result<(), Error> {
    if label.is_empty() { Ok(()) } else { valid_name(field, label) }
}

/// The name of a lock.
pub(super) fn lock_key(namespace: String, lock: String) -> Result<LockKey, Error> {
    let namespace = valid_namespace(namespace)?;
    valid_name("lock", &lock)?;
    Ok(LockKey { namespace, name: lock.into() })
}

/// The id of a lease.
pub(super) fn lease_id(field: &'static str, id: &str) -> Result<LeaseId, Error> {
    parse_hex(id).map(LeaseId).ok_or_else(|| {
        Error::invalid(
            field,
            "INVALID_LEASE_ID",
            format!("{field}: a lease id is 16 random bytes as 32 lowercase hex characters"),
        )
    })
}

/// How many of a list to answer at once; 0 for the default.
pub(super) fn page_size(size: u32) -> Result<usize, Error> {
    match size as usize {
        0 => Ok(PAGE_SIZE_DEFAULT),
        size if size <= PAGE_SIZE_MAX => Ok(size),
        size => Err(Error::over_limit("page_size", "entries", size as u64, PAGE_SIZE_MAX as u64)),
    }
}

/// A page token that no page has given.
pub(super) fn invalid_page_token() -> Error {
    Error::invalid(
        "page_token",
        "INVALID_PAGE_TOKEN",
        "page_token is not the next_page_token of an earlier page",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_id_is_lowercase_hex() {
        let id = lease_id("lease_id", "000102030405060708090a0b0c0d0eff").unwrap();
        assert_eq!(id.to_string(), "000102030405060708090a0b0c0d0eff");
        for wrong in
            ["", "00", "000102030405060708090A0B0C0D0EFF", &"é".repeat(16), &"g".repeat(32)]
        {
            assert_eq!(lease_id("lease_id", wrong).unwrap_err().reason, "INVALID_LEASE_ID");
        }
    }
}
