//! The status pipe to the daemon.

use std::fs::File;
use std::io::Write;

use a3s_box_vmm::launch::Report;
use anyhow::Context;
use rustix::io::fcntl_dupfd_cloexec;
use std::os::fd::AsFd;

/// The write end. It is closed on exec, and with the process.
pub(crate) struct Status(File);

impl Status {
    /// Takes the pipe from standard output, which becomes the log.
    pub(crate) fn take() -> anyhow::Result<Self> {
        let pipe = fcntl_dupfd_cloexec(std::io::stdout().as_fd(), 3).context("take the status pipe")?;
        nix::unistd::dup2_stdout(std::io::stderr()).context("send standard output to the log")?;
        Ok(Self(File::from(pipe)))
    }

    pub(crate) fn failed(&self, message: &str) {
        // The log has it too, so a daemon that is gone loses nothing.
        let _ = self.send(&Report::Failed { message: message.chars().take(3000).collect() });
    }

    /// Reports are shorter than PIPE_BUF and written at once: the daemon never reads half a line.
    pub(crate) fn send(&self, report: &Report) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(report)?;
        line.push(b'\n');
        (&self.0).write_all(&line).context("report to the daemon")
    }

    /// The VM is about to run. The descriptor stays open until the process ends; the daemon stops reading.
    pub(crate) fn up(&self) -> anyhow::Result<()> {
        self.send(&Report::Up)
    }
}
