//! Maps of sparse files: which runs of the file are in the tar.

use super::header::{BLOCK, unsigned};
use super::pax::{MAX_RUNS, decimal};

/// Offset and length of each run that is in the tar.
pub(super) type Runs = Vec<(u64, u64)>;

/// Checks that runs are in order, apart, and inside the file; returns how many bytes they hold.
pub(super) fn check(runs: &[(u64, u64)], real_size: u64) -> Option<u64> {
    let (mut end, mut total) = (0u64, 0u64);
    for (offset, length) in runs {
        if *offset < end {
            return None;
        }
        end = offset.checked_add(*length)?;
        total = total.checked_add(*length)?;
    }
    (end <= real_size).then_some(total)
}

/// Pairs of 12-byte numbers as GNU's old dialect has them; an empty one ends the list.
pub(super) fn pairs(field: &[u8], runs: &mut Vec<(u64, u64)>) -> Option<()> {
    for pair in field.chunks_exact(24) {
        if pair[0] == 0 {
            break;
        }
        let run = (unsigned(&pair[..12])?, unsigned(&pair[12..])?);
        (runs.len() < MAX_RUNS).then(|| runs.push(run))?;
    }
    Some(())
}

/// A continuation block of the old dialect; says whether another one follows.
pub(super) fn old_block(block: &[u8; BLOCK], runs: &mut Vec<(u64, u64)>) -> Option<bool> {
    let before = runs.len();
    pairs(&block[..504], runs)?;
    let more = block[504] != 0;
    // An empty block that promises more would go on for ever.
    (!more || runs.len() > before).then_some(more)
}

/// The map of dialect 1.0, block by block: a count, then so many offsets and lengths, one a line.
#[derive(Debug, Default)]
pub(super) struct DataMap {
    line: Vec<u8>,
    /// How many numbers follow the count, once it is known.
    expected: Option<usize>,
    numbers: Vec<u64>,
}

impl DataMap {
    pub(super) fn is_complete(&self) -> bool {
        self.expected.is_some_and(|expected| self.numbers.len() == expected)
    }

    /// Reads a block; what follows the last number is padding.
    pub(super) fn feed(&mut self, block: &[u8; BLOCK]) -> Option<()> {
        for byte in block {
            if self.is_complete() {
                return Some(());
            }
            if *byte != b'\n' {
                (self.line.len() < 20).then(|| self.line.push(*byte))?;
                continue;
            }
            let number = decimal(&self.line)?;
            self.line.clear();
            match self.expected {
                None => {
                    let runs = usize::try_from(number).ok()?;
                    (runs <= MAX_RUNS).then(|| self.expected = Some(2 * runs))?;
                }
                Some(_) => self.numbers.push(number),
            }
        }
        Some(())
    }

    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        self.numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
    }
}
