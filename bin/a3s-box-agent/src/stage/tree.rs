//! A session's root file system while it is being put together. Its contents are the image's: every
//! path is resolved by the kernel as if the root were the root directory, so that no link leads out of it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::users::Owner;

/// As many links may hide in the missing part of one path.
const MAX_LINKS: u32 = 40;

/// What a mount point must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory,
    /// Anything else.
    File,
}

/// A directory that paths are resolved in.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    owner: Option<Owner>,
}

impl Tree {
    /// Opens the directory at `path`, which we own.
    pub fn open(path: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { root: rustix::fs::open(path, flags, Mode::empty())?, owner: None })
    }

    /// What is made in it goes to `owner`, if there is one.
    pub fn owned_by(self, owner: Option<Owner>) -> Self {
        Self { owner, ..self }
    }

    /// See [`Self::owned_by`].
    pub fn owner(&self) -> Option<Owner> {
        self.owner
    }

    /// The root itself.
    pub fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// Finds what `path` leads to.
    pub fn find(&self, path: &str) -> io::Result<OwnedFd> {
        Ok(self.resolve(path)?)
    }

    fn resolve(&self, path: &str) -> Result<OwnedFd, Errno> {
        let path = path.trim_start_matches('/');
        let path = if path.is_empty() { "." } else { path };
        let flags = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // The kernel gives EAGAIN when a rename races with "..": in a root that nobody else sees yet, never for long.
        loop {
            match rustix::fs::openat2(&self.root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), flags)
            {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    /// Finds what `path` leads to, or makes it with all directories above.
    pub fn find_or_make(&self, path: &str, node: Node) -> io::Result<OwnedFd> {
        let mut links = 0;
        let found = self.make(path.trim_start_matches('/').to_owned(), node, &mut links)?;
        match (node, kind_of(&found)?) {
            (Node::Directory, FileType::Directory) => Ok(found),
            (Node::Directory, _) => Err(Errno::NOTDIR.into()),
            (Node::File, FileType::Directory) => Err(Errno::ISDIR.into()),
            (Node::File, _) => Ok(found),
        }
    }

    fn make(&self, path: String, node: Node, links: &mut u32) -> io::Result<OwnedFd> {
        match self.resolve(&path) {
            Err(Errno::NOENT) => {}
            other => return Ok(other?),
        }
        let (parent, name) = match path.trim_end_matches('/').rsplit_once('/') {
            Some((parent, name)) => (parent.to_owned(), name.to_owned()),
            None => (String::new(), path.trim_end_matches('/').to_owned()),
        };
        let directory = self.make(parent.clone(), Node::Directory, links)?;
        let made = match node {
            Node::Directory => rustix::fs::mkdirat(&directory, &*name, Mode::from_raw_mode(0o755)),
            Node::File => {
                let flags =
                    OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::openat(&directory, &*name, flags, Mode::from_raw_mode(0o644)).map(drop)
            }
        };
        let given = made.and_then(|()| match self.owner {
            Some(Owner { uid, gid }) => {
                rustix::fs::chownat(&directory, &*name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            }
            None => Ok(()),
        });
        match given {
            Ok(()) => Ok(self.resolve(&path)?),
            // Something is there and yet the path leads nowhere: a link whose target is missing.
            Err(Errno::EXIST) => {
                *links += 1;
                if *links > MAX_LINKS {
                    return Err(Errno::LOOP.into());
                }
                let target = rustix::fs::readlinkat(&directory, &*name, Vec::new())?;
                let target = target.to_str().map_err(|_| Errno::ILSEQ)?;
                let next = match target.strip_prefix('/') {
                    Some(absolute) => absolute.to_owned(),
                    None => format!("{parent}/{target}"),
                };
                self.make(next.trim_start_matches('/').to_owned(), node, links)
            }
            Err(other) => Err(other.into()),
        }
    }

    /// The names from the root down to what `path` leads to, links followed as far as they are there now. What is
    /// missing is taken by its name.
    pub fn destination(&self, path: &str) -> io::Result<Vec<String>> {
        let mut there: Vec<String> = Vec::new();
        let mut ahead = reversed(path);
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            match name.as_str() {
                ".." => drop(there.pop()),
                _ => match self.link_target(&there, &name)? {
                    None => there.push(name),
                    Some(target) => {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(Errno::LOOP.into());
                        }
                        if target.starts_with('/') {
                            there.clear();
                        }
                        ahead.extend(reversed(&target));
                    }
                },
            }
        }
        Ok(there)
    }

    /// Where `name` in `directory`, a path without links, leads to if it is a link.
    fn link_target(&self, directory: &[String], name: &str) -> io::Result<Option<String>> {
        let path = directory.iter().map(|part| format!("{part}/")).collect::<String>() + name;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let found = match rustix::fs::openat2(&self.root, &*path, flags, Mode::empty(), resolve) {
            Ok(found) => found,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if kind_of(&found)? != FileType::Symlink {
            return Ok(None);
        }
        let target = rustix::fs::readlinkat(&found, "", Vec::new())?;
        Ok(Some(target.into_string().map_err(|_| Errno::ILSEQ)?))
    }

    /// Puts a detached mount at `target`.
    pub fn attach(&self, mount: impl AsFd, target: impl AsFd) -> io::Result<()> {
        attach(mount, target)
    }

    /// Makes a link, unless something of that name exists.
    pub fn link(&self, directory: impl AsFd, name: &str, target: &str) -> io::Result<()> {
        match rustix::fs::symlinkat(target, directory, name) {
            Err(Errno::EXIST) => Ok(()),
            other => Ok(other?),
        }
    }
}

/// The names of a path, the last one first; empty names and `.` mean nothing.
fn reversed(path: &str) -> Vec<String> {
    path.split('/').rev().filter(|name| !matches!(*name, "" | ".")).map(str::to_owned).collect()
}

/// Puts a detached mount at `target`.
pub fn attach(mount: impl AsFd, target: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount.as_fd(), "", target.as_fd(), "", flags)?)
}

/// A detached copy of what lies at an open path; with `recursive`, of the mounts below it too.
pub fn bind(source: impl AsFd, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(rustix::mount::open_tree(source.as_fd(), "", flags)?)
}

/// What kind of file an open path is.
pub fn kind_of(file: impl AsFd) -> io::Result<FileType> {
    let status = rustix::fs::statat(file, "", AtFlags::EMPTY_PATH)?;
    Ok(FileType::from_raw_mode(status.st_mode))
}

/// The kind of mount point that fits a source.
pub fn node_for(source: impl AsFd) -> io::Result<Node> {
    Ok(match kind_of(source)? {
        FileType::Directory => Node::Directory,
        _ => Node::File,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn tree() -> (tempfile::TempDir, Tree) {
        let directory = tempfile::tempdir().unwrap();
        let tree = Tree::open(directory.path().to_str().unwrap()).unwrap();
        (directory, tree)
    }

    #[test]
    fn missing_directories_and_files_are_made() {
        let (directory, tree) = tree();
        tree.find_or_make("/a/b/c", Node::Directory).unwrap();
        tree.find_or_make("/a/b/file", Node::File).unwrap();
        assert!(directory.path().join("a/b/c").is_dir());
        assert!(directory.path().join("a/b/file").is_file());
    }

    #[test]
    fn links_lead_nowhere_outside() {
        let outside = tempfile::tempdir().unwrap();
        let (directory, tree) = tree();
        symlink(outside.path(), directory.path().join("absolute")).unwrap();
        symlink("../../../../../../etc", directory.path().join("climbing")).unwrap();
        tree.find_or_make("/absolute/x", Node::File).unwrap();
        tree.find_or_make("/climbing/passwd", Node::File).unwrap();
        tree.find_or_make("/../../up", Node::Directory).unwrap();
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        let inside = directory.path().join(outside.path().strip_prefix("/").unwrap());
        assert!(inside.join("x").is_file());
        assert!(directory.path().join("etc/passwd").is_file());
        assert!(directory.path().join("up").is_dir());
    }

    #[test]
    fn a_dangling_link_gets_its_target() {
        let (directory, tree) = tree();
        std::fs::create_dir(directory.path().join("etc")).unwrap();
        symlink("../run/resolve/stub.conf", directory.path().join("etc/resolv.conf")).unwrap();
        tree.find_or_make("/etc/resolv.conf", Node::File).unwrap();
        assert!(directory.path().join("run/resolve/stub.conf").is_file());
    }

    #[test]
    fn a_destination_is_what_the_links_of_the_image_lead_to() {
        let (directory, tree) = tree();
        std::fs::create_dir_all(directory.path().join("var/lib/deep")).unwrap();
        symlink("/run", directory.path().join("var/run")).unwrap();
        symlink("lib/deep/..", directory.path().join("var/up")).unwrap();
        symlink("../../../outside", directory.path().join("var/out")).unwrap();
        let leads_to = |path: &str| tree.destination(path).unwrap().join("/");
        for (path, expected) in [
            ("/", ""),
            ("//data/./sub/", "data/sub"),
            ("/data/../../x", "x"),
            ("/var/run/secrets", "run/secrets"),
            ("/var/up/x/y", "var/lib/x/y"),
            ("/var/out/x", "outside/x"),
        ] {
            assert_eq!(leads_to(path), expected, "{path}");
        }
        symlink("loop", directory.path().join("loop")).unwrap();
        assert!(tree.destination("/loop/x").is_err());
    }

    #[test]
    fn a_loop_of_links_ends() {
        let (directory, tree) = tree();
        symlink("b", directory.path().join("a")).unwrap();
        symlink("a", directory.path().join("b")).unwrap();
        assert!(tree.find_or_make("/a/x", Node::File).is_err());
    }

    #[test]
    fn a_file_is_no_place_for_a_directory() {
        let (directory, tree) = tree();
        std::fs::write(directory.path().join("file"), "").unwrap();
        assert!(tree.find_or_make("/file", Node::Directory).is_err());
        assert!(tree.find_or_make("/file/below", Node::File).is_err());
        assert!(tree.find_or_make("/", Node::File).is_err());
    }
}
