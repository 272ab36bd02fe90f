//! Readers between a blob and a tar.
//!
//! ```text
//! thread 1: blob -> size, digest -> gzip | zstd | plain   (Measured, Decompressed)
//!              | buffers
//! thread 2:    +-> limit, diff id -> tar -> EROFS         (Ahead)
//! ```

use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use flate2::bufread::MultiGzDecoder;

use crate::digest::{Algorithm, Digest, Hasher};

const BUFFER: usize = 128 << 10;
/// What passes between the threads; as many wait as keep both busy.
const AHEAD: usize = 256 << 10;
const AHEAD_BUFFERS: usize = 3;
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Counts and hashes bytes, up to a limit.
struct Meter {
    hasher: Hasher,
    bytes: u64,
    limit: u64,
    stream: Stream,
}

impl Meter {
    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        if self.bytes > self.limit {
            return Err(io::Error::new(io::ErrorKind::InvalidData, OverLimit(self.stream)));
        }
        Ok(())
    }
}

/// A blob, measured while it is read.
pub(super) struct Measured<R> {
    inner: R,
    meter: Meter,
}

/// A limit was passed; carried inside an `io::Error`.
#[derive(Debug, thiserror::Error)]
#[error("the {0:?} is too long")]
pub(super) struct OverLimit(pub(super) Stream);

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    /// The blob as it is transferred.
    Blob,
    /// The tar in it.
    Tar,
}

impl<R: Read> Measured<R> {
    pub(super) fn new(inner: R, algorithm: Algorithm, limit: u64) -> Self {
        let meter = Meter { hasher: Hasher::new(algorithm), bytes: 0, limit, stream: Stream::Blob };
        Self { inner, meter }
    }

    /// Reads to the end.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        while self.read(&mut buffer)? > 0 {}
        Ok(())
    }

    /// Bytes that passed.
    pub(super) fn count(&self) -> u64 {
        self.meter.bytes
    }

    /// The digest of what passed.
    pub(super) fn digest(&self) -> Digest {
        self.meter.hasher.clone().finish()
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
        self.meter.add(&buffer[..n])?;
        Ok(n)
    }
}

/// What one thread decompresses for another: buffers that go round, and an empty one at the end.
pub(super) struct Ahead {
    full: Receiver<io::Result<Vec<u8>>>,
    empty: Sender<Vec<u8>>,
    buffer: Vec<u8>,
    at: usize,
    ended: bool,
    meter: Meter,
}

/// The other end of an [`Ahead`].
pub(super) struct Behind {
    full: SyncSender<io::Result<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
}

impl Ahead {
    /// The two ends, for a tar of at most `limit` bytes.
    pub(super) fn new(algorithm: Algorithm, limit: u64) -> (Behind, Self) {
        let (full, filled) = sync_channel(AHEAD_BUFFERS);
        let (empty, emptied) = channel();
        for _ in 0..AHEAD_BUFFERS {
            // The receiver is right here.
            let _ = empty.send(Vec::new());
        }
        let meter = Meter { hasher: Hasher::new(algorithm), bytes: 0, limit, stream: Stream::Tar };
        let ahead = Self { full: filled, empty, buffer: Vec::new(), at: 0, ended: false, meter };
        (Behind { full, empty: emptied }, ahead)
    }

    /// Reads to the end.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        loop {
            let n = self.fill_buf()?.len();
            if n == 0 {
                return Ok(());
            }
            self.consume(n);
        }
    }

    /// The digest of the tar, once it was read to its end.
    pub(super) fn digest(&self) -> Digest {
        self.meter.hasher.clone().finish()
    }

    fn next_buffer(&mut self) -> io::Result<()> {
        let gone = || io::Error::new(io::ErrorKind::ConnectionAborted, "the decompressing thread ended");
        let next = self.full.recv().map_err(|_| gone())??;
        self.meter.add(&next)?;
        self.ended = next.is_empty();
        let used = std::mem::replace(&mut self.buffer, next);
        self.at = 0;
        // At the end nobody wants it any more.
        let _ = self.empty.send(used);
        Ok(())
    }
}

impl BufRead for Ahead {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.buffer.len() && !self.ended {
            self.next_buffer()?;
        }
        Ok(&self.buffer[self.at..])
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let from = self.fill_buf()?;
        let n = from.len().min(buffer.len());
        buffer[..n].copy_from_slice(&from[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl Behind {
    /// Sends all of a stream, or as much as is wanted.
    pub(super) fn send_all(self, mut stream: impl Read) {
        while let Ok(mut buffer) = self.empty.recv() {
            buffer.resize(AHEAD, 0);
            let filled = fill(&mut stream, &mut buffer);
            let (ended, piece) = match filled {
                Ok(n) => {
                    buffer.truncate(n);
                    (n == 0, Ok(buffer))
                }
                Err(error) => (true, Err(error)),
            };
            if self.full.send(piece).is_err() || ended {
                return;
            }
        }
    }

    /// Sends that there is no stream.
    pub(super) fn fail(self, error: io::Error) {
        // One that has gone away needs no reason.
        let _ = self.full.send(Err(error));
    }
}

/// Reads until the buffer is full or the stream ends. What comes before an error is of no use: the layer fails.
fn fill(stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// A blob whose first bytes were looked at.
type Peeked<R> = BufReader<io::Chain<io::Cursor<Vec<u8>>, R>>;

/// A blob being decompressed. What it is compressed with is seen in its first bytes, because
/// media types are known to lie.
pub(super) enum Decompressed<R: Read> {
    Gzip(Box<MultiGzDecoder<Peeked<R>>>),
    Zstd(Box<zstd::Decoder<'static, Peeked<R>>>),
    Plain(Peeked<R>),
}

impl<R: Read> Decompressed<R> {
    pub(super) fn new(mut blob: R) -> io::Result<Self> {
        let mut head = Vec::with_capacity(4);
        blob.by_ref().take(4).read_to_end(&mut head)?;
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
