//! Starts our own helper processes: clone3 straight into a cgroup and a pid namespace, then execve of
//! ourselves.
//!
//! clone3 is called directly because fork and posix_spawn can place the child neither in a cgroup nor
//! in a pid namespace, and moving a process between cgroups later costs an RCU grace period each. The child
//! gets a copy of our memory and runs only system calls until execve.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::sched::{CloneFlags, setns};
use rustix::process::Pid;

/// Descriptor numbers below this are targets in the child.
const FIRST_FREE: RawFd = 16;

/// What is executed, if not ourselves.
static PROGRAM: OnceLock<CString> = OnceLock::new();

/// Executes `program` from now on instead of the running program: for tests, whose program is not the agent. Only the
/// first call counts.
pub fn use_program(program: CString) {
    PROGRAM.get_or_init(|| program);
}

/// In which pid namespace the child runs.
#[derive(Debug, Clone, Copy)]
pub enum PidSpace<'a> {
    /// Ours.
    Same,
    /// A new one; the child is its process 1.
    New,
    /// An existing one below ours.
    Join(BorrowedFd<'a>),
}

/// A helper process to be started.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// `argv[0]`, which tells the new process what it is.
    pub role: &'a CStr,
    /// Descriptors and their numbers in the child, each below 16. Nothing else stays open.
    pub descriptors: Vec<(BorrowedFd<'a>, RawFd)>,
    /// The directory of the cgroup that it is born in; `None` is ours.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Its pid namespace.
    pub pid_space: PidSpace<'a>,
}

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Starts the process and returns its pid in our namespace.
///
/// Must be called under the lock of the table that its exit is looked up in: see `reaper`.
pub fn spawn(spawn: &Spawn<'_>) -> io::Result<Pid> {
    let mut kept = Vec::new();
    let mut actions = Vec::with_capacity(spawn.descriptors.len());
    for (source, target) in &spawn.descriptors {
        // A source below the targets could be overwritten before it is duplicated.
        let source = if source.as_raw_fd() < FIRST_FREE {
            let moved = rustix::io::fcntl_dupfd_cloexec(source, FIRST_FREE)?;
            let number = moved.as_raw_fd();
            kept.push(moved);
            number
        } else {
            source.as_raw_fd()
        };
        actions.push((source, *target));
    }
    let mut args = CloneArgs { exit_signal: libc::SIGCHLD as u64, ..CloneArgs::default() };
    if let Some(cgroup) = spawn.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    match spawn.pid_space {
        PidSpace::Same => clone_and_exec(&args, spawn.role, &actions),
        PidSpace::New => {
            args.flags |= libc::CLONE_NEWPID as u64;
            clone_and_exec(&args, spawn.role, &actions)
        }
        PidSpace::Join(namespace) => {
            // This changes where this thread's children are born, not where the thread is.
            setns(namespace, CloneFlags::CLONE_NEWPID)?;
            let result = clone_and_exec(&args, spawn.role, &actions);
            setns(own_pid_namespace()?, CloneFlags::CLONE_NEWPID)
                .expect("a thread can always return to the pid namespace that it lives in");
            result
        }
    }
}

fn own_pid_namespace() -> io::Result<BorrowedFd<'static>> {
    static OWN: OnceLock<OwnedFd> = OnceLock::new();
    if OWN.get().is_none() {
        let opened = std::fs::File::open("/proc/self/ns/pid")?.into();
        // Losing the race against another thread is fine: both opened the same namespace.
        let _ = OWN.set(opened);
    }
    Ok(OWN.get().expect("set above").as_fd())
}

fn clone_and_exec(args: &CloneArgs, role: &CStr, actions: &[(RawFd, RawFd)]) -> io::Result<Pid> {
    let program = PROGRAM.get().map_or(c"/proc/self/exe", CString::as_c_str);
    let argv = [role.as_ptr(), std::ptr::null()];
    let envp = [std::ptr::null::<libc::c_char>()];
    // SAFETY: without CLONE_VM and with no stack given this is a fork: the child continues here on its own copy of
    // our memory. Between here and execve it calls only dup3, execve and _exit, which neither allocate
    // nor take locks; all they need was made before the clone.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone3, args as *const CloneArgs, size_of::<CloneArgs>());
        if pid == 0 {
            for (source, target) in actions {
                if libc::dup3(*source, *target, 0) < 0 {
                    libc::_exit(126);
                }
            }
            libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr());
            libc::_exit(127);
        }
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        Pid::from_raw(pid as i32).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}
