//! Further processes in running sessions.

use std::sync::Arc;

use a3s_box_protocol::proto::{ExecRequest, Process, ResolvedUser};
use prost::Message;
use rustix::process::Pid;
use tokio::sync::{oneshot, watch};

use super::launch::{self, Launched, StageProcess};
use super::users::Users;
use super::{Live, Namespaces, SessionError};
use crate::reaper::{Exit, Reaper};
use crate::spawn::PidSpace;
use crate::stage::{self, ExecStage};
use crate::stdio::Stdio;
use std::os::fd::AsFd;

/// A process that was executed in a session.
#[derive(Debug)]
pub struct Exec {
    /// The session it belongs to.
    pub session_id: String,
    /// In the guest.
    pub pid: Pid,
    /// As whom it runs.
    pub user: ResolvedUser,
    /// Its pipes or terminal.
    pub stdio: Stdio,
    exit: watch::Sender<Option<Exit>>,
    reported: watch::Sender<bool>,
}

/// Starts the process; comes back when it executes its program, or cannot.
pub async fn start(
    reaper: &Reaper,
    users: Option<&Users>,
    live: &Live,
    namespaces: &Namespaces,
    request: &ExecRequest,
) -> Result<(Arc<Exec>, oneshot::Receiver<Exit>), SessionError> {
    let wanted: Process = request.process.clone().unwrap_or_default();
    let (terminal, stdin) = (wanted.terminal, request.stdin);
    let spec = ExecStage { process: Some(wanted), users: users.map(|users| users.mapping) };
    let stage = StageProcess {
        role: stage::EXEC,
        spec: spec.encode_to_vec(),
        terminal,
        stdin,
        users,
        pid_space: PidSpace::Join(namespaces.pid.as_fd()),
        namespaces: Some(namespaces),
        cgroup: &live.cgroup,
        first_process: Some(live.pid),
    };
    let Launched { pid, exit, control, stdio, user } = launch::launch(reaper, &stage).await?;
    launch::await_execution(&control, &live.cgroup).await?;
    let exec = Exec {
        session_id: request.session_id.clone(),
        pid,
        user,
        stdio,
        exit: watch::Sender::new(None),
        reported: watch::Sender::new(false),
    };
    Ok((Arc::new(exec), exit))
}

impl Exec {
    /// The process has ended and its output is drained: answers those who wait.
    pub fn finish(&self, exit: Exit) {
        self.exit.send_replace(Some(exit));
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Option<Exit> {
        self.exit.subscribe().wait_for(Option::is_some).await.ok().and_then(|e| *e)
    }

    /// Somebody was told how it ended.
    pub fn mark_reported(&self) {
        self.reported.send_replace(true);
    }

    /// Waits until nobody needs it any more: its end was told and its output acknowledged.
    pub async fn forgettable(&self) {
        let _ = self.reported.subscribe().wait_for(|told| *told).await;
        self.stdio.acknowledged().await;
    }
}
