//! exec and attach: from a client's streams to the backend's, and the outcome back.
//!
//! Reference: Kubernetes `client-go/tools/remotecommand` and `apimachinery/pkg/util/remotecommand`.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::backend::{
    AttachRequest, Backend, BackendError, ClientInput, ClientOutput, ClientStreams, ExecRequest,
    TerminalSize, Wanted,
};
use crate::chunks::{ChunkReader, ChunkWriter};
use crate::spdy::{self, Incoming};
use crate::websocket::{self, channels::Protocol};

/// What a client wants to be connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    Exec(ExecRequest),
    Attach(AttachRequest),
}

impl Call {
    fn wanted(&self) -> Wanted {
        match self {
            Self::Exec(request) => request.streams,
            Self::Attach(request) => request.streams,
        }
    }

    fn tty(&self) -> bool {
        match self {
            Self::Exec(request) => request.tty,
            Self::Attach(request) => request.tty,
        }
    }
}

/// How the outcome is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StatusForm {
    /// Words if it failed, nothing if not: up to version 3.
    Text,
    /// A `Status` of Kubernetes: since version 4.
    Json,
}

impl StatusForm {
    fn of(version: u8) -> Self {
        if version >= 4 { Self::Json } else { Self::Text }
    }

    fn report(self, outcome: Result<i32, BackendError>) -> String {
        let (words, status) = match outcome {
            Ok(0) => (String::new(), json!({"metadata": {}, "status": "Success"})),
            Ok(code) => {
                let words = format!("command terminated with non-zero exit code: {code}");
                let cause = json!({"reason": "ExitCode", "message": code.to_string()});
                let status = json!({
                    "metadata": {}, "status": "Failure", "message": words,
                    "reason": "NonZeroExitCode", "details": {"causes": [cause]},
                });
                (words, status)
            }
            Err(BackendError { message }) => {
                let status = json!({
                    "metadata": {}, "status": "Failure", "message": message, "reason": "InternalError",
                    "details": {"causes": [{"message": message}]}, "code": 500,
                });
                (message, status)
            }
        };
        match self {
            Self::Text => words,
            Self::Json => status.to_string(),
        }
    }
}

/// A client all of whose streams are there.
struct Client {
    streams: ClientStreams,
    error: ChunkWriter,
    form: StatusForm,
}

/// Serves a client that speaks SPDY. `version` is the protocol's, 1 to 4.
pub(crate) async fn over_spdy<B: Backend>(
    backend: Arc<B>,
    call: Call,
    version: u8,
    connection: spdy::Connection,
    incoming: Incoming,
    limits: Limits,
) {
    let collecting = collect(&call, version, incoming, connection.gone());
    let client = tokio::select! {
        client = tokio::time::timeout(limits.creation, collecting) => client.ok().flatten(),
        () = connection.closed() => None,
    };
    let Some(client) = client else {
        tracing::debug!(limit = ?limits.creation, "a client did not open its streams in time");
        return;
    };
    // Goes on without its client: the backend decides what that means.
    let job = tokio::spawn(serve(backend, call, client));
    tokio::select! {
        done = job => if done.is_ok() { connection.finish().await },
        () = connection.idle(limits.idle) => tracing::info!(limit = ?limits.idle, "an idle client was cut off"),
    }
}

/// The limits of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) idle: Duration,
    pub(crate) creation: Duration,
}

/// Waits for the streams that the call needs. What else is opened is reset.
async fn collect(
    call: &Call,
    version: u8,
    mut incoming: Incoming,
    gone: CancellationToken,
) -> Option<Client> {
    let (wanted, tty) = (call.wanted(), call.tty());
    let needs_resize = tty && version >= 3;
    let (mut stdin, mut stdout, mut stderr, mut error, mut resize) = (None, None, None, None, None);
    loop {
        let complete = error.is_some()
            && stdin.is_some() == wanted.stdin
            && stdout.is_some() == wanted.stdout
            && stderr.is_some() == wanted.stderr
            && resize.is_some() == needs_resize;
        if complete {
            break;
        }
        let stream = incoming.recv().await?;
        let kind = stream.header("streamtype").unwrap_or_default().to_owned();
        let (slot, expected) = match kind.as_str() {
            "error" => (&mut error, true),
            "stdin" => (&mut stdin, wanted.stdin),
            "stdout" => (&mut stdout, wanted.stdout),
            "stderr" => (&mut stderr, wanted.stderr),
            "resize" => (&mut resize, needs_resize),
            _ => continue,
        };
        if expected && slot.is_none() {
            *slot = Some((stream.reader, stream.writer.keep()));
        }
    }
    let output =
        |slot: Option<(ChunkReader, ChunkWriter)>| slot.map(|(_, writer)| Box::new(writer) as ClientOutput);
    Some(Client {
        streams: ClientStreams {
            stdin: stdin.map(|(reader, _)| Box::new(reader) as ClientInput),
            stdout: output(stdout),
            stderr: output(stderr),
            resizes: resizes(resize.map(|(reader, _)| reader)),
            gone,
        },
        error: error?.1,
        form: StatusForm::of(version),
    })
}

pub(crate) const STDIN: u8 = 0;
pub(crate) const STDOUT: u8 = 1;
pub(crate) const STDERR: u8 = 2;
pub(crate) const ERROR: u8 = 3;
pub(crate) const RESIZE: u8 = 4;

/// Serves a client that speaks WebSocket.
pub(crate) async fn over_websocket<B: Backend>(
    backend: Arc<B>,
    call: Call,
    protocol: Protocol,
    io: impl tokio::io::AsyncRead + AsyncWrite + Send + Unpin + 'static,
    limits: Limits,
) {
    let (wanted, tty) = (call.wanted(), call.tty());
    let mut incoming = Vec::new();
    if wanted.stdin {
        incoming.push(STDIN);
    }
    if tty {
        incoming.push(RESIZE);
    }
    let (connection, mut readers) = websocket::Connection::serve(io, protocol, &incoming).await;
    let output = |wanted: bool, channel| wanted.then(|| Box::new(connection.writer(channel)) as ClientOutput);
    let client = Client {
        streams: ClientStreams {
            stdin: readers.remove(&STDIN).map(|reader| Box::new(reader) as ClientInput),
            stdout: output(wanted.stdout, STDOUT),
            stderr: output(wanted.stderr, STDERR),
            resizes: resizes(readers.remove(&RESIZE)),
            gone: connection.gone(),
        },
        error: connection.writer(ERROR),
        form: StatusForm::of(protocol.version),
    };
    let greeting = if wanted.stdout {
        STDOUT
    } else if wanted.stderr {
        STDERR
    } else {
        ERROR
    };
    connection.greet(greeting).await;
    let job = tokio::spawn(serve(backend, call, client));
    tokio::select! {
        done = job => if done.is_ok() { connection.finish().await },
        () = connection.idle(limits.idle) => tracing::info!(limit = ?limits.idle, "an idle client was cut off"),
    }
}

/// Runs the call; its outcome is told after all of its output.
async fn serve<B: Backend>(backend: Arc<B>, call: Call, client: Client) {
    let Client { streams, mut error, form } = client;
    let outcome = match call {
        Call::Exec(request) => backend.exec(request, streams).await,
        Call::Attach(request) => backend.attach(request, streams).await.map(|()| 0),
    };
    if let Err(failure) = &outcome {
        tracing::info!(%failure, "a streaming call failed");
    }
    // A client that is gone cannot be told.
    let told = async {
        error.write_all(form.report(outcome).as_bytes()).await?;
        error.shutdown().await
    };
    told.await.ok();
}

/// The most bytes that may stand before the end of one JSON document.
const MAX_RESIZE: usize = 4096;

/// A side that a client leaves out is 0, as for the programs that it is made for.
#[derive(Deserialize)]
struct Size {
    #[serde(rename = "Width", default)]
    width: u16,
    #[serde(rename = "Height", default)]
    height: u16,
}

/// Reads JSON documents, one after the other. Garbage ends them; the streams go on.
fn resizes(reader: Option<ChunkReader>) -> mpsc::Receiver<TerminalSize> {
    let (sender, receiver) = mpsc::channel(4);
    let Some(mut reader) = reader else { return receiver };
    tokio::spawn(async move {
        let mut held = Vec::new();
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = reader.read(&mut buffer).await {
            held.extend_from_slice(&buffer[..count]);
            let mut documents = serde_json::Deserializer::from_slice(&held).into_iter::<Size>();
            let mut sizes = Vec::new();
            let broken = loop {
                match documents.next() {
                    Some(Ok(size)) => sizes.push(size),
                    Some(Err(error)) => break !error.is_eof(),
                    None => break false,
                }
            };
            let read = documents.byte_offset();
            held.drain(..read);
            for Size { width, height } in sizes {
                if sender.send(TerminalSize { width, height }).await.is_err() {
                    return;
                }
            }
            if broken || held.len() > MAX_RESIZE {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunks::inbox;

    #[test]
    fn outcomes_are_told_as_each_version_expects() {
        let failed = || Err(BackendError { message: "no such program".to_owned() });
        assert_eq!(StatusForm::of(1).report(Ok(0)), "");
        assert_eq!(StatusForm::of(3).report(Ok(3)), "command terminated with non-zero exit code: 3");
        assert_eq!(StatusForm::of(3).report(failed()), "no such program");
        let parsed = |outcome| -> serde_json::Value {
            serde_json::from_str(&StatusForm::of(4).report(outcome)).unwrap()
        };
        assert_eq!(parsed(Ok(0))["status"], "Success");
        let code = parsed(Ok(137));
        assert_eq!(
            (&code["reason"], &code["details"]["causes"][0]["message"]),
            (&json!("NonZeroExitCode"), &json!("137"))
        );
        assert_eq!(parsed(failed())["message"], "no such program");
    }

    #[tokio::test]
    async fn sizes_are_read_across_pieces_and_garbage_ends_them() {
        let (inbox, reader) = inbox();
        let mut sizes = resizes(Some(reader));
        for piece in ["{\"Width\":80,\"Hei", "ght\":0}\n{\"Width\":65535,\"Height\":1}", "{\"Width\":70000}"]
        {
            inbox.push(bytes::Bytes::from_static(piece.as_bytes())).await;
        }
        assert_eq!(sizes.recv().await, Some(TerminalSize { width: 80, height: 0 }));
        assert_eq!(sizes.recv().await, Some(TerminalSize { width: 65535, height: 1 }));
        assert_eq!(sizes.recv().await, None);
    }
}
