//! Manifests, indexes and configs: OCI image-spec and docker schema 2.

use std::collections::BTreeMap;

use a3s_box_core::image::ImageConfig;
use serde::Deserialize;
use thiserror::Error;

use crate::digest::Digest;
use crate::kind::ErrorKind;

/// What we ask registries for.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// The document does not describe an image that we run.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// Not the JSON that it should be.
    #[error("the {what} is not valid JSON of its kind")]
    Json {
        /// Which document.
        what: &'static str,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The first format of docker, unsafe and gone since 2020.
    #[error(
        "the manifest has docker's schema 1, which is not supported: push the image again with a current tool"
    )]
    Schema1,
    /// Neither a manifest nor an index, or both at once.
    #[error("the document is {problem}")]
    NotAnImage {
        /// What it is.
        problem: &'static str,
    },
    /// A digest in it is malformed.
    #[error(transparent)]
    Digest(#[from] crate::digest::DigestError),
    /// A layer that must be fetched from elsewhere.
    #[error(
        "layer {digest} has the type {media_type}: layers that registries may not distribute are not supported"
    )]
    Foreign {
        /// Which layer.
        digest: String,
        /// Its media type.
        media_type: String,
    },
    /// A layer that is no tar, or encrypted.
    #[error("layer {digest} has the type {media_type:?}, which is not a tar, plain or with gzip or zstd")]
    LayerType {
        /// Which layer.
        digest: String,
        /// Its media type.
        media_type: String,
    },
    /// Nothing for this machine.
    #[error("no image for {wanted}; there are: {available}")]
    Platform {
        /// This machine's platform.
        wanted: String,
        /// What the index lists.
        available: String,
    },
    /// Config and manifest disagree.
    #[error("the manifest lists {layers} layers and the config {diff_ids} diff ids")]
    LayerCount {
        /// In the manifest.
        layers: usize,
        /// In the config.
        diff_ids: usize,
    },
    /// More layers than we take.
    #[error("the image has {layers} layers, more than the limit of {limit}")]
    TooManyLayers {
        /// How many.
        layers: usize,
        /// The limit.
        limit: usize,
    },
    /// Larger than we take.
    #[error("the {what} has {size} bytes, more than the limit of {limit}")]
    TooLarge {
        /// Which document.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// Its size is not the one that was stated where its digest was.
    #[error("manifest {digest} has {got} bytes, but its index states {stated}")]
    Size {
        /// Which manifest.
        digest: Digest,
        /// In the index.
        stated: u64,
        /// Of the document.
        got: u64,
    },
    /// Indexes in indexes, deeper than anyone builds.
    #[error("the index leads to more than {limit} further ones")]
    TooDeep {
        /// The limit.
        limit: usize,
    },
}

impl ManifestError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Json { .. }
            | Self::NotAnImage { .. }
            | Self::Digest(_)
            | Self::Size { .. }
            | Self::LayerCount { .. } => ErrorKind::Corrupt,
            Self::Schema1
            | Self::Foreign { .. }
            | Self::LayerType { .. }
            | Self::Platform { .. }
            | Self::TooManyLayers { .. }
            | Self::TooLarge { .. }
            | Self::TooDeep { .. } => ErrorKind::Unsupported,
        }
    }
}

/// A document, its digest checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// What a manifest document is.
pub(crate) enum Document {
    Index(Index),
    Manifest(Manifest),
}

/// The choices of an index.
pub(crate) struct Index(Vec<RawDescriptor>);

/// An image manifest.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
    pub(crate) annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: Option<u64>,
    manifests: Option<Vec<RawDescriptor>>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    fs_layers: Option<serde_json::Value>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// `os/architecture[/variant]`.
#[derive(Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) variant: String,
}

impl Platform {
    /// What this machine's boxes run.
    pub(crate) fn host() -> Self {
        // Rust's names on the left, Go's, which images use, on the right.
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: String::new() }
    }

    /// How well it suits this machine, the smaller the better; `None` when not at all.
    fn rank(&self, host: &Self) -> Option<u8> {
        if self.os != host.os || self.architecture != host.architecture {
            return None;
        }
        // Baselines come first; higher levels run only where the processor has them.
        match (self.architecture.as_str(), self.variant.as_str()) {
            (_, "") | ("amd64", "v1") | ("arm64", "v8") => Some(0),
            ("amd64", "v2") => Some(1),
            (_, _) => Some(2),
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

impl RawDescriptor {
    fn checked(&self) -> Result<Descriptor, ManifestError> {
        Ok(Descriptor { digest: self.digest.parse()?, size: self.size })
    }

    fn layer(&self) -> Result<Descriptor, ManifestError> {
        let (digest, media_type) = (self.digest.clone(), self.media_type.clone());
        if media_type.contains("nondistributable") || media_type.contains("foreign") {
            return Err(ManifestError::Foreign { digest, media_type });
        }
        const TYPES: [&str; 4] = [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.docker.image.rootfs.diff.tar",
            "application/vnd.docker.container.image.rootfs.diff.tar",
            "application/vnd.oci.image.layer.tar",
        ];
        let known = TYPES.iter().any(|known| {
            media_type
                .strip_prefix(known)
                .is_some_and(|rest| matches!(rest, "" | "+gzip" | "+zstd" | ".gzip" | ".zstd" | ".gz"))
        });
        if known { self.checked() } else { Err(ManifestError::LayerType { digest, media_type }) }
    }
}

/// Reads a manifest or an index. What it is, its members say: media types of responses lie.
pub(crate) fn parse(bytes: &[u8]) -> Result<Document, ManifestError> {
    let raw: RawDocument =
        serde_json::from_slice(bytes).map_err(|source| ManifestError::Json { what: "manifest", source })?;
    if raw.schema_version == Some(1) || raw.fs_layers.is_some() {
        return Err(ManifestError::Schema1);
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(manifests), None, None) => Ok(Document::Index(Index(manifests))),
        (None, Some(config), layers) => Ok(Document::Manifest(Manifest {
            config: config.checked()?,
            layers: layers.unwrap_or_default().iter().map(RawDescriptor::layer).collect::<Result<_, _>>()?,
            annotations: raw.annotations.unwrap_or_default(),
        })),
        (None, None, _) => Err(ManifestError::NotAnImage { problem: "neither a manifest nor an index" }),
        // What two readers could read differently is not read at all.
        (Some(_), _, _) => Err(ManifestError::NotAnImage { problem: "a manifest and an index at once" }),
    }
}

impl Index {
    /// The entry for this machine.
    pub(crate) fn choose(&self, host: &Platform) -> Result<Descriptor, ManifestError> {
        let ranked = self.0.iter().filter_map(|entry| Some((entry.platform.as_ref()?.rank(host)?, entry)));
        if let Some((_, entry)) = ranked.min_by_key(|(rank, _)| *rank) {
            return entry.checked();
        }
        // Single-platform indexes of layouts often do not say which platform.
        if let [entry] = self.0.as_slice()
            && entry.platform.is_none()
        {
            return entry.checked();
        }
        let mut available: Vec<_> = self
            .0
            .iter()
            .map(|e| e.platform.as_ref().map_or("unknown".into(), Platform::to_string))
            .collect();
        available.dedup();
        available.truncate(20);
        Err(ManifestError::Platform { wanted: host.to_string(), available: available.join(", ") })
    }

    /// The entries of a layout's index by their name, with their digests.
    pub(crate) fn named(&self) -> Result<Vec<(Option<String>, Descriptor)>, ManifestError> {
        let name = |entry: &RawDescriptor| {
            entry.annotations.as_ref()?.get("org.opencontainers.image.ref.name").cloned()
        };
        self.0.iter().map(|entry| Ok((name(entry), entry.checked()?))).collect()
    }
}

/// What an image config says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) platform: Platform,
    pub(crate) created: String,
    pub(crate) diff_ids: Vec<Digest>,
    pub(crate) run: ImageConfig,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(flatten)]
    platform: Platform,
    created: Option<String>,
    config: Option<RawRun>,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

/// Docker writes `null` where it has nothing.
#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct RawRun {
    user: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
    working_dir: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    stop_signal: Option<String>,
}

/// Reads an image config and checks it against this machine and its manifest's layers.
pub(crate) fn parse_config(bytes: &[u8], layers: usize, host: &Platform) -> Result<Config, ManifestError> {
    let raw: RawConfig = serde_json::from_slice(bytes)
        .map_err(|source| ManifestError::Json { what: "image config", source })?;
    let told = !raw.platform.os.is_empty() || !raw.platform.architecture.is_empty();
    if told && raw.platform.rank(host).is_none() {
        return Err(ManifestError::Platform {
            wanted: host.to_string(),
            available: raw.platform.to_string(),
        });
    }
    let diff_ids = raw.rootfs.diff_ids.unwrap_or_default();
    if diff_ids.len() != layers {
        return Err(ManifestError::LayerCount { layers, diff_ids: diff_ids.len() });
    }
    let run = raw.config.unwrap_or_default();
    let keys =
        |map: Option<BTreeMap<String, serde_json::Value>>| map.unwrap_or_default().into_keys().collect();
    Ok(Config {
        platform: if told { raw.platform } else { host.clone() },
        created: raw.created.unwrap_or_default(),
        diff_ids: diff_ids.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
        run: ImageConfig {
            entrypoint: run.entrypoint.unwrap_or_default(),
            cmd: run.cmd.unwrap_or_default(),
            env: run.env.unwrap_or_default(),
            working_dir: run.working_dir.unwrap_or_default(),
            user: run.user.unwrap_or_default(),
            stop_signal: run.stop_signal.unwrap_or_default(),
            labels: run.labels.unwrap_or_default(),
            volumes: keys(run.volumes),
            exposed_ports: keys(run.exposed_ports),
        },
    })
}

#[cfg(test)]
mod tests;
