//! OCI images made in memory: layers, configuration, manifest.

use std::io::Write;

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Media type of the manifests made here.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";

/// How a layer travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// `…tar`
    Plain,
    /// `…tar+gzip`
    Gzip,
    /// `…tar+zstd`
    Zstd,
}

impl Encoding {
    fn media_type(self) -> &'static str {
        match self {
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    fn encode(self, tar: &[u8]) -> Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(tar.to_vec()),
            Self::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
                encoder.write_all(tar)?;
                Ok(encoder.finish()?)
            }
            Self::Zstd => Ok(zstd::encode_all(tar, 1)?),
        }
    }
}

/// A layer under construction. Owners are root unless said otherwise, times are fixed: the same calls give the same bytes.
pub struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

impl Default for Layer {
    fn default() -> Self {
        Self::new()
    }
}

impl Layer {
    /// An empty layer.
    pub fn new() -> Self {
        Self { tar: tar::Builder::new(Vec::new()) }
    }

    /// A layer that is an archive made elsewhere, as it is. Nothing can be added to it: it has its end already.
    pub fn from_archive(archive: Vec<u8>) -> Self {
        Self { tar: tar::Builder::new(archive) }
    }

    /// Adds a directory.
    pub fn directory(mut self, path: &str, mode: u32) -> Result<Self> {
        let mut header = header(tar::EntryType::Directory, mode, 0);
        self.tar.append_data(&mut header, format!("{path}/"), std::io::empty()).context(path.to_owned())?;
        Ok(self)
    }

    /// Adds a directory of somebody; `.` is the root itself.
    pub fn directory_of(mut self, owner: u64, path: &str, mode: u32) -> Result<Self> {
        let mut header = header(tar::EntryType::Directory, mode, 0);
        header.set_uid(owner);
        header.set_gid(owner);
        let name = format!("{path}/");
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        self.tar.append(&header, std::io::empty()).context(path.to_owned())?;
        Ok(self)
    }

    /// Adds a regular file.
    pub fn file(mut self, path: &str, mode: u32, contents: &[u8]) -> Result<Self> {
        let mut header = header(tar::EntryType::Regular, mode, contents.len() as u64);
        self.tar.append_data(&mut header, path, contents).context(path.to_owned())?;
        Ok(self)
    }

    /// Adds a symbolic link.
    pub fn symlink(mut self, path: &str, target: &str) -> Result<Self> {
        let mut header = header(tar::EntryType::Symlink, 0o777, 0);
        self.tar.append_link(&mut header, path, target).context(path.to_owned())?;
        Ok(self)
    }

    /// Adds a hard link to an earlier file of this layer.
    pub fn hard_link(mut self, path: &str, target: &str) -> Result<Self> {
        let mut header = header(tar::EntryType::Link, 0o755, 0);
        self.tar.append_link(&mut header, path, target).context(path.to_owned())?;
        Ok(self)
    }

    /// Adds a file under a name that `tar` refuses to write (`..`, absolute): the name goes into the header as it is.
    pub fn file_named_raw(mut self, path: &[u8], contents: &[u8]) -> Result<Self> {
        let mut header = header(tar::EntryType::Regular, 0o644, contents.len() as u64);
        let name = &mut header.as_old_mut().name;
        name[..path.len()].copy_from_slice(path);
        header.set_cksum();
        self.tar.append(&header, contents).context("appending an entry with a raw name")?;
        Ok(self)
    }

    /// Hides what a lower layer has at `path`.
    pub fn whiteout(self, directory: &str, name: &str) -> Result<Self> {
        self.file(&format!("{directory}/.wh.{name}"), 0o644, b"")
    }

    /// Hides everything that lower layers have in `directory`.
    pub fn opaque(self, directory: &str) -> Result<Self> {
        self.file(&format!("{directory}/.wh..wh..opq"), 0o644, b"")
    }

    fn finish(self) -> Result<Vec<u8>> {
        Ok(self.tar.into_inner()?)
    }
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(size);
    header
}

/// Bytes with their digest.
#[derive(Debug, Clone)]
pub struct Blob {
    /// `sha256:…`
    pub digest: String,
    /// The content.
    pub bytes: Vec<u8>,
}

impl Blob {
    /// Names bytes by their digest.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { digest: digest(&bytes), bytes }
    }
}

/// `sha256:` and the digest in hexadecimal.
pub fn digest(bytes: &[u8]) -> String {
    let hash: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hash}")
}

/// A complete image.
#[derive(Debug, Clone)]
pub struct Image {
    /// Configuration and layers: everything the manifest names.
    pub blobs: Vec<Blob>,
    /// The manifest itself.
    pub manifest: Blob,
}

impl Image {
    /// Puts layers together; `config` is the `config` member of the image configuration (`Cmd`, `Env`, `User`, …).
    pub fn new(layers: Vec<(Layer, Encoding)>, config: &Value) -> Result<Self> {
        let (mut blobs, mut descriptors, mut diff_ids) = (Vec::new(), Vec::new(), Vec::new());
        for (layer, encoding) in layers {
            let tar = layer.finish()?;
            diff_ids.push(digest(&tar));
            let blob = Blob::new(encoding.encode(&tar)?);
            descriptors.push(descriptor(encoding.media_type(), &blob));
            blobs.push(blob);
        }
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = Blob::new(serde_json::to_vec(&config)?);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": descriptor(CONFIG_TYPE, &config),
            "layers": descriptors,
        });
        blobs.push(config);
        Ok(Self { blobs, manifest: Blob::new(serde_json::to_vec(&manifest)?) })
    }

    /// Bytes of all blobs: what a pull downloads.
    pub fn size(&self) -> usize {
        self.blobs.iter().map(|blob| blob.bytes.len()).sum()
    }
}

fn descriptor(media_type: &str, blob: &Blob) -> Value {
    json!({ "mediaType": media_type, "digest": blob.digest, "size": blob.bytes.len() })
}
