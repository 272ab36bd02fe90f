//! One header block.

use super::TarError;
use super::sparse::{self, Runs};

pub(super) const BLOCK: usize = 512;

/// A header whose checksum was right.
pub(super) struct Header(Box<[u8; BLOCK]>);

impl Header {
    /// Checks the checksum: the sum of all bytes with its own field as spaces, of unsigned bytes or,
    /// from old tars, signed ones.
    pub(super) fn new(block: [u8; BLOCK], offset: u64) -> Result<Self, TarError> {
        let stated = number(&block[148..156]).ok_or(TarError::Checksum { offset })?;
        let bytes = || block.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { b' ' } else { *b });
        let unsigned: i64 = bytes().map(i64::from).sum();
        let signed: i64 = bytes().map(|b| i64::from(b.cast_signed())).sum();
        if stated != unsigned && stated != signed {
            return Err(TarError::Checksum { offset });
        }
        Ok(Self(Box::new(block)))
    }

    pub(super) fn kind(&self) -> u8 {
        self.0[156]
    }

    /// The name, with ustar's prefix. (GNU keeps times where the prefix is.)
    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = if &self.0[257..263] == b"ustar\0" { text(&self.0[345..500]) } else { b"" };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> Option<u64> {
        unsigned(&self.0[100..108])
    }

    pub(super) fn uid(&self) -> Option<u64> {
        unsigned(&self.0[108..116])
    }

    pub(super) fn gid(&self) -> Option<u64> {
        unsigned(&self.0[116..124])
    }

    pub(super) fn size(&self) -> Option<u64> {
        unsigned(&self.0[124..136])
    }

    pub(super) fn mtime(&self) -> Option<i64> {
        number(&self.0[136..148])
    }

    pub(super) fn major(&self) -> Option<u64> {
        unsigned(&self.0[329..337])
    }

    pub(super) fn minor(&self) -> Option<u64> {
        unsigned(&self.0[337..345])
    }

    /// The start of an old GNU sparse map: runs, real size, and whether blocks of it follow.
    pub(super) fn sparse(&self) -> Option<(Runs, u64, bool)> {
        let mut runs = Vec::new();
        sparse::pairs(&self.0[386..482], &mut runs)?;
        Some((runs, unsigned(&self.0[483..495])?, self.0[482] != 0))
    }
}

/// The bytes before the first NUL.
fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|b| *b == 0).unwrap_or(field.len())]
}

/// A number that may not be negative.
pub(super) fn unsigned(field: &[u8]) -> Option<u64> {
    number(field).and_then(|n| u64::try_from(n).ok())
}

/// Octal digits between spaces and NULs, or GNU's base-256: the highest bit set, then two's
/// complement. An empty field is zero.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (i, byte) in field.iter().enumerate() {
            let byte = if i == 0 && !negative { byte & 0x7f } else { *byte };
            value = value.checked_mul(256)? | i128::from(byte);
        }
        return i64::try_from(value).ok();
    }
    let digits = text(field).trim_ascii();
    let mut value: i64 = 0;
    for digit in digits {
        if !(b'0'..=b'7').contains(digit) {
            return None;
        }
        value = value.checked_mul(8)?.checked_add(i64::from(digit - b'0'))?;
    }
    Some(value)
}
