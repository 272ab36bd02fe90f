//! The volumes of a box: each is one file system, shown by any number of sessions.
//!
//! A directory that the host mounted in the share is mounted in the guest by whoever first walks into it, in that one's
//! mount namespace, and each such mount is a file system of its own, with its own inodes, locks and pages. So the agent walks
//! in first, in its own namespace, of which every session's begins as a copy: what a session finds there is the same file
//! system. The agent's mount goes when the last session is deleted that has the volume; else the host's file server would
//! keep the volume in use.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use a3s_box_protocol::proto::{CreateSessionRequest, mount::Source};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use thiserror::Error;

use crate::paths;

/// A volume that is not on the share, or not to be had.
#[derive(Debug, Error)]
#[error("volume {name}: open the volume on the share: {source}")]
pub struct VolumeError {
    /// As the host gave it.
    name: String,
    /// Why not.
    #[source]
    source: io::Error,
}

/// Volumes and how many leases of each there are.
#[derive(Debug, Clone, Default)]
pub struct Volumes {
    leases: Arc<Mutex<Counts>>,
}

/// The right to show some volumes. The agent's mount of each goes with its last lease.
#[derive(Debug)]
pub struct Lease {
    volumes: Volumes,
    names: Vec<String>,
}

impl Volumes {
    /// Mounts what is not mounted yet. Blocks on the share.
    pub fn acquire(&self, names: &[String]) -> Result<Lease, VolumeError> {
        // Dropping it gives back what was acquired before an error.
        let mut lease = Lease { volumes: self.clone(), names: Vec::with_capacity(names.len()) };
        for name in names {
            // Counted first: from here on nobody takes it away. The share may let us wait, so nothing is locked meanwhile.
            self.leases.lock().expect("nobody panics under this lock").add(name);
            lease.names.push(name.clone());
            open(name).map_err(|source| VolumeError { name: name.chars().take(80).collect(), source })?;
        }
        Ok(lease)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Under the lock to the end: who counts a new lease after it finds the mount gone, and makes another.
        let mut leases = self.volumes.leases.lock().expect("nobody panics under this lock");
        for name in self.names.iter().filter(|name| leases.remove(name)) {
            // A file is no mount, and that is all that could be wrong.
            let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            let _ = rustix::mount::unmount(format!("{}/{name}", paths::VOLUMES), flags);
        }
    }
}

#[derive(Debug, Default)]
struct Counts(HashMap<String, usize>);

impl Counts {
    fn add(&mut self, name: &str) {
        *self.0.entry(name.to_owned()).or_default() += 1;
    }

    /// Whether it was the last one.
    fn remove(&mut self, name: &str) -> bool {
        let Some(count) = self.0.get_mut(name) else { return false };
        *count -= 1;
        if *count > 0 {
            return false;
        }
        self.0.remove(name);
        true
    }
}

/// The volumes that a session shows, one entry for each of its mounts.
pub fn names(request: &CreateSessionRequest) -> Vec<String> {
    let volumes = request.mounts.iter().filter_map(|mount| match &mount.source {
        Some(Source::PodVolume(name)) => Some(name),
        Some(Source::PodVolumePart(part)) => Some(&part.name),
        Some(Source::Image(_) | Source::TmpfsBytes(_)) | None => None,
    });
    volumes.cloned().collect()
}

/// Opens the root of a volume, which mounts it where it is a directory.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let volumes = rustix::fs::open(paths::VOLUMES, flags | OFlags::DIRECTORY, Mode::empty())?;
    // The name is the host's, but it must be one.
    if name.contains('/') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let open = |flags| {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(&volumes, name, flags, Mode::empty(), resolve)
    };
    // Only who asks for a directory is let into the mount.
    match open(flags | OFlags::DIRECTORY) {
        Err(Errno::NOTDIR) => Ok(open(flags)?),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use a3s_box_protocol::proto::{Mount, PodVolumePart};

    use super::*;

    #[test]
    fn a_volume_goes_with_the_last_of_its_leases() {
        let mut counts = Counts::default();
        for name in ["a", "b", "a"] {
            counts.add(name);
        }
        assert_eq!(["a", "b", "a", "a"].map(|name| counts.remove(name)), [false, true, true, false]);
    }

    #[test]
    fn wholes_and_parts_are_leases_of_the_same_volume() {
        let mount = |source| Mount { source: Some(source), ..Mount::default() };
        let part = PodVolumePart { name: "v".to_owned(), sub_path: "x".to_owned() };
        let mounts = [
            mount(Source::PodVolume("v".to_owned())),
            mount(Source::TmpfsBytes(0)),
            mount(Source::PodVolumePart(part)),
        ];
        let request = CreateSessionRequest { mounts: mounts.to_vec(), ..Default::default() };
        assert_eq!(names(&request), ["v", "v"]);
    }
}
