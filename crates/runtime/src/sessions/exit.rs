//! Learning of a session's end, across broken connections.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::sleep;

use a3s_box_protocol::proto::ExitStatus;

use crate::agent_client::AgentError;
use crate::boxes::{BoxCommand, LiveBox};

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
pub(super) async fn await_exit(
    live: Arc<LiveBox>,
    id: String,
    boxed: mpsc::Sender<BoxCommand>,
    lost_after: Duration,
) -> ExitNews {
    let mut in_reach = !live.contact.is_doubtful();
    loop {
        // Such a wait may last for days, so that whether the agent still answers is asked in another way.
        if !in_reach && live.contact.regain(&live.agent).await.is_err() {
            let detail = format!("the guest agent could not be reached for {lost_after:?}");
            boxed.send(BoxCommand::AgentLost(detail)).await.ok();
            return std::future::pending().await;
        }
        match live.agent.wait_session(id.clone()).await {
            Ok(status) => return ExitNews::Status(status),
            Err(error) if error.is_not_found() => return ExitNews::Unknown,
            Err(AgentError::Refused { call, message, .. }) => {
                tracing::warn!(id, call, message, "the guest agent refuses to say when a container ends");
                in_reach = true;
            }
            Err(AgentError::Lost { .. } | AgentError::Timeout { .. }) => in_reach = false,
        }
        sleep(PAUSE).await;
    }
}
