//! What needs `unsafe`: one system call that neither rustix nor nix wraps, and tokio's registration of a descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What to change on a mount.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MountAttributes<'a> {
    /// `MOUNT_ATTR_*` to set.
    pub(crate) set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub(crate) clear: u64,
    /// `MS_SLAVE`, `MS_PRIVATE` or 0 for no change.
    pub(crate) propagation: u64,
    /// The user namespace whose mapping applies from now on, once and for all.
    pub(crate) users: Option<BorrowedFd<'a>>,
}

/// mount_setattr(2) on the mount whose root is open, and on those below it if `recursive`.
#[allow(unsafe_code)]
pub(crate) fn set_mount_attributes(
    mount: impl AsFd,
    attributes: MountAttributes<'_>,
    recursive: bool,
) -> io::Result<()> {
    let raw = libc::mount_attr {
        attr_set: attributes.set | attributes.users.map_or(0, |_| libc::MOUNT_ATTR_IDMAP),
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: attributes.users.map_or(0, |users| u64::from(users.as_raw_fd().unsigned_abs())),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated constant, `raw` outlives the call and its size is passed with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const raw,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(explained(io::Error::last_os_error())) }
}

/// A kernel without the call must not be mistaken for a volume that cannot be had: nothing is handed to a box with fewer
/// restrictions than asked for.
fn explained(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => io::Error::new(
            io::ErrorKind::Unsupported,
            "the kernel of this host cannot restrict a mount with all that is mounted below it (mount_setattr); \
             use Linux 5.12 or newer",
        ),
        _ => error,
    }
}

/// Registers a descriptor with the runtime for reading.
#[allow(unsafe_code)]
pub(crate) fn watch_readable(file: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor until it is dropped, which AsyncFd does after deregistering.
    Ok(unsafe { AsyncFd::register_with_interest(file, Interest::READABLE) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_cannot_restrict_mounts_is_named_as_the_reason() {
        let unsupported = explained(io::Error::from_raw_os_error(libc::ENOSYS));
        assert!(unsupported.to_string().contains("5.12"), "{unsupported}");
        let other = explained(io::Error::from_raw_os_error(libc::EPERM));
        assert_eq!(other.raw_os_error(), Some(libc::EPERM));
    }
}
