//! `cargo xtask demo`: builds everything, then hands over to the demo program.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{dist, packages, paths, ui};

#[derive(Args)]
pub(crate) struct Options {
    /// Which VMM to use: auto, qemu or libkrun.
    #[arg(long, default_value = "auto")]
    backend: String,
    /// Cargo profile of the host's binaries.
    #[arg(long, default_value = "quick")]
    profile: String,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    packages::ensure(packages::Set::Demo)?;
    if !nix::unistd::geteuid().is_root() {
        bail!("a pod needs network namespaces, taps and cgroups: run `cargo xtask demo` as root");
    }
    let layout = dist::build(&dist::Options { profile: options.profile.clone(), out: None })?;
    ui::heading("demo");
    let program = dist::profile_folder(&options.profile).join("a3s-box-demo");
    // The demo takes our place, so that Ctrl-C and its exit code are its own.
    let error = Command::new(&program)
        .arg("--dist")
        .arg(layout)
        .arg("--state")
        .arg(paths::target().join("demo"))
        .arg("--backend")
        .arg(&options.backend)
        .exec();
    Err(error).with_context(|| format!("starting {}", program.display()))
}
