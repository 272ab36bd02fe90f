//! A streaming tar parser: v7, ustar, GNU (long names, sparse files, base-256 numbers) and PAX.
//!
//! It holds one entry's header at a time; what a header may make it hold is bounded. It does not
//! judge names: where they may lead is decided by whoever builds a tree from them. Layers of images come through it, and
//! what `a3s-box cp` gets out of a container.

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};

use thiserror::Error;

use self::header::{BLOCK, Header};
use self::pax::Records;

/// GNU long names and PAX records of one entry may take this much each.
const MAX_EXTENSION: u64 = 1 << 20;

/// The tar is not readable.
#[derive(Debug, Error)]
#[allow(
    missing_docs,
    reason = "the messages say what the fields are; offsets count from the start of the tar"
)]
pub enum TarError {
    #[error("could not read the tar at byte {offset}")]
    Io {
        offset: u64,
        #[source]
        source: io::Error,
    },
    #[error("the tar ends in the middle of {what}, at byte {offset}")]
    Truncated { what: &'static str, offset: u64 },
    #[error("the tar header at byte {offset} has a wrong checksum")]
    Checksum { offset: u64 },
    #[error("the tar header at byte {offset} has a malformed {field}")]
    Field { field: &'static str, offset: u64 },
    #[error(
        "the tar header at byte {offset} holds {bytes} bytes of long names or attributes, more than {MAX_EXTENSION}"
    )]
    LongExtension { bytes: u64, offset: u64 },
    #[error("the tar header at byte {offset} has the unknown type {kind:?}")]
    UnknownType { kind: char, offset: u64 },
    #[error("the tar header at byte {offset} describes a malformed sparse file")]
    Sparse { offset: u64 },
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// Another name of the entry that has this one.
    HardLink(Vec<u8>),
    /// A symbolic link and where it leads.
    Symlink(Vec<u8>),
    /// A character device.
    #[allow(missing_docs, reason = "the numbers of a device")]
    CharDevice { major: u32, minor: u32 },
    /// A block device.
    #[allow(missing_docs, reason = "the numbers of a device")]
    BlockDevice { major: u32, minor: u32 },
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One entry; its bytes, if it is a file, are read from the [`TarReader`] next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// As it is in the tar: it may be absolute, and lead upwards.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, `0o7777`.
    pub permissions: u16,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// And nanoseconds.
    pub mtime_nanos: u32,
    /// What a reader of the file sees, holes included.
    pub size: u64,
    /// Offset and length of the runs that are in the tar, in order; `None` when all of it is.
    pub runs: Option<Vec<(u64, u64)>>,
    /// Names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries, and through `Read` the bytes of the current one.
pub struct TarReader<R> {
    inner: R,
    offset: u64,
    /// Bytes of the current entry that were not read yet.
    left: u64,
    padding: u64,
    global: Records,
}

impl<R: Read> TarReader<R> {
    /// Begins at the start of a tar.
    pub fn new(inner: R) -> Self {
        Self { inner, offset: 0, left: 0, padding: 0, global: Records::default() }
    }

    /// Where the bytes of the current entry begin or go on, from the start of the tar.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The reader below, which may have bytes after the end of the archive.
    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    /// Skips what is left of the current entry and reads the next one. `None` at the end.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut long_name = None;
        let mut long_link = None;
        let mut records = self.global.clone();
        loop {
            self.skip_rest()?;
            let offset = self.offset;
            let Some(header) = self.header()? else { return Ok(None) };
            match header.kind() {
                b'L' => long_name = Some(self.long_text(&header, offset)?),
                b'K' => long_link = Some(self.long_text(&header, offset)?),
                b'x' | b'X' => {
                    let text = self.extension(&header, offset)?;
                    records.parse(&text).ok_or(TarError::Field { field: "PAX record", offset })?;
                }
                b'g' => {
                    let text = self.extension(&header, offset)?;
                    self.global.parse(&text).ok_or(TarError::Field { field: "PAX record", offset })?;
                    records = self.global.clone();
                }
                // The label of a volume.
                b'V' => self.begin_data(&header, offset)?,
                _ => return self.entry(&header, offset, long_name, long_link, records).map(Some),
            }
        }
    }

    /// The next header, or `None` at the end of the archive: two zero blocks, or no more bytes.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        let Some(block) = self.block()? else { return Ok(None) };
        if block != [0; BLOCK] {
            return Header::new(block, self.offset - BLOCK as u64).map(Some);
        }
        match self.block()? {
            None => Ok(None),
            Some(second) if second == [0; BLOCK] => Ok(None),
            Some(_) => Err(TarError::Field {
                field: "end (a single zero block)",
                offset: self.offset - BLOCK as u64,
            }),
        }
    }

    /// One block, or `None` when there are no more bytes at all.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let n = self.read_inner(&mut block[filled..])?;
            if n == 0 {
                return if filled == 0 {
                    Ok(None)
                } else {
                    Err(TarError::Truncated { what: "a header", offset: self.offset })
                };
            }
            filled += n;
        }
        Ok(Some(block))
    }

    fn read_inner(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        loop {
            match self.inner.read(buffer) {
                Ok(n) => {
                    self.offset += n as u64;
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Io { offset: self.offset, source }),
            }
        }
    }

    /// Skips data and padding. Some tools leave out the padding of the last entry, so a tar may
    /// end in it.
    fn skip_rest(&mut self) -> Result<(), TarError> {
        let padding = self.padding;
        let mut skip = self.left + padding;
        (self.left, self.padding) = (0, 0);
        let mut buffer = [0; 8192];
        while skip > 0 {
            let want = skip.min(buffer.len() as u64) as usize;
            let n = self.read_inner(&mut buffer[..want])?;
            if n == 0 && skip <= padding {
                return Ok(());
            }
            if n == 0 {
                return Err(TarError::Truncated { what: "an entry's data", offset: self.offset });
            }
            skip -= n as u64;
        }
        Ok(())
    }

    fn begin_data(&mut self, header: &Header, offset: u64) -> Result<(), TarError> {
        let size = header.size().ok_or(TarError::Field { field: "size", offset })?;
        self.set_left(size, offset)
    }

    fn set_left(&mut self, size: u64, offset: u64) -> Result<(), TarError> {
        if size > u64::MAX / 4 {
            return Err(TarError::Field { field: "size", offset });
        }
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    /// The whole data of an extension header.
    fn extension(&mut self, header: &Header, offset: u64) -> Result<Vec<u8>, TarError> {
        self.begin_data(header, offset)?;
        if self.left > MAX_EXTENSION {
            return Err(TarError::LongExtension { bytes: self.left, offset });
        }
        let mut bytes = vec![0; self.left as usize];
        self.read_data_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn read_data_exact(&mut self, buffer: &mut [u8]) -> Result<(), TarError> {
        let mut filled = 0;
        while filled < buffer.len() {
            let want = (buffer.len() - filled).min(usize::try_from(self.left).unwrap_or(usize::MAX));
            let n = if want == 0 { 0 } else { self.read_inner(&mut buffer[filled..filled + want])? };
            if n == 0 {
                return Err(TarError::Truncated { what: "an extension header", offset: self.offset });
            }
            filled += n;
            self.left -= n as u64;
        }
        Ok(())
    }

    fn long_text(&mut self, header: &Header, offset: u64) -> Result<Vec<u8>, TarError> {
        let mut text = self.extension(header, offset)?;
        text.truncate(text.iter().position(|b| *b == 0).unwrap_or(text.len()));
        Ok(text)
    }

    fn entry(
        &mut self,
        header: &Header,
        offset: u64,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        records: Records,
    ) -> Result<Entry, TarError> {
        let field = |field| move || TarError::Field { field, offset };
        let path = records.path.or(long_name).unwrap_or_else(|| header.path());
        let link = records.link.or(long_link).unwrap_or_else(|| header.link());
        let size = records.size.or(header.size()).ok_or_else(field("size"))?;
        let (mtime, mtime_nanos) = match records.mtime {
            Some(mtime) => mtime,
            None => (header.mtime().ok_or_else(field("mtime"))?, 0),
        };
        let devices = || {
            let number =
                |n: Option<u64>| n.and_then(|n| u32::try_from(n).ok()).ok_or_else(field("device number"));
            Ok::<_, TarError>((number(header.major())?, number(header.minor())?))
        };
        let kind = match header.kind() {
            // Old tars mark directories by a slash only.
            b'0' | 0 | b'7' if path.ends_with(b"/") => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink(link),
            b'2' => EntryKind::Symlink(link),
            b'3' => devices().map(|(major, minor)| EntryKind::CharDevice { major, minor })?,
            b'4' => devices().map(|(major, minor)| EntryKind::BlockDevice { major, minor })?,
            b'5' | b'D' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => return Err(TarError::UnknownType { kind: char::from(other), offset }),
        };
        // Only files and GNU's directory dumps have data; other sizes are noise (POSIX, ustar).
        let has_data = kind == EntryKind::File || header.kind() == b'D';
        self.set_left(if has_data { size } else { 0 }, offset)?;
        let id = |record: Option<u64>, header: Option<u64>, name| {
            record.or(header).and_then(|id| u32::try_from(id).ok()).ok_or_else(field(name))
        };
        let mut entry = Entry {
            uid: id(records.uid, header.uid(), "owner")?,
            gid: id(records.gid, header.gid(), "group")?,
            permissions: (header.mode().ok_or_else(field("mode"))? & 0o7777) as u16,
            path,
            mtime,
            mtime_nanos,
            size: if kind == EntryKind::File { size } else { 0 },
            runs: None,
            xattrs: records.xattrs,
            kind,
        };
        if entry.kind == EntryKind::File {
            self.sparse(&mut entry, header, records.sparse, offset)?;
        }
        Ok(entry)
    }

    /// Reads the map of a sparse file, in whichever of the four dialects it is written.
    fn sparse(
        &mut self,
        entry: &mut Entry,
        header: &Header,
        pax: pax::Sparse,
        offset: u64,
    ) -> Result<(), TarError> {
        let malformed = || TarError::Sparse { offset };
        let (runs, real_size) = if header.kind() == b'S' {
            let (runs, real_size, more) = header.sparse().ok_or_else(malformed)?;
            (self.old_sparse_blocks(runs, more, offset)?, real_size)
        } else if pax.major == Some(1) {
            let real_size = pax.real_size.ok_or_else(malformed)?;
            (self.sparse_map_in_data(offset)?, real_size)
        } else if let Some(runs) = pax.runs {
            (runs, pax.real_size.ok_or_else(malformed)?)
        } else {
            return Ok(());
        };
        if let Some(name) = pax.name {
            entry.path = name;
        }
        let total = sparse::check(&runs, real_size).ok_or_else(malformed)?;
        if total != self.left {
            return Err(malformed());
        }
        entry.size = real_size;
        entry.runs = Some(runs);
        Ok(())
    }

    /// GNU's old dialect continues its map in blocks between header and data.
    fn old_sparse_blocks(
        &mut self,
        mut runs: Vec<(u64, u64)>,
        mut more: bool,
        offset: u64,
    ) -> Result<Vec<(u64, u64)>, TarError> {
        while more {
            let block =
                self.block()?.ok_or(TarError::Truncated { what: "a sparse map", offset: self.offset })?;
            more = sparse::old_block(&block, &mut runs).ok_or(TarError::Sparse { offset })?;
        }
        Ok(runs)
    }

    /// PAX 1.0 has its map as decimal lines at the start of the data, padded to a block.
    fn sparse_map_in_data(&mut self, offset: u64) -> Result<Vec<(u64, u64)>, TarError> {
        let mut map = sparse::DataMap::default();
        while !map.is_complete() {
            let mut block = [0; BLOCK];
            self.read_data_exact(&mut block)?;
            map.feed(&block).ok_or(TarError::Sparse { offset })?;
        }
        Ok(map.runs())
    }
}

impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = (buffer.len() as u64).min(self.left) as usize;
        if want == 0 {
            return Ok(0);
        }
        let n = self.inner.read(&mut buffer[..want])?;
        if n == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the tar ends in the middle of a file"));
        }
        self.offset += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests;
