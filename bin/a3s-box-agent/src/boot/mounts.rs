//! The guest's file systems.
//!
//! The kernel starts us on rootfs, from which nobody can pivot away: pivot_root needs a root mount that has a
//! parent. So a tmpfs is moved over it first; sessions' stages then pivot in their own mount namespaces.

use std::fs;
use std::io;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use thiserror::Error;

use crate::paths;

/// A file system that the box cannot do without.
#[derive(Debug, Error)]
#[error("{step} {path}: {source}")]
pub struct MountError {
    step: &'static str,
    path: &'static str,
    #[source]
    source: io::Error,
}

fn fail<E: Into<io::Error>>(step: &'static str, path: &'static str) -> impl FnOnce(E) -> MountError {
    move |source| MountError { step, path, source: source.into() }
}

const SECURE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
/// Of the pod's /dev/shm. Programs may be executed from it and mapped executable, as libffi and databases do.
pub const SHM_FLAGS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
/// The scratch disk.
const DISK: &str = "/dev/vda";

/// Moves to a small root of our own.
pub fn make_root() -> Result<(), MountError> {
    const ROOT: &str = "/newroot";
    fs::create_dir_all(ROOT).map_err(fail("make", ROOT))?;
    mount("tmpfs", ROOT, "tmpfs", MountFlags::NODEV | MountFlags::NOSUID, Some(c"mode=755,size=1m"))
        .map_err(fail("mount", ROOT))?;
    for directory in ["proc", "sys", "dev", "run", "tmp"] {
        fs::create_dir(format!("{ROOT}/{directory}")).map_err(fail("make directories in", ROOT))?;
    }
    rustix::process::chdir(ROOT).map_err(fail("enter", ROOT))?;
    rustix::mount::mount_move(".", "/").map_err(fail("move to the root", ROOT))?;
    rustix::process::chroot(".").map_err(fail("make the root", ROOT))?;
    rustix::process::chdir("/").map_err(fail("enter", "/"))
}

/// proc, sys, dev, cgroups, and the agent's own directories.
pub fn mount_kernel_file_systems() -> Result<(), MountError> {
    mount_at("proc", "/proc", SECURE, c"")?;
    mount_at("sysfs", "/sys", SECURE, c"")?;
    mount_at("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=755")?;
    open_console();
    make_directory("/dev/pts")?;
    mount_at(
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        c"ptmxmode=0666,mode=0620,gid=5",
    )?;
    mount_at("cgroup2", "/sys/fs/cgroup", SECURE, c"")?;
    mount_at("tmpfs", "/run", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755,size=16m")?;
    for directory in
        [paths::RUN, paths::SHARE, paths::LAYERS, paths::SCRATCH, paths::SHM, paths::EMPTY, paths::ROOTFS]
    {
        make_directory(directory)?;
    }
    mount_at("tmpfs", paths::SHM, SHM_FLAGS, c"mode=1777,size=64m")
}

/// The share and the scratch disk. A box without a share can have no images; one without a disk writes to
/// memory. Both are for boots that only prove that the machine works.
pub fn mount_host_file_systems() -> Result<(), MountError> {
    let tag = a3s_box_protocol::SHARE_TAG;
    match mount(tag, paths::SHARE, "virtiofs", MountFlags::NODEV, None) {
        Ok(()) => {}
        Err(Errno::INVAL | Errno::NODEV | Errno::NOENT) => {
            say!("there is no virtio-fs share {tag:?}: no images, no volumes");
        }
        Err(error) => return Err(fail("mount", paths::SHARE)(error)),
    }
    // The disk ends with the box: nobody will replay its journal.
    match mount(DISK, paths::SCRATCH, "ext4", MountFlags::NOATIME, Some(c"barrier=0")) {
        Ok(()) => {}
        Err(Errno::NOENT | Errno::NXIO) => {
            say!("there is no scratch disk {DISK}: writable layers are in memory");
            mount("tmpfs", paths::SCRATCH, "tmpfs", MountFlags::NOATIME, None)
                .map_err(fail("mount", paths::SCRATCH))?;
        }
        Err(error) => return Err(fail("mount /dev/vda at", paths::SCRATCH)(error)),
    }
    make_directory(paths::SESSIONS)?;
    make_directory(paths::TRASH)
}

/// Makes the root read-only: nothing in it changes any more.
pub fn seal_root() -> Result<(), MountError> {
    rustix::mount::mount_remount("/", MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV, c"")
        .map_err(fail("make read-only", "/"))
}

fn mount_at(
    kind: &'static str,
    path: &'static str,
    flags: MountFlags,
    data: &std::ffi::CStr,
) -> Result<(), MountError> {
    match mount(kind, path, kind, flags, Some(data)) {
        // A kernel may mount devtmpfs by itself.
        Err(Errno::BUSY) => Ok(()),
        other => other.map_err(fail("mount", path)),
    }
}

fn make_directory(path: &'static str) -> Result<(), MountError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(fail("make", path)(error)),
        _ => Ok(()),
    }
}

/// The initramfs may have no /dev/console, then the kernel starts us without stdio and our words would be lost.
fn open_console() {
    if let Ok(console) =
        rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
    {
        let _ = nix::unistd::dup2_stdin(&console);
        let _ = nix::unistd::dup2_stdout(&console);
        let _ = nix::unistd::dup2_stderr(&console);
    }
}
