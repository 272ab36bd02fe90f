//! libkrun on KVM: the VM runs in the `a3s-box-vmm` process itself, one host process per box.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;

use crate::error::LaunchError;
use crate::launch::{Hypervisor, LaunchSpec};
use crate::machine::BoxMachine;
use crate::seam::{BackendKind, BoxPlan, Machine, MachineFacts, Vmm};
use crate::starter::{self, Part};

/// The device that says whether there is KVM at all.
pub(crate) const KVM: &str = "/dev/kvm";

/// Starts boxes on libkrun.
#[derive(Debug, Clone)]
pub struct LibkrunVmm {
    vmm: PathBuf,
    limit: Duration,
}

impl LibkrunVmm {
    /// A backend around the `a3s-box-vmm` program. A process that is not up within `limit` is ended.
    pub fn new(vmm: PathBuf, limit: Duration) -> Self {
        Self { vmm, limit }
    }

    pub(crate) fn required(&self) -> [Part<'_>; 2] {
        [
            Part {
                what: "a3s-box-vmm",
                path: &self.vmm,
                remedy: "install a3s-box again, or set the path in its configuration",
            },
            Part {
                what: "KVM",
                path: KVM.as_ref(),
                remedy: "enable virtualization in the firmware and load kvm-intel or kvm-amd, or use the qemu backend",
            },
        ]
    }
}

#[async_trait]
impl Vmm for LibkrunVmm {
    fn kind(&self) -> BackendKind {
        BackendKind::Libkrun
    }

    async fn launch(&self, plan: &BoxPlan) -> Result<Box<dyn Machine>, LaunchError> {
        starter::check(&self.required())?;
        let spec = LaunchSpec { plan: plan.clone(), hypervisor: Hypervisor::Libkrun, trial: false };
        Ok(Box::new(starter::launch(&self.vmm, spec, self.limit).await?))
    }

    async fn adopt(&self, dir: &Path, facts: &MachineFacts) -> Result<Option<Box<dyn Machine>>, LaunchError> {
        BoxMachine::adopt(&self.vmm, dir, facts)
    }
}
