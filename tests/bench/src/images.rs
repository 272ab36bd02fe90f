//! Pull to ready-to-start, each candidate from a clean state, one after the other in every round.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use a3s_box_e2e::client::Client;
use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::image::{Encoding, Image};
use a3s_box_e2e::layout::Layout;
use a3s_box_e2e::registry::{Registry, write_hosts_toml};
use anyhow::{Context, Result, bail};

use crate::containerd::Containerd;
use crate::samples::Samples;
use crate::{Options, debian, floor};
use a3s_box_e2e::processes::memory;

/// Repeated pulls after each first one.
const AGAIN: usize = 5;

/// skopeo remembers here where it saw blobs; no option moves it.
const SKOPEO_CACHE: &str = "/var/lib/containers";

/// What pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Candidate {
    A3s,
    Containerd,
    Umoci,
    Inflate,
    Hash,
}

const CANDIDATES: [(Candidate, &str); 5] = [
    (Candidate::A3s, "a3s-box"),
    (Candidate::Containerd, "containerd"),
    (Candidate::Umoci, "skopeo + umoci"),
    (Candidate::Inflate, "floor: inflate"),
    (Candidate::Hash, "floor: sha256"),
];

/// All runs of one candidate with one image.
#[derive(Default)]
struct Series {
    first: Samples,
    /// Time that `sync` takes afterwards: what the candidate left unwritten.
    sync: Samples,
    again: Samples,
    /// Greatest growth of the daemon's resident memory, KiB.
    memory: u64,
}

/// One run.
#[derive(Default)]
struct Run {
    first: Duration,
    sync: Duration,
    again: Vec<Duration>,
    memory: u64,
}

struct Bench<'a> {
    layout: Layout,
    registry: Registry,
    state: &'a Path,
}

pub(crate) async fn run(options: &Options, state: &Path) -> Result<()> {
    let bench = Bench {
        layout: Layout::at(&options.dist)?,
        registry: Registry::start(&state.join("registry"))?,
        state,
    };
    let had_cache = Path::new(SKOPEO_CACHE).exists();
    let outcome = bench.all(options).await;
    if !had_cache && Path::new(SKOPEO_CACHE).exists() {
        fs::remove_dir_all(SKOPEO_CACHE).context("removing skopeo's cache")?;
    }
    outcome
}

impl Bench<'_> {
    async fn all(&self, options: &Options) -> Result<()> {
        for (name, layers) in debian::IMAGES {
            let made = debian::make(layers, &[Encoding::Gzip], &options.packages)
                .with_context(|| format!("making {name}"))?;
            let reference = self.registry.push(name, "latest", &made.image)?;
            println!(
                "\n{name}: {} MB compressed, {} MB in {} entries, {} layer(s), {} round(s)",
                made.image.size() / 1_000_000,
                made.bytes / 1_000_000,
                made.entries,
                layers.len(),
                options.rounds
            );
            let mut series: [Series; CANDIDATES.len()] = Default::default();
            for round in 0..options.rounds as usize {
                for step in 0..CANDIDATES.len() {
                    // Another one begins in each round: who comes after whom must not matter.
                    let index = (round + step) % CANDIDATES.len();
                    let (candidate, label) = CANDIDATES[index];
                    let folder = self.state.join("run");
                    nix::unistd::sync();
                    let run = self.one(candidate, &folder, name, &reference, &made.image).await;
                    let run = run.with_context(|| format!("{label} with image {name}"))?;
                    series[index].first.push(run.first);
                    series[index].sync.push(run.sync);
                    series[index].again.extend(run.again);
                    series[index].memory = series[index].memory.max(run.memory);
                }
            }
            print(&series);
        }
        Ok(())
    }

    async fn one(
        &self,
        candidate: Candidate,
        folder: &Path,
        name: &str,
        reference: &str,
        image: &Image,
    ) -> Result<Run> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let certs = folder.join("certs.d");
        write_hosts_toml(&certs, &self.registry.host())?;
        let run = match candidate {
            Candidate::A3s => self.a3s(folder, reference).await?,
            Candidate::Containerd => {
                let (daemon, mut client) = Containerd::start(&folder.join("c"), &certs, None).await?;
                let run = pulls(&mut client, reference).await?;
                daemon.stop().await?;
                run
            }
            Candidate::Umoci => Run { first: unpack(folder, reference)?, sync: sync(), ..Run::default() },
            Candidate::Inflate => self.floor(name, image, floor::Work::Inflate)?,
            Candidate::Hash => self.floor(name, image, floor::Work::Hash)?,
        };
        fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
        Ok(run)
    }

    fn floor(&self, name: &str, image: &Image, work: floor::Work) -> Result<Run> {
        Ok(Run { first: floor::measure(&self.registry.host(), name, image, work)?, ..Run::default() })
    }

    async fn a3s(&self, folder: &Path, reference: &str) -> Result<Run> {
        let settings = Settings {
            state: folder.to_owned(),
            // Named, so that no trial boot is part of the start.
            backend: "qemu".to_owned(),
            subnet: "10.213.79.0/24".to_owned(),
            extra: Vec::new(),
        };
        let (daemon, mut client) = Daemon::start(&self.layout, &settings).await?;
        let idle = memory(daemon.pid(), "VmRSS")?;
        // Makes the peak start anew (proc(5), clear_refs).
        fs::write(format!("/proc/{}/clear_refs", daemon.pid()), "5").context("resetting the peak")?;
        let mut run = pulls(&mut client, reference)
            .await
            .with_context(|| format!("the daemon's log:\n{}", daemon.log_tail()))?;
        run.memory = memory(daemon.pid(), "VmHWM")?.saturating_sub(idle);
        daemon.stop().await?;
        Ok(run)
    }
}

async fn pulls(client: &mut Client, reference: &str) -> Result<Run> {
    let start = Instant::now();
    client.pull(reference).await.context("pulling")?;
    let first = start.elapsed();
    let mut run = Run { first, sync: sync(), ..Run::default() };
    for _ in 0..AGAIN {
        let start = Instant::now();
        client.pull(reference).await.context("pulling again")?;
        run.again.push(start.elapsed());
    }
    Ok(run)
}

fn unpack(folder: &Path, reference: &str) -> Result<Duration> {
    let image = format!("{}:latest", folder.join("oci").display());
    let start = Instant::now();
    quiet(
        Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"])
            .args([format!("docker://{reference}"), format!("oci:{image}")]),
    )?;
    quiet(Command::new("umoci").args(["unpack", "--image", &image]).arg(folder.join("bundle")))?;
    Ok(start.elapsed())
}

fn quiet(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Writes out everything that is dirty.
fn sync() -> Duration {
    let start = Instant::now();
    nix::unistd::sync();
    start.elapsed()
}

fn print(series: &[Series; CANDIDATES.len()]) {
    println!(
        "{:<16}{:>10}{:>10}{:>8}{:>12}{:>10}{:>12}{:>12}",
        "", "median ms", "p90 ms", "noise", "to a3s-box", "sync ms", "again ms", "memory MiB"
    );
    let [ours, ..] = series;
    for ((candidate, label), one) in CANDIDATES.iter().zip(series) {
        print!(
            "{label:<16}{:>10.0}{:>10.0}{:>8.2}{:>12.2}",
            one.first.percentile(50),
            one.first.percentile(90),
            one.first.noise(),
            one.first.ratio_to(&ours.first)
        );
        match candidate {
            Candidate::A3s => print!(
                "{:>10.0}{:>12.1}{:>12.1}",
                one.sync.percentile(50),
                one.again.percentile(50),
                one.memory as f64 / 1024.0
            ),
            Candidate::Containerd => {
                print!("{:>10.0}{:>12.1}", one.sync.percentile(50), one.again.percentile(50));
            }
            Candidate::Umoci => print!("{:>10.0}", one.sync.percentile(50)),
            Candidate::Inflate | Candidate::Hash => {}
        }
        println!();
    }
}
