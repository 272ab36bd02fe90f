//! A connection: one task reads, one writes, streams are handed out.

use std::sync::atomic::AtomicU32;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frame::{Frame, goodbye, status};
use super::headers::Headers;
use super::outbox::Outbox;
use super::reader::Reader;
use super::streams::Streams;
use super::writer;
use crate::activity::Activity;
use crate::chunks::{ChunkReader, ChunkWriter, Packet, inbox};

/// Streams that wait to be looked at.
const BACKLOG: usize = 32;
/// Pieces of data that wait to be written.
const QUEUE: usize = 32;
/// The longest that a peer gets to take what was written and close.
pub(super) const LINGER: Duration = Duration::from_secs(5);

/// A stream of a connection.
pub struct Stream {
    /// What its opener said about it.
    pub headers: Headers,
    /// What the other side sends.
    pub reader: ChunkReader,
    /// What it receives. Dropped without shutdown, the stream is reset and what still waited to be sent is lost.
    pub writer: ChunkWriter,
}

impl Stream {
    /// The first header of the name (lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// The streams that the other side opens.
pub type Incoming = mpsc::Receiver<Stream>;

/// The handle of a connection. Dropping it cuts the connection off.
pub struct Connection {
    shared: Arc<Shared>,
    tasks: TaskTracker,
    next_id: u32,
}

/// What the tasks of a connection and its streams have in common.
pub(super) struct Shared {
    pub(super) streams: Streams,
    pub(super) outbox: Outbox,
    pub(super) activity: Activity,
    /// The highest number of a stream that the other side opened.
    pub(super) last: AtomicU32,
    /// The connection is to be ended in good order.
    pub(super) finish: CancellationToken,
    farewell: OnceLock<u32>,
    /// The connection is over.
    pub(super) over: CancellationToken,
    packets: mpsc::Sender<Packet>,
}

impl Connection {
    /// The side that accepts: every stream is answered with SYN_REPLY and comes out of [`Incoming`].
    pub fn server(io: impl AsyncRead + AsyncWrite + Send + 'static) -> (Self, Incoming) {
        let (accept, incoming) = mpsc::channel(BACKLOG);
        (Self::new(io, Some(accept)), incoming)
    }

    /// The side that opens streams.
    pub fn client(io: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        Self::new(io, None)
    }

    fn new(io: impl AsyncRead + AsyncWrite + Send + 'static, accept: Option<mpsc::Sender<Stream>>) -> Self {
        let (from, to) = tokio::io::split(io);
        let (packets, queued) = mpsc::channel(QUEUE);
        let shared = Arc::new(Shared {
            streams: Streams::default(),
            outbox: Outbox::default(),
            activity: Activity::new(),
            last: AtomicU32::new(0),
            finish: CancellationToken::new(),
            farewell: OnceLock::new(),
            over: CancellationToken::new(),
            packets,
        });
        let tasks = TaskTracker::new();
        tasks.spawn(Reader::new(shared.clone(), accept).run(from));
        tasks.spawn(writer::run(to, queued, shared.clone()));
        tasks.close();
        Self { shared, tasks, next_id: 1 }
    }
    /// Opens a stream.
    pub fn open(&mut self, headers: Headers) -> Stream {
        let id = self.next_id;
        self.next_id += 2;
        self.shared.outbox.push(Frame::SynStream { id, fin: false, headers });
        self.shared.stream(id, Vec::new())
    }

    /// Cancelled once the connection is over.
    pub fn gone(&self) -> CancellationToken {
        self.shared.over.clone()
    }

    /// Answers once the connection is over: the other side closed it, broke it, or sent what is not SPDY.
    pub async fn closed(&self) {
        self.shared.over.cancelled().await;
    }

    /// Answers once nothing was transferred for so long.
    pub async fn idle(&self, limit: Duration) {
        self.shared.activity.idle(limit).await;
    }

    /// Sends what the streams have written, says good-bye and closes; the other side gets some seconds to take it.
    pub async fn finish(self) {
        self.shared.finish(goodbye::OK);
        tokio::time::timeout(LINGER, self.tasks.wait()).await.ok();
    }
}

#[cfg(test)]
impl Connection {
    /// Answers once nothing of it runs any more.
    pub(super) async fn tasks_ended(&self) {
        self.tasks.wait().await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.over.cancel();
    }
}

impl Shared {
    /// Enters a stream and makes the user's ends of it.
    pub(super) fn stream(self: &Arc<Self>, id: u32, headers: Headers) -> Stream {
        let (inbox, reader) = inbox();
        let unwanted = CancellationToken::new();
        self.streams.insert(id, inbox, unwanted.clone());
        let shared = self.clone();
        let abandon = move || {
            if shared.streams.remove(id) {
                shared.outbox.push(Frame::Reset { id, status: status::CANCEL });
            }
        };
        let writer = ChunkWriter::new(self.packets.clone(), id, Some(Box::new(abandon))).until(unwanted);
        Stream { headers, reader, writer }
    }

    /// Lets the writer end the connection, and say why. The first reason counts.
    pub(super) fn finish(&self, status: u32) {
        self.farewell.get_or_init(|| status);
        self.finish.cancel();
    }

    /// The reason of [`finish`](Self::finish), see [`goodbye`].
    pub(super) fn farewell(&self) -> u32 {
        self.farewell.get().copied().unwrap_or(goodbye::OK)
    }
}
