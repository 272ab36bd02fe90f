//! Images that are mounted as volumes.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use a3s_box_protocol::proto::ImageVolume;
use rustix::fs::{Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::error::StageError;
use super::filesystem::{Attributes, make};
use super::tree::{Tree, attach, bind};
use crate::paths;
use crate::session::layers;

/// The detached mount of an image's files, or of what lies at its sub path.
pub fn open(image: &ImageVolume, target: &str, directory: &str) -> Result<OwnedFd, StageError> {
    let fail =
        |step: &'static str| move |source| StageError::Mount { target: target.to_owned(), step, source };
    let whole = stack(&image.layers, directory).map_err(fail("stack the image's layers"))?;
    if image.sub_path.is_empty() {
        return Ok(whole);
    }
    // Only what is attached can be copied in part.
    let place = format!("{directory}/volume");
    let tree = show(&whole, &place).map_err(fail("attach the image"))?;
    let part = tree.find(&image.sub_path).and_then(|found| bind(found, true)).map_err(|source| {
        StageError::SubPath { target: target.to_owned(), sub_path: image.sub_path.clone(), source }
    })?;
    rustix::mount::unmount(place.as_str(), UnmountFlags::DETACH)
        .map_err(|error| fail("take the image away")(error.into()))?;
    Ok(part)
}

fn show(whole: &OwnedFd, place: &str) -> io::Result<Tree> {
    match fs::create_dir(place) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    attach(whole, Tree::open(place)?.root())?;
    Tree::open(place)
}

/// The mark by which the host tells which layers say whose the root directory is; the others have one too.
const ROOT_MARK: &str = "trusted.overlay.a3s-root";

/// The topmost of some mounted layers, highest first, that states its root, and how.
pub fn stated_root(layers: &[&str]) -> io::Result<Option<(usize, Stat)>> {
    for (index, layer) in layers.iter().enumerate() {
        match rustix::fs::lgetxattr_query(*layer, ROOT_MARK) {
            Ok(_) => return Ok(Some((index, rustix::fs::lstat(*layer)?))),
            Err(Errno::NODATA | Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Gives a directory that we made the owner and mode of another.
pub fn give(directory: &str, like: &Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
    rustix::fs::chown(directory, Some(uid), Some(gid))?;
    Ok(rustix::fs::chmod(directory, Mode::from_raw_mode(like.st_mode & 0o7777))?)
}

/// A single layer is stacked too: by itself it would show the marks of files that it deletes.
fn stack(names: &[String], directory: &str) -> io::Result<OwnedFd> {
    if names.is_empty() {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        return bind(rustix::fs::open(paths::EMPTY, flags, Mode::empty())?, false);
    }
    let mut places: Vec<String> = layers::stack(names).into_iter().map(layers::place).collect();
    let stated = stated_root(&places.iter().map(String::as_str).collect::<Vec<_>>())?;
    if let Some((1.., root)) = stated {
        // The root is the topmost layer's, which does not say whose it is.
        let top = new_directory(directory)?;
        give(&top, &root)?;
        places.insert(0, top);
    }
    let mut options: Vec<(&str, Option<&str>)> =
        places.iter().map(|place| ("lowerdir+", Some(place.as_str()))).collect();
    if options.len() == 1 {
        // An overlay that cannot be written needs two.
        options.push(("lowerdir+", Some(paths::EMPTY)));
    }
    options.push(("source", Some("overlay")));
    make("overlay", &options, Attributes::MOUNT_ATTR_RDONLY)
}

/// One that no other volume has.
fn new_directory(parent: &str) -> io::Result<String> {
    for index in 0_usize.. {
        let path = format!("{parent}/root-{index}");
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}
