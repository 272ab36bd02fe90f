//! The values that the runtime gives to its callers.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use a3s_box_core::lifecycle::{BoxPhase, SessionPhase};
use a3s_box_core::network::InterfaceUsage;
use a3s_box_core::spec::{BoxSpec, SessionSpec};
use a3s_box_core::{BoxId, SessionId};
use a3s_box_vmm::HostUsage;

/// A box as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct BoxStatus {
    /// Its id.
    pub id: BoxId,
    /// As it was asked for.
    pub spec: BoxSpec,
    /// Where it is in its life.
    pub phase: BoxPhase,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// Its addresses, primary first; empty without a network.
    pub ips: Vec<IpAddr>,
    /// Which backend runs it: `qemu`, `libkrun`.
    pub backend: String,
    /// The guest's kernel, once it is up.
    pub kernel_release: String,
    /// The host process, once it exists.
    pub vmm_pid: Option<i32>,
    /// The stages of its start with the time each took, in order.
    pub timeline: Vec<Stage>,
    /// Its directory below the run directory.
    pub dir: PathBuf,
}

/// What is left of a box that is gone. It is tried again until it is given back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// The box.
    pub id: BoxId,
    /// Since when, in nanoseconds since the epoch.
    pub since_ns: i64,
    /// How often it was tried.
    pub attempts: u32,
    /// What the last attempt met.
    pub error: String,
}

/// A record that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// The table it was in, and its key there: `boxes/ID`, `sessions/ID`.
    pub record: String,
    /// Why it cannot be read.
    pub error: String,
    /// When it was set apart, in nanoseconds since the epoch.
    pub since_ns: i64,
    /// As it was.
    pub content: String,
}

/// One stage of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// reserve, netns, scratch, network, turn, vmm, boot, guest/…, configure
    pub name: String,
    /// When it began, counted from the start of the whole. Some stages run side by side. Records of older versions do not say.
    #[serde(default)]
    pub at: Duration,
    /// How long it took.
    pub took: Duration,
}

/// A session as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionStatus {
    /// Its id.
    pub id: SessionId,
    /// Its box.
    pub box_id: BoxId,
    /// As it was asked for.
    pub spec: SessionSpec,
    /// The image's id (`sha256:…`).
    pub image_id: String,
    /// `NAME@sha256:…` of the image, or its id.
    pub image_digest_ref: String,
    /// Where it is in its life.
    pub phase: SessionPhase,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// The absolute path of its log file.
    pub log_path: Option<PathBuf>,
    /// Whom its user turned out to be, once it was started.
    pub user: Option<ResolvedUser>,
    /// Process id in the guest, once it was started.
    pub pid: Option<u32>,
    /// Further facts for people: `inspect` prints them.
    pub info: BTreeMap<String, String>,
}

/// A user as resolved in the session's own /etc.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedUser {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplemental groups.
    pub groups: Vec<u32>,
}

/// What a short command printed and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// Standard output, up to the limit.
    pub stdout: Vec<u8>,
    /// Standard error, up to the limit.
    pub stderr: Vec<u8>,
    /// 0 to 255; 128 + number for a signal.
    pub exit_code: i32,
    /// Output beyond the limit was dropped.
    pub truncated: bool,
}

/// Whether pods can be connected: CRI's condition `NetworkReady`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkReadiness {
    /// They can.
    pub ready: bool,
    /// One word, empty when ready.
    pub reason: String,
    /// For people: what is lacking, or what connects pods.
    pub message: String,
}

/// What a session uses, with everything that runs in it.
pub type SessionUsage = Usage<SessionId>;

/// What a box uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoxUsage {
    /// The box.
    pub id: BoxId,
    /// When the figures were read, by the host's clock: nanoseconds since the epoch.
    pub at_ns: i64,
    /// All of its sessions together, with those that are no more. `None` with an agent that does not say it.
    pub total: Option<Usage<BoxId>>,
    /// Its interfaces, the primary one first; empty without a network and when the box is not up.
    pub network: Vec<InterfaceUsage>,
    /// What it costs the host, with what the guest uses; `None` when the box is not up.
    pub host: Option<HostUsage>,
    /// Those of its sessions of which something is known.
    pub sessions: Vec<SessionUsage>,
}

/// What a session, or a box, uses. Counters are sums since its start and never go backwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage<Id> {
    /// Whose figures these are.
    pub id: Id,
    /// When the figures were read, by the host's clock: nanoseconds since the epoch.
    pub at_ns: i64,
    /// Processor time.
    pub cpu: CpuUsage,
    /// Memory.
    pub memory: MemoryUsage,
    /// Processes that exist; of a box those at its top only.
    pub processes: u64,
    /// Their threads, with those of a box's sessions.
    pub threads: u64,
    /// The limit of threads; 0 without one.
    pub threads_max: u64,
    /// Files that its processes have open.
    pub file_descriptors: u64,
    /// Those of them that are sockets.
    pub sockets: u64,
    /// Traffic with block devices.
    pub io: IoUsage,
    /// Time in which it waited.
    pub pressure: Pressures,
    /// What a session has written; `None` until it could be measured, and for a box.
    pub writable_layer: Option<WritableLayerUsage>,
}

/// Pressure stall information (the kernel's Documentation/accounting/psi.rst); `None` where a guest does not measure it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pressures {
    /// Waiting for a processor.
    pub cpu: Option<Pressure>,
    /// Waiting for memory.
    pub memory: Option<Pressure>,
    /// Waiting for a block device.
    pub io: Option<Pressure>,
}

/// Waiting for one resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Time in which at least one process waited.
    pub some: Stall,
    /// Time in which all waited at once.
    pub full: Stall,
}

/// Time spent waiting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stall {
    /// Microseconds since the start.
    pub total_us: u64,
    /// Hundredths of a percent of the last 10 seconds.
    pub avg10: u32,
    /// Of the last 60 seconds.
    pub avg60: u32,
    /// Of the last 300 seconds.
    pub avg300: u32,
}

/// Processor time, over all CPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuUsage {
    /// Nanoseconds since the start.
    pub usage_ns: u64,
    /// Those of them in programs.
    pub user_ns: u64,
    /// Those of them in the guest's kernel.
    pub system_ns: u64,
    /// Periods of the CPU limit in which something ran.
    pub periods: u64,
    /// Those of them in which the limit was used up.
    pub throttled_periods: u64,
    /// Nanoseconds waited for the next period then.
    pub throttled_ns: u64,
    /// Nanoseconds per second of late; `None` until there are two samples with some time between them.
    pub nano_cores: Option<u64>,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// All that counts towards the limit.
    pub usage_bytes: u64,
    /// Usage without file pages that nobody has touched lately.
    pub working_set_bytes: u64,
    /// Anonymous memory.
    pub rss_bytes: u64,
    /// What the limit leaves; `None` without a limit.
    pub available_bytes: Option<u64>,
    /// Page faults since the start.
    pub page_faults: u64,
    /// Those of them that waited for a disk.
    pub major_page_faults: u64,
    /// Swap in use.
    pub swap_bytes: u64,
    /// What the limit leaves of swap; `None` without a limit, and in a guest that cannot swap.
    pub swap_available_bytes: Option<u64>,
    /// The most that usage ever was.
    pub peak_bytes: u64,
    /// Pages of files.
    pub file_bytes: u64,
    /// Those of them that are mapped.
    pub mapped_file_bytes: u64,
    /// Those of them that were used of late.
    pub active_file_bytes: u64,
    /// Those of them that were not.
    pub inactive_file_bytes: u64,
    /// The guest kernel's own for it.
    pub kernel_bytes: u64,
    /// How often the limit was met.
    pub limit_hits: u64,
    /// How often a process was killed for want of memory.
    pub oom_kills: u64,
}

/// Traffic with block devices since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoUsage {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
}

/// What a session has added to its image, or changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WritableLayerUsage {
    /// The host's file with the box's scratch disk, on which it lies.
    pub disk: PathBuf,
    /// Bytes. A layer that is too large to be counted in time has at least so many.
    pub used_bytes: u64,
    /// Files and directories.
    pub inodes: u64,
    /// Bytes of the disk, which the box's sessions share.
    pub limit_bytes: u64,
    /// Its inodes.
    pub inodes_total: u64,
    /// Its free inodes.
    pub inodes_free: u64,
}
