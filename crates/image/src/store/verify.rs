//! Measuring the store's files, and reading them again later.
//!
//! Manifests and configs are named by their digest. A layer's file is not: its SHA-256 is taken after the pull,
//! while its pages are still in memory, and kept in a table of its own. A file that nobody measured yet cannot be
//! told good from bad.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Once};

use a3s_box_core::storage::{Change, Table};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use thiserror::Error;

use super::{Files, ImageStore, Inner, StoreError, blocking, files, locked, verity};
use crate::auth::RegistryAuth;
use crate::digest::{Algorithm, Digest, Hasher};
use crate::error::ImageError;
use crate::record::ImageRecord;

/// What layers' files were when they were written, by name.
const MEASURED: Table = Table("image-files");

/// How much of a file is in memory at once.
const CHUNK: usize = 1 << 20;

/// What a file was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Measured {
    sha256: String,
    bytes: u64,
    /// The digest of fs-verity of one that was sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    verity: Option<String>,
}

/// What reading the store again found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verified {
    /// Files that are what they were.
    pub good: usize,
    /// Bytes that were read.
    pub bytes: u64,
    /// Layers' files that nobody had measured, below `images/`. They are now, for the next time.
    pub unmeasured: Vec<String>,
    /// Files that are not what they were.
    pub damaged: Vec<Damage>,
}

/// A file that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Its path below `images/`.
    pub file: String,
    /// What is wrong with it.
    pub problem: Problem,
    /// The ids of the images that need it.
    pub images: BTreeSet<String>,
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Problem {
    /// It is gone.
    #[error("it is missing")]
    Missing,
    /// The disk does not give it back.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
    /// It was cut or grew.
    #[error("it has {found} bytes instead of {expected}")]
    Length {
        /// As recorded.
        expected: u64,
        /// As found.
        found: u64,
    },
    /// It is not the file that was sealed.
    #[error("its fs-verity digest is {} instead of {expected}", .found.as_deref().unwrap_or("missing"))]
    Unsealed {
        /// As recorded.
        expected: String,
        /// As found, if it is sealed at all.
        found: Option<String>,
    },
    /// Its bytes changed.
    #[error("its digest is {found} instead of {expected}")]
    Content {
        /// As recorded.
        expected: String,
        /// As found.
        found: String,
    },
}

/// An image that could not be made good.
#[derive(Debug, Error)]
pub enum RepairError {
    /// Nothing says where it came from.
    #[error("nothing is known to fetch it by: pull it by its name, or remove it")]
    NoName,
    /// It could not be fetched.
    #[error(transparent)]
    Pull(#[from] ImageError),
    /// What it came from holds something else now.
    #[error("{name} is another image now ({found}): remove this one, or find its source")]
    OtherImage {
        /// What was pulled.
        name: String,
        /// The id of what came.
        found: String,
    },
}

/// What a file has to be.
enum Expected {
    Document(Digest),
    /// A layer; the length is known where an image names it.
    Layer(Option<u64>),
}

impl ImageStore {
    /// Reads every file again and compares. It is for an operator: it takes as long as the disk does.
    pub async fn verify(&self) -> Result<Verified, ImageError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.verify()).await.and_then(|done| done).map_err(ImageError::Store)
    }

    /// The images that something damaged belongs to: those that [`repair`](Self::repair) pulls again.
    pub fn needing_repair(&self, verified: &Verified) -> Vec<ImageRecord> {
        let ids: BTreeSet<&String> = verified.damaged.iter().flat_map(|damage| &damage.images).collect();
        self.list().into_iter().filter(|record| ids.contains(&record.id)).collect()
    }

    /// Removes what is damaged and pulls the images that need it by the names that cannot move. Answers with
    /// those that are not good now. `credentials` are asked for by these names.
    pub async fn repair(
        &self,
        verified: &Verified,
        credentials: &HashMap<String, RegistryAuth>,
    ) -> Result<Vec<(ImageRecord, RepairError)>, ImageError> {
        let needed = self.needing_repair(verified);
        let (inner, damaged) = (Arc::clone(&self.inner), verified.damaged.clone());
        let discard = move || inner.discard(damaged.iter().map(|damage| damage.file.as_str()));
        blocking(discard).await.and_then(|done| done).map_err(ImageError::Store)?;
        let mut failed = Vec::new();
        for record in needed {
            if let Err(error) = self.pull_again(&record, credentials).await {
                failed.push((record, error));
            }
        }
        self.settle().await;
        Ok(failed)
    }

    async fn pull_again(
        &self,
        record: &ImageRecord,
        credentials: &HashMap<String, RegistryAuth>,
    ) -> Result<(), RepairError> {
        let mut outcome = Err(RepairError::NoName);
        for name in record.repo_digests.iter().chain(&record.other_names) {
            outcome = match self.pull(name, credentials.get(name).cloned(), None).await {
                Ok(pulled) if pulled.id == record.id => return Ok(()),
                Ok(other) => Err(RepairError::OtherImage { name: name.clone(), found: other.id }),
                Err(error) => Err(error.into()),
            };
        }
        outcome
    }

    /// Waits until the files of former pulls are measured. The store stays open until they are.
    pub async fn settle(&self) {
        let tasks = std::mem::take(&mut *locked(&self.inner.measuring));
        for task in tasks {
            // A task that did not end well has left the file unmeasured, which is told.
            let _ = task.await;
        }
    }
}

impl Inner {
    /// Reads what former runs measured.
    pub(super) fn load_measured(&self) -> Result<(), StoreError> {
        let rows = self.storage.scan(MEASURED)?;
        // A row that cannot be read is a file that was not measured.
        let read = |(name, value): (String, Vec<u8>)| Some((name, serde_json::from_slice(&value).ok()?));
        *locked(&self.measured) = rows.into_iter().filter_map(read).collect();
        Ok(())
    }

    /// Gives a layer's file its name. What was measured under it before is forgotten first.
    pub(crate) fn publish_layer(&self, file: NamedTempFile, name: &str) -> Result<(), StoreError> {
        self.forget(vec![name.to_owned()])?;
        self.files.publish(file, &Files::erofs_key(name)).map(drop)
    }

    /// Measures an image's layers as far as that was not done, beside whatever comes next.
    pub(crate) fn measure_later(self: &Arc<Self>, record: &ImageRecord) {
        let names: BTreeSet<String> = {
            let measured = locked(&self.measured);
            let names = record.layers.iter().map(|layer| layer.file.clone());
            names.filter(|name| !measured.contains_key(name)).collect()
        };
        if names.is_empty() {
            return;
        }
        let store = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || {
            // Pulls that were given up had nobody to tidy up after them.
            if let Err(error) = store.measure(&names).and_then(|()| store.sweep()) {
                tracing::warn!(%error, "files of an image could not be measured; verifying cannot tell about them");
            }
        });
        let mut tasks = locked(&self.measuring);
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
    }

    fn measure(&self, names: &BTreeSet<String>) -> Result<(), StoreError> {
        let mut rows = BTreeMap::new();
        for name in names {
            let path = self.files.erofs(name);
            // First: what is read below is then what the kernel checks from now on.
            let verity = self.seal(&path).map_err(files::failed("seal", &path))?;
            let measured = digest_file(&path, Algorithm::Sha256);
            let (digest, bytes) = measured.map_err(files::failed("read", &path))?;
            rows.insert(name.clone(), Measured { sha256: digest.hex().to_owned(), bytes, verity });
        }
        self.keep_measured(rows)
    }

    /// Seals a layer's file, if that is wanted and can be done; its digest then.
    fn seal(&self, path: &Path) -> io::Result<Option<String>> {
        if !self.config.fs_verity {
            return Ok(None);
        }
        let file = File::open(path)?;
        if verity::seal(&file)? {
            return verity::digest(&file);
        }
        static TOLD: Once = Once::new();
        TOLD.call_once(|| {
            tracing::warn!(
                path = %path.display(),
                "images.fs_verity has no effect: the file system or the kernel does not support it"
            );
        });
        Ok(None)
    }

    /// Whether the files of layers that were sealed are still those. Reads no data.
    pub(super) fn check_seals<'a>(&self, names: impl Iterator<Item = &'a String>) -> Result<(), StoreError> {
        for name in names {
            let row = locked(&self.measured).get(name).cloned();
            let Some(expected) = row.and_then(|row| row.verity) else { continue };
            let path = self.files.erofs(name);
            let found = seal_of(&path).map_err(files::failed("inspect", &path))?;
            if found.as_ref() != Some(&expected) {
                return Err(StoreError::Unsealed { path, problem: Problem::Unsealed { expected, found } });
            }
        }
        Ok(())
    }

    fn keep_measured(&self, rows: BTreeMap<String, Measured>) -> Result<(), StoreError> {
        let mut changes = Vec::with_capacity(rows.len());
        for (name, row) in &rows {
            let value =
                serde_json::to_vec(row).map_err(|source| StoreError::Encode { id: name.clone(), source })?;
            changes.push(Change::Put { table: MEASURED, key: name.clone(), value });
        }
        let mut measured = locked(&self.measured);
        self.storage.commit(changes)?;
        measured.extend(rows);
        Ok(())
    }

    /// Drops what was measured of files that are gone or will be others.
    pub(super) fn forget(&self, names: Vec<String>) -> Result<(), StoreError> {
        let mut measured = locked(&self.measured);
        let known: Vec<String> = names.into_iter().filter(|name| measured.contains_key(name)).collect();
        if known.is_empty() {
            return Ok(());
        }
        let delete = |name: &String| Change::Delete { table: MEASURED, key: name.clone() };
        self.storage.commit(known.iter().map(delete).collect())?;
        measured.retain(|name, _| !known.contains(name));
        Ok(())
    }

    /// Forgets what was measured of files that are not there.
    pub(super) fn forget_missing(&self) -> Result<(), StoreError> {
        let names: Vec<String> = locked(&self.measured).keys().cloned().collect();
        self.forget(names.into_iter().filter(|name| !self.files.erofs(name).exists()).collect())
    }

    fn discard<'a>(&self, keys: impl Iterator<Item = &'a str>) -> Result<(), StoreError> {
        for key in keys {
            if let Some(name) = key.strip_prefix(files::EROFS) {
                self.forget(vec![name.to_owned()])?;
            }
            files::remove_file(&self.files.root().join(key))?;
        }
        Ok(())
    }

    fn verify(self: &Arc<Self>) -> Result<Verified, StoreError> {
        let mut all: BTreeMap<String, (Expected, BTreeSet<String>)> = BTreeMap::new();
        for name in self.files.layers()? {
            all.insert(Files::erofs_key(&name), (Expected::Layer(None), BTreeSet::new()));
        }
        for record in self.images().values() {
            for layer in &record.layers {
                let entry = all.entry(Files::erofs_key(&layer.file));
                let (expected, images) = entry.or_insert((Expected::Layer(None), BTreeSet::new()));
                *expected = Expected::Layer(Some(layer.size));
                images.insert(record.id.clone());
            }
            for digest in
                [&record.id, &record.manifest_digest].into_iter().filter_map(|text| text.parse().ok())
            {
                let entry = all.entry(Files::blob_key(&digest));
                let (_, images) = entry.or_insert((Expected::Document(digest), BTreeSet::new()));
                images.insert(record.id.clone());
            }
        }
        let _pins = self.pin(all.keys().cloned().collect());
        let mut verified = Verified::default();
        let mut rows = BTreeMap::new();
        for (file, (expected, images)) in all {
            let checked = self.check(&file, &expected, &mut rows, &mut verified.bytes);
            match checked {
                Ok(Checked::Good) => verified.good += 1,
                Ok(Checked::Unmeasured) => verified.unmeasured.push(file),
                Err(problem) => verified.damaged.push(Damage { file, problem, images }),
            }
        }
        self.keep_measured(rows)?;
        Ok(verified)
    }

    fn check(
        &self,
        file: &str,
        expected: &Expected,
        rows: &mut BTreeMap<String, Measured>,
        read: &mut u64,
    ) -> Result<Checked, Problem> {
        let name = file.strip_prefix(files::EROFS).unwrap_or(file);
        let measured = locked(&self.measured).get(name).cloned();
        let path = self.files.root().join(file);
        if let Some(expected) = measured.as_ref().and_then(|measured| measured.verity.clone()) {
            // One that is missing is told below.
            let found = seal_of(&path).unwrap_or(None);
            if path.exists() && found.as_ref() != Some(&expected) {
                return Err(Problem::Unsealed { expected, found });
            }
        }
        let algorithm = match expected {
            Expected::Document(digest) => digest.algorithm(),
            Expected::Layer(_) => Algorithm::Sha256,
        };
        let (found, bytes) = digest_file(&path, algorithm).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Problem::Missing,
            _ => Problem::Unreadable(error.to_string()),
        })?;
        *read += bytes;
        let wanted = match expected {
            Expected::Document(digest) => digest.clone(),
            Expected::Layer(size) => {
                let length = measured.as_ref().map(|measured| measured.bytes).or(*size);
                if let Some(expected) = length.filter(|length| *length != bytes) {
                    return Err(Problem::Length { expected, found: bytes });
                }
                let seal = || self.seal(&path).map_err(|error| Problem::Unreadable(error.to_string()));
                let Some(measured) = measured else {
                    let row = Measured { sha256: found.hex().to_owned(), bytes, verity: seal()? };
                    rows.insert(name.to_owned(), row);
                    return Ok(Checked::Unmeasured);
                };
                if measured.sha256 == found.hex() {
                    // It may be older than the wish to seal.
                    if measured.verity.is_none()
                        && let Some(verity) = seal()?
                    {
                        rows.insert(name.to_owned(), Measured { verity: Some(verity), ..measured });
                    }
                    return Ok(Checked::Good);
                }
                let expected = format!("sha256:{}", measured.sha256);
                return Err(Problem::Content { expected, found: found.to_string() });
            }
        };
        if wanted == found {
            Ok(Checked::Good)
        } else {
            Err(Problem::Content { expected: wanted.to_string(), found: found.to_string() })
        }
    }
}

fn seal_of(path: &Path) -> io::Result<Option<String>> {
    verity::digest(&File::open(path)?)
}

/// A file that has nothing wrong.
enum Checked {
    Good,
    /// As far as one can tell.
    Unmeasured,
}

/// The digest and length of a file, which must still be the one of that name at the end.
fn digest_file(path: &Path, algorithm: Algorithm) -> io::Result<(Digest, u64)> {
    let mut file = File::open(path)?;
    let mut hasher = Hasher::new(algorithm);
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                hasher.update(&buffer[..n]);
                bytes += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if file.metadata()?.ino() != fs::metadata(path)?.ino() {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, "it was replaced meanwhile"));
    }
    Ok((hasher.finish(), bytes))
}

#[cfg(test)]
mod tests {
    use a3s_box_golden::{Goldens, with_unknown_fields};

    use super::*;

    /// A digest that is not read is a file that nobody can tell from a damaged one.
    #[test]
    fn golden_measures_of_every_age_are_read_and_written_alike() {
        let goldens = Goldens::of(env!("CARGO_MANIFEST_DIR"), "records");
        let measured = |verity| Measured { sha256: "0a".repeat(32), bytes: 4096, verity };
        let sealed = Some(format!("sha256:{}", "0b".repeat(32)));
        for (name, row) in [("image-file.json", measured(None)), ("image-file-sealed.json", measured(sealed))]
        {
            goldens.check_json(name, &serde_json::to_vec(&row).unwrap());
            for golden in goldens.ages(name) {
                for json in [golden.json(), with_unknown_fields(golden.json(), &[])] {
                    let read: Measured = serde_json::from_value(json).unwrap();
                    assert_eq!(read, row, "{}", golden.path.display());
                }
            }
        }
    }
}
