//! How the few values that are not prost messages are stored: bincode behind a version byte.
//!
//! bincode is compact and strict but not self-describing: a field that is added, moved or removed
//! makes another format. So each value is wrapped in an envelope whose first byte says which
//! version of the type follows, and a golden test per type pins the bytes. Where the bytes stand
//! alone in a file (or anywhere else where nothing beneath vouches for them) the *sealed* form
//! adds eight bytes of magic in front and a CRC-32 of everything behind.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Largest value that is encoded or decoded, in bytes: membership and roots are kilobytes.
pub const ENVELOPE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Says whose bytes these are.
pub type Magic = [u8; 8];

const CHECKSUM_BYTES: usize = 4;

/// Why a value was not encoded or decoded.
#[derive(Debug, Error)]
pub enum EnvelopeError {
    /// Another program's bytes, or another kind of ours.
    #[error("not one of ours: the first bytes are wrong")]
    Magic,
    /// Too short to be anything.
    #[error("cut short")]
    Truncated,
    /// The bytes are not those that were written.
    #[error("the checksum does not match: the bytes were damaged")]
    Checksum,
    /// Written by a newer (or much older) release.
    #[error("format version {found} is unknown, this release reads {expected}")]
    Version {
        /// What the first byte says.
        found: u8,
        /// What the caller can read.
        expected: u8,
    },
    /// The value behind the version byte makes no sense.
    #[error("malformed: {0}")]
    Malformed(String),
    /// The value does not fit into [`ENVELOPE_BYTES_MAX`].
    #[error("cannot be encoded: {0}")]
    Encode(String),
}

fn configuration() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<ENVELOPE_BYTES_MAX>()
}

/// Encodes `value` behind its version byte.
///
/// # Errors
/// [`EnvelopeError::Encode`] when it is too large.
pub fn encode<T: Serialize>(version: u8, value: &T) -> Result<Vec<u8>, EnvelopeError> {
    let mut bytes = vec![version];
    append(&mut bytes, value)?;
    Ok(bytes)
}

/// Decodes what [`encode`] made of a value of that version, all of it.
///
/// # Errors
/// Says what is wrong with the bytes.
pub fn decode<T: DeserializeOwned>(version: u8, bytes: &[u8]) -> Result<T, EnvelopeError> {
    let (&found, body) = bytes.split_first().ok_or(EnvelopeError::Truncated)?;
    if found != version {
        return Err(EnvelopeError::Version { found, expected: version });
    }
    let (value, read) = bincode::serde::decode_from_slice(body, configuration())
        .map_err(|error| EnvelopeError::Malformed(error.to_string()))?;
    if read != body.len() {
        return Err(EnvelopeError::Malformed(format!("{} bytes too many", body.len() - read)));
    }
    Ok(value)
}

/// Encodes `value` for a place of its own: magic, version, value, checksum.
///
/// # Errors
/// [`EnvelopeError::Encode`] when it is too large.
pub fn seal<T: Serialize>(magic: Magic, version: u8, value: &T) -> Result<Vec<u8>, EnvelopeError> {
    let mut bytes = magic.to_vec();
    bytes.push(version);
    append(&mut bytes, value)?;
    let checksum = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    Ok(bytes)
}

/// Decodes what [`seal`] made of a value of that kind and version.
///
/// # Errors
/// Says what is wrong with the bytes. The magic is judged before the checksum, so that a foreign
/// file is not reported as damage.
pub fn unseal<T: DeserializeOwned>(
    magic: Magic,
    version: u8,
    bytes: &[u8],
) -> Result<T, EnvelopeError> {
    let rest = bytes.strip_prefix(&magic).ok_or(if bytes.len() < magic.len() {
        EnvelopeError::Truncated
    } else {
        EnvelopeError::Magic
    })?;
    let (body, checksum) =
        rest.split_last_chunk::<CHECKSUM_BYTES>().ok_or(EnvelopeError::Truncated)?;
    let covered = &bytes[..bytes.len() - CHECKSUM_BYTES];
    if crc32fast::hash(covered) != u32::from_le_bytes(*checksum) {
        return Err(EnvelopeError::Checksum);
    }
    decode(version, body)
}

fn append<T: Serialize>(bytes: &mut Vec<u8>, value: &T) -> Result<(), EnvelopeError> {
    let body = bincode::serde::encode_to_vec(value, configuration())
        .map_err(|error| EnvelopeError::Encode(error.to_string()))?;
    // bincode applies its limit when it decodes; what could not be read back is not written.
    if body.len() > ENVELOPE_BYTES_MAX {
        return Err(EnvelopeError::Encode(format!("{} bytes are too many", body.len())));
    }
    bytes.extend_from_slice(&body);
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Shape {
        Empty,
        Full { small: u64, large: u64, wide: u128, name: String, bytes: bytes::Bytes },
    }

    fn full() -> Shape {
        Shape::Full {
            small: 7,
            large: 1 << 40,
            wide: 1 << 100,
            name: "ab".into(),
            bytes: bytes::Bytes::from_static(&[1, 2, 3]),
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// These bytes are on disks: if this fails, the format changed.
    #[test]
    fn golden_bytes() {
        assert_eq!(hex(&encode(1, &Shape::Empty).unwrap()), "0100");
        let expected = "010107fd0000000000010000fe00000000000000000000000010000000026162 03010203";
        assert_eq!(hex(&encode(1, &full()).unwrap()), expected.replace(' ', ""));
        let sealed = seal(*b"QRTEST\0\0", 3, &Shape::Empty).unwrap();
        assert_eq!(hex(&sealed), "51525445535400000300830b0342");
    }

    #[test]
    fn a_value_comes_back() {
        let bytes = encode(2, &full()).unwrap();
        assert_eq!(decode::<Shape>(2, &bytes).unwrap(), full());
        let sealed = seal(*b"QRTEST\0\0", 2, &full()).unwrap();
        assert_eq!(unseal::<Shape>(*b"QRTEST\0\0", 2, &sealed).unwrap(), full());
    }

    #[test]
    fn wrong_bytes_are_refused() {
        let bytes = encode(1, &full()).unwrap();
        assert!(matches!(
            decode::<Shape>(2, &bytes),
            Err(EnvelopeError::Version { found: 1, expected: 2 })
        ));
        assert!(matches!(decode::<Shape>(1, &[]), Err(EnvelopeError::Truncated)));
        for length in 1..bytes.len() {
            assert!(decode::<Shape>(1, &bytes[..length]).is_err(), "cut to {length}");
        }
        let mut long = bytes;
        long.push(0);
        assert!(matches!(decode::<Shape>(1, &long), Err(EnvelopeError::Malformed(_))));
        // A length that promises more than the limit must not be believed, let alone allocated.
        let huge = [1, 1, 0, 0, 0, 0xfd, 255, 255, 255, 255, 255, 255, 255, 127];
        assert!(matches!(decode::<Shape>(1, &huge), Err(EnvelopeError::Malformed(_))));
        assert!(encode(1, &vec![0u8; ENVELOPE_BYTES_MAX + 1]).is_err());
    }

    #[test]
    fn every_flipped_bit_of_a_sealed_value_is_noticed() {
        let sealed = seal(*b"QRTEST\0\0", 1, &full()).unwrap();
        for bit in 0..sealed.len() * 8 {
            let mut damaged = sealed.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(unseal::<Shape>(*b"QRTEST\0\0", 1, &damaged).is_err(), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert!(unseal::<Shape>(*b"QRTEST\0\0", 1, &sealed[..length]).is_err());
        }
    }
}
