//! Pushes: an image of the store, its layers packed anew, or one of a layout as it is.

use std::sync::Arc;

use tempfile::NamedTempFile;

use super::{Documents, Export, ExportError, MANIFEST_TYPE, descriptor, io_error};
use crate::auth::RegistryAuth;
use crate::digest::Digest;
use crate::hosts::hosts_for;
use crate::local::{FileRange, LocalError, LocalFiles, blob_name};
use crate::manifest::Descriptor;
use crate::reference::{LocalKind, LocalReference, Reference, Version};
use crate::registry::{Destination, Repository};
use crate::store::{ImageStore, blocking};

const DOCKER_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";

impl ImageStore {
    /// Uploads an image under a registry's `NAME[:TAG]` and returns the digest of its manifest: one of the store with
    /// its layers packed anew, one of a layout (`oci:`, `oci-archive:`) as it is.
    ///
    /// # Errors
    /// The image is not in the store or cannot be read, the destination is no tag, or the registry does not take it.
    pub async fn push(
        &self,
        name: &str,
        destination: &str,
        auth: Option<RegistryAuth>,
    ) -> Result<Digest, ExportError> {
        let wrong = || ExportError::Destination { destination: destination.to_owned() };
        let Ok(Reference::Registry(reference)) = destination.parse() else { return Err(wrong()) };
        let Version::Tag(tag) = reference.version().clone() else { return Err(wrong()) };
        let (inner, store, name) = (Arc::clone(&self.inner), self.clone(), name.to_owned());
        let open = move || -> Result<_, ExportError> {
            let config = &inner.config;
            let hosts = hosts_for(reference.domain(), &config.certs_dirs)?;
            let repository = Repository::new(&reference, hosts, auth, config.timeouts, config.retries)?;
            let source = match name.parse() {
                Ok(Reference::Local(layout)) if layout.kind != LocalKind::DockerArchive => {
                    Source::Layout(Layout::open(&layout, config.limits.manifest_bytes)?)
                }
                Ok(Reference::Local(_) | Reference::Registry(_)) | Err(_) => {
                    Source::Store(Box::new(Export::open(&store, &name)?))
                }
            };
            Ok((repository, source))
        };
        let (repository, source) = blocking(open).await??;
        let destination = repository.into_destination().await?;
        let mut export = match source {
            Source::Layout(layout) => return layout.push(&destination, &tag).await,
            Source::Store(export) => *export,
        };
        loop {
            let (returned, layer) = blocking(move || {
                let layer = export.next_layer();
                (export, layer)
            })
            .await?;
            export = returned;
            let Some((file, layer)) = layer? else { break };
            destination.blob(&layer, &range(&file, layer.size)).await?;
        }
        let (documents, file) = blocking(move || -> Result<_, ExportError> {
            let documents = export.documents()?;
            let file = export.files.temporary()?;
            std::fs::write(file.path(), &documents.config)
                .map_err(io_error("write", file.path().display()))?;
            Ok((documents, file))
        })
        .await??;
        let Documents { config, manifest } = documents;
        destination.blob(&descriptor(&config), &range(&file, config.len() as u64)).await?;
        destination.manifest(&tag, MANIFEST_TYPE, &manifest).await?;
        Ok(descriptor(&manifest).digest)
    }
}

/// What is pushed.
enum Source {
    Store(Box<Export>),
    Layout(Layout),
}

/// An image of a layout: its blobs, the config last, and its manifest.
struct Layout {
    blobs: Vec<(Descriptor, FileRange)>,
    manifest: Vec<u8>,
}

impl Layout {
    fn open(reference: &LocalReference, limit: u64) -> Result<Self, ExportError> {
        let files = LocalFiles::open(reference)?;
        let (image, manifest) = files.layout_image(reference.name.as_deref(), limit)?;
        let mut blobs = Vec::with_capacity(image.layers.len() + 1);
        for blob in image.layers.into_iter().chain([image.config]) {
            let range = files.find(&blob_name(&blob.digest))?;
            if range.length != blob.size {
                let (path, digest) = (reference.path.clone(), blob.digest);
                return Err(LocalError::Digest { path, digest }.into());
            }
            blobs.push((blob, range));
        }
        Ok(Self { blobs, manifest })
    }

    async fn push(self, destination: &Destination, tag: &str) -> Result<Digest, ExportError> {
        for (blob, range) in &self.blobs {
            destination.blob(blob, range).await?;
        }
        destination.manifest(tag, media_type(&self.manifest), &self.manifest).await?;
        Ok(descriptor(&self.manifest).digest)
    }
}

/// What a manifest says that it is: OCI's may leave it out, docker's do not.
fn media_type(manifest: &[u8]) -> &'static str {
    let said = serde_json::from_slice::<serde_json::Value>(manifest).ok();
    match said.as_ref().and_then(|manifest| manifest["mediaType"].as_str()) {
        Some(DOCKER_TYPE) => DOCKER_TYPE,
        Some(_) | None => MANIFEST_TYPE,
    }
}

fn range(file: &NamedTempFile, length: u64) -> FileRange {
    FileRange { path: file.path().to_owned(), offset: 0, length }
}
