//! `cargo xtask bench`: builds what is measured, then hands over to the benchmark program. See docs/benchmarks.md.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::test::e2e::Backend;
use crate::{dist, initramfs, node, packages, paths, process, tools, ui};

const NODE_MEMORY_MIB: u32 = 4096;
/// The longest until the node's first measurement, and for a round.
const NODE_START: Duration = Duration::from_secs(240);
const NODE_ROUND: Duration = Duration::from_secs(90);

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
    /// Create, start, exec, stop and remove of containers, beside containerd with runc.
    Containers(Containers),
    /// exec, port-forward and logs, beside the raw vsock of the box and containerd with runc.
    Streams(Streams),
    /// Pods' networks: a redirected tap beside a plain one and beside containerd's veth.
    Network(Network),
    /// Small files on a volume, beside the scratch disk, and what the guest asks its file server for.
    Volumes(Volumes),
    /// Boots and memory of boxes, beside those of another build.
    Boxes(Boxes),
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
struct Containers {
    /// Containers of each runtime.
    #[arg(long, default_value_t = 30)]
    rounds: u32,
    /// Containers to be listed.
    #[arg(long, default_value_t = 1000)]
    listed: u32,
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

#[derive(Args)]
struct Network {
    /// Guests that are measured behind their redirected tap and then on a plain one.
    #[arg(long, default_value_t = 4)]
    guests: u32,
    /// Runs of every measurement, of each guest.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// MiB that are moved in each.
    #[arg(long, default_value_t = 128)]
    mib: u64,
    /// Requests that are answered in each.
    #[arg(long, default_value_t = 1000)]
    requests: u64,
    /// Cargo profile of the host's binaries.
    #[arg(long, default_value = "quick")]
    profile: String,
}

#[derive(Args)]
struct Volumes {
    /// Runs of every measurement.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Files that are made, walked over and read.
    #[arg(long, default_value_t = 1000)]
    files: u64,
    /// Cargo profile of the host's binaries.
    #[arg(long, default_value = "quick")]
    profile: String,
}

#[derive(Args)]
struct Boxes {
    /// The installed layout of the other build, as `cargo xtask build` made it there.
    #[arg(long, value_name = "OTHER_LAYOUT")]
    other: PathBuf,
    /// Who runs the boxes of both: qemu on this machine, libkrun in the virtual node.
    #[arg(long, value_enum, default_value = "qemu")]
    backend: Backend,
    /// Boxes of each build.
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Cargo profile of the host's binaries.
    #[arg(long, default_value = "quick")]
    profile: String,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let (name, profile, rounds) = match &options.what {
        What::Images(measure) => ("images", &measure.profile, measure.rounds),
        What::Layers(measure) => ("layers", &measure.profile, measure.rounds),
        What::Containers(containers) => ("containers", &containers.profile, containers.rounds),
        What::Streams(streams) => ("streams", &streams.profile, streams.rounds),
        What::Network(network) => ("network", &network.profile, network.rounds),
        What::Volumes(volumes) => ("volumes", &volumes.profile, volumes.rounds),
        What::Boxes(boxes) => ("boxes", &boxes.profile, boxes.rounds),
    };
    packages::ensure(packages::Set::Bench)?;
    if !nix::unistd::geteuid().is_root() {
        bail!("containerd and the daemon mount file systems: run `cargo xtask bench` as root");
    }
    let mut arguments: Vec<OsString> = [name, "--rounds", &rounds.to_string()].map(OsString::from).into();
    let program = match &options.what {
        What::Images(_) => {
            let (program, layout) = build_with_layout(profile)?;
            arguments.extend(["--dist".into(), layout.into(), "--packages".into(), debs()?]);
            program
        }
        // It runs no daemon.
        What::Layers(_) => {
            arguments.extend(["--packages".into(), debs()?]);
            build(profile)?
        }
        What::Containers(containers) => {
            let (program, layout) = build_with_layout(profile)?;
            arguments.extend(["--dist".into(), layout.into(), "--pump".into(), pump()?]);
            arguments.extend(["--listed".into(), containers.listed.to_string().into()]);
            program
        }
        What::Streams(streams) => {
            let (program, layout) = build_with_layout(profile)?;
            arguments.extend(["--dist".into(), layout.into(), "--pump".into(), pump()?]);
            let (mib, execs) = (streams.mib.to_string(), streams.execs.to_string());
            arguments.extend(["--mib".into(), mib.into(), "--execs".into(), execs.into()]);
            program
        }
        What::Network(network) => {
            let (program, layout) = build_with_layout(profile)?;
            arguments.extend(["--dist".into(), layout.into(), "--pump".into(), pump()?]);
            for (option, value) in [
                ("--guests", network.guests.to_string()),
                ("--mib", network.mib.to_string()),
                ("--requests", network.requests.to_string()),
            ] {
                arguments.extend([option.into(), value.into()]);
            }
            program
        }
        What::Volumes(volumes) => {
            let (program, layout) = build_with_layout(&volumes.profile)?;
            arguments.extend(["--dist".into(), layout.into(), "--pump".into(), pump()?]);
            arguments.extend(["--files".into(), volumes.files.to_string().into()]);
            program
        }
        What::Boxes(boxes) => {
            let other = boxes.other.canonicalize();
            let other = other.with_context(|| format!("no layout at {}", boxes.other.display()))?;
            let (program, layout) = build_with_layout(profile)?;
            arguments.extend(["--dist".into(), layout.into(), "--other".into(), other.into()]);
            if boxes.backend == Backend::Libkrun {
                arguments.extend(["--backend", "libkrun"].map(OsString::from));
                return in_node(&program, &arguments, boxes.rounds);
            }
            program
        }
    };
    ui::heading("bench");
    // The benchmark takes our place, so that Ctrl-C and its exit code are its own.
    let error = Command::new(&program).args(arguments).exec();
    Err(error).with_context(|| format!("starting {}", program.display()))
}

/// A benchmark that needs KVM, in the virtual node.
fn in_node(program: &Path, arguments: &[OsString], rounds: u32) -> Result<ExitCode> {
    ui::heading("bench");
    let words = std::iter::once(program.as_os_str()).chain(arguments.iter().map(OsString::as_os_str));
    let command: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    let run = node::Run {
        command: &command,
        environment: &[],
        memory_mib: NODE_MEMORY_MIB,
        limit: NODE_START + rounds * NODE_ROUND,
    };
    let code = run.execute(|line| println!("{line}"))?;
    Ok(ExitCode::from(code))
}

/// The program that runs in the containers.
fn pump() -> Result<OsString> {
    Ok(initramfs::build_static("a3s-box-pump").context("building the containers' program")?.into())
}

/// Where the Debian packages lie that images are made of.
fn debs() -> Result<OsString> {
    Ok(paths::cache()?.join("debs").into())
}

const PACKAGE: &str = "a3s-box-bench";

fn program(profile: &str) -> PathBuf {
    dist::profile_folder(profile).join(PACKAGE)
}

/// The benchmark, and the layout whose daemon it runs.
fn build_with_layout(profile: &str) -> Result<(PathBuf, PathBuf)> {
    let layout = dist::build_with(&dist::Options { profile: profile.to_owned(), out: None }, &[PACKAGE])?;
    Ok((program(profile), layout))
}

/// The benchmark alone.
pub(crate) fn build(profile: &str) -> Result<PathBuf> {
    process::run(tools::cargo().args(["build", "--locked", "--profile", profile, "--package", PACKAGE]))
        .with_context(|| format!("building {PACKAGE}"))?;
    Ok(program(profile))
}
