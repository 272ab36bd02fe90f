//! What makes two mounts one source.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxFlags, fstatvfs, makedev, openat2,
    statx,
};
use serde::{Deserialize, Serialize};

use a3s_box_core::spec::UserNamespace;

use super::mountinfo::Mounts;

/// What a source is. Equal keys are one source: while one is attached its file system and its root cannot go away, so
/// that neither number comes to mean something else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SourceKey {
    /// The device of its file system.
    pub(crate) device: u64,
    /// The inode of its root.
    pub(crate) inode: u64,
    /// The host itself has it mounted read-only. It stays so, whatever containers ask for, and another mount of the same
    /// files that is writable on the host is another source.
    pub(crate) readonly_on_host: bool,
    /// Whose its files seem to be.
    pub(crate) users: Option<UserNamespace>,
    /// How much of the host's mount tree it is.
    pub(crate) tree: Tree,
}

/// How much of the host's mount tree a source is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Tree {
    /// One mount and nothing below it. Which mounts of it may be written is decided in the guest; the host refuses writes
    /// while none may.
    Single,
    /// Mounts lie below it, or may come to. Only the host can have the top read-only and not what is below, so what is asked
    /// of the mounts below is part of what the source is.
    Several {
        /// Which mount of the host it lies on: another may have others below it.
        mount: u64,
        /// The host refuses writes to the top.
        readonly: bool,
        /// And to all below.
        recursive_readonly: bool,
        /// What the host mounts below it later appears.
        propagate: bool,
    },
}

impl Tree {
    /// Whether the guest is told to refuse writes through a mount that is asked for read-only. What lies below a source stays
    /// writable where only its top is to be read-only, which a mount of the guest's could not say, so that is left to the
    /// host; and so it is where the source is not `shared` with mounts that may be written.
    pub(crate) fn refused_in_guest(&self, shared: bool, readonly: bool, recursive_readonly: bool) -> bool {
        match (self, shared) {
            (Self::Single, true) => readonly,
            (Self::Single, false) | (Self::Several { .. }, true | false) => readonly && recursive_readonly,
        }
    }
}

/// A mount that a session asks for, with its source open.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// Which of the session's mounts.
    pub(crate) index: usize,
    /// The root of the source, opened so that nothing can be swapped underneath.
    pub(crate) source: OwnedFd,
    /// What it is.
    pub(crate) key: SourceKey,
    /// Where the host has it.
    pub(crate) path: PathBuf,
    /// Where it lies in its file system, if that can be told.
    pub(crate) location: Option<PathBuf>,
    /// The container may not write.
    pub(crate) readonly: bool,
    /// Nor to what is mounted below.
    pub(crate) recursive_readonly: bool,
    /// Mounts that come later appear.
    pub(crate) propagate: bool,
}

/// What of a mount's specification decides about its source.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) readonly: bool,
    pub(crate) recursive_readonly: bool,
    pub(crate) propagate: bool,
    pub(crate) users: Option<UserNamespace>,
}

/// Finds out what opened sources are.
pub(crate) fn find(opened: Vec<(usize, OwnedFd, Asked)>) -> io::Result<Vec<Wanted>> {
    if opened.is_empty() {
        return Ok(Vec::new());
    }
    let mounts = Mounts::read()?;
    opened.into_iter().map(|(index, source, asked)| identify(&mounts, index, source, asked)).collect()
}

fn identify(mounts: &Mounts, index: usize, source: OwnedFd, asked: Asked) -> io::Result<Wanted> {
    let Asked { readonly, recursive_readonly, propagate, users } = asked;
    let (device, inode) = identity(&source)?;
    let mount = statx(&source, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id;
    let path = fs::read_link(format!("/proc/self/fd/{}", source.as_raw_fd()))?;
    let tree = if propagate || mounts.any_below(mount, &path) {
        Tree::Several { mount, readonly, recursive_readonly, propagate }
    } else {
        Tree::Single
    };
    let readonly_on_host = fstatvfs(&source)?.f_flag.contains(StatVfsMountFlags::RDONLY);
    let location = mounts.location(mount, &path);
    let key = SourceKey { device, inode, readonly_on_host, users, tree };
    Ok(Wanted { index, source, key, path, location, readonly, recursive_readonly, propagate })
}

fn identity(file: impl AsFd) -> io::Result<(u64, u64)> {
    let found = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::INO)?;
    Ok((makedev(found.stx_dev_major, found.stx_dev_minor), found.stx_ino))
}

/// The root of the source at `path`, if the host still has the source `whole` there and `inside` leads from it to `part`,
/// over no link and no other mount.
pub(crate) fn part_of(path: &Path, whole: &SourceKey, inside: &Path, part: &SourceKey) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS).ok()?;
    if identity(&root).ok()? != (whole.device, whole.inode) {
        return None;
    }
    let direct = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let found = openat2(&root, inside, flags, Mode::empty(), direct).ok()?;
    (identity(&found).ok()? == (part.device, part.inode)).then_some(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Asked = Asked { readonly: false, recursive_readonly: false, propagate: false, users: None };

    fn open(path: &Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    fn wanted(path: &Path, asked: Asked) -> Wanted {
        find(vec![(0, open(path), asked)]).unwrap().remove(0)
    }

    #[test]
    fn a_directory_is_one_source_whatever_its_mounts_may_do_and_another_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("other")).unwrap();
        std::os::unix::fs::symlink(".", dir.path().join("link")).unwrap();
        let plain = wanted(dir.path(), PLAIN);
        let fixed =
            wanted(&dir.path().join("link/."), Asked { readonly: true, recursive_readonly: true, ..PLAIN });
        assert_eq!(plain.key, fixed.key);
        assert_eq!(plain.key.tree, Tree::Single);
        assert_ne!(plain.key, wanted(&dir.path().join("other"), PLAIN).key);
        let later = wanted(dir.path(), Asked { propagate: true, ..PLAIN });
        assert_ne!(plain.key, later.key, "what appears below it later is not for both");
    }

    /// Guards: a container that may only read could write as soon as another one of its pod may.
    #[test]
    fn the_guest_refuses_where_the_host_may_have_to_let_writes_through() {
        let several = Tree::Several { mount: 1, readonly: true, recursive_readonly: false, propagate: false };
        assert!(Tree::Single.refused_in_guest(true, true, false));
        assert!(!Tree::Single.refused_in_guest(true, false, false));
        for tree in [&several, &Tree::Single] {
            assert!(tree.refused_in_guest(false, true, true));
            assert!(!tree.refused_in_guest(false, true, false), "what is mounted below stays writable");
        }
        assert!(!several.refused_in_guest(true, true, false), "what is mounted below stays writable");
    }

    #[test]
    fn a_directory_with_mounts_below_it_is_known() {
        // /proc and /sys are mounted below the root everywhere.
        let root = wanted(Path::new("/"), Asked { readonly: true, ..PLAIN });
        let Tree::Several { readonly, recursive_readonly, propagate, .. } = root.key.tree else {
            panic!("{root:?}")
        };
        assert!(readonly && !recursive_readonly && !propagate);
    }

    #[test]
    fn a_part_is_told_by_what_it_is_and_not_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("whole/a/b")).unwrap();
        std::fs::create_dir_all(at("whole/c")).unwrap();
        std::os::unix::fs::symlink("a", at("whole/link")).unwrap();
        let (whole, part) = (wanted(&at("whole"), PLAIN), wanted(&at("whole/a/b"), PLAIN));
        let located = |found: &Wanted| found.location.clone().unwrap();
        assert_eq!(located(&part).strip_prefix(located(&whole)).unwrap(), Path::new("a/b"));
        let is_part =
            |path: &Path, inside: &str| part_of(path, &whole.key, Path::new(inside), &part.key).is_some();
        assert!(is_part(&at("whole"), "a/b"));
        assert!(!is_part(&at("whole"), "c"), "another directory");
        assert!(!is_part(&at("whole"), "link/b"), "a link");
        assert!(!is_part(&at("whole/a"), "b"), "another whole");
        assert!(!is_part(&at("whole"), "../whole/a/b"), "a way out and in again");
        std::fs::rename(at("whole"), at("moved")).unwrap();
        assert!(!is_part(&at("whole"), "a/b"), "it is not there any more");
    }
}
