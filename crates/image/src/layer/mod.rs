//! From a layer's blob to an EROFS file.
//!
//! ```text
//! blob -> size, digest -> gzip | zstd | plain -> limit, diff id -> tar -> tree + EROFS data
//! ```

#[cfg(feature = "store")]
mod build;
mod convert;
mod lower;
mod path;
#[cfg(feature = "store")]
mod stream;

#[cfg(feature = "store")]
pub(crate) use build::{BuildError, Expected, build};
pub(crate) use convert::Converted;
#[cfg(any(test, not(feature = "store")))]
pub(crate) use convert::{ConvertError, convert};
pub(crate) use lower::{Found, LayerStack, Lower, LowerError};
#[cfg(feature = "store")]
pub(crate) use stream::{Decompressed, OtherCompression};

#[cfg(test)]
mod tests;
