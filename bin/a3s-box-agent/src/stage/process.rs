//! What a process is when it starts: limits, identity, capabilities, filters.

use std::io;
use std::os::fd::AsFd;

use a3s_box_protocol::proto::{Capabilities, Process, Rlimit};
use rustix::fs::{Gid, Mode, Uid};
use rustix::process::{Resource, Rlimit as KernelRlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::error::{Context, StageError};
use super::program;
use super::tree::{Node, Tree};
use super::user::Identity;
use super::users::Owner;
use crate::sys;

/// Resource limits, checked and not yet in force.
#[derive(Debug)]
pub struct Limits(Vec<(String, Resource, KernelRlimit)>);

impl Limits {
    /// Checks names and values.
    pub fn parse(process: &Process) -> Result<Self, StageError> {
        process.rlimits.iter().map(parse_limit).collect::<Result<_, _>>().map(Self)
    }

    /// Puts them in force. Not earlier than needed: setting up a session takes more descriptors than some programs
    /// are to have. Not later either: in a user namespace nobody may raise a limit.
    pub fn apply(&self) -> Result<(), StageError> {
        for (name, resource, limit) in &self.0 {
            rustix::process::setrlimit(*resource, *limit).map_err(|e| StageError::Rlimit {
                name: name.clone(),
                reason: io::Error::from(e).to_string(),
            })?;
        }
        Ok(())
    }
}

fn parse_limit(limit: &Rlimit) -> Result<(String, Resource, KernelRlimit), StageError> {
    let fail = |reason: String| StageError::Rlimit { name: limit.name.clone(), reason };
    let resource = resource(&limit.name).ok_or_else(|| fail("no such limit".to_owned()))?;
    if limit.soft > limit.hard {
        return Err(fail(format!("the soft limit {} is above the hard limit {}", limit.soft, limit.hard)));
    }
    let value = |v: u64| (v != u64::MAX).then_some(v);
    let values = KernelRlimit { current: value(limit.soft), maximum: value(limit.hard) };
    Ok((limit.name.clone(), resource, values))
}

/// Sets the out-of-memory score, while the guest's own /proc is in sight. The agent's is inherited and would protect
/// the workload too. Where the value is refused the process runs with what it has.
pub fn set_oom_score(process: &Process) {
    let score = process.oom_score_adj.unwrap_or(0).clamp(-1000, 1000);
    let _ = std::fs::write("/proc/self/oom_score_adj", score.to_string());
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name.strip_prefix("RLIMIT_").unwrap_or(name).to_ascii_uppercase().as_str() {
        "CPU" => Resource::Cpu,
        "FSIZE" => Resource::Fsize,
        "DATA" => Resource::Data,
        "STACK" => Resource::Stack,
        "CORE" => Resource::Core,
        "RSS" => Resource::Rss,
        "NPROC" => Resource::Nproc,
        "NOFILE" => Resource::Nofile,
        "MEMLOCK" => Resource::Memlock,
        "AS" => Resource::As,
        "LOCKS" => Resource::Locks,
        "SIGPENDING" => Resource::Sigpending,
        "MSGQUEUE" => Resource::Msgqueue,
        "NICE" => Resource::Nice,
        "RTPRIO" => Resource::Rtprio,
        "RTTIME" => Resource::Rttime,
        _ => return None,
    })
}

/// Enters the working directory, which is made for `owner` if it is absent.
pub fn enter_working_directory(process: &Process, owner: Option<Owner>) -> Result<(), StageError> {
    let path = if process.cwd.is_empty() { "/" } else { process.cwd.as_str() };
    let fail = |source| StageError::WorkingDirectory { path: path.to_owned(), source };
    if !path.starts_with('/') {
        return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "it is not absolute")));
    }
    match rustix::process::chdir(path) {
        Err(rustix::io::Errno::NOENT) => {
            let root = Tree::open("/").map_err(fail)?.owned_by(owner);
            root.find_or_make(path, Node::Directory).map_err(fail)?;
            rustix::process::chdir(path).map_err(|e| fail(e.into()))
        }
        other => other.map_err(|e| fail(e.into())),
    }
}

/// Gives pipes to the process's user, so that it can open /dev/stdout again.
pub fn own_stdio(owner: Owner) {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    for stdio in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let is_pipe = rustix::fs::fstat(stdio)
            .is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode) == rustix::fs::FileType::Fifo);
        if is_pipe {
            // Only /dev/stdout would not open; that is no reason not to run.
            let _ = rustix::fs::fchown(stdio, Some(owner.uid), Some(owner.gid));
        }
    }
}

/// Drops to the process's identity and becomes the program. Comes back only with a reason.
pub fn become_program(process: &Process, identity: &Identity, env: &[String]) -> StageError {
    match drop_privileges(process, identity) {
        Ok(()) => program::execute(&process.args, env).into(),
        Err(error) => error,
    }
}

fn drop_privileges(process: &Process, identity: &Identity) -> Result<(), StageError> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    sys::close_on_exec_from(3).context("close", "descriptors")?;
    // Without no_new_privs a filter needs CAP_SYS_ADMIN, so it is installed before capabilities go.
    if !process.no_new_privileges && !process.seccomp_bpf.is_empty() {
        sys::install_seccomp(&process.seccomp_bpf).context("install", "the seccomp filter")?;
    }
    let capabilities = process.capabilities.unwrap_or_default();
    drop_bounding(capabilities.bounding)?;
    set_identity(identity)?;
    set_capabilities(&capabilities)?;
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).context("set", "no_new_privs")?;
        if !process.seccomp_bpf.is_empty() {
            sys::install_seccomp(&process.seccomp_bpf).context("install", "the seccomp filter")?;
        }
    }
    sys::reset_signals();
    Ok(())
}

/// Becomes a user of the guest without any group besides, for good: without root the capabilities go too.
pub fn become_user(uid: u32, gid: u32) -> Result<(), StageError> {
    rustix::thread::set_thread_groups(&[]).context("set", "supplemental groups")?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_res_gid(group, group, group).context("set gid", gid)?;
    rustix::thread::set_thread_res_uid(user, user, user).context("set uid", uid)
}

fn set_identity(identity: &Identity) -> Result<(), StageError> {
    rustix::thread::set_keep_capabilities(true).context("keep", "capabilities")?;
    let groups: Vec<Gid> = identity.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    rustix::thread::set_thread_groups(&groups).context("set", "supplemental groups")?;
    let gid = Gid::from_raw(identity.gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid).context("set gid", identity.gid)?;
    let uid = Uid::from_raw(identity.uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid).context("set uid", identity.uid)
}

fn each_capability() -> impl Iterator<Item = CapabilitySet> {
    (0..64)
        .map(|number| CapabilitySet::from_bits_retain(1 << number))
        .take_while(|capability| rustix::thread::capability_is_in_bounding_set(*capability).is_ok())
}

fn drop_bounding(bounding: u64) -> Result<(), StageError> {
    for capability in each_capability().filter(|c| bounding & c.bits() == 0) {
        rustix::thread::remove_capability_from_bounding_set(capability)
            .context("drop from the bounding set", format_args!("{capability:?}"))?;
    }
    Ok(())
}

fn set_capabilities(wanted: &Capabilities) -> Result<(), StageError> {
    // A newer host may name capabilities that this kernel does not have.
    let known = each_capability().fold(0, |all, c| all | c.bits());
    let set = |bits: u64| CapabilitySet::from_bits_retain(bits & known);
    let sets = CapabilitySets {
        effective: set(wanted.effective),
        permitted: set(wanted.permitted),
        inheritable: set(wanted.inheritable),
    };
    rustix::thread::set_capabilities(None, sets).context("set", "capabilities")?;
    rustix::thread::clear_ambient_capability_set().context("clear", "ambient capabilities")?;
    for capability in each_capability().filter(|c| wanted.ambient & c.bits() != 0) {
        rustix::thread::configure_capability_in_ambient_set(capability, true)
            .context("raise in the ambient set", format_args!("{capability:?}"))?;
    }
    Ok(())
}

/// Makes a terminal in the session's own devpts, makes it this process's controlling terminal and its
/// stdio, and returns the master and the slave's path. `group` is the one of terminals, if the session has it.
pub fn open_terminal(process: &Process, owner: Owner, group: Option<Gid>) -> Result<Terminal, StageError> {
    use rustix::fs::OFlags;
    use rustix::pty::OpenptFlags;

    let master =
        rustix::fs::open("/dev/ptmx", OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
            .context("open", "/dev/ptmx")?;
    rustix::pty::unlockpt(&master).context("unlock", "a terminal")?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY)
        .context("open", "a terminal")?;
    let size = rustix::termios::Winsize {
        ws_row: process.rows.try_into().unwrap_or(u16::MAX),
        ws_col: process.columns.try_into().unwrap_or(u16::MAX),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    if size.ws_row != 0 && size.ws_col != 0 {
        rustix::termios::tcsetwinsize(&master, size).context("set the size of", "a terminal")?;
    }
    rustix::fs::fchown(&slave, Some(owner.uid), group).context("own", "a terminal")?;
    rustix::process::ioctl_tiocsctty(&slave).context("take", "the controlling terminal")?;
    nix::unistd::dup2_stdin(&slave).context("duplicate", "stdin")?;
    nix::unistd::dup2_stdout(&slave).context("duplicate", "stdout")?;
    nix::unistd::dup2_stderr(&slave).context("duplicate", "stderr")?;
    let path = rustix::pty::ptsname(master.as_fd(), Vec::new()).context("name", "a terminal")?;
    Ok(Terminal { master, path: path.to_string_lossy().into_owned() })
}

/// A terminal of this process.
#[derive(Debug)]
pub struct Terminal {
    /// For the agent.
    pub master: std::os::fd::OwnedFd,
    /// `/dev/pts/N` in the session.
    pub path: String,
}
