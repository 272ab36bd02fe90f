//! The QEMU backend: this process starts QEMU, the file server and the vsock helper, and watches over them.
//!
//! It is the first process of the PID namespace: when it ends, for whatever reason, the kernel ends the others.

use std::fs::{File, Permissions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use a3s_box_protocol::FORGET_PORT;
use a3s_box_vmm::launch::{LaunchSpec, QemuSpec, jail, socket_name};
use a3s_box_vmm::qemu::args::{self, Inherited};
use a3s_box_vmm::{BoxPlan, cmdline};
use anyhow::Context;
use rustix::io::{FdFlags, fcntl_setfd};

use crate::clock::{self, Reading};
use crate::jail::Opened;
use crate::status::Status;
use crate::{dialled, file_server, logs, privileges, vsock};

/// A helper ended while QEMU did not.
const HELPER_ENDED: u8 = 72;

/// How long QEMU may outlive a helper: when it ends, the helpers see their connection close and may be first.
const LAST_BREATH: Duration = Duration::from_secs(2);

/// Starts the parts and answers with the exit code of QEMU.
pub(crate) fn run(
    spec: &LaunchSpec,
    qemu: &QemuSpec,
    opened: Opened,
    status: &Status,
) -> anyhow::Result<ExitCode> {
    let plan = &spec.plan;
    let counter = Reading::now();
    privileges::keep_capabilities(privileges::FILE_SERVER)?;
    privileges::filter_system_calls()?;
    let helpers =
        [("the file server", serve_files(opened.requests)?), ("the vsock device", vsock(plan, qemu)?)];
    clock::serve_time()?;
    let cmdline = cmdline::compose(plan, &spec.hypervisor, counter.speed_since());
    let mut emulator = emulator(plan, qemu, &cmdline, opened.console, opened.scratch, opened.taps)?;
    privileges::drop_capabilities()?;
    logs::keep_short(opened.logs)?;
    status.up()?;
    supervise(&mut emulator, helpers)
}

/// This program in another role, in a process of its own: it alone keeps the capabilities.
fn serve_files(requests: File) -> anyhow::Result<Child> {
    let listener = UnixListener::bind(args::FS_SOCKET).context("listen for QEMU's file system")?;
    open_to_qemu(args::FS_SOCKET)?;
    let agent = dialled::listen(FORGET_PORT)?;
    inherit(&agent)?;
    // The program itself has no path in the jail.
    let mut command = command(Path::new("/proc/self/exe"));
    command.arg0("a3s-box-vmm").arg(file_server::ROLE).arg(agent.as_raw_fd().to_string());
    command.stdin(OwnedFd::from(listener)).stdout(requests);
    // The socket is closed here when it has been passed on: QEMU inherits what is open.
    command.spawn().context("start the file server")
}

/// This program in another role, without any privilege. Its sockets are opened here, so that they are listened on before
/// anybody can look for them.
fn vsock(plan: &BoxPlan, qemu: &QemuSpec) -> anyhow::Result<Child> {
    let listener = UnixListener::bind(args::VSOCK_SOCKET).context("listen for QEMU's vsock")?;
    open_to_qemu(args::VSOCK_SOCKET)?;
    // The program itself has no path in the jail.
    let mut command = command(Path::new("/proc/self/exe"));
    command.arg0("a3s-box-vmm").arg(vsock::ROLE).stdin(OwnedFd::from(listener)).uid(qemu.uid).gid(qemu.uid);
    let mut sockets = Vec::new();
    for port in plan.host_dials() {
        let path = format!("{}/{}", jail::VSOCK, socket_name(port));
        let socket = UnixListener::bind(&path).with_context(|| format!("listen on {path}"))?;
        inherit(&socket)?;
        command.arg(vsock::argument(port, &socket));
        sockets.push(socket);
    }
    let child = command.spawn().context("start the vsock device")?;
    // QEMU inherits what is open.
    drop(sockets);
    Ok(child)
}

fn emulator(
    plan: &BoxPlan,
    qemu: &QemuSpec,
    cmdline: &str,
    console: File,
    scratch: Option<File>,
    taps: Vec<Vec<File>>,
) -> anyhow::Result<Child> {
    [&console].into_iter().chain(&scratch).chain(taps.iter().flatten()).try_for_each(inherit)?;
    let inherited = Inherited {
        scratch: scratch.as_ref().map(AsRawFd::as_raw_fd),
        console: console.as_raw_fd(),
        taps: taps.iter().map(|queues| queues.iter().map(AsRawFd::as_raw_fd).collect()).collect(),
    };
    let mut command = command(&qemu.emulator);
    command.args(args::emulator(plan, qemu, cmdline, &inherited)).uid(qemu.uid).gid(qemu.uid);
    command.spawn().with_context(|| format!("start {}", qemu.emulator.display()))
}

/// Standard output and error are the box's log.
fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().current_dir("/").stdin(Stdio::null());
    command
}

fn inherit(file: &impl AsFd) -> anyhow::Result<()> {
    fcntl_setfd(file, FdFlags::empty()).context("pass on a descriptor")
}

fn open_to_qemu(socket: &str) -> anyhow::Result<()> {
    std::fs::set_permissions(socket, Permissions::from_mode(0o666))
        .with_context(|| format!("open {socket} to QEMU"))
}

/// Waits for QEMU. A helper that ends before it takes the box with it: the guest could only hang on it.
fn supervise(emulator: &mut Child, helpers: [(&str, Child); 2]) -> anyhow::Result<ExitCode> {
    let emulator_pid = emulator.id();
    let ended = wait_for_any()?;
    if ended.pid == emulator_pid {
        return Ok(exit_code(ended.status));
    }
    let name = helpers.iter().find(|(_, child)| child.id() == ended.pid).map_or("a helper", |(name, _)| name);
    let deadline = Instant::now() + LAST_BREATH;
    while Instant::now() < deadline {
        if let Some(status) = emulator.try_wait().context("wait for QEMU")? {
            return Ok(exit_code(status));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    eprintln!("a3s-box-vmm: {name} ended ({}) while the guest was running", ended.status);
    Ok(ExitCode::from(HELPER_ENDED))
}

struct Ended {
    pid: u32,
    status: ExitStatus,
}

fn wait_for_any() -> anyhow::Result<Ended> {
    loop {
        match rustix::process::wait(rustix::process::WaitOptions::empty()) {
            Ok(Some((pid, status))) => {
                let status = ExitStatus::from_raw(status.as_raw());
                return Ok(Ended { pid: pid.as_raw_nonzero().get() as u32, status });
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for QEMU"),
        }
    }
}

/// 0: the guest ended itself. A signal is told as shells do.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128 + signal as u8,
        (None, None) => 1,
    };
    if code != 0 {
        eprintln!("a3s-box-vmm: QEMU ended ({status})");
    }
    ExitCode::from(code)
}
