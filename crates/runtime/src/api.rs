//! The values that the runtime gives to its callers.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use a3s_box_core::lifecycle::{BoxPhase, SessionPhase};
use a3s_box_core::spec::{BoxSpec, SessionSpec};
use a3s_box_core::{BoxId, SessionId};

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

/// One stage of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// reserve, network, scratch, vmm, kernel, agent, configure, …
    pub name: String,
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
    /// For people, empty when ready.
    pub message: String,
}

/// What a session uses, with everything that runs in it. Counters are sums since its start and never go backwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionUsage {
    /// The session.
    pub id: SessionId,
    /// When the figures were read, by the host's clock: nanoseconds since the epoch.
    pub at_ns: i64,
    /// Processor time.
    pub cpu: CpuUsage,
    /// Memory.
    pub memory: MemoryUsage,
    /// Processes and threads that exist.
    pub pids: u64,
    /// Traffic with block devices.
    pub io: IoUsage,
    /// What it has written; `None` until it could be measured.
    pub writable_layer: Option<WritableLayerUsage>,
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
}
