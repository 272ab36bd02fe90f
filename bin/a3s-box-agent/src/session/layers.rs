//! The image layers of a box: each EROFS file of the share is mounted once and used by any number of sessions.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use a3s_box_protocol::proto::{CreateSessionRequest, mount::Source};
use rustix::mount::{MountFlags, UnmountFlags};
use thiserror::Error;

use crate::paths;

/// A layer that cannot be mounted.
#[derive(Debug, Error)]
pub enum LayerError {
    /// A name that could lead elsewhere.
    #[error("layer name {name:?} is no plain file name")]
    Name {
        /// As the host gave it.
        name: String,
    },
    /// It is not on the share, or no EROFS.
    #[error("layer {name}: {step}: {source}")]
    Mount {
        /// File on the share.
        name: String,
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Mounted layers and how many sessions use each.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    users: Arc<Mutex<HashMap<String, usize>>>,
}

/// The right to use some layers. They are unmounted when the last lease of each is dropped.
#[derive(Debug)]
pub struct Lease {
    layers: Layers,
    names: Vec<String>,
}

impl Layers {
    /// Mounts what is not mounted yet. Blocks on the share.
    pub fn acquire(&self, names: &[String]) -> Result<Lease, LayerError> {
        // Dropping it gives back what was acquired before an error.
        let mut lease = Lease { layers: self.clone(), names: Vec::with_capacity(names.len()) };
        for name in names {
            self.acquire_one(name)?;
            lease.names.push(name.clone());
        }
        Ok(lease)
    }

    fn acquire_one(&self, name: &str) -> Result<(), LayerError> {
        if name.is_empty() || name.contains('/') || name.starts_with('.') || name.len() > 255 {
            return Err(LayerError::Name { name: name.chars().take(80).collect() });
        }
        let mut users = self.users.lock().expect("nobody panics under this lock");
        if !users.contains_key(name) {
            mount(name)?;
        }
        *users.entry(name.to_owned()).or_default() += 1;
        Ok(())
    }

    fn release_one(&self, name: &str) {
        let mut users = self.users.lock().expect("nobody panics under this lock");
        let Some(count) = users.get_mut(name) else { return };
        *count -= 1;
        if *count == 0 {
            users.remove(name);
            // Detached: a stage that is just starting may still have a copy of the mount, and loses it on its way.
            let _ = rustix::mount::unmount(place(name), UnmountFlags::DETACH);
            let _ = std::fs::remove_dir(place(name));
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.names.iter().for_each(|n| self.layers.release_one(n));
    }
}

/// All layers that a session needs: those of its root file system, then those of its volumes.
pub fn names(request: &CreateSessionRequest) -> Vec<String> {
    let volumes = request.mounts.iter().filter_map(|mount| match &mount.source {
        Some(Source::Image(image)) => Some(&image.layers),
        Some(Source::PodVolume(_) | Source::PodVolumePart(_) | Source::TmpfsBytes(_)) | None => None,
    });
    request.rootfs.iter().map(|rootfs| &rootfs.layers).chain(volumes).flatten().cloned().collect()
}

/// Where a layer is mounted while somebody has a lease of it.
pub fn place(name: &str) -> String {
    format!("{}/{name}", paths::LAYERS)
}

fn mount(name: &str) -> Result<(), LayerError> {
    let fail = |step: &'static str| move |source| LayerError::Mount { name: name.to_owned(), step, source };
    let place = place(name);
    match std::fs::create_dir(&place) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(fail("make the mount point")(error));
        }
        _ => {}
    }
    let source = Path::new(paths::IMAGES).join(name);
    rustix::mount::mount(&source, &place, "erofs", MountFlags::RDONLY, None)
        .map_err(|e| fail("mount its EROFS file from the share")(e.into()))
}
