//! A file or directory of this machine as a tar stream. Owners become root: the guest does not know our users.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};
use thiserror::Error;

use super::LeftOut;

/// Something of this machine could not be sent.
#[derive(Debug, Error)]
#[error("{} could not be sent", .path.display())]
pub(super) struct PackError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Writes all of `source` under `name` and ends the stream.
pub(super) fn pack(source: &Path, name: &str, to: impl Write) -> Result<LeftOut, PackError> {
    let mut tar = Builder::new(to);
    let mut left_out = LeftOut::default();
    add(&mut tar, source, Path::new(name), &mut left_out)?;
    let end = tar.into_inner().and_then(|mut to| to.flush());
    end.map_err(|error| PackError { path: source.to_owned(), source: error })?;
    Ok(left_out)
}

fn add<W: Write>(
    tar: &mut Builder<W>,
    source: &Path,
    name: &Path,
    left_out: &mut LeftOut,
) -> Result<(), PackError> {
    let failed = |error| PackError { path: source.to_owned(), source: error };
    let metadata = source.symlink_metadata().map_err(failed)?;
    let kind = metadata.file_type();
    if kind.is_symlink() {
        let target = fs::read_link(source).map_err(failed)?;
        return tar.append_link(&mut header(&metadata, EntryType::Symlink), name, target).map_err(failed);
    }
    if kind.is_file() {
        let file = File::open(source).map_err(failed)?;
        let mut header = header(&metadata, EntryType::Regular);
        header.set_size(metadata.len());
        let contents = Exactly { file, left: metadata.len() };
        return tar.append_data(&mut header, name, contents).map_err(failed);
    }
    if !kind.is_dir() {
        left_out.add(&source.to_string_lossy());
        return Ok(());
    }
    tar.append_data(&mut header(&metadata, EntryType::Directory), name, io::empty()).map_err(failed)?;
    let mut entries: Vec<_> = fs::read_dir(source).and_then(Iterator::collect).map_err(failed)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        add(tar, &entry.path(), &name.join(entry.file_name()), left_out)?;
    }
    Ok(())
}

fn header(metadata: &Metadata, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(metadata.permissions().mode() & 0o7777);
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    header.set_mtime(modified.map_or(0, |since| since.as_secs()));
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header
}

/// As many bytes as the header promises, whatever happens to the file meanwhile.
struct Exactly {
    file: File,
    left: u64,
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let count = self.file.read(&mut buffer[..want])?;
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter while it was read"));
        }
        self.left -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use a3s_box_image::tar::{EntryKind, TarReader};

    use super::*;

    #[test]
    fn a_tree_is_sent_under_its_new_name_and_belongs_to_root() {
        let folder = tempfile::tempdir().unwrap();
        let long = "x".repeat(150);
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub").join(&long), "contents").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link")).unwrap();
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();

        let mut bytes = Vec::new();
        let left_out = pack(folder.path(), "new", &mut bytes).unwrap();
        assert_eq!((left_out.count, left_out.first), (1, vec![socket.display().to_string()]));
        let mut tar = TarReader::new(bytes.as_slice());
        let mut seen = Vec::new();
        while let Some(entry) = tar.next_entry().unwrap() {
            assert_eq!((entry.uid, entry.gid), (0, 0));
            let mut contents = String::new();
            tar.read_to_string(&mut contents).unwrap();
            seen.push((String::from_utf8(entry.path).unwrap(), entry.kind, contents));
        }
        let entry = |path: &str, kind, contents: &str| (path.to_owned(), kind, contents.to_owned());
        assert_eq!(
            seen,
            [
                entry("new", EntryKind::Directory, ""),
                entry("new/link", EntryKind::Symlink(b"/etc/passwd".to_vec()), ""),
                entry("new/sub", EntryKind::Directory, ""),
                entry(&format!("new/sub/{long}"), EntryKind::File, "contents"),
            ]
        );
    }
}
