//! What a client asks for: boxes, sessions and processes, in our own words.
//!
//! `cri` and the command line make these; `runtime` stores them and turns them into a VM plan
//! and into messages for the guest agent. Sizes are bytes unless the name says otherwise.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::egress::EgressPolicy;
use crate::image::Layer;
use crate::seccomp::SeccompProfile;

/// Kubernetes' identity of a pod sandbox. Two live boxes never share one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodIdentity {
    /// Pod name.
    pub name: String,
    /// Pod namespace.
    pub namespace: String,
    /// Pod UID.
    pub uid: String,
    /// Attempt of the sandbox.
    pub attempt: u32,
}

/// A box to be made: CRI's `PodSandboxConfig` after validation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoxSpec {
    /// Who it is.
    pub identity: PodIdentity,
    /// The guest's host name; empty means the pod's name.
    pub hostname: String,
    /// Labels, for filters.
    pub labels: BTreeMap<String, String>,
    /// Annotations, returned as given.
    pub annotations: BTreeMap<String, String>,
    /// Where the logs of its sessions go; without it nothing is logged.
    pub log_directory: Option<PathBuf>,
    /// The runtime handler that was asked for; empty means the default one.
    pub runtime_handler: String,
    /// The pod's cgroup as kubelet names it.
    pub cgroup_parent: Option<String>,
    /// The size of the virtual machine.
    pub size: BoxSize,
    /// The resolver's configuration; `None` leaves the image's own.
    pub dns: Option<DnsSpec>,
    /// Ports to publish on the host.
    pub port_mappings: Vec<PortMapping>,
    /// Kernel parameters of the guest, `net.ipv4.ip_forward` style.
    pub sysctls: BTreeMap<String, String>,
    /// Whether the pod gets a network of its own.
    pub network: NetworkMode,
    /// Where it may open connections to; without a policy everywhere.
    #[serde(default)]
    pub egress: Option<EgressPolicy>,
    /// The user namespace of its sessions; without one they have the guest's users.
    #[serde(default)]
    pub user_namespace: Option<UserNamespace>,
    /// As whom process 1 of the processes that its sessions share runs; `None` means nobody in particular.
    #[serde(default)]
    pub init_user: Option<InitUser>,
}

/// A user by number, as the pod's sessions know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitUser {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Which ids the users of a user namespace have outside of it: user_namespaces(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    /// Users.
    pub uids: IdRange,
    /// Groups.
    pub gids: IdRange,
}

/// Ids 0 to `count` - 1 inside are `start` and up outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// What 0 is outside.
    pub start: u32,
    /// How many there are, at least 1.
    pub count: u32,
}

/// The size of a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoxSize {
    /// Virtual CPUs, at least 1.
    pub vcpus: u8,
    /// Guest memory in MiB; pages are backed when they are touched.
    pub memory_mib: u32,
    /// The scratch disk that carries all writable layers, in MiB; sparse.
    pub scratch_mib: u64,
}

impl Default for BoxSize {
    fn default() -> Self {
        Self { vcpus: 2, memory_mib: 2048, scratch_mib: 10 * 1024 }
    }
}

/// How a pod is connected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkMode {
    /// By the node's network configuration (CNI).
    #[default]
    Pod,
    /// Loopback only.
    None,
}

/// resolv.conf, field by field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsSpec {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// The `search` line.
    pub searches: Vec<String>,
    /// The `options` line.
    pub options: Vec<String>,
}

/// Transport of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PortProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port of the pod that the host publishes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Transport.
    pub protocol: PortProtocol,
    /// Port inside the pod.
    pub container_port: u16,
    /// Port on the host.
    pub host_port: u16,
    /// Host address; empty means all.
    pub host_ip: String,
}

/// A session to be made: CRI's `ContainerConfig` after validation and after the image's config
/// was merged in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionSpec {
    /// CRI's container name.
    pub name: String,
    /// CRI's attempt.
    pub attempt: u32,
    /// The image as the client named it.
    pub image_ref: String,
    /// Labels, for filters.
    pub labels: BTreeMap<String, String>,
    /// Annotations, returned as given.
    pub annotations: BTreeMap<String, String>,
    /// The log file relative to the box's log directory.
    pub log_path: Option<PathBuf>,
    /// What runs.
    pub process: ProcessSpec,
    /// The root file system cannot be written.
    pub readonly_rootfs: bool,
    /// Mounts in the order in which they are made.
    pub mounts: Vec<MountSpec>,
    /// Absolute paths that the image declares as volumes, see [`crate::image::ImageConfig::volume_paths`].
    #[serde(default)]
    pub image_volumes: Vec<String>,
    /// Whose processes it sees.
    pub pid_namespace: PidNamespace,
    /// Limits inside the box.
    pub limits: Limits,
    /// Paths hidden from the session.
    pub masked_paths: Vec<String>,
    /// Paths made read-only.
    pub readonly_paths: Vec<String>,
    /// All of the guest's devices and no confinement inside the guest.
    pub privileged: bool,
    /// Signal for a graceful stop, as a number; SIGTERM is 15.
    pub stop_signal: i32,
    /// Keep stdin open for clients that attach.
    pub stdin: bool,
    /// Close stdin after the first client that attached has left.
    pub stdin_once: bool,
}

/// A process: the session's own or one that is executed in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Program and arguments; the program is looked up in the session's PATH.
    pub args: Vec<String>,
    /// Environment, each `NAME=value`; later entries win.
    pub env: Vec<String>,
    /// Working directory; made if it does not exist.
    pub cwd: String,
    /// A pseudo terminal instead of pipes; stdout and stderr are then one.
    pub terminal: bool,
    /// As whom.
    pub user: UserSpec,
    /// What it may do.
    pub capabilities: CapabilitySpec,
    /// The `no_new_privs` bit.
    pub no_new_privileges: bool,
    /// System call filter.
    pub seccomp: SeccompSpec,
    /// `oom_score_adj`, -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// Resource limits, by the names of setrlimit(2); others are the runtime's or the guest's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rlimits: Vec<RlimitSpec>,
}

/// A resource limit of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RlimitSpec {
    /// `RLIMIT_NOFILE`, …
    pub name: String,
    /// What holds; `u64::MAX` is no limit.
    pub soft: u64,
    /// How far the process may raise it; not below `soft`.
    pub hard: u64,
}

/// As whom a process runs. Names are resolved in the session's own /etc/passwd and /etc/group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserSpec {
    /// `""` (root), `name`, `uid`, `name:group`, `uid:gid` …: the image's or the client's words.
    pub user: String,
    /// Overrides the group of `user`.
    pub group: Option<u32>,
    /// Further groups.
    pub supplemental_groups: Vec<u32>,
    /// Only `supplemental_groups`, none from the image's /etc/group (policy `Strict`).
    pub strict_groups: bool,
}

/// Linux capabilities, relative to the runtime's default set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapabilitySpec {
    /// Added, e.g. `NET_ADMIN` or `CAP_NET_ADMIN`; `ALL` means all.
    pub add: Vec<String>,
    /// Dropped; `ALL` means all.
    pub drop: Vec<String>,
    /// Added and raised in the ambient set.
    pub add_ambient: Vec<String>,
}

/// System call filter of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SeccompSpec {
    /// The runtime's default profile.
    #[default]
    RuntimeDefault,
    /// None.
    Unconfined,
    /// One from a file of the node.
    Profile(Box<SeccompProfile>),
}

/// Whose processes a session sees.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidNamespace {
    /// Only its own.
    #[default]
    Session,
    /// All of the pod's sessions that share too.
    Pod,
    /// Those of another session.
    Target(crate::SessionId),
}

/// A mount of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// What.
    pub source: MountSource,
    /// Absolute path in the session.
    pub target: String,
    /// Writes are refused.
    pub readonly: bool,
    /// Mount flags beyond `readonly`: `noexec`, `nosuid`, `nodev`, …
    pub options: Vec<String>,
}

/// Where a mount comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A file or directory of the host.
    Host {
        /// Absolute host path; symlinks are resolved on the host.
        path: PathBuf,
        /// Later mounts of the host below the source appear (`rslave`).
        propagate: bool,
        /// Read-only applies to the mounts below the source too.
        recursive_readonly: bool,
        /// Its files belong to the users of this namespace as if those were the host's.
        #[serde(default)]
        id_mapped: Option<UserNamespace>,
    },
    /// Memory.
    Tmpfs {
        /// Limit in bytes; 0 means half of the guest's memory.
        size: u64,
    },
    /// The files of an image, never to be written.
    Image {
        /// The client's words for the image.
        reference: String,
        /// What they led to.
        id: String,
        /// Its layers, lowest first.
        layers: Vec<Layer>,
        /// What of it is mounted, relative to its root; empty means all.
        sub_path: String,
    },
}

impl MountSource {
    /// The layers of the image that is mounted, if it is one.
    pub fn layers(&self) -> &[Layer] {
        match self {
            Self::Image { layers, .. } => layers,
            Self::Host { .. } | Self::Tmpfs { .. } => &[],
        }
    }
}

/// Limits of a session inside its box; `None` means no limit. Kernel meanings of cgroup v1 as CRI
/// states them; the agent translates to cgroup v2.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// cpu.shares, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// Microseconds of CPU per period.
    pub cpu_quota_us: Option<i64>,
    /// Microseconds.
    pub cpu_period_us: Option<u64>,
    /// `0-3,5`.
    pub cpuset_cpus: String,
    /// `0`.
    pub cpuset_mems: String,
    /// Memory.
    pub memory_bytes: Option<i64>,
    /// Memory plus swap.
    pub memory_swap_bytes: Option<i64>,
    /// Processes.
    pub pids: Option<i64>,
    /// Raw cgroup v2 keys, e.g. `memory.high`.
    pub unified: BTreeMap<String, String>,
}
