//! Images in files of this machine: OCI layouts, as directory or tar, and docker archives.

mod archive;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use a3s_box_core::foreign;
use serde::Deserialize;
use thiserror::Error;

pub use self::archive::{ArchivedImage, archived_images, decompress_archive};
use crate::digest::Digest;
use crate::error::{ErrorKind, io_kind};
use crate::manifest::{Descriptor, Document, Index, Manifest, ManifestError, Platform, parse};
use crate::reference::{LocalKind, LocalReference, Reference, Version};
use crate::tar::{EntryKind, TarError, TarReader};

/// A local image that cannot be read.
#[derive(Debug, Error)]
pub enum LocalError {
    /// The file or directory itself.
    #[error("could not read {}", path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no tar.
    #[error("{} is not a tar that can be read", path.display())]
    Tar {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It is compressed as a whole.
    #[error(
        "{} is compressed as a whole: decompress it first (its layers may be compressed), or use `a3s-box image load`",
        path.display()
    )]
    Compressed {
        /// Which one.
        path: PathBuf,
    },
    /// The same, with what nothing here reads.
    #[error("{} is compressed with {name}, which is not read: unpack it first", path.display())]
    OtherCompression {
        /// Which one.
        path: PathBuf,
        /// With what.
        name: &'static str,
    },
    /// It is compressed, and ends early or is damaged.
    #[error("{} could not be decompressed", path.display())]
    Broken {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A tar of something else.
    #[error(
        "{} is neither an OCI archive, which has an index.json, nor a docker archive, which has a manifest.json",
        path.display()
    )]
    NoArchive {
        /// Which one.
        path: PathBuf,
    },
    /// Something that must be in it is not.
    #[error("{} has no {name}", path.display())]
    Missing {
        /// The image.
        path: PathBuf,
        /// The file in it.
        name: String,
    },
    /// Several images, or none, fit.
    #[error("{} holds {count} images that fit{}; name one of: {names}", path.display(), wanted.as_ref().map(|w| format!(" {w:?}")).unwrap_or_default())]
    Choice {
        /// The image.
        path: PathBuf,
        /// The name in the reference.
        wanted: Option<String>,
        /// How many fit.
        count: usize,
        /// Which names there are.
        names: String,
    },
    /// A document is too large.
    #[error("{name} in {} has {size} bytes, more than the limit of {limit}", path.display())]
    TooLarge {
        /// The image.
        path: PathBuf,
        /// The file in it.
        name: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A document does not have its digest.
    #[error("{digest} in {} does not match its digest", path.display())]
    Digest {
        /// The image.
        path: PathBuf,
        /// The digest.
        digest: Digest,
    },
    /// A document is not what it must be.
    #[error("in {}", path.display())]
    Manifest {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: ManifestError,
    },
}

impl LocalError {
    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Io { source, .. } => io_kind(source),
            Self::Tar { .. }
            | Self::Digest { .. }
            | Self::Missing { .. }
            | Self::NoArchive { .. }
            | Self::Broken { .. } => ErrorKind::Corrupt,
            Self::Compressed { .. } | Self::OtherCompression { .. } | Self::TooLarge { .. } => {
                ErrorKind::Unsupported
            }
            Self::Choice { count: 0, .. } => ErrorKind::NotFound,
            Self::Choice { .. } => ErrorKind::InvalidReference,
            Self::Manifest { source, .. } => source.kind(),
        }
    }
}

/// A run of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileRange {
    pub(crate) path: PathBuf,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl FileRange {
    /// Opens it for reading.
    pub(crate) fn open(&self) -> io::Result<io::Take<File>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        Ok(file.take(self.length))
    }
}

/// Files by name, in a directory or a tar.
#[derive(Debug)]
pub(crate) struct LocalFiles {
    path: PathBuf,
    /// Of a tar: its regular files, and its links with their targets.
    entries: Option<BTreeMap<String, Member>>,
}

#[derive(Debug)]
enum Member {
    File { offset: u64, length: u64 },
    Link(String),
}

impl LocalFiles {
    /// Opens what a reference names. Blocks on the disk; a tar is read through once.
    pub(crate) fn open(reference: &LocalReference) -> Result<Self, LocalError> {
        let path = reference.path.clone();
        let entries = match reference.kind {
            LocalKind::OciDir => None,
            LocalKind::OciArchive | LocalKind::DockerArchive => Some(index_tar(&path)?),
        };
        Ok(Self { path, entries })
    }

    /// Where a file of it lies.
    pub(crate) fn find(&self, name: &str) -> Result<FileRange, LocalError> {
        let missing = || LocalError::Missing { path: self.path.clone(), name: name.to_owned() };
        let Some(entries) = &self.entries else {
            let path = self.path.join(name);
            let metadata =
                std::fs::metadata(&path).map_err(|source| LocalError::Io { path: path.clone(), source })?;
            if !metadata.is_file() {
                return Err(missing());
            }
            return Ok(FileRange { path, offset: 0, length: metadata.len() });
        };
        // docker save stores a layer that several images share once, and links to it.
        let mut name = normal(name);
        for _ in 0..8 {
            match entries.get(&name) {
                Some(Member::File { offset, length }) => {
                    return Ok(FileRange { path: self.path.clone(), offset: *offset, length: *length });
                }
                Some(Member::Link(target)) => name.clone_from(target),
                None => break,
            }
        }
        Err(missing())
    }

    /// Reads a small file of it.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, LocalError> {
        let range = self.find(name)?;
        if range.length > limit {
            let (path, name) = (self.path.clone(), name.to_owned());
            return Err(LocalError::TooLarge { path, name, size: range.length, limit });
        }
        let mut bytes = Vec::new();
        range
            .open()
            .and_then(|mut file| file.read_to_end(&mut bytes))
            .map_err(|source| LocalError::Io { path: range.path.clone(), source })?;
        Ok(bytes)
    }

    /// Reads a blob of a layout and checks its digest.
    pub(crate) fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, LocalError> {
        let bytes = self.read(&blob_name(digest), limit)?;
        if digest.matches(&bytes) {
            Ok(bytes)
        } else {
            Err(LocalError::Digest { path: self.path.clone(), digest: digest.clone() })
        }
    }

    fn index(&self, limit: u64) -> Result<Index, LocalError> {
        let wrong = |source| LocalError::Manifest { path: self.path.clone(), source };
        match parse(&self.read("index.json", limit)?).map_err(wrong)? {
            Document::Index(index) => Ok(index),
            Document::Manifest(_) => {
                Err(wrong(ManifestError::NotAnImage { problem: "a manifest where an index must be" }))
            }
        }
    }

    /// The manifest (or a further index) that a layout has under a name, or as its so manieth, with the best of its
    /// names there.
    pub(crate) fn layout_entry(
        &self,
        wanted: Option<&str>,
        limit: u64,
    ) -> Result<(Descriptor, Option<String>), LocalError> {
        let wrong = |source| LocalError::Manifest { path: self.path.clone(), source };
        let index = self.index(limit)?;
        let mut named = index.named().map_err(wrong)?;
        let known: Vec<_> = named.iter().filter_map(|(names, _)| names.last().cloned()).collect();
        match wanted.map(|wanted| (position(wanted), wanted)) {
            Some((Some(at), _)) => named = named.into_iter().skip(at).take(1).collect(),
            Some((None, wanted)) => named.retain(|(names, _)| names.iter().any(|name| name == wanted)),
            None => {}
        }
        match (named.pop(), named.is_empty()) {
            (Some((mut names, descriptor)), true) => Ok((descriptor, names.pop())),
            // An index of several platforms rather than of several images.
            (Some(_), false) if wanted.is_none() && known.is_empty() => {
                index.choose(&Platform::host()).map(|d| (d, None)).map_err(wrong)
            }
            (last, _) => Err(self.choice(wanted, named.len() + usize::from(last.is_some()), &known)),
        }
    }

    /// The tags of each image of a layout. One whose entries have no names is one image for several platforms.
    fn layout_tags(&self, limit: u64) -> Result<Vec<Vec<String>>, LocalError> {
        let wrong = |source| LocalError::Manifest { path: self.path.clone(), source };
        let named = self.index(limit)?.named().map_err(wrong)?;
        if !named.is_empty() && named.iter().all(|(names, _)| names.is_empty()) {
            return Ok(vec![Vec::new()]);
        }
        let tag = |names: Vec<String>| names.last().and_then(|name| layout_tag(name)).into_iter().collect();
        Ok(named.into_iter().map(|(names, _)| tag(names)).collect())
    }

    fn choice(&self, wanted: Option<&str>, count: usize, names: &[String]) -> LocalError {
        LocalError::Choice {
            path: self.path.clone(),
            wanted: wanted.map(str::to_owned),
            count,
            names: names.join(", "),
        }
    }

    /// The manifest of the image that a layout has for this machine under a name, with its bytes.
    pub(crate) fn layout_image(
        &self,
        wanted: Option<&str>,
        limit: u64,
    ) -> Result<(Manifest, Vec<u8>), LocalError> {
        let wrong = |source| LocalError::Manifest { path: self.path.clone(), source };
        let (entry, _) = self.layout_entry(wanted, limit)?;
        let mut bytes = self.read_blob(&entry.digest, limit)?;
        if let Document::Index(index) = parse(&bytes).map_err(wrong)? {
            let entry = index.choose(&Platform::host()).map_err(wrong)?;
            bytes = self.read_blob(&entry.digest, limit)?;
        }
        match parse(&bytes).map_err(wrong)? {
            Document::Manifest(manifest) => Ok((manifest, bytes)),
            Document::Index(_) => Err(wrong(ManifestError::NotAnImage { problem: "an index of indexes" })),
        }
    }

    fn docker_entries(&self, limit: u64) -> Result<Vec<DockerEntry>, LocalError> {
        let wrong = |source| LocalError::Manifest {
            path: self.path.clone(),
            source: ManifestError::Json { what: "manifest.json", source },
        };
        serde_json::from_slice(&self.read("manifest.json", limit)?).map_err(wrong)
    }

    /// The image that a docker archive has under a name, or as its so manieth.
    pub(crate) fn docker_entry(&self, wanted: Option<&str>, limit: u64) -> Result<DockerEntry, LocalError> {
        let mut entries = self.docker_entries(limit)?;
        let names: Vec<_> = entries.iter().flat_map(DockerEntry::tags).collect();
        match wanted.map(|wanted| (position(wanted), wanted)) {
            Some((Some(at), _)) => entries = entries.into_iter().skip(at).take(1).collect(),
            Some((None, wanted)) => {
                let wanted = wanted.parse::<Reference>().map_or(wanted.to_owned(), |r| r.to_string());
                entries.retain(|entry| entry.tags().contains(&wanted));
            }
            None => {}
        }
        match (entries.pop(), entries.is_empty()) {
            (Some(entry), true) => Ok(entry),
            (last, _) => Err(self.choice(wanted, entries.len() + usize::from(last.is_some()), &names)),
        }
    }
}

/// `@N` is the N-th image of an archive, from 0: some have no names.
fn position(wanted: &str) -> Option<usize> {
    wanted.strip_prefix('@')?.parse().ok()
}

/// One image of a docker archive.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DockerEntry {
    pub(crate) config: String,
    #[serde(default, deserialize_with = "foreign::list")]
    repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "foreign::list")]
    layers: Vec<String>,
}

impl DockerEntry {
    /// Its tags, normalised; what is no reference is left out.
    pub(crate) fn tags(&self) -> Vec<String> {
        self.repo_tags.iter().filter_map(|tag| normal_tag(tag)).collect()
    }

    pub(crate) fn layers(&self) -> &[String] {
        &self.layers
    }
}

/// `NAME:TAG` in its normal form, if it is one.
pub(crate) fn normal_tag(text: &str) -> Option<String> {
    match text.parse::<Reference>().ok()? {
        Reference::Registry(reference) => match reference.version() {
            Version::Tag(_) => Some(reference.to_string()),
            Version::Digest(_) => None,
        },
        Reference::Local(_) => None,
    }
}

/// The tag that a name of a layout is. Layouts name images anyhow; only what is written like a registry's name is
/// taken for one.
pub(crate) fn layout_tag(name: &str) -> Option<String> {
    if name.contains('/') { normal_tag(name) } else { None }
}

/// Where a layout has a blob.
pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}", digest.to_string().replacen(':', "/", 1))
}

fn index_tar(path: &Path) -> Result<BTreeMap<String, Member>, LocalError> {
    let io = |source| LocalError::Io { path: path.to_owned(), source };
    let tar = |source: TarError| LocalError::Tar { path: path.to_owned(), source: Box::new(source) };
    let mut file = File::open(path).map_err(io)?;
    let mut head = Vec::new();
    file.by_ref().take(4).read_to_end(&mut head).map_err(io)?;
    if head.starts_with(&[0x1f, 0x8b]) || head == [0x28, 0xb5, 0x2f, 0xfd] {
        return Err(LocalError::Compressed { path: path.to_owned() });
    }
    file.rewind().map_err(io)?;
    let mut reader = TarReader::new(BufReader::with_capacity(256 << 10, file));
    let mut members = BTreeMap::new();
    while let Some(entry) = reader.next_entry().map_err(tar)? {
        let name = normal(&String::from_utf8_lossy(&entry.path));
        let target = |target: &[u8]| String::from_utf8_lossy(target).into_owned();
        let member = match entry.kind {
            EntryKind::File if entry.runs.is_none() => {
                Member::File { offset: reader.offset(), length: entry.size }
            }
            EntryKind::HardLink(link) => Member::Link(normal(&target(&link))),
            EntryKind::Symlink(link) => {
                let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
                Member::Link(normal(&format!("{directory}/{}", target(&link))))
            }
            EntryKind::File
            | EntryKind::Directory
            | EntryKind::CharDevice { .. }
            | EntryKind::BlockDevice { .. }
            | EntryKind::Fifo => continue,
        };
        members.insert(name, member);
    }
    Ok(members)
}

/// A name without `.`, `..` and doubled slashes.
fn normal(name: &str) -> String {
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}
