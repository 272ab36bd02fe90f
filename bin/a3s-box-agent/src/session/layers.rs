//! The image layers of a box: each EROFS file of the share is mounted once and used by any number of sessions.

use std::collections::{HashMap, HashSet};
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

/// A stack of layers as overlayfs takes it: the highest first, and of equal layers the topmost only. Images list the
/// lowest first, and may list one layer twice: two equal COPYs are enough. The kernel refuses that with ELOOP.
///
/// Leaving out the lower one of two equal layers changes nothing. Let A be that layer, and say that a layer takes part
/// in a directory if it has it and nothing above cut it off (a file, a whiteout, or an opaque directory on the way).
/// By induction over the path: wherever the lower A takes part, the upper A does too, because it has the same
/// directory and fewer layers above it that could cut it off. For a name in such a directory, if A does not have it,
/// neither A says anything. If it is a file, a whiteout or an opaque directory in A, the search ends at the upper A or
/// above it. If it is a plain directory, the lower A only adds its names to those of layers above it, and the
/// same holds for each of these; owner and mode are those of the topmost directory, which is never the lower A's.
pub fn stack(layers: &[String]) -> Vec<&str> {
    let mut known = HashSet::new();
    layers.iter().rev().map(String::as_str).filter(|layer| known.insert(*layer)).collect()
}

/// All layers that a session needs, each once: those of its root file system, then those of its volumes.
pub fn names(request: &CreateSessionRequest) -> Vec<String> {
    let volumes = request.mounts.iter().filter_map(|mount| match &mount.source {
        Some(Source::Image(image)) => Some(&image.layers),
        Some(Source::PodVolume(_) | Source::PodVolumePart(_) | Source::TmpfsBytes(_)) | None => None,
    });
    let mut known = HashSet::new();
    let all = request.rootfs.iter().map(|rootfs| &rootfs.layers).chain(volumes).flatten();
    all.filter(|name| known.insert(*name)).cloned().collect()
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    /// What a layer has under a name.
    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Node {
        File(u8),
        Whiteout,
        Directory(Directory),
    }

    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Directory {
        mode: u8,
        opaque: bool,
        names: BTreeMap<u8, Node>,
    }

    /// What overlayfs shows under a name.
    #[derive(Debug, PartialEq, Eq)]
    enum Shown {
        File(u8),
        Directory(u8, BTreeMap<u8, Shown>),
    }

    /// The directories of one path, topmost first, as overlayfs merges them (fs/overlayfs/namei.c).
    fn merge(directories: &[&Directory]) -> BTreeMap<u8, Shown> {
        let names: BTreeSet<u8> = directories.iter().flat_map(|d| d.names.keys().copied()).collect();
        names.into_iter().filter_map(|name| Some((name, look_up(directories, name)?))).collect()
    }

    fn look_up(directories: &[&Directory], name: u8) -> Option<Shown> {
        let mut found: Vec<&Directory> = Vec::new();
        for node in directories.iter().filter_map(|directory| directory.names.get(&name)) {
            match node {
                Node::File(content) if found.is_empty() => return Some(Shown::File(*content)),
                Node::File(_) | Node::Whiteout => break,
                Node::Directory(directory) => found.push(directory),
            }
            if found.last().is_some_and(|directory| directory.opaque) {
                break;
            }
        }
        found.first().map(|top| Shown::Directory(top.mode, merge(&found)))
    }

    fn directory() -> impl Strategy<Value = Directory> {
        let leaf = prop_oneof![any::<u8>().prop_map(Node::File), Just(Node::Whiteout)];
        let node = leaf.prop_recursive(3, 24, 3, |inner| inside(inner).prop_map(Node::Directory));
        // The root is never opaque: nothing is below its own layers.
        inside(node).prop_map(|root| Directory { opaque: false, ..root })
    }

    fn inside(node: impl Strategy<Value = Node>) -> impl Strategy<Value = Directory> {
        let names = proptest::collection::btree_map(0..3_u8, node, 0..4);
        (0..4_u8, any::<bool>(), names).prop_map(|(mode, opaque, names)| Directory { mode, opaque, names })
    }

    proptest! {
        /// An image that had one layer twice could not be mounted.
        #[test]
        fn the_topmost_of_equal_layers_shows_what_all_of_them_show(
            layers in proptest::collection::vec(directory(), 1..4),
            order in proptest::collection::vec(0..3_usize, 1..7),
        ) {
            let names: Vec<String> = order.iter().map(|index| (index % layers.len()).to_string()).collect();
            let of = |name: &str| &layers[name.parse::<usize>().unwrap()];
            let all: Vec<&Directory> = names.iter().rev().map(|name| of(name)).collect();
            let once = stack(&names);
            prop_assert_eq!(once.iter().collect::<BTreeSet<_>>().len(), once.len());
            let once: Vec<&Directory> = once.into_iter().map(of).collect();
            prop_assert_eq!(merge(&once), merge(&all));
        }
    }
}
