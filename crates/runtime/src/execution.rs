//! A further process in a session, and connections to ports, as their clients hold them.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::attached::Attached;
use crate::error::RuntimeError;

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
}

impl fmt::Debug for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execution").field("streams", &self.streams).finish_non_exhaustive()
    }
}
