//! Images of Debian packages: the merged layers beside what umoci unpacks.
//!
//! The program has the profile `dev`, whose artefacts the unit tests have compiled already; for the large image a faster one
//! is built.

use std::process::Command;

use anyhow::{Context as _, Result};

use super::{Context, Done};
use crate::{bench, paths, process};

pub(super) fn run(context: &Context<'_>) -> Result<Done> {
    let options = context.options;
    if !nix::unistd::geteuid().is_root() {
        return Ok(Done::Skipped("mounting layers needs root".to_owned()));
    }
    let profile = if options.with_large_image { "quick" } else { "dev" };
    let mut program = Command::new(bench::build(profile)?);
    program.args(["compare", "--packages"]).arg(paths::cache()?.join("debs"));
    if !options.with_large_image {
        program.arg("--without-large");
    }
    let mut words = String::new();
    process::lines(&mut program, |line| {
        println!("{line}");
        if let Some(summary) = line.strip_prefix("compared: ") {
            summary.clone_into(&mut words);
        }
    })
    .context("comparing with umoci")?;
    Ok(Done::Passed(words))
}
