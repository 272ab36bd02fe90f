//! Which hypervisor runs the boxes of this instance.

use std::sync::Arc;

use thiserror::Error;

use a3s_box_vmm::{Accel, BackendKind, LibkrunVmm, QemuParts, QemuVmm, Vmm};

use crate::config::{Backend, Config};
use crate::doctor::{Check, Verdict};
use crate::layout::{Layout, MissingPart, Part};

/// The hypervisor that was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Which.
    pub kind: BackendKind,
    /// Why, in a sentence for people.
    pub reason: String,
}

impl Choice {
    /// Its name, as the configuration spells it.
    pub fn name(&self) -> &'static str {
        match self.kind {
            BackendKind::Libkrun => "libkrun",
            BackendKind::Qemu => "qemu",
        }
    }

    pub(crate) fn is_qemu(&self) -> bool {
        match self.kind {
            BackendKind::Libkrun => false,
            BackendKind::Qemu => true,
        }
    }
}

/// No hypervisor can be used.
#[derive(Debug, Error)]
pub enum BackendError {
    /// A part of the one that was chosen is not installed.
    #[error("the hypervisor {backend} cannot be used: {source}")]
    Missing {
        /// Which.
        backend: &'static str,
        /// What it lacks.
        #[source]
        source: MissingPart,
    },
}

/// Chooses the hypervisor of a configuration and makes it ready to start boxes.
pub async fn choose(config: &Config, layout: &Layout) -> Result<(Choice, Arc<dyn Vmm>), BackendError> {
    let choice = decide(config, layout).await?;
    let vmm = build(&choice, config, layout)?;
    Ok((choice, vmm))
}

async fn decide(config: &Config, _layout: &Layout) -> Result<Choice, BackendError> {
    let configured = |kind| Choice {
        kind,
        reason: match config.origin("vmm.backend") {
            Some(origin) => format!("vmm.backend is set by {origin}"),
            None => "vmm.backend is set".to_owned(),
        },
    };
    Ok(match config.vmm.backend {
        Backend::Libkrun => configured(BackendKind::Libkrun),
        Backend::Qemu => configured(BackendKind::Qemu),
        Backend::Auto => Choice { kind: BackendKind::Qemu, reason: "KVM was not tried".to_owned() },
    })
}

fn build(choice: &Choice, config: &Config, layout: &Layout) -> Result<Arc<dyn Vmm>, BackendError> {
    let find =
        |part| layout.find(part).map_err(|source| BackendError::Missing { backend: choice.name(), source });
    let vmm = find(Part::Vmm)?;
    let limit = config.vmm.boot_limit;
    Ok(match choice.kind {
        BackendKind::Libkrun => Arc::new(LibkrunVmm::new(vmm, limit)),
        BackendKind::Qemu => {
            let parts = QemuParts {
                vmm,
                emulator: find(Part::Qemu)?,
                virtiofsd: find(Part::Virtiofsd)?,
                vhost_device_vsock: find(Part::VhostVsock)?,
            };
            Arc::new(QemuVmm::new(parts, Accel::Tcg, limit))
        }
    })
}

/// The checks about hypervisors; answers the one that would be chosen.
pub(crate) async fn examine(config: &Config, layout: &Layout, checks: &mut Vec<Check>) -> Option<Choice> {
    match decide(config, layout).await {
        Ok(choice) => {
            checks.push(Check::ok("hypervisor", format!("{}: {}", choice.name(), choice.reason)));
            Some(choice)
        }
        Err(error) => {
            checks.push(Check::lacking("hypervisor", Verdict::Fail, error.to_string(), "see above"));
            None
        }
    }
}
