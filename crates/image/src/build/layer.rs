//! A layer out of files of the context: sorted, with one time, owned by whom the instruction says.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use flate2::{Compression, write::GzEncoder};

use crate::digest::{Algorithm, Digest, Hasher};

/// What `COPY` says.
pub(super) struct Copy {
    pub(super) sources: Vec<String>,
    /// Below the root, without the leading slash.
    pub(super) target: PathBuf,
    pub(super) into_directory: bool,
    pub(super) owner: (u64, u64),
    pub(super) mode: Option<u32>,
    pub(super) mtime: u64,
}

/// A writer that digests and counts what it passes on.
struct Digesting<W> {
    inner: W,
    hasher: Hasher,
    size: u64,
}

impl<W> Digesting<W> {
    fn new(inner: W) -> Self {
        Self { inner, hasher: Hasher::new(Algorithm::Sha256), size: 0 }
    }
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A written layer: its digest, its size and its diff id.
pub(super) struct Written {
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) diff_id: Digest,
}

/// Writes the layer of one `COPY` to `file`.
pub(super) fn write(context: &Path, ignored: &Ignored, copy: &Copy, file: File) -> Result<Written, String> {
    let gzip = GzEncoder::new(Digesting::new(file), Compression::default());
    let mut tar = tar::Builder::new(Digesting::new(gzip));
    for source in &copy.sources {
        let relative = inside(source)?;
        let path = resolve(context, &relative)?;
        let metadata = fs::symlink_metadata(&path).map_err(|e| format!("could not read {source}: {e}"))?;
        if ignored.matches(&relative) && !metadata.is_dir() {
            return Err(format!("{source} is left out by .dockerignore"));
        }
        let target = match relative.file_name() {
            Some(name) if copy.into_directory && !metadata.is_dir() => copy.target.join(name),
            _ => copy.target.clone(),
        };
        append(&mut tar, ignored, copy, &path, &relative, &target)?;
    }
    let failed = |e: io::Error| format!("could not write the layer: {e}");
    let plain = tar.into_inner().map_err(failed)?;
    let diff_id = plain.hasher.finish();
    let packed = plain.inner.finish().map_err(failed)?;
    Ok(Written { digest: packed.hasher.finish(), size: packed.size, diff_id })
}

fn append<W: Write>(
    tar: &mut tar::Builder<W>,
    ignored: &Ignored,
    copy: &Copy,
    path: &Path,
    relative: &Path,
    target: &Path,
) -> Result<(), String> {
    let failed = |e: io::Error| format!("could not copy {}: {e}", relative.display());
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    let mut header = tar::Header::new_gnu();
    header.set_mtime(copy.mtime);
    header.set_uid(copy.owner.0);
    header.set_gid(copy.owner.1);
    header.set_mode(copy.mode.unwrap_or(metadata.permissions().mode() & 0o7777));
    header.set_size(0);
    if metadata.is_symlink() {
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_mode(0o777);
        let link = fs::read_link(path).map_err(failed)?;
        return tar.append_link(&mut header, target, link).map_err(failed);
    }
    if metadata.is_file() {
        header.set_size(metadata.len());
        return tar.append_data(&mut header, target, File::open(path).map_err(failed)?).map_err(failed);
    }
    if !metadata.is_dir() {
        return Err(format!("{} is neither a file, a directory nor a link", relative.display()));
    }
    // The root has its owner and mode from the base.
    if !target.as_os_str().is_empty() && !ignored.matches(relative) {
        header.set_entry_type(tar::EntryType::Directory);
        tar.append_data(&mut header, target, io::empty()).map_err(failed)?;
    }
    let mut names: Vec<_> =
        fs::read_dir(path).and_then(|dir| dir.map(|e| e.map(|e| e.file_name())).collect()).map_err(failed)?;
    names.sort();
    for name in names {
        let below = relative.join(&name);
        let is_dir = fs::symlink_metadata(path.join(&name)).map_err(failed)?.is_dir();
        // What lies in a directory that is left out may be let in again.
        if is_dir || !ignored.matches(&below) {
            append(tar, ignored, copy, &path.join(&name), &below, &target.join(&name))?;
        }
    }
    Ok(())
}

/// A path without `.` and leading slashes; `..` is refused.
pub(super) fn inside(text: &str) -> Result<PathBuf, String> {
    let mut path = PathBuf::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::ParentDir => return Err(format!("{text} has a `..`: name the path without it")),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(path)
}

/// The path of a source; a link on the way could lead out of the context and is refused.
fn resolve(context: &Path, relative: &Path) -> Result<PathBuf, String> {
    let mut path = context.to_owned();
    for component in relative.components() {
        if path != context && fs::symlink_metadata(&path).is_ok_and(|m| m.is_symlink()) {
            return Err(format!(
                "{} leads through a link: name the path that it leads to",
                relative.display()
            ));
        }
        path.push(component);
    }
    Ok(path)
}

/// The patterns of `.dockerignore`; the last that fits decides.
#[derive(Default)]
pub(super) struct Ignored(Vec<(bool, Vec<String>)>);

impl Ignored {
    pub(super) fn parse(text: &str) -> Self {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(lines.map(|line| (!line.starts_with('!'), parts(line.trim_start_matches('!')))).collect())
    }

    fn matches(&self, path: &Path) -> bool {
        let path = parts(&path.to_string_lossy());
        // A pattern that fits a directory fits all below it.
        let fits = |pattern: &[String]| (1..=path.len()).any(|n| fits_parts(pattern, &path[..n]));
        self.0.iter().rev().find(|(_, pattern)| fits(pattern)).is_some_and(|(out, _)| *out)
    }
}

fn parts(path: &str) -> Vec<String> {
    path.split('/').filter(|part| !matches!(*part, "" | ".")).map(str::to_owned).collect()
}

fn fits_parts(pattern: &[String], path: &[String]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (Some((first, rest)), _) if first == "**" => (0..=path.len()).any(|n| fits_parts(rest, &path[n..])),
        (Some((first, rest)), Some((part, below))) => {
            fits_name(first.as_bytes(), part.as_bytes()) && fits_parts(rest, below)
        }
        _ => false,
    }
}

fn fits_name(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=name.len()).any(|n| fits_name(rest, &name[n..])),
        (Some((b'?', rest)), Some((_, below))) => fits_name(rest, below),
        (Some((a, rest)), Some((b, below))) => a == b && fits_name(rest, below),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pattern_that_fits_decides() {
        let ignored = Ignored::parse("# c\n*.log\n**/tmp\nkeep\n!keep/this\n");
        for (path, out) in [
            ("a.log", true),
            ("d/a.log", false),
            ("x/y/tmp/z", true),
            ("keep/it", true),
            ("keep/this", false),
        ] {
            assert_eq!(ignored.matches(Path::new(path)), out, "{path}");
        }
    }
}
