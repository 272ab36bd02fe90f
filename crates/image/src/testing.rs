//! Reading images back as plain data, for tests and fuzzing.

use std::collections::BTreeMap;
use std::io::Cursor;

use crate::erofs::{
    ImageWriter, Inode, ReadAt, Reader, ReaderError, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG,
};
use crate::layer::{ConvertError, Converted, Lower, convert};

/// All of an inode that a reader sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) nid: u64,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) links: u32,
    /// File contents or symlink target.
    pub(crate) bytes: Vec<u8>,
    pub(crate) device: u32,
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

/// Every path of an image with what is there; the root is the empty path.
pub(crate) fn walk<R: ReadAt>(reader: &Reader<R>) -> Result<BTreeMap<String, Seen>, ReaderError> {
    let mut all = BTreeMap::new();
    let mut todo = vec![(String::new(), reader.root()?)];
    while let Some((path, inode)) = todo.pop() {
        if inode.type_bits() == S_IFDIR {
            for (name, nid, _) in reader.list(&inode)? {
                // What is listed can also be looked up.
                if reader.lookup(&inode, &name)? != Some(nid) {
                    return Err(ReaderError::Damaged("a listed name that lookup does not find"));
                }
                // Different names must not become one.
                let name = name.escape_ascii();
                let child = if path.is_empty() { name.to_string() } else { format!("{path}/{name}") };
                todo.push((child, reader.inode(nid)?));
            }
        }
        let seen = see(reader, &inode)?;
        all.insert(path, seen);
    }
    Ok(all)
}

fn see<R: ReadAt>(reader: &Reader<R>, inode: &Inode) -> Result<Seen, ReaderError> {
    let bytes = match inode.type_bits() {
        S_IFREG => {
            let mut bytes = vec![0; inode.size as usize];
            reader.read_exact(inode, &mut bytes, 0)?;
            bytes
        }
        S_IFLNK => reader.target(inode)?,
        S_IFDIR | S_IFIFO | S_IFCHR | S_IFBLK => Vec::new(),
        _ => return Err(ReaderError::Damaged("an inode of unknown type")),
    };
    let xattrs = reader.xattrs(inode)?;
    Ok(Seen {
        nid: inode.nid,
        mode: inode.mode,
        uid: inode.uid,
        gid: inode.gid,
        mtime: (inode.mtime, inode.mtime_nanos),
        links: inode.links,
        bytes,
        device: if matches!(inode.type_bits(), S_IFCHR | S_IFBLK) { inode.device() } else { 0 },
        xattrs: xattrs
            .iter()
            .map(|(name, value)| (String::from_utf8_lossy(&name).into_owned(), value.to_vec()))
            .collect(),
    })
}

/// Nothing below.
pub(crate) struct NoLower;

impl Lower for NoLower {
    fn look_up(&mut self, _: &[&[u8]]) -> Result<Option<crate::layer::Found>, crate::layer::LowerError> {
        Ok(None)
    }
}

/// Converts a tar in memory.
pub(crate) fn convert_in_memory(
    tar: &[u8],
    lower: &mut dyn Lower,
    limit: u64,
    metadata_limit: u64,
) -> Result<(Vec<u8>, Converted), ConvertError> {
    let writer = ImageWriter::new(Cursor::new(Vec::new()), limit, None).map_err(ConvertError::Finish)?;
    let (_, out, converted) = convert(tar, writer, lower, metadata_limit, [7; 16])?;
    Ok((out.into_inner(), converted))
}
