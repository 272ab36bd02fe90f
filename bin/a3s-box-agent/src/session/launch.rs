//! Starting a stage and hearing from it.

use std::ffi::CStr;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use a3s_box_protocol::proto::ResolvedUser;
use rustix::fs::MemfdFlags;
use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::cgroup::{self, Cgroup};
use super::users::Users;
use super::{Namespaces, SessionError};
use crate::control::{self, Report};
use crate::reaper::{Exit, Reaper};
use crate::spawn::{PidSpace, Spawn};
use crate::stage;
use crate::stdio::{self, ProcessEnds, Stdio};

/// A stage to be started.
#[derive(Debug)]
pub struct StageProcess<'a> {
    /// What it becomes.
    pub role: &'static CStr,
    /// What it is told.
    pub spec: Vec<u8>,
    /// Whether it makes a terminal.
    pub terminal: bool,
    /// Whether stdin is kept open.
    pub stdin: bool,
    /// Its pid namespace.
    pub pid_space: PidSpace<'a>,
    /// What it enters last.
    pub users: Option<&'a Users>,
    /// What an exec joins.
    pub namespaces: Option<&'a Namespaces>,
    /// Where it is born.
    pub cgroup: &'a Cgroup,
    /// The session's first process, if it exists.
    pub first_process: Option<Pid>,
}

/// A stage that has set everything up.
#[derive(Debug)]
pub struct Launched {
    /// In the guest.
    pub pid: Pid,
    /// Its end.
    pub exit: oneshot::Receiver<Exit>,
    /// To let it go on.
    pub control: Control,
    /// Its stdio, already being read.
    pub stdio: Stdio,
    /// Whom its user turned out to be.
    pub user: ResolvedUser,
}

/// Our end of a stage's control socket.
#[derive(Debug)]
pub struct Control(AsyncFd<OwnedFd>);

impl Control {
    /// Wraps our end of [`control::pair`].
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        crate::sys::poll(socket, Interest::READABLE).map(Self)
    }

    /// The next report; `None` is the end of the connection.
    pub async fn receive(&self) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
        self.0.async_io(Interest::READABLE, |socket| control::receive_report(socket.as_fd())).await
    }

    /// Lets the stage go on.
    pub fn go(&self) -> io::Result<()> {
        control::send_go(self.0.get_ref())
    }
}

/// Starts a stage and waits until everything is set up.
pub async fn launch(reaper: &Reaper, process: &StageProcess<'_>) -> Result<Launched, SessionError> {
    let (prepared, ends) =
        stdio::prepare(process.terminal, process.stdin).map_err(SessionError::launch("make pipes"))?;
    let (ours, theirs) = control::pair().map_err(SessionError::launch("make a control socket"))?;
    let control = Control::new(ours).map_err(SessionError::launch("poll the control socket"))?;
    let spec = memory_file(&process.spec).map_err(SessionError::launch("write the specification"))?;
    let (pid, exit) =
        start(reaper, process, &ends, &theirs, &spec).map_err(SessionError::launch("start a process"))?;
    // Our copies of its ends would keep its pipes open.
    drop((ends, theirs, spec));
    match control.receive().await.map_err(SessionError::launch("hear from the stage"))? {
        Some((Report::Ready(user), terminal)) => {
            let stdio = prepared.start(terminal).map_err(SessionError::Stdio)?;
            Ok(Launched { pid, exit, control, stdio, user })
        }
        Some((Report::Failure(failure), _)) => Err(SessionError::Stage(failure)),
        None => Err(SessionError::StageDied { out_of_memory: process.cgroup.oom_killed() }),
    }
}

/// Waits until a stage that was let go executes its program (the connection ends) or says why not.
pub async fn await_execution(control: &Control, cgroup: &Cgroup) -> Result<(), SessionError> {
    match control.receive().await {
        Ok(None) => Ok(()),
        Ok(Some((Report::Failure(failure), _))) => Err(SessionError::Stage(failure)),
        Ok(Some((Report::Ready(_), _))) | Err(_) => {
            Err(SessionError::StageDied { out_of_memory: cgroup.oom_killed() })
        }
    }
}

fn start(
    reaper: &Reaper,
    process: &StageProcess<'_>,
    ends: &ProcessEnds,
    control: &OwnedFd,
    spec: &OwnedFd,
) -> io::Result<(Pid, oneshot::Receiver<Exit>)> {
    let mut descriptors: Vec<(BorrowedFd<'_>, i32)> = ends.all().into_iter().zip(0..).collect();
    descriptors.push((spec.as_fd(), stage::SPEC_FD));
    descriptors.push((control.as_fd(), stage::CONTROL_FD));
    if let Some(users) = process.users {
        descriptors.push((users.namespace.as_fd(), stage::USER_NS_FD));
    }
    if let Some(namespaces) = process.namespaces {
        descriptors.push((namespaces.mount.as_fd(), stage::MOUNT_NS_FD));
        descriptors.push((namespaces.cgroup.as_fd(), stage::CGROUP_NS_FD));
    }
    let spawn = |cgroup| {
        reaper.spawn(&Spawn {
            role: process.role,
            descriptors: descriptors.clone(),
            cgroup: Some(cgroup),
            pid_space: process.pid_space,
        })
    };
    match spawn(process.cgroup.directory()) {
        // The workload has divided its cgroup.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => match process.first_process {
            Some(first) => spawn(cgroup::of_process(first.as_raw_pid())?.as_fd()),
            None => Err(error),
        },
        other => other,
    }
}

/// A file for a stage to read from, in memory only.
pub fn memory_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create("a3s-spec", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    file.write_all(bytes)?;
    io::Seek::rewind(&mut file)?;
    Ok(file.into())
}
