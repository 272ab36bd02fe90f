//! What one `run` owns on the host: two directories and whatever its box manager writes down in them.
//!
//! ```text
//! <run_dir>/run/<name>/             locked while the invocation lives; records, sockets, boxes
//! <root>/standalone/run/<name>/     scratch disks, network records
//! ```
//!
//! An invocation that was killed leaves a directory that nobody holds locked; the next one finds it, ends the
//! box that is recorded there and removes it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};

use a3s_box_host::config::NetworkMode;
use a3s_box_host::{Config, InstanceLock, Layout, LockError, backend, start_boxes};
use a3s_box_runtime::BoxManager;
use a3s_box_store::RedbStore;

use crate::tell::note;

/// Nobody else opens the records of an invocation.
const RECORDS_WAIT: Duration = Duration::from_secs(1);

/// The directories of one `run`.
pub(crate) struct Invocation {
    /// Also the default name of its box.
    pub(crate) name: String,
    /// The configuration with this invocation's directories in it.
    pub(crate) config: Config,
    /// What invocations share: the verdict about the hypervisor.
    shared: PathBuf,
    _lock: InstanceLock,
}

impl Invocation {
    /// Makes the directories.
    pub(crate) fn begin(config: &Config) -> anyhow::Result<Self> {
        let mut random = [0; 4];
        getrandom::fill(&mut random)
            .map_err(|error| anyhow!("the kernel gives no random numbers: {error}"))?;
        let name = format!("run-{:08x}", u32::from_ne_bytes(random));
        // Held while a directory exists that is not locked yet: a sweep must not take it for a leftover.
        let _quiet = InstanceLock::wait(&directories(config, "")[0])?;
        let [run_dir, root] = directories(config, &name);
        let lock = InstanceLock::take(&run_dir)?;
        a3s_box_host::make_private_dir(&root)?;
        let shared = config.run_dir.clone();
        Ok(Self { name, config: config.with_directories(root, run_dir), shared, _lock: lock })
    }

    /// The box manager of these directories, and which backend it uses.
    pub(crate) async fn boxes(&self) -> anyhow::Result<BoxManager> {
        let layout = Layout::of(&self.config);
        let (_, vmm) = backend::choose(&self.config, &layout, &self.shared).await?;
        // In the run directory, which is memory: a reboot ends the box and its records alike.
        let path = self.config.run_dir.join("state.redb");
        let records = tokio::task::spawn_blocking(move || RedbStore::open(&path, RECORDS_WAIT)).await??;
        Ok(start_boxes(&self.config, &layout, Arc::new(records), vmm).await?)
    }

    /// Ends what is left and removes the directories; goes on past failures and reports the first.
    pub(crate) async fn end(self, boxes: &BoxManager) -> anyhow::Result<()> {
        let mut first = None;
        for status in boxes.list_boxes() {
            if let Err(error) = boxes.remove_box(&status.id).await {
                first.get_or_insert(anyhow::Error::new(error));
            }
        }
        boxes.shutdown().await;
        match first {
            // The records stay for the next sweep: they say what is still there.
            Some(error) => Err(error.context("cleaning up failed; the next `a3s-box run` tries again")),
            None => self.forget(),
        }
    }

    /// Removes the directories of an invocation that has started nothing.
    pub(crate) fn forget(self) -> anyhow::Result<()> {
        for dir in [&self.config.root, &self.config.run_dir] {
            match std::fs::remove_dir_all(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("could not remove {}", dir.display()));
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }
}

/// `[below the run directory, below the state directory]`
fn directories(config: &Config, name: &str) -> [PathBuf; 2] {
    [config.run_dir.join("run").join(name), config.root.join("standalone/run").join(name)]
}

/// Removes what killed invocations left. A failure is told and stops nothing.
pub(crate) async fn sweep(config: &Config) {
    match leftovers(config) {
        Ok(invocations) => {
            for invocation in invocations {
                let name = invocation.name.clone();
                if let Err(error) = clear(invocation).await {
                    note!("could not clean up after {name}, which was killed: {error:#}");
                }
            }
        }
        Err(error) => note!("could not look for leftovers: {error:#}"),
    }
}

async fn clear(invocation: Invocation) -> anyhow::Result<()> {
    if !invocation.config.run_dir.join("state.redb").exists() {
        return invocation.forget();
    }
    let boxes = invocation.boxes().await?;
    invocation.end(&boxes).await
}

fn leftovers(config: &Config) -> anyhow::Result<Vec<Invocation>> {
    let parent = &directories(config, "")[0];
    if !parent.exists() {
        return Ok(Vec::new());
    }
    let _quiet = InstanceLock::wait(parent)?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(parent).with_context(|| parent.display().to_string())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("run-") {
            found.extend(leftover(config, &name)?);
        }
    }
    Ok(found)
}

fn leftover(config: &Config, name: &str) -> anyhow::Result<Option<Invocation>> {
    let [run_dir, root] = directories(config, name);
    match InstanceLock::take(Path::new(&run_dir)) {
        Ok(lock) => {
            let shared = config.run_dir.clone();
            let mut config = config.with_directories(root, run_dir);
            // However this one is connected, a dead one's network is given back, and its records know which it was.
            config.network.mode = NetworkMode::Cni;
            Ok(Some(Invocation { name: name.to_owned(), config, shared, _lock: lock }))
        }
        Err(LockError::Taken { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &Path) -> Config {
        Config::default().with_directories(dir.join("root"), dir.join("run"))
    }

    #[test]
    fn an_invocation_that_lives_is_no_leftover_and_a_dead_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let living = Invocation::begin(&config).unwrap();
        let dead = Invocation::begin(&config).unwrap().name;
        let names: Vec<_> = leftovers(&config).unwrap().into_iter().map(|i| i.name).collect();
        assert_eq!(names, [dead]);
        drop(living);
    }

    #[tokio::test]
    async fn a_sweep_removes_the_directories_of_the_dead() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let dead = Invocation::begin(&config).unwrap();
        let dirs = [dead.config.root.clone(), dead.config.run_dir.clone()];
        drop(dead);
        assert!(dirs.iter().all(|dir| dir.exists()));
        sweep(&config).await;
        assert!(!dirs.iter().any(|dir| dir.exists()));
    }
}
