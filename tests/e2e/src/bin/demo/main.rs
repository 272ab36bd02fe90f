//! One pod from pull to removal over CRI, each step with its time; `cargo xtask demo` builds what it needs.
//!
//! Everything it writes lies in one state folder. Whatever happens (a failing step, Ctrl-C), the pod, the daemon and
//! the registry are ended, and the last line says whether anything was left on the machine.

mod steps;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::layout::Layout;
use a3s_box_e2e::machine::Machine;
use a3s_box_e2e::registry::{Registry, write_hosts_toml};
use a3s_box_e2e::sample;
use anyhow::{Context, Result, bail};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use table::Table;

/// Pods of the demo get addresses from here.
const SUBNET: &str = "10.213.78.0/24";

#[derive(Parser)]
struct Arguments {
    /// The installed layout: target/dist.
    #[arg(long)]
    dist: PathBuf,
    /// Everything the demo writes lies here; emptied at the start.
    #[arg(long)]
    state: PathBuf,
    /// auto, qemu or libkrun.
    #[arg(long, default_value = "auto")]
    backend: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the async runtime")
        .and_then(|runtime| runtime.block_on(demo(&arguments)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo(arguments: &Arguments) -> Result<()> {
    let layout = Layout::at(&arguments.dist)?;
    let state = empty_folder(&arguments.state)?;
    let before = Machine::look(&state)?;
    let forwarding = Forwarding::remember();
    let mut table = Table::new();
    let started = Instant::now();

    let outcome = run(arguments, &layout, &state, &mut table).await;

    forwarding.restore();
    let left = Machine::settled(&state, &before).await?;
    if left.is_empty() {
        table.step("nothing left", "no process, mount, netns, tap, cgroup, or file outside the state folder");
    }
    table.close(started.elapsed(), &state);
    outcome?;
    if !left.is_empty() {
        bail!("something was left on the machine:\n{left}");
    }
    Ok(())
}

async fn run(arguments: &Arguments, layout: &Layout, state: &Path, table: &mut Table) -> Result<()> {
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;

    let registry = Registry::start(&state.join("registry"))?;
    let image = sample::hello()?;
    let reference = registry.push("demo/hello", "1", &image)?;
    table.step("registry", &format!("{reference}, {} KiB", image.size() / 1024));

    let settings = Settings {
        state: state.to_path_buf(),
        backend: arguments.backend.clone(),
        subnet: SUBNET.to_owned(),
        extra: Vec::new(),
    };
    write_hosts_toml(&settings.certs_dir(), &registry.host())?;
    let (daemon, mut client) = tokio::select! {
        started = Daemon::start(layout, &settings) => started?,
        _ = interrupted.recv() => bail!("interrupted"),
        _ = terminated.recv() => bail!("terminated"),
    };
    table.step("daemon", &format!("pid {}, ready", daemon.pid()));

    let outcome = tokio::select! {
        outcome = steps::run(&mut client, &settings, &reference, table) => outcome,
        _ = interrupted.recv() => Err(anyhow::anyhow!("interrupted")),
        _ = terminated.recv() => Err(anyhow::anyhow!("terminated")),
    };
    // The steps remove what they made; after a failure the rest goes here, and the first error is the one to report.
    let removed = client.remove_everything().await.context("removing the pods that a failed step left");
    let log = daemon.log_tail();
    let stopped = daemon.stop().await;
    if let Err(error) = outcome {
        return Err(error.context(format!("the daemon's log ends with:\n{log}\n")));
    }
    removed?;
    let status = stopped?;
    if !status.success() {
        bail!("the daemon ended with {status}; its log:\n{log}");
    }
    table.step("daemon stopped", &status.to_string());
    Ok(())
}

fn empty_folder(path: &Path) -> Result<PathBuf> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("emptying {}", path.display()))?;
    }
    fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
    fs::canonicalize(path).with_context(|| format!("finding {}", path.display()))
}

/// CNI plugins switch the host's IP forwarding on for the first pod; the demo puts it back.
struct Forwarding(Option<String>);

impl Forwarding {
    const SWITCH: &str = "/proc/sys/net/ipv4/ip_forward";

    fn remember() -> Self {
        Self(fs::read_to_string(Self::SWITCH).ok())
    }

    fn restore(self) {
        if let Some(value) = self.0
            && fs::read_to_string(Self::SWITCH).is_ok_and(|now| now != value)
        {
            // Not ours to insist on: a machine that forbids it has not been changed either.
            let _ = fs::write(Self::SWITCH, value);
        }
    }
}
