//! What lies below a layer: its lower layers' images, seen as overlayfs would merge them.

use std::io::{self, Read};
use std::sync::Arc;

use thiserror::Error;

use crate::erofs::{
    Attributes, Inode, ReadAt, Reader, ReaderError, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG,
};

/// The lower layers cannot answer.
#[derive(Debug, Error)]
pub(crate) enum LowerError {
    /// A lower layer of the same pull failed; its own error is the one to show.
    #[error("a lower layer could not be completed")]
    Gone,
    #[error(transparent)]
    Reader(#[from] ReaderError),
}

/// The lower layers of one layer. A call may block until they are complete.
pub(crate) trait Lower {
    /// What their merged tree has at a path, without following symlinks.
    fn look_up(&mut self, path: &[&[u8]]) -> Result<Option<Found>, LowerError>;
}

/// An inode of a lower layer.
pub(crate) struct Found {
    pub(crate) attributes: Attributes,
    pub(crate) kind: FoundKind,
}

/// What it is.
pub(crate) enum FoundKind {
    Directory,
    Symlink(Vec<u8>),
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
    File { size: u64, content: Box<dyn Read> },
}

/// Complete layers, merged.
pub(crate) struct LayerStack<R> {
    /// Topmost first.
    layers: Vec<Arc<Reader<R>>>,
}

impl<R: ReadAt + 'static> LayerStack<R> {
    /// Opens the images of the layers, lowest first.
    pub(crate) fn new(sources: Vec<R>) -> Result<Self, LowerError> {
        let mut layers = Vec::with_capacity(sources.len());
        for source in sources.into_iter().rev() {
            layers.push(Arc::new(Reader::open(source)?));
        }
        Ok(Self { layers })
    }

    fn found(&self, layer: usize, inode: Inode) -> Result<Option<Found>, LowerError> {
        let reader = &self.layers[layer];
        let kind = match inode.type_bits() {
            S_IFDIR => FoundKind::Directory,
            S_IFLNK => FoundKind::Symlink(reader.target(&inode)?),
            S_IFCHR => FoundKind::CharDevice(inode.device()),
            S_IFBLK => FoundKind::BlockDevice(inode.device()),
            S_IFIFO => FoundKind::Fifo,
            S_IFREG => FoundKind::File {
                size: inode.size,
                content: Box::new(Content { reader: Arc::clone(reader), inode: inode.clone(), at: 0 }),
            },
            _ => return Err(ReaderError::Damaged("an inode of unknown type").into()),
        };
        let xattrs = reader.xattrs(&inode)?.without_overlay_marks();
        let attributes = Attributes {
            permissions: inode.mode & 0o7777,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            mtime_nanos: inode.mtime_nanos,
            xattrs,
        };
        Ok(Some(Found { attributes, kind }))
    }

    /// The entry `name` of a merged directory: the layers that have it, topmost first; more than
    /// one only where all of them are directories to be merged.
    fn merged_child(&self, directory: &Merged, name: &[u8]) -> Result<Merged, LowerError> {
        let mut child = Merged::default();
        for (layer, inode) in &directory.0 {
            let reader = &self.layers[*layer];
            let Some(nid) = reader.lookup(inode, name)? else { continue };
            let inode = reader.inode(nid)?;
            let whiteout = inode.type_bits() == S_IFCHR && inode.device() == 0;
            if whiteout || (!child.0.is_empty() && inode.type_bits() != S_IFDIR) {
                break;
            }
            let last = inode.type_bits() != S_IFDIR || reader.xattrs(&inode)?.has_opaque_mark();
            child.0.push((*layer, inode));
            if last {
                break;
            }
        }
        Ok(child)
    }
}

/// The inodes that make up one name of the merged tree, by layer.
#[derive(Default)]
struct Merged(Vec<(usize, Inode)>);

impl<R: ReadAt + 'static> Lower for LayerStack<R> {
    fn look_up(&mut self, path: &[&[u8]]) -> Result<Option<Found>, LowerError> {
        let mut at = Merged::default();
        for (layer, reader) in self.layers.iter().enumerate() {
            let root = reader.root()?;
            let opaque = reader.xattrs(&root)?.has_opaque_mark();
            at.0.push((layer, root));
            if opaque {
                break;
            }
        }
        for name in path {
            at = self.merged_child(&at, name)?;
        }
        match at.0.into_iter().next() {
            Some((layer, inode)) => self.found(layer, inode),
            None => Ok(None),
        }
    }
}

/// The bytes of a file in an image.
struct Content<R> {
    reader: Arc<Reader<R>>,
    inode: Inode,
    at: u64,
}

impl<R: ReadAt> Read for Content<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = (self.inode.size - self.at).min(buffer.len() as u64) as usize;
        match self.reader.read_exact(&self.inode, &mut buffer[..n], self.at) {
            Ok(()) => {
                self.at += n as u64;
                Ok(n)
            }
            Err(ReaderError::Io(error)) => Err(error),
            Err(error @ ReaderError::Damaged(_)) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }
}
