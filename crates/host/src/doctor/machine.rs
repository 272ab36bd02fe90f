//! Checks of the machine itself.

use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::config::NetworkMode;

use super::{Check, Verdict};

const GIB: u64 = 1 << 30;

pub(super) fn privileges() -> Check {
    const NAME: &str = "privileges";
    if rustix::process::geteuid().is_root() {
        Check::ok(NAME, "running as root")
    } else {
        Check::lacking(NAME, Verdict::Fail, "not running as root", "run as root: sudo a3s-box doctor")
    }
}

/// Mounts are given to boxes with open_tree, move_mount (5.2) and mount_setattr (5.12).
pub(super) fn host_kernel() -> Check {
    const NAME: &str = "host kernel";
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    match version(&release) {
        Some(version) if version < (5, 12) => Check::lacking(
            NAME,
            Verdict::Fail,
            format!("Linux {release}"),
            "use Linux 5.12 or newer: older ones lack mount_setattr",
        ),
        Some(_) | None => Check::ok(NAME, format!("Linux {release}")),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

pub(super) fn tun(mode: NetworkMode) -> Check {
    const NAME: &str = "tap devices";
    let path = Path::new("/dev/net/tun");
    match (std::fs::OpenOptions::new().read(true).write(true).open(path), mode) {
        (Ok(_), _) => Check::ok(NAME, "/dev/net/tun opens"),
        (Err(error), NetworkMode::None) => Check::ok(NAME, format!("not needed without a network ({error})")),
        (Err(error), NetworkMode::Cni | NetworkMode::Local) => Check::lacking(
            NAME,
            Verdict::Fail,
            format!("/dev/net/tun: {error}"),
            "load the tun module (modprobe tun), or set network.mode = \"none\"",
        ),
    }
}

pub(super) fn cgroups(at: &Path) -> Check {
    const NAME: &str = "cgroups";
    if let Ok(controllers) = std::fs::read_to_string(at.join("cgroup.controllers")) {
        return Check::ok(NAME, format!("version 2 ({})", controllers.trim()));
    }
    let present: Vec<_> =
        ["cpu", "memory", "pids"].into_iter().filter(|name| at.join(name).is_dir()).collect();
    let unified = at.join("unified").is_dir();
    match (present.len(), unified) {
        (3, true) => Check::ok(NAME, "version 1, with version 2 at unified/"),
        (3, false) => Check::ok(NAME, "version 1"),
        (0, false) => Check::lacking(
            NAME,
            Verdict::Warn,
            format!("nothing is mounted at {}", at.display()),
            "mount cgroup2 there; without it a pod's VM is not bounded on the host",
        ),
        (_, _) => Check::lacking(
            NAME,
            Verdict::Warn,
            format!("version 1 with {} only", present.join(", ")),
            "mount the cpu, memory and pids controllers; without them a pod's VM is not bounded on the host",
        ),
    }
}

pub(super) fn disk(root: &Path) -> Check {
    const NAME: &str = "disk space";
    // The state directory may not exist yet; what counts is the file system that it will be on.
    let existing = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(existing) {
        Err(error) => Check::lacking(
            NAME,
            Verdict::Warn,
            format!("{}: {error}", existing.display()),
            "check that the state directory (root) is on a working disk",
        ),
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let found = format!("{} free for {}", gib(free), root.display());
            let remedy = "free some space, or move the state with root or --root";
            match free {
                free if free < GIB => Check::lacking(NAME, Verdict::Fail, found, remedy),
                free if free < 5 * GIB => Check::lacking(NAME, Verdict::Warn, found, remedy),
                _ => Check::ok(NAME, found),
            }
        }
    }
}

pub(super) fn memory(default_mib: u32) -> Check {
    const NAME: &str = "memory";
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let Some(available) = available_memory(&text) else {
        return Check::lacking(NAME, Verdict::Warn, "/proc/meminfo says nothing", "mount proc at /proc");
    };
    let found = format!("{} available", gib(available));
    let remedy = "free memory, or give pods less with size.memory_mib";
    if available < 256 << 20 {
        Check::lacking(NAME, Verdict::Fail, found, remedy)
    } else if available < u64::from(default_mib) << 20 {
        Check::lacking(
            NAME,
            Verdict::Warn,
            format!("{found}, less than one pod of default size ({default_mib} MiB) can use"),
            remedy,
        )
    } else {
        Check::ok(NAME, found)
    }
}

fn available_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// A VMM holds a descriptor for every file of the share that its guest knows.
pub(super) fn descriptors() -> Check {
    const NAME: &str = "open files";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    match limit.maximum {
        Some(most) if most < 65_536 => Check::lacking(
            NAME,
            Verdict::Warn,
            format!("at most {most} per process"),
            "raise the hard limit: LimitNOFILE=1048576 in the systemd unit, or ulimit -Hn 1048576",
        ),
        Some(most) => Check::ok(NAME, format!("at most {most} per process")),
        None => Check::ok(NAME, "not limited"),
    }
}

pub(super) fn daemon(socket: &Path) -> Check {
    const NAME: &str = "daemon";
    match UnixStream::connect(socket) {
        Ok(_) => Check::ok(NAME, format!("answers at {}", socket.display())),
        Err(error) => Check::lacking(
            NAME,
            Verdict::Warn,
            format!("nobody answers at {} ({error})", socket.display()),
            "start it for Kubernetes (systemctl start a3s-box); `a3s-box run` works without it",
        ),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / GIB as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_compared_by_number() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert!(version("5.4.0").unwrap() < (5, 12));
        assert_eq!(version("weird"), None);
    }

    #[test]
    fn available_memory_is_read_in_bytes() {
        assert_eq!(available_memory("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2048 * 1024));
        assert_eq!(available_memory("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn both_cgroup_versions_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cgroups(dir.path()).verdict, Verdict::Warn);
        for name in ["cpu", "memory", "pids", "unified"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(cgroups(dir.path()).found, "version 1, with version 2 at unified/");
        std::fs::write(dir.path().join("cgroup.controllers"), "cpu memory\n").unwrap();
        assert_eq!(cgroups(dir.path()).found, "version 2 (cpu memory)");
    }

    #[test]
    fn a_state_directory_that_does_not_exist_yet_is_measured_on_its_future_disk() {
        assert!(disk(Path::new("/nonexistent/a/b")).found.contains("free for /nonexistent/a/b"));
    }

    #[test]
    fn a_socket_that_nobody_serves_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        assert_eq!(daemon(&socket).verdict, Verdict::Warn);
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(daemon(&socket).verdict, Verdict::Ok);
    }
}
