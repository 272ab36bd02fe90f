//! `cargo xtask bench`: builds everything, then hands over to the benchmark program. See docs/benchmarks.md.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::{dist, packages, paths, process, tools, ui};

#[derive(Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Pulls from a loopback registry, beside containerd and skopeo with umoci.
    Images(Measure),
    /// Starts with one EROFS file per layer, beside one merged file.
    Layers(Measure),
}

#[derive(Args)]
struct Measure {
    /// Runs of every candidate per image.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Cargo profile of the host's binaries.
    #[arg(long, default_value = "quick")]
    profile: String,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let (what, measure) = match &options.what {
        What::Images(measure) => ("images", measure),
        What::Layers(measure) => ("layers", measure),
    };
    packages::ensure(packages::Set::Bench)?;
    if !nix::unistd::geteuid().is_root() {
        bail!("containerd and the daemon mount file systems: run `cargo xtask bench` as root");
    }
    let layout = match options.what {
        What::Images(_) => Some(dist::build(&dist::Options { profile: measure.profile.clone(), out: None })?),
        What::Layers(_) => None,
    };
    process::run(tools::cargo().args([
        "build",
        "--locked",
        "--profile",
        &measure.profile,
        "--package",
        "a3s-box-bench",
    ]))
    .context("building the benchmark")?;
    ui::heading("bench");
    let program = dist::profile_folder(&measure.profile).join("a3s-box-bench");
    // The benchmark takes our place, so that Ctrl-C and its exit code are its own.
    let mut command = Command::new(&program);
    command.args([what, "--rounds", &measure.rounds.to_string(), "--packages"]);
    command.arg(paths::cache()?.join("debs"));
    if let Some(layout) = layout {
        command.arg("--dist").arg(layout);
    }
    let error = command.exec();
    Err(error).with_context(|| format!("starting {}", program.display()))
}
