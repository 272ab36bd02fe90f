//! Programs built from crates.io at a pinned version: the VMM's helper and the checkers.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::{paths, process, ui};

/// A program, the crate it comes from and the version that is known to work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    krate: &'static str,
    version: &'static str,
    /// Built without optimization: it works for a second, and optimizing it takes minutes.
    quick: bool,
}

/// Licences, advisories, duplicates.
pub(crate) const CARGO_DENY: Tool =
    Tool { program: "cargo-deny", krate: "cargo-deny", version: "0.20.2", quick: true };
/// Test runner, where the machine does not have one.
pub(crate) const CARGO_NEXTEST: Tool =
    Tool { program: "cargo-nextest", krate: "cargo-nextest", version: "0.9.143", quick: false };

/// Finds the tool in the cache, or builds it there.
pub(crate) fn ensure(tool: Tool) -> Result<PathBuf> {
    let destination = paths::cache()?.join("tools").join(format!("{}-{}", tool.krate, tool.version));
    let program = destination.join("bin").join(tool.program);
    if program.exists() {
        return Ok(program);
    }
    ui::heading(&format!("{} {}", tool.krate, tool.version));
    ui::note(&format!("built from crates.io once; kept in {}", destination.display()));
    let started = Instant::now();
    let staging = paths::Staging::for_destination(destination)?;
    let root = staging.path().join("root");
    process::run(
        cargo()
            .args(["install", "--locked", "--quiet", "--no-track", "--root"])
            .arg(&root)
            .arg("--target-dir")
            .arg(staging.path().join("target"))
            .arg(format!("{}@={}", tool.krate, tool.version))
            .args(tool.quick.then_some("--debug"))
            .env_remove("RUSTFLAGS"),
    )
    .with_context(|| format!("building {} {} from crates.io", tool.krate, tool.version))?;
    staging.publish(&root)?;
    ui::note(&format!("built in {}", ui::time(started.elapsed())));
    Ok(program)
}

/// The cargo that runs us, in the repository's root.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::repo());
    command
}
