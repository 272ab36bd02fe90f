//! Directories that an image declares as volumes: each session gets them anew on the scratch disk, with what the
//! image has there.
//!
//! Their contents are copied while the root holds nothing but the image, and they are mounted among the session's
//! own mounts: one that lies below another is mounted after it, whoever asked for which.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::copy;
use super::error::StageError;
use super::tree::{Node, Tree, attach, bind, kind_of};
use crate::paths;

/// Where the kernel's file systems are: nothing of an image is seen there.
const KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Volumes that are filled and not mounted yet, outer ones first.
#[derive(Debug, Default)]
pub struct Pending(VecDeque<Volume>);

#[derive(Debug)]
struct Volume {
    /// Where it goes, links of the image followed.
    path: String,
    directory: OwnedFd,
}

/// Fills a directory for each volume that no mount of the session replaces. `directory` is the session's on the
/// scratch disk; `tree` shows the image alone.
pub fn fill<'a>(
    tree: &Tree,
    declared: &[String],
    mounts: impl Iterator<Item = &'a str>,
    directory: &str,
) -> Result<Pending, StageError> {
    let fail = |path: &str, step| {
        let target = path.to_owned();
        move |source| StageError::Mount { target, step, source }
    };
    let mut taken: Vec<String> = mounts.map(|target| resolved(tree, target)).collect();
    let mut wanted: Vec<String> = Vec::new();
    for path in declared.iter().map(|path| resolved(tree, path)) {
        if path != "/" && !of_the_kernel(&path) && !taken.contains(&path) {
            taken.push(path.clone());
            wanted.push(path);
        }
    }
    wanted.sort_by_key(|path| path.matches('/').count());
    let mut pending = Pending::default();
    let volumes = Path::new(directory).join("volumes");
    for (index, path) in wanted.into_iter().enumerate() {
        let place = volumes.join(index.to_string());
        std::fs::create_dir_all(&place).map_err(fail(&path, "make a directory for the image's volume"))?;
        if copy_image(tree, &path, &place).map_err(fail(&path, "copy what the image has in its volume"))? {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened = rustix::fs::open(&place, flags, Mode::empty());
            let directory = opened.map_err(|e| fail(&path, "open the image's volume")(e.into()))?;
            pending.0.push_back(Volume { path, directory });
        }
    }
    Ok(pending)
}

/// Answers whether the path can be a directory.
fn copy_image(tree: &Tree, path: &str, place: &Path) -> io::Result<bool> {
    let found = match tree.find(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            rustix::fs::chmod(place, Mode::from_raw_mode(0o755))?;
            if let Some(owner) = tree.owner() {
                rustix::fs::chown(place, Some(owner.uid), Some(owner.gid))?;
            }
            return Ok(true);
        }
        // Below a file.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(false),
        Err(error) => return Err(error),
    };
    if kind_of(&found)? != rustix::fs::FileType::Directory {
        return Ok(false);
    }
    copy::directory(&reachable(&found), place)?;
    Ok(true)
}

impl Pending {
    /// Mounts those that a mount at `target` would otherwise come under.
    pub fn attach_above(&mut self, tree: &Tree, target: &str) -> Result<(), StageError> {
        let target = resolved(tree, target);
        let (above, rest) = std::mem::take(&mut self.0).into_iter().partition(|v| lies_in(&target, &v.path));
        self.0 = rest;
        above.into_iter().try_for_each(|volume: Volume| volume.attach(tree))
    }

    /// Mounts the rest.
    pub fn attach(self, tree: &Tree) -> Result<(), StageError> {
        self.0.into_iter().try_for_each(|volume| volume.attach(tree))
    }
}

impl Volume {
    fn attach(self, tree: &Tree) -> Result<(), StageError> {
        // A link of the image may have led to nothing before the kernel's file systems were there.
        if of_the_kernel(&resolved(tree, &self.path)) {
            return Ok(());
        }
        bind(self.directory.as_fd(), false)
            .and_then(|copy| attach(copy, tree.find_or_make(&self.path, Node::Directory)?))
            .map_err(|source| StageError::Mount {
                target: self.path,
                step: "attach the image's volume",
                source,
            })
    }
}

fn of_the_kernel(path: &str) -> bool {
    KERNEL.iter().any(|above| lies_in(path, above))
}

/// Whether an absolute path is `above` or below it.
fn lies_in(path: &str, above: &str) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A path with the links in what exists of it followed, inside the root.
fn resolved(tree: &Tree, path: &str) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    for known in (0..=names.len()).rev() {
        let Ok(found) = tree.find(&names[..known].join("/")) else { continue };
        let Ok(real) = std::fs::read_link(reachable(&found)) else { continue };
        let Some(real) = real.to_str().and_then(|real| real.strip_prefix(paths::ROOTFS)) else { continue };
        let rest = names[known..].iter().map(|name| format!("/{name}")).collect::<String>();
        let whole = format!("{}{rest}", real.trim_end_matches('/'));
        return if whole.is_empty() { "/".to_owned() } else { whole };
    }
    format!("/{}", names.join("/"))
}

/// The name by which an open path can be given to calls that want one.
fn reachable(file: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}
