//! Mounts that exist only in the VMM's mount namespace.
//!
//! A mount is cloned in the daemon's namespace, given its attributes while it is attached nowhere, and then
//! placed by a thread that has entered the VMM's namespace. The host's mount table never sees it, and it is gone
//! when the last process of the box is.
//!
//! The thread is spawned for one operation and ends with it: a thread that has entered another namespace must
//! never serve anything else.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use a3s_box_core::spec::UserNamespace;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags, fstat, mkdirat, openat, statx, unlinkat};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use rustix::process::fchdir;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::error::AttachError;
use crate::launch::jail;
use crate::seam::Attachment;
use crate::sys::{MountAttributes, set_mount_attributes};
use crate::users;

/// The process whose namespace and root are meant.
#[derive(Debug)]
pub(crate) struct Jailed {
    /// Names its place in /proc; may be reused once the process has ended.
    pub(crate) pid: i32,
    /// Decides whether it has.
    pub(crate) pidfd: OwnedFd,
}

/// Places `attachment` in the namespace of `jailed`. `program` is the `a3s-box-vmm`.
pub(crate) async fn attach(
    program: PathBuf,
    jailed: Jailed,
    attachment: Attachment,
) -> Result<(), AttachError> {
    let target = Target::parse(&attachment.target)?;
    on_own_thread(target.clone(), move || {
        let tree = clone_tree(&attachment).map_err(|source| target.error("clone", source))?;
        if let Some(users) = &attachment.id_mapped {
            map_ids(&program, &tree, users).map_err(|source| target.error("map the user ids of", source))?;
        }
        enter(&jailed).map_err(|source| target.error("enter the namespace for", source))?;
        place(&tree, &target).map_err(|source| target.error("place", source))
    })
    .await
}

/// Removes what is attached at `target`, if anything is.
pub(crate) async fn detach(jailed: Jailed, target: &str) -> Result<(), AttachError> {
    let target = Target::parse(target)?;
    on_own_thread(target.clone(), move || {
        enter(&jailed).map_err(|source| target.error("enter the namespace for", source))?;
        remove(&target).map_err(|source| target.error("remove", source))
    })
    .await
}

/// Has the host refuse writes to what is attached at `target`, or allow them. What is mounted below it stays as it is.
pub(crate) async fn set_readonly(jailed: Jailed, target: &str, readonly: bool) -> Result<(), AttachError> {
    let target = Target::parse(target)?;
    let step = if readonly { "make read-only" } else { "make writable" };
    on_own_thread(target.clone(), move || {
        enter(&jailed).map_err(|source| target.error("enter the namespace for", source))?;
        change(&target, readonly).map_err(|source| target.error(step, source))
    })
    .await
}

/// Where a mount goes: one of the share's two directories and a plain name.
#[derive(Debug, Clone)]
struct Target {
    directory: String,
    name: String,
}

impl Target {
    fn parse(text: &str) -> Result<Self, AttachError> {
        use a3s_box_protocol::{SHARE_IMAGES, SHARE_VOLUMES};
        let parsed = text.split_once('/').filter(|(directory, name)| {
            [SHARE_IMAGES, SHARE_VOLUMES].contains(directory)
                && !name.is_empty()
                && name.len() <= 255
                && !matches!(*name, "." | "..")
                && !name.contains(['/', '\0'])
        });
        match parsed {
            Some((directory, name)) => Ok(Self { directory: directory.to_owned(), name: name.to_owned() }),
            None => Err(AttachError {
                step: "name",
                target: text.chars().take(300).collect(),
                source: io::Error::new(io::ErrorKind::InvalidInput, "expected images/<name> or pod/<name>"),
            }),
        }
    }

    fn error(&self, step: &'static str, source: io::Error) -> AttachError {
        AttachError { step, target: format!("{}/{}", self.directory, self.name), source }
    }

    fn shared(&self) -> PathBuf {
        [relative(jail::SHARE), &self.directory, &self.name].iter().collect()
    }

    /// The directory in which the mount point is made.
    fn parent(&self) -> io::Result<OwnedFd> {
        let path: PathBuf = [relative(jail::SHARE_WRITABLE), &self.directory].iter().collect();
        Ok(openat(
            CWD,
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }
}

/// A thread that has entered another namespace must never serve anything else: it ends with this one operation.
async fn on_own_thread(
    target: Target,
    work: impl FnOnce() -> Result<(), AttachError> + Send + 'static,
) -> Result<(), AttachError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("mounts".to_owned())
        .spawn(move || {
            // Whoever asked may have gone away.
            let _ = sender.send(work());
        })
        .map_err(|source| target.error("start a thread for", source))?;
    receiver.await.unwrap_or_else(|_| Err(target.error("finish", io::Error::other("the thread panicked"))))
}

/// Clones the mount and all below it, detached, with its attributes set.
///
/// Device nodes in a volume must not be opened by the host on behalf of a guest, hence nodev everywhere.
fn clone_tree(attachment: &Attachment) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(&attachment.source, "", flags)?;
    let propagation = if attachment.propagate { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    let everywhere = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    let (top, all) = match (attachment.readonly, attachment.recursive_readonly) {
        (false, _) => (everywhere, everywhere),
        (true, false) => (everywhere | libc::MOUNT_ATTR_RDONLY, everywhere),
        (true, true) => (everywhere | libc::MOUNT_ATTR_RDONLY, everywhere | libc::MOUNT_ATTR_RDONLY),
    };
    set_mount_attributes(&tree, MountAttributes { set: all, propagation, ..Default::default() }, true)?;
    set_mount_attributes(&tree, MountAttributes { set: top, ..Default::default() }, false)?;
    Ok(tree)
}

fn map_ids(program: &Path, tree: &OwnedFd, users: &UserNamespace) -> io::Result<()> {
    let namespace = users::namespace(program, users)?;
    let attributes = MountAttributes { users: Some(namespace.as_fd()), ..Default::default() };
    set_mount_attributes(tree, attributes, true).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => io::Error::new(
            io::ErrorKind::Unsupported,
            "its file system, or one mounted below it, does not allow id-mapped mounts; \
             use ext4, xfs, btrfs or tmpfs, or a pod without a user namespace",
        ),
        _ => error,
    })
}

/// Moves the thread into the namespace of `jailed` and its working directory to the root of the jail.
///
/// The namespace's own root will not do: where the daemon itself runs in a chroot, that is what lies
/// around it. All further paths are therefore relative.
fn enter(jailed: &Jailed) -> io::Result<()> {
    let root =
        openat(CWD, format!("/proc/{}/root", jailed.pid), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    // Only now: if the process is still there, the root that was opened before is its own.
    if has_ended(&jailed.pidfd)? {
        return Err(Errno::SRCH.into());
    }
    // A thread that shares its root and working directory with others may not change its mount namespace.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
    move_into_thread_name_spaces(jailed.pidfd.as_fd(), ThreadNameSpaceType::MOUNT)?;
    Ok(fchdir(root)?)
}

fn has_ended(pidfd: &OwnedFd) -> io::Result<bool> {
    Ok(poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&Timespec::default()))? != 0)
}

/// A path of the jail, from the working directory.
fn relative(path: &str) -> &str {
    path.trim_start_matches('/')
}

fn place(tree: &OwnedFd, target: &Target) -> io::Result<()> {
    let parent = target.parent()?;
    let made = if is_directory(tree)? {
        mkdirat(&parent, &target.name, Mode::from_raw_mode(0o755))
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        openat(&parent, &target.name, flags, Mode::from_raw_mode(0o644)).map(drop)
    };
    match made {
        Ok(()) => {}
        // A mount point without a mount is what an interrupted attach leaves; one with a mount is in use.
        Err(Errno::EXIST) if !is_mounted(target)? => {}
        Err(error) => return Err(error.into()),
    }
    let placed = move_mount(tree, "", CWD, target.shared(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
    if placed.is_err() {
        // The mount's own error is the one to tell.
        let _ = remove_mount_point(&parent, &target.name);
    }
    Ok(placed?)
}

/// On the mount that is there, and no other: a second one of the same source would be a second file system for the guest.
fn change(target: &Target, readonly: bool) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mount = openat(CWD, target.shared(), flags, Mode::empty())?;
    if !is_mounted(target)? {
        return Err(io::ErrorKind::NotFound.into());
    }
    let attributes = match readonly {
        true => MountAttributes { set: libc::MOUNT_ATTR_RDONLY, ..Default::default() },
        false => MountAttributes { clear: libc::MOUNT_ATTR_RDONLY, ..Default::default() },
    };
    set_mount_attributes(&mount, attributes, false)
}

fn remove(target: &Target) -> io::Result<()> {
    match unmount(target.shared(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // EINVAL: a mount point without a mount.
        Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(remove_mount_point(&target.parent()?, &target.name)?)
}

fn remove_mount_point(parent: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    let removed = match unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => unlinkat(parent, name, AtFlags::REMOVEDIR),
        other => other,
    };
    match removed {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

fn is_directory(file: &OwnedFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(fstat(file)?.st_mode) == FileType::Directory)
}

fn is_mounted(target: &Target) -> io::Result<bool> {
    let id =
        |path: PathBuf| statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::MNT_ID).map(|s| s.stx_mnt_id);
    Ok(id(target.shared())? != id(PathBuf::from(relative(jail::SHARE)))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_one_plain_name_in_one_of_the_two_directories() {
        for good in ["images/a.erofs", "pod/data", "pod/..."] {
            assert!(Target::parse(good).is_ok(), "{good}");
        }
        let long = format!("pod/{}", "x".repeat(256));
        for bad in
            ["", "pod", "pod/", "pod/.", "pod/..", "pod/a/b", "/pod/a", "../pod", "etc/a", "pod/a\0", &long]
        {
            assert!(Target::parse(bad).is_err(), "{bad:?}");
        }
    }
}
