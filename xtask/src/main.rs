//! Builds, demonstrates and tests a3s-box.
//!
//! `cargo xtask demo` and `cargo xtask test` are complete by themselves on a fresh Debian 12 or 13 with a Rust
//! toolchain: they install the packages they lack, build what no package has (the guest kernel, the VMM's helpers)
//! once into the user's cache folder, and the project's own binaries into `target/`. See docs/development.md.

mod bench;
mod check;
mod cpio;
mod debian;
mod demo;
mod digest;
mod dist;
mod initramfs;
mod kernel;
mod node;
mod packages;
mod paths;
mod process;
mod test;
mod tools;
mod ui;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Builds, demonstrates and tests a3s-box.",
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lay out target/dist as an installation: binaries, VMM helpers, guest kernel and initramfs, configuration.
    Build(dist::Options),
    /// Bring a pod up in its own kernel over CRI, step by step, and take it down again without a trace.
    Demo(demo::Options),
    /// Measure speed beside peers, as ratios in one run.
    Bench(bench::Options),
    /// Before a commit: formatting, lints, documentation and unit tests of what has changed.
    Check(check::Options),
    /// Check and test everything, end to end on both VMM backends.
    Test(test::Options),
    /// The end-to-end scenarios that repeat, in their long form: hundreds of pods, of kills of the daemon and of VMMs.
    Soak {
        /// What runs the pods' machines.
        #[arg(long, value_enum, default_value = "qemu")]
        backend: test::e2e::Backend,
        /// Instead: a pod that the build in this installed layout starts and this build goes on with.
        #[arg(long, value_name = "OTHER_LAYOUT")]
        across: Option<PathBuf>,
        /// As often on libkrun as on QEMU, and not a tenth of that: for hours.
        #[arg(long)]
        whole: bool,
        /// Only the scenarios whose names begin so, such as endurance::streams.
        #[arg(default_value = "endurance::")]
        scenarios: String,
    },
    /// Run one command in the virtual KVM node, where /dev/kvm works even if this machine's does not.
    Node(node::Options),
    /// Build the guest kernel, or say where the cached one is.
    Kernel(kernel::Options),
    /// Install the Debian packages that the other commands need.
    Packages,
}

fn main() -> ExitCode {
    let outcome = run(Cli::parse().command);
    match outcome {
        Ok(code) => code,
        Err(error) => {
            ui::failure(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Build(options) => {
            packages::ensure(packages::Set::Build)?;
            let dist = dist::build(&options)?;
            ui::note(&format!("installed layout: {}", dist.display()));
            Ok(ExitCode::SUCCESS)
        }
        Command::Demo(options) => demo::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Check(options) => check::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Soak { backend, across, whole, scenarios } => {
            let long = if whole { "whole" } else { "1" };
            test::e2e::soak(backend, across.as_deref(), &scenarios, long)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Node(options) => {
            packages::ensure(packages::Set::Test)?;
            node::run_command(&options)
        }
        Command::Kernel(options) => {
            packages::ensure(packages::Set::Build)?;
            let kernel = kernel::ensure(&options)?;
            println!("{}", kernel.vmlinux.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Packages => {
            packages::ensure(packages::Set::Test)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
