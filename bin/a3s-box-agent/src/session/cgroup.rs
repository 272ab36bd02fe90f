//! The cgroup (v2) of one session.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use a3s_box_protocol::proto::{CgroupSetting, Resources};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use thiserror::Error;

use super::devices;
use crate::stats::counters::number;
use crate::{paths, sys};

/// How often a cgroup is asked whether it is empty, with doubling pauses from one millisecond.
const REMOVE_ATTEMPTS: u32 = 13;
/// A workload may nest cgroups; no more of them are removed or signalled in one go.
const MAX_NESTED: usize = 4096;

/// A cgroup that could not be made, set or removed.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// A file or directory of it.
    #[error("cgroup {path}: {step}: {source}")]
    File {
        /// Below /sys/fs/cgroup.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel has no such setting.
    #[error("cgroup setting {file:?} does not exist in this guest")]
    UnknownSetting {
        /// File name as the host gave it.
        file: String,
    },
    /// The memory limit is below what is in use.
    #[error("memory.max = {wanted} is less than the {used} bytes in use; processes would be killed")]
    InUse {
        /// Bytes.
        wanted: u64,
        /// Bytes.
        used: u64,
    },
    /// The kernel refuses the value.
    #[error("cgroup setting {file} = {value:?}: {source}")]
    Refused {
        /// File name.
        file: String,
        /// Value.
        value: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A session's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes the cgroup and writes the settings in their order. Unless `all_devices`, its processes may open the usual
    /// devices only. What was made is removed again when a step fails.
    pub fn create(id: &str, resources: &Resources, all_devices: bool) -> Result<Self, CgroupError> {
        let path = Path::new(paths::POD_CGROUP).join(id);
        if let Err(source) = rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755)) {
            return Err(CgroupError::File { path, step: "make", source: source.into() });
        }
        let cgroup = Self::open(path)?;
        match cgroup.apply(&resources.settings).and_then(|()| cgroup.confine(all_devices)) {
            Ok(()) => Ok(cgroup),
            Err(error) => {
                // Nothing runs in it yet; if it stays, the box is broken anyway and says so at the next create.
                let _ = std::fs::remove_dir(&cgroup.path);
                Err(error)
            }
        }
    }

    fn confine(&self, all_devices: bool) -> Result<(), CgroupError> {
        if all_devices {
            return Ok(());
        }
        devices::confine(self.directory()).map_err(|source| CgroupError::File {
            path: self.path.clone(),
            step: "confine to devices",
            source,
        })
    }

    /// The cgroup above those of all sessions.
    pub fn pod() -> Result<Self, CgroupError> {
        Self::open(PathBuf::from(paths::POD_CGROUP))
    }

    fn open(path: PathBuf) -> Result<Self, CgroupError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(directory) => Ok(Self { path, directory }),
            Err(source) => Err(CgroupError::File { path, step: "open", source: source.into() }),
        }
    }

    /// Writes settings in their order, or none: when one is refused those before it get their old values back. A memory
    /// limit below what is in use is refused, because the kernel would kill for it.
    pub fn update(&self, settings: &[CgroupSetting]) -> Result<(), CgroupError> {
        let mut before = Vec::new();
        for setting in settings {
            let written = self.check_memory(setting).and_then(|()| {
                let value = self.read(&setting.file).unwrap_or_default().trim().to_owned();
                self.set(setting)?;
                before.push(CgroupSetting { file: setting.file.clone(), value });
                Ok(())
            });
            if let Err(error) = written {
                for old in before.iter().rev() {
                    // The kernel took this value once.
                    let _ = self.set(old);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn check_memory(&self, setting: &CgroupSetting) -> Result<(), CgroupError> {
        if setting.file != "memory.max" {
            return Ok(());
        }
        let used = self.read("memory.current").ok().and_then(|text| number(&text));
        match number(&setting.value).zip(used) {
            Some((wanted, used)) if wanted < used => Err(CgroupError::InUse { wanted, used }),
            Some(_) | None => Ok(()),
        }
    }

    /// Writes settings in their order.
    pub fn apply(&self, settings: &[CgroupSetting]) -> Result<(), CgroupError> {
        settings.iter().try_for_each(|s| self.set(s))
    }

    fn set(&self, setting: &CgroupSetting) -> Result<(), CgroupError> {
        let unknown = || CgroupError::UnknownSetting { file: setting.file.clone() };
        if setting.file.contains('/') || setting.file.starts_with("cgroup.") {
            return Err(unknown());
        }
        match self.write(&setting.file, &setting.value) {
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => Err(unknown()),
            Err(source) => Err(CgroupError::Refused {
                file: setting.file.clone(),
                value: setting.value.clone(),
                source: source.into(),
            }),
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<(), Errno> {
        let file =
            rustix::fs::openat(&self.directory, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, value.as_bytes()).map(drop)
    }

    fn read(&self, file: &str) -> io::Result<String> {
        std::fs::read_to_string(self.path.join(file))
    }

    /// For clone3.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Whether the out-of-memory killer ended a process in it.
    pub fn oom_killed(&self) -> bool {
        let count = |text: String| {
            text.lines().find_map(|l| l.strip_prefix("oom_kill ").and_then(|n| n.trim().parse::<u64>().ok()))
        };
        self.read("memory.events").ok().and_then(count).is_some_and(|n| n > 0)
    }

    /// SIGKILLs every process in it and below. One that is gone has none.
    pub fn kill(&self) -> Result<(), CgroupError> {
        match self.write("cgroup.kill", "1") {
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => Ok(()),
            Err(source) => {
                Err(CgroupError::File { path: self.path.clone(), step: "kill", source: source.into() })
            }
        }
    }

    /// Sends a signal to every process in it and below.
    pub fn signal(&self, number: i32) -> io::Result<()> {
        if number == libc::SIGKILL {
            return self.kill().map_err(io::Error::other);
        }
        for pid in self.processes()? {
            match sys::kill(pid, number) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// The processes in it and below.
    pub fn processes(&self) -> io::Result<Vec<i32>> {
        let mut found = Vec::new();
        for directory in self.nested() {
            let processes = std::fs::read_to_string(directory.join("cgroup.procs"))?;
            found.extend(processes.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|p| *p > 0));
        }
        Ok(found)
    }

    /// Itself and the cgroups that the workload made in it, every parent before its children.
    fn nested(&self) -> Vec<PathBuf> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while next < found.len() && found.len() < MAX_NESTED {
            let below: Vec<PathBuf> = subdirectories(&found[next]);
            found.extend(below);
            next += 1;
        }
        found
    }

    /// Removes it with all cgroups below, once their last processes are gone. Being gone already is success.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        let mut pause = Duration::from_millis(1);
        for attempt in 1.. {
            match self.try_remove() {
                Ok(()) => break,
                Err(_) if attempt < REMOVE_ATTEMPTS => {
                    self.kill()?;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
                Err(source) => {
                    return Err(CgroupError::File {
                        path: self.path.clone(),
                        step: "remove",
                        source: source.into(),
                    });
                }
            }
        }
        Ok(())
    }

    fn try_remove(&self) -> Result<(), Errno> {
        match rustix::fs::rmdir(&self.path) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(_) => {}
        }
        for directory in self.nested().iter().rev() {
            match rustix::fs::rmdir(directory) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn subdirectories(path: &Path) -> Vec<PathBuf> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(directory) = rustix::fs::open(path, flags, Mode::empty()).and_then(Dir::new) else {
        return Vec::new();
    };
    directory
        .flatten()
        .filter(|e| e.file_type() == FileType::Directory)
        .filter_map(|e| e.file_name().to_str().ok().map(str::to_owned))
        .filter(|name| name != "." && name != "..")
        .map(|name| path.join(name))
        .collect()
}

/// Makes the cgroup above all sessions and hands every controller down to them.
pub fn set_up_root() -> io::Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let controllers = std::fs::read_to_string(root.join("cgroup.controllers"))?;
    let all: String = controllers.split_whitespace().map(|c| format!("+{c} ")).collect();
    std::fs::write(root.join("cgroup.subtree_control"), all.trim_end())?;
    std::fs::create_dir(paths::POD_CGROUP)?;
    std::fs::write(Path::new(paths::POD_CGROUP).join("cgroup.subtree_control"), all.trim_end())
}

/// The cgroup that `pid` is in, opened: a workload that divides its cgroup can no longer hold processes in
/// it, so newcomers go where its first process is.
pub fn of_process(pid: i32) -> io::Result<OwnedFd> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text.lines().find_map(|l| l.strip_prefix("0::/")).ok_or(io::ErrorKind::NotFound)?;
    let root = rustix::fs::open(
        "/sys/fs/cgroup",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(&root, path, flags, Mode::empty())?;
    // An empty path would be the root, where nothing limits it.
    rustix::fs::statat(&opened, "cgroup.events", AtFlags::empty())?;
    Ok(opened)
}
