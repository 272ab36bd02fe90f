//! What is set once per box: host name, kernel parameters, network, /dev/shm, clock.

use std::io;
use std::time::Duration;

use a3s_box_protocol::proto::ConfigureSandboxRequest;
use rustix::time::{ClockId, Timespec};
use thiserror::Error;

use crate::boot::mounts::SHM_FLAGS;
use crate::netlink::{self, NetlinkError};
use crate::{paths, reaper};

/// Kubernetes' default.
const DEFAULT_SHM: u64 = 64 * 1024 * 1024;
/// A clock that is off by less is left alone.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(500);

/// Something that the box cannot be.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The kernel refuses the name.
    #[error("host name {name:?}: {source}")]
    Hostname {
        /// As asked for.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A name that is no kernel parameter.
    #[error("sysctl {key:?} is no name of a kernel parameter")]
    SysctlName {
        /// As asked for.
        key: String,
    },
    /// A parameter that this kernel does not have, or a value that it refuses.
    #[error("sysctl {key} = {value:?}: {source}")]
    Sysctl {
        /// As asked for.
        key: String,
        /// As asked for.
        value: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A NIC.
    #[error(transparent)]
    Network(#[from] NetlinkError),
    /// /dev/shm.
    #[error("size of /dev/shm: {0}")]
    Shm(#[source] io::Error),
    /// The clock.
    #[error("set the clock: {0}")]
    Clock(#[source] io::Error),
}

/// Configures the box. Repeating it with the same request changes nothing.
pub fn configure(request: &ConfigureSandboxRequest) -> Result<(), SandboxError> {
    if request.unix_time_ns != 0 {
        set_clock(request.unix_time_ns).map_err(SandboxError::Clock)?;
    }
    if !request.hostname.is_empty() {
        rustix::system::sethostname(request.hostname.as_bytes())
            .map_err(|e| SandboxError::Hostname { name: request.hostname.clone(), source: e.into() })?;
    }
    let size = if request.shm_bytes == 0 { DEFAULT_SHM } else { request.shm_bytes };
    let options = std::ffi::CString::new(format!("size={size}")).map_err(|e| SandboxError::Shm(e.into()))?;
    rustix::mount::mount_remount(paths::SHM, SHM_FLAGS, &*options)
        .map_err(|e| SandboxError::Shm(e.into()))?;
    for interface in &request.interfaces {
        netlink::configure(interface)?;
    }
    // Last, so that parameters of an interface find it. One whose numbers are the pod's own was set where they are.
    let elsewhere = |key: &str| request.user_namespace.is_some() && is_ping_groups(key);
    let mut ours = request.sysctls.iter().filter(|(key, _)| !elsewhere(key));
    ours.try_for_each(|(key, value)| set_sysctl(key, value))
}

/// The groups that may ping, if the request says which: the one parameter of a network that holds numbers of groups. Who
/// writes it decides whose numbers they are.
pub fn ping_groups(request: &ConfigureSandboxRequest) -> Option<&str> {
    request.sysctls.iter().find(|(key, _)| is_ping_groups(key)).map(|(_, value)| value.as_str())
}

fn is_ping_groups(key: &str) -> bool {
    sysctl_path(key).as_deref() == Some(paths::PING_GROUPS)
}

fn set_sysctl(key: &str, value: &str) -> Result<(), SandboxError> {
    let path = sysctl_path(key).ok_or_else(|| SandboxError::SysctlName { key: key.to_owned() })?;
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
        .map_err(|source| SandboxError::Sysctl { key: key.to_owned(), value: value.to_owned(), source })
}

/// As sysctl(8): the first separator decides, and the other sign is then part of a name
/// (`net.ipv4.conf.eth0/1.forwarding`, `net/ipv4/conf/eth0.1/forwarding`).
fn sysctl_path(key: &str) -> Option<String> {
    let first = key.find(['.', '/'])?;
    let path: String = if key.as_bytes()[first] == b'/' {
        key.to_owned()
    } else {
        key.chars()
            .map(|c| {
                if c == '.' {
                    '/'
                } else if c == '/' {
                    '.'
                } else {
                    c
                }
            })
            .collect()
    };
    let sane =
        path.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'));
    sane.then(|| format!("/proc/sys/{path}"))
}

fn set_clock(unix_time_ns: u64) -> io::Result<()> {
    if unix_time_ns.abs_diff(reaper::now_ns()) < CLOCK_TOLERANCE.as_nanos() as u64 {
        return Ok(());
    }
    let time = Timespec {
        tv_sec: (unix_time_ns / 1_000_000_000) as i64,
        tv_nsec: (unix_time_ns % 1_000_000_000) as i64,
    };
    Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_dots_and_slashes_are_read_as_sysctl_reads_them() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward").unwrap(), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(
            sysctl_path("net.ipv4.conf.eth0/1.forwarding").unwrap(),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/mtu").unwrap(), "/proc/sys/net/ipv4/conf/eth0.1/mtu");
    }

    #[test]
    fn names_that_climb_are_no_names() {
        for key in ["", "kernel", "net/../../etc/passwd", "/etc/passwd", "net..ipv4", ".x", "a.//.b"] {
            assert_eq!(sysctl_path(key), None, "{key}");
        }
    }
}
