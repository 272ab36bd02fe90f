//! Images of Debian packages: the merged layers beside what umoci unpacks.
//!
//! The program is built with the profile `quick`: it converts and compares more than a gigabyte.

use std::process::Command;

use anyhow::{Context, Result};

use super::{Done, Options};
use crate::{bench, paths, process};

const PROFILE: &str = "quick";

pub(super) fn run(options: &Options) -> Result<Done> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Done::Skipped("mounting layers needs root".to_owned()));
    }
    let mut program = Command::new(bench::build(PROFILE)?);
    program.args(["compare", "--packages"]).arg(paths::cache()?.join("debs"));
    if options.without_large_image {
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
