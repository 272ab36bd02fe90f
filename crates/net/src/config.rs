//! What the operator can set.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::local::LocalConfig;
use crate::tap;

/// Who connects pods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetMode {
    /// The node's CNI plugins.
    #[default]
    Cni,
    /// The built-in bridge, whatever CNI configuration there is.
    Local,
    /// Nobody: every pod has a loopback interface and nothing else.
    None,
}

/// Who connects pods in mode `cni` on a node without a CNI configuration. One that is there and broken is not replaced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Fallback {
    /// Nobody: they cannot be run.
    #[default]
    None,
    /// The built-in bridge.
    Local,
}

/// What leads frames from a pod's interface to its tap and back. Pods with an egress policy always have nftables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Redirect {
    /// Traffic control; nftables on a kernel whose traffic control lacks what it takes.
    #[default]
    Auto,
    /// Traffic control: sch_ingress, cls_u32 and act_mirred.
    Tc,
    /// nftables: nf_tables with NFT_FWD_NETDEV.
    Nft,
}

/// Settings of the network adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// Who connects pods.
    pub mode: NetMode,
    /// Who connects pods where there is no CNI configuration.
    pub fallback: Fallback,
    /// The built-in bridge.
    pub local: LocalConfig,
    /// Where CNI configurations lie; the lexically first file decides.
    pub conf_dir: PathBuf,
    /// What the CNI configuration is made from once the cluster has assigned addresses to the node, if nobody else brings
    /// one.
    pub conf_template: Option<PathBuf>,
    /// Where plugins are looked for, in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// Records of what each box holds. Must survive a reboot of the host, as the address
    /// allocations of IPAM plugins do.
    pub cache_dir: PathBuf,
    /// Where `a3s-box run` has such directories: `<other_caches>/<name>/cni`. What they hold of a CNI network is told
    /// to its GC too.
    pub other_caches: PathBuf,
    /// What keeps GC apart from ADD and DEL; the same file for all instances of the host.
    pub gc_lock: PathBuf,
    /// Where namespaces are mounted by name. Not `/var/run/netns`: the first `ip netns add` of a host mounts that
    /// directory over itself and what was there before into the bargain, and a namespace that is mounted twice
    /// outlives its removal.
    pub netns_dir: PathBuf,
    /// How long one plugin may take for one command before its process group is killed.
    pub plugin_timeout: Duration,
    /// What leads frames from a pod's interface to its tap and back.
    pub redirect: Redirect,
    /// The user that may open the taps without `CAP_NET_ADMIN`; without one only a privileged VMM can.
    pub tap_owner: Option<u32>,
    /// Whether the VMM opens a tap once per queue. Of two VMMs one cannot open such taps, and the other no other ones.
    pub multi_queue: bool,
}

impl NetConfig {
    pub(crate) fn taps(&self) -> tap::Kind {
        tap::Kind { owner: self.tap_owner, multi_queue: self.multi_queue }
    }
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            mode: NetMode::Cni,
            fallback: Fallback::None,
            local: LocalConfig::default(),
            conf_dir: "/etc/cni/net.d".into(),
            conf_template: None,
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: "/var/lib/a3s-box/cni".into(),
            other_caches: "/var/lib/a3s-box/standalone/run".into(),
            gc_lock: "/run/a3s-box/cni.lock".into(),
            netns_dir: "/run/a3s-box/netns".into(),
            plugin_timeout: Duration::from_secs(60),
            redirect: Redirect::Auto,
            tap_owner: None,
            multi_queue: false,
        }
    }
}
