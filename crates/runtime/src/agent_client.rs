//! Calls to the agent of one box.
//!
//! The guest is hostile: every call has a time limit, answers have a size limit, and texts are made
//! printable before they reach a message or a log.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use prost::Message as _;
use thiserror::Error;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};
use tower::service_fn;

use a3s_box_protocol::RPC_PORT;
use a3s_box_protocol::proto::agent_client::AgentClient;
use a3s_box_protocol::proto::start_failure::Cause;
use a3s_box_protocol::proto::{
    CgroupSetting, ConfigureSandboxRequest, CreateSessionRequest, DeleteSessionRequest, ExecRequest,
    ExitStatus, ListSessionsRequest, ResizeTerminalRequest, Resources, SessionState, ShutdownRequest,
    SignalExecRequest, SignalSessionRequest, StartFailure, StartSessionRequest, StartSessionResponse,
    StatsRequest, StatsResponse, UpdateResourcesRequest, WaitExecRequest, WaitSessionRequest,
};
use a3s_box_vmm::Machine;

use crate::error::{ErrorKind, FailedStage, ProgramFault, RuntimeError};
use crate::text::{MESSAGE_LIMIT, printable};

/// No answer of an agent is larger. `ListSessions` of a thousand sessions is about 100 KiB.
const MAX_ANSWER: usize = 1024 * 1024;

/// The longest that the figures of a box are waited for; its agent counts files for at most two seconds.
const STATS_LIMIT: Duration = Duration::from_secs(5);

/// A silent connection is probed this often while a call is open on it.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// A call to the agent that failed.
#[derive(Debug, Error)]
pub(crate) enum AgentError {
    /// The agent answered, and said no. Its words are for the user, who knows nothing of our calls.
    #[error("{message}")]
    Refused { call: &'static str, code: Code, message: String, program: Option<ProgramFault> },
    /// The connection failed.
    #[error("the connection to the guest agent failed during {call}: {message}")]
    Lost { call: &'static str, message: String },
    /// No answer in time.
    #[error("the guest agent did not answer {call} within {limit:?}")]
    Timeout { call: &'static str, limit: Duration },
}

impl AgentError {
    /// The agent does not know the object.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: Code::NotFound, .. })
    }

    /// What is wrong with the program, where that was the reason.
    pub(crate) fn program_fault(&self) -> Option<ProgramFault> {
        match self {
            Self::Refused { program, .. } => *program,
            Self::Lost { .. } | Self::Timeout { .. } => None,
        }
    }

    /// As an error of a stage. A guest chooses among the kinds that blame a request, never among those that
    /// make clients forget an object.
    pub(crate) fn at(self, stage: FailedStage, object: impl Into<String>) -> RuntimeError {
        let kind = match &self {
            Self::Refused { code: Code::InvalidArgument, .. } => ErrorKind::InvalidArgument,
            Self::Refused { code: Code::FailedPrecondition, .. } => ErrorKind::FailedPrecondition,
            Self::Refused { code: Code::ResourceExhausted, .. } => ErrorKind::ResourceExhausted,
            Self::Refused { .. } => ErrorKind::Internal,
            Self::Lost { .. } => ErrorKind::Unavailable,
            Self::Timeout { .. } => ErrorKind::DeadlineExceeded,
        };
        RuntimeError::caused(kind, stage, object, self)
    }
}

/// The agent of one box. Clones share a connection, which is made anew when it breaks.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient<Channel>,
    limit: Duration,
}

impl Agent {
    /// Dials when the first call is made. `limit` bounds every call that is not a wait.
    pub(crate) fn new(machine: Arc<dyn Machine>, limit: Duration) -> Self {
        let connector = service_fn(move |_| {
            let machine = machine.clone();
            async move { machine.connect(RPC_PORT).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://agent.box")
            .connect_timeout(limit)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(limit)
            .connect_with_connector_lazy(connector);
        Self { client: AgentClient::new(channel).max_decoding_message_size(MAX_ANSWER), limit }
    }

    pub(crate) async fn configure(&self, request: ConfigureSandboxRequest) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        self.bounded("ConfigureSandbox", client.configure_sandbox(request)).await.map(drop)
    }

    pub(crate) async fn create_session(&self, request: CreateSessionRequest) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        self.bounded("CreateSession", client.create_session(request)).await.map(drop)
    }

    /// Changes the limits of a session, or of the pod if its id is empty.
    pub(crate) async fn update_resources(
        &self,
        session_id: String,
        settings: Vec<CgroupSetting>,
    ) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = UpdateResourcesRequest { session_id, resources: Some(Resources { settings }) };
        self.bounded("UpdateResources", client.update_resources(request)).await.map(drop)
    }

    pub(crate) async fn start_session(&self, session_id: String) -> Result<StartSessionResponse, AgentError> {
        let mut client = self.client.clone();
        self.bounded("StartSession", client.start_session(StartSessionRequest { session_id })).await
    }

    /// Signals the first process, or all of them. `Ok(false)`: it has ended.
    pub(crate) async fn signal_session(
        &self,
        session_id: String,
        signal: i32,
        all: bool,
    ) -> Result<bool, AgentError> {
        let mut client = self.client.clone();
        let request = SignalSessionRequest { session_id, signal, all };
        match self.bounded("SignalSession", client.signal_session(request)).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits without a limit; whoever waits must also watch the VM.
    pub(crate) async fn wait_session(&self, session_id: String) -> Result<ExitStatus, AgentError> {
        let mut client = self.client.clone();
        answered("WaitSession", client.wait_session(WaitSessionRequest { session_id }).await)
    }

    pub(crate) async fn delete_session(&self, session_id: String) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        self.bounded("DeleteSession", client.delete_session(DeleteSessionRequest { session_id }))
            .await
            .map(drop)
    }

    pub(crate) async fn list_sessions(&self) -> Result<Vec<SessionState>, AgentError> {
        let mut client = self.client.clone();
        Ok(self.bounded("ListSessions", client.list_sessions(ListSessionsRequest {})).await?.sessions)
    }

    pub(crate) async fn exec(&self, request: ExecRequest) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        self.bounded("Exec", client.exec(request)).await.map(drop)
    }

    /// Waits without a limit, as `wait_session` does.
    pub(crate) async fn wait_exec(&self, exec_id: String) -> Result<ExitStatus, AgentError> {
        let mut client = self.client.clone();
        answered("WaitExec", client.wait_exec(WaitExecRequest { exec_id }).await)
    }

    /// Signals a further process and all that it has started.
    pub(crate) async fn signal_exec(&self, exec_id: String, signal: i32) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        let request = SignalExecRequest { exec_id, signal, all: true };
        self.bounded("SignalExec", client.signal_exec(request)).await.map(drop)
    }

    pub(crate) async fn resize(&self, request: ResizeTerminalRequest) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        self.bounded("ResizeTerminal", client.resize_terminal(request)).await.map(drop)
    }

    /// What these sessions use, and the pod. Asked often and in bulk, so a box that is silent is given up sooner than elsewhere.
    pub(crate) async fn stats(&self, session_ids: Vec<String>) -> Result<StatsResponse, AgentError> {
        let mut client = self.client.clone();
        let limit = self.limit.min(STATS_LIMIT);
        let answer = client.stats(StatsRequest { session_ids });
        match tokio::time::timeout(limit, answer).await {
            Ok(result) => answered("Stats", result),
            Err(_) => Err(AgentError::Timeout { call: "Stats", limit }),
        }
    }

    pub(crate) async fn shutdown(&self) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        self.bounded("Shutdown", client.shutdown(ShutdownRequest {})).await.map(drop)
    }

    async fn bounded<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, AgentError> {
        let asked = Instant::now();
        let Ok(result) = tokio::time::timeout(self.limit, answer).await else {
            return Err(AgentError::Timeout { call, limit: self.limit });
        };
        tracing::debug!(call, took_us = asked.elapsed().as_micros(), "the guest agent has answered");
        answered(call, result)
    }
}

fn answered<T>(call: &'static str, result: Result<Response<T>, Status>) -> Result<T, AgentError> {
    result.map(Response::into_inner).map_err(|status| {
        let message = printable(status.message(), MESSAGE_LIMIT);
        match status.code() {
            // tonic's own words for a connection that broke or could not be made.
            Code::Unavailable | Code::Cancelled | Code::Unknown => AgentError::Lost { call, message },
            code => AgentError::Refused { call, code, message, program: program_fault(&status) },
        }
    })
}

/// What the agent says of a program that it could not execute. Details that are no [`StartFailure`] say nothing.
fn program_fault(status: &Status) -> Option<ProgramFault> {
    let failure = StartFailure::decode(status.details()).ok().filter(|_| !status.details().is_empty())?;
    match failure.cause() {
        Cause::NotFound => Some(ProgramFault::NotFound),
        Cause::PermissionDenied | Cause::NotExecutable => Some(ProgramFault::NotExecutable),
        Cause::Unknown => None,
    }
}

#[cfg(test)]
mod conversation;

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(details: Vec<u8>) -> Option<ProgramFault> {
        let status = Status::with_details(Code::FailedPrecondition, "no", details.into());
        let error = answered::<()>("StartSession", Err(status)).unwrap_err();
        error.at(FailedStage::Start, "container x").program_fault()
    }

    /// What `kubectl describe pod` shows of a container that could not start began with the name of a call of ours.
    #[test]
    fn a_refusal_is_told_in_the_guests_words_alone() {
        let words = "exec: \"nope\": executable file not found in $PATH";
        let error = answered::<()>("StartSession", Err(Status::failed_precondition(words))).unwrap_err();
        assert_eq!(error.at(FailedStage::Start, "container x").message, words);
    }

    #[test]
    fn why_a_program_was_not_executed_reaches_the_caller() {
        let details = |cause: Cause| StartFailure { cause: cause.into() }.encode_to_vec();
        assert_eq!(refused(details(Cause::NotFound)), Some(ProgramFault::NotFound));
        assert_eq!(refused(details(Cause::PermissionDenied)), Some(ProgramFault::NotExecutable));
        assert_eq!(refused(details(Cause::Unknown)), None);
        assert_eq!(refused(Vec::new()), None);
        assert_eq!(refused(vec![0xff; 9]), None);
    }
}
