//! Short commands in a running session.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use a3s_box_core::SessionId;
use a3s_box_core::spec::{ProcessSpec, SessionSpec};
use a3s_box_protocol::proto::stream_open::Kind;

use super::request;
use crate::agent_client::AgentError;
use crate::api::ExecOutput;
use crate::boxes::LiveBox;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::streams::{self, Collected, Output, StreamName};

const SIGKILL: i32 = 9;

/// The longest that output is waited for after the process has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

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
    let message =
        request::exec(&plan.session, &plan.session_id, &plan.exec_id, &plan.process, &plan.live.facts)
            .map_err(|error| {
                RuntimeError::caused(ErrorKind::InvalidArgument, FailedStage::Exec, plan.object(), error)
            })?;
    if let Err(error) = plan.live.agent.exec(message).await {
        return Err(plan.agent_error(error).await);
    }
    let Some(limit) = plan.limit else { return finish(&plan).await };
    match timeout(limit, finish(&plan)).await {
        Ok(result) => result,
        Err(_) => {
            kill(&plan).await;
            Err(RuntimeError::timeout(FailedStage::Exec, plan.object(), limit, "the command"))
        }
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

async fn finish(plan: &ExecPlan) -> Result<ExecOutput, RuntimeError> {
    let output = |kind| async move {
        let name =
            StreamName { session_id: plan.session_id.to_string(), exec_id: plan.exec_id.clone(), kind };
        let opened = Output::open(plan.live.machine.as_ref(), &name, 0).await;
        opened.map_err(|error| {
            RuntimeError::caused(ErrorKind::Unavailable, FailedStage::Exec, plan.object(), error)
        })
    };
    let (stdout, stderr) = if plan.process.terminal {
        (output(Kind::Stdout).await?, None)
    } else {
        let (stdout, stderr) = tokio::try_join!(output(Kind::Stdout), output(Kind::Stderr))?;
        (stdout, Some(stderr))
    };
    let (mut out, mut err) = (Collected::default(), Collected::default());
    let status = {
        let reading = async {
            tokio::join!(streams::collect(stdout.0, stdout.1, plan.max_output, &mut out), async {
                if let Some((stderr, first)) = stderr {
                    streams::collect(stderr, first, plan.max_output, &mut err).await;
                }
            })
        };
        let waiting = plan.live.agent.wait_exec(plan.exec_id.clone());
        tokio::pin!(reading, waiting);
        // Either may come first: a process may close its outputs early, or leave them to another that lives on.
        tokio::select! {
            _ = &mut reading => waiting.await,
            status = &mut waiting => {
                timeout(DRAIN_LIMIT, &mut reading).await.ok();
                status
            }
        }
    };
    let status = match status {
        Ok(status) => status,
        Err(error) => return Err(plan.agent_error(error).await),
    };
    Ok(ExecOutput {
        stdout: out.bytes,
        stderr: err.bytes,
        exit_code: status.code.clamp(0, 255),
        truncated: out.truncated || err.truncated,
    })
}
