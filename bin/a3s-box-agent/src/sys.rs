//! System calls that no crate we use offers as a safe function.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Mount attributes of mount_setattr(2) that we set.
pub mod attr {
    /// Writes are refused.
    pub const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
    /// Set-user-id bits are ignored.
    pub const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
    /// Device nodes cannot be opened.
    pub const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
    /// Programs cannot be executed.
    pub const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
}

/// Sets mount attributes of the mount that `mount` lies in (and, if `recursive`, of all below it).
pub fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, set: u64) -> io::Result<()> {
    set_attributes(mount, recursive, set, 0)
}

/// Makes a detached mount show its files as those of the users who have their numbers in a user namespace.
pub fn map_users(mount: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let namespace = u64::from(namespace.as_raw_fd().unsigned_abs());
    set_attributes(mount, false, libc::MOUNT_ATTR_IDMAP, namespace)
}

fn set_attributes(mount: BorrowedFd<'_>, recursive: bool, attr_set: u64, userns_fd: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is a NUL-terminated constant, `attributes` lives through the call and its size is
    // passed with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result)
}

/// Marks every descriptor from `first` on to be closed by the next execve.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: the call changes descriptor flags only.
    check(unsafe {
        libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_uint)
    })
}

/// Gives every signal its default action and unblocks all: what a fresh program expects. Rust's
/// start-up code ignores SIGPIPE, which would be inherited.
pub fn reset_signals() {
    // SAFETY: only called in a single-threaded process right before execve; SIG_DFL runs no code of ours, and
    // the empty set is initialised by sigemptyset before it is read.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
}

/// Installs a seccomp filter: 8 octets per instruction, as the kernel takes them.
pub fn install_seccomp(program: &[u8]) -> io::Result<()> {
    let instructions: Vec<libc::sock_filter> = program
        .chunks_exact(8)
        .map(|i| libc::sock_filter {
            code: u16::from_le_bytes([i[0], i[1]]),
            jt: i[2],
            jf: i[3],
            k: u32::from_le_bytes([i[4], i[5], i[6], i[7]]),
        })
        .collect();
    let length = u16::try_from(instructions.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: instructions.as_ptr().cast_mut() };
    // SAFETY: the program and its instructions live through the call; the kernel copies and checks them.
    check(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0 as libc::c_uint, &raw const program)
    })
}

#[repr(C)]
struct BpfLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log: [u64; 2],
    version_and_flags: u64,
}

#[repr(C)]
struct BpfAttach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// Loads a program that decides which devices a cgroup may open; one instruction per word.
pub fn load_device_program(instructions: &[u64]) -> io::Result<OwnedFd> {
    let load = BpfLoad {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(instructions.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log: [0; 2],
        version_and_flags: 0,
    };
    // SAFETY: the attributes and what they point to live through the call; the kernel copies and verifies the
    // program and takes fields beyond the given size for zero.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<BpfLoad>()) };
    check(result)?;
    let number = RawFd::try_from(result).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Puts a program of [`load_device_program`] in force for a cgroup and all below it.
pub fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attach = BpfAttach {
        target: cgroup.as_raw_fd().unsigned_abs(),
        program: program.as_raw_fd().unsigned_abs(),
        kind: BPF_CGROUP_DEVICE,
        flags: 0,
    };
    // SAFETY: the attributes live through the call.
    check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<BpfAttach>()) })
}

/// Lets the clocks run so many parts per million faster than they do by themselves; negative ones slower. adjtimex(2) has two
/// numbers for it: the length of ten milliseconds in microseconds, and what is finer than that in parts of 2^-16 per million.
pub fn run_clock_faster(ppm: i64) -> io::Result<()> {
    const TICK: i64 = 10_000;
    const PPM_OF_A_TICK: i64 = 100;
    let ticks = ppm.div_euclid(PPM_OF_A_TICK);
    // SAFETY: all fields are numbers, for which zero is a value.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_TICK | libc::ADJ_FREQUENCY;
    change.tick = TICK + ticks;
    change.freq = (ppm - ticks * PPM_OF_A_TICK) << 16;
    // SAFETY: the structure lives through the call, which reads and fills it.
    check(i64::from(unsafe { libc::adjtimex(&raw mut change) }))
}

/// kill(2) with a bare number: real-time signals have no names in the crates that we use.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill reads no memory of ours.
    check(i64::from(unsafe { libc::kill(pid, signal) }))
}

/// Registers a descriptor with the runtime.
pub fn poll(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is the same open descriptor for as long as it lives, and AsyncFd owns it.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}

/// Takes ownership of a descriptor that this process was started with.
///
/// Call it once per number, before anything else could have opened a file.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl on a number that is not open fails with EBADF and has no effect.
    check(i64::from(unsafe { libc::fcntl(number, libc::F_GETFD) }))?;
    // SAFETY: the descriptor is open (checked above) and nobody else in this fresh process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
