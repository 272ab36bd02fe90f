//! Scratch disks: one sparse ext4 image per box, copied from a template of its size.
//!
//! A template is made once per size by the host's mkfs.ext4 and renamed into place whole. Its copy shares the
//! blocks where the file system can (FICLONE), else only the few hundred KiB that hold data are
//! copied. The disk ends with its box, so it has no journal; its inode tables are holes, which read as
//! zeros, so the guest's kernel need not clear them in the background.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;
use thiserror::Error;
use tokio::task::spawn_blocking;

use a3s_box_core::BoxId;

/// Part of the templates' names; raised when [`MKFS_OPTIONS`] change.
const FORMAT: u32 = 1;

const MKFS_OPTIONS: &[&str] = &[
    "-q",
    "-F",
    "-b",
    "4096",
    "-m",
    "0",
    "-i",
    "16384",
    "-O",
    "^has_journal,^resize_inode,^metadata_csum,sparse_super2",
    "-E",
    "assume_storage_prezeroed=1,lazy_itable_init=1,nodiscard,packed_meta_blocks=1,root_owner=0:0",
];

/// Where mkfs.ext4 is looked for after the PATH: services often run without the sbin directories.
const SBIN: [&str; 4] = ["/sbin", "/usr/sbin", "/usr/local/sbin", "/usr/bin"];

/// A scratch disk that could not be made.
#[derive(Debug, Error)]
pub(crate) enum ScratchError {
    #[error("mkfs.ext4 is not installed; install the package e2fsprogs")]
    NoMkfs,
    #[error("mkfs.ext4 failed on {}: {output}", path.display())]
    Mkfs { path: PathBuf, output: String },
    #[error("could not {step} {}: {source}", path.display())]
    Io {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the work was not finished: {0}")]
    Aborted(#[from] tokio::task::JoinError),
}

impl ScratchError {
    /// Whether the node is out of space.
    pub(crate) fn is_full(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::NoMkfs | Self::Mkfs { .. } | Self::Aborted(_) => false,
        }
    }
}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ScratchError {
    let path = path.to_owned();
    move |source| ScratchError::Io { step, path, source }
}

/// Where the disk of a box lies.
pub(crate) fn disk_of(state_dir: &Path, id: &BoxId) -> PathBuf {
    state_dir.join("boxes").join(id.as_str()).join("scratch.img")
}

/// Makes scratch disks below a directory of templates.
#[derive(Debug, Clone)]
pub(crate) struct Scratches {
    templates: PathBuf,
}

impl Scratches {
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self { templates: state_dir.join("scratch-templates") }
    }

    /// Makes a disk of `mib` MiB at `target`, whose directory exists.
    pub(crate) async fn make(&self, mib: u64, target: PathBuf) -> Result<(), ScratchError> {
        let templates = self.templates.clone();
        spawn_blocking(move || copy(&template(&templates, mib)?, &target)).await?
    }
}

/// The template of a size, made if need be. Two makers at once both succeed; the later rename wins.
fn template(templates: &Path, mib: u64) -> Result<PathBuf, ScratchError> {
    let path = templates.join(format!("ext4-v{FORMAT}-{mib}mib.img"));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(templates).map_err(io_error("make the directory", templates))?;
    let unfinished =
        templates.join(format!(".ext4-{mib}-{}-{:?}", std::process::id(), std::thread::current().id()));
    let made = format(&unfinished, mib)
        .and_then(|()| fs::rename(&unfinished, &path).map_err(io_error("rename the template to", &path)));
    if made.is_err() {
        // The error to tell is the first one.
        fs::remove_file(&unfinished).ok();
    }
    made.map(|()| path)
}

fn format(path: &Path, mib: u64) -> Result<(), ScratchError> {
    let file = private(path).map_err(io_error("make", path))?;
    file.set_len(mib * 1024 * 1024).map_err(io_error("size", path))?;
    let mkfs = find_mkfs().ok_or(ScratchError::NoMkfs)?;
    let output = Command::new(mkfs)
        .args(MKFS_OPTIONS)
        .arg(path)
        .env("MKE2FS_CONFIG", "/dev/null")
        .output()
        .map_err(io_error("run mkfs.ext4 on", path))?;
    if !output.status.success() {
        let output = crate::text::printable(&String::from_utf8_lossy(&output.stderr), 500);
        return Err(ScratchError::Mkfs { path: path.to_owned(), output });
    }
    file.sync_all().map_err(io_error("sync", path))
}

fn find_mkfs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SBIN.iter().map(PathBuf::from))
        .map(|directory| directory.join("mkfs.ext4"))
        .find(|candidate| candidate.is_file())
}

/// A new file that only its owner can read: it will hold a tenant's data.
fn private(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)
}

fn copy(template: &Path, target: &Path) -> Result<(), ScratchError> {
    let from = File::open(template).map_err(io_error("open the template", template))?;
    let to = private(target).map_err(io_error("make", target))?;
    match ioctl_ficlone(&to, &from) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
            sparse_copy(&from, &to).map_err(io_error("copy the template to", target))
        }
        Err(error) => Err(io_error("clone the template to", target)(error.into())),
    }
}

fn sparse_copy(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; 1024 * 1024];
    let mut at = 0;
    while at < length {
        let start = match seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data after this.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(start))?;
        copy_range(from, to, start..end, &mut buffer)?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, range: std::ops::Range<u64>, buffer: &mut [u8]) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let want = buffer.len().min((range.end - at) as usize);
        from.read_exact_at(&mut buffer[..want], at)?;
        to.write_all_at(&buffer[..want], at)?;
        at += want as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn a_disk_is_sparse_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let scratches = Scratches::new(dir.path());
        let target = dir.path().join("scratch.img");
        scratches.make(1024, target.clone()).await.unwrap();
        let meta = fs::metadata(&target).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o777), (1024 * 1024 * 1024, 0o600));
        assert!(meta.blocks() * 512 < 4 * 1024 * 1024, "{} blocks", meta.blocks());
        let check = Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&target).output().unwrap();
        assert!(check.status.success(), "{check:?}");
    }

    #[tokio::test]
    async fn the_second_disk_of_a_size_needs_no_mkfs_and_no_leftovers_stay() {
        let dir = tempfile::tempdir().unwrap();
        let scratches = Scratches::new(dir.path());
        let makers = (0..4).map(|n| scratches.make(64, dir.path().join(format!("disk-{n}"))));
        for made in futures::future::join_all(makers).await {
            made.unwrap();
        }
        let templates: Vec<_> = fs::read_dir(dir.path().join("scratch-templates")).unwrap().collect();
        assert_eq!(templates.len(), 1, "{templates:?}");
        let template = templates[0].as_ref().unwrap().path();
        fs::write(&template, b"a template that was marked").unwrap();
        scratches.make(64, dir.path().join("disk-4")).await.unwrap();
        assert_eq!(fs::read(dir.path().join("disk-4")).unwrap(), b"a template that was marked");
    }

    #[tokio::test]
    async fn a_missing_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("missing/disk");
        let error = Scratches::new(dir.path()).make(64, target.clone()).await.unwrap_err();
        assert!(error.to_string().contains(target.to_str().unwrap()), "{error}");
    }
}
