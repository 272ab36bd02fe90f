//! Where in the share a file lies, and what follows from it.
//!
//! ```text
//! share/               the box's own
//!   images/FILE        the box's own
//!   pod/VOLUME/…       a file system of the host, until another one is mounted below
//! ```

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use a3s_box_protocol::SHARE_VOLUMES;
use a3s_box_vmm::launch::jail;
use rustix::fs::{CWD, Mode, OFlags, fstatfs, openat};

/// The inode of the share's root.
const ROOT: u64 = 1;

/// Where a file lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The share's root, or below it and in no volume.
    Share,
    /// The directory that holds the volumes.
    Volumes,
    /// In a volume. Whether closing a file there does anything on the host.
    Volume { closing_matters: bool },
}

impl Place {
    /// Of a file that was found by this name in a directory. `parent` is the directory's place, as far as it is known.
    /// `mounted`: another file system begins there.
    pub(crate) fn of(
        parent: Option<Self>,
        directory: u64,
        name: &[u8],
        mounted: bool,
        closing_matters: impl FnOnce(&[u8]) -> bool,
    ) -> Self {
        match parent {
            _ if directory == ROOT => {
                if name == SHARE_VOLUMES.as_bytes() {
                    Self::Volumes
                } else {
                    Self::Share
                }
            }
            Some(Self::Share) => Self::Share,
            Some(Self::Volumes) => Self::Volume { closing_matters: closing_matters(name) },
            Some(volume @ Self::Volume { .. }) if !mounted => volume,
            Some(Self::Volume { .. }) | None => Self::Volume { closing_matters: true },
        }
    }

    /// Whether the guest has to say that it closes a file.
    pub(crate) fn closing_matters(self) -> bool {
        matches!(self, Self::Volume { closing_matters: true })
    }
}

/// Whether the file system of a volume does anything when a file is closed. Those that keep what was written to themselves do
/// (the host's kernel has a `flush` for NFS, SMB, FUSE and their like), those of a disk or of memory do not.
pub(crate) fn closing_matters(volume: &[u8]) -> bool {
    let path = Path::new(jail::SHARE).join(SHARE_VOLUMES).join(OsStr::from_bytes(volume));
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // By a descriptor: the file server's filter has no call that takes a path.
    let kind = openat(CWD, &path, flags, Mode::empty()).and_then(fstatfs);
    !kind.is_ok_and(|kind| LOCAL.contains(&(kind.f_type as u32)))
}

/// File systems without a `flush`, by their numbers in linux/magic.h: ext2 to ext4, XFS, Btrfs, tmpfs, overlayfs, F2FS, EROFS, ZFS.
const LOCAL: [u32; 8] =
    [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630, 0xf2f5_2010, 0xe0f5_e1e2, 0x2fc1_2fc1];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_goes_down_to_what_is_mounted_below() {
        let below =
            |parent, name: &[u8], mounted| Place::of(parent, 7, name, mounted, |name| name == b"remote");
        let root = |name: &[u8]| Place::of(None, ROOT, name, false, |_| unreachable!("no volume"));
        let (volumes, images) = (root(b"pod"), root(b"images"));
        assert_eq!((volumes, images), (Place::Volumes, Place::Share));
        assert!(!below(Some(images), b"layer", false).closing_matters());
        let local = below(Some(volumes), b"local", true);
        assert!(!local.closing_matters() && below(Some(volumes), b"remote", true).closing_matters());
        let deep = below(Some(below(Some(local), b"pod", false)), b"file", false);
        assert!(!deep.closing_matters());
        assert!(below(Some(deep), b"mounted", true).closing_matters());
        assert!(below(None, b"unknown", false).closing_matters());
    }
}
