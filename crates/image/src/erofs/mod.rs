//! EROFS, uncompressed: a writer that streams, and a reader for what it wrote.
//!
//! ```text
//! block 0      | data area                  | metadata area              |
//! sb at 1024   | file blocks, dir blocks    | inode xattrs tail | inode … |
//! ```
//!
//! File data goes out once, as it arrives, into whole blocks; what is left of a file after its
//! last whole block waits in a spool and lies behind its inode in the end. Metadata therefore
//! comes last and the superblock points to it (`meta_blkaddr`). Only names and attributes stay
//! in memory. Facts of the format: Linux `fs/erofs/erofs_fs.h`, `Documentation/filesystems/erofs.rst`.
//!
//! The same input gives the same bytes: nothing depends on the clock, on maps' order or on paths.

mod directory;
mod format;
mod reader;
mod spool;
mod tree;
mod writer;
mod xattr;

pub(crate) use format::{NAME_MAX, SYMLINK_MAX, device_number};
pub(crate) use format::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG};
pub(crate) use reader::{Inode, ReadAt, Reader, ReaderError};
pub(crate) use tree::{Attributes, NodeId, Payload, Tree};
pub(crate) use writer::{ImageWriter, Piece, WriterError};
pub(crate) use xattr::{Added as XattrAdded, Xattrs};
