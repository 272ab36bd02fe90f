//! The byte streams of processes: one connection to the guest each.

use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, WriteHalf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio_util::task::TaskTracker;

use a3s_box_protocol::framing::{FramingError, read_message, write_message};
use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::{StreamAccept, StreamOpen};
use a3s_box_protocol::{MAX_UNACKNOWLEDGED, STREAM_PORT};
use a3s_box_vmm::Machine;
use a3s_box_vmm::error::ConnectError;

use crate::attached::StreamReader;
use crate::text::{MESSAGE_LIMIT, printable};

/// The longest until a stream is accepted.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// A stream that could not be opened.
#[derive(Debug, Error)]
pub(crate) enum StreamError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the stream's handshake failed: {0}")]
    Framing(#[from] FramingError),
    #[error("the guest agent refused the stream: {0}")]
    Refused(String),
    #[error("the guest agent did not accept the stream within {OPEN_LIMIT:?}")]
    Timeout,
}

/// Which stream of which process.
#[derive(Debug, Clone)]
pub(crate) struct StreamName {
    pub(crate) session_id: String,
    /// Empty for the session's own process.
    pub(crate) exec_id: String,
    pub(crate) kind: Kind,
}

/// Opens a stream; the answer is the connection and the offset of the first byte on it.
pub(crate) async fn open(
    machine: &dyn Machine,
    name: &StreamName,
    offset: u64,
) -> Result<(UnixStream, u64), StreamError> {
    let handshake = async {
        let mut stream = machine.connect(STREAM_PORT).await?;
        let open = StreamOpen {
            session_id: name.session_id.clone(),
            exec_id: name.exec_id.clone(),
            kind: name.kind.into(),
            offset,
            keep_open: false,
        };
        write_message(&mut stream, &open).await?;
        let accept: StreamAccept = read_message(&mut stream).await?;
        if accept.error.is_empty() {
            Ok((stream, accept.offset))
        } else {
            Err(StreamError::Refused(printable(&accept.error, MESSAGE_LIMIT)))
        }
    };
    tokio::time::timeout(OPEN_LIMIT, handshake).await.map_err(|_| StreamError::Timeout)?
}

/// An output stream of a guest: bytes in, acknowledgements out.
#[derive(Debug)]
pub(crate) struct Output {
    from: OwnedReadHalf,
    acks: OwnedWriteHalf,
    /// Bytes of an acknowledgement that the socket did not take yet.
    unsent: Vec<u8>,
}

impl Output {
    pub(crate) async fn open(
        machine: &dyn Machine,
        name: &StreamName,
        offset: u64,
    ) -> Result<(Self, u64), StreamError> {
        let (stream, first) = open(machine, name, offset).await?;
        let (from, acks) = stream.into_split();
        Ok((Self { from, acks, unsent: Vec::new() }, first))
    }

    /// Appends what has arrived to `buffer`; 0 is the end. Cancel safe.
    pub(crate) async fn read(&mut self, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
        self.from.read_buf(buffer).await
    }

    /// Tells the guest that all bytes before `offset` are safe. Never waits: a guest that does not read its
    /// acknowledgements gets a later, larger one.
    pub(crate) fn acknowledge(&mut self, offset: u64) {
        if self.unsent.is_empty() {
            self.unsent.extend_from_slice(&offset.to_be_bytes());
        }
        match self.acks.try_write(&self.unsent) {
            Ok(sent) => drop(self.unsent.drain(..sent)),
            // None of a fresh one was sent: it may be forgotten. The rest of a torn one must follow.
            Err(_) if self.unsent.len() == 8 => self.unsent.clear(),
            Err(_) => {}
        }
    }
}

/// Passes an output on to a reader in this process; what the reader's buffer has taken is acknowledged.
pub(crate) fn pump(mut output: Output, first: u64, tasks: &TaskTracker) -> StreamReader {
    let (reader, writer) = tokio::io::simplex(MAX_UNACKNOWLEDGED);
    tasks.spawn(async move {
        let mut writer: WriteHalf<_> = writer;
        let mut offset = first;
        let mut buffer = Vec::with_capacity(64 * 1024);
        while let Ok(count @ 1..) = output.read(&mut buffer).await {
            if writer.write_all(&buffer).await.is_err() {
                break;
            }
            offset += count as u64;
            output.acknowledge(offset);
            buffer.clear();
        }
        // The reader sees the end; an error cannot matter any more.
        writer.shutdown().await.ok();
    });
    Box::new(reader)
}

/// The beginning of an output.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) bytes: Vec<u8>,
    /// There was more.
    pub(crate) truncated: bool,
}

/// Reads an output to its end and keeps the first `limit` bytes. What was read is in `into` even when the
/// future is dropped half-way.
pub(crate) async fn collect(mut output: Output, first: u64, limit: usize, into: &mut Collected) {
    let mut offset = first;
    let mut buffer = Vec::with_capacity(64 * 1024);
    while let Ok(count @ 1..) = output.read(&mut buffer).await {
        let take = count.min(limit.saturating_sub(into.bytes.len()));
        into.bytes.extend_from_slice(&buffer[..take]);
        into.truncated |= take < count;
        offset += count as u64;
        output.acknowledge(offset);
        buffer.clear();
    }
}
