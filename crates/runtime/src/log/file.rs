//! A log file and the record of its position, written together.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::format::Source;
use super::position::{Position, PositionFile};

/// Blocking: its users are on a blocking thread.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    record: PositionFile,
    position: Position,
}

impl LogFile {
    /// Opens or makes the log. What the record does not know is cut off: it was not acknowledged and
    /// comes again.
    pub(crate) fn open(path: &Path, record: &Path) -> io::Result<Self> {
        if let Some(parent) = record.parent() {
            fs::create_dir_all(parent)?;
        }
        let record = PositionFile::open(record)?;
        let (file, inode, length) = open_log(path)?;
        let known = record.read().unwrap_or_default();
        let mut position = Position { inode, length, ..known };
        if known.inode == inode && known.length < length {
            file.set_len(known.length)?;
            position.length = known.length;
        }
        record.write(&position)?;
        Ok(Self { path: path.to_owned(), file, record, position })
    }

    /// The first byte of a stream that is not in the log.
    pub(crate) fn offset(&self, source: Source) -> u64 {
        match source {
            Source::Stdout => self.position.stdout,
            Source::Stderr => self.position.stderr,
        }
    }

    /// Appends lines, after which `source` has come to `offset`. An error leaves the log as it was.
    pub(crate) fn append(&mut self, lines: &[u8], source: Source, offset: u64) -> io::Result<()> {
        let mut next = self.position;
        next.length += lines.len() as u64;
        match source {
            Source::Stdout => next.stdout = offset,
            Source::Stderr => next.stderr = offset,
        }
        let written = self.file.write_all(lines).and_then(|()| self.record.write(&next));
        if let Err(error) = written {
            // Half a line must not stay: the batch will be written again.
            self.file.set_len(self.position.length)?;
            return Err(error);
        }
        self.position = next;
        Ok(())
    }

    /// Opens the path anew: the former file was renamed.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        let (file, inode, length) = open_log(&self.path)?;
        let next = Position { inode, length, ..self.position };
        self.record.write(&next)?;
        self.file = file;
        self.position = next;
        Ok(())
    }
}

/// The log, its inode and its length. Readable by its group, as kubelet's other logs are.
fn open_log(path: &Path) -> io::Result<(File, u64, u64)> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let file = OpenOptions::new().append(true).create(true).mode(0o640).open(path)?;
    let metadata = file.metadata()?;
    Ok((file, metadata.ino(), metadata.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_after_the_record_is_cut_and_comes_again() {
        let dir = tempfile::tempdir().unwrap();
        let (path, record) = (dir.path().join("log/0.log"), dir.path().join("positions/x"));
        {
            let mut log = LogFile::open(&path, &record).unwrap();
            log.append(b"one\n", Source::Stdout, 4).unwrap();
            log.append(b"two\n", Source::Stderr, 7).unwrap();
            // The crash: lines that the record has not heard of.
            log.file.write_all(b"thr").unwrap();
        }
        let mut log = LogFile::open(&path, &record).unwrap();
        assert_eq!((log.offset(Source::Stdout), log.offset(Source::Stderr)), (4, 7));
        log.append(b"three\n", Source::Stdout, 10).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one\ntwo\nthree\n");
    }

    #[test]
    fn a_rotated_log_keeps_its_bytes_and_the_new_one_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (path, record) = (dir.path().join("0.log"), dir.path().join("x"));
        let mut log = LogFile::open(&path, &record).unwrap();
        log.append(b"one\n", Source::Stdout, 4).unwrap();
        fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        log.append(b"two\n", Source::Stdout, 8).unwrap();
        log.reopen().unwrap();
        log.append(b"three\n", Source::Stdout, 14).unwrap();
        drop(log);
        let log = LogFile::open(&path, &record).unwrap();
        assert_eq!(log.offset(Source::Stdout), 14);
        assert_eq!(fs::read(dir.path().join("0.log.1")).unwrap(), b"one\ntwo\n");
        assert_eq!(fs::read(&path).unwrap(), b"three\n");
    }
}
