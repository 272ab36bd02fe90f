//! Which hypervisor can this machine use? Decided by a boot that was tried, not by a file that exists.
//!
//! ```text
//! auto ── /dev/kvm opens? ── executes at speed? ── trial boot on libkrun reaches Ready within the limit? ── libkrun
//!            │ no               │ no                │ no
//!            └──────────────────┴───────────────────┴── QEMU's parts are there? ── qemu, software emulation
//!                                                          │ no
//!                                                          └── an error that lists all that was tried, with remedies
//! ```
//!
//! The speed is measured first because it is measured in a moment: a KVM that interprets its guests would keep a
//! trial boot busy until the limit, and the limit must allow for a KVM that is itself emulated.
//!
//! A verdict is kept in a file and holds for one boot of the host, one guest kernel and one version of a3s-box.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::error::LaunchError;
use crate::launch::{Accel, Hypervisor, LaunchSpec, read_facts};
use crate::libkrun::{KVM, LibkrunVmm};
use crate::process::Watched;
use crate::qemu::{QemuParts, QemuVmm};
use crate::seam::{BackendKind, BoxPlan, Machine};
use crate::starter::{self, Part};

/// How long a trial boot may take from the start of its process to the guest's Ready. Hardware needs a tenth of a
/// second.
pub const TRIAL_LIMIT: Duration = Duration::from_secs(20);

/// How many instructions `a3s-box-vmm kvm-speed` executes.
pub const KVM_SPEED_INSTRUCTIONS: u64 = 1_000_000;
/// Hardware needs 0.3 ms for them and an emulated processor up to 15; an interpreter took 520.
const SPEED_ENOUGH: Duration = Duration::from_millis(150);
/// Limit of that measurement, with the start of its process.
const SPEED_LIMIT: Duration = Duration::from_secs(3);

/// Memory of the guest of a trial.
const TRIAL_MEMORY_MIB: u32 = 256;

/// How much of a trial's last words a verdict keeps.
const WORDS: usize = 300;

/// What the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Requested {
    /// The best that works here.
    Auto,
    /// libkrun, taken at the operator's word: nothing is tried.
    Libkrun,
    /// QEMU. Without an accelerator KVM is used if a trial boot works, else software emulation.
    Qemu {
        /// Taken at the operator's word.
        accel: Option<Accel>,
    },
}

/// What a probe works with.
#[derive(Debug, Clone)]
pub struct ProbeConfig {
    /// What the operator asked for.
    pub requested: Requested,
    /// The parts of both backends; those that are not installed are found to be missing.
    pub parts: QemuParts,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initramfs: PathBuf,
    /// A directory of this instance that exists; the trial box lives in a directory below it while it runs.
    pub dir: PathBuf,
    /// Where the verdict is kept.
    pub cache: PathBuf,
    /// Limit of one trial boot.
    pub limit: Duration,
}

/// The hypervisor that was chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Which.
    pub backend: BackendKind,
    /// What executes guest code.
    pub accel: Accel,
    /// Why, in a sentence for people.
    pub reason: String,
    /// What was tried, in order.
    pub trials: Vec<Trial>,
}

/// One thing that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// Which backend.
    pub backend: BackendKind,
    /// With which accelerator.
    pub accel: Accel,
    /// What was seen.
    pub outcome: Outcome,
}

/// What a trial saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// A guest reached its agent.
    Booted {
        /// From the start of the process to Ready.
        millis: u64,
    },
    /// What it needs is there; no guest was booted.
    Present,
    /// A guest was started and did not get there.
    Failed {
        /// What was seen.
        why: String,
        /// What the operator can do.
        remedy: String,
    },
    /// Something is missing, so no guest was started.
    Lacking {
        /// What.
        what: String,
        /// What the operator can do.
        remedy: String,
    },
}

impl Outcome {
    fn works(&self) -> bool {
        match self {
            Self::Booted { .. } | Self::Present => true,
            Self::Failed { .. } | Self::Lacking { .. } => false,
        }
    }
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match (self.backend, self.accel) {
            (BackendKind::Libkrun, _) => "libkrun on KVM",
            (BackendKind::Qemu, Accel::Kvm) => "QEMU on KVM",
            (BackendKind::Qemu, Accel::Tcg) => "QEMU with software emulation",
        };
        match &self.outcome {
            Outcome::Booted { millis } => write!(f, "{name} booted a guest in {millis} ms"),
            Outcome::Present => write!(f, "{name} is installed"),
            Outcome::Failed { why, .. } => write!(f, "{name} did not boot a guest: {why}"),
            Outcome::Lacking { what, .. } => write!(f, "{name}: {what}"),
        }
    }
}

impl Trial {
    /// What was seen, and what the operator can do about it.
    fn with_remedy(&self) -> String {
        match &self.outcome {
            Outcome::Booted { .. } | Outcome::Present => self.to_string(),
            Outcome::Failed { remedy, .. } | Outcome::Lacking { remedy, .. } => format!("{self} ({remedy})"),
        }
    }
}

/// No verdict.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// Nothing that was asked for can run a guest.
    #[error("no hypervisor can run a guest on this machine: {}", list(.trials))]
    NoHypervisor {
        /// All that was tried.
        trials: Vec<Trial>,
    },
    /// A file that the probe needs could not be read or written.
    #[error("could not {step} {}: {source}", path.display())]
    Io {
        /// What was tried, as a phrase.
        step: &'static str,
        /// On which file.
        path: PathBuf,
        /// The operating system's word.
        #[source]
        source: io::Error,
    },
}

fn list(trials: &[Trial]) -> String {
    trials.iter().map(Trial::with_remedy).collect::<Vec<_>>().join("; ")
}

/// Chooses a hypervisor. A verdict that still holds is taken from the cache.
pub async fn probe(config: &ProbeConfig) -> Result<Verdict, ProbeError> {
    let key = Key::of(config)?;
    if let Some(verdict) = key.cached(&config.cache) {
        return Ok(verdict);
    }
    let verdict = decide(config).await?;
    key.keep(&verdict, &config.cache)?;
    Ok(verdict)
}

async fn decide(config: &ProbeConfig) -> Result<Verdict, ProbeError> {
    let mut trials = Vec::new();
    let mut tried = |trial: Trial| {
        tracing::info!(%trial, "tried a hypervisor");
        let works = trial.outcome.works();
        trials.push(trial);
        works
    };
    use BackendKind::{Libkrun, Qemu};
    let chosen = match config.requested {
        Requested::Libkrun => tried(present(config, Libkrun, Accel::Kvm)).then_some((Libkrun, Accel::Kvm)),
        Requested::Qemu { accel: Some(accel) } => {
            tried(present(config, Qemu, accel)).then_some((Qemu, accel))
        }
        Requested::Qemu { accel: None } if tried(boot(config, Qemu).await) => Some((Qemu, Accel::Kvm)),
        Requested::Auto if tried(boot(config, Libkrun).await) => Some((Libkrun, Accel::Kvm)),
        // KVM that does not run libkrun's guest is not tried again with QEMU: it would cost another limit, and
        // whoever knows better can configure it.
        Requested::Qemu { accel: None } | Requested::Auto => {
            tried(present(config, Qemu, Accel::Tcg)).then_some((Qemu, Accel::Tcg))
        }
    };
    match chosen {
        Some((backend, accel)) => {
            Ok(Verdict { backend, accel, reason: reason(config.requested, &trials), trials })
        }
        None => Err(ProbeError::NoHypervisor { trials }),
    }
}

fn reason(requested: Requested, trials: &[Trial]) -> String {
    match (requested, trials) {
        (Requested::Libkrun, _) => "libkrun is configured".to_owned(),
        (Requested::Qemu { accel: Some(_) }, _) => "QEMU and its accelerator are configured".to_owned(),
        (Requested::Qemu { accel: None } | Requested::Auto, [on_kvm, _emulated, ..]) => {
            format!("software emulation, because KVM cannot be used: {on_kvm}")
        }
        (Requested::Qemu { accel: None } | Requested::Auto, trials) => list(trials),
    }
}

/// Looks whether all parts of a backend are there.
fn present(config: &ProbeConfig, backend: BackendKind, accel: Accel) -> Trial {
    let qemu = QemuVmm::new(config.parts.clone(), accel, config.limit);
    let libkrun = LibkrunVmm::new(config.parts.vmm.clone(), config.limit);
    let parts: Vec<Part<'_>> = match backend {
        BackendKind::Libkrun => libkrun.required().into(),
        BackendKind::Qemu => qemu.required().into(),
    };
    let outcome = match starter::check(&parts).map_err(|error| lacking(&error)) {
        Err(lacking) => lacking,
        Ok(()) => match accel {
            Accel::Tcg => Outcome::Present,
            Accel::Kvm => openable_kvm(),
        },
    };
    Trial { backend, accel, outcome }
}

fn lacking(error: &LaunchError) -> Outcome {
    match error {
        LaunchError::MissingPart { what, path, remedy } => Outcome::Lacking {
            what: format!("{what} is missing at {}", path.display()),
            remedy: (*remedy).to_owned(),
        },
        LaunchError::Io { .. } | LaunchError::EndedEarly { .. } | LaunchError::Timeout { .. } => {
            Outcome::Failed { why: error.to_string(), remedy: "see the line above".to_owned() }
        }
    }
}

fn openable_kvm() -> Outcome {
    match OpenOptions::new().read(true).write(true).open(KVM) {
        Ok(_) => Outcome::Present,
        Err(error) => Outcome::Lacking {
            what: format!("{KVM} cannot be opened: {error}"),
            remedy: "run as root on a machine with KVM".to_owned(),
        },
    }
}

/// Boots a guest on KVM.
async fn boot(config: &ProbeConfig, backend: BackendKind) -> Trial {
    let there = present(config, backend, Accel::Kvm);
    if !there.outcome.works() {
        return there;
    }
    let outcome = match try_boot(config, backend).await {
        Ok(took) => Outcome::Booted { millis: took.as_millis() as u64 },
        Err(why) => Outcome::Failed {
            why,
            remedy: "if KVM should work here, configure its backend and look at the console of a box"
                .to_owned(),
        },
    };
    Trial { backend, accel: Accel::Kvm, outcome }
}

async fn try_boot(config: &ProbeConfig, backend: BackendKind) -> Result<Duration, String> {
    measure_speed(&config.parts.vmm).await?;
    let trial = TrialBox::make(config)
        .map_err(|error| format!("could not make {}: {error}", config.dir.display()))?;
    let started = Instant::now();
    run(config, backend, trial).await?;
    Ok(started.elapsed())
}

/// In a process of its own, which can be ended while it executes.
async fn measure_speed(vmm: &Path) -> Result<(), String> {
    let measured = tokio::process::Command::new(vmm)
        .arg("kvm-speed")
        .env_clear()
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(SPEED_LIMIT, measured).await {
        Ok(output) => output.map_err(|error| format!("{} could not be started: {error}", vmm.display()))?,
        Err(_) => {
            return Err(format!(
                "KVM did not execute {KVM_SPEED_INSTRUCTIONS} instructions within {SPEED_LIMIT:?}"
            ));
        }
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let Some(micros) = said.trim().parse().ok().filter(|_| output.status.success()) else {
        let why = String::from_utf8_lossy(&output.stderr).trim().chars().take(WORDS).collect::<String>();
        return Err(format!("KVM executes nothing ({}): {why}", output.status));
    };
    let took = Duration::from_micros(micros);
    if took > SPEED_ENOUGH {
        return Err(format!(
            "/dev/kvm exists, but takes {took:?} for {KVM_SPEED_INSTRUCTIONS} instructions: it interprets them"
        ));
    }
    Ok(())
}

/// The guest of a trial lives no longer than this call, however it ends.
async fn run(config: &ProbeConfig, backend: BackendKind, trial: TrialBox) -> Result<(), String> {
    let deadline = Instant::now() + config.limit;
    let hypervisor = match backend {
        BackendKind::Libkrun => Hypervisor::Libkrun,
        BackendKind::Qemu => QemuVmm::new(config.parts.clone(), Accel::Kvm, config.limit).hypervisor(),
    };
    let spec = LaunchSpec { plan: trial.plan(config), hypervisor, trial: true };
    let machine =
        starter::launch(&config.parts.vmm, spec, config.limit).await.map_err(|error| error.to_string())?;
    let ready = machine.ready(deadline.saturating_duration_since(Instant::now())).await;
    let words = machine.last_words(WORDS).await;
    let _ = machine.kill().await;
    machine.wait().await;
    match ready {
        Ok(_) => Ok(()),
        Err(crate::error::MachineError::NotReady { .. }) => {
            Err(format!("its agent was not reached within {:?}; last words: {words}", config.limit))
        }
        Err(crate::error::MachineError::Ended { exit, .. }) => {
            Err(format!("the VM ended ({exit}); last words: {words}"))
        }
        Err(
            error @ (crate::error::MachineError::BadReady(_) | crate::error::MachineError::Signal { .. }),
        ) => Err(error.to_string()),
    }
}

/// The directory of a trial's box; removed when dropped.
struct TrialBox(PathBuf);

impl TrialBox {
    /// The name is fixed, so that what a daemon left that died during a trial is found and ended.
    fn make(config: &ProbeConfig) -> io::Result<Self> {
        let dir = config.dir.join("trial");
        if let Ok(Some(facts)) = read_facts(&dir)
            && let Some(left) = Watched::find(&facts)?
        {
            left.kill()?;
        }
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        std::fs::create_dir(&dir)?;
        Ok(Self(dir))
    }

    fn plan(&self, config: &ProbeConfig) -> BoxPlan {
        BoxPlan {
            id: a3s_box_core::BoxId::from_random([0; 32]),
            dir: self.0.clone(),
            vcpus: 1,
            memory_mib: TRIAL_MEMORY_MIB,
            kernel: config.kernel.clone(),
            initramfs: config.initramfs.clone(),
            // Quiet, like every box: where KVM is itself emulated, the kernel's messages double the time.
            cmdline: String::new(),
            // A trial has no disk.
            scratch: PathBuf::new(),
            network: None,
            cgroups: Vec::new(),
            guest_ports: Vec::new(),
        }
    }
}

impl Drop for TrialBox {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(dir = %self.0.display(), %error, "could not remove the directory of a trial");
        }
    }
}

/// What a verdict holds for.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    boot_id: String,
    kernel: String,
    initramfs: String,
    version: String,
    requested: Requested,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    key: Key,
    verdict: Verdict,
}

impl Key {
    fn of(config: &ProbeConfig) -> Result<Self, ProbeError> {
        let boot_id = PathBuf::from("/proc/sys/kernel/random/boot_id");
        let read = std::fs::read_to_string(&boot_id);
        Ok(Self {
            boot_id: read
                .map_err(|source| ProbeError::Io { step: "read", path: boot_id, source })?
                .trim()
                .to_owned(),
            kernel: digest(&config.kernel)?,
            initramfs: digest(&config.initramfs)?,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            requested: config.requested,
        })
    }

    /// A cache that cannot be read is no cache.
    fn cached(&self, path: &Path) -> Option<Verdict> {
        let kept: Kept = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        (kept.key == *self).then_some(kept.verdict)
    }

    fn keep(self, verdict: &Verdict, path: &Path) -> Result<(), ProbeError> {
        let io = |source| ProbeError::Io {
            step: "keep the choice of a hypervisor in",
            path: path.to_owned(),
            source,
        };
        let kept = Kept { key: self, verdict: verdict.clone() };
        let partial = path.with_extension("partial");
        let bytes = serde_json::to_vec_pretty(&kept).map_err(|error| io(error.into()))?;
        std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, path)).map_err(io)
    }
}

fn digest(path: &Path) -> Result<String, ProbeError> {
    let io = |source| ProbeError::Io { step: "read", path: path.to_owned(), source };
    let mut hasher = Sha256::new();
    let mut file = std::fs::File::open(path).map_err(io)?;
    io::copy(&mut file, &mut hasher).map_err(io)?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &Path, requested: Requested) -> ProbeConfig {
        std::fs::write(dir.join("kernel"), "k").unwrap();
        std::fs::write(dir.join("initramfs"), "i").unwrap();
        let part = PathBuf::from("/bin/true");
        ProbeConfig {
            requested,
            parts: QemuParts { vmm: part.clone(), emulator: part },
            kernel: dir.join("kernel"),
            initramfs: dir.join("initramfs"),
            dir: dir.to_owned(),
            cache: dir.join("verdict.json"),
            limit: Duration::from_secs(1),
        }
    }

    #[tokio::test]
    async fn a_verdict_is_kept_until_the_kernel_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), Requested::Qemu { accel: Some(Accel::Tcg) });
        let first = probe(&config).await.unwrap();
        assert_eq!((first.backend, first.accel), (BackendKind::Qemu, Accel::Tcg));
        config.parts.emulator = dir.path().join("gone");
        assert_eq!(probe(&config).await.unwrap(), first, "from the cache");
        std::fs::write(&config.kernel, "another").unwrap();
        assert!(matches!(probe(&config).await, Err(ProbeError::NoHypervisor { .. })));
    }

    #[tokio::test]
    async fn a_torn_cache_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), Requested::Qemu { accel: Some(Accel::Tcg) });
        std::fs::write(&config.cache, "{\"key\":").unwrap();
        assert!(probe(&config).await.is_ok());
    }

    #[tokio::test]
    async fn what_is_missing_is_named_with_its_remedy_and_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), Requested::Qemu { accel: Some(Accel::Tcg) });
        config.parts.emulator = dir.path().join("qemu");
        let error = probe(&config).await.unwrap_err().to_string();
        assert!(error.contains("QEMU is missing at") && error.contains("apt-get install"), "{error}");
        assert!(!config.cache.exists());
    }

    #[tokio::test]
    async fn a_kvm_that_interprets_is_told_from_one_that_executes() {
        let dir = tempfile::tempdir().unwrap();
        let program = |script: &str| {
            use std::os::unix::fs::PermissionsExt;
            let path = dir.path().join("vmm");
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        measure_speed(&program("echo 14581")).await.unwrap();
        let slow = measure_speed(&program("echo 525095")).await.unwrap_err();
        assert!(slow.contains("525.095ms") && slow.contains("interprets"), "{slow}");
        let broken =
            measure_speed(&program("echo 'the guest stopped with Shutdown' >&2; exit 1")).await.unwrap_err();
        assert!(broken.contains("the guest stopped with Shutdown"), "{broken}");
        assert!(measure_speed(&program("echo 12; exit 1")).await.is_err());
    }

    /// `/bin/true` in the place of a3s-box-vmm ends without a word: the trial fails, whatever KVM is.
    #[tokio::test]
    async fn auto_falls_back_to_emulation_when_the_trial_fails_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), Requested::Auto);
        let verdict = probe(&config).await.unwrap();
        assert_eq!((verdict.backend, verdict.accel), (BackendKind::Qemu, Accel::Tcg));
        assert!(verdict.reason.contains("KVM cannot be used: libkrun on KVM"), "{}", verdict.reason);
        assert_eq!(verdict.trials.len(), 2);
        assert!(!dir.path().join("trial").exists());
    }

    #[tokio::test]
    async fn a_missing_kernel_is_an_error_about_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), Requested::Auto);
        config.kernel = dir.path().join("none");
        let error = probe(&config).await.unwrap_err().to_string();
        assert!(error.contains("could not read") && error.contains("none"), "{error}");
    }

    /// The verdict of a trial is kept over restarts of the daemon; one that means something else now would choose the
    /// wrong hypervisor. One that cannot be read is tried anew, so unknown words do no harm.
    #[test]
    fn golden_verdicts_of_every_age_are_read_and_written_alike() {
        const NAME: &str = "hypervisor.json";
        let goldens = a3s_box_golden::Goldens::of(env!("CARGO_MANIFEST_DIR"), "records");
        let trial = |outcome| Trial { backend: BackendKind::Libkrun, accel: Accel::Kvm, outcome };
        let verdict = Verdict {
            backend: BackendKind::Qemu,
            accel: Accel::Tcg,
            reason: "KVM cannot be used: /dev/kvm is missing".to_owned(),
            trials: vec![
                trial(Outcome::Booted { millis: 812 }),
                trial(Outcome::Present),
                trial(Outcome::Failed { why: "it ended".to_owned(), remedy: "look".to_owned() }),
                trial(Outcome::Lacking { what: "/dev/kvm".to_owned(), remedy: "load kvm".to_owned() }),
            ],
        };
        let key = |requested| Key {
            boot_id: "6f1b0b54-0d1f-4c52-9a3f-d0f6a5b6c7d8".to_owned(),
            kernel: "0a".repeat(32),
            initramfs: "0b".repeat(32),
            version: "0.1.0".to_owned(),
            requested,
        };
        let requested = || Requested::Qemu { accel: Some(Accel::Tcg) };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("verdict.json");
        key(requested()).keep(&verdict, &path).unwrap();
        goldens.check_json(NAME, &std::fs::read(&path).unwrap());
        for golden in goldens.ages(NAME) {
            std::fs::write(&path, &golden.bytes).unwrap();
            assert_eq!(key(requested()).cached(&path).as_ref(), Some(&verdict), "{}", golden.path.display());
            assert_eq!(key(Requested::Auto).cached(&path), None, "of another request");
        }
    }
}
