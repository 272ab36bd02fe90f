//! All sessions and execs of this box, and what can be done to them.

mod pod;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use a3s_box_protocol::proto::{
    CgroupSetting, CreateSessionRequest, ExecRequest, NetworkInterface, PidMode, ResolvedUser, UserNamespace,
    UserNumbers,
};
use prost::Message;
use rustix::process::Pid;
use tokio::sync::oneshot;

use super::exec::{self, Exec};
use super::family;
use super::launch::{self, StageProcess};
use super::layers::{self, Layers};
use super::users::Users;
use super::volumes::{self, Volumes};
use super::{Directory, End, Holdings, Live, Namespaces, Phase, Session, SessionError};
use crate::paths;
use crate::reaper::{Exit, Reaper};
use crate::session::cgroup::Cgroup;
use crate::spawn::{PidSpace, Spawn};
use crate::stage::{self, SessionStage};
use crate::stdio::Totals;
use pod::PodPids;

/// More sessions than a pod can have containers.
const MAX_SESSIONS: usize = 1024;
/// Execs that run or whose end was not yet told.
const MAX_EXECS: usize = 8192;
/// An exec that has ended is forgotten after this, whether or not the host has asked how and taken its output,
/// unless it is still taking it.
const LINGER: Duration = Duration::from_secs(30);
/// How long after its death a process is reaped at the latest, unless the box is very busy.
const REAP: Duration = Duration::from_millis(200);
/// How long killed processes may take to end.
const DEATH: Duration = Duration::from_secs(10);

/// Everything that runs in this box.
#[derive(Debug, Clone, Default)]
pub struct Table {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    reaper: Reaper,
    layers: Layers,
    volumes: Volumes,
    sessions: Mutex<HashMap<String, Arc<Session>>>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    /// The pid namespace of sessions that share, made for the first of them.
    pod: tokio::sync::Mutex<Option<Arc<PodPids>>>,
    /// The user namespace of all sessions, if they have one.
    users: tokio::sync::OnceCell<Users>,
    /// As whom process 1 of the shared pid namespace runs, if the host has said so.
    init_user: OnceLock<UserNumbers>,
}

impl Table {
    /// An empty table; `reaper` must be running.
    pub fn new(reaper: Reaper) -> Self {
        Self { inner: Arc::new(Inner { reaper, ..Inner::default() }) }
    }

    /// Gives all later sessions a user namespace of their own, and the pod its network, host name and IPC in it.
    /// `ping_groups` are those of the session whose members may ping. Repeating it with the same mapping changes nothing.
    pub async fn map_users(
        &self,
        mapping: &UserNamespace,
        interfaces: &[NetworkInterface],
        ping_groups: Option<&str>,
    ) -> Result<(), SessionError> {
        let make = || Users::enter(&self.inner.reaper, mapping, interfaces, ping_groups);
        let users = self.inner.users.get_or_try_init(make).await?;
        if users.mapping == *mapping { Ok(()) } else { Err(SessionError::OtherUsers) }
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<String, Arc<Session>>> {
        self.inner.sessions.lock().expect("nobody panics under this lock")
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.inner.execs.lock().expect("nobody panics under this lock")
    }

    /// All sessions.
    pub fn list(&self) -> Vec<Arc<Session>> {
        self.sessions().values().cloned().collect()
    }

    /// One session.
    pub fn session(&self, id: &str) -> Result<Arc<Session>, SessionError> {
        self.sessions().get(id).cloned().ok_or_else(|| SessionError::Unknown(cut(id)))
    }

    /// One exec.
    pub fn exec(&self, id: &str) -> Result<Arc<Exec>, SessionError> {
        self.execs().get(id).cloned().ok_or_else(|| SessionError::UnknownExec(cut(id)))
    }

    /// Sets a session up to just before its program is executed.
    pub async fn create(&self, request: CreateSessionRequest) -> Result<(), SessionError> {
        let id = request.session_id.clone();
        if !is_usable(&id) {
            return Err(SessionError::Id(cut(&id)));
        }
        let session = self.enter(request)?;
        match session.reach(|p| !matches!(p, Phase::Creating)).await? {
            Phase::Failed(error) => Err(SessionError::CreationFailed(error)),
            Phase::Creating | Phase::Created(_) | Phase::Running(_) | Phase::Exited(..) => Ok(()),
        }
    }

    /// The session of that id, newly entered and being created if there was none.
    fn enter(&self, request: CreateSessionRequest) -> Result<Arc<Session>, SessionError> {
        let mut sessions = self.sessions();
        if let Some(session) = sessions.get(&request.session_id) {
            return if session.request == request {
                Ok(Arc::clone(session))
            } else {
                Err(SessionError::Exists(session.id.clone()))
            };
        }
        if sessions.len() >= MAX_SESSIONS {
            return Err(SessionError::TooMany(sessions.len()));
        }
        let session = Arc::new(Session::new(request));
        sessions.insert(session.id.clone(), Arc::clone(&session));
        tokio::spawn(self.clone().live(Arc::clone(&session)));
        Ok(session)
    }

    /// The task of one session: creates it, then waits for its end.
    async fn live(self, session: Arc<Session>) {
        let (live, exit) = match self.set_up(&session).await {
            Ok(set_up) => set_up,
            Err(error) => {
                // Forgotten first, so that a retry makes a new one.
                self.sessions().remove(&session.id);
                session.phase.send_replace(Phase::Failed(Arc::new(error)));
                self.empty_trash();
                return;
            }
        };
        session.phase.send_replace(Phase::Created(Arc::clone(&live)));
        // The reaper keeps the sender until the process has ended.
        let Ok(exit) = exit.await else { return };
        let end = End { exit, oom_killed: live.cgroup.oom_killed() };
        // In a shared pid namespace others of the session may live on; a container ends with its first process.
        if let Err(error) = live.cgroup.kill() {
            say!("session {}: {error}", session.id);
        }
        live.drop_namespaces();
        live.stdio.process_ended();
        session.phase.send_replace(Phase::Exited(live, end));
    }

    async fn set_up(&self, session: &Session) -> Result<(Arc<Live>, oneshot::Receiver<Exit>), SessionError> {
        let request = &session.request;
        let holdings = self.acquire(request).await?;
        let cgroup =
            Cgroup::create(&session.id, &request.resources.clone().unwrap_or_default(), request.privileged)?;
        match self.launch(request, &holdings, &cgroup).await {
            Ok((launched, namespaces)) => {
                let live = Live {
                    pid: launched.pid,
                    user: launched.user,
                    cgroup,
                    stdio: launched.stdio,
                    namespaces: Mutex::new(Some(Arc::new(namespaces))),
                    control: Mutex::new(Some(launched.control)),
                    holdings: Mutex::new(Some(holdings)),
                };
                Ok((Arc::new(live), launched.exit))
            }
            Err(error) => {
                // Killing and waiting comes before the holdings go.
                if let Err(left) = cgroup.remove().await {
                    say!("session {}: {left}", session.id);
                }
                Err(error)
            }
        }
    }

    async fn acquire(&self, request: &CreateSessionRequest) -> Result<Holdings, SessionError> {
        let (layer_names, volume_names) = (layers::names(request), volumes::names(request));
        let (layers, volumes) = (self.inner.layers.clone(), self.inner.volumes.clone());
        let id = request.session_id.clone();
        let acquire = move || {
            Ok(Holdings {
                _layers: layers.acquire(&layer_names)?,
                _volumes: volumes.acquire(&volume_names)?,
                directory: Directory::make(&id)?,
            })
        };
        // Mounting waits for the host's file server.
        tokio::task::spawn_blocking(acquire).await.map_err(|_| SessionError::TaskFailed)?
    }

    async fn launch(
        &self,
        request: &CreateSessionRequest,
        holdings: &Holdings,
        cgroup: &Cgroup,
    ) -> Result<(launch::Launched, Namespaces), SessionError> {
        let process = request.process.clone().unwrap_or_default();
        let users = self.inner.users.get();
        let spec = SessionStage {
            request: Some(request.clone()),
            layers: request
                .rootfs
                .iter()
                .flat_map(|rootfs| &rootfs.layers)
                .map(|n| layers::place(n))
                .collect(),
            directory: holdings.directory.path.to_string_lossy().into_owned(),
            users: users.map(|users| users.mapping),
        };
        // Kept until the process is started: they hold the namespace that it joins.
        let pod;
        let target;
        let pid_space = match request.pid_mode() {
            PidMode::Session => PidSpace::New,
            PidMode::Pod => {
                pod = self.pod_pids().await?;
                PidSpace::Join(pod.namespace.as_fd())
            }
            PidMode::Target => {
                let session = self.session(&request.target_session_id)?;
                let namespaces = session.live()?.namespaces();
                target = namespaces.ok_or_else(|| SessionError::Ended(session.id.clone()))?;
                PidSpace::Join(target.pid.as_fd())
            }
        };
        let stage = StageProcess {
            role: stage::SESSION,
            spec: spec.encode_to_vec(),
            terminal: process.terminal,
            stdin: request.stdin,
            pid_space,
            users,
            namespaces: None,
            cgroup,
            first_process: None,
        };
        let launched = launch::launch(&self.inner.reaper, &stage).await?;
        let namespaces = Namespaces::of(launched.pid).map_err(SessionError::launch("open its namespaces"))?;
        Ok((launched, namespaces))
    }

    /// Executes a created session's program.
    pub async fn start(&self, id: &str) -> Result<(Pid, ResolvedUser), SessionError> {
        let session = self.session(id)?;
        let live = match session.phase() {
            Phase::Created(live) => live,
            Phase::Running(_) => return Err(session.wrong("is already running")),
            Phase::Exited(..) => return Err(session.wrong("has already ended")),
            Phase::Creating => return Err(session.wrong("is still being created")),
            Phase::Failed(error) => return Err(SessionError::CreationFailed(error)),
        };
        let control = live.take_control().ok_or_else(|| session.wrong("is already being started"))?;
        let started = tokio::spawn(async move {
            control.go().map_err(SessionError::launch("start the process"))?;
            launch::await_execution(&control, &live.cgroup).await?;
            session.phase.send_if_modified(|phase| match phase {
                Phase::Created(live) => {
                    *phase = Phase::Running(Arc::clone(live));
                    true
                }
                // A short one may have ended already.
                Phase::Creating | Phase::Running(_) | Phase::Exited(..) | Phase::Failed(_) => false,
            });
            Ok((live.pid, live.user.clone()))
        });
        started.await.map_err(|_| SessionError::TaskFailed)?
    }

    /// Sends a signal to the session's first process, or to all.
    pub fn signal(&self, id: &str, number: i32, all: bool) -> Result<(), SessionError> {
        let session = self.session(id)?;
        let live = session.live()?;
        let fail = |source| SessionError::Signal { number, source };
        if all {
            return live.cgroup.signal(number).map_err(fail);
        }
        match self.inner.reaper.signal(live.pid, number).map_err(fail)? {
            true => Ok(()),
            false => Err(SessionError::Ended(session.id.clone())),
        }
    }

    /// Changes the limits of a session, or of the pod if none is named.
    pub fn update(&self, id: &str, settings: &[CgroupSetting]) -> Result<(), SessionError> {
        if id.is_empty() {
            return Ok(Cgroup::pod()?.update(settings)?);
        }
        Ok(self.session(id)?.live()?.cgroup.update(settings)?)
    }

    /// Waits for the end of the session's first process.
    pub async fn wait(&self, id: &str) -> Result<End, SessionError> {
        match self.session(id)?.reach(|p| matches!(p, Phase::Exited(..) | Phase::Failed(_))).await? {
            Phase::Exited(_, end) => Ok(end),
            Phase::Failed(error) => Err(SessionError::CreationFailed(error)),
            Phase::Creating | Phase::Created(_) | Phase::Running(_) => Err(SessionError::TaskFailed),
        }
    }

    /// Kills what is left of a session and gives everything back. An unknown id is success.
    pub async fn delete(&self, id: &str) -> Result<(), SessionError> {
        let Ok(session) = self.session(id) else { return Ok(()) };
        let live = match session.reach(|p| !matches!(p, Phase::Creating)).await? {
            Phase::Created(live) | Phase::Running(live) | Phase::Exited(live, _) => live,
            Phase::Failed(_) | Phase::Creating => return Ok(()),
        };
        let table = self.clone();
        let task = tokio::spawn(async move {
            live.cgroup.kill()?;
            let ended = session.reach(|p| matches!(p, Phase::Exited(..)));
            tokio::time::timeout(DEATH, ended)
                .await
                .map_err(|_| SessionError::WillNotDie(session.id.clone()))??;
            live.cgroup.remove().await?;
            let holdings = live.take_holdings();
            // Unmounting waits for the host's file server.
            tokio::task::spawn_blocking(move || drop(holdings))
                .await
                .map_err(|_| SessionError::TaskFailed)?;
            table.empty_trash();
            live.stdio.close();
            table.sessions().remove(&session.id);
            Ok(())
        });
        task.await.map_err(|_| SessionError::TaskFailed)?
    }

    /// Deletes old writable layers in a process of its own, in nobody's way.
    fn empty_trash(&self) {
        let spawn =
            Spawn { role: stage::REMOVE, descriptors: Vec::new(), cgroup: None, pid_space: PidSpace::Same };
        if let Err(error) = self.inner.reaper.spawn(&spawn) {
            say!("cannot delete what lies in {}: {error}", paths::TRASH);
        }
    }

    /// Starts a further process in a running session.
    pub async fn start_exec(&self, request: ExecRequest) -> Result<Pid, SessionError> {
        if request.exec_id.is_empty() || request.exec_id.len() > 256 {
            return Err(SessionError::Id(cut(&request.exec_id)));
        }
        let session = self.session(&request.session_id)?;
        let live = match session.phase() {
            Phase::Running(live) => live,
            Phase::Created(_) => return Err(session.wrong("has not been started")),
            Phase::Exited(..) => return Err(session.wrong("has ended")),
            Phase::Creating => return Err(session.wrong("is still being created")),
            Phase::Failed(error) => return Err(SessionError::CreationFailed(error)),
        };
        let namespaces = live.namespaces().ok_or_else(|| session.wrong("has ended"))?;
        {
            let execs = self.execs();
            if execs.contains_key(&request.exec_id) {
                return Err(SessionError::Exists(request.exec_id));
            }
            if execs.len() >= MAX_EXECS {
                return Err(SessionError::TooMany(execs.len()));
            }
        }
        let table = self.clone();
        let task = tokio::spawn(async move {
            let started =
                exec::start(&table.inner.reaper, table.inner.users.get(), &live, &namespaces, &request).await;
            let (exec, exit) = match started {
                Ok(started) => started,
                Err(error) => return Err(because_it_ended(&session, error).await),
            };
            let pid = exec.pid;
            table.execs().insert(request.exec_id.clone(), Arc::clone(&exec));
            tokio::spawn(table.clone().follow(request.exec_id, exec, exit));
            Ok(pid)
        });
        task.await.map_err(|_| SessionError::TaskFailed)?
    }

    /// The task of one exec: waits for its end, then until it may be forgotten.
    async fn follow(self, id: String, exec: Arc<Exec>, exit: oneshot::Receiver<Exit>) {
        if let Ok(exit) = exit.await {
            exec.stdio.process_ended();
            exec.stdio.drained().await;
            exec.finish(exit);
            // A host that was interested has come by then.
            if tokio::time::timeout(LINGER, exec.forgettable()).await.is_err() {
                exec.stdio.unattended().await;
            }
        }
        self.execs().remove(&id);
        exec.stdio.close();
    }

    /// Waits for the end of an exec and of its output.
    pub async fn wait_exec(&self, id: &str) -> Result<(Exit, Totals), SessionError> {
        let exec = self.exec(id)?;
        let exit = exec.wait().await.ok_or(SessionError::TaskFailed)?;
        exec.mark_reported();
        Ok((exit, exec.stdio.totals()))
    }

    /// Signals an exec's process, and with `all` what it has started; one that has ended is success.
    pub fn signal_exec(&self, id: &str, number: i32, all: bool) -> Result<(), SessionError> {
        let exec = self.exec(id)?;
        if all {
            let live = self.session(&exec.session_id)?.live()?;
            return family::signal(&live.cgroup, exec.pid.as_raw_pid(), number)
                .map_err(|source| SessionError::Signal { number, source });
        }
        self.inner
            .reaper
            .signal(exec.pid, number)
            .map(drop)
            .map_err(|source| SessionError::Signal { number, source })
    }

    /// Kills everything, for a box that is about to end.
    pub fn kill_all(&self) {
        for session in self.list() {
            if let Ok(live) = session.live() {
                // The power goes off in any case.
                let _ = live.cgroup.kill();
            }
        }
    }
}

/// An exec that comes while its session ends fails in strange ways: the kernel clones into a dying pid namespace with
/// ENOMEM, and kills who is already in it. The reason is said instead.
async fn because_it_ended(session: &Session, error: SessionError) -> SessionError {
    let strange = match &error {
        SessionError::StageDied { .. } => true,
        SessionError::Launch { source, .. } => source.raw_os_error() == Some(libc::ENOMEM),
        _ => false,
    };
    let ended = session.reach(|p| matches!(p, Phase::Exited(..)));
    if strange && tokio::time::timeout(REAP, ended).await.is_ok() {
        session.wrong("has ended")
    } else {
        error
    }
}

/// Ids become names of directories and cgroups.
fn is_usable(id: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=128).contains(&id.len()) && !id.starts_with('.') && id.bytes().all(plain)
}

/// For messages: ids that are not ours may be long.
fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_leave_their_directory() {
        for id in ["", ".", "..", "a/b", ".hidden", "a b", &"x".repeat(129)] {
            assert!(!is_usable(id), "{id}");
        }
        assert!(is_usable(&"0a".repeat(32)));
    }
}
