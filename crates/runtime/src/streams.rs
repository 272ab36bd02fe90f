//! The byte streams of processes: one connection to the guest each.

use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::TaskTracker;

use a3s_box_protocol::framing::{FramingError, read_message, write_message};
use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_protocol::proto::{StreamAccept, StreamOpen};
use a3s_box_protocol::{MAX_UNACKNOWLEDGED, STREAM_PORT};
use a3s_box_vmm::Machine;
use a3s_box_vmm::error::ConnectError;

use crate::attached::StreamReader;
use crate::drain::Drain;
use crate::text::{MESSAGE_LIMIT, printable};

/// The longest until a stream is accepted. The guest itself gives up dialling a port of the pod after 10 s.
const OPEN_LIMIT: Duration = Duration::from_secs(12);

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

impl StreamName {
    fn open(&self) -> StreamOpen {
        StreamOpen {
            session_id: self.session_id.clone(),
            exec_id: self.exec_id.clone(),
            kind: self.kind.into(),
            ..StreamOpen::default()
        }
    }
}

/// Opens an output; the answer is the connection and the offset of the first byte on it.
async fn open(
    machine: &dyn Machine,
    name: &StreamName,
    offset: u64,
) -> Result<(UnixStream, u64), StreamError> {
    handshake(machine, StreamOpen { offset, ..name.open() }).await
}

/// Opens a process's input. With `keep_open` the end of this stream is not the end of the input.
pub(crate) async fn open_input(
    machine: &dyn Machine,
    name: &StreamName,
    keep_open: bool,
) -> Result<UnixStream, StreamError> {
    let open = StreamOpen { keep_open, ..name.open() };
    handshake(machine, open).await.map(|(stream, _)| stream)
}

/// Opens a connection to a port of the pod; what follows is in [`a3s_box_protocol::chunks`].
pub(crate) async fn open_port(machine: &dyn Machine, port: u16) -> Result<UnixStream, StreamError> {
    let open = StreamOpen { kind: Kind::Tcp.into(), port: port.into(), ..StreamOpen::default() };
    handshake(machine, open).await.map(|(stream, _)| stream)
}

async fn handshake(machine: &dyn Machine, open: StreamOpen) -> Result<(UnixStream, u64), StreamError> {
    let handshake = async {
        let mut stream = machine.connect(STREAM_PORT).await?;
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

/// So many bytes are acknowledged at once. Each acknowledgement interrupts the guest and wakes its agent, which costs it
/// more than sending 16 KiB.
const ACKNOWLEDGE_AT: u64 = MAX_UNACKNOWLEDGED as u64 / 8;

/// Fewer are acknowledged after this time.
const ACKNOWLEDGE_AFTER: Duration = Duration::from_millis(5);

/// An output stream of a guest: bytes in, acknowledgements out.
#[derive(Debug)]
pub(crate) struct Output {
    from: Drain,
    acks: OwnedWriteHalf,
    /// All bytes before this are safe.
    safe: u64,
    /// And so many of them the guest was told of.
    told: u64,
    /// When it shall be told of the others.
    due: Option<Instant>,
    /// Bytes of an acknowledgement that the socket did not take yet.
    unsent: Vec<u8>,
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.due.is_some() {
            self.tell();
        }
    }
}

impl Output {
    pub(crate) async fn open(
        machine: &dyn Machine,
        name: &StreamName,
        offset: u64,
    ) -> Result<(Self, u64), StreamError> {
        let (stream, first) = open(machine, name, offset).await?;
        let (from, acks) = stream.into_split();
        let output =
            Self { from: Drain::start(from), acks, safe: first, told: first, due: None, unsent: Vec::new() };
        Ok((output, first))
    }

    /// Appends what has arrived to `buffer`; 0 is the end. Cancel safe.
    pub(crate) async fn read(&mut self, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
        if let Some(due) = self.due {
            tokio::select! {
                biased;
                read = self.from.read(buffer) => return read,
                () = sleep_until(due) => self.tell(),
            }
        }
        self.from.read(buffer).await
    }

    /// All bytes before `offset` are safe: the guest will be told of it soon.
    pub(crate) fn acknowledge(&mut self, offset: u64) {
        self.safe = offset;
        if offset.saturating_sub(self.told) >= ACKNOWLEDGE_AT {
            self.tell();
        } else if offset != self.told {
            self.due = self.due.or_else(|| Some(Instant::now() + ACKNOWLEDGE_AFTER));
        }
    }

    /// Never waits: a guest that does not read its acknowledgements gets a later, larger one.
    fn tell(&mut self) {
        let fresh = self.unsent.is_empty();
        if fresh {
            self.unsent.extend_from_slice(&self.safe.to_be_bytes());
        }
        match self.acks.try_write(&self.unsent) {
            Ok(sent) => {
                self.unsent.drain(..sent);
                self.told = if fresh { self.safe } else { self.told };
            }
            // None of a fresh one was sent: it may be forgotten. The rest of a torn one must follow.
            Err(_) if fresh => self.unsent.clear(),
            Err(_) => {}
        }
        let all = self.unsent.is_empty() && self.told == self.safe;
        self.due = (!all).then(|| Instant::now() + ACKNOWLEDGE_AFTER);
    }
}

/// What is known of the end of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The process lives.
    Open,
    /// The process has ended, and its output had so many bytes if the agent says so. Not every backend passes on
    /// the end of a stream before both sides have closed it.
    Ended(Option<u64>),
}

/// The longest silence after which an output counts as ended although its process's agent did not tell its length.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// The same where the agent said that there is more: it lies, or is very slow.
const MISSING_LIMIT: Duration = Duration::from_secs(30);

impl End {
    /// How much may still come after `offset`.
    fn left(self, offset: u64) -> u64 {
        match self {
            Self::Ended(Some(total)) => total.saturating_sub(offset),
            Self::Open | Self::Ended(None) => u64::MAX,
        }
    }

    async fn silence(self) {
        match self {
            Self::Open => std::future::pending().await,
            Self::Ended(None) => tokio::time::sleep(DRAIN_LIMIT).await,
            Self::Ended(Some(_)) => tokio::time::sleep(MISSING_LIMIT).await,
        }
    }
}

/// An output that is read to its end, wherever that is learned from.
pub(crate) struct Reading {
    output: Output,
    offset: u64,
    buffer: Vec<u8>,
    end: watch::Receiver<End>,
}

impl Reading {
    pub(crate) fn new((output, offset): (Output, u64), end: watch::Receiver<End>) -> Self {
        Self { output, offset, buffer: Vec::with_capacity(64 * 1024), end }
    }

    /// The next bytes; those before them are acknowledged. `None`: that was all.
    async fn next(&mut self) -> Option<&[u8]> {
        self.buffer.clear();
        self.output.acknowledge(self.offset);
        let mut told = true;
        loop {
            let end = *self.end.borrow_and_update();
            let left = end.left(self.offset);
            if left == 0 {
                return None;
            }
            // Bytes that are there come before the news of the end.
            tokio::select! {
                biased;
                read = self.output.read(&mut self.buffer) => {
                    let count = read.ok().filter(|count| *count > 0)? as u64;
                    let count = count.min(left);
                    self.buffer.truncate(count as usize);
                    self.offset += count;
                    return Some(&self.buffer);
                }
                // Without a teller only the connection can say it.
                changed = self.end.changed(), if told => told = changed.is_ok(),
                () = end.silence() => return None,
            }
        }
    }
}

/// Passes an output on to a reader in this process; what the reader's buffer has taken is acknowledged. The reader's
/// going breaks the connection.
pub(crate) fn pump(mut output: Output, first: u64, tasks: &TaskTracker) -> StreamReader {
    let (reader, mut writer) = tokio::io::duplex(MAX_UNACKNOWLEDGED);
    tasks.spawn(async move {
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
        // Dropped: the reader sees the end.
        drop(writer);
    });
    Box::new(reader)
}

/// Passes an output on to a reader in this process until it ends. Once the reader is gone the rest is read and dropped,
/// so that the process never waits.
pub(crate) async fn pass_on(mut reading: Reading, mut writer: DuplexStream) {
    let mut wanted = true;
    while let Some(bytes) = reading.next().await {
        wanted = wanted && writer.write_all(bytes).await.is_ok();
    }
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
pub(crate) async fn collect(mut reading: Reading, limit: usize, into: &mut Collected) {
    while let Some(bytes) = reading.next().await {
        let take = bytes.len().min(limit.saturating_sub(into.bytes.len()));
        into.bytes.extend_from_slice(&bytes[..take]);
        into.truncated |= take < bytes.len();
    }
}
