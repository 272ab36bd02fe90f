//! A reader for the images that the writer makes: used where a layer needs what lies in lower
//! ones, and to check what was written. It trusts nothing it reads.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

use super::directory;
use super::format::{self, BLOCK, INODE, SLOT, le16, le32, le64};
use super::xattr::Xattrs;

/// The image is not one of ours, or is damaged.
#[derive(Debug, Error)]
pub(crate) enum ReaderError {
    #[error("could not read the EROFS image")]
    Io(#[from] io::Error),
    #[error("the EROFS image is damaged: {0}")]
    Damaged(&'static str),
}

/// Positioned reads.
pub(crate) trait ReadAt {
    /// Fills the buffer from `offset` or fails.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

impl ReadAt for Vec<u8> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

/// An inode as it is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inode {
    pub(crate) nid: u64,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nanos: u32,
    pub(crate) links: u32,
    pub(crate) size: u64,
    /// First block, or the device.
    union: u32,
    inline: bool,
    xattr_size: u64,
}

impl Inode {
    pub(crate) fn type_bits(&self) -> u16 {
        self.mode & format::S_IFMT
    }

    pub(crate) fn device(&self) -> u32 {
        self.union
    }
}

/// An opened image.
pub(crate) struct Reader<R> {
    source: R,
    metadata: u64,
    root: u64,
    pub(crate) inodes: u64,
    /// The length of the whole image, as its superblock states it.
    pub(crate) bytes: u64,
}

impl<R: ReadAt> Reader<R> {
    /// Reads and checks the superblock.
    pub(crate) fn open(source: R) -> Result<Self, ReaderError> {
        let mut sb = vec![0; (BLOCK - format::SUPER_OFFSET) as usize];
        source.read_exact_at(&mut sb, format::SUPER_OFFSET)?;
        if le32(&sb, 0) != format::MAGIC || sb[12] != format::BLOCK_BITS {
            return Err(ReaderError::Damaged("no superblock"));
        }
        let checksum = le32(&sb, 4);
        sb[4..8].fill(0);
        if !crc32c::crc32c(&sb) != checksum {
            return Err(ReaderError::Damaged("the superblock's checksum does not fit"));
        }
        Ok(Self {
            source,
            metadata: u64::from(le32(&sb, 40)) * BLOCK,
            root: u64::from(le16(&sb, 14)),
            inodes: le64(&sb, 16),
            bytes: u64::from(le32(&sb, 36)) * BLOCK,
        })
    }

    /// The root directory.
    pub(crate) fn root(&self) -> Result<Inode, ReaderError> {
        self.inode(self.root)
    }

    fn location(&self, nid: u64) -> Result<u64, ReaderError> {
        nid.checked_mul(SLOT)
            .and_then(|offset| offset.checked_add(self.metadata))
            .ok_or(ReaderError::Damaged("an inode number is out of range"))
    }

    /// The inode of that number.
    pub(crate) fn inode(&self, nid: u64) -> Result<Inode, ReaderError> {
        let mut raw = [0; INODE as usize];
        self.source.read_exact_at(&mut raw, self.location(nid)?)?;
        let inode_format = le16(&raw, 0);
        if inode_format & 1 == 0 {
            return Err(ReaderError::Damaged("a compact inode"));
        }
        let inline = match inode_format >> 1 {
            format::LAYOUT_PLAIN => false,
            format::LAYOUT_INLINE => true,
            _ => return Err(ReaderError::Damaged("an unknown data layout")),
        };
        let count = u64::from(le16(&raw, 2));
        Ok(Inode {
            nid,
            mode: le16(&raw, 4),
            size: le64(&raw, 8),
            union: le32(&raw, 16),
            uid: le32(&raw, 24),
            gid: le32(&raw, 28),
            mtime: le64(&raw, 32).cast_signed(),
            mtime_nanos: le32(&raw, 40),
            links: le32(&raw, 44),
            inline,
            xattr_size: if count == 0 { 0 } else { 12 + 4 * (count - 1) },
        })
    }

    /// The attributes of an inode.
    pub(crate) fn xattrs(&self, inode: &Inode) -> Result<Xattrs, ReaderError> {
        let mut body = vec![0; inode.xattr_size as usize];
        self.source.read_exact_at(&mut body, self.location(inode.nid)? + INODE)?;
        Xattrs::decode(&body).ok_or(ReaderError::Damaged("malformed attributes"))
    }

    /// Fills a buffer from a file's, directory's or symlink's contents.
    pub(crate) fn read_exact(
        &self,
        inode: &Inode,
        mut buffer: &mut [u8],
        mut offset: u64,
    ) -> Result<(), ReaderError> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > inode.size) {
            return Err(ReaderError::Damaged("a read beyond the end"));
        }
        let tail = if inode.inline { inode.size % BLOCK } else { 0 };
        let whole = inode.size - tail;
        if offset < whole {
            let n = (whole - offset).min(buffer.len() as u64) as usize;
            let (head, rest) = buffer.split_at_mut(n);
            self.source.read_exact_at(head, u64::from(inode.union) * BLOCK + offset)?;
            offset += n as u64;
            buffer = rest;
        }
        if !buffer.is_empty() {
            let start = self.location(inode.nid)? + INODE + inode.xattr_size;
            self.source.read_exact_at(buffer, start + (offset - whole))?;
        }
        Ok(())
    }

    /// The target of a symlink.
    pub(crate) fn target(&self, inode: &Inode) -> Result<Vec<u8>, ReaderError> {
        if inode.size > format::SYMLINK_MAX as u64 {
            return Err(ReaderError::Damaged("a symlink is too long"));
        }
        let mut target = vec![0; inode.size as usize];
        self.read_exact(inode, &mut target, 0)?;
        Ok(target)
    }

    fn directory_block(&self, directory: &Inode, number: u64) -> Result<Vec<u8>, ReaderError> {
        let offset = number * BLOCK;
        let mut block = vec![0; (directory.size - offset).min(BLOCK) as usize];
        self.read_exact(directory, &mut block, offset)?;
        Ok(block)
    }

    /// The number of the inode that a directory has under a name.
    pub(crate) fn lookup(&self, directory: &Inode, name: &[u8]) -> Result<Option<u64>, ReaderError> {
        let malformed = ReaderError::Damaged("a malformed directory");
        if directory.type_bits() != format::S_IFDIR {
            return Ok(None);
        }
        // The last block whose first name is not beyond the one sought.
        let (mut low, mut high) = (0, directory.size.div_ceil(BLOCK));
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.directory_block(directory, middle)?;
            let Some(entries) = directory::decode(&block) else { return Err(malformed) };
            let Some((first, ..)) = entries.first() else { return Err(malformed) };
            if *first > name {
                high = middle;
            } else {
                if let Some((_, nid, _)) = entries.iter().find(|(n, ..)| *n == name) {
                    return Ok(Some(*nid));
                }
                low = middle + 1;
            }
        }
        Ok(None)
    }

    /// All entries of a directory but `.` and `..`: name, inode number, file type.
    pub(crate) fn list(&self, directory: &Inode) -> Result<Vec<(Vec<u8>, u64, u8)>, ReaderError> {
        let mut all = Vec::new();
        for number in 0..directory.size.div_ceil(BLOCK) {
            let block = self.directory_block(directory, number)?;
            let entries = directory::decode(&block).ok_or(ReaderError::Damaged("a malformed directory"))?;
            for (name, nid, file_type) in entries {
                if name != b"." && name != b".." {
                    all.push((name.to_vec(), nid, file_type));
                }
            }
        }
        Ok(all)
    }
}
