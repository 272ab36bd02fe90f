//! Deletes a directory tree that a workload has filled. It runs in a process of its own: the tree may be
//! millions of files large and any number of directories deep.

use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

/// Deletes everything in `parent`, which holds nothing but rubbish.
///
/// Directories are moved up into `parent` before they are entered, so depth costs neither stack nor
/// descriptors, and no path gets too long.
pub fn empty(parent: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = rustix::fs::open(parent, flags, Mode::empty())?;
    let mut counter = 0_u64;
    loop {
        let mut found = false;
        for entry in Dir::read_from(&top)? {
            let name = entry?.file_name().to_owned();
            if name == c"." || name == c".." {
                continue;
            }
            found = true;
            let directory = match rustix::fs::openat(&top, &*name, flags, Mode::empty()) {
                Ok(directory) => directory,
                Err(Errno::NOENT) => continue,
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    gone(rustix::fs::unlinkat(&top, &*name, AtFlags::empty()))?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            for entry in Dir::read_from(&directory)? {
                let entry = entry?;
                let below = entry.file_name();
                if below == c"." || below == c".." {
                    continue;
                }
                if entry.file_type() == FileType::Directory {
                    counter += 1;
                    let place = format!("{}-{counter}", rustix::process::getpid());
                    gone(rustix::fs::renameat(&directory, below, &top, &*place))?;
                } else {
                    gone(rustix::fs::unlinkat(&directory, below, AtFlags::empty()))?;
                }
            }
            gone(rustix::fs::unlinkat(&top, &*name, AtFlags::REMOVEDIR))?;
        }
        if !found {
            return Ok(());
        }
    }
}

/// Another remover may be at work in the same place.
fn gone(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Err(Errno::NOENT | Errno::EXIST | Errno::NOTEMPTY) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_deeper_than_any_path_is_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut at = rustix::fs::open(directory.path(), flags, Mode::empty()).unwrap();
        for _ in 0..3_000 {
            rustix::fs::mkdirat(&at, "deeper", Mode::from_raw_mode(0o700)).unwrap();
            rustix::fs::symlinkat("/", &at, "link").unwrap();
            at = rustix::fs::openat(&at, "deeper", flags, Mode::empty()).unwrap();
        }
        drop(at);
        empty(directory.path()).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn links_are_deleted_and_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("kept"), "").unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), directory.path().join("link")).unwrap();
        std::fs::create_dir(directory.path().join("sub")).unwrap();
        std::os::unix::fs::symlink(outside.path(), directory.path().join("sub/link")).unwrap();
        empty(directory.path()).unwrap();
        assert!(outside.path().join("kept").exists());
    }
}
