//! One layer of a pull.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use tempfile::NamedTempFile;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use super::lower::PendingLower;
use super::source::{LayerSource, Source};
use crate::digest::Digest;
use crate::erofs::{Reader, ReaderError};
use crate::error::{PullCause, Stage};
use crate::layer::{Converted, Expected, build};
use crate::manifest::ManifestError;
use crate::progress::PullProgress;
use crate::record::LayerRecord;
use crate::registry::BlobSink;
use crate::store::{Files, Inner, StoreError, blocking};

/// Pieces of a blob between the network and the thread that converts it: a bound on memory.
const QUEUE: usize = 32;

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
    ) -> Result<LayerRecord, PullCause> {
        let flight = self.store.flight(&self.chain_id);
        let _alone = flight.lock().await;
        progress.layer_started(self.digest(), self.source.size());
        let existing = {
            let (files, names) = (self.store.files.clone(), self.file_names());
            blocking(move || names.into_iter().find_map(|name| sound(&files, name))).await?
        };
        let reused = existing.is_some();
        let (file, size, empty) = match existing {
            Some(found) => found,
            None => {
                let file = self.make(source, &progress).await?;
                let path = self.store.files.erofs(&file);
                let (size, empty) = blocking(move || measure(&path)).await??;
                (file, size, empty)
            }
        };
        let path = self.store.files.erofs(&file);
        let digest = self.digest().to_string();
        progress.layer_finished(self.digest(), reused);
        self.ready.send_replace(Some(path));
        Ok(LayerRecord { diff_id: self.diff_id.to_string(), digest, file, size, empty })
    }

    /// Downloads and converts the layer; returns the name of its file.
    async fn make(&self, source: &Source, progress: &Arc<dyn PullProgress>) -> Result<String, PullCause> {
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
        let converted = match (&self.source, source) {
            (LayerSource::Registry(blob), Source::Registry(repository)) => {
                let (sender, receiver) = mpsc::channel(QUEUE);
                let reader = Pieces { receiver, piece: Bytes::new(), ended: false };
                let converting = self.convert(reader, output);
                let mut sink = Feed {
                    sender,
                    progress: Arc::clone(progress),
                    layer: blob.digest.clone(),
                    downloaded: 0,
                };
                let feeding = async {
                    let fed = repository.blob(&blob.digest, blob.size, &mut sink).await;
                    if fed.is_ok() {
                        // A reader that has gone away told why.
                        let _ = sink.sender.send(Piece::End).await;
                    }
                    drop(sink);
                    fed
                };
                let (fed, converted) = tokio::join!(feeding, converting);
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
                let reader = WatchedFile {
                    file,
                    alive: Arc::downgrade(&alive),
                    progress: Arc::clone(progress),
                    layer: self.digest().clone(),
                    read: 0,
                };
                let converted = self.convert(reader, output).await;
                drop(alive);
                converted?
            }
            (LayerSource::Registry(_), Source::Local(..)) => {
                return Err(ManifestError::NotAnImage { problem: "local, but its layers are not" }.into());
            }
        };
        self.publish(temporary, converted).await
    }

    async fn convert(
        &self,
        reader: impl Read + Send + 'static,
        output: File,
    ) -> Result<Converted, PullCause> {
        let expected = Expected {
            blob: self.source.digest().cloned(),
            size: self.source.size(),
            diff_id: self.diff_id.clone(),
        };
        let mut lower = PendingLower { runtime: Handle::current(), below: self.below.clone(), stack: None };
        let (limits, spool) = (self.store.config.limits, self.store.files.tmp());
        let work = move || build(reader, &expected, output, &spool, &mut lower, &limits);
        Ok(blocking(work).await??)
    }

    async fn publish(&self, temporary: NamedTempFile, converted: Converted) -> Result<String, PullCause> {
        let [own, chained] = self.file_names();
        let name = if converted.depends_on_lower { chained } else { own };
        let (store, file) = (Arc::clone(&self.store), name.clone());
        blocking(move || store.publish_layer(temporary, &file)).await??;
        tracing::debug!(layer = %self.digest(), bytes = converted.bytes, inodes = converted.inodes, "layer converted");
        Ok(name)
    }
}

/// The file of that name with what [`measure`] finds, if it is there and whole. One that is not is made anew
/// under its name.
fn sound(files: &Files, name: String) -> Option<(String, u64, bool)> {
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

/// What goes from the network to the converting thread.
enum Piece {
    Bytes(Bytes),
    /// The blob is complete; without it the channel closed early.
    End,
}

struct Feed {
    sender: mpsc::Sender<Piece>,
    progress: Arc<dyn PullProgress>,
    layer: Digest,
    downloaded: u64,
}

impl BlobSink for Feed {
    async fn take(&mut self, bytes: Bytes) -> bool {
        self.downloaded += bytes.len() as u64;
        self.progress.layer_bytes(&self.layer, self.downloaded);
        self.sender.send(Piece::Bytes(bytes)).await.is_ok()
    }
}

/// The converting thread's end of the channel.
struct Pieces {
    receiver: mpsc::Receiver<Piece>,
    piece: Bytes,
    ended: bool,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            match self.receiver.blocking_recv() {
                Some(Piece::Bytes(bytes)) => self.piece = bytes,
                Some(Piece::End) => self.ended = true,
                None => return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the download stopped")),
            }
        }
        let n = buffer.len().min(self.piece.len());
        buffer[..n].copy_from_slice(&self.piece.split_to(n));
        Ok(n)
    }
}

/// A blob in a file, read as long as the pull lives.
struct WatchedFile {
    file: io::Take<File>,
    alive: Weak<()>,
    progress: Arc<dyn PullProgress>,
    layer: Digest,
    read: u64,
}

impl Read for WatchedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.alive.strong_count() == 0 {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the pull was given up"));
        }
        let n = self.file.read(buffer)?;
        self.read += n as u64;
        if n > 0 {
            self.progress.layer_bytes(&self.layer, self.read);
        }
        Ok(n)
    }
}
