//! What the store remembers of an image.

use std::collections::BTreeMap;

use a3s_box_core::image::ImageConfig;
use serde::{Deserialize, Serialize};

/// An image in the store. As JSON it is the value of a record in the table `images`, under its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The digest of the image config, `sha256:…`.
    pub id: String,
    /// Normalised `NAME:TAG`s that point here, sorted.
    pub repo_tags: Vec<String>,
    /// Normalised `NAME@DIGEST`s it was pulled by, sorted.
    pub repo_digests: Vec<String>,
    /// Other names it was pulled by (`oci:DIR[:REF]`, archives), sorted.
    #[serde(default)]
    pub other_names: Vec<String>,
    /// The digest of the manifest that was chosen for this platform (not that of an index).
    pub manifest_digest: String,
    /// The length in bytes of its config and EROFS files, shared layers counted in full.
    pub size: u64,
    /// How sessions of it run.
    pub config: ImageConfig,
    /// Its layers, lowest first.
    pub layers: Vec<LayerRecord>,
    /// `os/architecture[/variant]` of the config.
    pub platform: String,
    /// `created` of the config as it is written there (RFC 3339); empty where absent.
    #[serde(default)]
    pub created: String,
    /// Annotations of the manifest.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Told to kubelet as never to be collected, because the configuration names it.
    #[serde(default)]
    pub pinned: bool,
    /// When it was pulled last, in seconds of the Unix epoch.
    pub pulled_at: u64,
}

/// One layer of an [`ImageRecord`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// The digest of the uncompressed tar.
    pub diff_id: String,
    /// The digest of the blob it came from; the diff id where it came uncompressed from an archive.
    pub digest: String,
    /// The name of its file under `images/erofs/`.
    pub file: String,
    /// The length of that file, in bytes.
    pub size: u64,
    /// It brings nothing and need not be mounted.
    #[serde(default)]
    pub empty: bool,
}

impl ImageRecord {
    /// All names it is found by, beside its id.
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.repo_tags.iter().chain(&self.repo_digests).chain(&self.other_names)
    }

    /// Adds the names of a former record of the same image.
    pub(crate) fn absorb(&mut self, former: &Self) {
        let merge = |names: &mut Vec<String>, more: &[String]| {
            names.extend_from_slice(more);
            names.sort();
            names.dedup();
        };
        merge(&mut self.repo_tags, &former.repo_tags);
        merge(&mut self.repo_digests, &former.repo_digests);
        merge(&mut self.other_names, &former.other_names);
    }

    /// The best name to show: a tag, a digest, another name, or the id.
    pub fn display_name(&self) -> &str {
        self.repo_tags
            .first()
            .or_else(|| self.repo_digests.first())
            .or_else(|| self.other_names.first())
            .unwrap_or(&self.id)
    }
}
