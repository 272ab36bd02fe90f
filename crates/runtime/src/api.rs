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
