//! A session's /dev.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use super::filesystem::{Attributes, harmless, make};
use super::tree::{Node, Tree, attach, bind};
use super::users::{Owner, Users};
use crate::paths;

/// What every container finds.
const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
    ("ptmx", "pts/ptmx"),
];

/// The group of terminals.
pub const TTY: u32 = 5;

/// How deep the guest's own /dev is searched for nodes.
const MAX_DEPTH: u32 = 4;

/// Fills /dev. A privileged session gets all of the guest's devices.
pub fn mount(tree: &Tree, users: &Users, privileged: bool) -> io::Result<()> {
    let dev = make(
        "tmpfs",
        &[("mode", Some("755")), ("size", Some("65536k")), ("source", Some("tmpfs"))],
        Attributes::MOUNT_ATTR_NOSUID,
    )?;
    tree.attach(&dev, tree.find_or_make("/dev", Node::Directory)?)?;
    let dev = tree.find("/dev")?;
    // Made with exactly these modes.
    let old = rustix::process::umask(Mode::empty());
    let made = fill(&dev, privileged);
    if let Some(Owner { uid, gid }) = users.root() {
        rustix::fs::chownat(&dev, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    }
    rustix::process::umask(old);
    made?;
    for (name, target) in LINKS {
        tree.link(&dev, name, target)?;
    }
    mount_below(tree, users)
}

/// The group that devpts is told of. It reads a signed number, and user namespaces may begin anywhere in 32 bits; beyond
/// the middle a terminal is born in the group of whoever opens it, and the session's own is given away by number.
fn terminal_group(users: &Users) -> Option<u32> {
    users.group(TTY).filter(|group| i32::try_from(*group).is_ok())
}

fn fill(dev: &OwnedFd, privileged: bool) -> io::Result<()> {
    for (name, major, minor) in NODES {
        rustix::fs::mknodat(
            dev,
            name,
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            rustix::fs::makedev(major, minor),
        )?;
    }
    if privileged {
        copy_nodes(Path::new("/dev"), dev, MAX_DEPTH)?;
    }
    Ok(())
}

fn copy_nodes(from: &Path, to: &OwnedFd, depth: u32) -> io::Result<()> {
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (kind, name) = (entry.file_type()?, entry.file_name());
        if kind.is_char_device() || kind.is_block_device() {
            let status = entry.metadata()?;
            let file_type =
                if kind.is_block_device() { FileType::BlockDevice } else { FileType::CharacterDevice };
            let mode = Mode::from_raw_mode(status.mode() & 0o7777);
            match rustix::fs::mknodat(to, &*name, file_type, mode, status.rdev()) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        } else if kind.is_dir() && depth > 0 && name != "pts" && name != "shm" && name != "mqueue" {
            rustix::fs::mkdirat(to, &*name, Mode::from_raw_mode(0o755))?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let below = rustix::fs::openat(to, &*name, flags, Mode::empty())?;
            copy_nodes(&entry.path(), &below, depth - 1)?;
        }
    }
    Ok(())
}

fn mount_below(tree: &Tree, users: &Users) -> io::Result<()> {
    let no_code = Attributes::MOUNT_ATTR_NOSUID | Attributes::MOUNT_ATTR_NOEXEC;
    let group = terminal_group(users).map(|group| group.to_string());
    let mut options = vec![("ptmxmode", Some("0666")), ("mode", Some("0620")), ("source", Some("devpts"))];
    options.extend(group.as_deref().map(|group| ("gid", Some(group))));
    let terminals = make("devpts", &options, no_code)?;
    attach(terminals, tree.find_or_make("/dev/pts", Node::Directory)?)?;
    // The namespace of System V and POSIX queues is the pod's: the guest's own.
    let queues = make("mqueue", &[("source", Some("mqueue"))], harmless())?;
    attach(queues, tree.find_or_make("/dev/mqueue", Node::Directory)?)?;
    let shm = rustix::fs::open(paths::SHM, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    attach(bind(shm.as_fd(), false)?, tree.find_or_make("/dev/shm", Node::Directory)?)
}
