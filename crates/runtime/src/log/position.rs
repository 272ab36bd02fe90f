//! How far a log has come: which bytes of the process are in which file up to which length.
//!
//! The record lies in the run directory, not beside the log: kubelet owns the log's directory. It is
//! written after the log and before the guest is told that the bytes are safe, so after a crash the
//! log may be ahead of the record (its tail is cut and comes again) and never behind it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const MAGIC: u64 = u64::from_le_bytes(*b"a3s-log1");
const LENGTH: usize = 48;

/// Offsets in the process's streams, and where the log was then.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Position {
    /// Bytes of standard output that are in the log.
    pub(crate) stdout: u64,
    /// Bytes of standard error that are in the log.
    pub(crate) stderr: u64,
    /// The log file's inode: a rotated log is another file.
    pub(crate) inode: u64,
    /// The log file's length after those bytes.
    pub(crate) length: u64,
}

/// The file that holds the record.
#[derive(Debug)]
pub(crate) struct PositionFile(File);

impl PositionFile {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        Ok(Self(options.open(path)?))
    }

    /// The record; none if it was never written or is damaged.
    pub(crate) fn read(&self) -> Option<Position> {
        let mut bytes = [0; LENGTH];
        self.0.read_exact_at(&mut bytes, 0).ok()?;
        let word = |index: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[index * 8 + i]));
        let position = Position { stdout: word(1), stderr: word(2), inode: word(3), length: word(4) };
        (bytes == encode(&position)).then_some(position)
    }

    pub(crate) fn write(&self, position: &Position) -> io::Result<()> {
        self.0.write_all_at(&encode(position), 0)
    }
}

fn encode(position: &Position) -> [u8; LENGTH] {
    let words = [MAGIC, position.stdout, position.stderr, position.inode, position.length];
    let mut bytes = [0; LENGTH];
    for (field, word) in bytes.chunks_exact_mut(8).zip(words) {
        field.copy_from_slice(&word.to_le_bytes());
    }
    let sum = checksum(&bytes[..40]);
    bytes[40..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// FNV-1a: tells a torn or foreign record from a whole one.
fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use a3s_box_golden::Goldens;

    use super::*;

    #[test]
    fn a_torn_record_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("position");
        let file = PositionFile::open(&path).unwrap();
        assert_eq!(file.read(), None);
        let position = Position { stdout: 1, stderr: 2, inode: 3, length: 4 };
        file.write(&position).unwrap();
        assert_eq!(PositionFile::open(&path).unwrap().read(), Some(position));
        file.0.write_all_at(&[9], 9).unwrap();
        assert_eq!(file.read(), None);
    }

    /// A position that a later build could not read would write the lines of a log twice.
    #[test]
    fn golden_positions_of_every_age_are_read_and_written_alike() {
        const NAME: &str = "log-position.hex";
        let goldens = Goldens::of(env!("CARGO_MANIFEST_DIR"), "records");
        let position =
            Position { stdout: 0x0102_0304_0506_0708, stderr: 2, inode: u64::MAX, length: 1 << 40 };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("position");
        PositionFile::open(&path).unwrap().write(&position).unwrap();
        goldens.check_hex(NAME, &std::fs::read(&path).unwrap());
        for golden in goldens.ages(NAME) {
            std::fs::write(&path, golden.unhex()).unwrap();
            assert_eq!(
                PositionFile::open(&path).unwrap().read(),
                Some(position),
                "{}",
                golden.path.display()
            );
        }
    }
}
