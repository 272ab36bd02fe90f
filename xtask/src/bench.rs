//! `cargo xtask bench`: builds everything, then hands over to the benchmark program. See docs/benchmarks.md.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::{dist, initramfs, packages, paths, ui};

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
    /// exec, port-forward and logs, beside the raw vsock of the box and containerd with runc.
    Streams(Streams),
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

#[derive(Args)]
struct Streams {
    /// Runs of every measurement.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// MiB that are moved in each.
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// Short commands, one after the other, after which nothing may be left of them.
    #[arg(long, default_value_t = 2000)]
    execs: u32,
    /// Cargo profile of the host's binaries.
    #[arg(long, default_value = "quick")]
    profile: String,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let (name, profile, rounds) = match &options.what {
        What::Images(measure) => ("images", &measure.profile, measure.rounds),
        What::Layers(measure) => ("layers", &measure.profile, measure.rounds),
        What::Streams(streams) => ("streams", &streams.profile, streams.rounds),
    };
    packages::ensure(packages::Set::Bench)?;
    if !nix::unistd::geteuid().is_root() {
        bail!("containerd and the daemon mount file systems: run `cargo xtask bench` as root");
    }
    let layout =
        dist::build_with(&dist::Options { profile: profile.clone(), out: None }, &["a3s-box-bench"])?;
    let program = dist::profile_folder(profile).join("a3s-box-bench");
    let mut command = Command::new(&program);
    command.args([name, "--rounds", &rounds.to_string()]);
    match &options.what {
        What::Images(_) => {
            command.arg("--dist").arg(layout).arg("--packages").arg(paths::cache()?.join("debs"));
        }
        What::Layers(_) => {
            command.arg("--packages").arg(paths::cache()?.join("debs"));
        }
        What::Streams(streams) => {
            let pump = initramfs::build_static("a3s-box-pump").context("building the containers' program")?;
            command.arg("--dist").arg(layout).arg("--pump").arg(pump);
            command.args(["--mib", &streams.mib.to_string(), "--execs", &streams.execs.to_string()]);
        }
    }
    ui::heading("bench");
    // The benchmark takes our place, so that Ctrl-C and its exit code are its own.
    Err(command.exec()).with_context(|| format!("starting {}", program.display()))
}
