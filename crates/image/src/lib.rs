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

mod auth;
mod config;
pub mod digest;
mod erofs;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod hosts;
mod layer;
mod local;
mod manifest;
mod progress;
mod pull;
mod record;
pub mod reference;
mod registry;
mod store;
mod tar;
mod testing;

pub use auth::RegistryAuth;
pub use config::{ImageStoreConfig, Limits, Retries, Timeouts};
pub use error::{ErrorKind, ImageError, LayerError, PullCause, PullError, Stage};
pub use hosts::HostsError;
pub use local::LocalError;
pub use manifest::ManifestError;
pub use progress::PullProgress;
pub use record::{ImageRecord, LayerRecord};
pub use registry::RegistryError;
pub use store::{ImageStore, StoreError, Usage};
