//! The role that gives a QEMU guest its vsock device: the other end of QEMU's vhost-user socket.
//!
//! It is this program in a process of its own, without any privilege. Its sockets are opened for it: the one on which QEMU
//! comes is standard input, those of the guest's ports are named on the command line. One thread answers QEMU, another one
//! owns the device and the two queues. Whatever goes wrong in either ends the process, and with it the box: a guest whose
//! device has stopped could only hang.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use a3s_box_protocol::GUEST_CID;
use a3s_box_vmm::GUEST_DIALS;
use a3s_box_vmm::launch::{jail, socket_name};
use a3s_box_vsock::Vsock;
use anyhow::{Context, bail, ensure};
use vhost::vhost_user::Listener;
use vhost_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vhost_user_backend::VhostUserDaemon;
use vmm_sys_util::epoll::EventSet;

use crate::{inherited, panics};

mod backend;
mod queues;
#[cfg(test)]
mod tests;

use backend::{Backend, SOCKETS_CHANGED};

/// The first argument of this role.
pub(crate) const ROLE: &str = "vsock";

/// An argument of this role: a port of the guest and the descriptor of the socket that stands for it.
pub(crate) fn argument(port: u32, listener: &impl AsRawFd) -> String {
    format!("{port}={}", listener.as_raw_fd())
}

/// Serves one QEMU, until it ends.
pub(crate) fn run(arguments: &[OsString]) -> ExitCode {
    panics::end_the_process();
    // Otherwise it is the last part of the path that it was started by. Only whoever looks at processes cares.
    let _ = rustix::thread::set_name(c"a3s-box-vsock");
    match serve(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("a3s-box-vmm: vsock: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &[OsString]) -> anyhow::Result<()> {
    let dialled = GUEST_DIALS.map(|port| (port, Path::new(jail::VSOCK).join(socket_name(port))));
    let vsock = Vsock::new(GUEST_CID.into(), listeners(arguments)?, dialled.into())
        .context("watch the sockets of the guest's ports")?;
    let sockets = vsock.as_fd().as_raw_fd();
    let listener = io::stdin().as_fd().try_clone_to_owned().context("take the socket for QEMU")?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let backend = Arc::new(Mutex::new(Backend::new(vsock, memory.clone())));
    let mut daemon = VhostUserDaemon::new(ROLE.to_owned(), backend, memory)
        .map_err(|error| anyhow::anyhow!("prepare for QEMU: {error}"))?;
    for worker in daemon.get_epoll_handlers() {
        worker
            .register_listener(sockets, EventSet::IN, SOCKETS_CHANGED.into())
            .context("watch the sockets with the queues")?;
    }
    daemon
        .start(&mut Listener::from(UnixListener::from(listener)))
        .map_err(|error| anyhow::anyhow!("wait for QEMU: {error}"))?;
    // QEMU's end closes its socket; what it then was in the middle of saying does not matter.
    if let Err(error) = daemon.wait() {
        eprintln!("a3s-box-vmm: vsock: QEMU's connection ended: {error}");
    }
    // Not by returning: the worker's thread still uses the device.
    std::process::exit(0)
}

fn listeners(arguments: &[OsString]) -> anyhow::Result<Vec<(u32, UnixListener)>> {
    let mut taken = Vec::new();
    let mut one = |argument: &OsString| {
        let words = argument.to_str().and_then(|text| text.split_once('='));
        let Some((port, descriptor)) = words else { bail!("{argument:?} is not PORT=DESCRIPTOR") };
        let descriptor = inherited::number(OsStr::new(descriptor))?;
        ensure!(!taken.contains(&descriptor), "{argument:?} names another one's descriptor");
        taken.push(descriptor);
        let port = port.parse().with_context(|| format!("read {argument:?}"))?;
        Ok((port, UnixListener::from(inherited::descriptor(descriptor))))
    };
    arguments.iter().map(&mut one).collect()
}
