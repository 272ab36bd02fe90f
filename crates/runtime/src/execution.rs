//! A further process in a session, and connections to ports, as their clients hold them.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use a3s_box_protocol::proto::ResizeTerminalRequest;

use crate::attached::Attached;
use crate::boxes::LiveBox;
use crate::error::{FailedStage, RuntimeError};

/// A byte stream in both directions.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// A connection to a port of a pod.
pub type PortStream = Box<dyn ByteStream>;

/// What comes of a process: 0 to 255; 128 + number for a signal.
pub type ExitCode = Pin<Box<dyn Future<Output = Result<i32, RuntimeError>> + Send>>;

/// A process that was started beside a session's own.
pub struct Execution {
    /// Its streams. Dropping them is a client that vanished: input ends, output is dropped.
    pub streams: Attached,
    /// Ready once the process has ended and all of its output has been handed over.
    pub exit: ExitCode,
    /// Its window, if it has a terminal.
    pub terminal: ExecTerminal,
}

/// The window of a process's terminal.
#[derive(Clone)]
pub struct ExecTerminal {
    pub(crate) live: Arc<LiveBox>,
    pub(crate) session_id: String,
    pub(crate) exec_id: String,
    pub(crate) object: String,
}

impl ExecTerminal {
    /// Sets its size in characters.
    pub async fn resize(&self, rows: u16, columns: u16) -> Result<(), RuntimeError> {
        let message = ResizeTerminalRequest {
            session_id: self.session_id.clone(),
            exec_id: self.exec_id.clone(),
            rows: rows.into(),
            columns: columns.into(),
        };
        let resized = self.live.agent.resize(message).await;
        resized.map_err(|error| error.at(FailedStage::Exec, self.object.clone()))
    }
}

impl fmt::Debug for ExecTerminal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecTerminal").field("exec_id", &self.exec_id).finish_non_exhaustive()
    }
}

impl fmt::Debug for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execution").field("streams", &self.streams).finish_non_exhaustive()
    }
}
