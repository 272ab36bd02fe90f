//! The tree of a layer from its tar, whiteouts as overlayfs knows them.
//!
//! Rules, where the OCI image-spec ("Image Layer Filesystem Changeset") leaves them open:
//! - Names are resolved inside our own tree only. A parent that is a symlink, in this layer or
//!   below it, is followed as if the layer's root were `/`.
//! - A parent that the tar does not list takes its attributes from the lower layers, because the
//!   merged directory shows the upper one's; where there is none it is 0755 of root.
//! - A hard link whose target lies below brings a copy of it, under both names, as writing
//!   through an overlay would.
//! - Of entries with one name the last wins; a directory over a directory keeps its children.
//! - Whiteouts speak of lower layers only: what this layer brings itself stays. Those that cannot hide anything,
//!   because no lower layer shows in their directory, are left out: overlayfs takes whiteouts out of the listings of
//!   merged directories only, so a program would find their names and no file.
//! - Which layer says whose the root directory is, a mark in it tells.

use std::collections::VecDeque;
use std::io::{Read, Seek, Write};

use thiserror::Error;

use super::lower::{Found, FoundKind, Lower, LowerError};
use super::path::{components, shown, target_components};
use crate::erofs::{
    Attributes, ImageWriter, NodeId, Payload, Piece, SYMLINK_MAX, Tree, WriterError, XattrAdded, Xattrs,
    device_number,
};
use crate::tar::{Entry, EntryKind, TarError, TarReader};

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// As the kernel: how many symlinks one path may lead through.
const MAX_SYMLINKS: usize = 40;

/// The tar cannot become an EROFS image.
#[derive(Debug, Error)]
pub(crate) enum ConvertError {
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error("entry {path:?}")]
    Write {
        path: String,
        #[source]
        source: WriterError,
    },
    #[error("finishing the image")]
    Finish(#[source] WriterError),
    #[error("entry {path:?} climbs out with '..'")]
    Climbs { path: String },
    #[error("entry {name:?} has a name of {length} bytes; file systems take 255")]
    NameTooLong { name: String, length: usize },
    #[error("entry {path:?} has a path of {length} bytes; system calls take 4095")]
    PathTooLong { path: String, length: usize },
    #[error("entry {path:?} has a NUL in its name")]
    NulInName { path: String },
    #[error("entry {path:?} leads through more than {MAX_SYMLINKS} symlinks")]
    SymlinkLoop { path: String },
    #[error("entry {path:?} lies under {parent:?}, which is no directory")]
    NotADirectory { path: String, parent: String },
    #[error("entry {path:?} would replace the root directory by something else")]
    RootReplaced { path: String },
    #[error("symlink {path:?} has a target of {length} bytes; it must have 1 to 4095")]
    SymlinkTarget { path: String, length: usize },
    #[error("device {path:?} has the number {major}:{minor}, beyond 4095:1048575")]
    DeviceNumber { path: String, major: u32, minor: u32 },
    #[error("entry {path:?} has the attribute {name:?} that is too long to be stored")]
    XattrTooLong { path: String, name: String },
    #[error("hard link {path:?} points to {target:?}, which {problem}")]
    HardLink { path: String, target: String, problem: &'static str },
    #[error("names and attributes take more than {limit} bytes")]
    TooMuchMetadata { limit: u64 },
    #[error("looking for {path:?} in the lower layers")]
    Lower {
        path: String,
        #[source]
        source: LowerError,
    },
}

/// What a conversion came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Converted {
    /// Size of the image.
    pub(crate) bytes: u64,
    /// Inodes in it.
    pub(crate) inodes: u64,
    /// Whether lower layers were asked: if so, the image is right above these layers only.
    pub(crate) depends_on_lower: bool,
}

/// Reads a tar up to its end mark and writes its image; gives back the tar's reader, which may
/// have bytes left, and the output.
pub(crate) fn convert<R: Read, W: Write + Seek>(
    tar: R,
    writer: ImageWriter<W>,
    lower: &mut dyn Lower,
    metadata_limit: u64,
    uuid: [u8; 16],
) -> Result<(R, W, Converted), ConvertError> {
    let mut tar = TarReader::new(tar);
    let mut converter = Converter { tree: Tree::new(), writer, lower, asked_lower: false };
    while let Some(entry) = tar.next_entry()? {
        converter.entry(entry, &mut tar)?;
        if converter.tree.weight() > metadata_limit {
            return Err(ConvertError::TooMuchMetadata { limit: metadata_limit });
        }
    }
    for directory in converter.directories_of_idle_whiteouts()? {
        converter.tree.drop_whiteouts(directory);
    }
    let depends_on_lower = converter.asked_lower;
    let (out, written) = converter.writer.finish(&converter.tree, uuid).map_err(ConvertError::Finish)?;
    let converted = Converted { bytes: written.bytes, inodes: written.inodes, depends_on_lower };
    Ok((tar.into_inner(), out, converted))
}

struct Converter<'a, W: Write + Seek> {
    tree: Tree,
    writer: ImageWriter<W>,
    lower: &'a mut dyn Lower,
    asked_lower: bool,
}

/// A directory of the tree and its path from the root.
#[derive(Clone)]
struct Trail(Vec<(Box<[u8]>, NodeId)>);

impl Trail {
    fn node(&self) -> NodeId {
        self.0.last().map_or(Tree::ROOT, |(_, node)| *node)
    }

    fn names_and<'a>(&'a self, last: &'a [u8]) -> Vec<&'a [u8]> {
        self.0.iter().map(|(name, _)| &**name).chain([last]).collect()
    }
}

impl<W: Write + Seek> Converter<'_, W> {
    fn entry<R: Read>(&mut self, entry: Entry, tar: &mut TarReader<R>) -> Result<(), ConvertError> {
        let mut names = components(&entry.path)?;
        let Some(name) = names.pop() else { return self.root(&entry) };
        let parent = self.directory(names, &entry.path)?;
        if &*name == OPAQUE {
            self.tree.set_opaque(parent.node());
            return Ok(());
        }
        if name.starts_with(WHITEOUT_META) {
            // Bookkeeping of AUFS that no reader of images wants.
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            self.whiteout(&parent, hidden);
            return Ok(());
        }
        let path = || shown(&entry.path);
        let attributes = attributes(&entry)?;
        let payload = match &entry.kind {
            EntryKind::HardLink(target) => return self.hard_link(&parent, &name, &entry.path, target),
            EntryKind::Directory => Payload::directory(),
            EntryKind::File => {
                let data = self
                    .writer
                    .file(&pieces(&entry), &attributes.xattrs, tar)
                    .map_err(|source| ConvertError::Write { path: path(), source })?;
                Payload::File(data)
            }
            EntryKind::Symlink(target) if (1..=SYMLINK_MAX).contains(&target.len()) => {
                Payload::Symlink(target.as_slice().into())
            }
            EntryKind::Symlink(target) => {
                return Err(ConvertError::SymlinkTarget { path: path(), length: target.len() });
            }
            EntryKind::CharDevice { major, minor } => {
                Payload::CharDevice(device(&entry.path, *major, *minor)?)
            }
            EntryKind::BlockDevice { major, minor } => {
                Payload::BlockDevice(device(&entry.path, *major, *minor)?)
            }
            EntryKind::Fifo => Payload::Fifo,
        };
        self.insert(parent.node(), &name, attributes, payload);
        Ok(())
    }

    /// An entry for the root itself: it may only bring attributes.
    fn root(&mut self, entry: &Entry) -> Result<(), ConvertError> {
        if entry.kind != EntryKind::Directory {
            return Err(ConvertError::RootReplaced { path: shown(&entry.path) });
        }
        let mut attributes = attributes(entry)?;
        attributes.xattrs.mark_root();
        self.tree.node_mut(Tree::ROOT).attributes = attributes;
        Ok(())
    }

    fn insert(&mut self, parent: NodeId, name: &[u8], attributes: Attributes, payload: Payload) {
        let is_directory = matches!(payload, Payload::Directory { .. });
        let former = self.tree.child(parent, name);
        if let Some(former) = former
            && is_directory
            && matches!(self.tree.node(former).payload, Payload::Directory { .. })
        {
            self.tree.node_mut(former).attributes = attributes;
            return;
        }
        let node = self.tree.add(attributes, payload);
        if is_directory && former.is_some() {
            // What stood here already hid the lower layers' directory.
            self.tree.set_opaque(node);
        }
        self.tree.link(parent, name, node);
    }

    fn whiteout(&mut self, parent: &Trail, name: &[u8]) {
        if name.is_empty() || matches!(name, b"." | b"..") {
            return;
        }
        match self.tree.child(parent.node(), name) {
            Some(own) => self.tree.set_opaque(own),
            None => {
                let node = self.tree.add(Attributes::default(), Payload::CharDevice(0));
                self.tree.link(parent.node(), name, node);
            }
        }
    }

    /// The directories with whiteouts that are not merged with one of a lower layer. The root always is merged, with
    /// a container's own layer if with nothing else.
    fn directories_of_idle_whiteouts(&mut self) -> Result<Vec<NodeId>, ConvertError> {
        let tree = &self.tree;
        let (mut idle, mut path) = (Vec::new(), Vec::new());
        // How deep, by which name, which, and whether lower layers do not show there.
        let mut todo: Vec<(usize, &[u8], NodeId, bool)> = vec![(0, b"", Tree::ROOT, false)];
        while let Some((depth, name, directory, hidden)) = todo.pop() {
            let Payload::Directory { children, opaque } = &tree.node(directory).payload else { continue };
            path.truncate(depth);
            path.extend((directory != Tree::ROOT).then_some(name));
            let mut alone = hidden || *opaque;
            if children.values().any(|child| tree.node(*child).payload.is_whiteout()) {
                if !alone && !path.is_empty() {
                    self.asked_lower = true;
                    let below = self.lower.look_up(&path);
                    let below = below
                        .map_err(|source| ConvertError::Lower { path: shown(&path.join(&b'/')), source })?;
                    alone = !below.is_some_and(|found| matches!(found.kind, FoundKind::Directory));
                }
                idle.extend(alone.then_some(directory));
            }
            todo.extend(children.iter().map(|(name, child)| (path.len(), &**name, *child, alone)));
        }
        Ok(idle)
    }

    fn hard_link(
        &mut self,
        parent: &Trail,
        name: &[u8],
        path: &[u8],
        target: &[u8],
    ) -> Result<(), ConvertError> {
        let problem = |problem| ConvertError::HardLink { path: shown(path), target: shown(target), problem };
        let mut target_names = components(target)?;
        let Some(target_name) = target_names.pop() else { return Err(problem("is the root directory")) };
        let target_parent = self.directory(target_names, target)?;
        let node = match self.tree.child(target_parent.node(), &target_name) {
            Some(node) => node,
            None => self
                .copy_up(&target_parent, &target_name, path)?
                .ok_or_else(|| problem("is neither in this layer before it nor in a lower one"))?,
        };
        let payload = &self.tree.node(node).payload;
        if matches!(payload, Payload::Directory { .. }) {
            return Err(problem("is a directory"));
        }
        if payload.is_whiteout() {
            return Err(problem("this layer removes"));
        }
        self.tree.link(parent.node(), name, node);
        Ok(())
    }

    /// Brings a file of the lower layers into this one, under its own name.
    fn copy_up(&mut self, parent: &Trail, name: &[u8], path: &[u8]) -> Result<Option<NodeId>, ConvertError> {
        let Some(found) = self.below(parent, name, path)? else { return Ok(None) };
        let payload = match found.kind {
            FoundKind::Directory => Payload::directory(),
            FoundKind::Symlink(target) => Payload::Symlink(target.into()),
            FoundKind::CharDevice(device) => Payload::CharDevice(device),
            FoundKind::BlockDevice(device) => Payload::BlockDevice(device),
            FoundKind::Fifo => Payload::Fifo,
            FoundKind::File { size, mut content } => {
                let data = self
                    .writer
                    .file(&[Piece::Bytes(size)], &found.attributes.xattrs, &mut content)
                    .map_err(|source| ConvertError::Write { path: shown(path), source })?;
                Payload::File(data)
            }
        };
        let node = self.tree.add(found.attributes, payload);
        self.tree.link(parent.node(), name, node);
        Ok(Some(node))
    }

    /// What the lower layers have under a name, unless this layer hides it.
    fn below(&mut self, parent: &Trail, name: &[u8], path: &[u8]) -> Result<Option<Found>, ConvertError> {
        let hidden =
            |node: NodeId| matches!(self.tree.node(node).payload, Payload::Directory { opaque: true, .. });
        if hidden(Tree::ROOT) || parent.0.iter().any(|(_, node)| hidden(*node)) {
            return Ok(None);
        }
        self.asked_lower = true;
        self.lower
            .look_up(&parent.names_and(name))
            .map_err(|source| ConvertError::Lower { path: shown(path), source })
    }

    /// Walks to a directory, following symlinks and making what is missing.
    fn directory(&mut self, names: Vec<Box<[u8]>>, path: &[u8]) -> Result<Trail, ConvertError> {
        let mut todo: VecDeque<Box<[u8]>> = names.into();
        let mut trail = Trail(Vec::new());
        let mut symlinks = 0;
        while let Some(name) = todo.pop_front() {
            if &*name == b".." {
                // Only symlinks bring these; above the root is the root.
                trail.0.pop();
                continue;
            }
            if name.len() > crate::erofs::NAME_MAX {
                return Err(ConvertError::NameTooLong { name: shown(path), length: name.len() });
            }
            let target = match self.step(&trail, &name, path)? {
                Step::Directory(node) => {
                    trail.0.push((name, node));
                    continue;
                }
                Step::Symlink(target) => target,
            };
            symlinks += 1;
            if symlinks > MAX_SYMLINKS {
                return Err(ConvertError::SymlinkLoop { path: shown(path) });
            }
            if target.starts_with(b"/") {
                trail.0.clear();
            }
            for component in target_components(&target).rev() {
                todo.push_front(component);
            }
        }
        Ok(trail)
    }

    fn step(&mut self, trail: &Trail, name: &[u8], path: &[u8]) -> Result<Step, ConvertError> {
        if let Some(child) = self.tree.child(trail.node(), name) {
            match &self.tree.node(child).payload {
                Payload::Directory { .. } => return Ok(Step::Directory(child)),
                Payload::Symlink(target) => return Ok(Step::Symlink(target.clone())),
                // Removed and made anew.
                Payload::CharDevice(0) => {
                    let attributes = Attributes { permissions: 0o755, ..Attributes::default() };
                    self.insert(trail.node(), name, attributes, Payload::directory());
                    return self.step(trail, name, path);
                }
                Payload::File(_) | Payload::CharDevice(_) | Payload::BlockDevice(_) | Payload::Fifo => {
                    return Err(ConvertError::NotADirectory { path: shown(path), parent: shown(name) });
                }
            }
        }
        let mut attributes = Attributes { permissions: 0o755, ..Attributes::default() };
        if let Some(found) = self.below(trail, name, path)? {
            match found.kind {
                FoundKind::Symlink(target) => return Ok(Step::Symlink(target.into())),
                FoundKind::Directory => attributes = found.attributes,
                FoundKind::File { .. }
                | FoundKind::CharDevice(_)
                | FoundKind::BlockDevice(_)
                | FoundKind::Fifo => {}
            }
        }
        let node = self.tree.add(attributes, Payload::directory());
        self.tree.link(trail.node(), name, node);
        Ok(Step::Directory(node))
    }
}

enum Step {
    Directory(NodeId),
    Symlink(Box<[u8]>),
}

fn device(path: &[u8], major: u32, minor: u32) -> Result<u32, ConvertError> {
    device_number(major, minor).ok_or_else(|| ConvertError::DeviceNumber { path: shown(path), major, minor })
}

/// The attributes of an entry. `trusted.overlay.*` is dropped: it would speak to the overlay that
/// the image becomes part of. Name spaces that EROFS has no place for are dropped as well.
fn attributes(entry: &Entry) -> Result<Attributes, ConvertError> {
    let mut xattrs = Xattrs::default();
    for (name, value) in &entry.xattrs {
        if name.starts_with(b"trusted.overlay.") {
            continue;
        }
        match xattrs.set(name, value) {
            XattrAdded::Yes | XattrAdded::NoSuchNamespace => {}
            XattrAdded::TooLong => {
                return Err(ConvertError::XattrTooLong { path: shown(&entry.path), name: shown(name) });
            }
        }
    }
    Ok(Attributes {
        permissions: entry.permissions,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        mtime_nanos: entry.mtime_nanos,
        xattrs,
    })
}

/// The runs and holes of a file.
fn pieces(entry: &Entry) -> Vec<Piece> {
    let Some(runs) = &entry.runs else { return vec![Piece::Bytes(entry.size)] };
    let mut pieces = Vec::with_capacity(2 * runs.len() + 1);
    let mut at = 0;
    for (offset, length) in runs {
        // The parser checked that runs are in order and inside the file.
        pieces.extend([Piece::Hole(offset - at), Piece::Bytes(*length)]);
        at = offset + length;
    }
    pieces.push(Piece::Hole(entry.size - at));
    pieces
}
