//! Where an image comes from.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::auth::RegistryAuth;
use crate::config::Limits;
use crate::digest::Digest;
use crate::error::PullCause;
use crate::hosts::hosts_for;
use crate::local::{FileRange, LocalFiles, blob_name, layout_tag};
use crate::manifest::{Descriptor, Document, Manifest, ManifestError, Platform, parse};
use crate::reference::{LocalKind, LocalReference, Reference, Version};
use crate::registry::Repository;
use crate::store::{Inner, blocking};

/// How deep indexes may nest.
const MAX_DEPTH: usize = 3;

/// An opened source.
pub(super) enum Source {
    Registry(Box<Repository>),
    Local(LocalReference, Arc<LocalFiles>),
}

/// What a source has under a reference.
pub(super) struct Found {
    /// The bytes of the manifest for this platform; of a docker archive, which has none, its config.
    pub(super) manifest: Vec<u8>,
    pub(super) manifest_digest: Digest,
    pub(super) config: ConfigSource,
    pub(super) layers: Vec<LayerSource>,
    pub(super) annotations: BTreeMap<String, String>,
    /// `NAME:TAG` and `NAME@DIGEST` that the image has from now on.
    pub(super) tags: Vec<String>,
    pub(super) digests: Vec<String>,
}

pub(super) enum ConfigSource {
    Blob(Descriptor),
    /// Already read.
    Bytes(Vec<u8>),
}

/// A layer's blob.
#[derive(Clone)]
pub(super) enum LayerSource {
    Registry(Descriptor),
    /// In a file of this machine; a docker archive states no digest.
    File {
        range: FileRange,
        stated: Option<Descriptor>,
    },
}

impl LayerSource {
    pub(super) fn size(&self) -> Option<u64> {
        match self {
            Self::Registry(descriptor) => Some(descriptor.size),
            Self::File { range, stated: None } => Some(range.length),
            Self::File { stated: Some(descriptor), .. } => Some(descriptor.size),
        }
    }

    pub(super) fn digest(&self) -> Option<&Digest> {
        match self {
            Self::Registry(descriptor) => Some(&descriptor.digest),
            Self::File { stated, .. } => stated.as_ref().map(|descriptor| &descriptor.digest),
        }
    }
}

impl Source {
    pub(super) async fn open(
        store: &Arc<Inner>,
        reference: &Reference,
        auth: Option<RegistryAuth>,
    ) -> Result<Self, PullCause> {
        match reference.clone() {
            Reference::Registry(reference) => {
                let store = Arc::clone(store);
                let open = move || {
                    let config = &store.config;
                    let hosts = hosts_for(reference.domain(), &config.certs_dirs)?;
                    Repository::new(&reference, hosts, auth, config.timeouts, config.retries)
                };
                Ok(Self::Registry(Box::new(blocking(open).await??)))
            }
            Reference::Local(local) => {
                let wanted = local.clone();
                let files = blocking(move || LocalFiles::open(&wanted)).await??;
                Ok(Self::Local(local, Arc::new(files)))
            }
        }
    }

    pub(super) async fn find(&self, reference: &Reference, limits: &Limits) -> Result<Found, PullCause> {
        match (self, reference) {
            (Self::Registry(repository), Reference::Registry(reference)) => {
                let first = repository.manifest(reference.version(), limits.manifest_bytes).await?;
                // Kubernetes knows an image by what the tag pointed to, be it an index.
                let digests = vec![format!("{}@{}", reference.repository(), first.digest)];
                let tags = match reference.version() {
                    Version::Tag(_) => vec![reference.to_string()],
                    Version::Digest(_) => Vec::new(),
                };
                let chosen = self.choose(first.bytes, first.digest, limits).await?;
                found(chosen, limits, tags, digests, |layer| Ok(LayerSource::Registry(layer)))
            }
            (Self::Local(local, files), _) if local.kind == LocalKind::DockerArchive => {
                let (files, wanted, limits) = (Arc::clone(files), local.name.clone(), *limits);
                blocking(move || docker_archive(&files, wanted.as_deref(), &limits)).await?
            }
            (Self::Local(local, files), _) => self.layout(files, local.name.clone(), limits).await,
            (Self::Registry(_), Reference::Local(_)) => {
                Err(ManifestError::NotAnImage { problem: "sought in a registry but named as a file" }.into())
            }
        }
    }

    /// An image of an OCI layout.
    async fn layout(
        &self,
        files: &Arc<LocalFiles>,
        wanted: Option<String>,
        limits: &Limits,
    ) -> Result<Found, PullCause> {
        let (opened, limit) = (Arc::clone(files), limits.manifest_bytes);
        let (entry, name) = blocking(move || opened.layout_entry(wanted.as_deref(), limit)).await??;
        let digest = entry.digest.clone();
        let bytes = self.document(entry, limits).await?;
        let chosen = self.choose(bytes, digest, limits).await?;
        let tags = name.and_then(|name| layout_tag(&name));
        let (files, limits) = (Arc::clone(files), *limits);
        let layers = move || {
            found(chosen, &limits, tags.into_iter().collect(), Vec::new(), |layer| {
                let range = files.find(&blob_name(&layer.digest))?;
                Ok(LayerSource::File { range, stated: Some(layer) })
            })
        };
        blocking(layers).await?
    }

    /// Follows indexes to the manifest for this platform.
    async fn choose(
        &self,
        mut bytes: Vec<u8>,
        mut digest: Digest,
        limits: &Limits,
    ) -> Result<Chosen, PullCause> {
        for _ in 0..=MAX_DEPTH {
            match parse(&bytes)? {
                Document::Manifest(manifest) => return Ok(Chosen { bytes, digest, manifest }),
                Document::Index(index) => {
                    let descriptor = index.choose(&Platform::host())?;
                    digest = descriptor.digest.clone();
                    bytes = self.document(descriptor, limits).await?;
                }
            }
        }
        Err(ManifestError::TooDeep { limit: MAX_DEPTH }.into())
    }

    /// A manifest or index by its digest and size.
    async fn document(&self, descriptor: Descriptor, limits: &Limits) -> Result<Vec<u8>, PullCause> {
        let limit = limits.manifest_bytes;
        let Descriptor { digest, size: stated } = descriptor;
        if stated > limit {
            return Err(ManifestError::TooLarge { what: "manifest", size: stated, limit }.into());
        }
        let bytes = match self {
            Self::Registry(repository) => {
                repository.manifest(&Version::Digest(digest.clone()), limit).await?.bytes
            }
            Self::Local(_, files) => {
                let (files, digest) = (Arc::clone(files), digest.clone());
                blocking(move || files.read_blob(&digest, limit)).await??
            }
        };
        let got = bytes.len() as u64;
        if got != stated {
            return Err(ManifestError::Size { digest, stated, got }.into());
        }
        Ok(bytes)
    }

    pub(super) async fn config(&self, found: &Found, limit: u64) -> Result<Vec<u8>, PullCause> {
        let descriptor = match &found.config {
            ConfigSource::Bytes(bytes) => return Ok(bytes.clone()),
            ConfigSource::Blob(descriptor) => descriptor,
        };
        if descriptor.size > limit {
            return Err(ManifestError::TooLarge { what: "image config", size: descriptor.size, limit }.into());
        }
        match self {
            Self::Registry(repository) => {
                Ok(repository.small_blob(&descriptor.digest, descriptor.size, "image config").await?)
            }
            Self::Local(_, files) => {
                let (files, digest) = (Arc::clone(files), descriptor.digest.clone());
                Ok(blocking(move || files.read_blob(&digest, limit)).await??)
            }
        }
    }
}

/// The manifest for this platform, as bytes and read.
struct Chosen {
    bytes: Vec<u8>,
    digest: Digest,
    manifest: Manifest,
}

fn found(
    chosen: Chosen,
    limits: &Limits,
    tags: Vec<String>,
    digests: Vec<String>,
    layer: impl Fn(Descriptor) -> Result<LayerSource, PullCause>,
) -> Result<Found, PullCause> {
    let Chosen { bytes, digest, manifest } = chosen;
    check_count(manifest.layers.len(), limits)?;
    Ok(Found {
        manifest: bytes,
        manifest_digest: digest,
        config: ConfigSource::Blob(manifest.config),
        layers: manifest.layers.into_iter().map(layer).collect::<Result<_, _>>()?,
        annotations: manifest.annotations,
        tags,
        digests,
    })
}

fn check_count(layers: usize, limits: &Limits) -> Result<(), ManifestError> {
    if layers > limits.layers {
        return Err(ManifestError::TooManyLayers { layers, limit: limits.layers });
    }
    Ok(())
}

/// An image of a docker archive. Blocks on the disk.
fn docker_archive(files: &LocalFiles, wanted: Option<&str>, limits: &Limits) -> Result<Found, PullCause> {
    let entry = files.docker_entry(wanted, limits.manifest_bytes)?;
    check_count(entry.layers().len(), limits)?;
    let config = files.read(&entry.config, limits.config_bytes)?;
    let layers = entry
        .layers()
        .iter()
        .map(|name| Ok(LayerSource::File { range: files.find(name)?, stated: None }))
        .collect::<Result<_, PullCause>>()?;
    Ok(Found {
        manifest_digest: Digest::sha256(&config),
        manifest: config.clone(),
        config: ConfigSource::Bytes(config),
        layers,
        annotations: BTreeMap::new(),
        tags: entry.tags(),
        digests: Vec::new(),
    })
}
