//! The task that owns a session.
//!
//! ```text
//!   create ──► Created ──Start──► Running ──exit──► Exited ──Remove──► (gone)
//!                                   │  ▲
//!                                   │  └─ stopping: signal, grace, SIGKILL, then the whole VM
//!                                   └── box gone ──► Exited
//! ```

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use a3s_box_core::lifecycle::{Decision, SessionPhase, SessionRequest, StopCause};
use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::{ExitStatus, ResizeTerminalRequest, SessionState, session_state};

use super::exit::{ExitNews, await_exit};
use super::{request, volumes};
use crate::agent_client::AgentError;
use crate::api::{ResolvedUser, SessionStatus};
use crate::attached::Attached;
use crate::boxes::{BoxCommand, BoxLife, LiveBox, Obituary};
use crate::clock::now_ns;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::log::{self, LogHandle, LogPlan};
use crate::records::SessionRecord;
use crate::registry::Reply;
use crate::shared::Shared;
use crate::streams::{self, Output, StreamName};

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// The longest until a killed session has ended. After that its VM is ended.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// The longest that an ended session waits for its last output. A process that inherited the pipes may keep
/// them open for ever.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// The same where the VM is gone: nothing more comes than what is in the sockets.
const GONE_DRAIN_LIMIT: Duration = Duration::from_millis(500);

/// The longest for one mount.
const ATTACH_LIMIT: Duration = Duration::from_secs(10);

/// The exit code of a session whose program could not be executed, as other runtimes report it.
const START_ERROR: i32 = 128;
/// The exit code of a session that was killed with its VM.
const KILLED: i32 = 137;
/// The exit code of a session whose end nobody saw.
const UNKNOWN: i32 = 255;

/// What is asked of a session.
pub(crate) enum SessionCommand {
    /// Run its process.
    Start(Reply<()>),
    /// End its process.
    Stop {
        /// Between the stop signal and SIGKILL.
        grace: Duration,
        /// Answered when it has ended.
        reply: Reply<()>,
    },
    /// End it and forget it.
    Remove(Reply<()>),
    /// Signal its first process.
    Signal(i32, Reply<()>),
    /// Open its log anew.
    ReopenLog(Reply<()>),
    /// Set the window of its terminal.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters per line.
        columns: u16,
        /// Answered when it is set.
        reply: Reply<()>,
    },
    /// Hand out its raw streams.
    TakeStreams(Reply<Attached>),
}

/// How a driver begins.
pub(crate) enum SessionStart {
    /// By making the session.
    Create(Reply<()>),
    /// With a session of an earlier daemon and what the agent says of it.
    Resume(Option<SessionState>),
}

/// A stop that is under way.
struct Stopping {
    killed: bool,
    deadline: Instant,
    waiters: Vec<Reply<()>>,
    removals: Vec<Reply<()>>,
}

enum Event {
    Exited(ExitNews),
    Gone(Obituary),
    Deadline,
    Command(SessionCommand),
    Closing,
}

/// Whether the session still exists after an event.
#[derive(PartialEq, Eq)]
enum Exists {
    Yes,
    No,
}

/// The owner of one session.
pub(crate) struct SessionDriver {
    shared: Arc<Shared>,
    record: SessionRecord,
    boxed: mpsc::Sender<BoxCommand>,
    life: watch::Receiver<BoxLife>,
    commands: mpsc::Receiver<SessionCommand>,
    status: watch::Sender<SessionStatus>,
    live: Option<Arc<LiveBox>>,
    log: Option<LogHandle>,
    exit: Option<AbortOnDropHandle<ExitNews>>,
    stopping: Option<Stopping>,
    streams_taken: bool,
}

impl SessionDriver {
    pub(crate) fn new(
        shared: Arc<Shared>,
        record: SessionRecord,
        boxed: mpsc::Sender<BoxCommand>,
        life: watch::Receiver<BoxLife>,
        commands: mpsc::Receiver<SessionCommand>,
        status: watch::Sender<SessionStatus>,
    ) -> Self {
        let live = match &*life.borrow() {
            BoxLife::Live(live) => Some(live.clone()),
            BoxLife::Starting | BoxLife::Gone(_) => None,
        };
        Self {
            shared,
            record,
            boxed,
            life,
            commands,
            status,
            live,
            log: None,
            exit: None,
            stopping: None,
            streams_taken: false,
        }
    }

    /// Runs until the session is removed or the daemon ends.
    pub(crate) async fn run(mut self, start: SessionStart) {
        let exists = match start {
            SessionStart::Create(reply) => self.begin(reply).await,
            SessionStart::Resume(state) => self.resume(state).await,
        };
        if exists == Exists::No {
            return;
        }
        loop {
            let exists = match self.next_event().await {
                Event::Exited(news) => self.exited(news).await,
                Event::Gone(obituary) => self.box_gone(obituary).await,
                Event::Deadline => self.escalate().await,
                Event::Command(command) => self.handle(command).await,
                Event::Closing => return,
            };
            if exists == Exists::No {
                self.refuse_queued();
                return;
            }
        }
    }

    /// An exit that is known is told before the end of the VM that may have followed it; both come before
    /// requests, which must not go to a dead VM.
    async fn next_event(&mut self) -> Event {
        let Self { exit, life, live, stopping, commands, shared, .. } = self;
        let exited = async {
            match exit {
                // The task fails only when the runtime shuts down.
                Some(exit) => exit.await.unwrap_or(ExitNews::Unknown),
                None => std::future::pending().await,
            }
        };
        let gone = async {
            if live.is_none() {
                std::future::pending::<()>().await;
            }
            let seen = match life.wait_for(|life| matches!(life, BoxLife::Gone(_))).await.as_deref() {
                Ok(BoxLife::Gone(obituary)) => Some(obituary.clone()),
                // The box's driver has ended with the daemon.
                Ok(BoxLife::Starting | BoxLife::Live(_)) | Err(_) => None,
            };
            match seen {
                Some(obituary) => obituary,
                None => std::future::pending().await,
            }
        };
        let deadline = async {
            match stopping {
                Some(stopping) => sleep_until(stopping.deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            news = exited => Event::Exited(news),
            obituary = gone => Event::Gone(obituary),
            () = deadline => Event::Deadline,
            () = shared.closing.cancelled() => Event::Closing,
            command = commands.recv() => command.map_or(Event::Closing, Event::Command),
        }
    }

    async fn handle(&mut self, command: SessionCommand) -> Exists {
        match command {
            SessionCommand::Start(reply) => drop(reply.send(self.start().await)),
            SessionCommand::Stop { grace, reply } => self.stop(grace, reply).await,
            SessionCommand::Remove(reply) => return self.remove(reply).await,
            SessionCommand::Signal(signal, reply) => drop(reply.send(self.signal(signal).await)),
            SessionCommand::ReopenLog(reply) => drop(reply.send(self.reopen_log().await)),
            SessionCommand::Resize { rows, columns, reply } => {
                drop(reply.send(self.resize(rows, columns).await))
            }
            SessionCommand::TakeStreams(reply) => drop(reply.send(self.take_streams().await)),
        }
        Exists::Yes
    }

    fn refuse_queued(&mut self) {
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            let gone = || self.error(ErrorKind::NotFound, FailedStage::Lookup, "it was removed");
            match command {
                SessionCommand::Stop { reply, .. } | SessionCommand::Remove(reply) => {
                    drop(reply.send(Ok(())))
                }
                SessionCommand::Start(reply)
                | SessionCommand::Signal(_, reply)
                | SessionCommand::ReopenLog(reply)
                | SessionCommand::Resize { reply, .. } => drop(reply.send(Err(gone()))),
                SessionCommand::TakeStreams(reply) => drop(reply.send(Err(gone()))),
            }
        }
    }

    // Creation.

    async fn begin(&mut self, reply: Reply<()>) -> Exists {
        match self.create().await {
            Ok(()) => {
                reply.send(Ok(())).ok();
                Exists::Yes
            }
            Err(error) => {
                let left = self.forget().await;
                self.shared.registry.leave_session(&self.record.id);
                reply.send(Err(error.with_leftovers(&left))).ok();
                self.refuse_queued();
                Exists::No
            }
        }
    }

    async fn create(&mut self) -> Result<(), RuntimeError> {
        let live = self.require_live(FailedStage::Create)?;
        let message = request::create(&self.record, &live.facts)
            .map_err(|error| self.caused(ErrorKind::InvalidArgument, FailedStage::Create, error))?;
        self.save(FailedStage::Create).await?;
        self.attach_layers().await?;
        self.attach_volumes(&live).await?;
        match live.agent.create_session(message).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.agent_error(&live, FailedStage::Create, error).await),
        }
    }

    async fn attach_layers(&self) -> Result<(), RuntimeError> {
        let (reply, answer) = oneshot::channel();
        let command = BoxCommand::AttachLayers(self.record.image.layers.clone(), reply);
        let gone =
            || self.error(ErrorKind::FailedPrecondition, FailedStage::Attach, "the pod sandbox is gone");
        self.boxed.send(command).await.map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    async fn attach_volumes(&self, live: &LiveBox) -> Result<(), RuntimeError> {
        for (index, mount) in self.record.spec.mounts.iter().enumerate() {
            let attachment = volumes::volume(&self.record.id, index, mount)
                .await
                .map_err(|error| self.caused(ErrorKind::InvalidArgument, FailedStage::Attach, error))?;
            let Some(attachment) = attachment else { continue };
            match timeout(ATTACH_LIMIT, live.machine.attach(attachment)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(self.caused(ErrorKind::Internal, FailedStage::Attach, error)),
                Err(_) => {
                    let what = format!("attaching the volume at {}", mount.target);
                    return Err(RuntimeError::timeout(
                        FailedStage::Attach,
                        self.object(),
                        ATTACH_LIMIT,
                        &what,
                    ));
                }
            }
        }
        Ok(())
    }

    // Requests.

    async fn start(&mut self) -> Result<(), RuntimeError> {
        self.decide(SessionRequest::Start, FailedStage::Start)?;
        let live = self.require_live(FailedStage::Start)?;
        if !self.streams_taken {
            self.log = Some(self.open_log(&live).await?);
        }
        let started = match live.agent.start_session(self.record.id.to_string()).await {
            Ok(started) => started,
            Err(error) => return Err(self.start_failed(&live, error).await),
        };
        self.record.pid = Some(started.pid);
        self.record.user =
            started.user.map(|user| ResolvedUser { uid: user.uid, gid: user.gid, groups: user.groups });
        self.record.phase = SessionPhase::Running { started_at_ns: now_ns() };
        self.watch_exit(&live);
        let saved = self.save(FailedStage::Start).await;
        self.publish();
        if saved.is_err() {
            // The client is told that it does not run, so it must not.
            self.kill(&live).await.ok();
        }
        saved
    }

    /// What the agent said about a program that cannot be executed is what people want to read.
    async fn start_failed(&mut self, live: &LiveBox, error: AgentError) -> RuntimeError {
        let error = self.agent_error(live, FailedStage::Start, error).await;
        self.end(0, START_ERROR, "StartError", &error.message).await;
        error
    }

    async fn stop(&mut self, grace: Duration, reply: Reply<()>) {
        match self.record.phase.decide(SessionRequest::Stop) {
            Decision::AlreadyDone => drop(reply.send(Ok(()))),
            Decision::Deny(reason) => {
                drop(reply.send(Err(self.error(ErrorKind::FailedPrecondition, FailedStage::Stop, reason))));
            }
            Decision::Accept => {
                self.begin_stop(grace).await;
                if let Some(stopping) = &mut self.stopping {
                    stopping.waiters.push(reply);
                }
            }
        }
    }

    /// Starts to stop, or hurries a stop that is under way.
    async fn begin_stop(&mut self, grace: Duration) {
        let deadline = Instant::now() + grace;
        match &mut self.stopping {
            Some(stopping) if stopping.killed => {}
            Some(stopping) => stopping.deadline = stopping.deadline.min(deadline),
            None => {
                self.stopping =
                    Some(Stopping { killed: false, deadline, waiters: Vec::new(), removals: Vec::new() });
                if let (Some(live), false) = (self.live.clone(), grace.is_zero()) {
                    let signal =
                        if self.record.spec.stop_signal > 0 { self.record.spec.stop_signal } else { SIGTERM };
                    if let Err(error) =
                        live.agent.signal_session(self.record.id.to_string(), signal, false).await
                    {
                        tracing::warn!(id = %self.record.id, %error, "the stop signal was not delivered");
                    }
                }
            }
        }
    }

    /// The grace is over: kill. The killed one still lives: end its VM.
    async fn escalate(&mut self) -> Exists {
        let Some(stopping) = &mut self.stopping else { return Exists::Yes };
        let already_killed = std::mem::replace(&mut stopping.killed, true);
        stopping.deadline = Instant::now() + KILL_LIMIT;
        let Some(live) = self.live.clone() else { return Exists::Yes };
        if already_killed {
            let detail = format!("{} did not end within {KILL_LIMIT:?} of being killed", self.object());
            self.boxed.send(BoxCommand::AgentLost(detail)).await.ok();
        } else if let Err(error) = self.kill(&live).await {
            tracing::warn!(id = %self.record.id, %error, "SIGKILL was not delivered");
        }
        Exists::Yes
    }

    async fn kill(&self, live: &LiveBox) -> Result<bool, AgentError> {
        live.agent.signal_session(self.record.id.to_string(), SIGKILL, true).await
    }

    async fn signal(&self, signal: i32) -> Result<(), RuntimeError> {
        self.decide(SessionRequest::Exec, FailedStage::Stop)?;
        let live = self.require_live(FailedStage::Stop)?;
        match live.agent.signal_session(self.record.id.to_string(), signal, false).await {
            Ok(_) => Ok(()),
            Err(error) => Err(error.at(FailedStage::Stop, self.object())),
        }
    }

    async fn reopen_log(&self) -> Result<(), RuntimeError> {
        match (&self.log, &self.record.phase) {
            (Some(log), _) => {
                log.reopen().await.map_err(|error| self.caused(ErrorKind::Internal, FailedStage::Log, error))
            }
            (None, SessionPhase::Running { .. }) => Ok(()),
            (None, SessionPhase::Created | SessionPhase::Exited { .. }) => Err(self.error(
                ErrorKind::FailedPrecondition,
                FailedStage::Log,
                "the container is not running",
            )),
        }
    }

    async fn resize(&self, rows: u16, columns: u16) -> Result<(), RuntimeError> {
        let live = self.require_live(FailedStage::Exec)?;
        let message = ResizeTerminalRequest {
            session_id: self.record.id.to_string(),
            exec_id: String::new(),
            rows: rows.into(),
            columns: columns.into(),
        };
        live.agent.resize(message).await.map_err(|error| error.at(FailedStage::Exec, self.object()))
    }

    async fn take_streams(&mut self) -> Result<Attached, RuntimeError> {
        self.decide(SessionRequest::Start, FailedStage::Exec)?;
        let live = self.require_live(FailedStage::Exec)?;
        let mut attached = Attached::default();
        if self.record.spec.stdin {
            let opened = streams::open(live.machine.as_ref(), &self.stream(Kind::Stdin), 0).await;
            let (stream, _) =
                opened.map_err(|error| self.caused(ErrorKind::Unavailable, FailedStage::Exec, error))?;
            attached.stdin = Some(Box::new(stream));
        }
        if self.record.log_path.is_none() {
            attached.stdout = Some(self.pump(&live, Kind::Stdout).await?);
            if !self.record.spec.process.terminal {
                attached.stderr = Some(self.pump(&live, Kind::Stderr).await?);
            }
            self.streams_taken = true;
        }
        Ok(attached)
    }

    async fn pump(&self, live: &LiveBox, kind: Kind) -> Result<crate::attached::StreamReader, RuntimeError> {
        match Output::open(live.machine.as_ref(), &self.stream(kind), 0).await {
            Ok((output, first)) => Ok(streams::pump(output, first, &self.shared.tasks)),
            Err(error) => Err(self.caused(ErrorKind::Unavailable, FailedStage::Exec, error)),
        }
    }

    async fn remove(&mut self, reply: Reply<()>) -> Exists {
        if let SessionPhase::Running { .. } = self.record.phase {
            self.begin_stop(Duration::ZERO).await;
            if let Some(stopping) = &mut self.stopping {
                stopping.removals.push(reply);
            }
            return Exists::Yes;
        }
        let errors = self.forget().await;
        match RuntimeError::all_of(FailedStage::Remove, &self.object(), &errors) {
            Some(error) => {
                reply.send(Err(error)).ok();
                Exists::Yes
            }
            None => {
                self.shared.registry.leave_session(&self.record.id);
                reply.send(Ok(())).ok();
                Exists::No
            }
        }
    }

    /// Takes it out of the guest, its volumes out of the share, and its record out of the store. The record goes last
    /// and only if nothing is left.
    async fn forget(&mut self) -> Vec<RuntimeError> {
        let mut errors = Vec::new();
        if let Some(live) = self.live.clone() {
            if let Err(error) = live.agent.delete_session(self.record.id.to_string()).await {
                errors.push(error.at(FailedStage::Remove, self.object()));
            }
            for name in &self.record.volumes {
                let target = format!("{}/{name}", a3s_box_protocol::SHARE_VOLUMES);
                if let Err(error) = live.machine.detach(&target).await {
                    errors.push(self.caused(ErrorKind::Internal, FailedStage::Remove, error));
                }
            }
        }
        let box_ended = matches!(&*self.life.borrow(), BoxLife::Gone(_));
        if box_ended || errors.is_empty() {
            // Whatever was in a guest that has ended is gone with it.
            errors.clear();
            std::fs::remove_file(self.shared.log_record(&self.record.id)).ok();
            if let Err(error) = self.shared.records.delete_session(&self.record.id).await {
                errors.push(RuntimeError::storage(FailedStage::Remove, self.object(), error));
            }
        }
        errors
    }

    // Ends.

    async fn exited(&mut self, news: ExitNews) -> Exists {
        self.exit = None;
        self.drain(DRAIN_LIMIT).await;
        let started_at_ns = self.started_at();
        match news {
            ExitNews::Status(status) => {
                let (code, reason) = verdict(&status);
                self.record.phase = SessionPhase::Exited {
                    started_at_ns,
                    finished_at_ns: finished_at(&status, started_at_ns),
                    code,
                    reason: reason.to_owned(),
                    message: String::new(),
                };
                self.settle_end().await;
            }
            ExitNews::Unknown => {
                self.end(started_at_ns, UNKNOWN, "Unknown", "the guest agent does not know the container")
                    .await;
            }
        }
        self.answer_stop().await
    }

    async fn box_gone(&mut self, obituary: Obituary) -> Exists {
        self.live = None;
        self.exit = None;
        self.drain(GONE_DRAIN_LIMIT).await;
        let code = match obituary.cause {
            StopCause::Requested | StopCause::GuestPowerOff | StopCause::VmmDied { .. } => KILLED,
            StopCause::AgentLost { .. } => UNKNOWN,
        };
        match self.record.phase {
            SessionPhase::Exited { .. } => {}
            SessionPhase::Created | SessionPhase::Running { .. } => {
                self.end(self.started_at(), code, obituary.cause.reason(), &obituary.message).await;
            }
        }
        self.answer_stop().await
    }

    async fn answer_stop(&mut self) -> Exists {
        let Some(stopping) = self.stopping.take() else { return Exists::Yes };
        for waiter in stopping.waiters {
            waiter.send(Ok(())).ok();
        }
        let mut exists = Exists::Yes;
        for removal in stopping.removals {
            match exists {
                Exists::Yes => exists = self.remove(removal).await,
                Exists::No => drop(removal.send(Ok(()))),
            }
        }
        exists
    }

    async fn end(&mut self, started_at_ns: i64, code: i32, reason: &str, message: &str) {
        self.record.phase = SessionPhase::Exited {
            started_at_ns,
            finished_at_ns: now_ns(),
            code,
            reason: reason.to_owned(),
            message: message.to_owned(),
        };
        self.settle_end().await;
    }

    /// The end is a fact whether it can be written or not. As long as the VM lives the agent keeps it, and a
    /// daemon that comes back asks.
    async fn settle_end(&mut self) {
        if let Err(error) = self.shared.records.put_session(&self.record).await {
            tracing::error!(id = %self.record.id, %error, "the end of a container was not recorded");
        }
        self.publish();
    }

    async fn drain(&mut self, limit: Duration) {
        let Some(log) = self.log.take() else { return };
        log.ended.cancel();
        if timeout(limit, log.done.cancelled()).await.is_err() {
            tracing::debug!(id = %self.record.id, "a process that outlives the container holds its output open");
            self.log = Some(log);
        }
    }

    // Coming back.

    async fn resume(&mut self, state: Option<SessionState>) -> Exists {
        let Some(live) = self.live.clone() else { return self.resume_ended().await };
        let guest = state.map(|state| state.phase());
        match (&self.record.phase, guest) {
            (SessionPhase::Exited { .. }, _)
            | (SessionPhase::Created, Some(session_state::Phase::Created)) => Exists::Yes,
            // Its making was never finished: nobody has learned its id.
            (SessionPhase::Created, None) => {
                let errors = self.forget().await;
                tracing::info!(id = %self.record.id, ?errors, "a container that was half made is gone");
                self.shared.registry.leave_session(&self.record.id);
                self.refuse_queued();
                Exists::No
            }
            (SessionPhase::Created, Some(session_state::Phase::Running | session_state::Phase::Exited)) => {
                self.record.phase = SessionPhase::Running { started_at_ns: now_ns() };
                self.resume_running(&live).await;
                Exists::Yes
            }
            (SessionPhase::Running { .. }, _) => {
                self.resume_running(&live).await;
                Exists::Yes
            }
        }
    }

    async fn resume_running(&mut self, live: &Arc<LiveBox>) {
        match self.open_log(live).await {
            Ok(log) => self.log = Some(log),
            // A container that has ended and was drained has no streams left.
            Err(error) => tracing::warn!(id = %self.record.id, %error, "the log was not taken up again"),
        }
        self.watch_exit(live);
        self.publish();
    }

    /// The box ended while no daemon looked.
    async fn resume_ended(&mut self) -> Exists {
        let gone = match &*self.life.borrow() {
            BoxLife::Gone(obituary) => obituary.clone(),
            BoxLife::Starting | BoxLife::Live(_) => return Exists::Yes,
        };
        self.box_gone(gone).await
    }

    // Helpers.

    async fn open_log(&self, live: &LiveBox) -> Result<LogHandle, RuntimeError> {
        let plan = LogPlan {
            machine: live.machine.clone(),
            session_id: self.record.id.to_string(),
            terminal: self.record.spec.process.terminal,
            sink: self.shared.sink(&self.record),
        };
        log::start(plan, &self.shared.tasks, &self.shared.closing)
            .await
            .map_err(|error| self.caused(ErrorKind::Internal, FailedStage::Log, error))
    }

    fn watch_exit(&mut self, live: &Arc<LiveBox>) {
        let exit = await_exit(live.clone(), self.record.id.to_string(), self.boxed.clone());
        self.exit = Some(AbortOnDropHandle::new(self.shared.tasks.spawn(exit)));
    }

    fn stream(&self, kind: Kind) -> StreamName {
        StreamName { session_id: self.record.id.to_string(), exec_id: String::new(), kind }
    }

    fn started_at(&self) -> i64 {
        match self.record.phase {
            SessionPhase::Created => 0,
            SessionPhase::Running { started_at_ns } | SessionPhase::Exited { started_at_ns, .. } => {
                started_at_ns
            }
        }
    }

    fn decide(&self, request: SessionRequest, stage: FailedStage) -> Result<(), RuntimeError> {
        match self.record.phase.decide(request) {
            Decision::Accept | Decision::AlreadyDone => Ok(()),
            Decision::Deny(reason) => Err(self.error(ErrorKind::FailedPrecondition, stage, reason)),
        }
    }

    fn require_live(&self, stage: FailedStage) -> Result<Arc<LiveBox>, RuntimeError> {
        let reason = "the pod sandbox is not ready";
        self.live.clone().ok_or_else(|| self.error(ErrorKind::FailedPrecondition, stage, reason))
    }

    /// A refusal speaks for itself; a broken connection is explained by the guest's last words.
    async fn agent_error(&self, live: &LiveBox, stage: FailedStage, error: AgentError) -> RuntimeError {
        let words = match &error {
            AgentError::Refused { .. } => String::new(),
            AgentError::Lost { .. } | AgentError::Timeout { .. } => live.last_words().await,
        };
        error.at(stage, self.object()).with_last_words(&words)
    }

    async fn save(&self, stage: FailedStage) -> Result<(), RuntimeError> {
        let saved = self.shared.records.put_session(&self.record).await;
        saved.map_err(|error| RuntimeError::storage(stage, self.object(), error))
    }

    fn publish(&self) {
        self.status.send_replace(self.record.status());
    }

    fn object(&self) -> String {
        format!("container {} ({})", self.record.id.short(), self.record.spec.name)
    }

    fn error(&self, kind: ErrorKind, stage: FailedStage, message: &str) -> RuntimeError {
        RuntimeError::new(kind, stage, self.object(), message)
    }

    fn caused(
        &self,
        kind: ErrorKind,
        stage: FailedStage,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> RuntimeError {
        RuntimeError::caused(kind, stage, self.object(), source)
    }
}

/// CRI's exit code and reason.
fn verdict(status: &ExitStatus) -> (i32, &'static str) {
    let code = status.code.clamp(0, 255);
    let reason = match (status.oom_killed, code) {
        (true, _) => "OOMKilled",
        (false, 0) => "Completed",
        (false, _) => "Error",
    };
    (code, reason)
}

/// The guest's word for when it ended, if it can be true.
fn finished_at(status: &ExitStatus, started_at_ns: i64) -> i64 {
    let now = now_ns();
    match i64::try_from(status.exited_at_ns) {
        Ok(said) if (started_at_ns..=now).contains(&said) => said,
        Ok(_) | Err(_) => now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_out_of_memory_kill_is_told_apart_from_other_kills() {
        let status = |code, oom_killed| ExitStatus { code, oom_killed, ..ExitStatus::default() };
        assert_eq!(verdict(&status(137, true)), (137, "OOMKilled"));
        assert_eq!(verdict(&status(137, false)), (137, "Error"));
        assert_eq!(verdict(&status(0, false)), (0, "Completed"));
        assert_eq!(verdict(&status(-5, false)), (0, "Completed"));
        assert_eq!(verdict(&status(70_000, false)), (255, "Error"));
    }

    #[test]
    fn a_guest_cannot_end_before_it_started_or_in_the_future() {
        let at = |exited_at_ns| ExitStatus { exited_at_ns, ..ExitStatus::default() };
        let started = now_ns() - 1_000_000_000;
        assert_eq!(finished_at(&at(started as u64 + 5), started), started + 5);
        assert!(finished_at(&at(1), started) > started);
        assert!(finished_at(&at(u64::MAX), started) <= now_ns());
    }
}
