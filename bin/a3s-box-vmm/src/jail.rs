//! The file system that a VMM sees: a small read-only tmpfs with bind mounts of what the plan names.
//!
//! ```text
//! /vmlinux /initramfs          read-only
//! /scratch                     the scratch disk
//! /vsock/                      the box's sockets
//! /share/{images,pod}/         what the guest sees, read-only; attachments are mounted here
//! /share.rw/                   the same tmpfs, where the daemon makes mount points
//! /dev/…  /proc                what this backend uses
//! /run/                        QEMU only: sockets between its parts
//! /usr /lib …                  QEMU only, read-only
//! ```

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use a3s_box_protocol::{SHARE_IMAGES, SHARE_VOLUMES};
use a3s_box_vmm::launch::{Accel, CONSOLE_LOG, Hypervisor, LaunchSpec, QemuSpec, VMM_LOG, VSOCK_DIR, jail};
use a3s_box_vmm::qemu::args;
use anyhow::Context;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};

use crate::{counts, tap};

/// Files of the host that stay open in the jail.
pub(crate) struct Opened {
    /// The console's log, append-only.
    pub(crate) console: File,
    /// The logs, for cutting them.
    pub(crate) logs: Vec<File>,
    /// The scratch disk, for an emulator that may not open it; a trial has none.
    pub(crate) scratch: Option<File>,
    /// The queues of the taps of the plan's NICs: nobody in the jail may open one.
    pub(crate) taps: Vec<Vec<File>>,
    /// The counts of the share's requests.
    pub(crate) requests: File,
}

impl Opened {
    pub(crate) fn open(spec: &LaunchSpec) -> anyhow::Result<Self> {
        let log = |name: &str, read: bool| {
            let path = spec.plan.dir.join(name);
            let opened = OpenOptions::new().read(read).append(true).open(&path);
            opened.with_context(|| format!("open {}", path.display()))
        };
        let scratch = || {
            let path = &spec.plan.scratch;
            let opened = OpenOptions::new().read(true).write(true).open(path);
            opened.with_context(|| format!("open the scratch disk {}", path.display()))
        };
        Ok(Self {
            // Not readable: QEMU takes an inherited descriptor only with the access mode that it would have used.
            console: log(CONSOLE_LOG, false)?,
            logs: vec![log(CONSOLE_LOG, true)?, log(VMM_LOG, true)?],
            scratch: (!spec.trial).then(scratch).transpose()?,
            taps: taps(spec)?,
            requests: counts::create(&spec.plan.dir)?,
        })
    }
}

fn taps(spec: &LaunchSpec) -> anyhow::Result<Vec<Vec<File>>> {
    let nics = spec.plan.network.iter().flat_map(|network| &network.nics);
    match &spec.hypervisor {
        // Its NIC has one pair of queues, and a tap that was made for several refuses one that asks for a single one.
        Hypervisor::Libkrun => nics.map(|nic| Ok(vec![tap::open_single(&nic.tap)?])).collect(),
        Hypervisor::Qemu(qemu) => {
            let queues = args::queues(&spec.plan, qemu.accel);
            nics.map(|nic| tap::open_queues(&nic.tap, queues)).collect()
        }
    }
}

const READ_ONLY: MountFlags = MountFlags::RDONLY.union(MountFlags::NOSUID).union(MountFlags::NODEV);

/// Builds the jail and makes it the root. The caller is alone in a new mount namespace.
pub(crate) fn enter(spec: &LaunchSpec) -> anyhow::Result<()> {
    // Slave, not private: a mount that the host removes meanwhile goes away here too.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context("detach from the host")?;
    let binds = Binds::open(spec)?;
    // On top of the box's directory, in this namespace only: no mount point need be made.
    let dir = &spec.plan.dir;
    tmpfs("a3s-box", dir, MountFlags::NOSUID | MountFlags::NOEXEC, "mode=0755,size=1m,nr_inodes=512")?;
    chdir(dir).with_context(|| format!("enter {}", dir.display()))?;
    share()?;
    devices(spec)?;
    procfs()?;
    binds.place()?;
    if let Hypervisor::Qemu(qemu) = &spec.hypervisor {
        programs(qemu)?;
    }
    pivot_root(".", ".").context("change the root")?;
    unmount(".", UnmountFlags::DETACH).context("let go of the host's root")?;
    chdir("/").context("enter the new root")?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NOEXEC, "")
        .context("make the root read-only")
}

/// Files and directories of the plan, cloned while the host's tree is still there.
struct Binds(Vec<(OwnedFd, &'static str, MountFlags)>);

impl Binds {
    fn open(spec: &LaunchSpec) -> anyhow::Result<Self> {
        let writable = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let plan = &spec.plan;
        let sockets = plan.dir.join(VSOCK_DIR);
        let wanted = [
            (&plan.kernel, jail::KERNEL, READ_ONLY | MountFlags::NOEXEC),
            (&plan.initramfs, jail::INITRAMFS, READ_ONLY | MountFlags::NOEXEC),
            (&sockets, jail::VSOCK, writable),
        ];
        let scratch = (!spec.trial).then_some((&plan.scratch, jail::SCRATCH, writable));
        let open = |(path, target, flags): (&PathBuf, _, _)| Ok((clone(path)?, target, flags));
        wanted.into_iter().chain(scratch).map(open).collect::<anyhow::Result<_>>().map(Self)
    }

    fn place(&self) -> anyhow::Result<()> {
        self.0.iter().try_for_each(|(tree, target, flags)| {
            let target = target.trim_start_matches('/');
            let is_directory =
                rustix::fs::fstat(tree).map(|s| FileType::from_raw_mode(s.st_mode))? == FileType::Directory;
            if is_directory {
                directory(target, 0o755)?
            } else {
                File::create(target).map(drop)?
            }
            bind(tree, Path::new(target), *flags).with_context(|| format!("place {target}"))
        })
    }
}

fn clone(path: &Path) -> anyhow::Result<OwnedFd> {
    open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
        .with_context(|| format!("take {} into the jail", path.display()))
}

fn bind(tree: &OwnedFd, target: &Path, flags: MountFlags) -> anyhow::Result<()> {
    move_mount(tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).context("attach")?;
    mount_remount(target, MountFlags::BIND | flags, "").context("restrict")
}

fn tmpfs(name: &str, target: impl AsRef<Path>, flags: MountFlags, options: &str) -> anyhow::Result<()> {
    let target = target.as_ref();
    let options = std::ffi::CString::new(options)?;
    mount(name, target, "tmpfs", flags, Some(options.as_c_str()))
        .with_context(|| format!("mount a tmpfs on {}", target.display()))
}

fn directory(path: impl AsRef<Path>, mode: u32) -> anyhow::Result<()> {
    let path = path.as_ref();
    std::fs::create_dir_all(path)
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)))
        .with_context(|| format!("make the directory {}", path.display()))
}

/// One tmpfs, twice: the guest has the read-only view, mount points are made in the other. The tmpfs holds
/// nothing but mount points.
fn share() -> anyhow::Result<()> {
    let (view, writable) = (relative(jail::SHARE), relative(jail::SHARE_WRITABLE));
    directory(view, 0o755)?;
    directory(writable, 0o755)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    tmpfs("a3s-share", writable, flags, "mode=0755,size=1m,nr_inodes=8192")?;
    for name in [SHARE_IMAGES, SHARE_VOLUMES] {
        directory(writable.join(name), 0o755)?;
    }
    mount_bind(writable, view).context("mount the guest's view of the share")?;
    mount_remount(view, MountFlags::BIND | MountFlags::RDONLY | flags, "").context("make the share read-only")
}

/// Nodes of our own: whatever the host's permissions are, these are for this box alone.
fn devices(spec: &LaunchSpec) -> anyhow::Result<()> {
    directory("dev", 0o755)?;
    let kvm = match &spec.hypervisor {
        Hypervisor::Libkrun | Hypervisor::Qemu(QemuSpec { accel: Accel::Kvm, .. }) => true,
        Hypervisor::Qemu(QemuSpec { accel: Accel::Tcg, .. }) => false,
    };
    let always = [("dev/null", 1, 3), ("dev/zero", 1, 5), ("dev/urandom", 1, 9)];
    let kvm = kvm.then_some(("dev/kvm", 10, 232));
    for (path, major, minor) in always.into_iter().chain(kvm) {
        mknodat(CWD, path, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(major, minor))
            .and_then(|()| rustix::fs::chmod(path, Mode::from_raw_mode(0o666)))
            .with_context(|| format!("make the device {path}"))?;
    }
    Ok(())
}

/// The file servers go through /proc/self/fd. Read-only, because root may write to much of it without any capability;
/// what is opened through its links is not affected.
fn procfs() -> anyhow::Result<()> {
    directory("proc", 0o555)?;
    mount("proc", "proc", "proc", READ_ONLY | MountFlags::NOEXEC, Some(c"subset=pid")).context("mount proc")
}

/// What QEMU and its helpers are, and what they load.
fn programs(qemu: &QemuSpec) -> anyhow::Result<()> {
    directory("run", 0o755)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    tmpfs("a3s-run", "run", flags, "mode=1777,size=64k,nr_inodes=32")?;
    for path in ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache"] {
        let path = Path::new(path);
        match path.symlink_metadata() {
            Ok(metadata) if metadata.is_symlink() => {
                std::os::unix::fs::symlink(std::fs::read_link(path)?, relative(path))
                    .with_context(|| format!("link {}", path.display()))?;
            }
            Ok(_) => place_same(path)?,
            Err(_) => {}
        }
    }
    // An emulator elsewhere keeps its path, so that it finds what lies beside it named as it expects.
    let emulator = &qemu.emulator;
    if !emulator.starts_with("/usr") && !relative(emulator).exists() {
        place_same(emulator)?;
    }
    Ok(())
}

/// Binds a file or directory of the host read-only at its own path.
fn place_same(path: &Path) -> anyhow::Result<()> {
    let target = relative(path);
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    if path.is_dir() {
        directory(target, 0o755)?;
    } else {
        File::create(target).with_context(|| format!("make {}", target.display()))?;
    }
    bind(&clone(path)?, target, READ_ONLY).with_context(|| format!("place {}", path.display()))
}

/// The path below the new root, which is the working directory while the jail is built.
fn relative<P: AsRef<Path> + ?Sized>(path: &P) -> &Path {
    let path = path.as_ref();
    match path.components().next() {
        Some(Component::RootDir) => path.strip_prefix("/").unwrap_or(path),
        _ => path,
    }
}
