//! The mounts that a session asks for, and the paths that it must not see or write.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use a3s_box_protocol::proto::{EtcFile, Mount, mount::Source};
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::error::StageError;
use super::filesystem::{Attributes, harmless, make};
use super::images;
use super::tree::{Node, Tree, attach, bind, node_for};
use super::users::Owner;
use crate::session::volumes;
use crate::sys::{self, attr};

/// Mounts a volume, a tmpfs or an image. `directory` is the session's on the scratch disk.
pub fn mount(tree: &Tree, mount: &Mount, directory: &str) -> Result<(), StageError> {
    let set = attributes(mount)?;
    let fail =
        |step: &'static str| move |source| StageError::Mount { target: mount.target.clone(), step, source };
    let missing = |reason| StageError::MountSource { target: mount.target.clone(), reason };
    if !mount.target.starts_with('/') {
        return Err(missing("the target is not absolute"));
    }
    let detached = match &mount.source {
        Some(Source::PodVolume(name)) => open_volume(name, "").map_err(fail("open the volume"))?,
        Some(Source::PodVolumePart(part)) => {
            open_volume(&part.name, &part.sub_path).map_err(fail("open the part of the volume"))?
        }
        Some(Source::TmpfsBytes(bytes)) => tmpfs(*bytes, tree.owner()).map_err(fail("make a tmpfs"))?,
        Some(Source::Image(image)) => images::open(image, &mount.target, directory)?,
        None => return Err(missing("it has no source")),
    };
    if set != 0 {
        sys::mount_setattr(detached.as_fd(), true, set).map_err(fail("set its options"))?;
    }
    let node = node_for(&detached).map_err(fail("inspect the source"))?;
    let target = tree.find_or_make(&mount.target, node).map_err(fail("find the mount point"))?;
    attach(&detached, target).map_err(fail("attach"))
}

/// The mounts in the order in which none hides another that lies below it: by the depth of what their targets lead to
/// before any is made. Of those that are equally deep the later one in the request comes later.
pub fn from_the_root_down<'a>(tree: &Tree, mounts: &'a [Mount]) -> Result<Vec<&'a Mount>, StageError> {
    let mut ordered = Vec::with_capacity(mounts.len());
    for mount in mounts {
        let destination = tree.destination(&mount.target).map_err(|source| StageError::Mount {
            target: mount.target.clone(),
            step: "find the mount point",
            source,
        })?;
        ordered.push((destination.len(), mount));
    }
    ordered.sort_by_key(|(depth, _)| *depth);
    Ok(ordered.into_iter().map(|(_, mount)| mount).collect())
}

fn attributes(mount: &Mount) -> Result<u64, StageError> {
    let image = matches!(mount.source, Some(Source::Image(_)));
    let mut set = if mount.readonly || image { attr::RDONLY } else { 0 };
    for option in &mount.options {
        set |= match option.as_str() {
            "ro" => attr::RDONLY,
            "nosuid" => attr::NOSUID,
            "nodev" => attr::NODEV,
            "noexec" => attr::NOEXEC,
            "rw" | "suid" | "dev" | "exec" | "bind" | "rbind" | "private" | "rprivate" => 0,
            unknown => {
                return Err(StageError::MountOption {
                    target: mount.target.clone(),
                    option: unknown.to_owned(),
                });
            }
        };
    }
    Ok(set)
}

/// The detached mount of a volume, or of what lies in it. Its file system is the agent's one mount of it, so that all
/// sessions have the same: see [`crate::session::volumes`].
fn open_volume(name: &str, sub_path: &str) -> io::Result<OwnedFd> {
    let whole = volumes::open(name)?;
    if sub_path.is_empty() {
        return bind(whole, true);
    }
    // What lies in a volume is the pod's: no link may lead elsewhere.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let part = rustix::fs::openat2(&whole, sub_path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    bind(part, true)
}

fn tmpfs(bytes: u64, owner: Option<Owner>) -> io::Result<OwnedFd> {
    let size = bytes.to_string();
    let owner = owner.map(|owner| (owner.uid.as_raw().to_string(), owner.gid.as_raw().to_string()));
    let mut options = vec![("source", Some("tmpfs")), ("mode", Some("1777"))];
    if let Some((uid, gid)) = &owner {
        options.extend([("uid", Some(uid.as_str())), ("gid", Some(gid.as_str()))]);
    }
    if bytes != 0 {
        options.push(("size", Some(size.as_str())));
    }
    make("tmpfs", &options, Attributes::MOUNT_ATTR_NOSUID | Attributes::MOUNT_ATTR_NODEV)
}

/// Mounts the runtime's files over /etc, from `directory` on the scratch disk. `mounts` that have the same
/// target win.
pub fn mount_etc(
    tree: &Tree,
    files: &[EtcFile],
    mounts: &[Mount],
    directory: &str,
) -> Result<(), StageError> {
    let covered = |path: &str| mounts.iter().any(|m| m.target.trim_end_matches('/') == path);
    for (index, file) in files.iter().enumerate().filter(|(_, f)| !covered(&f.path)) {
        let source = format!("{directory}/{index}");
        mount_file(tree, &source, file).map_err(|source| StageError::Mount {
            target: file.path.clone(),
            step: "write the file",
            source,
        })?;
    }
    Ok(())
}

fn mount_file(tree: &Tree, source: &str, file: &EtcFile) -> io::Result<()> {
    std::fs::write(source, &file.content)?;
    if let Some(Owner { uid, gid }) = tree.owner() {
        rustix::fs::chown(source, Some(uid), Some(gid))?;
    }
    let opened = rustix::fs::open(source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    attach(bind(opened, false)?, tree.find_or_make(&file.path, Node::File)?)
}

/// Hides files and directories. What is not there needs no hiding.
pub fn mask(tree: &Tree, paths: &[String]) -> Result<(), StageError> {
    for path in paths {
        let fail =
            |step: &'static str| move |source| StageError::Mount { target: path.clone(), step, source };
        let Some(target) = existing(tree, path)? else { continue };
        let cover = match node_for(&target).map_err(fail("inspect"))? {
            Node::Directory => {
                let options = [("source", Some("tmpfs")), ("size", Some("0")), ("nr_inodes", Some("2"))];
                make("tmpfs", &options, harmless() | Attributes::MOUNT_ATTR_RDONLY)
            }
            Node::File => tree.find("/dev/null").and_then(|null| bind(null, false)),
        };
        attach(cover.map_err(fail("make a cover"))?, target).map_err(fail("cover"))?;
    }
    Ok(())
}

/// Makes paths read-only, with all mounts below them.
pub fn make_readonly(tree: &Tree, paths: &[String]) -> Result<(), StageError> {
    for path in paths {
        let fail =
            |step: &'static str| move |source| StageError::Mount { target: path.clone(), step, source };
        let Some(target) = existing(tree, path)? else { continue };
        let copy = bind(&target, true).map_err(fail("copy the mount"))?;
        sys::mount_setattr(copy.as_fd(), true, attr::RDONLY).map_err(fail("make read-only"))?;
        attach(copy, target).map_err(fail("attach"))?;
    }
    Ok(())
}

fn existing(tree: &Tree, path: &str) -> Result<Option<OwnedFd>, StageError> {
    match tree.find(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(source) => Err(StageError::Mount { target: path.to_owned(), step: "find", source }),
    }
}
