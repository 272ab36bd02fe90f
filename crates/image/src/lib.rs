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
mod error;
mod progress;
mod record;
pub mod reference;
mod store;

pub use auth::RegistryAuth;
pub use config::{ImageStoreConfig, Limits, Retries, Timeouts};
pub use error::{ErrorKind, ImageError, PullCause, PullError, Stage};
pub use progress::PullProgress;
pub use record::{ImageRecord, LayerRecord};
pub use store::{ImageStore, StoreError, Usage};
