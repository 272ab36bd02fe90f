//! What passes between the daemon and an `a3s-box-vmm` process: one file in, a few lines out.
//!
//! ```text
//! daemon                     a3s-box-vmm (outer)              a3s-box-vmm (inner, pid 1 of its namespace)
//!   plan.json, spawn  ─────►  cgroups, netns
//!                             clone ────────────────────────►  waits
//!   ◄── Started{pid} ───────  machine.json, release ────────►  jail
//!       reap                  ends                             VMM
//!   ◄── Up ──────────────────────────────────────────────────  runs until the guest ends
//! ```
//!
//! The inner process is cloned as the daemon's own child, so its exit status is the VM's, and it is the first
//! process of a PID namespace: the kernel reports its end only after everything it started has ended.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::seam::{BackendKind, BoxPlan, MachineFacts};

/// Name of the file in the box's directory that holds the [`LaunchSpec`].
pub const PLAN_FILE: &str = "plan.json";
/// Name of the file in which `a3s-box-vmm` leaves its [`MachineFacts`] before it boots anything.
pub const FACTS_FILE: &str = "machine.json";
/// The guest's serial console.
pub const CONSOLE_LOG: &str = "console.log";
/// What the VMM and its helpers say.
pub const VMM_LOG: &str = "vmm.log";
/// Directory of the box's vsock sockets.
pub const VSOCK_DIR: &str = "vsock";
/// A log of a box is cut to its last part when it grows beyond this.
pub const LOG_LIMIT: u64 = 1024 * 1024;

/// Paths as the VMM sees them after it has jailed itself.
pub mod jail {
    /// What the guest sees of the host: the root of the virtio-fs share. Mounted read-only; what is attached
    /// below it has its own say.
    pub const SHARE: &str = "/share";
    /// The same tmpfs, writable: mount points are made here. Not shared with the guest.
    pub const SHARE_WRITABLE: &str = "/share.rw";
    /// The guest kernel.
    pub const KERNEL: &str = "/vmlinux";
    /// The initramfs.
    pub const INITRAMFS: &str = "/initramfs";
    /// The scratch disk.
    pub const SCRATCH: &str = "/scratch";
    /// The box's `vsock/`.
    pub const VSOCK: &str = "/vsock";
    /// Sockets between the parts of the QEMU backend.
    pub const RUN: &str = "/run";
}

/// Name of the socket below `vsock/` that belongs to a port: the host connects to those of the guest's ports, and listens on
/// those of its own.
pub fn socket_name(port: u32) -> String {
    format!("{VSOCK_MULTIPLEX}_{port}")
}

/// In QEMU boxes of earlier builds a helper listens here and takes `CONNECT <port>`.
pub const VSOCK_MULTIPLEX: &str = "guest";

/// The contents of `plan.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// The box.
    pub plan: BoxPlan,
    /// How it is run.
    pub hypervisor: Hypervisor,
    /// Without the scratch disk: a boot that only proves that guests run here.
    pub trial: bool,
}

impl LaunchSpec {
    /// Which backend this is.
    pub fn backend(&self) -> BackendKind {
        match self.hypervisor {
            Hypervisor::Libkrun => BackendKind::Libkrun,
            Hypervisor::Qemu(_) => BackendKind::Qemu,
        }
    }
}

/// The backend's own part of a launch.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Hypervisor {
    /// In the process itself.
    Libkrun,
    /// As a child, beside its helpers.
    Qemu(QemuSpec),
}

/// Programs and settings of the QEMU backend.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QemuSpec {
    /// `qemu-system-x86_64`.
    pub emulator: PathBuf,
    /// What executes guest code.
    pub accel: Accel,
    /// User and group that QEMU and the vsock device run as.
    pub uid: u32,
}

/// What executes guest code under QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Software emulation: works everywhere.
    Tcg,
    /// The host's hardware.
    Kvm,
}

/// One line of JSON from `a3s-box-vmm` on its status pipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The inner process exists.
    Started {
        /// In the daemon's PID namespace.
        pid: i32,
        /// Field 22 of its /proc/PID/stat.
        start_ticks: u64,
    },
    /// The VM is about to execute its first instruction.
    Up,
    /// Setting up failed; the process ends.
    Failed {
        /// What was tried and what the operating system said.
        message: String,
    },
}

/// Reads the facts that `a3s-box-vmm` left in a box's directory. They are written before the VM starts, so a
/// daemon that died between starting a VM and writing its own record still finds it. `Ok(None)`: none was
/// started, or it did not get that far.
pub fn read_facts(dir: &Path) -> io::Result<Option<MachineFacts>> {
    match std::fs::read(dir.join(FACTS_FILE)) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the plan that a box in this directory was started by. `Ok(None)`: none was written.
pub fn read_plan(dir: &Path) -> io::Result<Option<BoxPlan>> {
    match std::fs::read(dir.join(PLAN_FILE)) {
        Ok(bytes) => {
            serde_json::from_slice::<LaunchSpec>(&bytes).map(|spec| Some(spec.plan)).map_err(io::Error::other)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Field 22 of /proc/PID/stat, for a process that has not ended. `Ok(None)`: there is none, or only its exit
/// status is left.
pub fn start_ticks(pid: i32) -> io::Result<Option<u64>> {
    let stat = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // ESRCH: it ended while the file was being read.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(parse_stat(&stat))
}

/// The fields of /proc/PID/stat from the third one, the state, on. The command name before it is in parentheses and may
/// itself hold parentheses and spaces: fields are counted from the last closing one.
pub(crate) fn stat_fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_ascii_whitespace()
}

fn parse_stat(stat: &str) -> Option<u64> {
    let mut fields = stat_fields(stat);
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_cannot_shift_the_fields() {
        let rest = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(parse_stat(&format!("12 (a) R 9 (b) S {rest}")), Some(4711));
        assert_eq!(parse_stat(&format!("12 (a) Z {rest}")), None);
        assert_eq!(parse_stat("12 (a"), None);
    }

    #[test]
    fn our_own_start_is_known_and_a_process_that_never_was_is_none() {
        assert!(start_ticks(std::process::id() as i32).unwrap().is_some());
        assert_eq!(start_ticks(i32::MAX).unwrap(), None);
    }

    #[test]
    fn a_directory_without_a_machine_has_no_facts_and_a_torn_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_facts(dir.path()).unwrap(), None);
        std::fs::write(dir.path().join(FACTS_FILE), b"{\"pid\": 1").unwrap();
        assert!(read_facts(dir.path()).is_err());
    }
}

#[cfg(test)]
mod golden;
