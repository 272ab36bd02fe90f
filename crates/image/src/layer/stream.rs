//! Readers between a blob and a tar.

use std::io::{self, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

use crate::digest::{Algorithm, Digest, Hasher};

const BUFFER: usize = 128 << 10;
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// As many bytes as it takes to know what a blob is.
const HEAD: u64 = 10;

/// Counts and hashes what passes, and stops at a limit.
pub(super) struct Measured<R> {
    inner: R,
    hasher: Hasher,
    bytes: u64,
    limit: u64,
    stream: Stream,
}

/// The limit of a [`Measured`] was passed; carried inside an `io::Error`.
#[derive(Debug, thiserror::Error)]
#[error("the {0:?} is too long")]
pub(super) struct OverLimit(pub(super) Stream);

/// What a [`Measured`] measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    /// The blob as it is transferred.
    Blob,
    /// The tar in it.
    Tar,
}

impl<R: Read> Measured<R> {
    pub(super) fn new(inner: R, stream: Stream, algorithm: Algorithm, limit: u64) -> Self {
        Self { inner, hasher: Hasher::new(algorithm), bytes: 0, limit, stream }
    }

    /// Reads to the end.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        while self.read(&mut buffer)? > 0 {}
        Ok(())
    }

    /// Bytes that passed.
    pub(super) fn count(&self) -> u64 {
        self.bytes
    }

    /// The digest of what passed.
    pub(super) fn digest(&self) -> Digest {
        self.hasher.clone().finish()
    }
}

impl<R: Read> Read for Measured<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = loop {
            match self.inner.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        self.hasher.update(&buffer[..n]);
        self.bytes += n as u64;
        if self.bytes > self.limit {
            return Err(io::Error::new(io::ErrorKind::InvalidData, OverLimit(self.stream)));
        }
        Ok(n)
    }
}

/// A blob whose first bytes were looked at.
pub(crate) type Peeked<R> = BufReader<io::Chain<io::Cursor<Vec<u8>>, R>>;

/// A blob being decompressed. What it is compressed with is seen in its first bytes, because
/// media types are known to lie.
pub(crate) enum Decompressed<R: Read> {
    Gzip(Box<MultiGzDecoder<Peeked<R>>>),
    Zstd(Box<zstd::Decoder<'static, Peeked<R>>>),
    Plain(Peeked<R>),
}

/// A compression that is known and not read; carried inside an `io::Error`.
#[derive(Debug, thiserror::Error)]
#[error("it is compressed with {0}, which is not read; gzip and zstd are")]
pub(crate) struct OtherCompression(pub(crate) &'static str);

impl OtherCompression {
    /// What the first bytes of a blob say. A tar begins with a name, so a magic must not be what a name may begin with.
    fn of(head: &[u8]) -> Option<Self> {
        let name = match head {
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "xz",
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..]
            | [b'B', b'Z', b'h', b'1'..=b'9', 0x17, 0x72, 0x45, 0x38, 0x50, 0x90, ..] => "bzip2",
            [0x04, 0x22, 0x4d, 0x18, ..] => "lz4",
            [b'L', b'Z', b'I', b'P', 1, ..] => "lzip",
            _ => return None,
        };
        Some(Self(name))
    }

    /// The one that an error carries.
    pub(crate) fn in_error(error: &io::Error) -> Option<&'static str> {
        error.get_ref()?.downcast_ref::<Self>().map(|Self(name)| *name)
    }
}

impl<R: Read> Decompressed<R> {
    pub(crate) fn new(mut blob: R) -> io::Result<Self> {
        let mut head = Vec::with_capacity(HEAD as usize);
        blob.by_ref().take(HEAD).read_to_end(&mut head)?;
        if let Some(other) = OtherCompression::of(&head) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, other));
        }
        let (gzip, zstd) =
            (head.starts_with(GZIP_MAGIC), head.starts_with(ZSTD_MAGIC) || is_skippable(&head));
        let blob = BufReader::with_capacity(BUFFER, io::Cursor::new(head).chain(blob));
        if gzip {
            Ok(Self::Gzip(Box::new(MultiGzDecoder::new(blob))))
        } else if zstd {
            let mut decoder = zstd::Decoder::with_buffer(blob)?;
            // Frames may ask for a window of up to 128 MiB, as the zstd tool takes by default.
            decoder.window_log_max(27)?;
            Ok(Self::Zstd(Box::new(decoder)))
        } else {
            Ok(Self::Plain(blob))
        }
    }
}

impl<R: Read> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
            Self::Plain(blob) => blob.read(buffer),
        }
    }
}

/// zstd's skippable frames have a magic of 0x184D2A5? in little-endian order.
fn is_skippable(head: &[u8]) -> bool {
    matches!(head, [low, 0x2a, 0x4d, 0x18, ..] if low & 0xf0 == 0x50)
}
