//! Watching and ending the process of a box by pidfd: a pid may be reused, a pidfd never is.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::sync::watch;

use crate::launch::start_ticks;
use crate::seam::{MachineExit, MachineFacts};
use crate::sys::watch_readable;

/// A process that is watched. Clones share it; a task reaps it even when nobody waits.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<MachineExit>>,
}

impl Watched {
    /// Watches the process behind `pidfd`. Must be called within a tokio runtime.
    pub(crate) fn new(pidfd: OwnedFd) -> io::Result<Self> {
        let pidfd = Arc::new(pidfd);
        let (sender, exit) = watch::channel(None);
        let readable = watch_readable(pidfd.try_clone()?)?;
        tokio::spawn(async move {
            // An error can only mean that the runtime shuts down; then nobody is left to be told.
            if readable.readable().await.is_ok() {
                sender.send_replace(Some(reap(readable.get_ref().as_fd())));
            }
        });
        Ok(Self { pidfd, exit })
    }

    /// Finds a process by its facts. `Ok(None)`: it has ended, or its pid belongs to another process now.
    pub(crate) fn find(facts: &MachineFacts) -> io::Result<Option<Self>> {
        let Some(pid) = Pid::from_raw(facts.pid) else { return Ok(None) };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Only after the pidfd is open: what is compared now cannot change its identity any more.
        if start_ticks(facts.pid)? != Some(facts.start_ticks) {
            return Ok(None);
        }
        Self::new(pidfd).map(Some)
    }

    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    pub(crate) async fn wait(&self) -> MachineExit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or(MachineExit::Vanished),
            Err(_) => MachineExit::Vanished,
        }
    }

    pub(crate) fn kill(&self) -> io::Result<()> {
        kill(self.pidfd.as_fd())
    }
}

/// SIGKILL; a process that has ended is no error.
pub(crate) fn kill(pidfd: impl AsFd) -> io::Result<()> {
    match pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Collects the exit status of a process that has ended; of one that is not our child nobody can.
pub(crate) fn reap(pidfd: impl AsFd) -> MachineExit {
    match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => MachineExit::PowerOff,
            (Some(code), _) => MachineExit::Failed { code },
            (None, Some(signal)) => MachineExit::Killed { signal },
            (None, None) => MachineExit::Vanished,
        },
        Ok(None) | Err(_) => MachineExit::Vanished,
    }
}

/// How a VM ended, for people.
pub(crate) fn describe(exit: &MachineExit) -> String {
    match exit {
        MachineExit::PowerOff => "powered off".to_owned(),
        MachineExit::Failed { code } => format!("exit code {code}"),
        MachineExit::Killed { signal } => format!("signal {signal}"),
        MachineExit::Vanished => "vanished".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::seam::BackendKind;

    fn spawn(script: &str) -> (Child, OwnedFd) {
        let child = Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        (child, pidfd)
    }

    #[tokio::test]
    async fn every_waiter_learns_how_a_child_ended() {
        for (script, expected) in [
            ("exit 0", MachineExit::PowerOff),
            ("exit 7", MachineExit::Failed { code: 7 }),
            ("kill -9 $$", MachineExit::Killed { signal: 9 }),
        ] {
            let watched = Watched::new(spawn(script).1).unwrap();
            let (first, second) = tokio::join!(watched.wait(), watched.wait());
            assert_eq!((&first, &second), (&expected, &expected), "{script}");
            assert_eq!(watched.wait().await, expected, "{script}, afterwards");
        }
    }

    #[tokio::test]
    async fn killing_twice_is_no_error() {
        let watched = Watched::new(spawn("exec sleep 60").1).unwrap();
        watched.kill().unwrap();
        assert_eq!(watched.wait().await, MachineExit::Killed { signal: 9 });
        watched.kill().unwrap();
    }

    #[tokio::test]
    async fn a_process_is_found_by_pid_and_start_time_and_never_by_pid_alone() {
        let (child, pidfd) = spawn("exec sleep 60");
        let pid = child.id() as i32;
        let start_ticks = start_ticks(pid).unwrap().unwrap();
        let facts = MachineFacts { backend: BackendKind::Qemu, pid, start_ticks };
        assert!(Watched::find(&facts).unwrap().is_some());
        assert!(
            Watched::find(&MachineFacts { start_ticks: start_ticks + 1, ..facts.clone() }).unwrap().is_none()
        );
        kill(&pidfd).unwrap();
        reap(&pidfd);
        assert!(Watched::find(&facts).unwrap().is_none());
    }
}
