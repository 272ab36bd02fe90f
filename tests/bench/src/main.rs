//! Measures a3s-box beside its peers in one run; `cargo xtask bench` builds what it needs. See docs/benchmarks.md.
//!
//! Machines differ and are shared, so that only ratios of interleaved runs say anything.

mod compare;
mod containerd;
mod debian;
mod floor;
mod images;
mod layers;
mod samples;

use std::path::PathBuf;
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
    let options = match Arguments::parse().what {
        What::Images(options) => options,
        What::Layers(options) => return ended("benchmark", layers::run(&options)),
        What::Compare(options) => return ended("comparison", compare::run(&options)),
    };
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the async runtime")
        .and_then(|runtime| runtime.block_on(measure_images(&options)));
    ended("benchmark", outcome)
}

fn ended(what: &str, outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe {what} failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whatever the measurement's outcome is, its folder goes and the machine is looked at.
async fn measure_images(options: &Options) -> Result<()> {
    // Socket paths are short: the folder lies near the root.
    let state = tempfile::Builder::new().prefix("bench-").tempdir().context("creating the state folder")?;
    let before = Machine::look(state.path())?;
    let outcome = images::run(options, state.path()).await;
    let left = Machine::look(state.path())?.since(&before);
    state.close().context("removing the state folder")?;
    outcome?;
    if !left.is_empty() {
        bail!("something was left on the machine:\n{left}");
    }
    println!("nothing was left on the machine");
    Ok(())
}
