//! The handle through which everything is asked of boxes and sessions.
//!
//! Nothing is done here: a request is put to the task that owns the object and its answer is
//! awaited. Whoever stops waiting stops nothing.

mod stats;
mod streams;
mod upkeep;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use a3s_box_core::image::ResolvedImage;
use a3s_box_core::lifecycle::{BoxPhase, BoxRequest, Decision, SessionPhase, SessionRequest};
use a3s_box_core::network::Address;
use a3s_box_core::spec::{BoxSpec, Limits, MountSource, PidNamespace, ProcessSpec, SessionSpec};
use a3s_box_core::storage::Storage;
use a3s_box_core::{BoxId, SessionId};
use a3s_box_protocol::versions;
use a3s_box_vmm::Vmm;

use crate::api::{BoxStatus, ExecOutput, Leftover, NetworkReadiness, Quarantined, SessionStatus};
use crate::attached::Attached;
use crate::boxes::{BoxCommand, BoxDriver, BoxLife, BoxStart, Leftovers, LiveBox};
use crate::clock::now_ns;
use crate::config::RuntimeConfig;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::events::{EventStream, Events};
use crate::limits;
use crate::network::NetworkSetting;
use crate::records::{BoxRecord, Records, SessionRecord};
use crate::recovery;
use crate::registry::{BoxEntry, Entered, EnteredSession, Matches, Registry, Reply, SessionEntry};
use crate::scratch::Scratches;
use crate::sessions::{ExecPlan, SessionCommand, SessionDriver, SessionStart, Told, exec_sync};
use crate::shared::Shared;
use crate::stats::Figures;

/// Requests that may wait for one owner. More make their senders wait.
const QUEUE: usize = 64;

/// All boxes of this node. Clones share them.
#[derive(Clone)]
pub struct BoxManager {
    shared: Arc<Shared>,
    quarantined: Arc<[Quarantined]>,
}

impl BoxManager {
    /// Loads the records and reconciles them with what is found: boxes whose VM still runs are taken up again,
    /// the others are stopped, and what was half made is undone.
    pub async fn start(
        config: RuntimeConfig,
        storage: Arc<dyn Storage>,
        vmm: Arc<dyn Vmm>,
    ) -> Result<BoxManager, RuntimeError> {
        let shared = Arc::new(Shared {
            scratches: Scratches::new(&config.state_dir),
            records: Records::new(storage),
            vmm,
            registry: Registry::default(),
            figures: Figures::default(),
            box_figures: Figures::default(),
            events: Events::default(),
            leftovers: Leftovers::default(),
            network_complaints: Mutex::default(),
            boots: Arc::new(Semaphore::new(config.parallel_boots.max(1))),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            config,
        });
        let quarantined = recovery::recover(&shared).await?.into();
        Ok(Self { shared, quarantined })
    }

    /// What happens to boxes and sessions from now on.
    pub fn events(&self) -> EventStream {
        self.shared.events.listen()
    }

    /// Makes a box and answers once it is ready. A box of the same identity that is in the making is joined, and
    /// one that is ready and was made with the same spec is the answer: the retry of a client that gave up.
    pub async fn run_box(&self, spec: BoxSpec) -> Result<BoxId, RuntimeError> {
        let (stage, name) = (FailedStage::Reserve, pod_name(&spec));
        let refused = |kind, message: &str| RuntimeError::new(kind, stage, name.clone(), message);
        if spec.identity.name.is_empty() {
            return Err(refused(ErrorKind::InvalidArgument, "the pod sandbox has no name"));
        }
        let handlers = &self.shared.config.runtime_handlers;
        if !spec.runtime_handler.is_empty() && !handlers.contains(&spec.runtime_handler) {
            let message = format!(
                "runtime handler {:?} is not configured; there are {handlers:?}",
                spec.runtime_handler
            );
            return Err(refused(ErrorKind::InvalidArgument, &message));
        }
        let record = new_record(&self.shared.config, spec);
        let (entry, driver) = prepare_box(&self.shared, record);
        let entry = match self.shared.registry.enter_box(entry.clone()) {
            Entered::New => {
                self.shared.tasks.spawn(driver.run(BoxStart::BringUp));
                entry
            }
            Entered::Taken(other) if other.spec != entry.spec => {
                let id = other.id.short();
                let message = format!("pod sandbox {id} has this name and another spec");
                return Err(refused(ErrorKind::AlreadyExists, &message));
            }
            Entered::Taken(other) => other,
        };
        let mut outcome = entry.outcome.clone();
        match outcome.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(Ok(()))?,
            Err(_) => return Err(refused(ErrorKind::Unavailable, "the daemon is shutting down")),
        }
        let phase = entry.status.borrow().phase.clone();
        match phase {
            BoxPhase::Reserved | BoxPhase::Prepared | BoxPhase::Booting | BoxPhase::Ready => {
                Ok(entry.id.clone())
            }
            BoxPhase::Stopping | BoxPhase::Stopped(_) => {
                let id = entry.id.short();
                let message = format!("pod sandbox {id} has this name and is stopped; remove it first");
                Err(refused(ErrorKind::AlreadyExists, &message))
            }
        }
    }

    /// Ends a box and all of its sessions. One that is stopped or unknown is success.
    pub async fn stop_box(&self, id: &BoxId) -> Result<(), RuntimeError> {
        self.ask_box(id, BoxCommand::Stop).await
    }

    /// Removes a box, ending it first if need be. An unknown one is success.
    pub async fn remove_box(&self, id: &BoxId) -> Result<(), RuntimeError> {
        self.ask_box(id, BoxCommand::Remove).await
    }

    async fn ask_box(
        &self,
        id: &BoxId,
        command: impl FnOnce(Reply<()>) -> BoxCommand,
    ) -> Result<(), RuntimeError> {
        let Some(entry) = self.shared.registry.get_box(id) else { return Ok(()) };
        // Has no effect on a box that is up.
        entry.cancel.cancel();
        let (reply, answer) = oneshot::channel();
        if entry.commands.send(command(reply)).await.is_err() {
            return Ok(());
        }
        answer.await.unwrap_or_else(|_| Err(closing(&box_object(id))))
    }

    /// The box whose id starts with the text.
    pub fn find_box(&self, id_or_prefix: &str) -> Result<BoxId, RuntimeError> {
        found(self.shared.registry.match_box(id_or_prefix), "pod sandbox", id_or_prefix)
    }

    /// A box as it is now.
    pub fn box_status(&self, id: &BoxId) -> Result<BoxStatus, RuntimeError> {
        let entry = self.shared.registry.get_box(id).ok_or_else(|| not_found(&box_object(id)))?;
        let status = entry.status.borrow().clone();
        Ok(status)
    }

    /// All boxes that have been ready once, oldest first. One that is still starting is its caller's business:
    /// listed as not ready it would be given up by kubelet.
    pub fn list_boxes(&self) -> Vec<BoxStatus> {
        let mut list: Vec<BoxStatus> =
            self.shared.registry.boxes().iter().map(|entry| entry.status.borrow().clone()).collect();
        list.retain(|status| match status.phase {
            BoxPhase::Reserved | BoxPhase::Prepared | BoxPhase::Booting => false,
            BoxPhase::Ready | BoxPhase::Stopping | BoxPhase::Stopped(_) => true,
        });
        list.sort_by_key(|status| status.created_at_ns);
        list
    }

    /// Prepares a session in a ready box.
    pub async fn create_session(
        &self,
        box_id: &BoxId,
        spec: SessionSpec,
        image: ResolvedImage,
    ) -> Result<SessionId, RuntimeError> {
        let boxed = self.shared.registry.get_box(box_id).ok_or_else(|| not_found(&box_object(box_id)))?;
        let status = boxed.status.borrow().clone();
        if let Decision::Deny(reason) = status.phase.decide(BoxRequest::Use) {
            return Err(RuntimeError::new(
                ErrorKind::FailedPrecondition,
                FailedStage::Create,
                box_object(box_id),
                reason,
            ));
        }
        self.check_target(&boxed, &spec)?;
        let record = new_session(&status, spec, image)?;
        let id = record.id.clone();
        let name = record.spec.name.clone();
        let (entry, driver) = prepare_session(&self.shared, &boxed, record);
        let taken = |message| {
            let object = format!("container {name}");
            Err(RuntimeError::new(ErrorKind::AlreadyExists, FailedStage::Create, object, message))
        };
        match self.shared.registry.enter_session(entry.clone()) {
            EnteredSession::New => {}
            EnteredSession::Taken(other) => {
                let known = other.status.borrow().clone();
                if is_retry(&known, &entry.status.borrow()) {
                    return joined(&other, known.id).await;
                }
                let id = known.id.short();
                return taken(format!("container {id} has this name and attempt in {}", box_object(box_id)));
            }
            EnteredSession::Rival(other) => {
                let (id, attempt) = (other.id.short(), other.spec.attempt);
                return taken(format!(
                    "container {id}, which is attempt {attempt} of it, still runs in {}; stop it first",
                    box_object(box_id)
                ));
            }
        }
        let (reply, answer) = oneshot::channel();
        self.shared.tasks.spawn(driver.run(SessionStart::Create(reply)));
        answer.await.unwrap_or_else(|_| Err(closing(&session_object(&id))))?;
        Ok(id)
    }

    /// A session may see the processes of another one of its box only.
    fn check_target(&self, boxed: &BoxEntry, spec: &SessionSpec) -> Result<(), RuntimeError> {
        let PidNamespace::Target(target) = &spec.pid_namespace else { return Ok(()) };
        match self.shared.registry.get_session(target) {
            Some(session) if session.box_id == boxed.id => Ok(()),
            _ => Err(RuntimeError::new(
                ErrorKind::InvalidArgument,
                FailedStage::Create,
                format!("container {}", spec.name),
                format!("{} has no container {target} whose processes it could see", box_object(&boxed.id)),
            )),
        }
    }

    /// Executes a session's process.
    pub async fn start_session(&self, id: &SessionId) -> Result<(), RuntimeError> {
        self.ask_session(id, SessionCommand::Start).await
    }

    /// Sends the stop signal, waits for `grace`, then kills. One that has ended or is unknown is success.
    pub async fn stop_session(&self, id: &SessionId, grace: Duration) -> Result<(), RuntimeError> {
        self.end_session(id, |reply| SessionCommand::Stop { grace, reply }).await
    }

    /// Removes a session, killing it first if need be. An unknown one is success.
    pub async fn remove_session(&self, id: &SessionId) -> Result<(), RuntimeError> {
        self.end_session(id, SessionCommand::Remove).await
    }

    async fn end_session(
        &self,
        id: &SessionId,
        command: impl FnOnce(Reply<()>) -> SessionCommand,
    ) -> Result<(), RuntimeError> {
        if self.shared.registry.get_session(id).is_none() {
            return Ok(());
        }
        match self.ask_session(id, command).await {
            Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    async fn ask_session<T>(
        &self,
        id: &SessionId,
        command: impl FnOnce(Reply<T>) -> SessionCommand,
    ) -> Result<T, RuntimeError> {
        let object = session_object(id);
        let entry = self.shared.registry.get_session(id).ok_or_else(|| not_found(&object))?;
        let (reply, answer) = oneshot::channel();
        entry.commands.send(command(reply)).await.map_err(|_| not_found(&object))?;
        answer.await.unwrap_or_else(|_| Err(closing(&object)))
    }

    /// The session whose id starts with the text.
    pub fn find_session(&self, id_or_prefix: &str) -> Result<SessionId, RuntimeError> {
        found(self.shared.registry.match_session(id_or_prefix), "container", id_or_prefix)
    }

    /// A session as it is now.
    pub fn session_status(&self, id: &SessionId) -> Result<SessionStatus, RuntimeError> {
        let entry = self.shared.registry.get_session(id).ok_or_else(|| not_found(&session_object(id)))?;
        let status = entry.status.borrow().clone();
        Ok(status)
    }

    /// All sessions, oldest first.
    pub fn list_sessions(&self) -> Vec<SessionStatus> {
        statuses(&self.shared.registry.sessions())
    }

    /// The sessions of one box, oldest first.
    pub fn list_sessions_of(&self, id: &BoxId) -> Vec<SessionStatus> {
        statuses(&self.shared.registry.sessions_of(id))
    }

    /// Runs a further process in a session to its end. What `process` leaves empty is the session's own; the
    /// system call filter always is. At the limit the process is killed.
    pub async fn exec_sync(
        &self,
        id: &SessionId,
        process: ProcessSpec,
        limit: Option<Duration>,
        max_output: usize,
    ) -> Result<ExecOutput, RuntimeError> {
        let plan = ExecPlan { limit, max_output, ..self.exec_plan(id, process)? };
        let running = self.shared.tasks.spawn(exec_sync(plan));
        running.await.unwrap_or_else(|_| Err(closing(&session_object(id))))
    }

    /// What every further process needs.
    fn exec_plan(&self, id: &SessionId, process: ProcessSpec) -> Result<ExecPlan, RuntimeError> {
        let status = self.session_status(id)?;
        let refused =
            |kind, reason: &str| RuntimeError::new(kind, FailedStage::Exec, session_object(id), reason);
        if process.args.is_empty() {
            return Err(refused(ErrorKind::InvalidArgument, "there is no command"));
        }
        if let Decision::Deny(reason) = status.phase.decide(SessionRequest::Exec) {
            return Err(refused(ErrorKind::FailedPrecondition, reason));
        }
        let live =
            self.reach(&status.box_id).map_err(|reason| refused(ErrorKind::FailedPrecondition, &reason))?;
        let exec_id = SessionId::from_random(random()).short().to_owned();
        Ok(ExecPlan {
            live,
            session_id: id.clone(),
            session: status.spec,
            exec_id,
            process,
            limit: None,
            max_output: 0,
        })
    }

    fn live(&self, id: &BoxId) -> Option<Arc<LiveBox>> {
        self.reach(id).ok()
    }

    /// The box, or why nothing can be asked of its guest.
    fn reach(&self, id: &BoxId) -> Result<Arc<LiveBox>, String> {
        let entry = self.shared.registry.get_box(id);
        entry.map_or_else(|| Err("the pod sandbox is gone".to_owned()), |entry| entry.life.borrow().live())
    }

    /// The boxes that run and whose agents this version does not speak to, with the reason. They are as they were left, and
    /// can be stopped and removed.
    pub fn foreign(&self) -> Vec<(BoxId, String)> {
        let reason = |entry: Arc<BoxEntry>| match &*entry.life.borrow() {
            BoxLife::Foreign(foreign) => Some((entry.id.clone(), foreign.why.to_string())),
            BoxLife::Starting | BoxLife::Live(_) | BoxLife::Gone(_) => None,
        };
        self.shared.registry.boxes().into_iter().filter_map(reason).collect()
    }

    /// Opens a session's log file anew, after it was renamed.
    pub async fn reopen_log(&self, id: &SessionId) -> Result<(), RuntimeError> {
        self.ask_session(id, SessionCommand::ReopenLog).await
    }

    /// The raw streams of a session that has not been started yet.
    pub async fn attach(&self, id: &SessionId) -> Result<Attached, RuntimeError> {
        self.ask_session(id, SessionCommand::TakeStreams).await
    }

    /// Changes a session's limits while it runs; what is not given stays, negative figures take a limit away. Refused
    /// beyond the size of its box, and for a memory limit below what is in use.
    pub async fn update_session(&self, id: &SessionId, limits: Limits) -> Result<(), RuntimeError> {
        self.ask_session(id, |reply| SessionCommand::Update(limits, reply)).await
    }

    /// Limits all sessions of a box together. Refused beyond its size.
    pub async fn update_box(&self, id: &BoxId, given: &Limits) -> Result<(), RuntimeError> {
        let object = box_object(id);
        let entry = self.shared.registry.get_box(id).ok_or_else(|| not_found(&object))?;
        let refuse = |why: String| {
            RuntimeError::new(ErrorKind::FailedPrecondition, FailedStage::Update, object.clone(), why)
        };
        limits::fit(given, &entry.spec.size).map_err(|beyond| refuse(beyond.to_string()))?;
        let live = self.reach(id).map_err(refuse)?;
        let updated = live.agent.update_resources(String::new(), limits::settings(given)).await;
        updated.map_err(|error| error.at(FailedStage::Update, object.clone()))
    }

    /// Sets the window size of a session's terminal.
    pub async fn resize(&self, id: &SessionId, rows: u16, cols: u16) -> Result<(), RuntimeError> {
        self.ask_session(id, |reply| SessionCommand::Resize { rows, columns: cols, reply }).await
    }

    /// Sends a signal to a session's first process.
    pub async fn signal_session(&self, id: &SessionId, signal: i32) -> Result<(), RuntimeError> {
        self.ask_session(id, |reply| SessionCommand::Signal(signal, reply)).await
    }

    /// Answers once the session has ended.
    pub async fn wait_session(&self, id: &SessionId) -> Result<SessionStatus, RuntimeError> {
        let entry = self.shared.registry.get_session(id).ok_or_else(|| not_found(&session_object(id)))?;
        let mut status = entry.status.clone();
        match status.wait_for(|status| matches!(status.phase, SessionPhase::Exited { .. })).await {
            Ok(status) => Ok(status.clone()),
            Err(_) => Err(closing(&session_object(id))),
        }
    }

    /// What is left of boxes that are gone.
    pub fn leftovers(&self) -> Vec<Leftover> {
        self.shared.leftovers.list()
    }

    /// Records that could not be read when this daemon, or one before it, started. They are kept, apart from the others.
    pub fn quarantined(&self) -> &[Quarantined] {
        &self.quarantined
    }

    /// Whether pods can be connected now.
    pub async fn network_status(&self) -> NetworkReadiness {
        match &self.shared.config.network {
            NetworkSetting::Pods(pods) => pods.readiness().await,
            NetworkSetting::None => {
                NetworkReadiness { ready: true, reason: String::new(), message: String::new() }
            }
        }
    }

    /// Has the networks of the boxes that were taken up checked, and what belongs to no box given back; in the background. For
    /// the one instance of a host that knows what the others hold.
    pub fn look_after_networks(&self) {
        self.shared.tasks.spawn(upkeep::look_after_networks(self.shared.clone()));
    }

    /// What the network had to complain of a box when it was taken up.
    pub fn network_complaint(&self, id: &BoxId) -> Option<String> {
        self.shared.network_complaints.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// What the cluster has assigned to this node's pods, one range of an address family each.
    pub async fn assign_pod_cidrs(&self, cidrs: &[Address]) -> Result<(), RuntimeError> {
        let NetworkSetting::Pods(pods) = &self.shared.config.network else { return Ok(()) };
        let assigned = pods.assign_pod_cidrs(cidrs).await;
        assigned.map_err(|fault| {
            let (kind, stage) = (ErrorKind::FailedPrecondition, FailedStage::Network);
            RuntimeError::caused(kind, stage, "the node", fault)
        })
    }

    /// Joins all tasks. Boxes keep running; those that are still starting are undone.
    pub async fn shutdown(&self) {
        for entry in self.shared.registry.boxes() {
            if entry.outcome.borrow().is_none() {
                entry.cancel.cancel();
            }
        }
        self.shared.closing.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

/// Oldest first.
fn statuses(entries: &[Arc<SessionEntry>]) -> Vec<SessionStatus> {
    let mut list: Vec<SessionStatus> = entries.iter().map(|entry| entry.status.borrow().clone()).collect();
    list.sort_by_key(|status| status.created_at_ns);
    list
}

/// A box's handle and its owner, not yet entered or started.
pub(crate) fn prepare_box(shared: &Arc<Shared>, record: BoxRecord) -> (Arc<BoxEntry>, BoxDriver) {
    let (commands, requests) = mpsc::channel(QUEUE);
    let (status, status_seen) = watch::channel(record.status());
    let (life, life_seen) = watch::channel(BoxLife::Starting);
    let (outcome, outcome_seen) = watch::channel(None);
    let cancel = CancellationToken::new();
    let entry = BoxEntry {
        id: record.id.clone(),
        spec: record.spec.clone(),
        commands,
        status: status_seen,
        life: life_seen,
        outcome: outcome_seen,
        cancel: cancel.clone(),
    };
    let driver = BoxDriver {
        shared: shared.clone(),
        record,
        commands: requests,
        status,
        life,
        outcome,
        cancel,
        machine: None,
    };
    (Arc::new(entry), driver)
}

/// A session's handle and its owner, not yet entered or started.
pub(crate) fn prepare_session(
    shared: &Arc<Shared>,
    boxed: &BoxEntry,
    record: SessionRecord,
) -> (Arc<SessionEntry>, SessionDriver) {
    let (commands, requests) = mpsc::channel(QUEUE);
    let (status, status_seen) = watch::channel(record.status());
    let (outcome, outcome_seen) = watch::channel(None);
    let entry =
        SessionEntry { box_id: boxed.id.clone(), commands, status: status_seen, outcome: outcome_seen };
    let driver = SessionDriver::new(shared.clone(), record, boxed, requests, Told { status, outcome });
    (Arc::new(entry), driver)
}

fn new_record(config: &RuntimeConfig, spec: BoxSpec) -> BoxRecord {
    let id = BoxId::from_random(random());
    BoxRecord {
        dir: config.run_dir.join("boxes").join(id.as_str()),
        id,
        spec,
        created_at_ns: now_ns(),
        phase: BoxPhase::Reserved,
        ledger: Vec::new(),
        network: None,
        plan: None,
        machine: None,
        kernel_release: String::new(),
        timeline: Vec::new(),
        layers: Default::default(),
        sources: Default::default(),
        agent_protocol: versions::UNRECORDED,
    }
}

fn new_session(
    boxed: &BoxStatus,
    spec: SessionSpec,
    image: ResolvedImage,
) -> Result<SessionRecord, RuntimeError> {
    let object = format!("container {}", spec.name);
    let refused = |message: &str| {
        Err(RuntimeError::new(ErrorKind::InvalidArgument, FailedStage::Create, object.clone(), message))
    };
    if spec.process.args.is_empty() {
        return refused("neither the container nor its image says what to run");
    }
    let log_path = match (&boxed.spec.log_directory, &spec.log_path) {
        (Some(directory), Some(path)) => {
            let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
            if !plain {
                return refused("the log path leaves the log directory");
            }
            Some(directory.join(path))
        }
        (None, _) | (_, None) => None,
    };
    let id = SessionId::from_random(random());
    Ok(SessionRecord {
        id,
        box_id: boxed.id.clone(),
        spec,
        image,
        created_at_ns: now_ns(),
        phase: SessionPhase::Created,
        log_path,
        user: None,
        pid: None,
        volumes: Vec::new(),
    })
}

/// Whether a client asks once more for a session whose making it did not see the end of. What its mounts are of does not
/// matter: kubelet gives every request a new file for the container's last words.
fn is_retry(known: &SessionStatus, asked: &SessionStatus) -> bool {
    let without_sources = |status: &SessionStatus| {
        let mut spec = status.spec.clone();
        for mount in &mut spec.mounts {
            if let MountSource::Host { path, .. } = &mut mount.source {
                path.clear();
            }
        }
        spec
    };
    matches!(known.phase, SessionPhase::Created)
        && known.image_id == asked.image_id
        && without_sources(known) == without_sources(asked)
}

/// The answer to a retry: that of the first request.
async fn joined(entry: &SessionEntry, id: SessionId) -> Result<SessionId, RuntimeError> {
    let mut outcome = entry.outcome.clone();
    match outcome.wait_for(Option::is_some).await {
        Ok(result) => result.clone().unwrap_or(Ok(())).map(|()| id),
        Err(_) => Err(closing(&session_object(&id))),
    }
}

/// 32 bytes that nobody can guess.
fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    let mut filled = 0;
    while filled < bytes.len() {
        // Without the pool being initialised this waits; it never fails on a kernel that runs VMs.
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("the kernel gives no random bytes: {error}"),
        }
    }
    bytes
}

fn pod_name(spec: &BoxSpec) -> String {
    format!("pod {}/{} (attempt {})", spec.identity.namespace, spec.identity.name, spec.identity.attempt)
}

fn box_object(id: &BoxId) -> String {
    format!("pod sandbox {}", id.short())
}

fn session_object(id: &SessionId) -> String {
    format!("container {}", id.short())
}

fn not_found(object: &str) -> RuntimeError {
    RuntimeError::new(ErrorKind::NotFound, FailedStage::Lookup, object, "it does not exist")
}

fn closing(object: &str) -> RuntimeError {
    RuntimeError::new(ErrorKind::Unavailable, FailedStage::Lookup, object, "the daemon is shutting down")
}

fn found<I>(matches: Matches<I>, what: &str, text: &str) -> Result<I, RuntimeError> {
    let shown = crate::text::printable(text, 80);
    match matches {
        Matches::One(id) => Ok(id),
        Matches::None => Err(not_found(&format!("{what} {shown:?}"))),
        Matches::Many => {
            let message = "more than one id starts with it; give more digits";
            Err(RuntimeError::new(
                ErrorKind::InvalidArgument,
                FailedStage::Lookup,
                format!("{what} {shown:?}"),
                message,
            ))
        }
    }
}
