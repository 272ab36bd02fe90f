//! Manifests, indexes and configs: OCI image-spec and docker schema 2.

use std::collections::BTreeMap;

use a3s_box_core::foreign;
use a3s_box_core::image::ImageConfig;
use serde::Deserialize;
use serde::de::IgnoredAny;
use thiserror::Error;

use crate::digest::Digest;
use crate::kind::ErrorKind;

/// What we ask registries for.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// The annotation by which a layout names its images.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

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
    #[serde(default, deserialize_with = "foreign::map")]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default, deserialize_with = "foreign::or_default")]
    media_type: String,
    digest: String,
    size: u64,
    /// What the manifest is about, if it is no image but, say, a signature.
    #[serde(default, deserialize_with = "foreign::or_default")]
    artifact_type: String,
    platform: Option<Platform>,
    #[serde(default, deserialize_with = "foreign::map")]
    annotations: BTreeMap<String, String>,
}

/// `os/architecture[/variant]`.
#[derive(Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Platform {
    #[serde(default, deserialize_with = "foreign::or_default")]
    pub(crate) os: String,
    #[serde(default, deserialize_with = "foreign::or_default")]
    pub(crate) architecture: String,
    #[serde(default, deserialize_with = "foreign::or_default")]
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

    /// An empty one, as some tools write it, says as much as none.
    fn is_told(&self) -> bool {
        !self.os.is_empty() || !self.architecture.is_empty()
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
    fn platform(&self) -> Option<&Platform> {
        self.platform.as_ref().filter(|platform| platform.is_told())
    }

    /// Whether it is beside the image rather than one: build tools put attestations of a platform that is unknown
    /// into the index, others signatures and lists of contents with the platform of what they are about.
    fn is_beside(&self) -> bool {
        let unknown = |platform: &Platform| platform.os == "unknown" && platform.architecture == "unknown";
        !self.artifact_type.is_empty()
            || self.platform().is_some_and(unknown)
            || self.annotations.contains_key("vnd.docker.reference.type")
    }

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
            annotations: raw.annotations,
        })),
        (None, None, _) => Err(ManifestError::NotAnImage { problem: "neither a manifest nor an index" }),
        // What two readers could read differently is not read at all.
        (Some(_), _, _) => Err(ManifestError::NotAnImage { problem: "a manifest and an index at once" }),
    }
}

impl Index {
    /// The entry for this machine.
    pub(crate) fn choose(&self, host: &Platform) -> Result<Descriptor, ManifestError> {
        let images = || self.0.iter().filter(|entry| !entry.is_beside());
        let ranked = images().filter_map(|entry| Some((entry.platform()?.rank(host)?, entry)));
        if let Some((_, entry)) = ranked.min_by_key(|(rank, _)| *rank) {
            return entry.checked();
        }
        // Indexes of one image often do not say for which platform; its config does.
        let mut untold = images().filter(|entry| entry.platform().is_none());
        if let (Some(entry), None) = (untold.next(), untold.next()) {
            return entry.checked();
        }
        let mut available: Vec<_> =
            self.0.iter().map(|e| e.platform().map_or("unknown".into(), Platform::to_string)).collect();
        available.dedup();
        available.truncate(20);
        Err(ManifestError::Platform { wanted: host.to_string(), available: available.join(", ") })
    }

    /// The entries of a layout's index, with all their names. The last one says most: docker's engine gives an image
    /// its whole name in an annotation of its own, and only the tag in that of the specification.
    pub(crate) fn named(&self) -> Result<Vec<(Vec<String>, Descriptor)>, ManifestError> {
        let names = |entry: &RawDescriptor| {
            [REF_NAME, "io.containerd.image.name"]
                .iter()
                .filter_map(|name| entry.annotations.get(*name))
                .cloned()
                .collect()
        };
        let images = self.0.iter().filter(|entry| !entry.is_beside());
        images.map(|entry| Ok((names(entry), entry.checked()?))).collect()
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
    #[serde(default, deserialize_with = "foreign::or_default")]
    created: String,
    #[serde(default, deserialize_with = "foreign::or_default")]
    config: RawRun,
    #[serde(default, deserialize_with = "foreign::or_default")]
    rootfs: RawRootfs,
}

#[derive(Deserialize, Default)]
struct RawRootfs {
    #[serde(default, deserialize_with = "foreign::list")]
    diff_ids: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawRun {
    #[serde(deserialize_with = "foreign::or_default")]
    user: String,
    #[serde(deserialize_with = "foreign::or_default")]
    exposed_ports: BTreeMap<String, IgnoredAny>,
    #[serde(deserialize_with = "foreign::list")]
    env: Vec<String>,
    #[serde(deserialize_with = "foreign::list")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "foreign::list")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "foreign::or_default")]
    volumes: BTreeMap<String, IgnoredAny>,
    #[serde(deserialize_with = "foreign::or_default")]
    working_dir: String,
    #[serde(deserialize_with = "foreign::map")]
    labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "foreign::or_default")]
    stop_signal: String,
}

/// Reads an image config and checks it against this machine and its manifest's layers.
pub(crate) fn parse_config(bytes: &[u8], layers: usize, host: &Platform) -> Result<Config, ManifestError> {
    let raw: RawConfig = serde_json::from_slice(bytes)
        .map_err(|source| ManifestError::Json { what: "image config", source })?;
    let told = raw.platform.is_told();
    if told && raw.platform.rank(host).is_none() {
        return Err(ManifestError::Platform {
            wanted: host.to_string(),
            available: raw.platform.to_string(),
        });
    }
    let (diff_ids, run) = (raw.rootfs.diff_ids, raw.config);
    if diff_ids.len() != layers {
        return Err(ManifestError::LayerCount { layers, diff_ids: diff_ids.len() });
    }
    Ok(Config {
        platform: if told { raw.platform } else { host.clone() },
        created: raw.created,
        diff_ids: diff_ids.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
        run: ImageConfig {
            entrypoint: run.entrypoint,
            cmd: run.cmd,
            env: run.env,
            working_dir: run.working_dir,
            user: run.user,
            stop_signal: run.stop_signal,
            labels: run.labels,
            volumes: run.volumes.into_keys().collect(),
            exposed_ports: run.exposed_ports.into_keys().collect(),
        },
    })
}

#[cfg(test)]
mod tests;
