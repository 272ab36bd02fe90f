//! The helper processes that become sessions' processes.
//!
//! The agent starts itself anew (see `spawn`) with a role in `argv[0]`: a fresh, single-threaded process
//! that reads what to do from a memory file, says how it went on the control socket and then executes the
//! program. It is never dumpable, so that nobody in a shared pid namespace can look into it.

pub mod copy;
pub mod devices;
pub mod environment;
pub mod error;
pub mod filesystem;
pub mod images;
pub mod mounts;
pub mod process;
pub mod program;
pub mod remove;
pub mod rootfs;
pub mod tree;
pub mod user;
pub mod users;
pub mod volumes;

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use a3s_box_protocol::proto::{CreateSessionRequest, Process, UserNamespace, UserNumbers};
use nix::sched::{CloneFlags, setns};
use prost::Message;
use rustix::fs::Gid;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::DumpableBehavior;

use crate::control::{self, Report};
use crate::{paths, sys};
use error::{Context, StageError};
use process::Terminal;
use user::Identity;
use users::Users;

/// `argv[0]` of a process that becomes a session's first process.
pub const SESSION: &CStr = c"a3s-session";
/// `argv[0]` of a process that joins a session.
pub const EXEC: &CStr = c"a3s-exec";
/// `argv[0]` of process 1 of the pod's shared pid namespace, as those who look for a pod's pause process know it.
pub const PAUSE: &CStr = c"/pause";
/// `argv[0]` of a process that deletes a directory tree.
pub const REMOVE: &CStr = c"a3s-remove";

/// `argv[0]` of the process that makes the pod's user namespace.
pub const USERS: &CStr = c"a3s-users";

/// The specification, a memory file.
pub const SPEC_FD: RawFd = 3;
/// The control socket.
pub const CONTROL_FD: RawFd = 4;
/// Exec: the session's mount namespace.
pub const MOUNT_NS_FD: RawFd = 5;
/// Exec: the session's cgroup namespace.
pub const CGROUP_NS_FD: RawFd = 6;
/// The pod's user namespace, if it has one.
pub const USER_NS_FD: RawFd = 7;

/// What a session's stage is told.
#[derive(Clone, PartialEq, Message)]
pub struct SessionStage {
    /// As the host asked.
    #[prost(message, optional, tag = "1")]
    pub request: Option<CreateSessionRequest>,
    /// Mount points of the layers, lowest first.
    #[prost(string, repeated, tag = "2")]
    pub layers: Vec<String>,
    /// The session's directory on the scratch disk.
    #[prost(string, tag = "3")]
    pub directory: String,
    /// The mapping of the pod's user namespace.
    #[prost(message, optional, tag = "4")]
    pub users: Option<UserNamespace>,
}

/// What an exec's stage is told.
#[derive(Clone, PartialEq, Message)]
pub struct ExecStage {
    /// As the host asked.
    #[prost(message, optional, tag = "1")]
    pub process: Option<Process>,
    /// The mapping of the pod's user namespace.
    #[prost(message, optional, tag = "2")]
    pub users: Option<UserNamespace>,
}

/// Runs as a session's stage. Comes back only when there is nothing to execute.
pub fn session() {
    with_control(|control| {
        let stage = SessionStage::decode(read_spec()?.as_slice())?;
        let request = stage.request.clone().unwrap_or_default();
        let wanted = request.process.unwrap_or_default();
        let limits = process::Limits::parse(&wanted)?;
        process::set_oom_score(&wanted);
        rustix::process::setsid().context("start", "a session")?;
        let users = Users::take(stage.users)?;
        let tree = rootfs::assemble(&stage, &users)?;
        rootfs::enter(&tree)?;
        let identity = user::resolve_here(&wanted.user.clone().unwrap_or_default())?;
        let env = environment::merge(&wanted.env, &identity.home, wanted.terminal)?;
        process::enter_working_directory(&wanted, users.root())?;
        let terminal = stdio(&wanted, &users, &identity)?;
        if let Some(terminal) = &terminal {
            bind_console(&tree, terminal)?;
        }
        if request.rootfs.is_some_and(|r| r.readonly) {
            rootfs::seal(&tree)?;
        }
        drop(tree);
        limits.apply()?;
        users.enter()?;
        ready(control, &identity, terminal)?;
        if !control::wait_for_go(control).context("wait for", "the start")? {
            return Ok(());
        }
        Err(process::become_program(&wanted, &identity, &env))
    });
}

/// Runs as the stage of a further process in a session. Comes back only when there is nothing to execute.
pub fn exec() {
    with_control(|control| {
        let stage = ExecStage::decode(read_spec()?.as_slice())?;
        let wanted = stage.process.unwrap_or_default();
        let mounts = sys::inherited(MOUNT_NS_FD).context("take", "the mount namespace")?;
        let cgroups = sys::inherited(CGROUP_NS_FD).context("take", "the cgroup namespace")?;
        let limits = process::Limits::parse(&wanted)?;
        process::set_oom_score(&wanted);
        rustix::process::setsid().context("start", "a session")?;
        setns(cgroups, CloneFlags::CLONE_NEWCGROUP).context("join", "the cgroup namespace")?;
        setns(mounts, CloneFlags::CLONE_NEWNS).context("join", "the mount namespace")?;
        let users = Users::take(stage.users)?;
        let identity = user::resolve_here(&wanted.user.clone().unwrap_or_default())?;
        let env = environment::merge(&wanted.env, &identity.home, wanted.terminal)?;
        process::enter_working_directory(&wanted, users.root())?;
        let terminal = stdio(&wanted, &users, &identity)?;
        limits.apply()?;
        users.enter()?;
        ready(control, &identity, terminal)?;
        Err(process::become_program(&wanted, &identity, &env))
    });
}

/// Runs as process 1 of the pod's pid namespace: reaps, sees no files and may do nothing.
pub fn pause() {
    let hide = || -> Result<(), StageError> {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).context("unshare", "the mount namespace")?;
        rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .context("make private", "/")?;
        rustix::mount::mount_bind(paths::EMPTY, paths::EMPTY).context("bind", paths::EMPTY)?;
        rustix::process::chdir(paths::EMPTY).context("enter", paths::EMPTY)?;
        rustix::process::pivot_root(".", ".").context("pivot to", paths::EMPTY)?;
        rustix::mount::unmount(".", UnmountFlags::DETACH).context("unmount", "the old root")
    };
    with_control(|control| {
        let user = UserNumbers::decode(read_spec()?.as_slice())?;
        rustix::thread::set_name(c"pause").context("name", "the process")?;
        hide()?;
        process::become_user(user.uid, user.gid)?;
        // Both are reset by a change of users.
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .context("hide", "the process")?;
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .context("end with", "the agent")?;
        sys::close_on_exec_from(3).context("close", "descriptors")?;
        control::send_report(control.as_fd(), Report::Ready(Default::default()), None)
            .context("report", "ready")?;
        loop {
            // ECHILD: nobody to wait for yet. The signal wakes us; without one, look again now and then.
            if rustix::process::wait(rustix::process::WaitOptions::empty()).is_err() {
                std::thread::sleep(std::time::Duration::from_millis(500));
            }
        }
    });
}

/// Runs as the process that makes the pod's user namespace and those that belong to it. The agent writes the mapping
/// in between, and opens them all before it lets us go.
pub fn make_users() {
    with_control(|control| {
        let tell = || {
            control::send_report(control.as_fd(), Report::Ready(Default::default()), None)
                .context("report", "ready")
        };
        let ping_groups = read_spec()?;
        nix::sched::unshare(CloneFlags::CLONE_NEWUSER).context("unshare", "the user namespace")?;
        tell()?;
        if !control::wait_for_go(control).context("wait for", "the mapping")? {
            return Ok(());
        }
        nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)
            .context("unshare", "network, host name and IPC")?;
        if !ping_groups.is_empty() {
            // From in here the numbers are the pod's.
            std::fs::write(paths::PING_GROUPS, &ping_groups).map_err(|source| StageError::PingGroups {
                value: String::from_utf8_lossy(&ping_groups).into_owned(),
                source,
            })?;
        }
        tell()?;
        control::wait_for_go(control).context("wait for", "the end").map(drop)
    });
}

/// Takes the control socket, runs `stage` and reports why it ended, if it did.
fn with_control(stage: impl FnOnce(&OwnedFd) -> Result<(), StageError>) {
    let Ok(control) = sys::inherited(CONTROL_FD) else { return };
    let result = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context("hide", "the process")
        .and_then(|()| stage(&control));
    if let Err(error) = result {
        // If the agent is gone there is nobody to tell.
        let _ = control::send_report(control.as_fd(), Report::Failure(error.to_failure()), None);
    }
}

fn read_spec() -> Result<Vec<u8>, StageError> {
    let file = sys::inherited(SPEC_FD).context("take", "the specification")?;
    let length = rustix::fs::fstat(&file).context("inspect", "the specification")?.st_size;
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0) + 1);
    std::io::Read::read_to_end(&mut std::fs::File::from(file), &mut bytes)
        .context("read", "the specification")?;
    Ok(bytes)
}

fn stdio(wanted: &Process, users: &Users, identity: &Identity) -> Result<Option<Terminal>, StageError> {
    let owner = users.owner(identity)?;
    if wanted.terminal {
        let group = users.group(devices::TTY).map(Gid::from_raw);
        return process::open_terminal(wanted, owner, group).map(Some);
    }
    process::own_stdio(owner);
    Ok(None)
}

fn ready(control: &OwnedFd, identity: &Identity, terminal: Option<Terminal>) -> Result<(), StageError> {
    let master = terminal.as_ref().map(|t| t.master.as_fd());
    control::send_report(control.as_fd(), Report::Ready(identity.to_wire()), master)
        .context("report", "ready")
}

/// Programs that open /dev/console find the session's terminal.
fn bind_console(tree: &tree::Tree, terminal: &Terminal) -> Result<(), StageError> {
    let source = tree.find(&terminal.path).context("find", &terminal.path)?;
    let target = tree.find_or_make("/dev/console", tree::Node::File).context("make", "/dev/console")?;
    tree::bind(source, false).and_then(|copy| tree::attach(copy, target)).context("bind", "/dev/console")
}
