//! Archives whose kind and images are not known beforehand.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use super::{DockerEntry, LocalError, LocalFiles, index_tar};
use crate::config::Limits;
use crate::layer::{Decompressed, OtherCompression};
use crate::reference::{LocalKind, LocalReference};

/// One of the images of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedImage {
    /// How [`crate::ImageStore::pull`] finds it.
    pub source: String,
    /// The tags that it has in the archive, in their normal form.
    pub tags: Vec<String>,
}

/// The images of an archive. What kind of archive it is, it says itself. Blocks on the disk.
///
/// # Errors
/// It cannot be read, is compressed, or is none.
pub fn archived_images(path: &Path, limits: &Limits) -> Result<Vec<ArchivedImage>, LocalError> {
    let files = LocalFiles { path: path.to_owned(), entries: Some(index_tar(path)?) };
    let has = |name: &str| files.find(name).is_ok();
    let (kind, tags) = match (has("index.json"), has("manifest.json")) {
        // Newer docker archives are both.
        (true, _) => (LocalKind::OciArchive, files.layout_tags(limits.manifest_bytes)?),
        (false, true) => {
            let entries = files.docker_entries(limits.manifest_bytes)?;
            (LocalKind::DockerArchive, entries.iter().map(DockerEntry::tags).collect())
        }
        (false, false) => return Err(LocalError::NoArchive { path: path.to_owned() }),
    };
    let single = tags.len() == 1;
    let image = |(at, tags)| {
        let name = (!single).then(|| format!("@{at}"));
        let reference = LocalReference { kind, path: path.to_owned(), name };
        ArchivedImage { source: reference.to_string(), tags }
    };
    Ok(tags.into_iter().enumerate().map(image).collect())
}

/// The tar in an archive that is compressed as a whole, in a file that vanishes when dropped; `None` for one that is
/// not. Blocks on the disk.
///
/// # Errors
/// It cannot be read or decompressed, or is longer than `limit`, or there is no place for it.
pub fn decompress_archive(path: &Path, limit: u64) -> Result<Option<tempfile::NamedTempFile>, LocalError> {
    let io = |source| LocalError::Io { path: path.to_owned(), source };
    let opened = File::open(path).map_err(io)?;
    let decompressed =
        Decompressed::new(opened).map_err(|error| match OtherCompression::in_error(&error) {
            Some(name) => LocalError::OtherCompression { path: path.to_owned(), name },
            None => io(error),
        })?;
    if matches!(decompressed, Decompressed::Plain(_)) {
        return Ok(None);
    }
    let scratch = |source| LocalError::Io { path: std::env::temp_dir(), source };
    let mut file = tempfile::NamedTempFile::new().map_err(scratch)?;
    let broken = |source| LocalError::Broken { path: path.to_owned(), source };
    let mut reader = decompressed.take(limit + 1);
    let mut buffer = vec![0; 256 << 10];
    let mut size = 0;
    loop {
        match reader.read(&mut buffer).map_err(broken)? {
            0 => break,
            count => {
                size += count as u64;
                file.write_all(&buffer[..count]).map_err(scratch)?;
            }
        }
    }
    if size > limit {
        let (path, name) = (path.to_owned(), "the tar".to_owned());
        return Err(LocalError::TooLarge { path, name, size, limit });
    }
    Ok(Some(file))
}
