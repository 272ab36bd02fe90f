//! The file server of the QEMU backend: virtiofsd's library, in a process of its own that is another role of this program.
//!
//! ```text
//! guest ── queues in shared memory ──▶ vhost-user (library) ──▶ requests (library) ──▶ Share ──▶ files (library)
//! QEMU ─── socket ─────────────────▶
//! ```
//!
//! [`Share`] is ours and sees every request. What a box wants of its share beyond the library's ways belongs there, and in
//! [`crate::share`] where it is the same for both backends.

mod share;
#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;

use a3s_box_vmm::launch::jail;
use anyhow::{Context, anyhow};
use log::LevelFilter;
use rustix::process::{Resource, getrlimit};
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use virtiofsd::passthrough::{CachePolicy, Config, PassthroughFs};
use virtiofsd::seccomp::{SeccompAction, enable_seccomp};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;

use crate::share::CACHED;
use crate::share::room::Room;
use crate::{counts, inherited, logs};
use share::Share;

/// The word that chooses this role.
pub(crate) const ROLE: &str = "file-server";

/// Descriptors that are not the guest's to use up: QEMU may send one for each of 509 regions of memory, the rest is the
/// library's own.
const RESERVED: u64 = 509 + 101;

/// Serves `/share` of the jail until QEMU hangs up. Standard input is the socket that QEMU connects to, standard output the
/// file with the counts; standard error is the box's log. `agent` is the number of the socket on which the guest's agent
/// wants to hear of files to forget.
pub(crate) fn run(agent: &OsStr) -> ExitCode {
    match serve(agent) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("a3s-box-vmm: file server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(agent: &OsStr) -> anyhow::Result<()> {
    logs::of_library("file server", LevelFilter::Warn);
    // It is started as /proc/self/exe, which is no name.
    rustix::thread::set_name(c"file-server").context("name the process")?;
    let listener = io::stdin().as_fd().try_clone_to_owned().context("take the socket")?;
    let agent = UnixListener::from(inherited::descriptor(inherited::number(agent)?));
    let requests = counts::map(&File::from(io::stdout().as_fd().try_clone_to_owned()?))?;
    // Whatever prints does it to the log.
    nix::unistd::dup2_stdout(io::stderr()).context("point standard output at the log")?;
    let config = config();
    let room = Room::new(config.guest_fd_limit, Some(agent));
    // From here on only what serving files takes is allowed: another call of the system's ends the process.
    enable_seccomp(SeccompAction::Kill, false).context("install the library's filter")?;
    let files = PassthroughFs::new(config).context("prepare the share")?;
    let share = Share::new(files, requests, room);
    let backend = VhostUserFsBackendBuilder::default().build(share).map_err(|error| anyhow!("{error}"))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new(ROLE.to_owned(), Arc::new(backend), memory)
        .map_err(|error| anyhow!("prepare for QEMU: {error}"))?;
    daemon
        .start(&mut Listener::from(UnixListener::from(listener)))
        .map_err(|error| anyhow!("wait for QEMU: {error}"))?;
    match daemon.wait() {
        Ok(()) | Err(DaemonError::HandleRequest(ProtocolError::Disconnected)) => Ok(()),
        Err(error) => Err(anyhow!("serve QEMU: {error}")),
    }
}

/// File handles are not used: they would take the right to open any file of a file system by number.
fn config() -> Config {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    Config {
        entry_timeout: CACHED,
        attr_timeout: CACHED,
        cache_policy: CachePolicy::Auto,
        root_dir: jail::SHARE.to_owned(),
        xattr: true,
        announce_submounts: true,
        inode_file_handles: virtiofsd::passthrough::InodeFileHandlesMode::Never,
        uid_map: Some(Vec::new()),
        gid_map: Some(Vec::new()),
        guest_fd_limit: descriptors.saturating_sub(RESERVED),
        ..Config::default()
    }
}
