//! Names of everything a pod's network consists of. They follow from the box id and nothing else,
//! so a daemon that has forgotten everything still finds what it made.

use std::path::{Path, PathBuf};

use a3s_box_core::BoxId;

/// The pod's primary interface, in the namespace and in the guest.
pub const INTERFACE: &str = "eth0";

/// The name of a box's network namespace, as `ip netns` shows it.
pub fn netns(id: &BoxId) -> String {
    format!("a3s-{id}")
}

/// Where a box's namespace is mounted.
pub fn netns_path(netns_dir: &Path, id: &BoxId) -> PathBuf {
    netns_dir.join(netns(id))
}

/// The host's end of the cable to a box on the local network: as long as a link's name may be.
pub(crate) fn veth(id: &BoxId) -> String {
    format!("a3s{}", id.short())
}

/// CNI's `CNI_CONTAINERID`.
pub fn container_id(id: &BoxId) -> &str {
    id.as_str()
}

/// The tap of the pod's n-th interface. Every pod has its own namespace, so all may use the same names.
pub fn tap(index: usize) -> String {
    format!("tap{index}")
}
