//! Boxes of this build beside boxes of another one: how fast they boot and what an idle one holds of the host's memory.
//!
//! Two daemons run at once, one of each layout; their pods come and go in turns.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use a3s_box_cri::proto::{PodSandboxConfig, PodSandboxMetadata};
use a3s_box_e2e::client::Client;
use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::layout::Layout;
use anyhow::{Context, Result};

use crate::samples::{Samples, median};

/// After this time a guest that has nothing to do is idle: it has reported its free pages, too, which it does every two
/// seconds.
const SETTLED: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The installed layout: target/dist.
    #[arg(long)]
    dist: PathBuf,
    /// The layout of the other build.
    #[arg(long)]
    other: PathBuf,
    /// Who runs the virtual machines: libkrun or qemu.
    #[arg(long, default_value = "qemu")]
    backend: String,
    /// Boxes of each.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

/// A daemon and what was seen of its boxes.
struct Candidate {
    name: &'static str,
    daemon: Daemon,
    client: Client,
    logs: PathBuf,
    /// From the request to the answer.
    run: Samples,
    /// From the request for a VMM to its word that it is built, and from there to the guest's word that it is ready. Backends
    /// say the first at different points of their work.
    vmm: Samples,
    boot: Samples,
    /// KiB of the VMM and its helpers: all pages, each page that is shared divided by its sharers, and pages that nobody
    /// else has.
    rss: Vec<f64>,
    pss: Vec<f64>,
    private: Vec<f64>,
}

pub(crate) async fn run(options: &Options, state: &Path) -> Result<()> {
    let mut candidates = Vec::new();
    let mut outcome = Ok(());
    for (name, folder, layout, subnet) in [
        ("this build", "a", &options.dist, "10.213.82.0/24"),
        ("the other", "b", &options.other, "10.213.83.0/24"),
    ] {
        match Candidate::start(name, layout, &options.backend, state.join(folder), subnet).await {
            Ok(candidate) => candidates.push(candidate),
            Err(error) => {
                outcome = Err(error.context(format!("starting {name}")));
                break;
            }
        }
    }
    if outcome.is_ok() {
        outcome = measure(options, &mut candidates).await;
    }
    if outcome.is_ok() {
        report(options, &candidates);
    }
    for candidate in candidates {
        outcome = candidate.stop(outcome).await;
    }
    outcome
}

async fn measure(options: &Options, candidates: &mut [Candidate]) -> Result<()> {
    // The first round is to warm up.
    for round in 0..=options.rounds {
        // The other one first in each round.
        candidates.reverse();
        for candidate in &mut *candidates {
            candidate.round(round).await.with_context(|| format!("{}, round {round}", candidate.name))?;
        }
    }
    candidates.sort_by_key(|candidate| candidate.name != "this build");
    Ok(())
}

impl Candidate {
    async fn start(
        name: &'static str,
        layout: &Path,
        backend: &str,
        state: PathBuf,
        subnet: &str,
    ) -> Result<Self> {
        let settings =
            Settings { state, backend: backend.to_owned(), subnet: subnet.to_owned(), extra: Vec::new() };
        let (daemon, client) = Daemon::start(&Layout::at(layout)?, &settings).await?;
        Ok(Self {
            name,
            daemon,
            client,
            logs: settings.logs(),
            run: Samples::default(),
            vmm: Samples::default(),
            boot: Samples::default(),
            rss: Vec::new(),
            pss: Vec::new(),
            private: Vec::new(),
        })
    }

    /// A pod's life, without a container. What round 0 shows is not kept.
    async fn round(&mut self, round: u32) -> Result<()> {
        let name = format!("box-{round}");
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                uid: format!("uid-{name}"),
                name,
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            log_directory: self.logs.to_string_lossy().into_owned(),
            ..Default::default()
        };
        let started = Instant::now();
        let pod = self.client.run_pod(&config).await.context("running a pod")?;
        let took = started.elapsed();
        tokio::time::sleep(SETTLED).await;
        let info = self.client.pod_info(&pod).await?;
        let memory = Memory::of(info["pid"].as_u64().context("the pod has no process")?)?;
        self.client.remove_pod(&pod).await.context("removing a pod")?;
        if round > 0 {
            self.run.push(took);
            self.vmm.push(stage(&info, "vmm")?);
            self.boot.push(stage(&info, "boot")?);
            self.rss.push(memory.rss);
            self.pss.push(memory.pss);
            self.private.push(memory.private);
        }
        Ok(())
    }

    async fn stop(mut self, outcome: Result<()>) -> Result<()> {
        self.client.remove_everything().await.context("removing the pods")?;
        let log = self.daemon.log_tail();
        self.daemon.stop().await?;
        outcome.with_context(|| format!("{}: the daemon's log ends with:\n{log}", self.name))
    }
}

/// How long a stage of the pod's start took, the last time.
fn stage(info: &serde_json::Value, name: &str) -> Result<Duration> {
    let timeline = info["timeline"].as_array().context("the pod has no timeline")?;
    let stage = timeline.iter().rfind(|stage| stage["stage"] == name);
    let stage = stage.with_context(|| format!("the pod's timeline has no {name}"))?;
    let milliseconds = stage["ms"].as_f64().with_context(|| format!("{name} has no length"))?;
    Ok(Duration::from_secs_f64(milliseconds / 1e3))
}

/// KiB of a process and its descendants, as proc_pid_smaps(5) has them.
#[derive(Default)]
struct Memory {
    rss: f64,
    pss: f64,
    private: f64,
}

impl Memory {
    fn of(pid: u64) -> Result<Self> {
        let mut all = Self::default();
        let mut pids = vec![pid];
        while let Some(pid) = pids.pop() {
            let path = PathBuf::from(format!("/proc/{pid}/smaps_rollup"));
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            for line in text.lines() {
                let mut words = line.split_whitespace();
                let (Some(name), Some(value)) = (words.next(), words.next()) else { continue };
                let value = value.parse().unwrap_or(0.0);
                match name {
                    "Rss:" => all.rss += value,
                    "Pss:" => all.pss += value,
                    "Private_Clean:" | "Private_Dirty:" => all.private += value,
                    _ => {}
                }
            }
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            pids.extend(children.split_whitespace().filter_map(|child| child.parse::<u64>().ok()));
        }
        Ok(all)
    }
}

fn report(options: &Options, candidates: &[Candidate]) {
    let [ours, other] = candidates else { return };
    println!("\n{} boxes of each build on {}; medians", options.rounds, options.backend);
    println!("{:<28}{:>14}{:>14}{:>8}", "", ours.name, other.name, "ratio");
    let times =
        [("RunPodSandbox, ms", &ours.run, &other.run), ("boot to Ready, ms", &ours.boot, &other.boot)];
    for (what, mine, its) in times {
        let (mine, its) = (mine.percentile(50), its.percentile(50));
        println!("{what:<28}{mine:>14.1}{its:>14.1}{:>8.3}", mine / its);
    }
    let memory = [
        ("resident, KiB", &ours.rss, &other.rss),
        ("proportional, KiB", &ours.pss, &other.pss),
        ("private, KiB", &ours.private, &other.private),
    ];
    for (what, mine, its) in memory {
        let (mine, its) = (median(mine.clone()), median(its.clone()));
        println!("{what:<28}{mine:>14.0}{its:>14.0}{:>8.3}", mine / its);
    }
}
