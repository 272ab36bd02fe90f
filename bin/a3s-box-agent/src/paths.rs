//! Where things lie in the guest. Nothing below [`RUN`] is visible to a session.

use std::path::{Path, PathBuf};

/// The agent's own tmpfs.
pub const RUN: &str = "/run/a3s";
/// The box's virtio-fs share.
pub const SHARE: &str = "/run/a3s/share";
/// EROFS files of the box's images.
pub const IMAGES: &str = "/run/a3s/share/images";
/// The box's volumes.
pub const VOLUMES: &str = "/run/a3s/share/pod";
/// Mount points of image layers.
pub const LAYERS: &str = "/run/a3s/layers";
/// The scratch disk.
pub const SCRATCH: &str = "/run/a3s/scratch";
/// Writable layers, by session.
pub const SESSIONS: &str = "/run/a3s/scratch/sessions";
/// Writable layers that are being deleted.
pub const TRASH: &str = "/run/a3s/scratch/trash";
/// The pod's /dev/shm.
pub const SHM: &str = "/run/a3s/shm";
/// The lower directory of sessions without layers, and the root of processes that need no files.
pub const EMPTY: &str = "/run/a3s/empty";
/// Where a stage puts its session's root, in its own mount namespace.
pub const ROOTFS: &str = "/run/a3s/rootfs";
/// The cgroup above all sessions.
pub const POD_CGROUP: &str = "/sys/fs/cgroup/pod";

/// The groups whose members may open ping sockets.
pub const PING_GROUPS: &str = "/proc/sys/net/ipv4/ping_group_range";

/// The directories of one session on the scratch disk.
pub fn session_dir(id: &str) -> PathBuf {
    Path::new(SESSIONS).join(id)
}
