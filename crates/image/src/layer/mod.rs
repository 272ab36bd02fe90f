//! From a layer's blob to an EROFS file.
//!
//! ```text
//! blob -> size, digest -> gzip | zstd | plain -> limit, diff id -> tar -> tree + EROFS data
//! ```

mod build;
mod convert;
mod lower;
mod path;
mod stream;

pub(crate) use build::{BuildError, Expected, build};
pub(crate) use convert::{ConvertError, Converted, convert};
pub(crate) use lower::{Found, LayerStack, Lower, LowerError};

#[cfg(test)]
mod tests;
