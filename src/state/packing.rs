//! Varints and lengths, for what a record packs into bytes in memory.
//!
//! Records are packed here and nowhere else, so a reader that meets bytes it cannot make sense of
//! has met a defect of ours, not bad input, and panics. What comes from wire or disk goes through
//! `codec` first. The packing is also what digests are taken of: to change it is to change them.

/// Appends `value`, seven bits a byte, lowest first.
pub(super) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends the length of `bytes` and `bytes`.
pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Takes packed bytes apart, from the front.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(packed: &'a [u8]) -> Self {
        Self { rest: packed }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// What has not been read yet.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn byte(&mut self) -> u8 {
        let (first, rest) = self.rest.split_first().expect("packed bytes are complete");
        self.rest = rest;
        *first
    }

    pub(super) fn varint(&mut self) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte();
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return value;
            }
        }
        panic!("a packed varint has at most ten bytes");
    }

    pub(super) fn fixed<const N: usize>(&mut self) -> [u8; N] {
        let (first, rest) = self.rest.split_first_chunk().expect("packed bytes are complete");
        self.rest = rest;
        *first
    }

    pub(super) fn bytes(&mut self) -> &'a [u8] {
        let length = self.varint() as usize;
        let (first, rest) = self.rest.split_at(length);
        self.rest = rest;
        first
    }

    pub(super) fn str(&mut self) -> &'a str {
        std::str::from_utf8(self.bytes()).expect("packed from a str")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_read() {
        let values = [0, 1, 127, 128, 300, 1 << 35, u64::MAX - 1, u64::MAX];
        let mut packed = Vec::new();
        for value in values {
            put_varint(&mut packed, value);
        }
        put_bytes(&mut packed, "naïve".as_bytes());
        packed.extend_from_slice(&7u64.to_le_bytes());
        let mut reader = Reader::new(&packed);
        for value in values {
            assert_eq!(reader.varint(), value);
        }
        assert_eq!(reader.str(), "naïve");
        assert_eq!(u64::from_le_bytes(reader.fixed()), 7);
        assert!(reader.is_empty());
    }
}
