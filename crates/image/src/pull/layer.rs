//! One layer of a pull.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tempfile::NamedTempFile;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::feed::{self, Meter, WatchedFile};
use super::lower::PendingLower;
use super::source::{LayerSource, Source};
use super::traffic::Turn;
use crate::digest::Digest;
use crate::erofs::{Reader, ReaderError};
use crate::error::{PullCause, Stage};
use crate::layer::{BuildError, Converted, Expected, build};
use crate::manifest::ManifestError;
use crate::progress::PullProgress;
use crate::record::LayerRecord;
use crate::store::{Files, Inner, StoreError, blocking};

/// A layer in the store, and what its blob had, unless it was there before.
pub(super) type Made = (LayerRecord, Option<u64>);

/// The name of a layer's file, its size, and whether it brings nothing at all.
type LayerFile = (String, u64, bool);

/// The file of a layer, once it is in the store.
pub(super) type LayerReady = Option<PathBuf>;

/// What is to be done for one layer.
pub(super) struct LayerJob {
    pub(super) store: Arc<Inner>,
    pub(super) index: usize,
    pub(super) count: usize,
    pub(super) diff_id: Digest,
    pub(super) chain_id: Digest,
    pub(super) source: LayerSource,
    /// Told once the layer is there; dropped when it failed.
    pub(super) ready: watch::Sender<LayerReady>,
    /// The layers below, lowest first.
    pub(super) below: Vec<watch::Receiver<LayerReady>>,
}

impl LayerJob {
    pub(super) fn stage(&self) -> Stage {
        Stage::Layer { index: self.index + 1, count: self.count, digest: self.digest().to_string() }
    }

    /// What the layer is called in messages: its blob, where that has a digest.
    fn digest(&self) -> &Digest {
        self.source.digest().unwrap_or(&self.diff_id)
    }

    /// The name of its file when it stands for itself, and when it does for these lower layers only.
    fn file_names(&self) -> [String; 2] {
        [format!("{}.erofs", self.diff_id.hex()), format!("chain-{}.erofs", self.chain_id.hex())]
    }

    /// The files it may come to rely on.
    pub(super) fn keys(&self) -> [String; 2] {
        self.file_names().map(|file| Files::erofs_key(&file))
    }

    /// Finds the layer in the store or makes it.
    pub(super) async fn run(
        self,
        source: &Source,
        progress: Arc<dyn PullProgress>,
    ) -> Result<Made, PullCause> {
        let flight = self.store.flight(format!("chain {}", self.chain_id));
        let _alone = flight.lock().await;
        progress.layer_started(self.digest(), self.source.size());
        let begun = Instant::now();
        let (found, reused) = match self.existing().await? {
            Some(found) => (found, true),
            None => self.obtain(source, &progress).await?,
        };
        let (file, size, empty) = found;
        let path = self.store.files.erofs(&file);
        let digest = self.digest().to_string();
        let traffic = &self.store.traffic;
        let count = if reused { &traffic.layers_reused } else { &traffic.layers_made };
        count.fetch_add(1, Ordering::Relaxed);
        let (bytes, ms) = (self.source.size(), begun.elapsed().as_millis());
        tracing::debug!(layer = %digest, reused, bytes, erofs_bytes = size, ms, "layer ready");
        progress.layer_finished(self.digest(), reused);
        self.ready.send_replace(Some(path));
        let record = LayerRecord { diff_id: self.diff_id.to_string(), digest, file, size, empty };
        Ok((record, (!reused).then_some(bytes.unwrap_or(0))))
    }

    /// The layer's file in the store.
    async fn existing(&self) -> Result<Option<LayerFile>, PullCause> {
        let (files, names) = (self.store.files.clone(), self.file_names());
        Ok(blocking(move || names.into_iter().find_map(|name| sound(&files, name))).await?)
    }

    /// Makes the layer, unless somebody who makes the same one above other layers does; the latter is told.
    async fn obtain(
        &self,
        source: &Source,
        progress: &Arc<dyn PullProgress>,
    ) -> Result<(LayerFile, bool), PullCause> {
        let alone = self.store.flight(format!("layer {}", self.diff_id)).lock_owned().await;
        if let Some(found) = self.existing().await? {
            return Ok((found, true));
        }
        let turn = Turn { _slot: self.store.traffic.slot().await, _alone: Some(alone) };
        let file = self.make(source, progress, turn).await?;
        let path = self.store.files.erofs(&file);
        let (size, empty) = blocking(move || measure(&path)).await??;
        Ok(((file, size, empty), false))
    }

    /// Downloads and converts the layer; returns the name of its file.
    async fn make(
        &self,
        source: &Source,
        progress: &Arc<dyn PullProgress>,
        turn: Turn,
    ) -> Result<String, PullCause> {
        let files = self.store.files.clone();
        let (temporary, output) = blocking(move || {
            let temporary = files.temporary()?;
            let output = temporary.reopen().map_err(|source| StoreError::Io {
                operation: "open",
                path: temporary.path().to_owned(),
                source,
            })?;
            Ok::<_, StoreError>((temporary, output))
        })
        .await??;
        let meter = Meter {
            progress: Arc::clone(progress),
            traffic: Arc::clone(&self.store.traffic),
            layer: self.digest().clone(),
            bytes: 0,
        };
        // Until the file has its name: others look for that.
        let (converted, _turn) = match (&self.source, source) {
            (LayerSource::Registry(blob), Source::Registry(repository)) => {
                let (mut feed, pieces) = feed::queue(meter);
                let feeding = async {
                    let fed = repository.blob(&blob.digest, blob.size, &mut feed).await;
                    if fed.is_ok() {
                        feed.end().await;
                    }
                    fed
                };
                let (fed, converted) = tokio::join!(feeding, self.convert(pieces, output, turn));
                // What broke the stream explains what the converter then saw.
                fed?;
                converted?
            }
            (LayerSource::File { range, .. }, _) => {
                let alive = Arc::new(());
                let file = range.open().map_err(|source| StoreError::Io {
                    operation: "read",
                    path: range.path.clone(),
                    source,
                })?;
                let reader = WatchedFile { file, alive: Arc::downgrade(&alive), meter };
                let converted = self.convert(reader, output, turn).await;
                drop(alive);
                converted?
            }
            (LayerSource::Registry(_), Source::Local(..)) => {
                return Err(ManifestError::NotAnImage { problem: "local, but its layers are not" }.into());
            }
        };
        self.publish(temporary, converted).await
    }

    /// Gives the turn back, if it is still the layer's own.
    async fn convert(
        &self,
        reader: impl Read + Send + 'static,
        output: File,
        turn: Turn,
    ) -> Result<(Converted, Option<Turn>), PullCause> {
        let expected = Expected {
            blob: self.source.digest().cloned(),
            size: self.source.size(),
            diff_id: self.diff_id.clone(),
        };
        let mut lower = PendingLower {
            runtime: Handle::current(),
            below: self.below.clone(),
            stack: None,
            traffic: Arc::clone(&self.store.traffic),
            turn: Some(turn),
        };
        let (limits, spool) = (self.store.config.limits, self.store.files.tmp());
        let work = move || {
            let converted = build(reader, &expected, output, &spool, &mut lower, &limits)?;
            Ok::<_, BuildError>((converted, lower.turn))
        };
        Ok(blocking(work).await??)
    }

    async fn publish(&self, temporary: NamedTempFile, converted: Converted) -> Result<String, PullCause> {
        let [own, chained] = self.file_names();
        let name = if converted.depends_on_lower { chained } else { own };
        let (store, file) = (Arc::clone(&self.store), name.clone());
        blocking(move || store.publish_layer(temporary, &file)).await??;
        Ok(name)
    }
}

/// The file of that name with what [`measure`] finds, if it is there and whole. One that is not is made anew
/// under its name.
fn sound(files: &Files, name: String) -> Option<LayerFile> {
    let path = files.erofs(&name);
    if !path.exists() {
        return None;
    }
    match measure(&path) {
        Ok((size, empty)) => {
            files.touch(&name);
            Some((name, size, empty))
        }
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "a layer in the store is damaged; it is fetched again");
            None
        }
    }
}

/// The length of an image and whether it brings nothing at all.
fn measure(path: &Path) -> Result<(u64, bool), PullCause> {
    let read = |source| StoreError::Io { operation: "read", path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    let size = file.metadata().map_err(read)?.len();
    let reader = Reader::open(file)?;
    if reader.bytes != size {
        return Err(ReaderError::Damaged("its length is not what its superblock says").into());
    }
    // A root alone brings nothing, unless it hides what is below.
    let empty = reader.inodes == 1 && reader.xattrs(&reader.root()?)?.iter().next().is_none();
    Ok((size, empty))
}
