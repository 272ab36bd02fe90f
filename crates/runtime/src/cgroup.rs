//! The host's cgroups of a VMM.
//!
//! A box's processes go below the pod's cgroup, as kubelet names it, in every hierarchy that carries a
//! resource controller: one `a3s-box-<id>` each. On a host with one cgroup v2 hierarchy that is one directory;
//! with cgroup v1, or both, it is one per mount. kubelet has two ways to name a cgroup: a path
//! (`/kubepods/burstable/pod1`) and a systemd slice (`kubepods-burstable-pod1.slice`), in which every dash
//! is a level.
//!
//! A box's memory and processors are bounded by its virtual machine; the cgroup is for the node's accounting.
//! Hence a hierarchy in which no group can be made is reported and left out, and the pod runs.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

use a3s_box_core::BoxId;

/// Where boxes go that name no parent.
const DEFAULT_PARENT: &str = "/a3s-box";

/// Controllers of cgroup v1 that count or limit resources.
const V1_CONTROLLERS: [&str; 7] = ["cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "hugetlb"];

/// A name of a parent that is none.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not the name of a cgroup")]
pub(crate) struct BadParent(String);

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    V2,
    /// The cpuset controller of v1, which wants more than a directory.
    CpusetV1,
    OtherV1,
}

/// What a box is to have in the hierarchies; nothing is made.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Levels above the box's own cgroups that go when their last box goes, topmost first: those that do not exist yet,
    /// and our default parent, whoever of us made it.
    pub(crate) parents: Vec<PathBuf>,
    /// The box's own, one per hierarchy.
    pub(crate) own: Vec<PathBuf>,
}

/// The cgroups of a box below `parent`.
pub(crate) fn plan(parent: Option<&str>, id: &BoxId) -> Result<Plan, BadParent> {
    let below = parent_path(parent.unwrap_or(DEFAULT_PARENT))?;
    let name = format!("a3s-box-{}", id.short());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut plan = Plan::default();
    for hierarchy in hierarchies(&mounts) {
        let mut level = hierarchy.mount;
        for part in below.components() {
            level.push(part);
            if parent.is_none() || !level.exists() {
                plan.parents.push(level.clone());
            }
        }
        plan.own.push(level.join(&name));
    }
    Ok(plan)
}

/// Makes planned cgroups; the answer is those that exist now.
pub(crate) fn make(planned: &[PathBuf]) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let hierarchies = hierarchies(&mounts);
    let mut made = Vec::new();
    for path in planned {
        let Some(hierarchy) = hierarchies.iter().find(|found| path.starts_with(&found.mount)) else {
            continue;
        };
        // The last box of another pod may take a level away just after it was found to exist.
        let result = match make_one(hierarchy, path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make_one(hierarchy, path),
            other => other,
        };
        match result {
            Ok(()) => made.push(path.clone()),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no cgroup could be made here; the box runs outside of it");
            }
        }
    }
    made
}

/// How many processes of these cgroups the host's kernel has killed for want of memory, theirs or the node's.
pub(crate) fn oom_kills(cgroups: &[PathBuf]) -> u64 {
    // cgroup v2 and v1 (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst).
    let files = ["memory.events", "memory.oom_control"];
    let read = |file| cgroups.iter().filter_map(move |path| fs::read_to_string(path.join(file)).ok());
    files.into_iter().flat_map(read).filter_map(|text| oom_kill_count(&text)).sum()
}

fn oom_kill_count(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// Removes a cgroup whose processes have ended.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes a level that a box brought into being, unless others have moved in since.
pub(crate) fn remove_parent(path: &Path) -> io::Result<()> {
    use io::ErrorKind::{DirectoryNotEmpty, NotFound, ResourceBusy};
    match fs::remove_dir(path) {
        Err(error) if !matches!(error.kind(), NotFound | ResourceBusy | DirectoryNotEmpty) => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn make_one(hierarchy: &Hierarchy, path: &Path) -> io::Result<()> {
    let below = path.strip_prefix(&hierarchy.mount).map_err(io::Error::other)?;
    let mut current = hierarchy.mount.clone();
    for level in below.components() {
        let parent = current.clone();
        current.push(level);
        if hierarchy.kind == Kind::V2 {
            count_memory_below(&parent);
        }
        match fs::create_dir(&current) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        if hierarchy.kind == Kind::CpusetV1 {
            inherit_cpuset(&parent, &current)?;
        }
    }
    Ok(())
}

/// Groups of v2 count what their parent has them count. Memory tells why a VM was killed; without it nothing else is lost,
/// and a hierarchy beside v1 has no controllers.
fn count_memory_below(parent: &Path) {
    if let Err(error) = fs::write(parent.join("cgroup.subtree_control"), "+memory") {
        tracing::debug!(path = %parent.display(), %error, "memory is not counted below this cgroup");
    }
}

/// A group of the v1 cpuset controller takes processes only after it was given processors and memory nodes.
fn inherit_cpuset(parent: &Path, child: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if fs::read_to_string(child.join(file))?.trim().is_empty() {
            fs::write(child.join(file), fs::read_to_string(parent.join(file))?.trim())?;
        }
    }
    Ok(())
}

/// A parent's path below the root of a hierarchy.
fn parent_path(parent: &str) -> Result<PathBuf, BadParent> {
    let bad = || BadParent(parent.chars().take(200).collect());
    let path = Path::new(parent.trim_start_matches('/'));
    if path.components().any(|part| !matches!(part, Component::Normal(_))) || parent.contains('\0') {
        return Err(bad());
    }
    match path.to_str().and_then(|text| text.strip_suffix(".slice")) {
        Some(slice) if !slice.contains('/') => slices(slice).ok_or_else(bad),
        Some(_) | None => Ok(path.to_owned()),
    }
}

/// `a-b-c` to `a.slice/a-b.slice/a-b-c.slice` (systemd.slice(5)).
fn slices(name: &str) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    Some(path)
}

/// The hierarchies of a mountinfo (proc(5)) that carry resource controllers.
fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let mut left = left.split(' ').skip(3);
        let (Some(root), Some(mount)) = (left.next(), left.next()) else { continue };
        let mut right = right.split(' ');
        let (kind, options) = (right.next(), right.nth(1).unwrap_or(""));
        let has = |controller: &str| options.split(',').any(|option| option == controller);
        let kind = match kind {
            Some("cgroup2") => Some(Kind::V2),
            Some("cgroup") if has("cpuset") => Some(Kind::CpusetV1),
            Some("cgroup") if V1_CONTROLLERS.iter().any(|controller| has(controller)) => Some(Kind::OtherV1),
            Some(_) | None => None,
        };
        // A bind mount of a part of a hierarchy shows other groups' files, not the hierarchy.
        let whole = root == "/" && !found.iter().any(|known| known.mount == Path::new(mount));
        if let Some(kind) = kind.filter(|_| whole) {
            found.push(Hierarchy { mount: mount.into(), kind });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
26 25 0:23 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
27 25 0:24 / /sys/fs/cgroup/cpuset rw,relatime shared:4 - cgroup cgroup rw,cpuset
28 25 0:25 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
29 25 0:26 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
30 25 0:23 /pod1 /var/lib/x rw,relatime - cgroup cgroup rw,cpu,cpuacct
31 25 0:30 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer";

    #[test]
    fn the_hierarchies_with_resource_controllers_are_found_once() {
        let found = hierarchies(HYBRID);
        let mounts: Vec<_> = found.iter().map(|h| h.mount.to_str().unwrap()).collect();
        assert_eq!(mounts, ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/cpuset", "/sys/fs/cgroup/unified"]);
        let kinds: Vec<_> = found.iter().map(|h| h.kind).collect();
        assert_eq!(kinds, [Kind::OtherV1, Kind::CpusetV1, Kind::V2]);
    }

    #[test]
    fn a_slice_is_unfolded_and_a_path_is_kept() {
        assert_eq!(
            parent_path("kubepods-burstable-pod1_2.slice").unwrap(),
            Path::new("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice")
        );
        assert_eq!(parent_path("/kubepods/burstable/pod1").unwrap(), Path::new("kubepods/burstable/pod1"));
        assert_eq!(parent_path("/a/b.slice").unwrap(), Path::new("a/b.slice"));
    }

    #[test]
    fn kills_for_want_of_memory_are_counted_on_both_kinds_of_hierarchy() {
        let dir = tempfile::tempdir().unwrap();
        let groups = ["v1", "v2", "none"].map(|name| dir.path().join(name));
        groups.iter().for_each(|group| fs::create_dir(group).unwrap());
        fs::write(groups[0].join("memory.oom_control"), "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
            .unwrap();
        assert_eq!(oom_kills(&groups), 1);
        fs::write(groups[1].join("memory.events"), "low 0\noom 9\noom_kill 2\noom_group_kill 7\n").unwrap();
        assert_eq!(oom_kills(&groups), 3);
    }

    #[test]
    fn a_level_that_others_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (parent, child) = (dir.path().join("a"), dir.path().join("a/b"));
        fs::create_dir_all(&child).unwrap();
        remove_parent(&parent).unwrap();
        assert!(child.is_dir());
        remove(&child).unwrap();
        remove(&child).unwrap();
        remove_parent(&parent).unwrap();
        assert!(!parent.exists());
    }

    #[test]
    fn a_parent_cannot_climb_out_of_the_hierarchy() {
        for bad in ["/a/../b", "../a", "a/./../..", "-.slice", "a--b.slice"] {
            assert!(parent_path(bad).is_err(), "{bad}");
        }
    }
}
