//! The store: records, files, and what keeps them together.
//!
//! ```text
//! <root>/images/lock                 held while the store is open
//! <root>/images/tmp/                 whatever is being written; emptied on open
//! <root>/images/blobs/sha256/<hex>   manifests and configs
//! <root>/images/erofs/<hex>.erofs    layers by diff id
//! <root>/images/erofs/chain-<hex>.erofs   layers that are right above their lower ones only, by chain id
//! ```
//!
//! A file gets its name once it is complete and on the disk; a record is committed once all its
//! files are. So after a crash at any point every record is whole. Layers that no record names are
//! kept for later pulls within a budget; everything else that none names is garbage, collected on open. Compressed layers are not kept: what boxes need is the EROFS
//! file, and it can be checked and made again only from the registry anyway.

mod disk;
mod files;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod power_cut;
mod verify;
mod verity;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use a3s_box_core::image::{Layer, ResolvedImage};
use a3s_box_core::storage::{Change, Storage, StorageError, Table};
use thiserror::Error;

use crate::auth::RegistryAuth;
use crate::config::ImageStoreConfig;
use crate::digest::Digest;
use crate::error::{ErrorKind, ImageError, io_kind};
use crate::progress::{PullProgress, Unwatched};
use crate::pull::{PullFigures, Traffic};
use crate::record::ImageRecord;
use crate::reference::Reference;

use self::disk::{Disk, RealDisk};
pub(crate) use self::files::Files;
use self::verify::Measured;
pub use self::verify::{Damage, Problem, RepairError, Verified};

/// Image records by id.
const IMAGES: Table = Table("images");

/// The images of this machine. Clones share one store.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) config: ImageStoreConfig,
    /// The normalised names of the configuration's pinned images.
    pinned: BTreeSet<String>,
    pub(crate) files: Files,
    storage: Arc<dyn Storage>,
    /// What is in the table, once it is there. Written only under `committing`.
    images: RwLock<BTreeMap<String, ImageRecord>>,
    /// One writer of records at a time.
    committing: Mutex<()>,
    /// Files that pulls under way rely on, with how many do: not to be collected.
    pins: Mutex<HashMap<String, usize>>,
    /// What is known of layers' files, by name.
    measured: Mutex<BTreeMap<String, Measured>>,
    /// Those at it.
    measuring: Mutex<Vec<tokio::task::JoinHandle<()>>>,
    /// Images and layers being made: a second pull of one waits for the first.
    flights: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    /// What all pulls share.
    pub(crate) traffic: Arc<Traffic>,
    /// The lock of the directory, held while open.
    _lock: File,
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
    #[error("could not {operation} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        operation: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Another process has the directory.
    #[error("another process uses {}: give each daemon a --root of its own", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The records could not be read or written.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A layer's file was replaced.
    #[error("the layer {} was changed: {problem}; run `a3s-box images verify --repair`", path.display())]
    Unsealed {
        /// The file.
        path: PathBuf,
        /// In what it differs.
        problem: Problem,
    },
    /// A record could not be put into JSON.
    #[error("could not encode the record of image {id}")]
    Encode {
        /// The image.
        id: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The process is ending.
    #[error("the work was given up because the process is ending")]
    Ending,
}

impl StoreError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } => io_kind(source),
            Self::Unsealed { .. } => ErrorKind::Corrupt,
            Self::Locked { .. } | Self::Storage(_) | Self::Encode { .. } | Self::Ending => {
                ErrorKind::Internal
            }
        }
    }
}

impl ImageStore {
    /// Opens the store under `config.root`, makes its directories, and collects what a crash
    /// left behind. Blocks on the disk. Fails when another process has it open.
    pub fn open(config: ImageStoreConfig, storage: Arc<dyn Storage>) -> Result<Self, ImageError> {
        Self::open_on(config, storage, Arc::new(RealDisk))
    }

    fn open_on(
        config: ImageStoreConfig,
        storage: Arc<dyn Storage>,
        disk: Arc<dyn Disk>,
    ) -> Result<Self, ImageError> {
        let pinned = config.pinned.iter().map(|name| Ok(name.parse::<Reference>()?.to_string()));
        let pinned = pinned.collect::<Result<_, _>>().map_err(ImageError::Reference)?;
        let files = Files::create(config.root.join("images"), disk).map_err(ImageError::Store)?;
        let lock = files.lock().map_err(ImageError::Store)?;
        let inner = Inner {
            traffic: Arc::new(Traffic::new(config.max_parallel_downloads)),
            config,
            pinned,
            files,
            storage,
            images: RwLock::default(),
            committing: Mutex::default(),
            pins: Mutex::default(),
            measured: Mutex::default(),
            measuring: Mutex::default(),
            flights: Mutex::default(),
            _lock: lock,
        };
        inner.files.empty_tmp().map_err(ImageError::Store)?;
        inner.load().map_err(ImageError::Store)?;
        inner.load_measured().map_err(ImageError::Store)?;
        inner.sweep().map_err(ImageError::Store)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes an image complete on this machine and returns its record. Dropping the future stops
    /// the pull and removes its temporary files; finished layers stay for the next attempt.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<RegistryAuth>,
        progress: Option<Arc<dyn PullProgress>>,
    ) -> Result<ImageRecord, ImageError> {
        let reference: Reference = reference.parse().map_err(ImageError::Reference)?;
        let progress = progress.unwrap_or_else(|| Arc::new(Unwatched));
        crate::pull::pull(Arc::clone(&self.inner), reference, auth, progress)
            .await
            .map_err(|error| ImageError::Pull(Box::new(error)))
    }

    /// Figures about all pulls since the store was opened.
    pub fn pull_figures(&self) -> PullFigures {
        self.inner.traffic.figures()
    }

    /// All images in the order of their ids.
    pub fn list(&self) -> Vec<ImageRecord> {
        self.inner.images().values().cloned().collect()
    }

    /// The image of a name: an id (with or without `sha256:`), an unambiguous prefix of one, or a
    /// reference by tag or digest (normalised first). `None` when there is none.
    pub fn find(&self, name: &str) -> Result<Option<ImageRecord>, ImageError> {
        self.inner.find(name)
    }

    /// What a box needs to run the image of a name (as [`find`](Self::find) reads it). Layers that were sealed must be
    /// the files that they were then.
    pub fn resolve(&self, name: &str) -> Result<ResolvedImage, ImageError> {
        let record = self.find(name)?.ok_or_else(|| ImageError::NoSuchImage { name: name.to_owned() })?;
        let files = record.layers.iter().map(|layer| &layer.file);
        self.inner.check_seals(files).map_err(ImageError::Store)?;
        let layers = record
            .layers
            .iter()
            .filter(|layer| !layer.empty)
            .map(|layer| Layer { diff_id: layer.diff_id.clone(), erofs: self.inner.files.erofs(&layer.file) })
            .collect();
        Ok(ResolvedImage {
            digest_ref: record.repo_digests.first().unwrap_or(&record.id).clone(),
            id: record.id,
            config: record.config,
            layers,
        })
    }

    /// The same, with the promise that its files stay where they are as long as the answer is held, even
    /// if the image is removed meanwhile.
    pub fn hold(&self, name: &str) -> Result<HeldImage, ImageError> {
        let gone = || ImageError::NoSuchImage { name: name.to_owned() };
        let record = self.find(name)?.ok_or_else(gone)?;
        let pins = self.inner.pin(files::keys(&record));
        // It may have been removed before the pins were there.
        let image = match self.resolve(&record.id) {
            Err(ImageError::NoSuchImage { .. }) => Err(gone()),
            other => other,
        }?;
        Ok(HeldImage { image, _pins: pins })
    }

    /// Removes the image of a name with all its tags and digests, and the files that no other
    /// image uses. A missing image is success, and says so with `None`. Boxes that run it keep
    /// their files: they hold them open.
    pub async fn remove(&self, name: &str) -> Result<Option<ImageRecord>, ImageError> {
        let (inner, name) = (Arc::clone(&self.inner), name.to_owned());
        blocking(move || inner.remove(&name)).await.map_err(ImageError::Store)?
    }

    /// What the store takes of the disk.
    pub async fn usage(&self) -> Result<Usage, ImageError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.files.usage()).await.and_then(|usage| usage).map_err(ImageError::Store)
    }

    /// The directory of the images, for `ImageFsInfo`.
    pub fn directory(&self) -> PathBuf {
        self.inner.files.root().to_owned()
    }
}

/// Runs blocking work on a thread for it.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(StoreError::Ending),
    }
}

/// The data behind a lock is replaced as a whole, so a panic elsewhere leaves it whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn images(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, ImageRecord>> {
        self.images.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn images_mut(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, ImageRecord>> {
        self.images.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the records. One that cannot be read or whose files are gone is dropped: the image
    /// can be pulled again, and a box must never start from half of one.
    fn load(&self) -> Result<(), StoreError> {
        let mut images = BTreeMap::new();
        let mut dropped = Vec::new();
        for (key, value) in self.storage.scan(IMAGES)? {
            match serde_json::from_slice::<ImageRecord>(&value) {
                Ok(mut record) if self.files.has_all(&record) => {
                    record.pinned = self.is_pinned(&record);
                    images.insert(key, record);
                }
                Ok(_) => {
                    tracing::warn!(image = %key, "files of the image are missing; pull it again");
                    dropped.push(key);
                }
                Err(error) => {
                    tracing::warn!(image = %key, %error, "the record of the image cannot be read; pull it again");
                    dropped.push(key);
                }
            }
        }
        if !dropped.is_empty() {
            let delete = |key| Change::Delete { table: IMAGES, key };
            self.storage.commit(dropped.into_iter().map(delete).collect())?;
        }
        *self.images_mut() = images;
        Ok(())
    }

    /// Whether the configuration pins one of its names.
    fn is_pinned(&self, record: &ImageRecord) -> bool {
        record.names().chain([&record.id]).any(|name| self.pinned.contains(name))
    }

    fn find(&self, name: &str) -> Result<Option<ImageRecord>, ImageError> {
        let images = self.images();
        if let Some(record) = images.get(name) {
            return Ok(Some(record.clone()));
        }
        let parsed = name.parse::<Reference>();
        if let Ok(reference) = &parsed {
            let normal = reference.to_string();
            let named = |record: &&ImageRecord| record.names().any(|known| *known == normal);
            if let Some(record) = images.values().find(named) {
                return Ok(Some(record.clone()));
            }
        }
        let digits = name.strip_prefix("sha256:").unwrap_or(name);
        let is_hex = !digits.is_empty() && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if is_hex {
            let prefix = format!("sha256:{digits}");
            let mut fitting = images.range(prefix.clone()..).take_while(|(id, _)| id.starts_with(&prefix));
            let Some((_, first)) = fitting.next() else { return Ok(None) };
            let others = fitting.count();
            if others > 0 {
                return Err(ImageError::Ambiguous { prefix: name.to_owned(), matches: others + 1 });
            }
            return Ok(Some(first.clone()));
        }
        parsed.map(|_| None).map_err(ImageError::Reference)
    }

    /// The image that was made of this manifest, if all of it is here. It may be removed meanwhile; its files
    /// stay as long as the pins.
    pub(crate) fn whole(self: &Arc<Self>, manifest: &Digest) -> Option<(ImageRecord, Pins)> {
        let wanted = manifest.to_string();
        let record = self.images().values().find(|record| record.manifest_digest == wanted)?.clone();
        let pins = self.pin(files::keys(&record));
        self.files.has_all(&record).then_some((record, pins))
    }

    /// Commits a pulled image: its tags move here from other images, its former names stay.
    pub(crate) fn record(&self, mut new: ImageRecord) -> Result<ImageRecord, StoreError> {
        let _writer = locked(&self.committing);
        let mut changed = Vec::new();
        for record in self.images().values() {
            if record.id == new.id {
                new.absorb(record);
            } else if record
                .repo_tags
                .iter()
                .chain(&record.other_names)
                .any(|tag| new.names().any(|n| n == tag))
            {
                let mut record = record.clone();
                record.repo_tags.retain(|tag| !new.repo_tags.contains(tag));
                record.other_names.retain(|name| !new.other_names.contains(name));
                record.pinned = self.is_pinned(&record);
                changed.push(record);
            }
        }
        new.pinned = self.is_pinned(&new);
        changed.push(new.clone());
        let mut changes = Vec::with_capacity(changed.len());
        for record in &changed {
            let value = serde_json::to_vec(record)
                .map_err(|source| StoreError::Encode { id: record.id.clone(), source })?;
            changes.push(Change::Put { table: IMAGES, key: record.id.clone(), value });
        }
        self.storage.commit(changes)?;
        let mut images = self.images_mut();
        for record in changed {
            images.insert(record.id.clone(), record);
        }
        Ok(new)
    }

    fn remove(&self, name: &str) -> Result<Option<ImageRecord>, ImageError> {
        let writer = locked(&self.committing);
        let Some(record) = self.find(name)? else { return Ok(None) };
        let delete = Change::Delete { table: IMAGES, key: record.id.clone() };
        self.storage.commit(vec![delete]).map_err(|error| ImageError::Store(error.into()))?;
        self.images_mut().remove(&record.id);
        drop(writer);
        record.layers.iter().for_each(|layer| self.files.touch(&layer.file));
        self.sweep().map_err(ImageError::Store)?;
        Ok(Some(record))
    }

    /// Removes the files that neither a record nor a pull names; of layers, those that have been of no use the
    /// longest, until the rest is within the configured budget.
    pub(crate) fn sweep(&self) -> Result<(), StoreError> {
        // Pulls pin a file before they look for it, so none can start to rely on one meanwhile.
        let pins = locked(&self.pins);
        let images = self.images();
        let mut kept: BTreeSet<String> = pins.keys().cloned().collect();
        for record in images.values() {
            kept.extend(files::keys(record));
        }
        self.files.remove_others(&kept, self.config.cache_bytes)?;
        self.forget_missing()
    }

    /// Keeps files from being collected until the guard is dropped.
    pub(crate) fn pin(self: &Arc<Self>, keys: Vec<String>) -> Pins {
        let mut pins = locked(&self.pins);
        for key in &keys {
            *pins.entry(key.clone()).or_default() += 1;
        }
        drop(pins);
        Pins { store: Arc::clone(self), keys }
    }

    /// The lock of something being made. It is always an image first, then one of its layers as part of its chain, then
    /// that layer for itself. Chains are locked from the bottom up, and a chain's prefixes are shorter than it; who has
    /// the lock of a layer for itself waits for no other layer. So waiting never goes in a circle.
    pub(crate) fn flight(&self, key: String) -> Arc<tokio::sync::Mutex<()>> {
        let mut flights = locked(&self.flights);
        flights.retain(|_, flight| flight.strong_count() > 0);
        if let Some(flight) = flights.get(&key).and_then(Weak::upgrade) {
            return flight;
        }
        let flight = Arc::default();
        flights.insert(key, Arc::downgrade(&flight));
        flight
    }
}

/// An image whose files stay while it lives.
#[must_use]
pub struct HeldImage {
    /// What a box needs to run it.
    pub image: ResolvedImage,
    _pins: Pins,
}

/// Files that are kept while it lives.
pub(crate) struct Pins {
    store: Arc<Inner>,
    keys: Vec<String>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut pins = locked(&self.store.pins);
        for key in &self.keys {
            if let Some(count) = pins.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    pins.remove(key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Callers run pulls as tasks of their own.
    #[test]
    fn a_pull_can_be_spawned() {
        fn spawnable<F: Future + Send + 'static>(_: impl FnOnce(ImageStore) -> F) {}
        spawnable(|store| async move { store.pull("x", None, None).await });
    }
}
