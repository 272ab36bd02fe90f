//! port-forward from the client's side.

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes, join};

use super::{ConnectError, Target, spdy};
use crate::spdy::{Connection, Stream};

/// Bytes that are copied at once.
const BUFFER: usize = 32 * 1024;
/// The most that is read of what went wrong.
const MAX_WORDS: u64 = 4096;

/// Forwards any number of connections to ports of one pod. Dropping it cuts them off.
pub struct Forwarder {
    connection: Connection,
    requests: u64,
}

impl Forwarder {
    /// Connects to a URL of PortForward.
    pub async fn connect(target: &Target) -> Result<Self, ConnectError> {
        Ok(Self { connection: spdy(target, "portforward.k8s.io").await?, requests: 0 })
    }

    /// A new connection to a port.
    pub fn open(&mut self, port: u16) -> Forwarded {
        let id = self.requests;
        self.requests += 1;
        let mut stream = |kind: &str| {
            let headers =
                [("streamtype", kind.to_owned()), ("port", port.to_string()), ("requestid", id.to_string())];
            self.connection.open(headers.map(|(name, value)| (name.to_owned(), value)).to_vec())
        };
        // The order that other clients have.
        let error = stream("error");
        Forwarded { error, data: stream("data") }
    }

    /// Answers once the other side is gone.
    pub async fn closed(&self) {
        self.connection.closed().await;
    }
}

/// A forwarded connection.
pub struct Forwarded {
    data: Stream,
    error: Stream,
}

/// A forwarded connection did not come about, or broke.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct PortError {
    /// The other side's words.
    pub message: String,
}

impl Forwarded {
    /// Copies both ways until both directions have ended, each by itself.
    pub async fn carry<L>(self, local: &mut L) -> Result<(), PortError>
    where
        L: AsyncRead + AsyncWrite + Unpin,
    {
        let Self { data, mut error } = self;
        let mut data = join(data.reader, data.writer);
        // Nothing is ever sent on it.
        error.writer.shutdown().await.ok();
        let mut words = Vec::new();
        let mut told = error.reader.take(MAX_WORDS);
        let copied = async {
            let copied = copy_bidirectional_with_sizes(local, &mut data, BUFFER, BUFFER).await;
            copied.map_err(|error| PortError { message: error.to_string() })
        };
        tokio::pin!(copied);
        let read = async {
            told.read_to_end(&mut words).await.ok();
            words
        };
        tokio::pin!(read);
        tokio::select! {
            // A port that refuses says so before it ends its data.
            biased;
            words = &mut read => {
                refused(words)?;
                copied.await.map(drop)
            }
            copied = &mut copied => {
                copied?;
                refused(read.await)
            }
        }
    }
}

fn refused(words: Vec<u8>) -> Result<(), PortError> {
    if words.is_empty() {
        return Ok(());
    }
    Err(PortError { message: String::from_utf8_lossy(&words).into_owned() })
}
