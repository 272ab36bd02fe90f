//! One layer, from the bytes of its blob to a checked EROFS file. Blocking.

use std::cell::RefCell;
use std::error::Error as StdError;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::rc::Rc;

use thiserror::Error;

use super::convert::{ConvertError, Converted, convert};
use super::lower::{Lower, LowerError};
use super::stream::{Decompressed, Measured, OtherCompression, OverLimit, Stream};
use crate::config::Limits;
use crate::digest::{Algorithm, Digest};
use crate::erofs::{ImageWriter, WriterError};
use crate::error::{ErrorKind, io_kind};

/// What a layer must turn out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expected {
    /// The blob's digest, where the source states one.
    pub(crate) blob: Option<Digest>,
    /// The blob's size, likewise.
    pub(crate) size: Option<u64>,
    /// The digest of the tar.
    pub(crate) diff_id: Digest,
}

/// The layer is not what it must be, or could not be written.
#[derive(Debug, Error)]
pub(crate) enum BuildError {
    #[error("the blob has {got} bytes instead of {expected}")]
    Size { expected: u64, got: u64 },
    #[error("the blob has more than the {expected} bytes that its manifest states")]
    Longer { expected: u64 },
    #[error("the blob has the digest {got} instead of {expected}")]
    Digest { expected: Digest, got: Digest },
    #[error(
        "the uncompressed layer has the digest {got} instead of the diff id {expected} of the image config"
    )]
    DiffId { expected: Digest, got: Digest },
    #[error("the uncompressed layer is larger than the limit of {limit} bytes")]
    Bomb { limit: u64 },
    #[error("could not read the blob")]
    Input(#[source] io::Error),
    #[error("could not decompress the layer")]
    Decompress(#[source] io::Error),
    #[error("the layer is compressed with {name}, which is not read: push it again with gzip or zstd")]
    Compression { name: &'static str },
    #[error(transparent)]
    Convert(ConvertError),
}

impl BuildError {
    /// What sort of failure it is.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Size { .. }
            | Self::Longer { .. }
            | Self::Digest { .. }
            | Self::DiffId { .. }
            | Self::Decompress(_) => ErrorKind::Corrupt,
            Self::Bomb { .. } | Self::Compression { .. } => ErrorKind::Unsupported,
            Self::Input(_) => ErrorKind::Unavailable,
            Self::Convert(error) => match error {
                ConvertError::Write { source, .. } | ConvertError::Finish(source) => match source {
                    WriterError::Output(error) => io_kind(error),
                    WriterError::TooLarge { .. } => ErrorKind::Unsupported,
                    WriterError::Input(_) | WriterError::Short { .. } => ErrorKind::Corrupt,
                },
                ConvertError::Lower { source, .. } => match source {
                    LowerError::Gone | LowerError::Reader(_) => ErrorKind::Internal,
                },
                ConvertError::TooMuchMetadata { .. } => ErrorKind::Unsupported,
                ConvertError::Tar(_)
                | ConvertError::Climbs { .. }
                | ConvertError::NameTooLong { .. }
                | ConvertError::PathTooLong { .. }
                | ConvertError::NulInName { .. }
                | ConvertError::SymlinkLoop { .. }
                | ConvertError::NotADirectory { .. }
                | ConvertError::RootReplaced { .. }
                | ConvertError::SymlinkTarget { .. }
                | ConvertError::DeviceNumber { .. }
                | ConvertError::XattrTooLong { .. }
                | ConvertError::HardLink { .. } => ErrorKind::Corrupt,
            },
        }
    }

    /// Whether it only says that a lower layer of the same pull failed.
    pub(crate) fn is_echo(&self) -> bool {
        matches!(self, Self::Convert(ConvertError::Lower { source: LowerError::Gone, .. }))
    }
}

/// Reads the blob to its end, checks it against `expected` and writes its image to `output`.
/// `spool` is a directory for unnamed temporary files.
pub(crate) fn build(
    blob: impl Read,
    expected: &Expected,
    output: File,
    spool: &Path,
    lower: &mut dyn Lower,
    limits: &Limits,
) -> Result<Converted, BuildError> {
    let algorithm = expected.blob.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
    let blob = Shared(Rc::new(RefCell::new(Measured::new(
        blob,
        Stream::Blob,
        algorithm,
        expected.size.unwrap_or(u64::MAX),
    ))));
    match unpack(blob.clone(), expected, output, spool, lower, limits) {
        Ok(converted) => {
            blob.verify(expected)?;
            Ok(converted)
        }
        // Bad bytes show up as nonsense in the tar; that they are not the right bytes says more.
        Err(error) if error.kind() == ErrorKind::Corrupt => match blob.verify(expected) {
            Err(
                mismatch @ (BuildError::Size { .. } | BuildError::Longer { .. } | BuildError::Digest { .. }),
            ) => Err(mismatch),
            Err(_) | Ok(()) => Err(error),
        },
        Err(error) => Err(error),
    }
}

fn unpack<R: Read>(
    blob: Shared<R>,
    expected: &Expected,
    output: File,
    spool: &Path,
    lower: &mut dyn Lower,
    limits: &Limits,
) -> Result<Converted, BuildError> {
    let over = |stream| match (stream, expected.size) {
        (Stream::Blob, Some(expected)) => BuildError::Longer { expected },
        (Stream::Blob, None) | (Stream::Tar, _) => BuildError::Bomb { limit: limits.layer_bytes },
    };
    let decompress = |error| over_limit(&error).map_or_else(|| BuildError::Decompress(error), over);
    let tar = Decompressed::new(blob).map_err(|error| match OtherCompression::in_error(&error) {
        Some(name) => BuildError::Compression { name },
        None => decompress(error),
    })?;
    let tar = Measured::new(tar, Stream::Tar, expected.diff_id.algorithm(), limits.layer_bytes);
    let writer = ImageWriter::new(output, limits.layer_bytes, Some(spool.to_owned()))
        .map_err(|error| BuildError::Convert(ConvertError::Finish(error)))?;
    let (mut tar, output, converted) =
        convert(tar, writer, lower, limits.metadata_bytes, uuid(&expected.diff_id))
            .map_err(|error| over_limit(&error).map_or_else(|| BuildError::Convert(error), over))?;
    drop(output);
    tar.drain().map_err(decompress)?;
    let got = tar.digest();
    if got == expected.diff_id {
        Ok(converted)
    } else {
        Err(BuildError::DiffId { expected: expected.diff_id.clone(), got })
    }
}

/// The blob, still at hand after the tar's reader took it.
struct Shared<R>(Rc<RefCell<Measured<R>>>);

impl<R> Clone for Shared<R> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<R: Read> Read for Shared<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(buffer)
    }
}

impl<R: Read> Shared<R> {
    /// Reads to the end and compares with what the manifest states.
    fn verify(&self, expected: &Expected) -> Result<(), BuildError> {
        let mut blob = self.0.borrow_mut();
        blob.drain().map_err(|error| match expected.size {
            Some(expected) if over_limit(&error).is_some() => BuildError::Longer { expected },
            Some(_) | None => BuildError::Input(error),
        })?;
        if let Some(size) = expected.size
            && size != blob.count()
        {
            return Err(BuildError::Size { expected: size, got: blob.count() });
        }
        match &expected.blob {
            Some(digest) if *digest != blob.digest() => {
                Err(BuildError::Digest { expected: digest.clone(), got: blob.digest() })
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// The file system's name: the start of the diff id, marked as an id made by its owner (version 8
/// of RFC 9562). Overlayfs wants lower file systems to differ in it.
fn uuid(diff_id: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(diff_id.hex().as_bytes().chunks_exact(2)) {
        let digit = |d: u8| char::from(d).to_digit(16).unwrap_or(0) as u8;
        *byte = digit(pair[0]) << 4 | digit(pair[1]);
    }
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// The limit of a [`Measured`] among the causes.
fn over_limit(error: &(dyn StdError + 'static)) -> Option<Stream> {
    let mut next = Some(error);
    while let Some(error) = next {
        let inside = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(OverLimit(stream)) = inside.and_then(|inner| inner.downcast_ref::<OverLimit>()) {
            return Some(*stream);
        }
        next = error.source();
    }
    None
}
