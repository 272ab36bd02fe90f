//! The guest's initramfs: the static agent as /init. It makes its own root in a tmpfs, so nothing else is needed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{cpio, paths, process, tools};

/// Guests print a warning when the initramfs does not fill its last page.
const PAGE: usize = 4096;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the agent and packs it; `into` is the file to write.
pub(crate) fn build(into: &Path) -> Result<()> {
    let agent = build_agent()?;
    let contents = fs::read(&agent).with_context(|| format!("reading the agent {}", agent.display()))?;
    fs::write(into, pack(&contents)).with_context(|| format!("writing {}", into.display()))
}

fn pack(agent: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Archive::new();
    archive.directory("dev", 0o755);
    // Opened by the kernel as /init's standard streams, before anything is mounted on /dev.
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, agent);
    archive.finish(PAGE)
}

/// Static without musl: glibc's static library comes with libc6-dev. The explicit target keeps these flags away from
/// build scripts and gives the agent a folder of its own, so that it never invalidates the other binaries.
fn build_agent() -> Result<PathBuf> {
    process::run(
        tools::cargo()
            .args(["build", "--profile", "agent", "--target", TARGET, "--package", "a3s-box-agent"])
            .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static"),
    )
    .context("building the guest agent")?;
    let agent = paths::target().join(TARGET).join("agent/a3s-box-agent");
    if !agent.exists() {
        bail!("cargo succeeded but there is no {}", agent.display());
    }
    Ok(agent)
}

#[cfg(test)]
mod tests {
    use super::pack;

    #[test]
    fn the_archive_fills_whole_pages() {
        assert_eq!(pack(b"agent").len() % 4096, 0);
        assert_eq!(pack(&[7; 5000]).len() % 4096, 0);
    }
}
