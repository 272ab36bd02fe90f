//! A copy of a directory with all that file systems keep: owners, modes, times, attributes, links, holes.
//!
//! The source is an image's, which nobody changes meanwhile, and the target is ours alone: so names may be used where
//! otherwise only open files would be safe. Every name below the source is a real one, never a link's.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, getxattr, getxattr_query, lgetxattr,
    lgetxattr_query, listxattr, listxattr_query, llistxattr, llistxattr_query,
};
use rustix::io::Errno;

/// What one volume may hold: more than any image has, and an end to a hostile one.
const MAX_ENTRIES: usize = 1 << 20;
/// Holes count: to read one takes time.
const MAX_BYTES: u64 = 16 << 30;
const CHUNK: usize = 128 << 10;

/// Copies a directory's contents and attributes into one that is there and empty. `from` may be a link of /proc.
pub fn directory(from: &Path, to: &Path) -> io::Result<()> {
    within(from, to, MAX_ENTRIES, MAX_BYTES)
}

fn within(from: &Path, to: &Path, entries: usize, bytes: u64) -> io::Result<()> {
    let mut copy = Copy { links: HashMap::new(), entries, bytes };
    // Outer directories come first, and get their times last: what is made in them changes these.
    let mut directories = vec![PathBuf::new()];
    let mut next = 0;
    while let Some(path) = directories.get(next).cloned() {
        next += 1;
        for entry in fs::read_dir(from.join(&path))? {
            let path = path.join(entry?.file_name());
            if copy.entry(&from.join(&path), &to.join(&path))? {
                directories.push(path);
            }
        }
    }
    for path in directories.iter().rev() {
        // The first is named by its descriptor, whose link is to be followed.
        let status = fs::metadata(from.join(path))?;
        attributes(&from.join(path), &to.join(path), &status)?;
    }
    Ok(())
}

struct Copy {
    /// Files with several names, by device and inode, and where the first of them is.
    links: HashMap<(u64, u64), PathBuf>,
    entries: usize,
    bytes: u64,
}

impl Copy {
    /// Answers whether it is a directory, whose attributes wait until it is filled.
    fn entry(&mut self, from: &Path, to: &Path) -> io::Result<bool> {
        self.entries = self.entries.checked_sub(1).ok_or_else(too_much)?;
        let status = fs::symlink_metadata(from)?;
        let kind = status.file_type();
        if kind.is_dir() {
            fs::create_dir(to)?;
            return Ok(true);
        }
        if status.nlink() > 1 {
            let first = self.links.entry((status.dev(), status.ino())).or_insert_with(|| to.to_owned());
            if first != to {
                fs::hard_link(&*first, to)?;
                return Ok(false);
            }
        }
        if kind.is_file() {
            self.bytes = self.bytes.checked_sub(status.len()).ok_or_else(too_much)?;
            content(&mut File::open(from)?, &mut File::create_new(to)?, status.len())?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(from)?, to)?;
        } else {
            let node = if kind.is_fifo() {
                FileType::Fifo
            } else if kind.is_char_device() {
                FileType::CharacterDevice
            } else if kind.is_block_device() {
                FileType::BlockDevice
            } else {
                FileType::Socket
            };
            rustix::fs::mknodat(CWD, to, node, Mode::empty(), status.rdev())?;
        }
        attributes(from, to, &status)?;
        Ok(false)
    }
}

fn too_much() -> io::Error {
    let limits = format!("{MAX_ENTRIES} files or {} GiB", MAX_BYTES >> 30);
    io::Error::other(format!("it holds more than {limits}, the limit for an image's volume"))
}

/// Runs of zeros become holes: a file of an image may be mostly that.
fn content(from: &mut File, to: &mut File, length: u64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = from.read(&mut chunk)?;
        if count == 0 {
            // Holes at the end.
            return to.set_len(length);
        }
        if chunk[..count].iter().all(|byte| *byte == 0) {
            to.seek(SeekFrom::Current(count as i64))?;
        } else {
            to.write_all(&chunk[..count])?;
        }
    }
}

/// The owner comes first: a change of it takes setuid bits and capabilities away.
fn attributes(from: &Path, to: &Path, status: &Metadata) -> io::Result<()> {
    lchown(to, Some(status.uid()), Some(status.gid()))?;
    if !status.is_symlink() {
        fs::set_permissions(to, Permissions::from_mode(status.mode() & 0o7777))?;
    }
    extended(from, to)?;
    let time = |seconds, nanos| Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps {
        last_access: time(status.atime(), status.atime_nsec()),
        last_modification: time(status.mtime(), status.mtime_nsec()),
    };
    Ok(rustix::fs::utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn extended(from: &Path, to: &Path) -> io::Result<()> {
    // The source itself is named by a link of /proc, which is to be followed: of a directory both are the same.
    let follow = fs::symlink_metadata(to)?.is_dir();
    let names = match names(from, follow) {
        Err(Errno::NOTSUP) => return Ok(()),
        names => names?,
    };
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let value = value(from, name, follow)?;
        match rustix::fs::lsetxattr(to, name, &value, XattrFlags::empty()) {
            // The scratch disk has no place for this kind, as it would have none for a writable layer.
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Each with a NUL behind it.
fn names(path: &Path, follow: bool) -> Result<Vec<u8>, Errno> {
    let mut names = vec![0; if follow { listxattr_query(path)? } else { llistxattr_query(path)? }];
    let length = match follow {
        true => listxattr(path, &mut names[..])?,
        false => llistxattr(path, &mut names[..])?,
    };
    names.truncate(length);
    Ok(names)
}

fn value(path: &Path, name: &[u8], follow: bool) -> Result<Vec<u8>, Errno> {
    let length = if follow { getxattr_query(path, name)? } else { lgetxattr_query(path, name)? };
    let mut value = vec![0; length];
    let length = match follow {
        true => getxattr(path, name, &mut value[..])?,
        false => lgetxattr(path, name, &mut value[..])?,
    };
    value.truncate(length);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_end_is_not_copied_to_its_end() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["a", "b", "c"] {
            fs::write(from.path().join(name), "four").unwrap();
        }
        let fresh = |name: &str| {
            let place = to.path().join(name);
            fs::create_dir(&place).unwrap();
            place
        };
        within(from.path(), &fresh("whole"), 3, 12).unwrap();
        assert_eq!(fs::read_dir(to.path().join("whole")).unwrap().count(), 3);
        for (name, entries, bytes) in [("entries", 2, 12), ("bytes", 3, 11)] {
            let error = within(from.path(), &fresh(name), entries, bytes).unwrap_err();
            assert!(error.to_string().contains("limit for an image's volume"), "{error}");
        }
    }
}
