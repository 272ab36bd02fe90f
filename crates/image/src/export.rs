//! Images out of the store: layers as tars again, with a config and a manifest that fit them.
//!
//! The store keeps what boxes mount and not the blobs that it came from, so the tars are made from the trees. They
//! hold the same files but are other bytes: the digests differ from the registry's. The same image gives the same
//! bytes each time, also after it was loaded again.

mod push;
mod tar;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::NamedTempFile;
use thiserror::Error;

use crate::digest::Digest;
use crate::error::ImageError;
use crate::hosts::HostsError;
use crate::local::{LocalError, blob_name};
use crate::manifest::Descriptor;
use crate::record::ImageRecord;
use crate::reference::{Reference, Version};
use crate::registry::RegistryError;
use crate::store::{Files, ImageStore, Pins, StoreError};

pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// An image that could not be saved or pushed.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The image is not in the store, or its name is none.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file of it or of the output.
    #[error("could not {action} {object}")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// With what.
        object: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The config in the store is not what it was.
    #[error("the config of image {id} cannot be used: pull the image again")]
    Config {
        /// The image.
        id: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The destination is not in a registry under a tag.
    #[error("{destination} is not NAME or NAME:TAG of a registry")]
    Destination {
        /// What was given.
        destination: String,
    },
    /// The layout that is pushed.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The registry's configuration.
    #[error(transparent)]
    Hosts(#[from] HostsError),
    /// The registry.
    #[error("the registry did not take the image")]
    Registry(#[from] RegistryError),
}

pub(crate) fn io_error(action: &'static str, object: impl ToString) -> impl FnOnce(io::Error) -> ExportError {
    move |source| ExportError::Io { action, object: object.to_string(), source }
}

/// An image on its way out of the store. Its files stay meanwhile.
pub(crate) struct Export {
    pub(crate) record: ImageRecord,
    files: Files,
    layers: Vec<Descriptor>,
    _pins: Pins,
}

/// What describes the exported layers.
pub(crate) struct Documents {
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
}

impl Export {
    pub(crate) fn open(store: &ImageStore, name: &str) -> Result<Self, ExportError> {
        let gone = || ImageError::NoSuchImage { name: name.to_owned() };
        let record = store.find(name)?.ok_or_else(gone)?;
        let manifest = record.manifest_digest.parse().map_err(|_| gone())?;
        let (record, pins) = store.inner.whole(&manifest).ok_or_else(gone)?;
        Ok(Self { record, files: store.inner.files.clone(), layers: Vec::new(), _pins: pins })
    }

    /// The next layer, lowest first, as a tar in a file that vanishes when dropped.
    pub(crate) fn next_layer(&mut self) -> Result<Option<(NamedTempFile, Descriptor)>, ExportError> {
        let Some(layer) = self.record.layers.get(self.layers.len()) else { return Ok(None) };
        let erofs = self.files.erofs(&layer.file);
        let mut file = self.files.temporary()?;
        let source = (!layer.empty).then(|| File::open(&erofs)).transpose();
        let source = source.map_err(io_error("read", erofs.display()))?;
        let (digest, size) =
            tar::write(source, file.as_file_mut()).map_err(io_error("make a tar of", erofs.display()))?;
        file.rewind().map_err(io_error("read", file.path().display()))?;
        let descriptor = Descriptor { digest, size };
        self.layers.push(descriptor.clone());
        Ok(Some((file, descriptor)))
    }

    /// The documents, once all layers were taken.
    pub(crate) fn documents(&self) -> Result<Documents, ExportError> {
        let id = &self.record.id;
        let path = match id.parse() {
            Ok(digest) => self.files.root().join(Files::blob_key(&digest)),
            Err(_) => PathBuf::from(id),
        };
        let bytes = std::fs::read(&path).map_err(io_error("read", path.display()))?;
        let wrong = |source| ExportError::Config { id: id.clone(), source };
        let mut config: serde_json::Map<String, Value> = serde_json::from_slice(&bytes).map_err(wrong)?;
        // A plain tar has its diff id for its digest.
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| layer.digest.to_string()).collect();
        config.insert("rootfs".to_owned(), json!({ "type": "layers", "diff_ids": diff_ids }));
        let config = Value::Object(config).to_string().into_bytes();
        let described = |kind: &str, descriptor: &Descriptor| json!({ "mediaType": kind, "digest": descriptor.digest.to_string(), "size": descriptor.size });
        let layers: Vec<_> = self.layers.iter().map(|layer| described(LAYER_TYPE, layer)).collect();
        let mut manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": layers,
            "config": described(CONFIG_TYPE, &descriptor(&config)),
        });
        if !self.record.annotations.is_empty() {
            manifest["annotations"] = json!(self.record.annotations);
        }
        Ok(Documents { config, manifest: manifest.to_string().into_bytes() })
    }
}

pub(crate) fn descriptor(bytes: &[u8]) -> Descriptor {
    Descriptor { digest: Digest::sha256(bytes), size: bytes.len() as u64 }
}

impl ImageStore {
    /// Writes an image as an OCI layout in a tar and returns the digest of its manifest. Blocks on the disk and on
    /// the output; needs the space of the largest layer beside it.
    ///
    /// # Errors
    /// The image is not in the store, its files are damaged, or the output takes no more.
    pub fn save(&self, name: &str, output: impl Write) -> Result<Digest, ExportError> {
        let mut export = Export::open(self, name)?;
        let mut archive = Archive { tar: ::tar::Builder::new(output), written: BTreeSet::new() };
        while let Some((file, layer)) = export.next_layer()? {
            archive.add(&blob_name(&layer.digest), layer.size, file)?;
        }
        let Documents { config, manifest } = export.documents()?;
        let digest = descriptor(&manifest).digest;
        let mut entry =
            json!({ "mediaType": MANIFEST_TYPE, "digest": digest.to_string(), "size": manifest.len() });
        if let Some(tag) = tag(name, &export.record) {
            entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        }
        let index = json!({ "schemaVersion": 2, "manifests": [entry] }).to_string().into_bytes();
        for (name, bytes) in [
            (blob_name(&descriptor(&config).digest), config),
            (blob_name(&digest), manifest),
            ("index.json".to_owned(), index),
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ] {
            archive.add(&name, bytes.len() as u64, &bytes[..])?;
        }
        let written = archive.tar.into_inner().and_then(|mut output| output.flush());
        written.map_err(io_error("write", "the archive"))?;
        Ok(digest)
    }
}

/// The name that an image was asked for by, if it is a tag of it, or its first tag.
fn tag<'a>(name: &str, record: &'a ImageRecord) -> Option<&'a String> {
    let asked = match name.parse() {
        Ok(Reference::Registry(name)) if matches!(name.version(), Version::Tag(_)) => name.to_string(),
        Ok(Reference::Registry(_) | Reference::Local(_)) | Err(_) => String::new(),
    };
    record.repo_tags.iter().find(|tag| **tag == asked).or(record.repo_tags.first())
}

struct Archive<W: Write> {
    tar: ::tar::Builder<W>,
    /// Equal layers are one blob.
    written: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    fn add(&mut self, name: &str, size: u64, content: impl io::Read) -> Result<(), ExportError> {
        if !self.written.insert(name.to_owned()) {
            return Ok(());
        }
        let mut header = ::tar::Header::new_ustar();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_mtime(0);
        self.tar.append_data(&mut header, Path::new(name), content).map_err(io_error("write", "the archive"))
    }
}
