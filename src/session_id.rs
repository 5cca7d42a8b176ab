//! What a session id is: how one is minted, and which of a caller's choice are taken. Servers and
//! clients mint alike.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::limits::{SESSION_ID_CHARS_MAX, SESSION_ID_CHARS_MIN};

/// Characters of an id beside letters and digits: those of a cookie's value (RFC 6265 cookie-octet)
/// that need no quoting, less those that break in headers and URLs.
const PUNCTUATION: &[u8] = b"-_.~!$&'*+^`|#%";

/// A new id: 256 bits from the operating system, in base64url without padding. It does not begin
/// with a dash (which costs 0.02 of those bits), so that a shell command can name it.
pub(crate) fn mint() -> Result<String, getrandom::Error> {
    let mut secret = [0; 32];
    loop {
        getrandom::fill(&mut secret)?;
        let id = URL_SAFE_NO_PAD.encode(secret);
        if !id.starts_with('-') {
            return Ok(id);
        }
    }
}

/// Whether an id is as long as one may be.
pub(crate) fn has_valid_length(id: &str) -> bool {
    (SESSION_ID_CHARS_MIN..=SESSION_ID_CHARS_MAX).contains(&id.len())
}

/// Whether an id has only characters that one may have.
pub(crate) fn has_valid_characters(id: &str) -> bool {
    id.bytes().all(|c| c.is_ascii_alphanumeric() || PUNCTUATION.contains(&c))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn minted_ids_can_be_named_in_a_shell_and_are_distinct() {
        // One in 64 would begin with a dash.
        let ids: BTreeSet<String> = (0..4_096).map(|_| mint().unwrap()).collect();
        assert_eq!(ids.len(), 4_096);
        for id in ids {
            assert!(!id.starts_with('-'), "{id}");
            assert_eq!(id.len(), 43);
            assert!(has_valid_length(&id) && has_valid_characters(&id), "{id}");
        }
    }
}
