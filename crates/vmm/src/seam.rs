//! The seam between the runtime and a hypervisor.
//!
//! A backend turns a [`BoxPlan`] into a running process tree with one `a3s-box-vmm` process at its
//! root. Everything the runtime does with a running VM goes through [`Machine`]; nothing above
//! this crate knows which hypervisor it is.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use a3s_box_core::BoxId;
use a3s_box_core::spec::UserNamespace;
use a3s_box_protocol::{FORGET_PORT, READY_PORT, RPC_PORT, STREAM_PORT, TIME_PORT};

use crate::error::{AttachError, ConnectError, LaunchError, MachineError};
use crate::words::GuestFault;

/// Which hypervisor runs a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// libkrun on KVM, in the `a3s-box-vmm` process itself.
    Libkrun,
    /// QEMU's microvm machine, software emulation or KVM.
    Qemu,
}

/// Everything that a backend must know to start a box. All paths are absolute host paths.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BoxPlan {
    /// Whose box.
    pub id: BoxId,
    /// The box's directory, e.g. `/run/a3s-box/boxes/<id>`. It exists and belongs to this box alone. The backend
    /// puts `plan.json`, `console.log`, `vmm.log` and the directory `vsock/` there.
    pub dir: PathBuf,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The guest kernel (ELF).
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initramfs: PathBuf,
    /// Appended to the kernel's command line.
    pub cmdline: String,
    /// The scratch disk: a raw image that the guest sees as /dev/vda.
    pub scratch: PathBuf,
    /// The pod's network namespace and NICs; `None` for loopback only.
    pub network: Option<PlanNetwork>,
    /// Directories of the host's cgroup hierarchies that the process tree is put into. They exist.
    pub cgroups: Vec<PathBuf>,
    /// Further guest ports that the host may dial (agent images).
    pub guest_ports: Vec<u32>,
}

/// The ports of the host that the guest dials: for Ready, for questions of time, and to be told what to forget.
pub const GUEST_DIALS: [u32; 3] = [READY_PORT, TIME_PORT, FORGET_PORT];

impl BoxPlan {
    /// The ports of the guest that the host may dial: on each of them a socket of the box is listened on.
    pub fn host_dials(&self) -> impl Iterator<Item = u32> {
        [RPC_PORT, STREAM_PORT].into_iter().chain(self.guest_ports.iter().copied())
    }
}

/// The network part of a plan.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlanNetwork {
    /// A bind mount of the namespace.
    pub netns: PathBuf,
    /// The NICs in the order in which the guest sees them.
    pub nics: Vec<PlanNic>,
}

/// One NIC: a persistent tap in the pod's network namespace.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlanNic {
    /// The tap's name.
    pub tap: String,
    /// The MAC address that the NIC starts with. The pod's is known later, so the agent sets it, and finds the NIC by this
    /// one.
    pub mac: [u8; 6],
}

impl PlanNic {
    /// The NIC with this place in the guest's order. Its first address is locally administered and the same in all boxes: no
    /// frame ever carries it.
    pub fn new(place: u8, tap: String) -> Self {
        Self { tap, mac: [0x02, 0xa3, 0x5b, 0, 0, place] }
    }
}

/// When a box reached its stages, counted from the start of `launch`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BootTimes {
    /// The `a3s-box-vmm` process exists.
    pub spawned: Duration,
    /// The VM is about to execute its first instruction.
    pub vmm_up: Duration,
    /// The guest's Ready message was read; `None` until then, and for an adopted box.
    pub ready: Option<Duration>,
}

/// What must be remembered of a running VM to find it again after the daemon was restarted. A pid alone can
/// be reused; pid and start time together cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// Which backend made it.
    pub backend: BackendKind,
    /// The `a3s-box-vmm` process.
    pub pid: i32,
    /// Field 22 of /proc/PID/stat: clock ticks between the host's boot and the start of the process.
    pub start_ticks: u64,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineExit {
    /// The guest powered itself off.
    PowerOff,
    /// The process ended with an exit code other than 0.
    Failed {
        /// The exit code.
        code: i32,
    },
    /// The process was ended by a signal.
    Killed {
        /// The signal.
        signal: i32,
    },
    /// The process is gone and was not our child, so nobody can tell how.
    Vanished,
}

/// A mount to appear in a box's share.
#[derive(Debug)]
pub struct Attachment {
    /// What: a file or directory of the host, opened (O_PATH) by the caller so that no symlink can be swapped
    /// underneath.
    pub source: OwnedFd,
    /// Where, relative to the share: `images/<name>` or `pod/<name>`. One level, no `..`.
    pub target: String,
    /// Writes through it are refused by the host.
    pub readonly: bool,
    /// With `readonly`: the mounts below the source are made read-only too.
    pub recursive_readonly: bool,
    /// Host mounts that appear below the source later appear here too (`rslave`); otherwise private.
    pub propagate: bool,
    /// Files that belong to user N of the host appear as of the one who is N in this namespace, and are made the
    /// other way round. Needs a file system that allows id-mapped mounts.
    pub id_mapped: Option<UserNamespace>,
}

/// What a box costs its host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostUsage {
    /// Processor time of the VMM's processes, with what they spent on running the guest.
    pub cpu: Duration,
    /// Their memory in bytes, with what the guest has touched of its own; what is shared with others in parts.
    pub memory_bytes: u64,
}

/// Starts boxes.
#[async_trait]
pub trait Vmm: Send + Sync + 'static {
    /// Which hypervisor this is.
    fn kind(&self) -> BackendKind;

    /// Starts a box. When this returns the process exists and the vsock sockets are listened on; the guest
    /// may still be booting. A failure leaves no process behind.
    async fn launch(&self, plan: &BoxPlan) -> Result<Box<dyn Machine>, LaunchError>;

    /// Finds a box that an earlier daemon started, by its plan's directory. `Ok(None)`: it is gone.
    async fn adopt(&self, dir: &Path, facts: &MachineFacts) -> Result<Option<Box<dyn Machine>>, LaunchError>;
}

/// A VM that was started. Dropping the value does not end it: boxes outlive the daemon.
#[async_trait]
pub trait Machine: Send + Sync {
    /// To be remembered.
    fn facts(&self) -> MachineFacts;

    /// Waits for the guest's Ready message on [`a3s_box_protocol::READY_PORT`]; ends early if the VM ends.
    async fn ready(&self, limit: Duration) -> Result<a3s_box_protocol::proto::Ready, MachineError>;

    /// Dials a port of the guest. Only after `ready`.
    async fn connect(&self, port: u32) -> Result<UnixStream, ConnectError>;

    /// Makes a mount appear in the running box's share (open_tree, setns, move_mount).
    async fn attach(&self, attachment: Attachment) -> Result<(), AttachError>;

    /// Has the host refuse writes to the top of such a mount, or allow them, without making another one. Refusing fails with
    /// `ResourceBusy` while a file on it is open for writing.
    async fn set_readonly(&self, target: &str, readonly: bool) -> Result<(), AttachError>;

    /// Removes such a mount; one that is not there is no error.
    async fn detach(&self, target: &str) -> Result<(), AttachError>;

    /// Answers when the whole process tree has ended. May be called by several tasks and again.
    async fn wait(&self) -> MachineExit;

    /// Ends the process tree at once. One that has ended is no error.
    async fn kill(&self) -> Result<(), MachineError>;

    /// What it costs the host. `None`: nobody can tell, or it has ended.
    async fn host_usage(&self) -> Option<HostUsage> {
        None
    }

    /// When the stages of the start were reached. All zero for an adopted box.
    fn times(&self) -> BootTimes {
        BootTimes::default()
    }

    /// Why a guest that powered itself off did so, if it tells.
    async fn guest_fault(&self) -> Option<GuestFault> {
        None
    }

    /// The last lines of the guest's console and of the VMM's own log, for messages: at most `bytes`, with
    /// control characters removed.
    async fn last_words(&self, bytes: usize) -> String;
}
