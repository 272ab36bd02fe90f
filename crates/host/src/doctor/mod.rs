//! What this machine has and lacks for running pods, as data.
//!
//! Every check looks at the thing itself (a boot that was tried, a file that was found, a socket that answered), never
//! at a version that promises it. A check that fails names its remedy.

mod machine;

use std::path::Path;

use serde::Serialize;

use a3s_box_net::{NetworkStatus, PodNetworking};

use crate::backend::{self, Choice};
use crate::config::{Backend, Config, NetworkMode};
use crate::layout::{Layout, Part};
use crate::networks;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Pods run, but something is worse than it could be.
    Warn,
    /// Pods cannot run.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What, in a word or two.
    pub name: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was seen.
    pub found: String,
    /// What the operator can do; only where something is lacking.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Check {
    /// All is well.
    pub fn ok(name: &str, found: impl Into<String>) -> Self {
        Self { name: name.to_owned(), verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    /// Something is lacking.
    pub fn lacking(
        name: &str,
        verdict: Verdict,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { name: name.to_owned(), verdict, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// All checks, in the order in which people should read them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether no check failed.
    pub pods_can_run: bool,
    /// The checks.
    pub checks: Vec<Check>,
}

impl Report {
    fn of(checks: Vec<Check>) -> Self {
        Self { pods_can_run: checks.iter().all(|check| check.verdict != Verdict::Fail), checks }
    }
}

/// Looks at everything. With `auto` this may take a trial boot of `vmm.probe_limit`.
pub async fn examine(config: &Config) -> Report {
    let layout = Layout::of(config);
    let mut checks = vec![machine::privileges(), machine::host_kernel()];
    let chosen = backend::examine(config, &layout, &mut checks).await;
    checks.extend(Part::ALL.iter().map(|part| part_check(&layout, *part, config, chosen.as_ref())));
    checks.push(network(config).await);
    checks.push(machine::tun(config.network.mode));
    checks.push(machine::cgroups(Path::new("/sys/fs/cgroup")));
    checks.push(machine::disk(&config.root));
    checks.push(machine::memory(config.size.memory_mib));
    checks.push(machine::descriptors());
    checks.push(machine::daemon(&config.socket()));
    Report::of(checks)
}

fn part_check(layout: &Layout, part: Part, config: &Config, chosen: Option<&Choice>) -> Check {
    match layout.find(part) {
        Ok(path) => Check::ok(part.name(), path.display().to_string()),
        Err(missing) => {
            let unused = match chosen {
                Some(choice) => !choice.is_qemu(),
                None => config.vmm.backend == Backend::Libkrun,
            };
            let verdict = if unused && !part.needed_without_qemu() { Verdict::Warn } else { Verdict::Fail };
            let tried: Vec<_> = missing.tried.iter().map(|path| path.display().to_string()).collect();
            Check::lacking(
                part.name(),
                verdict,
                format!("not found (tried {})", tried.join(", ")),
                part.remedy(),
            )
        }
    }
}

async fn network(config: &Config) -> Check {
    const NAME: &str = "pod network";
    if config.network.mode == NetworkMode::None {
        return Check::ok(NAME, "network.mode is \"none\": pods have a loopback interface only");
    }
    match PodNetworking::new(networks::net_config(config)).status().await {
        NetworkStatus::Ready { detail } => Check::ok(NAME, detail),
        NetworkStatus::NotReady { reason, remedy } => Check::lacking(NAME, Verdict::Fail, reason, remedy),
    }
}

#[cfg(test)]
mod tests {
    use a3s_box_vmm::{Accel, BackendKind};

    use super::*;

    #[test]
    fn warnings_let_pods_run_and_failures_do_not() {
        let warned = vec![Check::ok("a", "x"), Check::lacking("b", Verdict::Warn, "y", "do z")];
        assert!(Report::of(warned.clone()).pods_can_run);
        let failed = warned.into_iter().chain([Check::lacking("c", Verdict::Fail, "y", "do z")]).collect();
        assert!(!Report::of(failed).pods_can_run);
    }

    #[test]
    fn what_the_chosen_backend_does_not_use_may_lack() {
        let mut config = Config::default();
        config.vmm.qemu = Some("/nonexistent/qemu".into());
        let layout = Layout::at(&config, Path::new("/nonexistent/usr/bin/a3s-box"), std::iter::empty());
        let krun = Choice { kind: BackendKind::Libkrun, accel: Accel::Kvm, reason: String::new() };
        let qemu = Choice { kind: BackendKind::Qemu, accel: Accel::Tcg, reason: String::new() };
        let verdict = |part, choice| part_check(&layout, part, &config, Some(choice)).verdict;
        assert_eq!(verdict(Part::Qemu, &krun), Verdict::Warn);
        assert_eq!(verdict(Part::Qemu, &qemu), Verdict::Fail);
        assert_eq!(verdict(Part::Kernel, &krun), Verdict::Fail);
    }
}
