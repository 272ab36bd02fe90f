//! What a pod can leave behind on a machine, looked at before and after.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use crate::wait;

/// How long the kernel may take to finish what was asked for (processes to be reaped, namespaces to go).
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// The things of this machine that pods bring about, each as a line of text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    processes: BTreeSet<String>,
    mounts: BTreeSet<String>,
    namespaces: BTreeSet<String>,
    links: BTreeSet<String>,
    cgroups: BTreeSet<String>,
    files: BTreeSet<String>,
}

/// Folders where runtimes and CNI plugins put files, with the depth that is looked at.
const FOLDERS: &[(&str, u32)] = &[
    ("/run", 1),
    ("/run/cni", 3),
    ("/var/lib", 1),
    ("/var/lib/cni", 3),
    ("/var/lib/kubelet", 1),
    ("/var/log", 1),
    ("/var/log/pods", 2),
    ("/var/cache", 1),
    ("/etc", 1),
    ("/etc/cni", 3),
];

/// What the names of pods' cgroups have in them: ours, kubelet's, and those of other runtimes.
const CGROUPS: &[&str] = &["a3s", "kubepods", "k8s.io"];

impl Machine {
    /// Looks at the machine. Processes count when they have to do with `state`: the machine runs other things too.
    pub fn look(state: &Path) -> Result<Self> {
        Ok(Self {
            processes: processes_of(state)?,
            mounts: mounts()?,
            namespaces: names(Path::new("/run/netns"))?,
            links: names(Path::new("/sys/class/net"))?,
            cgroups: cgroups()?,
            files: files()?,
        })
    }

    /// What is there now and was not before.
    pub fn since(&self, before: &Self) -> Leftovers {
        let sort = |kind, now: &BTreeSet<String>, before: &BTreeSet<String>| -> Vec<(&'static str, String)> {
            now.difference(before).map(|item| (kind, item.clone())).collect()
        };
        let mut found = sort("process", &self.processes, &before.processes);
        found.extend(sort("mount", &self.mounts, &before.mounts));
        found.extend(sort("network namespace", &self.namespaces, &before.namespaces));
        found.extend(sort("network link", &self.links, &before.links));
        found.extend(sort("cgroup", &self.cgroups, &before.cgroups));
        found.extend(sort("file", &self.files, &before.files));
        Leftovers(found)
    }

    /// Looks again until nothing more than before is there, or the time to settle is over.
    pub async fn settled(state: &Path, before: &Self) -> Result<Leftovers> {
        let mut last = Leftovers(Vec::new());
        let clean = wait::until("a clean machine", SETTLE_LIMIT, || {
            let found = Self::look(state).map(|now| now.since(before));
            let answer = found.map(|found| {
                last = found;
                last.0.is_empty().then_some(())
            });
            async move { answer }
        })
        .await;
        match clean {
            Ok(()) => Ok(Leftovers(Vec::new())),
            Err(error) if last.0.is_empty() => Err(error),
            Err(_) => Ok(last),
        }
    }
}

/// What was left behind: kind and name of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers(pub Vec<(&'static str, String)>);

impl Leftovers {
    /// Whether nothing was.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, name) in &self.0 {
            writeln!(f, "{kind}: {name}")?;
        }
        Ok(())
    }
}

/// Processes that were started with the folder, stand in it, or mount something from it.
fn processes_of(state: &Path) -> Result<BTreeSet<String>> {
    let needle = state.to_string_lossy();
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(pid) =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // Our own command line names the folder too.
        if pid == std::process::id() {
            continue;
        }
        let mentions = |file: &str| {
            fs::read(path.join(file))
                .is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(needle.as_ref()))
        };
        let stands_in =
            |link: &str| fs::read_link(path.join(link)).is_ok_and(|target| target.starts_with(state));
        if mentions("cmdline")
            || mentions("environ")
            || stands_in("cwd")
            || stands_in("root")
            || mounts_from(&path, &needle)
        {
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            found.insert(format!("{pid} {}", name.trim()));
        }
    }
    Ok(found)
}

/// Whether the process lives in a mount namespace of its own that shows something from below the folder.
fn mounts_from(process: &Path, folder: &str) -> bool {
    let namespace = |path: &Path| fs::read_link(path.join("ns/mnt")).ok();
    if namespace(process) == namespace(Path::new("/proc/self")) {
        return false;
    }
    fs::read_to_string(process.join("mountinfo")).is_ok_and(|text| text.contains(folder))
}

/// Mount points of our namespace, without the numbers that change with every mount.
fn mounts() -> Result<BTreeSet<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(text.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect())
}

fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    list(folder, 1, &mut found)?;
    Ok(found.into_iter().map(|path| path.to_string_lossy().into_owned()).collect())
}

fn files() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for (folder, depth) in FOLDERS {
        list(Path::new(folder), *depth, &mut found)?;
    }
    // All instances of a machine share the built-in bridge, and its lock stays.
    found.remove(Path::new("/run/a3s-box"));
    // Everybody writes to /tmp: only names that are ours by their look.
    let mut temporary = BTreeSet::new();
    list(Path::new("/tmp"), 1, &mut temporary)?;
    found.extend(temporary.into_iter().filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.contains("a3s") || name.contains("krun") || name.contains("cni")
    }));
    Ok(found.into_iter().map(|path| path.to_string_lossy().into_owned()).collect())
}

/// The cgroups of every hierarchy that are ours by their look: service managers make others at any time.
fn cgroups() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    list_folders(Path::new("/sys/fs/cgroup"), &mut found)?;
    found.retain(|path| CGROUPS.iter().any(|name| path.contains(name)));
    Ok(found)
}

fn list_folders(folder: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in present(fs::read_dir(folder))?.into_iter().flatten() {
        let Some(entry) = present(entry)? else { continue };
        if present(entry.file_type())?.is_some_and(|kind| kind.is_dir()) {
            found.insert(entry.path().to_string_lossy().into_owned());
            list_folders(&entry.path(), found)?;
        }
    }
    Ok(())
}

fn list(folder: &Path, depth: u32, found: &mut BTreeSet<PathBuf>) -> Result<()> {
    for entry in present(fs::read_dir(folder))?.into_iter().flatten() {
        let Some(entry) = present(entry)? else { continue };
        found.insert(entry.path());
        if depth > 1 && present(entry.file_type())?.is_some_and(|kind| kind.is_dir()) {
            list(&entry.path(), depth - 1, found)?;
        }
    }
    Ok(())
}

/// Things may go while we look: gone is not an error.
fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Machine;

    #[test]
    fn a_process_that_stands_in_the_folder_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let before = Machine::look(folder.path()).expect("a look");
        let mut child =
            std::process::Command::new("sleep").arg("60").current_dir(folder.path()).spawn().expect("sleep");
        let after = Machine::look(folder.path()).expect("a look");
        child.kill().expect("kill");
        child.wait().expect("wait");
        let found = after.since(&before);
        assert!(found.0.contains(&("process", format!("{} sleep", child.id()))), "{found}");
    }

    #[test]
    fn what_was_there_before_is_no_leftover() {
        let before = Machine::look(Path::new("/nowhere")).expect("a look");
        assert!(before.since(&before).is_empty());
    }
}
