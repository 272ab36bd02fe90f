//! QEMU's microvm machine: software emulation anywhere, KVM where a libkrun box cannot be had.
//!
//! ```text
//! a3s-box-vmm (pid 1 of the box's namespace)
//! ├── a3s-box-vmm           root, eight capabilities: the file server, which acts for the guest's users on volumes
//! ├── a3s-box-vmm           unprivileged: the vsock device
//! └── qemu-system-x86_64    unprivileged; its files and taps are opened for it
//! ```

pub mod args;

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;

use crate::error::LaunchError;
use crate::launch::{Accel, Hypervisor, LaunchSpec, QemuSpec};
use crate::machine::BoxMachine;
use crate::seam::{BackendKind, BoxPlan, Machine, MachineFacts, Vmm};
use crate::starter::{self, Part};

/// `nobody` of every distribution: owns nothing, and each box's processes are alone in their PID namespace.
pub const UNPRIVILEGED: u32 = 65534;

/// Where the parts of this backend are installed.
#[derive(Debug, Clone)]
pub struct QemuParts {
    /// The `a3s-box-vmm` program.
    pub vmm: PathBuf,
    /// `qemu-system-x86_64`.
    pub emulator: PathBuf,
}

/// Starts boxes on QEMU.
#[derive(Debug, Clone)]
pub struct QemuVmm {
    parts: QemuParts,
    accel: Accel,
    limit: Duration,
}

impl QemuVmm {
    /// A backend of these parts. A VMM process that is not up within `limit` is ended.
    pub fn new(parts: QemuParts, accel: Accel, limit: Duration) -> Self {
        Self { parts, accel, limit }
    }

    pub(crate) fn hypervisor(&self) -> Hypervisor {
        Hypervisor::Qemu(QemuSpec {
            emulator: self.parts.emulator.clone(),
            accel: self.accel,
            uid: UNPRIVILEGED,
        })
    }

    pub(crate) fn required(&self) -> [Part<'_>; 2] {
        const OURS: &str = "install a3s-box again, or set the path in its configuration";
        [
            Part { what: "a3s-box-vmm", path: &self.parts.vmm, remedy: OURS },
            Part {
                what: "QEMU",
                path: &self.parts.emulator,
                remedy: "install it (Debian: apt-get install qemu-system-x86)",
            },
        ]
    }
}

#[async_trait]
impl Vmm for QemuVmm {
    fn kind(&self) -> BackendKind {
        BackendKind::Qemu
    }

    async fn launch(&self, plan: &BoxPlan) -> Result<Box<dyn Machine>, LaunchError> {
        starter::check(&self.required())?;
        let spec = LaunchSpec { plan: plan.clone(), hypervisor: self.hypervisor(), trial: false };
        Ok(Box::new(starter::launch(&self.parts.vmm, spec, self.limit).await?))
    }

    async fn adopt(&self, dir: &Path, facts: &MachineFacts) -> Result<Option<Box<dyn Machine>>, LaunchError> {
        BoxMachine::adopt(&self.parts.vmm, dir, facts)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn plan() -> BoxPlan {
        BoxPlan {
            id: a3s_box_core::BoxId::from_random([0xa5; 32]),
            dir: "/run/a3s-box/boxes/x".into(),
            vcpus: 2,
            memory_mib: 512,
            kernel: "/usr/lib/a3s-box/vmlinux".into(),
            initramfs: "/usr/lib/a3s-box/initramfs.cpio".into(),
            cmdline: String::new(),
            scratch: "/var/lib/a3s-box/scratch/x".into(),
            network: None,
            cgroups: Vec::new(),
            guest_ports: Vec::new(),
        }
    }

    pub(crate) fn spec(accel: Accel) -> QemuSpec {
        QemuSpec { emulator: "/usr/bin/qemu-system-x86_64".into(), accel, uid: UNPRIVILEGED }
    }

    #[tokio::test]
    async fn a_missing_part_is_named_with_its_remedy_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let parts = QemuParts { vmm: "/bin/true".into(), emulator: dir.path().join("qemu-system-x86_64") };
        let plan = BoxPlan { dir: dir.path().to_owned(), ..plan() };
        let error =
            QemuVmm::new(parts, Accel::Tcg, Duration::from_secs(1)).launch(&plan).await.err().unwrap();
        assert!(matches!(&error, LaunchError::MissingPart { what: "QEMU", .. }), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
