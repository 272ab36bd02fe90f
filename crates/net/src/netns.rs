//! Network namespaces that live as long as a bind mount.
//!
//! A namespace without processes exists while something refers to it: here a bind mount of
//! `/proc/<thread>/ns/net` on an empty file. Making one means being in it for a moment, and a thread of
//! the daemon that came back half-way would open later sockets in the wrong place. So all of it is done by
//! threads that are started for this and end afterwards.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};
use thiserror::Error;
use tokio::sync::oneshot;

use crate::turns::Turn;

/// Why a network namespace could not be made, entered or removed.
#[derive(Debug, Error)]
pub enum NetnsError {
    /// A system call or file operation failed.
    #[error("network namespace {}: cannot {step}", path.display())]
    Step {
        /// Where the namespace is, or was to be, mounted.
        path: PathBuf,
        /// What was tried, as a verb phrase.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is no namespace at this path: nothing, or a file that no namespace is mounted on.
    #[error("network namespace {}: nothing is mounted there", path.display())]
    Absent {
        /// The path.
        path: PathBuf,
    },
    /// The thread that did the work panicked.
    #[error("network namespace {}: the worker thread panicked", path.display())]
    WorkerPanicked {
        /// The namespace it worked in.
        path: PathBuf,
    },
}

/// Makes a namespace and mounts it at `path`. What a previous attempt left there is removed first.
pub(crate) async fn create(path: &Path, turn: &Turn) -> Result<(), NetnsError> {
    on_thread(path, Some(turn), create_here).await?
}

/// Unmounts and removes what is at `path`. Nothing there is success.
pub(crate) async fn remove(path: &Path, turn: &Turn) -> Result<(), NetnsError> {
    on_thread(path, Some(turn), remove_here).await?
}

/// Whether a namespace is mounted at `path`.
pub fn exists(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == NSFS_MAGIC)
}

/// Runs `work` on a thread of its own inside the namespace at `path`.
pub(crate) async fn run_inside<T, F>(path: &Path, turn: &Turn, work: F) -> Result<T, NetnsError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    on_thread(path, Some(turn), move |path| {
        enter(path)?;
        Ok(work())
    })
    .await?
}

/// Reads something inside the namespace at `path`, whoever else is at work there. `what` is a verb phrase for errors.
pub(crate) async fn read_inside<T, F>(path: &Path, what: &'static str, read: F) -> Result<T, NetnsError>
where
    T: Send + 'static,
    F: FnOnce() -> io::Result<T> + Send + 'static,
{
    on_thread(path, None, move |path| {
        enter(path)?;
        read().map_err(|e| step(path, what, e))
    })
    .await?
}

/// Moves the thread into the namespace at `path`.
fn enter(path: &Path) -> Result<(), NetnsError> {
    if !exists(path) {
        return Err(NetnsError::Absent { path: path.to_owned() });
    }
    let file = File::open(path).map_err(|e| step(path, "open it", e))?;
    setns(&file, CloneFlags::CLONE_NEWNET).map_err(|e| step(path, "enter it", e.into()))
}

/// A caller that stops waiting does not stop the work: the thread finishes by itself, and the turn with it.
async fn on_thread<T, F>(path: &Path, turn: Option<&Turn>, work: F) -> Result<T, NetnsError>
where
    T: Send + 'static,
    F: FnOnce(&Path) -> T + Send + 'static,
{
    let (sender, receiver) = oneshot::channel();
    let (owned, turn) = (path.to_owned(), turn.cloned());
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || {
            let done = work(&owned);
            drop(turn);
            // The caller may have gone; the work was done all the same.
            let _ = sender.send(done);
        })
        .map_err(|e| step(path, "start a thread", e))?;
    receiver.await.map_err(|_| NetnsError::WorkerPanicked { path: path.to_owned() })
}

fn create_here(path: &Path) -> Result<(), NetnsError> {
    remove_here(path)?;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(|e| step(path, "make its directory", e))?;
    }
    File::create_new(path).map_err(|e| step(path, "make its mount point", e))?;
    mount_new(path).inspect_err(|_| {
        // Nothing is mounted on the file yet, so removing it is all there is to undo.
        let _ = fs::remove_file(path);
    })
}

fn mount_new(path: &Path) -> Result<(), NetnsError> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|e| step(path, "unshare it", e.into()))?;
    mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|e| step(path, "mount it", e.into()))
}

fn remove_here(path: &Path) -> Result<(), NetnsError> {
    // A retry after a crash can have mounted twice: unmount until nothing is mounted.
    while exists(path) {
        umount2(path, MntFlags::MNT_DETACH).map_err(|e| step(path, "unmount it", e.into()))?;
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(step(path, "remove its mount point", e)),
        _ => Ok(()),
    }
}

fn step(path: &Path, step: &'static str, source: io::Error) -> NetnsError {
    NetnsError::Step { path: path.to_owned(), step, source }
}

#[cfg(test)]
mod tests {
    use a3s_box_core::BoxId;

    use super::*;
    use crate::turns::Turns;

    async fn turn() -> Turn {
        Turns::default().take(&BoxId::from_random([1; 32])).await
    }

    #[tokio::test]
    async fn removing_a_namespace_that_never_was_is_success() {
        let dir = tempfile::tempdir().unwrap();
        remove(&dir.path().join("none"), &turn().await).await.unwrap();
    }

    #[tokio::test]
    async fn a_plain_file_is_no_namespace_and_is_not_entered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        File::create(&path).unwrap();
        assert!(!exists(&path));
        assert!(matches!(run_inside(&path, &turn().await, || ()).await, Err(NetnsError::Absent { .. })));
    }
}
