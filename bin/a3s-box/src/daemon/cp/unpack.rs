//! A tar stream from a container into a file or directory of this machine.
//!
//! Whoever wrote the stream may want to write elsewhere. Therefore every name must be below the one that was asked for;
//! directories are opened one by one, never through a symbolic link; symbolic links and special files are not made; files are
//! made anew, never written through an existing name; set-id bits are dropped.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, mkdirat, openat, unlinkat};
use rustix::io::Errno;
use thiserror::Error;

use a3s_box_image::tar::{Entry, EntryKind, TarError, TarReader};

use super::LeftOut;

/// Directories within each other; what is deeper can hardly be removed again.
const MAX_DEPTH: usize = 256;
/// Tars end in blocks of zeros; more than this is no such end.
const MAX_PADDING: u64 = 1 << 20;

/// Copying out of a container failed.
#[derive(Debug, Error)]
pub(super) enum UnpackError {
    #[error("what the container's tar wrote is no tar")]
    Tar(#[from] TarError),
    #[error(
        "the container's tar sent {name}, which was not asked for; nothing is written outside of the target"
    )]
    Elsewhere { name: String },
    #[error("{name} is more than {MAX_DEPTH} directories deep")]
    Deep { name: String },
    #[error("{name} could not be written")]
    Write {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("the container's tar sent nothing")]
    Nothing,
    #[error("{} could not be opened", .path.display())]
    Target {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Where the one thing that was asked for goes.
#[derive(Debug)]
pub(super) struct Destination {
    /// Below it everything is made.
    folder: OwnedFd,
    /// Its name in the tar; none if the tar's names are what is in a directory.
    theirs: Option<OsString>,
    /// Its name here.
    ours: Option<OsString>,
}

impl Destination {
    /// `base` is asked for, `.` being all that is in a directory. In a directory that exists the name is kept.
    pub(super) fn new(target: &Path, base: &str) -> Result<Self, UnpackError> {
        let contents = base == ".";
        let theirs = (!contents).then(|| OsString::from(base));
        let (folder, ours) = match target.is_dir() {
            true => (target.to_owned(), theirs.clone()),
            false => {
                let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
                let name = target.file_name().map(OsStr::to_owned);
                (parent.unwrap_or(Path::new(".")).to_owned(), name)
            }
        };
        let failed = |source: Errno| UnpackError::Target { path: folder.clone(), source: source.into() };
        let opened =
            openat(CWD, &folder, FOLDER.difference(OFlags::NOFOLLOW), Mode::empty()).map_err(failed)?;
        Ok(Self { folder: opened, theirs, ours })
    }

    /// Reads to the end of the stream.
    pub(super) fn unpack(self, mut from: impl Read) -> Result<LeftOut, UnpackError> {
        let mut tar = TarReader::new(&mut from);
        let mut left_out = LeftOut::default();
        let mut any = false;
        while let Some(entry) = tar.next_entry()? {
            any = true;
            self.place(&entry, &mut tar, &mut left_out)?;
        }
        if !any {
            return Err(UnpackError::Nothing);
        }
        // Unread, it would end the other tar with a broken pipe.
        io::copy(&mut from.take(MAX_PADDING), &mut io::sink()).ok();
        Ok(left_out)
    }

    fn place(
        &self,
        entry: &Entry,
        contents: &mut impl Read,
        left_out: &mut LeftOut,
    ) -> Result<(), UnpackError> {
        let name = shown(&entry.path);
        let path = self.local(&entry.path)?;
        let Some((last, parents)) = path.split_last() else { return Ok(()) };
        let failed = |source: io::Error| UnpackError::Write { name: name.clone(), source };
        match &entry.kind {
            EntryKind::Directory => self.folder(&path, entry.permissions).map(drop).map_err(failed),
            EntryKind::File => {
                let folder = self.folder(parents, 0o755).map_err(failed)?;
                write(&folder, last, entry, contents).map_err(failed)
            }
            EntryKind::HardLink(to) => {
                let first = self.local(to)?;
                let Some((first, its_parents)) = first.split_last() else { return Ok(()) };
                let link = || {
                    let from = self.folder(its_parents, 0o755)?;
                    let to = self.folder(parents, 0o755)?;
                    remove(&to, last)?;
                    Ok(linkat(&from, *first, &to, *last, AtFlags::empty())?)
                };
                link().map_err(failed)
            }
            EntryKind::Symlink(_)
            | EntryKind::CharDevice { .. }
            | EntryKind::BlockDevice { .. }
            | EntryKind::Fifo => {
                left_out.add(&name);
                Ok(())
            }
        }
    }

    /// The names below the folder that a name of the tar stands for.
    fn local<'a>(&'a self, path: &'a [u8]) -> Result<Vec<&'a OsStr>, UnpackError> {
        let elsewhere = || UnpackError::Elsewhere { name: shown(path) };
        let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
        let mut parts: Vec<_> = parts.map(OsStr::from_bytes).collect();
        if path.starts_with(b"/") || parts.iter().any(|part| *part == ".." || part.as_bytes().contains(&0)) {
            return Err(elsewhere());
        }
        if parts.len() > MAX_DEPTH {
            return Err(UnpackError::Deep { name: shown(&path[..path.len().min(100)]) });
        }
        if let Some(theirs) = &self.theirs {
            if parts.first() != Some(&theirs.as_os_str()) {
                return Err(elsewhere());
            }
            parts.remove(0);
        }
        if let Some(ours) = &self.ours {
            parts.insert(0, ours);
        }
        Ok(parts)
    }

    /// Opens a directory below the folder, and makes those that are missing.
    fn folder(&self, path: &[&OsStr], permissions: u16) -> io::Result<OwnedFd> {
        let mut folder = rustix::io::fcntl_dupfd_cloexec(&self.folder, 0)?;
        for (index, name) in path.iter().enumerate() {
            // Ours to write in, whatever it is for others.
            let mode = if index + 1 == path.len() { permissions & 0o777 | 0o700 } else { 0o755 };
            match mkdirat(&folder, *name, Mode::from_raw_mode(mode.into())) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            folder = openat(&folder, *name, FOLDER, Mode::empty())?;
        }
        Ok(folder)
    }
}

const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn remove(folder: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn write(folder: &OwnedFd, name: &OsStr, entry: &Entry, contents: &mut impl Read) -> io::Result<()> {
    remove(folder, name)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode((entry.permissions & 0o777).into());
    let mut file = File::from(openat(folder, name, flags, mode)?);
    match &entry.runs {
        None => drop(io::copy(contents, &mut file)?),
        Some(runs) => {
            for (offset, length) in runs {
                file.seek(SeekFrom::Start(*offset))?;
                io::copy(&mut contents.take(*length), &mut file)?;
            }
            file.set_len(entry.size)?;
        }
    }
    Ok(())
}

/// A guest's name, fit for a terminal.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use tar::{Builder, EntryType, Header};

    use super::*;

    /// A tar of names as they are, links with their targets.
    fn tar(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
        let mut tar = Builder::new(Vec::new());
        for (kind, name, text) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o4751);
            header.set_uid(1234);
            header.set_gid(1234);
            header.set_mtime(0);
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            let is_file = *kind == EntryType::Regular;
            if !is_file {
                header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
            }
            header.set_size(if is_file { text.len() as u64 } else { 0 });
            header.set_cksum();
            tar.append(&header, if is_file { text.as_bytes() } else { b"" }).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn unpack(
        target: &Path,
        base: &str,
        entries: &[(EntryType, &str, &str)],
    ) -> Result<LeftOut, UnpackError> {
        Destination::new(target, base)?.unpack(tar(entries).as_slice())
    }

    use EntryType::{Directory, Link, Regular, Symlink};

    #[test]
    fn a_tree_arrives_under_the_new_name_without_set_id_bits() {
        let folder = tempfile::tempdir().unwrap();
        let entries = [
            (Directory, "./app/", ""),
            (Directory, "./app/sub/", ""),
            (Regular, "./app/sub/file", "contents"),
            (Link, "./app/again", "./app/sub/file"),
            (Symlink, "./app/link", "sub/file"),
        ];
        let left_out = unpack(&folder.path().join("new"), "app", &entries).unwrap();
        assert_eq!((left_out.count, left_out.first), (1, vec!["./app/link".to_owned()]));
        let file = folder.path().join("new/sub/file");
        assert_eq!(fs::read_to_string(&file).unwrap(), "contents");
        assert_eq!(fs::read_to_string(folder.path().join("new/again")).unwrap(), "contents");
        let metadata = fs::metadata(&file).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7000, 0);
        assert_eq!(metadata.uid(), rustix::process::geteuid().as_raw());
        assert!(!folder.path().join("new/link").exists());

        unpack(folder.path(), "app", &entries).unwrap();
        assert!(folder.path().join("app/sub/file").exists(), "in a directory that exists the name is kept");
        unpack(folder.path(), ".", &[(Directory, "./", ""), (Regular, "./top", "x")]).unwrap();
        assert!(folder.path().join("top").exists());
    }

    #[test]
    fn a_file_replaces_a_file_and_is_not_written_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (precious, target) = (folder.path().join("precious"), folder.path().join("target"));
        fs::write(&precious, "mine").unwrap();
        symlink(&precious, &target).unwrap();
        unpack(&target, "file", &[(Regular, "./file", "theirs")]).unwrap();
        assert_eq!(fs::read_to_string(&precious).unwrap(), "mine");
        assert_eq!(fs::read_to_string(&target).unwrap(), "theirs");
    }

    #[test]
    fn nothing_is_written_outside_of_the_target() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        fs::create_dir_all(target.join("dir")).unwrap();
        fs::create_dir(folder.path().join("outside")).unwrap();
        symlink(folder.path().join("outside"), target.join("dir/link")).unwrap();
        let outside = folder.path().join("outside/evil").display().to_string();
        for (what, entries) in [
            ("upwards", &[(Regular, "./dir/../../evil", "x")][..]),
            ("absolute", &[(Regular, outside.as_str(), "x")]),
            ("another name", &[(Regular, "./other", "x")]),
            ("through a link", &[(Regular, "./dir/link/evil", "x")]),
            (
                "through a link of the tar",
                &[(Symlink, "./dir/new", "/tmp"), (Regular, "./dir/new/../evil", "x")],
            ),
            ("a link to a file of ours", &[(Link, "./dir/evil", "../../etc/passwd")]),
        ] {
            assert!(unpack(&target, "dir", entries).is_err(), "{what}");
        }
        // A link that was left out is a directory when something claims to be below it.
        unpack(&target, "dir", &[(Symlink, "./dir/new", "/tmp"), (Regular, "./dir/new/evil", "x")]).unwrap();
        assert!(target.join("dir/new/evil").exists());
        let names = |path: &Path| fs::read_dir(path).unwrap().count();
        assert_eq!((names(&folder.path().join("outside")), names(folder.path())), (0, 2));
    }

    #[test]
    fn depth_has_a_limit_and_nothing_is_no_success() {
        let folder = tempfile::tempdir().unwrap();
        let destination = Destination::new(folder.path(), "d").unwrap();
        let deep = [b"d".as_slice(), &b"/d".repeat(MAX_DEPTH)].concat();
        assert!(matches!(destination.local(&deep), Err(UnpackError::Deep { .. })));
        assert!(matches!(unpack(folder.path(), "d", &[]), Err(UnpackError::Nothing)));
        assert!(matches!(destination.unpack(&b"no tar at all"[..]), Err(UnpackError::Tar(_))));
    }
}
