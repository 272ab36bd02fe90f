//! Garbage collection runs alone: no ADD and no DEL while a GC runs (specification 1.1, "Lifecycle & Ordering").
//!
//! A lock on a file, because every `a3s-box run` of the host uses the plugins that the daemon uses. ADD and DEL share
//! it and wait while a GC has it, whose time is bounded. GC takes it when it is free and never queues for it:
//! behind a GC that queues for a DEL that is stuck, every other pod would be stuck too.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(20);
/// Longer than any GC may take, so that one which is stopped holds up nobody for good.
const PATIENCE: Duration = Duration::from_secs(60);

/// The lock of all instances of the host.
#[derive(Debug, Clone)]
pub(crate) struct Exclusion {
    path: PathBuf,
}

/// The right to run plugins; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Pass {
    _locked: File,
}

impl Exclusion {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// For ADD and DEL: waits while a GC runs. Where no lock can be had, no GC can either, and pods go first.
    pub(crate) async fn share(&self) -> Option<Pass> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_lock(File::try_lock_shared) {
                Ok(Some(pass)) => return Some(pass),
                Ok(None) if Instant::now() < deadline => tokio::time::sleep(POLL).await,
                Ok(None) => {
                    let path = self.path.display();
                    tracing::warn!(%path, limit = ?PATIENCE, "a CNI garbage collection does not end: it is not waited for");
                    return None;
                }
                Err(error) => {
                    tracing::warn!(path = %self.path.display(), %error, "CNI plugins run without a lock against garbage collection");
                    return None;
                }
            }
        }
    }

    /// For GC: `None` while anybody else runs plugins.
    pub(crate) fn alone(&self) -> io::Result<Option<Pass>> {
        self.try_lock(File::try_lock)
    }

    fn try_lock(&self, lock: fn(&File) -> Result<(), TryLockError>) -> io::Result<Option<Pass>> {
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir)?;
        }
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&self.path)?;
        match lock(&file) {
            Ok(()) => Ok(Some(Pass { _locked: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_collection_waits_for_nobody_and_everybody_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let exclusion = Exclusion::new(dir.path().join("not/yet/there"));
        let (one, other) = (exclusion.share().await.unwrap(), exclusion.share().await.unwrap());
        assert!(exclusion.alone().unwrap().is_none());
        drop((one, other));
        let collecting = exclusion.alone().unwrap().unwrap();
        assert!(exclusion.alone().unwrap().is_none());
        tokio::time::timeout(Duration::from_millis(100), exclusion.share()).await.unwrap_err();
        drop(collecting);
        assert!(exclusion.share().await.is_some());
    }

    #[tokio::test]
    async fn pods_are_connected_where_no_lock_can_be_had() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let exclusion = Exclusion::new(dir.path().join("file/lock"));
        assert!(exclusion.share().await.is_none());
        assert!(exclusion.alone().is_err());
    }
}
