//! Measures a3s-box beside its peers in one run; `cargo xtask bench` builds what it needs. See docs/benchmarks.md.
//!
//! Machines differ and are shared, so that only ratios of interleaved runs say anything.

mod boxes;
mod compare;
mod containerd;
mod containers;
mod debian;
mod floor;
mod images;
mod layers;
mod lists;
mod network;
mod pair;
mod pod;
mod samples;
mod streams;
mod volumes;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use a3s_box_e2e::machine::Machine;
use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Pulls from a loopback registry.
    Images(Options),
    /// Starts with one EROFS file per layer and with a merged one.
    Layers(layers::Options),
    /// The life of containers in one box.
    Containers(containers::Options),
    /// exec, port-forward and logs of one box.
    Streams(streams::Options),
    /// Pods' networks: a redirected tap, a plain one, a veth.
    Network(network::Options),
    /// Small files on a volume and on the scratch disk of one box.
    Volumes(volumes::Options),
    /// Boxes beside those of another build.
    Boxes(boxes::Options),
    /// Compares images' merged layers with what umoci unpacks; measures nothing.
    Compare(compare::Options),
}

#[derive(clap::Args)]
struct Options {
    /// The installed layout: target/dist.
    #[arg(long)]
    dist: PathBuf,
    /// Where downloaded Debian packages are kept.
    #[arg(long)]
    packages: PathBuf,
    /// Runs of every candidate per image.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().what {
        What::Images(options) => measured(async |state: &Path| images::run(&options, state).await),
        What::Layers(options) => layers::run(&options).context("the benchmark failed"),
        What::Containers(options) => measured(async |state: &Path| containers::run(&options, state).await),
        What::Streams(options) => measured(async |state: &Path| streams::run(&options, state).await),
        What::Network(options) => measured(async |state: &Path| network::run(&options, state).await),
        What::Volumes(options) => measured(async |state: &Path| volumes::run(&options, state).await),
        What::Boxes(options) => measured(async |state: &Path| boxes::run(&options, state).await),
        What::Compare(options) => compare::run(&options).context("the comparison failed"),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\n{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measured(work: impl AsyncFnOnce(&Path) -> Result<()>) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the async runtime")?
        .block_on(measure(work))
        .context("the benchmark failed")
}

/// Whatever the measurement's outcome is, its folder goes and the machine is looked at.
async fn measure(work: impl AsyncFnOnce(&Path) -> Result<()>) -> Result<()> {
    // Socket paths are short: the folder lies near the root.
    let state = tempfile::Builder::new().prefix("bench-").tempdir().context("creating the state folder")?;
    let before = Machine::look(state.path())?;
    let outcome = work(state.path()).await;
    let left = Machine::settled(state.path(), &before).await?;
    state.close().context("removing the state folder")?;
    outcome?;
    if !left.is_empty() {
        bail!("something was left on the machine:\n{left}");
    }
    println!("nothing was left on the machine");
    Ok(())
}
