//! exec, port-forward and logs: of a box beside the raw vsock of the same box, and beside containerd with runc.
//!
//! Everything that sends or takes bytes in a container is one program, `pump`. Through CRI both runtimes are asked for
//! the same in the same way.

mod leaks;
mod log;
mod pod;
mod raw;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use a3s_box_e2e::client::Client;
use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::image::{Encoding, Image, Layer};
use a3s_box_e2e::layout::Layout;
use a3s_box_e2e::registry::{Registry, write_hosts_toml};
use anyhow::{Context, Result};
use serde_json::json;

use crate::containerd::Containerd;
use crate::samples::Samples;
use pod::{Direction, Pod};
use raw::Vsock;

/// Where containerd's shims have their sockets, whatever its configuration says.
const CONTAINERD_STATE: &str = "/run/containerd";

/// Commands whose latency is measured, one after the other and side by side.
const ALONE: usize = 100;
const PARALLEL: usize = 50;

/// Bytes of each of the log lines.
const SHORT: u64 = 100;
const LONG: u64 = 16 * 1024;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// The installed layout: target/dist.
    #[arg(long)]
    dist: PathBuf,
    /// The program for the containers, linked statically.
    #[arg(long)]
    pump: PathBuf,
    /// Runs of every measurement.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
    /// MiB that are moved in each.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=65536))]
    mib: u64,
    /// Short commands, one after the other, after which nothing may be left of them.
    #[arg(long, default_value_t = 2000)]
    execs: u32,
}

/// Bytes that are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Exec,
    ForwardOut,
    ForwardIn,
    ShortLines,
    LongLines,
}

const FLOWS: [(Flow, &str); 5] = [
    (Flow::Exec, "exec stdout"),
    (Flow::ForwardOut, "port-forward, out of the pod"),
    (Flow::ForwardIn, "port-forward, into the pod"),
    (Flow::ShortLines, "log, lines of 100 bytes"),
    (Flow::LongLines, "log, lines of 16 KiB"),
];

impl Flow {
    async fn run(self, pod: &mut Pod, bytes: u64) -> Result<Duration> {
        match self {
            Self::Exec => pod.exec(bytes).await,
            Self::ForwardOut => pod.forward(Direction::Out, bytes).await,
            Self::ForwardIn => pod.forward(Direction::In, bytes).await,
            Self::ShortLines => pod.log(bytes, SHORT).await,
            Self::LongLines => pod.log(bytes, LONG).await,
        }
    }
}

/// What was measured of one runtime.
#[derive(Default)]
struct Measured {
    flows: [Samples; FLOWS.len()],
    alone: Samples,
    parallel: Samples,
}

impl Measured {
    async fn round(&mut self, pod: &mut Pod, bytes: u64) -> Result<()> {
        for ((flow, label), samples) in FLOWS.iter().zip(&mut self.flows) {
            samples.push(flow.run(pod, bytes).await.with_context(|| format!("{}: {label}", pod.runtime()))?);
        }
        Ok(())
    }

    async fn latency(&mut self, pod: &mut Pod) -> Result<()> {
        self.alone.extend(pod.latencies(1, ALONE).await?);
        self.parallel.extend(pod.latencies(PARALLEL, 1).await?);
        Ok(())
    }
}

pub(crate) async fn run(options: &Options, state: &Path) -> Result<()> {
    log::run(options.rounds, options.mib)?;
    let layout = Layout::at(&options.dist)?;
    let registry = Registry::start(&state.join("registry"))?;
    let reference = registry.push("pump", "latest", &image(&options.pump)?)?;
    let settings = Settings {
        state: state.join("a"),
        // Named, so that no trial boot is part of the start.
        backend: "qemu".to_owned(),
        subnet: "10.213.80.0/24".to_owned(),
        extra: Vec::new(),
    };
    write_hosts_toml(&settings.certs_dir(), &registry.host())?;
    let (daemon, mut client) = Daemon::start(&layout, &settings).await?;
    let outcome = boxes(options, &settings, &daemon, &mut client, &reference).await;
    client.remove_everything().await.context("removing the pods")?;
    let log = daemon.log_tail();
    daemon.stop().await?;
    outcome.with_context(|| format!("the daemon's log ends with:\n{log}"))
}

async fn boxes(
    options: &Options,
    settings: &Settings,
    daemon: &Daemon,
    client: &mut Client,
    reference: &str,
) -> Result<()> {
    client.pull(reference).await.context("pulling")?;
    let mut ours = Pod::start("a3s-box", client.clone(), reference, &settings.logs(), false).await?;
    let mut vsock = Vsock::start(&mut ours, &settings.state).await?;
    let folder = settings.state.join("c");
    let had_state = Path::new(CONTAINERD_STATE).exists();
    let mut peer = match Peer::start(&folder, &settings.certs_dir(), reference).await {
        Ok(peer) => Some(peer),
        Err(error) => {
            println!("\nLEFT OUT: containerd with runc: {error:#}\n{}", Containerd::log_tail(&folder));
            None
        }
    };
    let outcome =
        measure(options, daemon, &mut ours, &mut vsock, peer.as_mut().map(|peer| &mut peer.pod)).await;
    if let Some(peer) = peer {
        peer.stop().await?;
    }
    if !had_state && Path::new(CONTAINERD_STATE).exists() {
        fs::remove_dir_all(CONTAINERD_STATE).context("removing containerd's sockets")?;
    }
    remove_cgroups()?;
    outcome
}

/// runc leaves the parent of its containers' cgroups, in each hierarchy. One that is in use cannot be removed.
fn remove_cgroups() -> Result<()> {
    for hierarchy in fs::read_dir("/sys/fs/cgroup").context("listing the cgroup hierarchies")? {
        fs::remove_dir(hierarchy?.path().join("k8s.io")).ok();
    }
    fs::remove_dir("/sys/fs/cgroup/k8s.io").ok();
    Ok(())
}

async fn measure(
    options: &Options,
    daemon: &Daemon,
    ours: &mut Pod,
    vsock: &mut Vsock,
    mut peer: Option<&mut Pod>,
) -> Result<()> {
    let bytes = options.mib << 20;
    let (mut raw_out, mut raw_piped, mut raw_in) =
        (Samples::default(), Samples::default(), Samples::default());
    let (mut mine, mut theirs) = (Measured::default(), Measured::default());
    for _ in 0..options.rounds {
        raw_out.push(vsock.run(Direction::Out, bytes)?);
        raw_piped.push(vsock.run(Direction::PipedOut, bytes)?);
        raw_in.push(vsock.run(Direction::In, bytes)?);
        mine.round(ours, bytes).await?;
        if let Some(peer) = peer.as_deref_mut() {
            theirs.round(peer, bytes).await?;
        }
    }
    let has_peer = peer.is_some();

    println!("\n{} MiB each, {} round(s), QEMU", options.mib, options.rounds);
    println!("{:<32}{:>10}{:>10}{:>18}", "", "MB/s", "to raw", "containerd MB/s");
    println!("{:<32}{:>10.0}{:>10.2}", "raw vsock, out of the box", raw_out.rate(bytes), 1.0);
    let (rate, ratio) = (raw_piped.rate(bytes), raw_out.ratio_to(&raw_piped));
    println!("{:<32}{rate:>10.0}{ratio:>10.2}", "raw vsock behind a pipe");
    println!("{:<32}{:>10.0}{:>10.2}", "raw vsock, into the box", raw_in.rate(bytes), 1.0);
    for (index, (flow, label)) in FLOWS.iter().enumerate() {
        let raw = if *flow == Flow::ForwardIn { &raw_in } else { &raw_out };
        let samples = &mine.flows[index];
        print!("{label:<32}{:>10.0}{:>10.2}", samples.rate(bytes), raw.ratio_to(samples));
        if has_peer {
            print!("{:>18.0}", theirs.flows[index].rate(bytes));
        }
        println!();
    }
    mine.latency(ours).await?;
    if let Some(peer) = peer.as_deref_mut() {
        theirs.latency(peer).await?;
    }
    println!("\nexec, from connecting to the first byte, ms");
    println!("{:<32}{:>10}{:>10}{:>18}{:>10}", "", "median", "p99", "containerd median", "p99");
    for (label, mine, theirs) in
        [("one at a time", &mine.alone, &theirs.alone), ("50 at a time", &mine.parallel, &theirs.parallel)]
    {
        print!("{label:<32}{:>10.1}{:>10.1}", mine.percentile(50), mine.percentile(99));
        if has_peer {
            print!("{:>18.1}{:>10.1}", theirs.percentile(50), theirs.percentile(99));
        }
        println!();
    }
    leaks::check(daemon.pid(), ours, options.execs).await
}

/// containerd with a pod of its own.
struct Peer {
    daemon: Containerd,
    client: Client,
    pod: Pod,
}

impl Peer {
    async fn start(folder: &Path, certs: &Path, reference: &str) -> Result<Self> {
        let (daemon, mut client) = Containerd::start(folder, certs, Some(reference)).await?;
        client.pull(reference).await.context("pulling")?;
        match Pod::start("containerd", client.clone(), reference, &folder.join("logs"), true).await {
            Ok(pod) => Ok(Self { daemon, client, pod }),
            Err(error) => {
                client.remove_everything().await.context("removing containerd's pods")?;
                daemon.stop().await?;
                Err(error)
            }
        }
    }

    async fn stop(mut self) -> Result<()> {
        self.client.remove_everything().await.context("removing containerd's pods")?;
        self.daemon.stop().await
    }
}

/// The program and the directories that runtimes mount on. By itself it waits, as a sandbox's image has to.
fn image(pump: &Path) -> Result<Image> {
    let program = fs::read(pump).with_context(|| format!("reading {}", pump.display()))?;
    let mut layer = Layer::new();
    for directory in ["dev", "etc", "proc", "run", "sys"] {
        layer = layer.directory(directory, 0o755)?;
    }
    let layer = layer.file("pump", 0o755, &program)?;
    Image::new(vec![(layer, Encoding::Gzip)], &json!({ "Entrypoint": ["/pump"], "Cmd": ["pause"] }))
}
