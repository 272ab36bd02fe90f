//! The `Agent` service: checks what the host says, calls the table, turns errors into statuses.

use a3s_box_protocol::proto::agent_server::Agent;
use a3s_box_protocol::proto::session_state;
use a3s_box_protocol::proto::start_failure::Cause;
use a3s_box_protocol::proto::*;
use prost::Message;
use tonic::{Code, Request, Response, Status};

use crate::control::FailureKind;
use crate::power;
use crate::reaper::Exit;
use crate::sandbox::{self, SandboxError};
use crate::session::table::Table;
use crate::session::{End, Phase, Session, SessionError};
use crate::stats::Collector;

/// Serves the host.
#[derive(Debug, Clone)]
pub struct Service {
    table: Table,
    stats: Collector,
}

impl Service {
    /// Over this table.
    pub fn new(table: Table) -> Self {
        Self { table, stats: Collector::default() }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Agent for Service {
    async fn configure_sandbox(
        &self,
        request: Request<ConfigureSandboxRequest>,
    ) -> Answer<ConfigureSandboxResponse> {
        let request = request.into_inner();
        if let Some(users) = &request.user_namespace {
            let ping_groups = sandbox::ping_groups(&request);
            self.table.map_users(users, &request.interfaces, ping_groups).await.map_err(|e| status(&e))?;
        }
        if let Some(user) = request.init_user {
            self.table.set_init_user(user);
        }
        sandbox::configure(&request).map_err(|e| sandbox_status(&e))?;
        Ok(Response::new(ConfigureSandboxResponse {}))
    }

    async fn create_session(&self, request: Request<CreateSessionRequest>) -> Answer<CreateSessionResponse> {
        self.table.create(request.into_inner()).await.map_err(|e| status(&e))?;
        Ok(Response::new(CreateSessionResponse {}))
    }

    async fn start_session(&self, request: Request<StartSessionRequest>) -> Answer<StartSessionResponse> {
        let (pid, user) = self.table.start(&request.into_inner().session_id).await.map_err(|e| status(&e))?;
        Ok(Response::new(StartSessionResponse { pid: pid.as_raw_pid().unsigned_abs(), user: Some(user) }))
    }

    async fn signal_session(&self, request: Request<SignalSessionRequest>) -> Answer<SignalSessionResponse> {
        let request = request.into_inner();
        self.table.signal(&request.session_id, request.signal, request.all).map_err(|e| status(&e))?;
        Ok(Response::new(SignalSessionResponse {}))
    }

    async fn update_resources(
        &self,
        request: Request<UpdateResourcesRequest>,
    ) -> Answer<UpdateResourcesResponse> {
        let request = request.into_inner();
        let settings = request.resources.unwrap_or_default().settings;
        self.table.update(&request.session_id, &settings).map_err(|e| status(&e))?;
        Ok(Response::new(UpdateResourcesResponse {}))
    }

    async fn wait_session(&self, request: Request<WaitSessionRequest>) -> Answer<ExitStatus> {
        let end = self.table.wait(&request.into_inner().session_id).await.map_err(|e| status(&e))?;
        Ok(Response::new(end_to_wire(end)))
    }

    async fn delete_session(&self, request: Request<DeleteSessionRequest>) -> Answer<DeleteSessionResponse> {
        self.table.delete(&request.into_inner().session_id).await.map_err(|e| status(&e))?;
        Ok(Response::new(DeleteSessionResponse {}))
    }

    async fn list_sessions(&self, _: Request<ListSessionsRequest>) -> Answer<ListSessionsResponse> {
        let sessions = self.table.list().iter().filter_map(|s| state_to_wire(s)).collect();
        Ok(Response::new(ListSessionsResponse { sessions }))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Answer<ExecResponse> {
        let pid = self.table.start_exec(request.into_inner()).await.map_err(|e| status(&e))?;
        Ok(Response::new(ExecResponse { pid: pid.as_raw_pid().unsigned_abs() }))
    }

    async fn wait_exec(&self, request: Request<WaitExecRequest>) -> Answer<ExitStatus> {
        let (exit, totals) =
            self.table.wait_exec(&request.into_inner().exec_id).await.map_err(|e| status(&e))?;
        Ok(Response::new(ExitStatus {
            stdout_bytes: Some(totals.stdout),
            stderr_bytes: Some(totals.stderr),
            ..exit_to_wire(exit, false)
        }))
    }

    async fn signal_exec(&self, request: Request<SignalExecRequest>) -> Answer<SignalExecResponse> {
        let request = request.into_inner();
        self.table.signal_exec(&request.exec_id, request.signal, request.all).map_err(|e| status(&e))?;
        Ok(Response::new(SignalExecResponse {}))
    }

    async fn close_stdin(&self, request: Request<CloseStdinRequest>) -> Answer<CloseStdinResponse> {
        let request = request.into_inner();
        if request.exec_id.is_empty() {
            let live =
                self.table.session(&request.session_id).and_then(|s| s.live()).map_err(|e| status(&e))?;
            live.stdio.input().inspect(|i| i.close());
        } else {
            let exec = self.table.exec(&request.exec_id).map_err(|e| status(&e))?;
            exec.stdio.input().inspect(|i| i.close());
        }
        Ok(Response::new(CloseStdinResponse {}))
    }

    async fn resize_terminal(
        &self,
        request: Request<ResizeTerminalRequest>,
    ) -> Answer<ResizeTerminalResponse> {
        let request = request.into_inner();
        let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let (rows, columns) = (size(request.rows), size(request.columns));
        let (id, resized) = if request.exec_id.is_empty() {
            let live =
                self.table.session(&request.session_id).and_then(|s| s.live()).map_err(|e| status(&e))?;
            (request.session_id, live.stdio.resize(rows, columns))
        } else {
            let exec = self.table.exec(&request.exec_id).map_err(|e| status(&e))?;
            (request.exec_id, exec.stdio.resize(rows, columns))
        };
        match resized.map_err(|e| Status::internal(format!("resize the terminal of {id:?}: {e}")))? {
            true => Ok(Response::new(ResizeTerminalResponse {})),
            false => Err(status(&SessionError::NoTerminal(id))),
        }
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Answer<StatsResponse> {
        Ok(Response::new(self.stats.collect(&self.table, request.into_inner().session_ids).await))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Answer<ShutdownResponse> {
        tokio::spawn(power::off_soon(self.table.clone()));
        Ok(Response::new(ShutdownResponse {}))
    }
}

fn end_to_wire(end: End) -> ExitStatus {
    exit_to_wire(end.exit, end.oom_killed)
}

fn exit_to_wire(exit: Exit, oom_killed: bool) -> ExitStatus {
    ExitStatus {
        code: exit.code,
        signal: exit.signal,
        oom_killed,
        exited_at_ns: exit.at_ns,
        ..ExitStatus::default()
    }
}

/// Sessions that are still being created have no state that a host could use.
fn state_to_wire(session: &Session) -> Option<SessionState> {
    let (phase, live, exit) = match session.phase() {
        Phase::Creating | Phase::Failed(_) => return None,
        Phase::Created(live) => (session_state::Phase::Created, live, None),
        Phase::Running(live) => (session_state::Phase::Running, live, None),
        Phase::Exited(live, end) => (session_state::Phase::Exited, live, Some(end_to_wire(end))),
    };
    Some(SessionState {
        session_id: session.id.clone(),
        phase: phase.into(),
        pid: live.pid.as_raw_pid().unsigned_abs(),
        exit,
    })
}

fn status(error: &SessionError) -> Status {
    let text = error.to_string();
    match error {
        SessionError::CreationFailed(cause) => status(cause),
        SessionError::Stage(failure) => match failure.kind() {
            FailureKind::Internal => Status::internal(text),
            FailureKind::Invalid => Status::invalid_argument(text),
            FailureKind::ProgramNotFound => start_failure(text, Cause::NotFound),
            FailureKind::ProgramDenied => start_failure(text, Cause::PermissionDenied),
            FailureKind::ProgramBroken => start_failure(text, Cause::NotExecutable),
        },
        SessionError::Unknown(_) | SessionError::UnknownExec(_) | SessionError::Ended(_) => {
            Status::not_found(text)
        }
        SessionError::Id(_) | SessionError::NoTerminal(_) | SessionError::Layer(_) => {
            Status::invalid_argument(text)
        }
        SessionError::Cgroup(error) => match error {
            crate::session::cgroup::CgroupError::File { .. } => Status::internal(text),
            crate::session::cgroup::CgroupError::UnknownSetting { .. }
            | crate::session::cgroup::CgroupError::Refused { .. } => Status::invalid_argument(text),
            crate::session::cgroup::CgroupError::InUse { .. } => Status::failed_precondition(text),
        },
        SessionError::Signal { source, .. } => match source.raw_os_error() {
            Some(libc::EINVAL) => Status::invalid_argument(text),
            _ => Status::internal(text),
        },
        SessionError::Exists(_) | SessionError::OtherUsers => Status::already_exists(text),
        SessionError::TooMany(_) => Status::resource_exhausted(text),
        SessionError::Phase { .. } => Status::failed_precondition(text),
        SessionError::Volume(_)
        | SessionError::Scratch { .. }
        | SessionError::Users { .. }
        | SessionError::Launch { .. }
        | SessionError::StageDied { .. }
        | SessionError::Stdio(_)
        | SessionError::WillNotDie(_)
        | SessionError::TaskFailed => Status::internal(text),
    }
}

fn start_failure(text: String, cause: Cause) -> Status {
    let details = StartFailure { cause: cause.into() }.encode_to_vec();
    Status::with_details(Code::FailedPrecondition, text, details.into())
}

fn sandbox_status(error: &SandboxError) -> Status {
    let text = error.to_string();
    match error {
        SandboxError::Sysctl { .. } | SandboxError::SysctlName { .. } | SandboxError::Hostname { .. } => {
            Status::invalid_argument(text)
        }
        SandboxError::Network(_) | SandboxError::Shm(_) | SandboxError::Clock(_) => Status::internal(text),
    }
}
