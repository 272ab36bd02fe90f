//! The host's mount table, as far as it tells volumes apart: proc_pid_mountinfo(5).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount of the daemon's namespace.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    id: u64,
    parent: u64,
    /// Which directory of its file system it shows.
    root: PathBuf,
    /// Where.
    point: PathBuf,
}

/// All mounts of the daemon's namespace.
#[derive(Debug)]
pub(super) struct Mounts(Vec<Mount>);

impl Mounts {
    /// Reads them.
    pub(super) fn read() -> io::Result<Self> {
        Ok(Self::parse(&fs::read("/proc/self/mountinfo")?))
    }

    /// A line that is not as the kernel writes them is left out.
    fn parse(text: &[u8]) -> Self {
        Self(text.split(|byte| *byte == b'\n').filter_map(parse_line).collect())
    }

    /// Whether something is mounted below `path`, which lies on the mount with this id.
    pub(super) fn any_below(&self, id: u64, path: &Path) -> bool {
        let below =
            |mount: &Mount| mount.parent == id && mount.point != path && mount.point.starts_with(path);
        self.0.iter().any(below)
    }

    /// Where in its file system `path` is, which lies on the mount with this id.
    pub(super) fn location(&self, id: u64, path: &Path) -> Option<PathBuf> {
        let mount = self.0.iter().find(|mount| mount.id == id)?;
        let inside = path.strip_prefix(&mount.point).ok()?;
        Some(mount.root.join(inside))
    }
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    let (root, point) = (fields.nth(1)?, fields.next()?);
    Some(Mount { id, parent, root: unescape(root), point: unescape(point) })
}

/// Space, tab, line feed and backslash are three octal digits after a backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = (byte == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(escaped) => {
                bytes.push(escaped);
                rest = &after[3..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        30 21 0:25 / /var/lib/kubelet/pods/u/volumes/mem rw - tmpfs tmpfs rw\n\
        31 21 8:1 /srv/data\\040set/part /var/lib/kubelet/subpaths/0 rw - ext4 /dev/sda1 rw\n\
        32 30 0:26 / /var/lib/kubelet/pods/u/volumes/mem/inner rw - tmpfs tmpfs rw\n\
        half a line\n";

    #[test]
    fn a_bind_mount_tells_where_in_its_file_system_it_is() {
        let mounts = Mounts::parse(TABLE);
        let location = |id, path: &str| mounts.location(id, Path::new(path));
        assert_eq!(location(21, "/srv/data set"), Some("/srv/data set".into()));
        assert_eq!(location(31, "/var/lib/kubelet/subpaths/0"), Some("/srv/data set/part".into()));
        assert_eq!(location(31, "/var/lib/kubelet/subpaths/0/x"), Some("/srv/data set/part/x".into()));
        assert_eq!(location(31, "/elsewhere"), None);
        assert_eq!(location(99, "/"), None);
    }

    #[test]
    fn only_mounts_on_the_same_mount_and_strictly_below_count() {
        let mounts = Mounts::parse(TABLE);
        let below = |id, path: &str| mounts.any_below(id, Path::new(path));
        assert!(below(30, "/var/lib/kubelet/pods/u/volumes/mem"));
        assert!(!below(30, "/var/lib/kubelet/pods/u/volumes/mem/inner"));
        assert!(!below(31, "/var/lib/kubelet/subpaths/0"));
        assert!(below(21, "/var/lib"));
        assert!(!below(21, "/var/lib/kubelet/pods/u/volumes/me"), "a name is not a prefix of another");
    }
}
