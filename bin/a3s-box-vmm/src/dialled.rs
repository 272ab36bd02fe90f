//! Ports of the host that the guest dials and this program answers.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use a3s_box_vmm::launch::{jail, socket_name};
use anyhow::Context;

/// Listens on such a port, without blocking. Called before rights are given up: the directory is the emulator's.
pub(crate) fn listen(port: u32) -> anyhow::Result<UnixListener> {
    let path = format!("{}/{}", jail::VSOCK, socket_name(port));
    // Of a guest that has booted before, with fewer interfaces.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("listen on {path}"))?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o666))
        .with_context(|| format!("open {path} to the guest's connections"))?;
    listener.set_nonblocking(true).with_context(|| format!("make {path} non-blocking"))?;
    Ok(listener)
}
