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
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use a3s_box_core::lifecycle::{Decision, SessionPhase, SessionRequest};
use a3s_box_core::spec::Limits;
use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::{ResizeTerminalRequest, SessionState};

use super::begin::as_recorded;
use super::exit::{ExitNews, await_exit};
use crate::agent_client::AgentError;
use crate::api::{BoxStatus, ResolvedUser, SessionStatus};
use crate::attached::Attached;
use crate::boxes::{BoxCommand, BoxLife, LiveBox, Obituary};
use crate::clock::now_ns;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::events::{Happened, Subject};
use crate::limits;
use crate::log::{self, LogHandle, LogPlan};
use crate::records::SessionRecord;
use crate::registry::{BoxEntry, Outcome, Reply};
use crate::shared::Shared;
use crate::streams::{self, Output, StreamName};

/// The exit code of a session whose program could not be executed, as other runtimes report it.
const START_ERROR: i32 = 128;

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
    /// Change its limits.
    Update(Limits, Reply<()>),
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
    /// Show it to one more client while it runs.
    Attach {
        /// The client sends input.
        stdin: bool,
        /// With its ends.
        reply: Reply<Attached>,
    },
}

/// How a driver begins.
pub(crate) enum SessionStart {
    /// By making the session.
    Create(Reply<()>),
    /// With a session of an earlier daemon, once the agent has said what it knows of it. Nobody says so: it is taken to be
    /// as recorded.
    Resume(oneshot::Receiver<Option<SessionState>>),
}

/// Where a driver tells what others see of its session.
pub(crate) struct Told {
    pub(crate) status: watch::Sender<SessionStatus>,
    pub(crate) outcome: watch::Sender<Outcome>,
}

/// A stop that is under way.
pub(super) struct Stopping {
    pub(super) killed: bool,
    pub(super) deadline: Instant,
    pub(super) waiters: Vec<Reply<()>>,
    pub(super) removals: Vec<Reply<()>>,
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
pub(super) enum Exists {
    Yes,
    No,
}

/// The owner of one session.
pub(crate) struct SessionDriver {
    pub(super) shared: Arc<Shared>,
    pub(super) record: SessionRecord,
    pub(super) boxed: mpsc::Sender<BoxCommand>,
    pub(super) life: watch::Receiver<BoxLife>,
    pub(super) box_status: watch::Receiver<BoxStatus>,
    pub(super) commands: mpsc::Receiver<SessionCommand>,
    pub(super) status: watch::Sender<SessionStatus>,
    pub(super) outcome: watch::Sender<Outcome>,
    pub(super) live: Option<Arc<LiveBox>>,
    /// Why nothing can be asked of its box, although that runs.
    pub(super) foreign: Option<String>,
    pub(super) log: Option<LogHandle>,
    pub(super) exit: Option<AbortOnDropHandle<ExitNews>>,
    pub(super) stopping: Option<Stopping>,
    pub(super) streams_taken: bool,
    /// When an earlier daemon's session was taken up: what ended before is dated by the guest's clock.
    pub(super) resumed_at: Option<Instant>,
}

impl SessionDriver {
    pub(crate) fn new(
        shared: Arc<Shared>,
        record: SessionRecord,
        boxed: &BoxEntry,
        commands: mpsc::Receiver<SessionCommand>,
        Told { status, outcome }: Told,
    ) -> Self {
        let life = boxed.life.clone();
        let (live, foreign) = match &*life.borrow() {
            BoxLife::Live(live) => (Some(live.clone()), None),
            BoxLife::Foreign(foreign) => (None, Some(foreign.why.to_string())),
            BoxLife::Starting | BoxLife::Gone(_) => (None, None),
        };
        Self {
            shared,
            record,
            boxed: boxed.commands.clone(),
            life,
            box_status: boxed.status.clone(),
            commands,
            status,
            outcome,
            live,
            foreign,
            log: None,
            exit: None,
            stopping: None,
            streams_taken: false,
            resumed_at: None,
        }
    }

    /// Runs until the session is removed or the daemon ends.
    pub(crate) async fn run(mut self, start: SessionStart) {
        let exists = match start {
            SessionStart::Create(reply) => self.begin(reply).await,
            SessionStart::Resume(state) => {
                let closing = self.shared.closing.clone();
                let Some(state) = closing.run_until_cancelled(state).await else { return };
                let state = state.unwrap_or_else(|_| Some(as_recorded(&self.record)));
                let exists = self.resume(state).await;
                let gone =
                    || self.error(ErrorKind::NotFound, FailedStage::Lookup, "it was half made and is gone");
                self.outcome.send_replace(Some(if exists == Exists::Yes { Ok(()) } else { Err(gone()) }));
                exists
            }
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
        let Self { exit, life, live, foreign, stopping, commands, shared, .. } = self;
        let exited = async {
            match exit {
                Some(exit) => match exit.await {
                    Ok(news) => news,
                    // The daemon ends under it: that says nothing of the container.
                    Err(error) if error.is_cancelled() => std::future::pending().await,
                    Err(_) => ExitNews::Unknown,
                },
                None => std::future::pending().await,
            }
        };
        let gone = async {
            if live.is_none() && foreign.is_none() {
                std::future::pending::<()>().await;
            }
            let seen = match life.wait_for(|life| matches!(life, BoxLife::Gone(_))).await.as_deref() {
                Ok(BoxLife::Gone(obituary)) => Some(obituary.clone()),
                // The box's driver has ended with the daemon.
                Ok(BoxLife::Starting | BoxLife::Live(_) | BoxLife::Foreign(_)) | Err(_) => None,
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
        if let Some(reason) = &self.foreign {
            refuse(command, self.error(ErrorKind::FailedPrecondition, FailedStage::Lookup, reason));
            return Exists::Yes;
        }
        match command {
            SessionCommand::Start(reply) => drop(reply.send(self.start().await)),
            SessionCommand::Stop { grace, reply } => self.stop(grace, reply).await,
            SessionCommand::Remove(reply) => return self.remove(reply).await,
            SessionCommand::Signal(signal, reply) => drop(reply.send(self.signal(signal).await)),
            SessionCommand::Update(limits, reply) => drop(reply.send(self.update(limits).await)),
            SessionCommand::ReopenLog(reply) => drop(reply.send(self.reopen_log().await)),
            SessionCommand::Resize { rows, columns, reply } => {
                drop(reply.send(self.resize(rows, columns).await))
            }
            SessionCommand::TakeStreams(reply) => drop(reply.send(self.take_streams().await)),
            SessionCommand::Attach { stdin, reply } => drop(reply.send(self.attach(stdin).await)),
        }
        Exists::Yes
    }

    pub(super) fn refuse_queued(&mut self) {
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                SessionCommand::Stop { reply, .. } | SessionCommand::Remove(reply) => {
                    drop(reply.send(Ok(())))
                }
                SessionCommand::Start(_)
                | SessionCommand::Signal(..)
                | SessionCommand::Update(..)
                | SessionCommand::ReopenLog(_)
                | SessionCommand::Resize { .. }
                | SessionCommand::TakeStreams(_)
                | SessionCommand::Attach { .. } => {
                    refuse(command, self.error(ErrorKind::NotFound, FailedStage::Lookup, "it was removed"));
                }
            }
        }
    }

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

    async fn signal(&self, signal: i32) -> Result<(), RuntimeError> {
        self.decide(SessionRequest::Exec, FailedStage::Stop)?;
        let live = self.require_live(FailedStage::Stop)?;
        match live.agent.signal_session(self.record.id.to_string(), signal, false).await {
            Ok(_) => Ok(()),
            Err(error) => Err(error.at(FailedStage::Stop, self.object())),
        }
    }

    /// Figures that are not given stay. What its own box does not have it cannot be given.
    async fn update(&mut self, given: Limits) -> Result<(), RuntimeError> {
        let stage = FailedStage::Update;
        if let SessionPhase::Exited { .. } = self.record.phase {
            return Err(self.error(ErrorKind::FailedPrecondition, stage, "the container has ended"));
        }
        let live = self.require_live(stage)?;
        // A quota alone is one of the period in force.
        let cpu_period_us = given.cpu_period_us.or(self.record.spec.limits.cpu_period_us);
        let given = Limits { cpu_period_us, ..given };
        limits::fit(&given, &live.facts.size)
            .map_err(|beyond| self.error(ErrorKind::FailedPrecondition, stage, &beyond.to_string()))?;
        let limits = limits::changed(&self.record.spec.limits, given);
        let updated =
            live.agent.update_resources(self.record.id.to_string(), limits::settings(&limits)).await;
        if let Err(error) = updated {
            return Err(self.agent_error(&live, stage, error).await);
        }
        self.record.spec.limits = limits;
        let saved = self.save(stage).await;
        self.publish();
        saved
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
            let opened = streams::open_input(live.machine.as_ref(), &self.stream(Kind::Stdin), false).await;
            let stream =
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

    /// A client sees the output from now on. Its input ends the process's only where that was to be open once.
    async fn attach(&self, stdin: bool) -> Result<Attached, RuntimeError> {
        let stage = FailedStage::Attach;
        self.decide(SessionRequest::Exec, stage)?;
        let live = self.require_live(stage)?;
        let mut attached = Attached::default();
        if stdin {
            if !self.record.spec.stdin {
                let reason = "it was created without stdin";
                return Err(self.error(ErrorKind::FailedPrecondition, stage, reason));
            }
            let keep_open = !self.record.spec.stdin_once;
            let opened =
                streams::open_input(live.machine.as_ref(), &self.stream(Kind::Stdin), keep_open).await;
            let stream = opened.map_err(|error| self.caused(ErrorKind::Unavailable, stage, error))?;
            attached.stdin = Some(Box::new(stream));
        }
        let Some(log) = &self.log else {
            let reason = "its output belongs to the client that started it";
            return Err(self.error(ErrorKind::FailedPrecondition, stage, reason));
        };
        let (tap, stdout, stderr) = log::tap(self.record.spec.process.terminal);
        log.tap(tap).await;
        (attached.stdout, attached.stderr) = (Some(stdout), stderr);
        Ok(attached)
    }

    async fn pump(&self, live: &LiveBox, kind: Kind) -> Result<crate::attached::StreamReader, RuntimeError> {
        match Output::open(live.machine.as_ref(), &self.stream(kind), 0).await {
            Ok((output, first)) => Ok(streams::pump(output, first, &self.shared.tasks)),
            Err(error) => Err(self.caused(ErrorKind::Unavailable, FailedStage::Exec, error)),
        }
    }

    async fn open_log(&self, live: &LiveBox) -> Result<LogHandle, RuntimeError> {
        log::start(self.log_plan(live), &self.shared.tasks, &self.shared.closing)
            .await
            .map_err(|error| self.caused(ErrorKind::Internal, FailedStage::Log, error))
    }

    pub(super) fn log_plan(&self, live: &LiveBox) -> LogPlan {
        LogPlan {
            machine: live.machine.clone(),
            session_id: self.record.id.to_string(),
            terminal: self.record.spec.process.terminal,
            sink: self.shared.sink(&self.record),
        }
    }

    pub(super) fn watch_exit(&mut self, live: &Arc<LiveBox>) {
        let lost_after = self.shared.config.lost_after;
        let exit = await_exit(live.clone(), self.record.id.to_string(), self.boxed.clone(), lost_after);
        self.exit = Some(AbortOnDropHandle::new(self.shared.tasks.spawn(exit)));
    }

    pub(super) fn stream(&self, kind: Kind) -> StreamName {
        StreamName { session_id: self.record.id.to_string(), exec_id: String::new(), kind }
    }

    pub(super) fn started_at(&self) -> i64 {
        match self.record.phase {
            SessionPhase::Created => 0,
            SessionPhase::Running { started_at_ns } | SessionPhase::Exited { started_at_ns, .. } => {
                started_at_ns
            }
        }
    }

    pub(super) fn decide(&self, request: SessionRequest, stage: FailedStage) -> Result<(), RuntimeError> {
        match self.record.phase.decide(request) {
            Decision::Accept | Decision::AlreadyDone => Ok(()),
            Decision::Deny(reason) => Err(self.error(ErrorKind::FailedPrecondition, stage, reason)),
        }
    }

    pub(super) fn require_live(&self, stage: FailedStage) -> Result<Arc<LiveBox>, RuntimeError> {
        let reason = self.foreign.as_deref().unwrap_or("the pod sandbox is not ready");
        self.live.clone().ok_or_else(|| self.error(ErrorKind::FailedPrecondition, stage, reason))
    }

    /// A refusal speaks for itself; a broken connection is explained by the guest's last words.
    pub(super) async fn agent_error(
        &self,
        live: &LiveBox,
        stage: FailedStage,
        error: AgentError,
    ) -> RuntimeError {
        let words = match &error {
            AgentError::Refused { .. } => String::new(),
            AgentError::Lost { .. } | AgentError::Timeout { .. } => live.last_words().await,
        };
        error.at(stage, self.object()).with_last_words(&words)
    }

    pub(super) async fn save(&self, stage: FailedStage) -> Result<(), RuntimeError> {
        let saved = self.shared.records.put_session(&self.record).await;
        saved.map_err(|error| RuntimeError::storage(stage, self.object(), error))
    }

    pub(super) fn publish(&self) {
        let before = self.status.send_replace(self.record.status());
        let SessionRecord { id, phase, .. } = &self.record;
        self.shared.events.session_phase(id, &before.phase, phase, || self.box_status.borrow().clone());
    }

    pub(super) fn tell(&self, happened: Happened) {
        let subject = Subject::Session(self.record.id.clone(), self.record.box_id.clone());
        let boxed = self.box_status.borrow().clone();
        self.shared.events.tell(subject, happened, boxed);
    }

    pub(super) fn object(&self) -> String {
        format!("container {} ({})", self.record.id.short(), self.record.spec.name)
    }

    pub(super) fn error(&self, kind: ErrorKind, stage: FailedStage, message: &str) -> RuntimeError {
        RuntimeError::new(kind, stage, self.object(), message)
    }

    pub(super) fn caused(
        &self,
        kind: ErrorKind,
        stage: FailedStage,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> RuntimeError {
        RuntimeError::caused(kind, stage, self.object(), source)
    }
}

fn refuse(command: SessionCommand, error: RuntimeError) {
    match command {
        SessionCommand::Start(reply)
        | SessionCommand::Stop { reply, .. }
        | SessionCommand::Remove(reply)
        | SessionCommand::Signal(_, reply)
        | SessionCommand::Update(_, reply)
        | SessionCommand::ReopenLog(reply)
        | SessionCommand::Resize { reply, .. } => drop(reply.send(Err(error))),
        SessionCommand::TakeStreams(reply) | SessionCommand::Attach { reply, .. } => {
            drop(reply.send(Err(error)));
        }
    }
}
