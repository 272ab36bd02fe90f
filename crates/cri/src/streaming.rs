//! Exec, Attach and PortForward: URLs for clients, and what happens when they come.

use a3s_box_core::lifecycle::{BoxRequest, Decision, SessionRequest};
use a3s_box_core::spec::ProcessSpec;
use a3s_box_core::{BoxId, SessionId};
use a3s_box_runtime::{Attached, BoxManager, RuntimeError, StreamReader};
use a3s_box_streaming::backend::{
    AttachRequest, BackendError, ClientInput, ClientOutput, Duplex, ExecRequest, PortForwardRequest,
    TerminalSize, Wanted,
};
use a3s_box_streaming::{Backend, ClientStreams};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::convert::InvalidRequest;
use crate::error::CriError;
use crate::exec::check_command;
use crate::proto;
use crate::service::CriService;

/// Bytes that are copied at once.
const BUFFER: usize = 64 * 1024;

impl CriService {
    pub(crate) async fn exec_url(
        &self,
        request: proto::ExecRequest,
    ) -> Result<proto::ExecResponse, CriError> {
        let id = self.session_id(request.container_id)?;
        check_command(&request.cmd)?;
        let streams = Wanted { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr };
        check_streams(streams, request.tty)?;
        let container_id = self.running(&id)?;
        let exec = ExecRequest { container_id, command: request.cmd, tty: request.tty, streams };
        Ok(proto::ExecResponse { url: self.streams.exec(exec)? })
    }

    pub(crate) async fn attach_url(
        &self,
        request: proto::AttachRequest,
    ) -> Result<proto::AttachResponse, CriError> {
        let id = self.session_id(request.container_id)?;
        let streams = Wanted { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr };
        check_streams(streams, request.tty)?;
        let container_id = self.running(&id)?;
        let attach = AttachRequest { container_id, tty: request.tty, streams };
        Ok(proto::AttachResponse { url: self.streams.attach(attach)? })
    }

    pub(crate) async fn port_forward_url(
        &self,
        request: proto::PortForwardRequest,
    ) -> Result<proto::PortForwardResponse, CriError> {
        let id = self.box_id(request.pod_sandbox_id)?;
        let ports = ports(&request.port)?;
        if let Decision::Deny(reason) = self.boxes.box_status(&id)?.phase.decide(BoxRequest::Use) {
            return Err(CriError::NotRunning { object: format!("pod sandbox {}", id.short()), reason });
        }
        let forward = PortForwardRequest { pod_sandbox_id: id.to_string(), ports };
        Ok(proto::PortForwardResponse { url: self.streams.port_forward(forward)? })
    }

    /// The id of a container, which must be running.
    fn running(&self, id: &SessionId) -> Result<String, CriError> {
        match self.boxes.session_status(id)?.phase.decide(SessionRequest::Exec) {
            Decision::Deny(reason) => {
                Err(CriError::NotRunning { object: format!("container {}", id.short()), reason })
            }
            Decision::Accept | Decision::AlreadyDone => Ok(id.to_string()),
        }
    }
}

fn ports(given: &[i32]) -> Result<Vec<u16>, InvalidRequest> {
    let port = |(index, port): (usize, &i32)| {
        u16::try_from(*port).ok().filter(|port| *port > 0).ok_or_else(|| {
            let problem = format!("{port} is not a port; give 1 to 65535");
            InvalidRequest::new(format!("port[{index}]"), problem)
        })
    };
    given.iter().enumerate().map(port).collect()
}

fn check_streams(streams: Wanted, tty: bool) -> Result<(), InvalidRequest> {
    if streams == Wanted::default() {
        return Err(InvalidRequest::new("stdin", "at least one of stdin, stdout and stderr is needed"));
    }
    if tty && streams.stderr {
        return Err(InvalidRequest::new("stderr", "a terminal has one output; leave out stderr or tty"));
    }
    Ok(())
}

/// The containers of this node, for the streaming server.
#[derive(Clone)]
pub struct Containers {
    boxes: BoxManager,
}

impl Containers {
    /// Those of a manager.
    pub fn new(boxes: BoxManager) -> Self {
        Self { boxes }
    }
}

impl Backend for Containers {
    async fn exec(&self, request: ExecRequest, client: ClientStreams) -> Result<i32, BackendError> {
        let id = session(&request.container_id)?;
        let process = ProcessSpec { args: request.command, terminal: request.tty, ..ProcessSpec::default() };
        let running = self.boxes.exec(&id, process, request.streams.stdin).await.map_err(for_people)?;
        let terminal = running.terminal;
        let _sizes = sizes(client.resizes, move |size| {
            let terminal = terminal.clone();
            async move { terminal.resize(size.height, size.width).await }
        });
        let client = Streams { stdin: client.stdin, stdout: client.stdout, stderr: client.stderr };
        // A process may close its outputs and go on reading.
        let _input = carry(running.streams, client, None).await;
        running.exit.await.map_err(for_people)
    }

    async fn attach(&self, request: AttachRequest, client: ClientStreams) -> Result<(), BackendError> {
        let id = session(&request.container_id)?;
        let attached = self.boxes.attach_running(&id, request.streams.stdin).await.map_err(for_people)?;
        let boxes = self.boxes.clone();
        let _sizes = sizes(client.resizes, move |size| {
            let (boxes, id) = (boxes.clone(), id.clone());
            async move { boxes.resize(&id, size.height, size.width).await }
        });
        let gone = client.gone;
        let client = Streams { stdin: client.stdin, stdout: client.stdout, stderr: client.stderr };
        carry(attached, client, Some(gone)).await;
        Ok(())
    }

    async fn dial(&self, pod_sandbox_id: &str, port: u16) -> Result<Box<dyn Duplex>, BackendError> {
        let id: BoxId =
            pod_sandbox_id.parse().map_err(|error| BackendError { message: format!("{error}") })?;
        let connection = self.boxes.dial(&id, port).await.map_err(for_people)?;
        Ok(Box::new(connection))
    }
}

fn session(id: &str) -> Result<SessionId, BackendError> {
    id.parse().map_err(|error| BackendError { message: format!("{error}") })
}

fn for_people(error: RuntimeError) -> BackendError {
    BackendError { message: error.to_string() }
}

/// A client's byte streams.
struct Streams {
    stdin: Option<ClientInput>,
    stdout: Option<ClientOutput>,
    stderr: Option<ClientOutput>,
}

/// Copies until both outputs have ended, or until `gone`. Input is copied as long as the answer is held.
async fn carry(
    process: Attached,
    client: Streams,
    gone: Option<CancellationToken>,
) -> Option<AbortOnDropHandle<()>> {
    let input = match (client.stdin, process.stdin) {
        (Some(mut from), Some(mut to)) => Some(AbortOnDropHandle::new(tokio::spawn(async move {
            // A process that no longer reads, or a client that no longer writes: the end either way.
            tokio::io::copy(&mut from, &mut to).await.ok();
            to.shutdown().await.ok();
        }))),
        (None, _) | (_, None) => None,
    };
    let outputs = async {
        tokio::join!(output(process.stdout, client.stdout), output(process.stderr, client.stderr));
    };
    match gone {
        None => outputs.await,
        Some(gone) => tokio::select! {
            () = outputs => {}
            () = gone.cancelled() => {}
        },
    }
    input
}

/// Without somebody who takes it, the runtime drops the output itself.
async fn output(from: Option<StreamReader>, to: Option<ClientOutput>) {
    let Some(mut to) = to else { return };
    if let Some(from) = from {
        let mut from = tokio::io::BufReader::with_capacity(BUFFER, from);
        tokio::io::copy_buf(&mut from, &mut to).await.ok();
    }
    to.shutdown().await.ok();
}

/// Hands on window sizes while it is held.
fn sizes<F>(
    mut resizes: mpsc::Receiver<TerminalSize>,
    apply: impl Fn(TerminalSize) -> F + Send + 'static,
) -> AbortOnDropHandle<()>
where
    F: Future<Output = Result<(), RuntimeError>> + Send,
{
    AbortOnDropHandle::new(tokio::spawn(async move {
        while let Some(size) = resizes.recv().await {
            // A window that is being built up has no size yet.
            if size.width == 0 || size.height == 0 {
                continue;
            }
            if let Err(error) = apply(size).await {
                tracing::debug!(%error, "a terminal could not be resized");
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_are_none_are_named_by_their_place() {
        assert_eq!(ports(&[80, 65_535]), Ok(vec![80, 65_535]));
        assert_eq!(ports(&[]), Ok(Vec::new()));
        for bad in [0, -1, 70_000] {
            assert_eq!(ports(&[80, bad]).unwrap_err().field, "port[1]", "{bad}");
        }
    }

    #[test]
    fn a_client_brings_some_stream_and_a_terminal_has_one_output() {
        let streams = |stdin, stdout, stderr| Wanted { stdin, stdout, stderr };
        assert!(check_streams(streams(false, true, true), false).is_ok());
        assert!(check_streams(streams(true, true, false), true).is_ok());
        assert_eq!(check_streams(streams(true, true, true), true).unwrap_err().field, "stderr");
        assert_eq!(check_streams(streams(false, false, false), false).unwrap_err().field, "stdin");
    }
}
