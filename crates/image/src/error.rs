//! What the store answers when it cannot.

use std::error::Error as StdError;
use std::fmt;

use thiserror::Error;

use crate::erofs::ReaderError;
use crate::hosts::HostsError;
pub use crate::kind::ErrorKind;
use crate::layer::BuildError;
use crate::local::LocalError;
use crate::manifest::ManifestError;
use crate::reference::ReferenceError;
use crate::registry::RegistryError;
use crate::store::StoreError;

/// A failed call of the image store. Its `Display` is one complete line: what was tried, the
/// stage, the object, every cause, and the remedy; it holds no secrets. Print it as it is.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The text is no image reference.
    #[error("{}; {}", .0, ErrorKind::InvalidReference.remedy())]
    Reference(ReferenceError),
    /// No image of that name is here.
    #[error("image {name:?} is not on this machine; pull it first")]
    NoSuchImage {
        /// The name as it was given.
        name: String,
    },
    /// A prefix of several ids.
    #[error("image id prefix {prefix:?} fits {matches} images; give more digits")]
    Ambiguous {
        /// The prefix as it was given.
        prefix: String,
        /// How many it fits.
        matches: usize,
    },
    /// A pull failed.
    #[error(transparent)]
    Pull(Box<PullError>),
    /// The store itself failed.
    #[error("image store: {}; {}", Chain(.0), .0.kind().remedy())]
    Store(StoreError),
}

impl ImageError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Reference(_) | Self::Ambiguous { .. } => ErrorKind::InvalidReference,
            Self::NoSuchImage { .. } => ErrorKind::NotFound,
            Self::Pull(error) => error.cause.kind(),
            Self::Store(error) => error.kind(),
        }
    }
}

/// The step of a pull that failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Stage {
    /// Reading `hosts.toml` or the local archive.
    #[error("finding the source")]
    Source,
    /// Fetching the manifest, or choosing it from an index.
    #[error("fetching the manifest")]
    Manifest,
    /// Fetching or reading the image config.
    #[error("fetching the config")]
    Config,
    /// Downloading and converting a layer.
    #[error("layer {index} of {count} ({digest})")]
    Layer {
        /// Counted from one.
        index: usize,
        /// Of how many.
        count: usize,
        /// The digest of its blob.
        digest: String,
    },
    /// Writing the record.
    #[error("recording the image")]
    Record,
}

/// A pull that failed: of what, where, and why.
#[derive(Debug, Error)]
#[error("cannot pull {reference}: {stage}: {}; {}", Chain(.cause), .cause.kind().remedy())]
pub struct PullError {
    /// The reference as normalised.
    pub reference: String,
    /// The step.
    pub stage: Stage,
    /// Why.
    pub cause: PullCause,
}

/// Why a pull failed.
#[derive(Debug, Error)]
pub enum PullCause {
    /// The registry's configuration.
    #[error(transparent)]
    Hosts(#[from] HostsError),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The archive or layout on this machine.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// A manifest, index or config.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A layer's bytes.
    #[error(transparent)]
    Layer(LayerError),
    /// The store could not write or read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A layer that cannot be converted. Its parts are the converter's own; what there is to know
/// is its kind and its message.
#[derive(Debug, Error)]
#[error(transparent)]
pub struct LayerError(LayerFailure);

#[derive(Debug, Error)]
enum LayerFailure {
    #[error(transparent)]
    Build(BuildError),
    #[error("a layer in the store cannot be read")]
    Stored(#[source] ReaderError),
}

impl From<BuildError> for PullCause {
    fn from(error: BuildError) -> Self {
        Self::Layer(LayerError(LayerFailure::Build(error)))
    }
}

impl From<ReaderError> for PullCause {
    fn from(error: ReaderError) -> Self {
        Self::Layer(LayerError(LayerFailure::Stored(error)))
    }
}

impl LayerError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match &self.0 {
            LayerFailure::Build(error) => error.kind(),
            LayerFailure::Stored(_) => ErrorKind::Internal,
        }
    }
}

impl PullCause {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Hosts(_) => ErrorKind::Internal,
            Self::Registry(error) => error.kind(),
            Self::Local(error) => error.kind(),
            Self::Manifest(error) => error.kind(),
            Self::Layer(error) => error.kind(),
            Self::Store(error) => error.kind(),
        }
    }

    /// Whether it only says that a lower layer of the same pull failed.
    pub(crate) fn is_echo(&self) -> bool {
        match self {
            Self::Layer(LayerError(LayerFailure::Build(error))) => error.is_echo(),
            Self::Layer(_)
            | Self::Hosts(_)
            | Self::Registry(_)
            | Self::Local(_)
            | Self::Manifest(_)
            | Self::Store(_) => false,
        }
    }
}

/// What sort of failure an I/O error on our own files is.
pub(crate) fn io_kind(error: &std::io::Error) -> ErrorKind {
    use std::io::ErrorKind as Io;
    match error.kind() {
        Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => ErrorKind::NoSpace,
        _ => ErrorKind::Internal,
    }
}

/// Shows an error and all its sources, `a: b: c`, skipping a source whose text is already there.
pub(crate) struct Chain<'a, E: StdError>(pub(crate) &'a E);

impl<E: StdError> fmt::Display for Chain<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.to_string();
        f.write_str(&shown)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            let text = error.to_string();
            if !shown.contains(&text) {
                write!(f, ": {text}")?;
                shown = text;
            }
            next = error.source();
        }
        Ok(())
    }
}
