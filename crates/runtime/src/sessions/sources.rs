//! What the host paths of a session's mounts are, before any of it is handed over.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;
use tokio::task::spawn_blocking;

use a3s_box_core::spec::{MountSource, MountSpec};

/// File systems of the kernel whose files say that they are empty, and have a content only when they are read. A box's
/// file server believes the size: everything would be there, and empty.
const WITHOUT_SIZES: [(i64, &str, &str); 6] = [
    (0x9fa0, "procfs", "a box has a /proc of its own"),
    (0x6367_7270, "cgroup2", "a box has cgroups of its own"),
    (0x0027_e0eb, "cgroup", "a box has cgroups of its own"),
    (0x6462_6720, "debugfs", "it tells of the host's kernel, which boxes do not run on"),
    (0x7472_6163, "tracefs", "it tells of the host's kernel, which boxes do not run on"),
    (0x7363_6673, "securityfs", "it tells of the host's kernel, which boxes do not run on"),
];

/// A host path whose files a box would see as empty.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "mount at {target}: the host path {} lies on {file_system}, whose files a box would read as empty; leave the volume \
     out ({instead}), or run the pod with another RuntimeClass", path.display()
)]
pub(crate) struct EmptyInABox {
    target: String,
    path: PathBuf,
    file_system: &'static str,
    instead: &'static str,
}

/// Looks at the host paths. The answer says which of the mounts are read-only as a whole: nothing is mounted below them, and
/// nothing that the host mounts later will appear.
pub(crate) async fn examine(mounts: Vec<MountSpec>) -> Result<Vec<bool>, EmptyInABox> {
    // Host paths may lie on slow file systems.
    let examined = spawn_blocking(move || {
        let mounted = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        mounts.iter().map(|mount| examine_one(mount, &mounted)).collect()
    });
    // A task that was aborted ends with the daemon.
    examined.await.unwrap_or_else(|_| Ok(Vec::new()))
}

fn examine_one(mount: &MountSpec, mounted: &str) -> Result<bool, EmptyInABox> {
    let MountSource::Host { path, propagate, .. } = &mount.source else { return Ok(mount.readonly) };
    // What is not there is made, or refused where it is opened.
    let Ok(status) = rustix::fs::statfs(path) else { return Ok(false) };
    if let Some((_, file_system, instead)) = WITHOUT_SIZES.iter().find(|(known, ..)| *known == status.f_type)
    {
        let (target, path) = (mount.target.clone(), path.clone());
        return Err(EmptyInABox { target, path, file_system, instead });
    }
    Ok(mount.readonly
        && !propagate
        && !mounted.is_empty()
        && !has_mounts_below(path, mounted).unwrap_or(true))
}

/// `mounted` is the mountinfo of proc(5), whose fifth field is where.
fn has_mounts_below(path: &Path, mounted: &str) -> io::Result<bool> {
    let path = path.canonicalize()?;
    let mut places = mounted.lines().filter_map(|line| line.split(' ').nth(4)).map(unescaped);
    Ok(places.any(|place| place != path && place.starts_with(&path)))
}

/// Spaces, tabs, line breaks and backslashes are written as octal numbers.
fn unescaped(place: &str) -> PathBuf {
    let mut text = place.to_owned();
    for (written, meant) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        text = text.replace(written, meant);
    }
    PathBuf::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(path: &Path, readonly: bool, propagate: bool) -> MountSpec {
        let source = MountSource::Host {
            path: path.to_owned(),
            propagate,
            recursive_readonly: false,
            id_mapped: None,
        };
        MountSpec { source, target: "/host".to_owned(), readonly, options: Vec::new() }
    }

    /// Every file of it was there and empty, so that monitoring of nodes reported nothing.
    #[tokio::test]
    async fn a_volume_of_procfs_is_refused_by_name() {
        for path in ["/proc", "/proc/sys/kernel", "/proc/version"] {
            let refused = examine(vec![mount(Path::new(path), true, false)]).await.unwrap_err().to_string();
            assert!(refused.contains(path) && refused.contains("procfs"), "{refused}");
            assert!(refused.contains("RuntimeClass") && refused.contains("/proc of its own"), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_read_only_volume_is_so_as_a_whole_if_nothing_lies_below_it() {
        let dir = tempfile::tempdir().unwrap();
        let asked = vec![
            mount(dir.path(), true, false),
            mount(dir.path(), false, false),
            mount(dir.path(), true, true),
            mount(Path::new("/"), true, false),
            mount(&dir.path().join("absent"), true, false),
        ];
        assert_eq!(examine(asked).await.unwrap(), [true, false, false, false, false]);
        let inside = dir.path().canonicalize().unwrap().join("a b");
        let line =
            format!("36 35 0:5 / {} rw - tmpfs x rw\n", inside.display().to_string().replace(' ', "\\040"));
        assert!(has_mounts_below(dir.path(), &line).unwrap());
        std::fs::create_dir(&inside).unwrap();
        assert!(!has_mounts_below(&inside, &line).unwrap(), "a mount point is not below itself");
    }
}
