//! Where things lie: the repository, its target folder, the user's cache.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The root of the repository this xtask was compiled in.
pub(crate) fn repo() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// Cargo's target folder, as cargo itself would choose it.
pub(crate) fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => repo().join(dir),
        None => repo().join("target"),
    }
}

/// What survives `cargo clean`: `$XDG_CACHE_HOME/a3s-box`, or `~/.cache/a3s-box`.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(base) => PathBuf::from(base),
        None => {
            let home = env::var_os("HOME")
                .context("neither XDG_CACHE_HOME nor HOME is set: no place for the cache")?;
            PathBuf::from(home).join(".cache")
        }
    };
    if !base.is_absolute() {
        bail!("the cache folder must be an absolute path, not {}", base.display());
    }
    let cache = base.join("a3s-box");
    fs::create_dir_all(&cache).with_context(|| format!("creating the cache folder {}", cache.display()))?;
    Ok(cache)
}

/// A folder to build in, beside its destination so that a rename can publish it; removed on drop unless published.
pub(crate) struct Staging {
    dir: tempfile::TempDir,
    destination: PathBuf,
}

impl Staging {
    /// Makes a staging folder for `destination`, which must not be read by anybody before `publish`.
    pub(crate) fn for_destination(destination: PathBuf) -> Result<Self> {
        let parent = destination.parent().context("a cache entry needs a parent folder")?.to_path_buf();
        fs::create_dir_all(&parent).with_context(|| format!("creating {}", parent.display()))?;
        let dir = tempfile::Builder::new()
            .prefix(".building-")
            .tempdir_in(&parent)
            .with_context(|| format!("creating a build folder in {}", parent.display()))?;
        Ok(Self { dir, destination })
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Renames `part` (inside the staging folder) to the destination: readers see all of it or nothing.
    pub(crate) fn publish(self, part: &Path) -> Result<PathBuf> {
        if self.destination.exists() {
            fs::remove_dir_all(&self.destination)
                .with_context(|| format!("removing the old {}", self.destination.display()))?;
        }
        fs::rename(part, &self.destination)
            .with_context(|| format!("publishing {} as {}", part.display(), self.destination.display()))?;
        Ok(self.destination)
    }
}

/// Reads a small text file of ours, `None` when it does not exist.
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// Replaces a small file of ours by rename.
pub(crate) fn write_atomic(path: &Path, contents: &[u8]) -> Result<()> {
    let parent = path.parent().context("a file needs a parent folder")?;
    fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    let temporary = tempfile::NamedTempFile::new_in(parent)
        .with_context(|| format!("creating a file in {}", parent.display()))?;
    fs::write(temporary.path(), contents)
        .with_context(|| format!("writing {}", temporary.path().display()))?;
    temporary.persist(path).with_context(|| format!("renaming to {}", path.display()))?;
    Ok(())
}
