//! Further processes in a running session: short ones whose output is collected, and those whose streams a client
//! carries.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use a3s_box_core::SessionId;
use a3s_box_core::spec::{ProcessSpec, SessionSpec};
use a3s_box_protocol::proto::ExitStatus;
use a3s_box_protocol::proto::stream_open::Kind;

use super::request;
use crate::agent_client::AgentError;
use crate::api::ExecOutput;
use crate::attached::{Attached, StreamReader};
use crate::boxes::LiveBox;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::execution::{ExecTerminal, Execution};
use crate::shared::Shared;
use crate::streams::{self, Collected, End, Output, Reading, StreamError, StreamName};

const SIGKILL: i32 = 9;

/// What lies ready for a client that is slow; then its process waits.
const READ_AHEAD: usize = 64 * 1024;

/// The longest for a process that was killed at its limit.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What is to be executed, and where.
pub(crate) struct ExecPlan {
    pub(crate) live: Arc<LiveBox>,
    pub(crate) session_id: SessionId,
    pub(crate) session: SessionSpec,
    pub(crate) exec_id: String,
    pub(crate) process: ProcessSpec,
    pub(crate) limit: Option<Duration>,
    pub(crate) max_output: usize,
}

impl ExecPlan {
    fn object(&self) -> String {
        format!("container {} ({})", self.session_id.short(), self.session.name)
    }

    fn stream(&self, kind: Kind) -> StreamName {
        StreamName { session_id: self.session_id.to_string(), exec_id: self.exec_id.clone(), kind }
    }

    fn unreachable(&self, error: StreamError) -> RuntimeError {
        RuntimeError::caused(ErrorKind::Unavailable, FailedStage::Exec, self.object(), error)
    }

    async fn agent_error(&self, error: AgentError) -> RuntimeError {
        let words = match &error {
            AgentError::Refused { .. } => String::new(),
            AgentError::Lost { .. } | AgentError::Timeout { .. } => self.live.last_words().await,
        };
        error.at(FailedStage::Exec, self.object()).with_last_words(&words)
    }
}

/// Runs a process to its end and collects what it printed. At the limit it is killed.
pub(crate) async fn exec_sync(plan: ExecPlan) -> Result<ExecOutput, RuntimeError> {
    start(&plan, false).await?;
    let Some(limit) = plan.limit else { return finish(&plan).await };
    match timeout(limit, finish(&plan)).await {
        Ok(result) => result,
        Err(_) => {
            kill(&plan).await;
            Err(RuntimeError::timeout(FailedStage::Exec, plan.object(), limit, "the command"))
        }
    }
}

/// Starts a process whose client holds its streams.
pub(crate) async fn exec_streams(
    plan: ExecPlan,
    stdin: bool,
    shared: &Shared,
) -> Result<Execution, RuntimeError> {
    start(&plan, stdin).await?;
    match hand_out(&plan, stdin, shared).await {
        Ok(execution) => Ok(execution),
        Err(error) => {
            // Nobody will ever hear of it.
            kill(&plan).await;
            Err(error)
        }
    }
}

async fn hand_out(plan: &ExecPlan, stdin: bool, shared: &Shared) -> Result<Execution, RuntimeError> {
    let mut streams = Attached::default();
    if stdin {
        let opened = streams::open_input(plan.live.machine.as_ref(), &plan.stream(Kind::Stdin), false).await;
        let input = opened.map_err(|error| plan.unreachable(error))?;
        streams.stdin = Some(Box::new(input));
    }
    let (mut teller, outputs) = outputs(plan).await?;
    let carrying = TaskTracker::new();
    let carry = |reading: Reading| -> StreamReader {
        let (reader, writer) = tokio::io::duplex(READ_AHEAD);
        let closing = shared.closing.clone();
        shared.tasks.spawn(carrying.track_future(async move {
            closing.run_until_cancelled(streams::pass_on(reading, writer)).await;
        }));
        Box::new(reader)
    };
    let (stdout, stderr) = outputs;
    streams.stdout = Some(carry(stdout));
    streams.stderr = stderr.map(carry);
    carrying.close();
    let (agent, exec_id, object) = (plan.live.agent.clone(), plan.exec_id.clone(), plan.object());
    let waiting = async move {
        // Also without a client: the agent forgets a process once somebody has seen its end.
        let status = agent.wait_exec(exec_id).await;
        teller.tell(&status);
        carrying.wait().await;
        status.map(code).map_err(|error| error.at(FailedStage::Exec, object))
    };
    let (answer, exit) = oneshot::channel();
    let closing = shared.closing.clone();
    shared.tasks.spawn(async move {
        if let Some(result) = closing.run_until_cancelled(waiting).await {
            answer.send(result).ok();
        }
    });
    let object = plan.object();
    let exit = Box::pin(async move {
        exit.await.unwrap_or_else(|_| {
            let message = "the daemon is shutting down";
            Err(RuntimeError::new(ErrorKind::Unavailable, FailedStage::Exec, object, message))
        })
    });
    let terminal = ExecTerminal {
        live: plan.live.clone(),
        session_id: plan.session_id.to_string(),
        exec_id: plan.exec_id.clone(),
        object: plan.object(),
    };
    Ok(Execution { streams, exit, terminal })
}

async fn start(plan: &ExecPlan, stdin: bool) -> Result<(), RuntimeError> {
    let message =
        request::exec(&plan.session, &plan.session_id, &plan.exec_id, &plan.process, stdin, &plan.live.facts)
            .map_err(|error| {
                RuntimeError::caused(ErrorKind::InvalidArgument, FailedStage::Exec, plan.object(), error)
            })?;
    match plan.live.agent.exec(message).await {
        Ok(()) => Ok(()),
        Err(error) => Err(plan.agent_error(error).await),
    }
}

async fn kill(plan: &ExecPlan) {
    let killed = async {
        plan.live.agent.signal_exec(plan.exec_id.clone(), SIGKILL).await?;
        // The agent forgets a process once somebody has seen its end.
        plan.live.agent.wait_exec(plan.exec_id.clone()).await
    };
    match timeout(KILL_LIMIT, killed).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            tracing::warn!(exec = plan.exec_id, %error, "a command was not killed at its limit")
        }
        Err(_) => tracing::warn!(exec = plan.exec_id, "a command that was killed at its limit has not ended"),
    }
}

/// Tells the readers of a process's outputs where these end.
struct Teller {
    stdout: watch::Sender<End>,
    stderr: watch::Sender<End>,
}

impl Teller {
    fn tell(&mut self, status: &Result<ExitStatus, AgentError>) {
        let status = status.as_ref().ok();
        self.stdout.send_replace(End::Ended(status.and_then(|status| status.stdout_bytes)));
        self.stderr.send_replace(End::Ended(status.and_then(|status| status.stderr_bytes)));
    }
}

/// Opens what a process prints. With a terminal there is one output.
async fn outputs(plan: &ExecPlan) -> Result<(Teller, (Reading, Option<Reading>)), RuntimeError> {
    let open = |kind, end| async move {
        let opened = Output::open(plan.live.machine.as_ref(), &plan.stream(kind), 0).await;
        opened.map(|opened| Reading::new(opened, end)).map_err(|error| plan.unreachable(error))
    };
    let (stdout, stdout_end) = watch::channel(End::Open);
    let (stderr, stderr_end) = watch::channel(End::Open);
    let outputs = if plan.process.terminal {
        (open(Kind::Stdout, stdout_end).await?, None)
    } else {
        let (out, err) = tokio::try_join!(open(Kind::Stdout, stdout_end), open(Kind::Stderr, stderr_end))?;
        (out, Some(err))
    };
    Ok((Teller { stdout, stderr }, outputs))
}

async fn finish(plan: &ExecPlan) -> Result<ExecOutput, RuntimeError> {
    let (mut teller, (stdout, stderr)) = outputs(plan).await?;
    let (mut out, mut err) = (Collected::default(), Collected::default());
    // Either may come first: a process may close its outputs early, or leave them to another that lives on.
    let (status, (), ()) = tokio::join!(
        async {
            let status = plan.live.agent.wait_exec(plan.exec_id.clone()).await;
            teller.tell(&status);
            status
        },
        streams::collect(stdout, plan.max_output, &mut out),
        async {
            if let Some(stderr) = stderr {
                streams::collect(stderr, plan.max_output, &mut err).await;
            }
        },
    );
    let status = match status {
        Ok(status) => status,
        Err(error) => return Err(plan.agent_error(error).await),
    };
    Ok(ExecOutput {
        stdout: out.bytes,
        stderr: err.bytes,
        exit_code: code(status),
        truncated: out.truncated || err.truncated,
    })
}

fn code(status: ExitStatus) -> i32 {
    status.code.clamp(0, 255)
}
