//! Two directory trees, entry by entry.
//!
//! Not compared are the root directory and directories' times, which come from whoever merged the layers. Hard links are
//! compared as groups of the names that are one file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const CHUNK: usize = 1 << 20;

/// What a comparison found.
#[derive(Default)]
pub(super) struct Comparison {
    /// Entries that both trees have.
    pub(super) entries: u64,
    /// Content read on each side.
    pub(super) bytes: u64,
    /// One sentence for each.
    pub(super) differences: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Facts {
    mode: u32,
    owner: (u32, u32),
    time: Option<(i64, i64)>,
    device: u64,
    size: Option<u64>,
    target: Option<PathBuf>,
    xattrs: BTreeMap<String, Vec<u8>>,
}

/// Names that are one file, by device and inode.
type Groups = BTreeMap<(u64, u64), BTreeSet<PathBuf>>;

/// Compares `got` with `expected`.
pub(super) fn compare(expected: &Path, got: &Path) -> Result<Comparison> {
    let mut result = Comparison::default();
    let (mut left_groups, mut right_groups) = (Groups::new(), Groups::new());
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let (left, right) = (expected.join(&path), got.join(&path));
        let metadata = fs::symlink_metadata(&left).with_context(|| left.display().to_string())?;
        if !path.as_os_str().is_empty() {
            result.entries += 1;
            let (a, b) = (facts(&left)?, facts(&right)?);
            if a != b {
                result.differences.push(format!("{}: umoci has {a:?}, we have {b:?}", path.display()));
                if a.mode != b.mode && (a.mode ^ b.mode) & 0o170_000 != 0 {
                    continue;
                }
            }
        }
        if metadata.is_dir() {
            let (a, b) = (names(&left)?, names(&right)?);
            for name in a.symmetric_difference(&b) {
                let side = if a.contains(name) { "umoci" } else { "us" };
                result.differences.push(format!("{}: only with {side}", path.join(name).display()));
            }
            todo.extend(a.intersection(&b).map(|name| path.join(name)));
            continue;
        }
        if metadata.is_file() {
            result.bytes += metadata.len();
            if !same_bytes(&left, &right)? {
                result.differences.push(format!("{}: content differs", path.display()));
            }
        }
        let other = fs::symlink_metadata(&right).with_context(|| right.display().to_string())?;
        left_groups.entry((metadata.dev(), metadata.ino())).or_default().insert(path.clone());
        right_groups.entry((other.dev(), other.ino())).or_default().insert(path);
    }
    let (left, right) = (linked(left_groups), linked(right_groups));
    for group in left.symmetric_difference(&right) {
        let side = if left.contains(group) { "umoci" } else { "us" };
        result.differences.push(format!("{group:?}: one file only with {side}"));
    }
    Ok(result)
}

fn linked(groups: Groups) -> BTreeSet<BTreeSet<PathBuf>> {
    groups.into_values().filter(|names| names.len() > 1).collect()
}

fn names(directory: &Path) -> Result<BTreeSet<std::ffi::OsString>> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    Ok(entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>()?)
}

fn facts(path: &Path) -> Result<Facts> {
    let metadata = fs::symlink_metadata(path).with_context(|| path.display().to_string())?;
    let kind = metadata.file_type();
    let device = kind.is_char_device() || kind.is_block_device();
    Ok(Facts {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        time: (!kind.is_dir()).then(|| (metadata.mtime(), metadata.mtime_nsec())),
        device: if device { metadata.rdev() } else { 0 },
        size: (!kind.is_dir()).then_some(metadata.len()),
        target: if kind.is_symlink() { Some(fs::read_link(path)?) } else { None },
        xattrs: xattrs(path).with_context(|| format!("extended attributes of {}", path.display()))?,
    })
}

fn xattrs(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut list = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut list[..])?;
    let mut found = BTreeMap::new();
    for name in list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = String::from_utf8_lossy(name).into_owned();
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(path, &name, &mut value[..])?;
        value.truncate(length);
        found.insert(name, value);
    }
    Ok(found)
}

/// Reads both files to their ends.
fn same_bytes(left: &Path, right: &Path) -> Result<bool> {
    let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
    let (mut left, mut right) = (open(left)?, open(right)?);
    let (mut a, mut b) = (Vec::with_capacity(CHUNK), Vec::with_capacity(CHUNK));
    loop {
        a.clear();
        b.clear();
        left.by_ref().take(CHUNK as u64).read_to_end(&mut a)?;
        right.by_ref().take(CHUNK as u64).read_to_end(&mut b)?;
        if a != b {
            return Ok(false);
        }
        if a.is_empty() {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::compare;

    #[test]
    fn content_names_and_hard_links_that_differ_are_each_reported() {
        let (left, right) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for side in [&left, &right] {
            fs::write(side.path().join("a"), b"same").unwrap();
            fs::File::open(side.path().join("a")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        }
        assert!(compare(left.path(), right.path()).unwrap().differences.is_empty());
        fs::hard_link(left.path().join("a"), left.path().join("b")).unwrap();
        fs::write(right.path().join("b"), b"else").unwrap();
        fs::write(right.path().join("c"), b"").unwrap();
        let found = compare(left.path(), right.path()).unwrap().differences.join("\n");
        assert!(found.contains("b: content differs"), "{found}");
        assert!(found.contains("c: only with us"), "{found}");
        assert!(found.contains("one file only with umoci"), "{found}");
    }
}
