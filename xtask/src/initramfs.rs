//! The guest's initramfs: the static agent as /init. It makes its own root in a tmpfs, so nothing else is needed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{cpio, paths, process, tools};

/// Guests print a warning when the initramfs does not fill its last page.
const PAGE: usize = 4096;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the agent.
pub(crate) fn agent() -> Result<PathBuf> {
    build_static("a3s-box-agent").context("building the guest agent")
}

/// Packs the agent; `into` is the file to write.
pub(crate) fn pack(agent: &Path, into: &Path) -> Result<()> {
    let contents = fs::read(agent).with_context(|| format!("reading the agent {}", agent.display()))?;
    fs::write(into, archive(&contents)).with_context(|| format!("writing {}", into.display()))
}

fn archive(agent: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Archive::new();
    archive.directory("dev", 0o755);
    // Opened by the kernel as /init's standard streams, before anything is mounted on /dev.
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, agent);
    archive.finish(PAGE)
}

/// Builds a program for guests. Static without musl: glibc's static library comes with libc6-dev. The explicit target
/// keeps these flags away from build scripts and gives these programs a folder of their own, so that they never
/// invalidate the other binaries.
pub(crate) fn build_static(package: &str) -> Result<PathBuf> {
    process::run(
        tools::cargo()
            .args(["build", "--profile", "agent", "--target", TARGET, "--package", package])
            .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static"),
    )?;
    let program = paths::target().join(TARGET).join("agent").join(package);
    if !program.exists() {
        bail!("cargo succeeded but there is no {}", program.display());
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::archive;

    #[test]
    fn the_archive_fills_whole_pages() {
        assert_eq!(archive(b"agent").len() % 4096, 0);
        assert_eq!(archive(&[7; 5000]).len() % 4096, 0);
    }
}
