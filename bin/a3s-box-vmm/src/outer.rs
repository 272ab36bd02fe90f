//! The part before the box has a PID namespace: joins what the pod has, then clones the inner process.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;

use a3s_box_vmm::MachineFacts;
use a3s_box_vmm::launch::{FACTS_FILE, Hypervisor, LaunchSpec, Report, VSOCK_DIR, start_ticks};
use anyhow::{Context, bail};
use rustix::fs::{CWD, Gid, Mode, OFlags, chmod, chown, openat};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, setsid, umask};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::status::Status;

/// Which of the two processes this is.
pub(crate) enum Role {
    /// The one that the daemon spawned; nothing is left to do.
    Outer,
    /// The first of the box's PID namespace.
    Inner,
}

/// Prepares the process and splits it in two.
pub(crate) fn split(spec: &LaunchSpec, status: &Status) -> anyhow::Result<Role> {
    // The end of the daemon, or of a terminal, is not ours.
    setsid().context("start a session")?;
    umask(Mode::from_raw_mode(0o022));
    join_cgroups(&spec.plan.cgroups)?;
    enter_network(spec)?;
    raise_file_limit()?;
    if let Hypervisor::Qemu(qemu) = &spec.hypervisor {
        // Its device connects to the host's sockets there and makes none of its own.
        let (sockets, gid) = (spec.plan.dir.join(VSOCK_DIR), qemu.uid);
        chown(&sockets, None, Some(Gid::from_raw(gid)))
            .and_then(|()| chmod(&sockets, Mode::from_raw_mode(0o710)))
            .with_context(|| format!("open {} to gid {gid}", sockets.display()))?;
    }
    let (wait, release) = std::io::pipe().context("make a pipe")?;
    let Some(pid) = clone_inner()? else {
        drop(release);
        return wait_for_release(wait);
    };
    drop(wait);
    // Facts first: a daemon that dies after the release still finds the process.
    let start_ticks = start_ticks(pid)?.context("the inner process ended at once")?;
    let facts = MachineFacts { backend: spec.backend(), pid, start_ticks };
    write_facts(&spec.plan.dir, &facts)?;
    status.send(&Report::Started { pid, start_ticks })?;
    let mut release = release;
    release.write_all(&[1]).context("release the inner process")?;
    Ok(Role::Outer)
}

fn wait_for_release(mut wait: std::io::PipeReader) -> anyhow::Result<Role> {
    use std::io::Read;
    match wait.read(&mut [0]) {
        Ok(1) => Ok(Role::Inner),
        // The outer process was ended before anybody knew of this one.
        Ok(_) => bail!("ended before the start"),
        Err(error) => Err(error).context("wait for the start"),
    }
}

fn join_cgroups(cgroups: &[std::path::PathBuf]) -> anyhow::Result<()> {
    for cgroup in cgroups {
        let file = cgroup.join("cgroup.procs");
        let opened = std::fs::OpenOptions::new().write(true).open(&file);
        opened
            .and_then(|mut procs| procs.write_all(b"0"))
            .with_context(|| format!("join {}", file.display()))?;
    }
    Ok(())
}

/// Closes what whoever started the daemon forgot to: a VMM must hold nothing that its plan does not name. Called
/// before anything is opened.
#[allow(unsafe_code)]
pub(crate) fn close_strays() {
    // SAFETY: no descriptor above standard error is owned by anything in this process yet. A kernel without
    // this call leaves them open.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

/// Without a network the box gets a namespace of its own with nothing in it, never the host's.
fn enter_network(spec: &LaunchSpec) -> anyhow::Result<()> {
    let Some(network) = &spec.plan.network else {
        return unshare_network();
    };
    let path = &network.netns;
    let netns = openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("open the network namespace {}", path.display()))?;
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("enter the network namespace {}", path.display()))
}

#[allow(unsafe_code)]
fn unshare_network() -> anyhow::Result<()> {
    // SAFETY: only UnshareFlags::FILES is unsafe, and it is not given.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
        .context("make an empty network namespace")
}

/// The file server keeps a descriptor per inode that the guest knows; the usual soft limit is 1024.
fn raise_file_limit() -> anyhow::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
        .context("raise the limit of open files")
}

fn write_facts(dir: &Path, facts: &MachineFacts) -> anyhow::Result<()> {
    let (path, partial) = (dir.join(FACTS_FILE), dir.join(format!("{FACTS_FILE}.partial")));
    std::fs::write(&partial, serde_json::to_vec(facts)?)
        .and_then(|()| std::fs::rename(&partial, &path))
        .with_context(|| format!("write {}", path.display()))
}

/// clone(2) like fork, with the daemon as parent: `None` in the new process.
#[allow(unsafe_code)]
fn clone_inner() -> anyhow::Result<Option<i32>> {
    let namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let flags = i64::from(namespaces | libc::CLONE_PARENT | libc::SIGCHLD);
    // SAFETY: without CLONE_VM and with a null stack this is fork: the new process has its own copy of all memory.
    // This process has one thread, so no lock is held by a thread that the copy lacks.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        0 => Ok(None),
        -1 => Err(std::io::Error::last_os_error()).context("start a process in new namespaces"),
        pid => Ok(Some(pid as i32)),
    }
}
