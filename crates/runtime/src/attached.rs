//! The raw streams of a process, for clients that sit at a terminal or pipe.

use std::fmt;

use tokio::io::{AsyncRead, AsyncWrite};

/// The sending end of a process's standard input; its shutdown is the end of input.
pub type StdinWriter = Box<dyn AsyncWrite + Send + Unpin>;

/// The receiving end of a process's output.
pub type StreamReader = Box<dyn AsyncRead + Send + Unpin>;

/// The streams of one process.
#[derive(Default)]
pub struct Attached {
    /// Present where the session was made with `stdin`.
    pub stdin: Option<StdinWriter>,
    /// Present where the output goes to no log file. With a terminal it carries both outputs.
    pub stdout: Option<StreamReader>,
    /// Present where the output goes to no log file and there is no terminal.
    pub stderr: Option<StreamReader>,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached")
            .field("stdin", &self.stdin.is_some())
            .field("stdout", &self.stdout.is_some())
            .field("stderr", &self.stderr.is_some())
            .finish()
    }
}
