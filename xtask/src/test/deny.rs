//! Licences, sources and duplicates of the dependencies; advisories where their database can be had.

use std::process::Command;

use anyhow::Result;

use super::{Context, Done};
use crate::{paths, process, tools};

pub(super) fn policy(_: &Context<'_>) -> Result<Done> {
    process::run(deny()?.args([
        "--locked",
        "check",
        "--hide-inclusion-graph",
        "licenses",
        "bans",
        "sources",
    ]))?;
    Ok(Done::Passed("licences, bans, sources".to_owned()))
}

/// The database is a git repository that not every machine may reach.
pub(super) fn advisories(_: &Context<'_>) -> Result<Done> {
    if process::output(deny()?.args(["fetch", "db"])).is_err() {
        return Ok(Done::Skipped(
            "RustSec's advisory database cannot be fetched from this machine".to_owned(),
        ));
    }
    process::run(deny()?.args([
        "--locked",
        "check",
        "--hide-inclusion-graph",
        "--disable-fetch",
        "advisories",
    ]))?;
    Ok(Done::Passed("no known advisory applies".to_owned()))
}

fn deny() -> Result<Command> {
    let mut command = Command::new(tools::ensure(tools::CARGO_DENY)?);
    command.current_dir(paths::repo());
    Ok(command)
}
