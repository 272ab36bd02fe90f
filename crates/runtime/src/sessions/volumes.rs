//! Host files and directories as they are handed to a box.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;
use thiserror::Error;
use tokio::task::spawn_blocking;

use a3s_box_core::image::Layer;
use a3s_box_core::spec::{MountSource, MountSpec};
use a3s_box_protocol::SHARE_IMAGES;
use a3s_box_vmm::Attachment;

use super::request::{UnknownLayer, layer_name};
use crate::sources::{self, Asked, Wanted};

/// A host path that cannot be handed over.
#[derive(Debug, Error)]
pub(crate) enum VolumeError {
    #[error("the host path {} is not absolute", .0.display())]
    Relative(PathBuf),
    #[error(transparent)]
    Layer(#[from] UnknownLayer),
    #[error("the host path {} is {kind}: only files and folders can be shared with a box", path.display())]
    Kind { path: PathBuf, kind: &'static str },
    #[error("could not find out what the host's volumes are: {0}")]
    Identify(#[source] io::Error),
    #[error("could not {step} the host path {}: {source}", path.display())]
    Io {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The attachment of a layer's EROFS file.
pub(crate) async fn layer(layer: Layer) -> Result<Attachment, VolumeError> {
    let target = format!("{SHARE_IMAGES}/{}", layer_name(&layer)?);
    let source = on_disk(layer.erofs, open).await?;
    let (readonly, recursive_readonly, propagate, id_mapped) = (true, false, false, None);
    Ok(Attachment { source, target, readonly, recursive_readonly, propagate, id_mapped })
}

/// Finds what the mounts of a session come from on the host.
pub(crate) async fn find(mounts: &[MountSpec]) -> Result<Vec<Wanted>, VolumeError> {
    let mut opened = Vec::new();
    for (index, mount) in mounts.iter().enumerate() {
        match &mount.source {
            // An image's layers are the box's, shared by its sessions.
            MountSource::Tmpfs { .. } | MountSource::Image { .. } => {}
            MountSource::Host { path, propagate, recursive_readonly, id_mapped } => {
                let asked = Asked {
                    readonly: mount.readonly,
                    recursive_readonly: *recursive_readonly,
                    propagate: *propagate,
                    users: *id_mapped,
                };
                opened.push((index, on_disk(path.clone(), open_or_make).await?, asked));
            }
        }
    }
    match spawn_blocking(move || sources::find(opened)).await {
        Ok(found) => found.map_err(VolumeError::Identify),
        Err(aborted) => Err(VolumeError::Identify(io::Error::other(aborted))),
    }
}

/// Host paths may lie on slow or hanging file systems: they are walked on a blocking thread.
async fn on_disk(
    path: PathBuf,
    work: fn(&Path) -> Result<OwnedFd, VolumeError>,
) -> Result<OwnedFd, VolumeError> {
    let shown = path.clone();
    match spawn_blocking(move || work(&path)).await {
        Ok(result) => result,
        Err(aborted) => Err(VolumeError::Io { step: "open", path: shown, source: io::Error::other(aborted) }),
    }
}

/// Opens a volume with its symlinks resolved on the host; one that is missing becomes a directory, as
/// kubelet expects of a container runtime.
///
/// The kernel resolves the path in one go and what it found is what is handed over: there is no name left that
/// could come to mean something else.
fn open_or_make(path: &Path) -> Result<OwnedFd, VolumeError> {
    if !path.is_absolute() {
        return Err(VolumeError::Relative(path.to_owned()));
    }
    let opened = match resolve(path) {
        Err(Errno::NOENT) => {
            fs::create_dir_all(path).map_err(failed("make", path))?;
            resolve(path)
        }
        other => other,
    };
    let opened = opened.map_err(|error| failed("open", path)(error.into()))?;
    let mode = fstat(&opened).map_err(|error| failed("inspect", path)(error.into()))?.st_mode;
    let refused = |kind| Err(VolumeError::Kind { path: path.to_owned(), kind });
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile | FileType::Directory => Ok(opened),
        FileType::Socket => refused("a socket, which connects processes of one kernel"),
        FileType::Fifo => refused("a named pipe, which connects processes of one kernel"),
        FileType::CharacterDevice | FileType::BlockDevice => refused("a device of the node"),
        FileType::Symlink | FileType::Unknown => refused("of an unknown kind"),
    }
}

fn open(path: &Path) -> Result<OwnedFd, VolumeError> {
    resolve(path).map_err(|error| failed("open", path)(error.into()))
}

/// Links like /proc/self/fd/3 mean something of the daemon's own and are refused with ELOOP.
fn resolve(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Io { step, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_host_path_becomes_a_directory_and_a_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        open_or_make(&dir.path().join("a/b")).unwrap();
        assert!(dir.path().join("a/b").is_dir());
        std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
        let opened = open_or_make(&dir.path().join("link")).unwrap();
        let same = rustix::fs::fstat(&opened).unwrap().st_ino;
        assert_eq!(same, rustix::fs::stat(dir.path().join("a")).unwrap().st_ino);
    }

    #[test]
    fn what_the_guest_could_not_use_or_is_the_daemons_own_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        rustix::fs::mkfifoat(CWD, at("pipe"), Mode::RUSR).unwrap();
        for (path, word) in
            [(at("socket"), "a socket"), (at("pipe"), "a named pipe"), ("/dev/null".into(), "a device")]
        {
            let error = open_or_make(&path).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(path.to_str().unwrap()), "{error}");
        }
        assert!(matches!(open_or_make(Path::new("/proc/self/fd/0")), Err(VolumeError::Io { .. })));
        std::fs::write(at("file"), "").unwrap();
        assert!(open_or_make(&at("file")).is_ok());
        assert!(matches!(open_or_make(&at("file/below")), Err(VolumeError::Io { .. })));
    }

    #[test]
    fn a_relative_path_is_refused() {
        assert!(matches!(open_or_make(Path::new("x")), Err(VolumeError::Relative(_))));
    }
}
