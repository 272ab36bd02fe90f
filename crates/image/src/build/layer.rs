//! A layer out of files of the context: sorted, with one time, owned by whom the instruction says.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use flate2::{Compression, write::GzEncoder};
use tar::{EntryType, Header};

use super::sources::{Ignored, Source, find, inside};
use super::tree::{Node, Tree};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::layer::Decompressed;
use crate::tar::TarReader;

/// Where PAX keeps extended attributes.
const XATTR: &str = "SCHILY.xattr.";

/// What `COPY` or `ADD` says.
pub(super) struct Copy {
    /// Archives are unpacked.
    pub(super) add: bool,
    pub(super) sources: Vec<String>,
    /// Below the root, without the leading slash.
    pub(super) target: PathBuf,
    pub(super) into_directory: bool,
    /// Root's, if it says nothing; what is in an archive has owners of its own then.
    pub(super) owner: Option<(u64, u64)>,
    pub(super) mode: Option<u32>,
    pub(super) mtime: u64,
}

/// A writer that digests and counts what it passes on.
struct Digesting<W> {
    inner: W,
    hasher: Hasher,
    size: u64,
}

impl<W> Digesting<W> {
    fn new(inner: W) -> Self {
        Self { inner, hasher: Hasher::new(Algorithm::Sha256), size: 0 }
    }
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A written layer: its digest, its size and its diff id.
pub(super) struct Written {
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) diff_id: Digest,
}

/// Writes the layer of one `COPY` or `ADD` to `file`. The tree is what the image has so far.
pub(super) fn write(
    context: &Path,
    ignored: &Ignored,
    tree: &Tree,
    copy: &Copy,
    file: File,
) -> Result<Written, String> {
    let gzip = GzEncoder::new(Digesting::new(file), Compression::default());
    let tar = tar::Builder::new(Digesting::new(gzip));
    let mut layer = Layer { tar, context, ignored, tree, copy, made: BTreeSet::new() };
    let mut sources = Vec::new();
    for text in &copy.sources {
        sources.extend(find(context, ignored, text)?);
    }
    if sources.len() > 1 && !copy.into_directory {
        return Err(format!("/{} must end in a slash, as several sources go into it", copy.target.display()));
    }
    for source in &sources {
        layer.source(source)?;
    }
    let failed = |e: io::Error| format!("could not write the layer: {e}");
    let plain = layer.tar.into_inner().map_err(failed)?;
    let diff_id = plain.hasher.finish();
    let packed = plain.inner.finish().map_err(failed)?;
    Ok(Written { digest: packed.hasher.finish(), size: packed.size, diff_id })
}

struct Layer<'a, W: Write> {
    tar: tar::Builder<W>,
    context: &'a Path,
    ignored: &'a Ignored,
    tree: &'a Tree,
    copy: &'a Copy,
    /// Directories that this layer brings.
    made: BTreeSet<PathBuf>,
}

impl<W: Write> Layer<'_, W> {
    /// Directories are copied by what is in them, archives are unpacked if the instruction does that.
    fn source(&mut self, source: &Source) -> Result<(), String> {
        let path = self.context.join(&source.path);
        let is_dir = path.is_dir();
        let archive = if self.copy.add && path.is_file() { archive(&path, &source.named)? } else { None };
        let target = self.tree.resolve(&self.copy.target)?;
        let there = self.tree.is_directory(&target) || self.made.contains(&target);
        if let Some(archive) = archive {
            self.directories(&target)?;
            return self.unpack(archive, &source.named, &target);
        }
        if is_dir {
            if there || self.ignored.matches(&source.path) {
                self.directories(&target)?;
            } else {
                self.directories(target.parent().unwrap_or(Path::new("")))?;
                self.directory(&path, &target)?;
            }
            return self.below(source, &target);
        }
        match source.named.file_name() {
            Some(name) if there || self.copy.into_directory => {
                self.directories(&target)?;
                self.file(source, &target.join(name))
            }
            _ => {
                self.directories(target.parent().unwrap_or(Path::new("")))?;
                self.file(source, &target)
            }
        }
    }

    fn header(&self, kind: EntryType, mode: u32) -> Header {
        let mut header = Header::new_gnu();
        let (user, group) = self.copy.owner.unwrap_or_default();
        header.set_entry_type(kind);
        header.set_mtime(self.copy.mtime);
        header.set_uid(user);
        header.set_gid(group);
        header.set_mode(mode);
        header.set_size(0);
        header
    }

    /// Makes the directories on the way to a path, and the last one, that are not there.
    fn directories(&mut self, path: &Path) -> Result<(), String> {
        let mut missing: Vec<&Path> = path.ancestors().filter(|path| !path.as_os_str().is_empty()).collect();
        missing.reverse();
        for path in missing {
            match self.tree.get(path) {
                Some(Node::Directory) => {}
                Some(Node::Link(_) | Node::Other) => {
                    return Err(format!(
                        "/{} is no directory in the image: name another target",
                        path.display()
                    ));
                }
                None if self.made.contains(path) => {}
                None => self.add_directory(path, 0o755)?,
            }
        }
        Ok(())
    }

    fn add_directory(&mut self, target: &Path, mode: u32) -> Result<(), String> {
        let mut header = self.header(EntryType::Directory, mode);
        self.made.insert(target.to_owned());
        self.tar.append_data(&mut header, target, io::empty()).map_err(failed(target))
    }

    /// The directory itself, as it is in the context.
    fn directory(&mut self, path: &Path, target: &Path) -> Result<(), String> {
        if self.tree.get(target).is_some_and(|node| *node != Node::Directory) {
            return Err(format!("/{} is no directory in the image: name another target", target.display()));
        }
        self.add_directory(target, self.mode(path)?)
    }

    fn mode(&self, path: &Path) -> Result<u32, String> {
        let metadata = fs::symlink_metadata(path).map_err(failed(path))?;
        Ok(self.copy.mode.unwrap_or(metadata.permissions().mode() & 0o7777))
    }

    /// All that lies in a directory.
    fn below(&mut self, source: &Source, target: &Path) -> Result<(), String> {
        let directory = self.context.join(&source.path);
        let mut names: Vec<_> = fs::read_dir(&directory)
            .and_then(|dir| dir.map(|entry| entry.map(|entry| entry.file_name())).collect())
            .map_err(failed(&directory))?;
        names.sort();
        for name in names {
            let child = Source { named: source.named.join(&name), path: source.path.join(&name) };
            let (path, target) = (directory.join(&name), target.join(&name));
            let ignored = self.ignored.matches(&child.path);
            if fs::symlink_metadata(&path).map_err(failed(&path))?.is_dir() {
                if !ignored {
                    self.directory(&path, &target)?;
                }
                // What lies in a directory that is left out may be let in again.
                self.below(&child, &target)?;
            } else if !ignored {
                self.file(&child, &target)?;
            }
        }
        Ok(())
    }

    /// A file, or a link as it is.
    fn file(&mut self, source: &Source, target: &Path) -> Result<(), String> {
        let path = self.context.join(&source.path);
        let metadata = fs::symlink_metadata(&path).map_err(failed(&path))?;
        if self.tree.is_directory(target) || self.made.contains(target) {
            return Err(format!("/{} is a directory in the image: name another target", target.display()));
        }
        plain_name(target)?;
        if metadata.is_symlink() {
            let mut header = self.header(EntryType::Symlink, 0o777);
            let link = fs::read_link(&path).map_err(failed(&path))?;
            return self.tar.append_link(&mut header, target, link).map_err(failed(&path));
        }
        if !metadata.is_file() {
            return Err(format!("{} is neither a file, a directory nor a link", source.named.display()));
        }
        let mut header = self.header(EntryType::Regular, self.mode(&path)?);
        header.set_size(metadata.len());
        let file = File::open(&path).map_err(failed(&path))?;
        self.tar.append_data(&mut header, target, file).map_err(failed(&path))
    }

    /// The entries of an archive, with their own modes and times, below `target`.
    fn unpack(&mut self, archive: Decompressed<File>, named: &Path, target: &Path) -> Result<(), String> {
        let wrong = |e: io::Error| format!("could not unpack {}: {e}", named.display());
        let mut archive = tar::Archive::new(archive);
        for entry in archive.entries().map_err(wrong)? {
            let mut entry = entry.map_err(wrong)?;
            let below =
                inside(entry.path().map_err(wrong)?).map_err(|e| format!("{}: {e}", named.display()))?;
            if below.as_os_str().is_empty() {
                continue;
            }
            plain_name(&below)?;
            let path = target.join(&below);
            let xattrs: Vec<(String, Vec<u8>)> = match entry.pax_extensions().map_err(wrong)? {
                None => Vec::new(),
                Some(extensions) => extensions
                    .filter_map(|e| {
                        e.ok().and_then(|e| Some((e.key().ok()?.to_owned(), e.value_bytes().to_vec())))
                    })
                    .filter(|(key, _)| key.starts_with(XATTR))
                    .collect(),
            };
            let from = entry.header();
            let kind = match from.entry_type() {
                EntryType::Continuous | EntryType::GNUSparse => EntryType::Regular,
                kind => kind,
            };
            let mut header = self.header(kind, from.mode().map_err(wrong)? & 0o7777);
            header.set_mtime(from.mtime().map_err(wrong)?);
            if self.copy.owner.is_none() {
                header.set_uid(from.uid().map_err(wrong)?);
                header.set_gid(from.gid().map_err(wrong)?);
            }
            // Other entries may have blanks there.
            if matches!(kind, EntryType::Char | EntryType::Block) {
                let major = from.device_major().map_err(wrong)?.unwrap_or_default();
                let minor = from.device_minor().map_err(wrong)?.unwrap_or_default();
                header
                    .set_device_major(major)
                    .and_then(|()| header.set_device_minor(minor))
                    .map_err(wrong)?;
            }
            let link = entry.link_name().map_err(wrong)?.map(std::borrow::Cow::into_owned);
            let written = |e: io::Error| format!("could not copy {}: {e}", path.display());
            let pairs = xattrs.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
            self.tar.append_pax_extensions(pairs).map_err(written)?;
            match (kind, link) {
                (EntryType::Link, Some(link)) => {
                    let link = target.join(inside(link).map_err(|e| format!("{}: {e}", named.display()))?);
                    self.tar.append_link(&mut header, &path, link)
                }
                (EntryType::Symlink, Some(link)) => self.tar.append_link(&mut header, &path, link),
                (EntryType::Regular, _) => {
                    header.set_size(entry.size());
                    self.tar.append_data(&mut header, &path, &mut entry)
                }
                (EntryType::Directory | EntryType::Char | EntryType::Block | EntryType::Fifo, _) => {
                    self.tar.append_data(&mut header, &path, io::empty())
                }
                _ => Err(io::Error::other("an entry is of an unknown type")),
            }
            .map_err(written)?;
        }
        Ok(())
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> String {
    move |e| format!("could not copy {}: {e}", path.display())
}

/// In a layer such a name would hide another file (image-spec, "Whiteouts").
fn plain_name(path: &Path) -> Result<(), String> {
    match path.components().any(|part| part.as_os_str().as_bytes().starts_with(b".wh.")) {
        true => Err(format!("{} begins with .wh., which layers use for hidden files", path.display())),
        false => Ok(()),
    }
}

/// A file that is a tar, plain or compressed.
fn archive(path: &Path, named: &Path) -> Result<Option<Decompressed<File>>, String> {
    let open = || File::open(path).and_then(Decompressed::new);
    let mut head = Vec::new();
    File::open(path).and_then(|file| file.take(6).read_to_end(&mut head)).map_err(failed(path))?;
    for (magic, what) in [(&b"BZh"[..], "bzip2"), (b"\xfd7zXZ\0", "xz")] {
        if head.starts_with(magic) {
            return Err(format!(
                "{} is compressed with {what}, which ADD does not unpack: unpack it before, or COPY it as it is",
                named.display()
            ));
        }
    }
    // Other compressed files, and what only looks compressed, are copied as they are.
    let is_tar = open().is_ok_and(|plain| matches!(TarReader::new(plain).next_entry(), Ok(Some(_))));
    if is_tar { open().map(Some).map_err(failed(path)) } else { Ok(None) }
}
