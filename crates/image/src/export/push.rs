//! Pushes: an image of the store, its layers packed anew, or one of a layout as it is.

use std::sync::Arc;

use tempfile::NamedTempFile;

use super::{Documents, Export, ExportError, MANIFEST_TYPE, descriptor, io_error};
use crate::auth::RegistryAuth;
use crate::digest::Digest;
use crate::hosts::hosts_for;
use crate::local::FileRange;
use crate::reference::{Reference, Version};
use crate::registry::Repository;
use crate::store::{ImageStore, blocking};

impl ImageStore {
    /// Uploads an image of the store under a registry's `NAME[:TAG]` and returns the digest of its manifest.
    ///
    /// # Errors
    /// The image is not in the store, the destination is no tag, or the registry does not take it.
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
            Ok((repository, Export::open(&store, &name)?))
        };
        let (repository, mut export) = blocking(open).await??;
        let destination = repository.into_destination().await?;
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

fn range(file: &NamedTempFile, length: u64) -> FileRange {
    FileRange { path: file.path().to_owned(), offset: 0, length }
}
