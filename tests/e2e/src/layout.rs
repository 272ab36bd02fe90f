//! The installed layout under test: what `cargo xtask build` writes.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Root of an installation.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Takes `root` for a layout if the daemon is in it.
    pub fn at(root: &Path) -> Result<Self> {
        let layout = Self { root: std::path::absolute(root)? };
        if !layout.daemon().exists() {
            bail!("{} is no installed layout: there is no {}", root.display(), layout.daemon().display());
        }
        Ok(layout)
    }

    /// The CRI daemon.
    pub fn daemon(&self) -> PathBuf {
        self.root.join("usr/bin/a3s-box-cri-runtime")
    }

    /// The command line program.
    pub fn cli(&self) -> PathBuf {
        self.root.join("usr/bin/a3s-box")
    }

    /// The guest's initramfs, whose /init is the agent.
    pub fn initramfs(&self) -> PathBuf {
        self.root.join("usr/lib/a3s-box/initramfs.cpio")
    }
}
