//! Learning of a session's end, across broken connections.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use a3s_box_protocol::proto::ExitStatus;

use crate::agent_client::AgentError;
use crate::boxes::{BoxCommand, LiveBox};

/// An agent that cannot be reached for this long is lost, and its VM is ended.
const LOST_AFTER: Duration = Duration::from_secs(30);

/// Between two attempts; a VM that has ended is noticed elsewhere and ends the waiting.
const PAUSE: Duration = Duration::from_millis(250);

/// What the agent said.
pub(super) enum ExitNews {
    /// It has ended so.
    Status(ExitStatus),
    /// The agent knows no such session.
    Unknown,
}

/// Waits for the end of a session's first process. Never answers once the agent is given up: the box's end is
/// the news then.
pub(super) async fn await_exit(live: Arc<LiveBox>, id: String, boxed: mpsc::Sender<BoxCommand>) -> ExitNews {
    let mut unreachable_since = None;
    loop {
        let began = Instant::now();
        match live.agent.wait_session(id.clone()).await {
            Ok(status) => return ExitNews::Status(status),
            Err(error) if error.is_not_found() => return ExitNews::Unknown,
            Err(AgentError::Refused { call, message, .. }) => {
                tracing::warn!(id, call, message, "the guest agent refuses to say when a container ends");
            }
            Err(AgentError::Lost { .. } | AgentError::Timeout { .. }) => {}
        }
        // A wait that lasted was a connection that worked.
        let since = match unreachable_since {
            Some(since) if began.elapsed() < LOST_AFTER => since,
            Some(_) | None => *unreachable_since.insert(Instant::now()),
        };
        if since.elapsed() > LOST_AFTER {
            let detail = format!("the guest agent could not be reached for {LOST_AFTER:?}");
            boxed.send(BoxCommand::AgentLost(detail)).await.ok();
            return std::future::pending().await;
        }
        sleep(PAUSE).await;
    }
}
