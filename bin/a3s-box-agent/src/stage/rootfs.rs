//! A session's root file system: an overlay of the image's layers, the kernel's file systems, the
//! session's mounts; then it becomes the root and all else is out of reach.

use std::os::fd::{AsFd, OwnedFd};

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use super::error::{Context, StageError};
use super::filesystem::{Attributes, harmless, make};
use super::tree::{Node, Tree, attach};
use super::users::{Owner, Users};
use super::{SessionStage, devices, mounts, volumes};
use crate::paths;
use crate::session::layers;
use crate::sys::{self, attr};

/// Puts the root together in a mount namespace of its own. The agent's files are still in reach.
pub fn assemble(stage: &SessionStage, users: &Users) -> Result<Tree, StageError> {
    let request = stage.request.clone().unwrap_or_default();
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP).context("unshare", "namespaces")?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("make private", "/")?;
    users.map_layers(&request)?;
    own_root(stage, users)?;
    let overlay = overlay(stage).context("mount", "the overlay")?;
    let place = Tree::open(paths::ROOTFS).context("open", paths::ROOTFS)?;
    attach(&overlay, place.root()).context("attach", "the overlay")?;
    let tree = Tree::open(paths::ROOTFS).context("open", paths::ROOTFS)?.owned_by(users.root());
    let targets = request.mounts.iter().map(|mount| mount.target.as_str());
    let mut volumes = volumes::fill(&tree, &request.image_volumes, targets, &stage.directory)?;
    kernel_file_systems(&tree, request.privileged)?;
    devices::mount(&tree, users, request.privileged).context("fill", "/dev")?;
    for mount in mounts::from_the_root_down(&tree, &request.mounts)? {
        volumes.attach_above(&tree, &mount.target)?;
        mounts::mount(&tree, mount, &stage.directory)?;
    }
    volumes.attach(&tree)?;
    mounts::mount_etc(&tree, &request.etc_files, &request.mounts, &format!("{}/etc", stage.directory))?;
    mounts::mask(&tree, &request.masked_paths)?;
    mounts::make_readonly(&tree, &request.readonly_paths)?;
    Ok(tree)
}

/// The writable layer, whose root is the session's.
fn upper(stage: &SessionStage) -> String {
    format!("{}/upper", stage.directory)
}

/// The root directory is the writable layer's. It gets the owner and mode that the image gives it, or belongs to the
/// session's root.
fn own_root(stage: &SessionStage, users: &Users) -> Result<(), StageError> {
    let upper = upper(stage);
    let layers = layers::stack(&stage.layers);
    if let Some((_, root)) = super::images::stated_root(&layers).context("look at", "the layers' roots")? {
        return super::images::give(&upper, &root).context("own", &upper);
    }
    if let Some(Owner { uid, gid }) = users.root() {
        rustix::fs::chown(&upper, Some(uid), Some(gid)).context("own", &upper)?;
    }
    Ok(())
}

fn overlay(stage: &SessionStage) -> std::io::Result<OwnedFd> {
    let (upper, work) = (upper(stage), format!("{}/work", stage.directory));
    let mut options: Vec<(&str, Option<&str>)> =
        layers::stack(&stage.layers).into_iter().map(|layer| ("lowerdir+", Some(layer))).collect();
    if options.is_empty() {
        options.push(("lowerdir+", Some(paths::EMPTY)));
    }
    options.push(("upperdir", Some(&upper)));
    options.push(("workdir", Some(&work)));
    options.push(("source", Some("overlay")));
    // The scratch disk ends with the box, so syncing the writable layer protects nothing.
    options.push(("volatile", None));
    make("overlay", &options, Attributes::empty())
}

fn kernel_file_systems(tree: &Tree, privileged: bool) -> Result<(), StageError> {
    let view = if privileged { harmless() } else { harmless() | Attributes::MOUNT_ATTR_RDONLY };
    for (kind, target, attributes) in
        [("proc", "/proc", harmless()), ("sysfs", "/sys", view), ("cgroup2", "/sys/fs/cgroup", view)]
    {
        let mount = make(kind, &[("source", Some(kind))], attributes).context("make", kind)?;
        let place = tree.find_or_make(target, Node::Directory).context("find", target)?;
        attach(mount, place).context("attach", target)?;
    }
    Ok(())
}

/// Makes `tree` the root directory and drops everything else from the mount namespace.
pub fn enter(tree: &Tree) -> Result<(), StageError> {
    rustix::process::fchdir(tree.root()).context("enter", "the root file system")?;
    // The old root is put over the new one and then taken away: no directory is needed to hold it.
    rustix::process::pivot_root(".", ".").context("pivot to", "the root file system")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).context("unmount", "the old root")?;
    rustix::process::chdir("/").context("enter", "/")
}

/// Makes the root mount read-only; mounts below it keep their own options.
pub fn seal(tree: &Tree) -> Result<(), StageError> {
    sys::mount_setattr(tree.root().as_fd(), false, attr::RDONLY).context("make read-only", "/")
}
