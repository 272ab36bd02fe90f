//! The files of the store. Blocking.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock, statvfs};
use tempfile::NamedTempFile;

use super::disk::Disk;
use super::{StoreError, Usage};
use crate::digest::{Algorithm, Digest};
use crate::record::ImageRecord;

/// Where layers lie, as their keys begin.
pub(super) const EROFS: &str = "erofs/";

/// The directories of the store.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    root: PathBuf,
    disk: Arc<dyn Disk>,
}

pub(super) fn failed<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { operation, path: path.to_owned(), source }
}

impl Files {
    /// Makes the directories. Only root may enter: files are handed out by bind mounts.
    pub(super) fn create(root: PathBuf, disk: Arc<dyn Disk>) -> Result<Self, StoreError> {
        let files = Self { root, disk };
        for directory in files.directories().into_iter().chain([files.tmp()]) {
            fs::create_dir_all(&directory).map_err(failed("create", &directory))?;
        }
        fs::set_permissions(&files.root, Permissions::from_mode(0o700))
            .map_err(failed("set the permissions of", &files.root))?;
        Ok(files)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where temporary files go.
    pub(crate) fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn directories(&self) -> [PathBuf; 3] {
        [self.root.join("erofs"), self.root.join("blobs/sha256"), self.root.join("blobs/sha512")]
    }

    /// The path of an EROFS file.
    pub(crate) fn erofs(&self, file: &str) -> PathBuf {
        self.root.join(Self::erofs_key(file))
    }

    /// How pins name an EROFS file: its path below the root, as of every file.
    pub(crate) fn erofs_key(file: &str) -> String {
        format!("{EROFS}{file}")
    }

    pub(crate) fn blob_key(digest: &Digest) -> String {
        let algorithm = match digest.algorithm() {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        };
        format!("blobs/{algorithm}/{}", digest.hex())
    }

    /// Takes the lock of the directory; it is held as long as the file is open.
    pub(super) fn lock(&self) -> Result<File, StoreError> {
        let path = self.root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(failed("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::Locked { path }),
            Err(errno) => Err(failed("lock", &path)(errno.into())),
        }
    }

    /// Removes what a crash left in the temporary directory.
    pub(super) fn empty_tmp(&self) -> Result<(), StoreError> {
        let tmp = self.tmp();
        for entry in fs::read_dir(&tmp).map_err(failed("read", &tmp))? {
            let path = entry.map_err(failed("read", &tmp))?.path();
            remove_file(&path)?;
        }
        Ok(())
    }

    /// A temporary file that vanishes when dropped.
    pub(crate) fn temporary(&self) -> Result<NamedTempFile, StoreError> {
        let tmp = self.tmp();
        NamedTempFile::new_in(&tmp).map_err(failed("create a file in", &tmp))
    }

    /// Gives a complete temporary file its name, once its bytes are on the disk.
    pub(crate) fn publish(&self, file: NamedTempFile, key: &str) -> Result<PathBuf, StoreError> {
        let target = self.root.join(key);
        file.as_file()
            .set_permissions(Permissions::from_mode(0o444))
            .and_then(|()| self.disk.sync_file(file.as_file()))
            .map_err(failed("write", &target))?;
        self.disk.rename(file, &target).map_err(failed("rename a file to", &target))?;
        let directory = target.parent().unwrap_or(&self.root);
        self.disk.sync_directory(directory).map_err(failed("sync", directory))?;
        Ok(target)
    }

    /// Stores a small blob under its digest. A file that is there but holds other bytes is replaced.
    pub(crate) fn write_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let key = Self::blob_key(digest);
        let path = self.root.join(&key);
        let same_length = fs::metadata(&path).is_ok_and(|metadata| metadata.len() == bytes.len() as u64);
        if same_length && fs::read(&path).is_ok_and(|present| present == bytes) {
            return Ok(());
        }
        let mut file = self.temporary()?;
        file.write_all(bytes).map_err(failed("write", file.path()))?;
        self.publish(file, &key).map(drop)
    }

    /// Whether all files of a record are there, the layers with their sizes.
    pub(super) fn has_all(&self, record: &ImageRecord) -> bool {
        keys(record).iter().all(|key| self.root.join(key).is_file())
            && record.layers.iter().all(|layer| {
                fs::metadata(self.erofs(&layer.file)).is_ok_and(|metadata| metadata.len() == layer.size)
            })
    }

    /// The names of all layers' files, whether an image needs them or not.
    pub(super) fn layers(&self) -> Result<Vec<String>, StoreError> {
        let directory = self.root.join(EROFS);
        let mut names = Vec::new();
        for entry in fs::read_dir(&directory).map_err(failed("read", &directory))? {
            let entry = entry.map_err(failed("read", &directory))?;
            names.extend(entry.file_name().into_string().ok());
        }
        Ok(names)
    }

    /// Says that a layer was of use just now. Only the order of eviction hangs on it.
    pub(crate) fn touch(&self, file: &str) {
        let touched = File::open(self.erofs(file)).and_then(|file| file.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            tracing::debug!(%file, %error, "could not note the use of a layer");
        }
    }

    /// Removes the files that are not among the keys, except for the layers used last that fit into so many
    /// bytes of the disk and half of what is free of it.
    pub(super) fn remove_others(&self, kept: &BTreeSet<String>, cache_bytes: u64) -> Result<(), StoreError> {
        let mut cached = Vec::new();
        for directory in self.directories() {
            for entry in fs::read_dir(&directory).map_err(failed("read", &directory))? {
                let path = entry.map_err(failed("read", &directory))?.path();
                let key = path.strip_prefix(&self.root).ok().and_then(Path::to_str);
                if key.is_some_and(|key| kept.contains(key)) {
                    continue;
                }
                if key.is_some_and(is_layer) {
                    let metadata = fs::metadata(&path).map_err(failed("read", &path))?;
                    cached.push((metadata.mtime(), metadata.mtime_nsec(), metadata.blocks() * 512, path));
                } else {
                    remove_file(&path)?;
                }
            }
        }
        cached.sort();
        let mut left = cache_bytes.min(self.free()? / 2);
        for (_, _, bytes, path) in cached.into_iter().rev() {
            match left.checked_sub(bytes) {
                Some(less) => left = less,
                None => remove_file(&path)?,
            }
        }
        Ok(())
    }

    /// What is free of the disk, in bytes.
    fn free(&self) -> Result<u64, StoreError> {
        let disk = statvfs(&self.root)
            .map_err(|errno| failed("ask for the free space of", &self.root)(errno.into()))?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    /// What all of it takes.
    pub(super) fn usage(&self) -> Result<Usage, StoreError> {
        let mut usage = Usage::default();
        let mut todo = vec![self.root.clone()];
        while let Some(directory) = todo.pop() {
            usage.inodes += 1;
            for entry in fs::read_dir(&directory).map_err(failed("read", &directory))? {
                let entry = entry.map_err(failed("read", &directory))?;
                // Files come and go while pulls run.
                let Ok(metadata) = entry.metadata() else { continue };
                if metadata.is_dir() {
                    todo.push(entry.path());
                } else {
                    usage.inodes += 1;
                    usage.bytes += metadata.blocks() * 512;
                }
            }
        }
        Ok(usage)
    }
}

/// Whether a key is that of a layer as pulls name them.
fn is_layer(key: &str) -> bool {
    let stem = key.strip_prefix(EROFS).and_then(|name| name.strip_suffix(".erofs"));
    let digits = stem.map(|stem| stem.strip_prefix("chain-").unwrap_or(stem));
    digits.is_some_and(|digits| {
        matches!(digits.len(), 64 | 128)
            && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// The files of a record: layers, config and manifest.
pub(super) fn keys(record: &ImageRecord) -> Vec<String> {
    let layers = record.layers.iter().map(|layer| Files::erofs_key(&layer.file));
    let documents = [&record.id, &record.manifest_digest].into_iter();
    let documents = documents.filter_map(|digest| Some(Files::blob_key(&digest.parse().ok()?)));
    layers.chain(documents).collect()
}

pub(super) fn remove_file(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}
