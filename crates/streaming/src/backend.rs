//! What the server asks of whoever runs the containers.

use std::future::Future;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// What a client sends. Its end is the end of input; a client that vanishes is an end, too.
pub type ClientInput = Box<dyn AsyncRead + Send + Unpin>;

/// What a client receives. Writing waits while the client does not read, and fails once it has vanished.
pub type ClientOutput = Box<dyn AsyncWrite + Send + Unpin>;

/// A connection to a port of a pod.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// The streams of one client. Those that the request did not ask for are absent.
pub struct ClientStreams {
    /// The process's input.
    pub stdin: Option<ClientInput>,
    /// The process's output; with a terminal, all of it.
    pub stdout: Option<ClientOutput>,
    /// The process's error output; never with a terminal.
    pub stderr: Option<ClientOutput>,
    /// Window sizes as they change; closed when there are no more. Without a terminal nothing comes.
    pub resizes: mpsc::Receiver<TerminalSize>,
    /// Cancelled once the client is gone.
    pub gone: CancellationToken,
}

/// A terminal's window, in characters. As a client sent it: 0 and 65535 are possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// CRI's ExecRequest, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// The container's whole id.
    pub container_id: String,
    /// The program and its arguments; never empty.
    pub command: Vec<String>,
    /// Run it on a terminal.
    pub tty: bool,
    /// Which streams the client brings.
    pub streams: Wanted,
}

/// CRI's AttachRequest, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachRequest {
    /// The container's whole id.
    pub container_id: String,
    /// The container has a terminal.
    pub tty: bool,
    /// Which streams the client brings.
    pub streams: Wanted,
}

/// CRI's PortForwardRequest, checked. Its ports are advice: clients over SPDY name them again per stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForwardRequest {
    /// The sandbox's whole id.
    pub pod_sandbox_id: String,
    /// Empty: any port.
    pub ports: Vec<u16>,
}

/// Which streams a client brings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// It sends input.
    pub stdin: bool,
    /// It takes output.
    pub stdout: bool,
    /// It takes error output; never together with a terminal.
    pub stderr: bool,
}

/// Why a backend could not do it; the message is for the person at the client.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct BackendError {
    /// Stage, object, cause and remedy in one line.
    pub message: String,
}

/// Whoever runs the containers. The futures run to their end even when the client vanishes: the streams tell.
pub trait Backend: Send + Sync + 'static {
    /// Runs a command in a running container; answers with its exit code (0 to 255; 128 + number for a signal) once it
    /// has ended and all of its output has been written to the client. A client that vanished stops nothing that a
    /// command in a plain node's container would survive: its input ends, a terminal hangs up, its output is dropped.
    fn exec(
        &self,
        request: ExecRequest,
        client: ClientStreams,
    ) -> impl Future<Output = Result<i32, BackendError>> + Send;

    /// Connects a client to a container's own process until the process ends or the client goes.
    fn attach(
        &self,
        request: AttachRequest,
        client: ClientStreams,
    ) -> impl Future<Output = Result<(), BackendError>> + Send;

    /// Connects to a port on the loopback addresses of a pod, inside its network namespace. Shutting down the
    /// writing side is TCP's half-close.
    fn dial(
        &self,
        pod_sandbox_id: &str,
        port: u16,
    ) -> impl Future<Output = Result<Box<dyn Duplex>, BackendError>> + Send;
}
