//! Where file tails wait until their inodes are written.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Beyond this it moves to a file without a name.
const MEMORY_MAX: usize = 4 << 20;

/// Bytes appended first and read later, in memory while they are few.
#[derive(Debug)]
pub(crate) struct Spool {
    directory: Option<PathBuf>,
    /// Not yet in the file.
    memory: Vec<u8>,
    file: Option<File>,
    in_file: u64,
}

impl Spool {
    /// A spool that moves to an unnamed file of `directory`; without one it stays in memory.
    pub(crate) fn new(directory: Option<PathBuf>) -> Self {
        Self { directory, memory: Vec::new(), file: None, in_file: 0 }
    }

    /// Where the next byte goes.
    pub(crate) fn position(&self) -> u64 {
        self.in_file + self.memory.len() as u64
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.memory.extend_from_slice(bytes);
        let Some(directory) = &self.directory else { return Ok(()) };
        if self.memory.len() < MEMORY_MAX {
            return Ok(());
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(tempfile::tempfile_in(directory)?),
        };
        file.write_all(&self.memory)?;
        self.in_file += self.memory.len() as u64;
        self.memory.clear();
        Ok(())
    }

    /// Appends bytes of the spool to `out`. An entry never straddles file and memory, because
    /// appends move as a whole.
    pub(crate) fn read(&self, offset: u64, len: usize, out: &mut Vec<u8>) -> io::Result<()> {
        let start = out.len();
        out.resize(start + len, 0);
        let target = &mut out[start..];
        match (&self.file, offset.checked_sub(self.in_file)) {
            (_, Some(at)) => {
                let at = at as usize;
                let bytes = self.memory.get(at..at + len).ok_or(io::ErrorKind::UnexpectedEof)?;
                target.copy_from_slice(bytes);
                Ok(())
            }
            (Some(file), None) => file.read_exact_at(target, offset),
            (None, None) => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
