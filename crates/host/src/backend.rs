//! Which hypervisor runs the boxes of this instance.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use a3s_box_vmm::probe::{Outcome, Trial};
use a3s_box_vmm::{
    Accel, BackendKind, LibkrunVmm, ProbeConfig, ProbeError, QemuParts, QemuVmm, Requested, Vmm, probe,
};

use crate::config::{Backend, Config, QemuAccel};
use crate::doctor::{Check, Verdict};
use crate::layout::{Layout, MissingPart, Part};
use crate::lock::{InstanceLock, LockError};

/// Where below a run directory the verdict of a trial is kept.
const VERDICT: &str = "hypervisor.json";

/// The hypervisor that was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Which.
    pub kind: BackendKind,
    /// What executes guest code.
    pub accel: Accel,
    /// Why, in a sentence for people, with all that was tried.
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
    /// A part that every trial needs is not installed.
    #[error(transparent)]
    Missing(#[from] MissingPart),
    /// Nothing works.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The directory for a trial cannot be had.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Waiting for another instance's trial was cut short.
    #[error("waiting for another trial did not finish: {0}")]
    Wait(#[from] tokio::task::JoinError),
}

/// Chooses the hypervisor of a configuration and makes it ready to start boxes. A trial boots in the configuration's
/// run directory, which must belong to the caller; its verdict is kept below `verdicts`, which instances may share.
pub async fn choose(
    config: &Config,
    layout: &Layout,
    verdicts: &Path,
) -> Result<(Choice, Arc<dyn Vmm>), BackendError> {
    let asked = asked(config, layout, &config.run_dir, verdicts)?;
    // One at a time: the second one finds the first one's verdict instead of booting again.
    let turn = verdicts.join("choosing");
    let _turn = tokio::task::spawn_blocking(move || InstanceLock::wait(&turn)).await??;
    let verdict = probe(&asked).await?;
    let limit = config.vmm.boot_limit;
    let vmm: Arc<dyn Vmm> = match verdict.backend {
        BackendKind::Libkrun => Arc::new(LibkrunVmm::new(asked.parts.vmm, limit)),
        BackendKind::Qemu => Arc::new(QemuVmm::new(asked.parts, verdict.accel, limit)),
    };
    Ok((Choice { kind: verdict.backend, accel: verdict.accel, reason: verdict.reason }, vmm))
}

fn asked(config: &Config, layout: &Layout, dir: &Path, verdicts: &Path) -> Result<ProbeConfig, MissingPart> {
    Ok(ProbeConfig {
        requested: match config.vmm.backend {
            Backend::Auto => Requested::Auto,
            Backend::Libkrun => Requested::Libkrun,
            Backend::Qemu => Requested::Qemu {
                accel: match config.vmm.qemu_accel {
                    QemuAccel::Auto => None,
                    QemuAccel::Kvm => Some(Accel::Kvm),
                    QemuAccel::Tcg => Some(Accel::Tcg),
                },
            },
        },
        parts: QemuParts { vmm: layout.find(Part::Vmm)?, emulator: wherever(layout, Part::Qemu) },
        kernel: layout.find(Part::Kernel)?,
        initramfs: layout.find(Part::Initramfs)?,
        dir: dir.to_path_buf(),
        cache: verdicts.join(VERDICT),
        limit: config.vmm.probe_limit,
    })
}

/// A part that only QEMU needs; that it lacks is found out if QEMU is to be used.
fn wherever(layout: &Layout, part: Part) -> PathBuf {
    layout.find(part).unwrap_or_else(|missing| missing.tried.into_iter().next().unwrap_or_default())
}

/// The checks about hypervisors; answers the one that would be chosen. Tries what a daemon would try, in a directory
/// of its own.
pub(crate) async fn examine(config: &Config, layout: &Layout, checks: &mut Vec<Check>) -> Option<Choice> {
    match try_out(config, layout).await {
        Ok(verdict) => {
            checks.extend(verdict.trials.iter().filter_map(|trial| kvm_check(trial, Verdict::Warn)));
            let choice = Choice { kind: verdict.backend, accel: verdict.accel, reason: verdict.reason };
            checks.push(Check::ok("hypervisor", describe(&choice, config)));
            Some(choice)
        }
        Err(BackendError::Probe(ProbeError::NoHypervisor { trials })) => {
            checks.extend(trials.iter().filter_map(|trial| kvm_check(trial, Verdict::Fail)));
            let remedy = "mend one of what was tried: KVM for libkrun, or the package qemu-system-x86";
            checks.push(Check::lacking("hypervisor", Verdict::Fail, "none can run a guest", remedy));
            None
        }
        Err(error) => {
            let remedy = "see the checks of that part below";
            checks.push(Check::lacking("hypervisor", Verdict::Fail, format!("not tried: {error}"), remedy));
            None
        }
    }
}

async fn try_out(config: &Config, layout: &Layout) -> Result<a3s_box_vmm::Verdict, BackendError> {
    let dir = config.run_dir.join("doctor");
    let _alone = InstanceLock::take(&dir)?;
    Ok(probe(&asked(config, layout, &dir, &config.run_dir)?).await?)
}

const KVM_REMEDY: &str = "/dev/kvm exists and cannot run a guest: pods run on software emulation; for hardware speed use a \
                          machine with virtualization, or a virtual one with nested virtualization";

fn kvm_check(trial: &Trial, lacking: Verdict) -> Option<Check> {
    let by = match (trial.backend, trial.accel) {
        (_, Accel::Tcg) => return None,
        (BackendKind::Libkrun, Accel::Kvm) => "libkrun",
        (BackendKind::Qemu, Accel::Kvm) => "QEMU",
    };
    Some(match &trial.outcome {
        Outcome::Booted { millis } => Check::ok("KVM", format!("{by} booted a guest in {millis} ms")),
        Outcome::Present => Check::ok("KVM", "/dev/kvm opens; nothing was booted"),
        Outcome::Failed { why, remedy: _ } => {
            Check::lacking("KVM", lacking, format!("tried with {by}: {why}"), KVM_REMEDY)
        }
        Outcome::Lacking { what, remedy } => Check::lacking("KVM", lacking, what.clone(), remedy.clone()),
    })
}

fn describe(choice: &Choice, config: &Config) -> String {
    let how = match (choice.kind, choice.accel) {
        (BackendKind::Libkrun, _) => "libkrun",
        (BackendKind::Qemu, Accel::Kvm) => "QEMU on KVM",
        (BackendKind::Qemu, Accel::Tcg) => "QEMU, software emulation",
    };
    let why = match (config.vmm.backend, choice.kind) {
        (Backend::Auto, BackendKind::Libkrun) => "KVM works".to_owned(),
        (Backend::Auto, BackendKind::Qemu) => "KVM cannot be used".to_owned(),
        (Backend::Libkrun | Backend::Qemu, _) => match config.origin("vmm.backend") {
            Some(origin) => format!("set by {origin}"),
            None => "as configured".to_owned(),
        },
    };
    format!("{how} ({why})")
}
