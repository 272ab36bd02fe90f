//! Guests other than the installed one: initramfs archives in the kernel's "newc" form
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::layout::Layout;

const HEADER: usize = 110;
/// Guests print a warning when the initramfs does not fill its last page.
const PAGE: usize = 4096;

/// An archive that is being written.
#[derive(Debug, Default)]
pub struct Initramfs(Vec<u8>);

impl Initramfs {
    /// Adds a program.
    pub fn program(&mut self, name: &str, contents: &[u8]) {
        self.entry(name, 0o100_755, (0, 0), contents);
    }

    /// Adds a folder; before what is in it.
    pub fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, (0, 0), b"");
    }

    /// Adds the devices that a shell needs before anything is mounted on /dev.
    pub fn devices(&mut self) {
        self.folder("dev");
        self.entry("dev/console", 0o020_600, (5, 1), b"");
        self.entry("dev/null", 0o020_666, (1, 3), b"");
        self.entry("dev/zero", 0o020_666, (1, 5), b"");
    }

    /// Ends the archive and writes it.
    pub fn write(mut self, path: &Path) -> Result<()> {
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        self.0.resize(self.0.len().next_multiple_of(PAGE), 0);
        fs::write(path, self.0).with_context(|| format!("writing {}", path.display()))
    }

    fn entry(&mut self, name: &str, mode: usize, device: (usize, usize), contents: &[u8]) {
        let (major, minor) = device;
        let fields = [1, mode, 0, 0, 1, 0, contents.len(), 0, 0, major, minor, name.len() + 1, 0];
        self.0.extend(b"070701");
        self.0.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
        self.0.extend(name.bytes());
        self.0.push(0);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.0.extend(contents);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// The installed guest agent, from the installed initramfs.
pub fn installed_agent(layout: &Layout) -> Result<Vec<u8>> {
    let path = layout.initramfs();
    let archive = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let agent =
        file_in(&archive, "init").with_context(|| format!("there is no init in {}", path.display()))?;
    Ok(agent.to_vec())
}

fn file_in<'a>(mut archive: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    loop {
        let header = std::str::from_utf8(archive.get(..HEADER)?).ok()?;
        let field = |index: usize| usize::from_str_radix(header.get(6 + index * 8..14 + index * 8)?, 16).ok();
        let (length, name_length) = (field(6)?, field(11)?);
        let name = archive.get(HEADER..(HEADER + name_length).checked_sub(1)?)?;
        let start = (HEADER + name_length).next_multiple_of(4);
        let contents = archive.get(start..start + length)?;
        if name == wanted.as_bytes() {
            return Some(contents);
        }
        archive = archive.get((start + length).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::{Initramfs, file_in};

    #[test]
    fn a_file_is_found_behind_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut archive = Initramfs::default();
        archive.devices();
        archive.program("first", b"1");
        archive.program("init", b"the agent");
        archive.write(&folder.path().join("archive")).expect("written");
        let bytes = std::fs::read(folder.path().join("archive")).expect("read");
        assert_eq!(bytes.len() % 4096, 0);
        assert_eq!(file_in(&bytes, "init"), Some(&b"the agent"[..]));
        assert_eq!(file_in(&bytes, "other"), None);
    }
}
