//! The vsock of a box by itself: a program in the box and this one, and nobody between them but the VMM.
//!
//! The default seccomp profile keeps vsock from containers, so that only a privileged one serves here.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::pod::{Direction, Pod, said};

/// That of agent images; none runs here.
const PORT: u32 = 4088;

/// A silence that means that bytes were lost.
const SILENCE: Duration = Duration::from_secs(30);

/// A connection to the server in the box.
pub(crate) struct Vsock(UnixStream);

impl Vsock {
    /// Starts the server in a container of the pod and connects to it. `state` is the daemon's folder.
    pub(crate) async fn start(pod: &mut Pod, state: &Path) -> Result<Self> {
        let (_, log) = pod.launch(&["/pump", "serve", "vsock", &PORT.to_string()], true).await?;
        said(&log, "serving").await?;
        let folder = state.join("run/boxes").join(pod.id()).join("vsock");
        // A socket's address has no room for the whole path.
        let folder = File::open(&folder).with_context(|| format!("opening {}", folder.display()))?;
        let path = format!("/proc/self/fd/{}/guest_{PORT}", folder.as_raw_fd());
        let stream = UnixStream::connect(path).context("connecting to the vsock device")?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        Ok(Self(stream))
    }

    /// From the order to its last byte.
    pub(crate) fn run(&mut self, direction: Direction, bytes: u64) -> Result<Duration> {
        let started = Instant::now();
        direction.run(&mut self.0, bytes).context("the raw vsock")?;
        Ok(started.elapsed())
    }
}
