//! exec and attach from the client's side.

use serde::Deserialize;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{ConnectError, Target, spdy, websocket};
use crate::backend::{TerminalSize, Wanted};
use crate::chunks::{ChunkReader, ChunkWriter};
use crate::remotecommand::{ERROR, RESIZE, STDERR, STDIN, STDOUT};
use crate::websocket::channels::Protocol;
use crate::{spdy as spdy_protocol, websocket as websocket_protocol};

/// The most that is read of an outcome.
const MAX_OUTCOME: u64 = 64 * 1024;

/// How a call travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// `v5.channel.k8s.io`, as kubectl speaks it.
    WebSocket,
    /// SPDY/3.1 with `v4.channel.k8s.io`, as crictl speaks it.
    Spdy,
}

/// A command that runs, or a process that one is attached to. The parts are used side by side: output that is not read
/// holds up everything that comes after it.
pub struct Call {
    /// Its input, if wanted; shutting it down is the end of input.
    pub stdin: Option<ChunkWriter>,
    /// Its output, if wanted; with a terminal, all of it.
    pub stdout: Option<ChunkReader>,
    /// Its error output, if wanted.
    pub stderr: Option<ChunkReader>,
    /// Tells the size of the terminal, if there is one.
    pub sizes: Option<Sizes>,
    /// How it ends.
    pub outcome: Outcome,
}

impl Call {
    /// Connects to a URL of Exec or Attach; `wanted` and `tty` are those of that request.
    pub async fn connect(
        target: &Target,
        transport: Transport,
        wanted: Wanted,
        tty: bool,
    ) -> Result<Self, ConnectError> {
        match transport {
            Transport::WebSocket => Self::over_websocket(target, wanted, tty).await,
            Transport::Spdy => Self::over_spdy(target, wanted, tty).await,
        }
    }

    async fn over_websocket(target: &Target, wanted: Wanted, tty: bool) -> Result<Self, ConnectError> {
        const NAME: &str = "v5.channel.k8s.io";
        const PROTOCOL: Protocol = Protocol::V5;
        let io = websocket(target, NAME).await?;
        let (connection, mut readers) =
            websocket_protocol::Connection::client(io, PROTOCOL, &[STDOUT, STDERR, ERROR]).await;
        let mut reader = |wanted: bool, channel| readers.remove(&channel).filter(|_| wanted);
        Ok(Self {
            stdin: wanted.stdin.then(|| connection.writer(STDIN)),
            stdout: reader(wanted.stdout, STDOUT),
            stderr: reader(wanted.stderr, STDERR),
            sizes: tty.then(|| Sizes(connection.writer(RESIZE))),
            outcome: Outcome { told: reader(true, ERROR), _connection: Held::WebSocket(connection) },
        })
    }

    async fn over_spdy(target: &Target, wanted: Wanted, tty: bool) -> Result<Self, ConnectError> {
        let mut connection = spdy(target, "v4.channel.k8s.io").await?;
        let mut open = |kind: &str| connection.open(vec![("streamtype".to_owned(), kind.to_owned())]);
        // Of streams that only the other side ends, our direction is left alone.
        let mut output = |kind| {
            let stream = open(kind);
            drop(stream.writer.keep());
            stream.reader
        };
        let told = output("error");
        let (stdout, stderr) =
            (wanted.stdout.then(|| output("stdout")), wanted.stderr.then(|| output("stderr")));
        Ok(Self {
            stdin: wanted.stdin.then(|| open("stdin").writer),
            stdout,
            stderr,
            sizes: tty.then(|| Sizes(open("resize").writer.keep())),
            outcome: Outcome { told: Some(told), _connection: Held::Spdy(connection) },
        })
    }
}

/// Tells the size of a terminal.
pub struct Sizes(ChunkWriter);

impl Sizes {
    /// The window has this size now. Whether the other side still listens is seen elsewhere.
    pub async fn tell(&mut self, size: TerminalSize) {
        let TerminalSize { width, height } = size;
        let document = format!("{{\"Width\":{width},\"Height\":{height}}}\n");
        self.0.write_all(document.as_bytes()).await.ok();
    }
}

/// Holds the connection. Dropping it ends the connection and not what runs at the other side.
pub struct Outcome {
    told: Option<ChunkReader>,
    _connection: Held,
}

enum Held {
    WebSocket(#[expect(dead_code, reason = "held, not used")] websocket_protocol::Connection),
    Spdy(#[expect(dead_code, reason = "held, not used")] spdy_protocol::Connection),
}

/// There is no exit code.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OutcomeError {
    /// It could not run, or what ran it failed.
    #[error("{message}")]
    Failed {
        /// The other side's words.
        message: String,
    },
    /// The connection ended before it.
    #[error("the connection to the daemon was lost; whether the command still runs is not known")]
    Lost,
}

impl Outcome {
    /// Waits for the exit code, which comes after all output. Of an attachment it is 0.
    pub async fn wait(self) -> Result<i32, OutcomeError> {
        let mut told = Vec::new();
        if let Some(stream) = self.told {
            stream.take(MAX_OUTCOME).read_to_end(&mut told).await.map_err(|_| OutcomeError::Lost)?;
        }
        outcome(&told)
    }
}

#[derive(Deserialize)]
struct Status {
    status: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    details: Details,
}

#[derive(Default, Deserialize)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Deserialize)]
struct Cause {
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
}

/// A `Status` of Kubernetes, as protocols since version 4 tell it.
fn outcome(told: &[u8]) -> Result<i32, OutcomeError> {
    if told.is_empty() {
        return Err(OutcomeError::Lost);
    }
    let failed = |message: &str| OutcomeError::Failed { message: message.to_owned() };
    let status: Status = serde_json::from_slice(told).map_err(|_| {
        failed(&format!("the daemon told an outcome that is none: {:?}", String::from_utf8_lossy(told)))
    })?;
    if status.status == "Success" {
        return Ok(0);
    }
    if status.reason == "NonZeroExitCode" {
        let code = status.details.causes.iter().find(|cause| cause.reason == "ExitCode");
        return code
            .and_then(|cause| cause.message.parse().ok())
            .ok_or_else(|| failed("the daemon told of a failure without an exit code"));
    }
    Err(failed(&status.message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_a_code_a_failure_or_missing() {
        assert_eq!(outcome(br#"{"metadata":{},"status":"Success"}"#), Ok(0));
        let code = br#"{"status":"Failure","reason":"NonZeroExitCode","message":"x",
                        "details":{"causes":[{"reason":"ExitCode","message":"137"}]}}"#;
        assert_eq!(outcome(code), Ok(137));
        let failed = |message: &str| Err(OutcomeError::Failed { message: message.to_owned() });
        assert_eq!(
            outcome(br#"{"status":"Failure","message":"no such program"}"#),
            failed("no such program")
        );
        assert!(matches!(
            outcome(br#"{"status":"Failure","reason":"NonZeroExitCode"}"#),
            Err(OutcomeError::Failed { .. })
        ));
        assert!(matches!(outcome(b"gibberish"), Err(OutcomeError::Failed { .. })));
        assert_eq!(outcome(b""), Err(OutcomeError::Lost));
    }
}
