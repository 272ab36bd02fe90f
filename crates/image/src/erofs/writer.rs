//! The writer: data first, then directories, inodes and the superblock.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Bound::{Excluded, Unbounded};
use std::path::PathBuf;

use thiserror::Error;

use super::directory::{self, Entry};
use super::format::{self, BLOCK, INODE, SLOT};
use super::spool::Spool;
use super::tree::{Data, Node, NodeId, Payload, Tree};
use super::xattr::Xattrs;

/// Longer tails get a block of their own: inlining them would waste more in the metadata area,
/// where an inode and its tail must share a block, than it saves.
const TAIL_MAX: u64 = 2048;
/// Shorter holes are written as zeros.
const SEEK_MIN: u64 = 64 << 10;
/// Where the first inode lies in the metadata area. Not 0: inode number 0 means "no entry" to
/// readers of directories.
const FIRST_INODE: u64 = 64;
const COPY_BUFFER: usize = 128 << 10;
static ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// The image could not be written.
#[derive(Debug, Error)]
pub(crate) enum WriterError {
    #[error("could not write the EROFS image")]
    Output(#[source] io::Error),
    #[error("could not read the file's bytes")]
    Input(#[source] io::Error),
    #[error("the file's bytes end {missing} bytes early")]
    Short { missing: u64 },
    #[error("the layer grows beyond {limit} bytes")]
    TooLarge { limit: u64 },
}

/// A run of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece {
    /// So many bytes that are zero and not in the input.
    Hole(u64),
    /// So many bytes of the input.
    Bytes(u64),
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    /// Size of the image in bytes.
    pub(crate) bytes: u64,
    /// Inodes in it.
    pub(crate) inodes: u64,
}

/// Writes one image into `W`, which must be empty.
pub(crate) struct ImageWriter<W: Write + Seek> {
    out: io::BufWriter<W>,
    /// Always at a block boundary between files.
    position: u64,
    limit: u64,
    spool: Spool,
    buffer: Box<[u8]>,
}

impl<W: Write + Seek> ImageWriter<W> {
    /// `limit` bounds the image's size; tails wait in an unnamed file of `spool_directory`.
    pub(crate) fn new(out: W, limit: u64, spool_directory: Option<PathBuf>) -> Result<Self, WriterError> {
        let mut out = io::BufWriter::with_capacity(COPY_BUFFER, out);
        out.write_all(&ZEROS).map_err(WriterError::Output)?;
        Ok(Self {
            out,
            position: BLOCK,
            limit,
            spool: Spool::new(spool_directory),
            buffer: vec![0; COPY_BUFFER].into_boxed_slice(),
        })
    }

    /// Writes the bytes of one file. `xattrs` are those of its inode: they decide how much may
    /// lie behind it.
    pub(crate) fn file(
        &mut self,
        pieces: &[Piece],
        xattrs: &Xattrs,
        input: &mut dyn Read,
    ) -> Result<Data, WriterError> {
        let mut size = 0u64;
        for piece in pieces {
            let (Piece::Hole(n) | Piece::Bytes(n)) = *piece;
            size = size.checked_add(n).ok_or(WriterError::TooLarge { limit: self.limit })?;
        }
        let tail = size % BLOCK;
        let inline = tail > 0 && tail <= TAIL_MAX && INODE + xattrs.disk_size() + tail <= BLOCK;
        let whole = if inline { size - tail } else { size };
        self.reserve(whole)?;
        let start = if whole > 0 { self.block()? } else { 0 };
        let spooled = self.spool.position();
        let mut left = whole;
        for piece in pieces {
            match *piece {
                Piece::Hole(n) => self.hole(n, &mut left)?,
                Piece::Bytes(n) => self.copy(n, &mut left, input)?,
            }
        }
        self.pad()?;
        Ok(Data { size, start, tail: inline.then_some((spooled, tail as u16)) })
    }

    fn reserve(&self, bytes: u64) -> Result<(), WriterError> {
        match self.position.checked_add(bytes) {
            Some(end) if end <= self.limit => Ok(()),
            Some(_) | None => Err(WriterError::TooLarge { limit: self.limit }),
        }
    }

    /// The number of the block at the current position.
    fn block(&self) -> Result<u32, WriterError> {
        u32::try_from(self.position / BLOCK).map_err(|_| WriterError::TooLarge { limit: self.limit })
    }

    fn hole(&mut self, mut bytes: u64, left: &mut u64) -> Result<(), WriterError> {
        let in_blocks = bytes.min(*left);
        if in_blocks >= SEEK_MIN {
            // Metadata always follows, so the file never ends in the hole.
            self.position += in_blocks;
            self.out.seek(SeekFrom::Start(self.position)).map_err(WriterError::Output)?;
            *left -= in_blocks;
            bytes -= in_blocks;
        }
        while bytes > 0 {
            let n = bytes.min(BLOCK);
            self.put(&ZEROS[..n as usize], left)?;
            bytes -= n;
        }
        Ok(())
    }

    fn copy(&mut self, mut bytes: u64, left: &mut u64, input: &mut dyn Read) -> Result<(), WriterError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut result = Ok(());
        while bytes > 0 && result.is_ok() {
            let want = bytes.min(buffer.len() as u64) as usize;
            result = match input.read(&mut buffer[..want]) {
                Ok(0) => Err(WriterError::Short { missing: bytes }),
                Ok(n) => {
                    bytes -= n as u64;
                    self.put(&buffer[..n], left)
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
                Err(error) => Err(WriterError::Input(error)),
            };
        }
        self.buffer = buffer;
        result
    }

    /// Sends bytes to the blocks while `left` says that some are missing there, then to the spool.
    fn put(&mut self, bytes: &[u8], left: &mut u64) -> Result<(), WriterError> {
        let n = (bytes.len() as u64).min(*left) as usize;
        let (blocks, tail) = bytes.split_at(n);
        self.out.write_all(blocks).map_err(WriterError::Output)?;
        self.position += n as u64;
        *left -= n as u64;
        if tail.is_empty() { Ok(()) } else { self.spool.append(tail).map_err(WriterError::Output) }
    }

    fn pad(&mut self) -> Result<(), WriterError> {
        let padding = format::align(self.position, BLOCK) - self.position;
        self.out.write_all(&ZEROS[..padding as usize]).map_err(WriterError::Output)?;
        self.position += padding;
        Ok(())
    }

    /// Writes the metadata of a tree whose data went out through [`file`](Self::file), then the
    /// superblock, and gives the output back. `uuid` names the file system.
    pub(crate) fn finish(mut self, tree: &Tree, uuid: [u8; 16]) -> Result<(W, Written), WriterError> {
        let plan = Plan::new(tree);
        self.reserve(plan.block_bytes)?;
        let mut starts = vec![0u32; tree.len()];
        for &id in &plan.order {
            starts[Tree::index(id)] = self.late_blocks(tree, &plan, id)?;
        }
        let metadata = self.block()?;
        self.reserve(plan.metadata_bytes)?;
        for (i, &id) in plan.order.iter().enumerate() {
            let place = plan.place(id);
            let mut unbounded = u64::MAX;
            let gap = u64::from(metadata) * BLOCK + place.nid * SLOT - self.position;
            self.put(&ZEROS[..gap as usize], &mut unbounded)?;
            let inode = self.inode(tree, &plan, id, i as u32 + 1, starts[Tree::index(id)])?;
            self.put(&inode, &mut unbounded)?;
        }
        self.pad()?;
        let blocks = self.block()?;
        let inodes = plan.order.len() as u64;
        let superblock = superblock(metadata, blocks, inodes, uuid);
        let write = |out: &mut io::BufWriter<W>| {
            out.seek(SeekFrom::Start(format::SUPER_OFFSET))?;
            out.write_all(&superblock)?;
            out.flush()
        };
        write(&mut self.out).map_err(WriterError::Output)?;
        let out = self.out.into_inner().map_err(|e| WriterError::Output(e.into_error()))?;
        Ok((out, Written { bytes: u64::from(blocks) * BLOCK, inodes }))
    }

    /// Writes those blocks of a directory or symlink that do not lie behind its inode, and
    /// returns the first one's number.
    fn late_blocks(&mut self, tree: &Tree, plan: &Plan, id: NodeId) -> Result<u32, WriterError> {
        let place = plan.place(id);
        let whole = (place.size - u64::from(place.tail)) as usize;
        let contents = match &tree.node(id).payload {
            Payload::Directory { .. } if whole > 0 => plan.contents(tree, id),
            Payload::Symlink(target) if whole > 0 => target.to_vec(),
            Payload::Directory { .. }
            | Payload::Symlink(_)
            | Payload::File(_)
            | Payload::CharDevice(_)
            | Payload::BlockDevice(_)
            | Payload::Fifo => return Ok(0),
        };
        let start = self.block()?;
        let mut left = whole as u64;
        self.put(&contents[..whole], &mut left)?;
        self.pad()?;
        Ok(start)
    }

    /// The bytes of an inode with its attributes and tail.
    fn inode(
        &self,
        tree: &Tree,
        plan: &Plan,
        id: NodeId,
        number: u32,
        late_start: u32,
    ) -> Result<Vec<u8>, WriterError> {
        let node = tree.node(id);
        let place = plan.place(id);
        let xattrs = effective_xattrs(node);
        let union = match &node.payload {
            Payload::Directory { .. } | Payload::Symlink(_) => late_start,
            Payload::File(data) => data.start,
            Payload::CharDevice(device) | Payload::BlockDevice(device) => *device,
            Payload::Fifo => 0,
        };
        let layout = if place.tail > 0 { format::LAYOUT_INLINE } else { format::LAYOUT_PLAIN };
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&(1 | layout << 1).to_le_bytes());
        bytes.extend_from_slice(&xattrs.count_field().to_le_bytes());
        bytes.extend_from_slice(&(node.payload.type_bits() | node.attributes.permissions).to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&place.size.to_le_bytes());
        bytes.extend_from_slice(&union.to_le_bytes());
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&node.attributes.uid.to_le_bytes());
        bytes.extend_from_slice(&node.attributes.gid.to_le_bytes());
        bytes.extend_from_slice(&node.attributes.mtime.to_le_bytes());
        bytes.extend_from_slice(&node.attributes.mtime_nanos.to_le_bytes());
        bytes.extend_from_slice(&place.links.to_le_bytes());
        bytes.extend_from_slice(&[0; 16]);
        xattrs.encode(&mut bytes);
        let tail = usize::from(place.tail);
        match &node.payload {
            Payload::Directory { .. } if tail > 0 => {
                let contents = plan.contents(tree, id);
                bytes.extend_from_slice(&contents[contents.len() - tail..]);
            }
            Payload::Symlink(target) if tail > 0 => bytes.extend_from_slice(target),
            Payload::File(Data { tail: Some((offset, len)), .. }) => {
                self.spool.read(*offset, usize::from(*len), &mut bytes).map_err(WriterError::Output)?;
            }
            Payload::Directory { .. }
            | Payload::Symlink(_)
            | Payload::File(_)
            | Payload::CharDevice(_)
            | Payload::BlockDevice(_)
            | Payload::Fifo => {}
        }
        Ok(bytes)
    }
}

/// The attributes of a node, with the mark of an opaque directory.
fn effective_xattrs(node: &Node) -> Cow<'_, Xattrs> {
    match &node.payload {
        Payload::Directory { opaque: true, .. } => Cow::Owned(node.attributes.xattrs.with_opaque_mark()),
        Payload::Directory { opaque: false, .. }
        | Payload::File(_)
        | Payload::Symlink(_)
        | Payload::CharDevice(_)
        | Payload::BlockDevice(_)
        | Payload::Fifo => Cow::Borrowed(&node.attributes.xattrs),
    }
}

/// Where an inode lies and what only the whole tree knows of it.
#[derive(Debug, Clone, Copy)]
struct Place {
    nid: u64,
    size: u64,
    /// How much of the size lies behind the inode.
    tail: u16,
    /// Zero for nodes without a name: they are not written.
    links: u32,
    /// The directory that holds a directory.
    parent: NodeId,
}

/// The layout of the metadata, decided before any of it is written because directories name
/// inodes by their place.
struct Plan {
    /// Named nodes in the order of their arrival: so are the tails in the spool.
    order: Vec<NodeId>,
    places: Vec<Place>,
    /// What directories and long symlinks need in the data area.
    block_bytes: u64,
    metadata_bytes: u64,
}

impl Plan {
    fn new(tree: &Tree) -> Self {
        let unnamed = Place { nid: 0, size: 0, tail: 0, links: 0, parent: Tree::ROOT };
        let mut plan =
            Self { order: Vec::new(), places: vec![unnamed; tree.len()], block_bytes: 0, metadata_bytes: 0 };
        plan.count_links(tree);
        plan.order = tree.ids().filter(|id| plan.place(*id).links > 0).collect();
        let mut at = FIRST_INODE;
        for i in 0..plan.order.len() {
            let id = plan.order[i];
            at = plan.lay_out(tree.node(id), id, at);
        }
        plan.metadata_bytes = format::align(at, BLOCK);
        plan
    }

    fn place(&self, id: NodeId) -> &Place {
        &self.places[Tree::index(id)]
    }

    /// Walks the tree: counts names, finds parents and the sizes of directories.
    fn count_links(&mut self, tree: &Tree) {
        let mut todo = vec![Tree::ROOT];
        self.places[Tree::index(Tree::ROOT)].links = 2;
        while let Some(directory) = todo.pop() {
            let Payload::Directory { children, .. } = &tree.node(directory).payload else { continue };
            for &child in children.values() {
                let place = &mut self.places[Tree::index(child)];
                place.links += 1;
                if let Payload::Directory { .. } = tree.node(child).payload {
                    place.links += 1;
                    place.parent = directory;
                    self.places[Tree::index(directory)].links += 1;
                    todo.push(child);
                }
            }
            self.places[Tree::index(directory)].size =
                directory::size(dot_names(children).map(|(name, _)| name));
        }
    }

    /// Places one inode at or after `at` in the metadata area and returns where it ends.
    fn lay_out(&mut self, node: &Node, id: NodeId, at: u64) -> u64 {
        let fixed = INODE + effective_xattrs(node).disk_size();
        let fits = |tail: u64| if fixed + tail <= BLOCK { tail } else { 0 };
        let place = &mut self.places[Tree::index(id)];
        let tail = match &node.payload {
            Payload::Directory { .. } => fits(place.size % BLOCK),
            Payload::Symlink(target) => {
                place.size = target.len() as u64;
                fits(place.size)
            }
            Payload::File(data) => {
                place.size = data.size;
                data.tail.map_or(0, |(_, len)| u64::from(len))
            }
            Payload::CharDevice(_) | Payload::BlockDevice(_) | Payload::Fifo => 0,
        };
        place.tail = tail as u16;
        if !matches!(node.payload, Payload::File(_)) {
            self.block_bytes += format::align(place.size - tail, BLOCK);
        }
        // An inode with a tail shares one block with it; one without must only be whole itself.
        let together = if tail > 0 { fixed + tail } else { INODE };
        let at = if at % BLOCK + together > BLOCK { format::align(at, BLOCK) } else { at };
        place.nid = at / SLOT;
        format::align(at + fixed + tail, SLOT)
    }

    /// The contents of a directory.
    fn contents(&self, tree: &Tree, id: NodeId) -> Vec<u8> {
        let Payload::Directory { children, .. } = &tree.node(id).payload else { return Vec::new() };
        let entries: Vec<Entry<'_>> = dot_names(children)
            .map(|(name, child)| {
                let node = match child {
                    Child::Node(node) => node,
                    Child::This => id,
                    Child::Parent => self.place(id).parent,
                };
                let file_type = format::file_type(tree.node(node).payload.type_bits());
                Entry { name, nid: self.place(node).nid, file_type }
            })
            .collect();
        directory::encode(&entries)
    }
}

enum Child {
    This,
    Parent,
    Node(NodeId),
}

/// The names of a directory with `.` and `..` at their sorted places.
fn dot_names(children: &BTreeMap<Box<[u8]>, NodeId>) -> impl Iterator<Item = (&[u8], Child)> {
    let before = children.range::<[u8], _>((Unbounded, Excluded(&b"."[..])));
    let after = children.range::<[u8], _>((Excluded(&b".."[..]), Unbounded));
    // Nothing sorts between "." and ".." but names that start with "." and a byte below ".".
    let between = children.range::<[u8], _>((Excluded(&b"."[..]), Excluded(&b".."[..])));
    before
        .map(|(name, id)| (&**name, Child::Node(*id)))
        .chain([(&b"."[..], Child::This)])
        .chain(between.map(|(name, id)| (&**name, Child::Node(*id))))
        .chain([(&b".."[..], Child::Parent)])
        .chain(after.map(|(name, id)| (&**name, Child::Node(*id))))
}

fn superblock(metadata: u32, blocks: u32, inodes: u64, uuid: [u8; 16]) -> Vec<u8> {
    // The checksum covers the rest of the block, which holds nothing else.
    let mut sb = vec![0u8; (BLOCK - format::SUPER_OFFSET) as usize];
    let mut set = |at: usize, bytes: &[u8]| sb[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, &format::MAGIC.to_le_bytes());
    set(8, &(format::COMPAT_SB_CHECKSUM | format::COMPAT_MTIME).to_le_bytes());
    set(12, &[format::BLOCK_BITS]);
    set(14, &((FIRST_INODE / SLOT) as u16).to_le_bytes());
    set(16, &inodes.to_le_bytes());
    set(36, &blocks.to_le_bytes());
    set(40, &metadata.to_le_bytes());
    set(48, &uuid);
    // The kernel starts from all ones and does not invert the result.
    let checksum = !crc32c::crc32c(&sb);
    sb[4..8].copy_from_slice(&checksum.to_le_bytes());
    sb
}
