//! The OCI adapter: references, registry client, content store, tar to EROFS.
//!
//! An image is *pulled*: its manifest is resolved for this machine's platform, each layer is
//! streamed through digest, decompression, diff id and tar into an EROFS file, and a record
//! is committed. Nothing is unpacked afterwards: a box mounts the EROFS files.
//!
//! ```text
//! reference -> hosts.toml -> registry / layout -> manifest, config -> layers -> EROFS -> record
//! ```
//!
//! [`ImageStore`] is the whole public surface; everything else here is what it takes or
//! returns. Docs: `docs/images.md`.

// The fuzz targets take the formats alone, so that they build fast.
#![cfg_attr(not(feature = "store"), allow(dead_code, unreachable_pub, unused_imports))]

pub mod digest;
mod erofs;
#[cfg(any(test, not(feature = "store")))]
#[doc(hidden)]
pub mod fuzzing;
mod layer;
pub mod reference;
pub mod tar;
#[cfg(any(test, not(feature = "store")))]
mod testing;

#[cfg(feature = "store")]
mod auth;
#[cfg(feature = "store")]
mod build;
#[cfg(feature = "store")]
mod config;
#[cfg(feature = "store")]
mod error;
#[cfg(feature = "store")]
mod export;
#[cfg(feature = "documents")]
mod hosts;
#[cfg(feature = "documents")]
mod kind;
#[cfg(feature = "store")]
mod local;
#[cfg(feature = "documents")]
mod manifest;
#[cfg(feature = "store")]
mod progress;
#[cfg(feature = "store")]
mod pull;
#[cfg(feature = "store")]
mod record;
#[cfg(feature = "store")]
mod registry;
#[cfg(feature = "store")]
mod store;

#[cfg(feature = "store")]
pub use self::{
    auth::RegistryAuth,
    build::{BuildError, BuildRequest, build, registry_base},
    config::{ImageStoreConfig, Limits, Retries, Timeouts},
    error::{ErrorKind, ImageError, LayerError, PullCause, PullError, Stage},
    export::ExportError,
    hosts::HostsError,
    local::{ArchivedImage, LocalError, archived_images, decompress_archive},
    manifest::ManifestError,
    progress::PullProgress,
    pull::PullFigures,
    record::{ImageRecord, LayerRecord},
    registry::RegistryError,
    store::{Damage, HeldImage, ImageStore, Problem, RepairError, StoreError, Usage, Verified},
};
