//! One instance per directory: two that share state would reconcile each other's boxes away.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;

const FILE: &str = "lock";

/// A directory that cannot be taken.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another instance has it.
    #[error(
        "{} belongs to a running instance ({}); stop that one, or give this one directories of its own with \
         --root and --run-dir",
        dir.display(),
        holder(.pid)
    )]
    Taken {
        /// The directory.
        dir: PathBuf,
        /// Who wrote itself into the lock file.
        pid: Option<i32>,
    },
    /// The lock file cannot be used.
    #[error("could not {step} {}: {source}", path.display())]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// The operating system's word.
        #[source]
        source: std::io::Error,
    },
}

fn holder(pid: &Option<i32>) -> String {
    match pid {
        Some(pid) => format!("process {pid}"),
        None => "unknown process".to_owned(),
    }
}

/// A directory that is ours until this is dropped or the process ends.
#[derive(Debug)]
pub struct InstanceLock {
    _file: Flock<File>,
}

impl InstanceLock {
    /// Makes the directory (readable by nobody else) and takes it. Does not wait.
    pub fn take(dir: &Path) -> Result<Self, LockError> {
        match Flock::lock(Self::open(dir)?, FlockArg::LockExclusiveNonblock) {
            Ok(file) => Self::sign(file, dir),
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                let mut text = String::new();
                let _ = file.read_to_string(&mut text);
                Err(LockError::Taken { dir: dir.to_path_buf(), pid: text.trim().parse().ok() })
            }
            Err((_, errno)) => {
                Err(LockError::Io { step: "lock", path: dir.join(FILE), source: errno.into() })
            }
        }
    }

    /// As [`InstanceLock::take`], but blocks until the directory is free: for holders that keep it for moments.
    pub fn wait(dir: &Path) -> Result<Self, LockError> {
        match Flock::lock(Self::open(dir)?, FlockArg::LockExclusive) {
            Ok(file) => Self::sign(file, dir),
            Err((_, errno)) => {
                Err(LockError::Io { step: "lock", path: dir.join(FILE), source: errno.into() })
            }
        }
    }

    fn open(dir: &Path) -> Result<File, LockError> {
        make_private_dir(dir)?;
        let path = dir.join(FILE);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        file.map_err(|source| LockError::Io { step: "open", path, source })
    }

    /// Writes our process id into the file, for whoever finds the directory taken.
    fn sign(mut file: Flock<File>, dir: &Path) -> Result<Self, LockError> {
        let signed = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        match signed {
            Ok(()) => Ok(Self { _file: file }),
            Err(source) => Err(LockError::Io { step: "write", path: dir.join(FILE), source }),
        }
    }
}

/// Makes a directory and its parents; the directory itself is for its owner only, since what lies in it belongs to
/// pods. An existing one keeps its mode.
pub fn make_private_dir(dir: &Path) -> Result<(), LockError> {
    use std::os::unix::fs::DirBuilderExt;
    let io = |step, path: &Path| {
        let path = path.to_path_buf();
        move |source| LockError::Io { step, path, source }
    };
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent).map_err(io("make the directory", parent))?;
    }
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(io("make the directory", dir)(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_instance_is_told_who_has_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("deep/root");
        let lock = InstanceLock::take(&root).unwrap();
        match InstanceLock::take(&root).unwrap_err() {
            LockError::Taken { pid, .. } => assert_eq!(pid, Some(std::process::id() as i32)),
            other => panic!("{other}"),
        }
        drop(lock);
        InstanceLock::take(&root).unwrap();
    }
}
