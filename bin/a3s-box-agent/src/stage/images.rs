//! Images that are mounted as volumes.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use a3s_box_protocol::proto::ImageVolume;
use rustix::fs::{Mode, OFlags};
use rustix::mount::UnmountFlags;

use super::error::StageError;
use super::filesystem::{Attributes, make};
use super::tree::{Tree, attach, bind};
use crate::paths;
use crate::session::layers::place;

/// The detached mount of an image's files, or of what lies at its sub path.
pub fn open(image: &ImageVolume, target: &str, directory: &str) -> Result<OwnedFd, StageError> {
    let fail =
        |step: &'static str| move |source| StageError::Mount { target: target.to_owned(), step, source };
    let whole = stack(&image.layers).map_err(fail("stack the image's layers"))?;
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

/// A single layer is stacked too: by itself it would show the marks of files that it deletes.
fn stack(layers: &[String]) -> io::Result<OwnedFd> {
    if layers.is_empty() {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        return bind(rustix::fs::open(paths::EMPTY, flags, Mode::empty())?, false);
    }
    // The wire has the lowest layer first, overlay the highest.
    let places: Vec<String> = layers.iter().rev().map(|name| place(name)).collect();
    let mut options: Vec<(&str, Option<&str>)> =
        places.iter().map(|place| ("lowerdir+", Some(place.as_str()))).collect();
    if options.len() == 1 {
        // An overlay that cannot be written needs two.
        options.push(("lowerdir+", Some(paths::EMPTY)));
    }
    options.push(("source", Some("overlay")));
    make("overlay", &options, Attributes::MOUNT_ATTR_RDONLY)
}
