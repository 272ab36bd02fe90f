//! A connection: one task reads, one writes, streams are handed out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frame::{Decoder, Encoder, Frame, Headers, status};
use crate::activity::Activity;
use crate::chunks::{ChunkReader, ChunkWriter, Inbox, Packet, inbox};

/// Streams whose clients may still send.
const MAX_STREAMS: usize = 256;
/// Streams beyond that are refused one by one; a client that goes on is cut off.
const MAX_REFUSED: usize = 1000;
/// Streams that wait to be looked at.
const BACKLOG: usize = 32;
/// Pieces of data that wait to be written.
const QUEUE: usize = 32;
/// As much is written at once.
const BATCH: usize = 128 * 1024;
/// A window update is sent for so many bytes.
const CREDIT: u32 = 16 * 1024;
/// The longest that a client gets to take what was written and close.
const LINGER: Duration = Duration::from_secs(5);

type Streams = Arc<Mutex<HashMap<u32, Inbox>>>;

/// A stream of a connection.
pub struct Stream {
    /// What its opener said about it.
    pub headers: Headers,
    /// What the other side sends.
    pub reader: ChunkReader,
    /// What it receives. Dropped without shutdown, the stream is reset.
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
    shared: Shared,
    tasks: TaskTracker,
    finish: CancellationToken,
    next_id: u32,
}

#[derive(Clone)]
struct Shared {
    streams: Streams,
    packets: mpsc::Sender<Packet>,
    control: mpsc::UnboundedSender<Frame>,
    activity: Activity,
    /// The connection is over.
    over: CancellationToken,
}

impl Connection {
    /// The side that accepts: every stream is answered with SYN_REPLY and comes out of [`Incoming`].
    pub fn server(io: impl AsyncRead + AsyncWrite + Send + 'static) -> (Self, Incoming) {
        let (accept, incoming) = mpsc::channel(BACKLOG);
        (Self::new(io, accept), incoming)
    }

    /// The side that opens streams.
    pub fn client(io: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        Self::new(io, mpsc::channel(1).0)
    }

    fn new(io: impl AsyncRead + AsyncWrite + Send + 'static, accept: mpsc::Sender<Stream>) -> Self {
        let (from, to) = tokio::io::split(io);
        let (packets, data) = mpsc::channel(QUEUE);
        let (control, controls) = mpsc::unbounded_channel();
        let shared = Shared {
            streams: Streams::default(),
            packets,
            control,
            activity: Activity::new(),
            over: CancellationToken::new(),
        };
        let (tasks, finish) = (TaskTracker::new(), CancellationToken::new());
        let reader = Reader { shared: shared.clone(), accept, last: 0, refused: 0 };
        tasks.spawn(reader.run(from));
        tasks.spawn(write(to, data, controls, finish.clone(), shared.clone()));
        tasks.close();
        Self { shared, tasks, finish, next_id: 1 }
    }

    /// Opens a stream.
    pub fn open(&mut self, headers: Headers) -> Stream {
        let id = self.next_id;
        self.next_id += 2;
        self.shared.control.send(Frame::SynStream { id, fin: false, headers }).ok();
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
        self.finish.cancel();
        tokio::time::timeout(LINGER, self.tasks.wait()).await.ok();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.over.cancel();
    }
}

impl Shared {
    /// Enters a stream and makes the user's ends of it.
    fn stream(&self, id: u32, headers: Headers) -> Stream {
        let (inbox, reader) = inbox();
        self.lock().insert(id, inbox);
        let control = self.control.clone();
        let abandon = move || {
            control.send(Frame::Reset { id, status: status::CANCEL }).ok();
        };
        let writer = ChunkWriter::new(self.packets.clone(), id, Some(Box::new(abandon)));
        Stream { headers, reader, writer }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Inbox>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Reader {
    shared: Shared,
    accept: mpsc::Sender<Stream>,
    /// The highest id that was opened.
    last: u32,
    refused: usize,
}

impl Reader {
    async fn run(mut self, mut from: impl AsyncRead + Unpin) {
        let over = self.shared.over.clone();
        // Ends the writer, and with it everybody who writes.
        let _guard = over.clone().drop_guard();
        // Whoever else ends the connection is not to wait for the other side.
        tokio::select! {
            biased;
            () = over.cancelled() => {}
            () = self.read(&mut from) => {}
        }
        self.shared.lock().clear();
    }

    async fn read(&mut self, from: &mut (impl AsyncRead + Unpin)) {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::with_capacity(64 * 1024);
        loop {
            loop {
                match decoder.next(&mut buffer) {
                    Ok(Some(frame)) => {
                        if !self.take(frame).await {
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!(%error, "a SPDY connection was ended");
                        return;
                    }
                }
            }
            buffer.reserve(64 * 1024);
            match from.read_buf(&mut buffer).await {
                Ok(1..) => self.shared.activity.touch(),
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// `false`: this peer has lost its right to be served.
    async fn take(&mut self, frame: Frame) -> bool {
        match frame {
            Frame::SynStream { id, fin, headers } => return self.open(id, fin, headers).await,
            Frame::Data { id, fin, bytes } => {
                let inbox = self.shared.lock().get(&id).cloned();
                if let Some(inbox) = inbox {
                    self.credit(id, bytes.len() as u32);
                    inbox.push(bytes).await;
                }
                self.end(id, fin);
            }
            Frame::SynReply { id, fin, .. } | Frame::Headers { id, fin, .. } => self.end(id, fin),
            Frame::Reset { id, .. } => self.end(id, true),
            // One that finds the queue full is not answered: its sender does not read anyway.
            Frame::Ping(id) if self.shared.packets.capacity() > 0 => {
                self.shared.control.send(Frame::Ping(id)).ok();
            }
            Frame::Ping(_) | Frame::GoAway { .. } | Frame::WindowUpdate { .. } => {}
        }
        true
    }

    async fn open(&mut self, id: u32, fin: bool, headers: Headers) -> bool {
        if id.is_multiple_of(2) || id <= self.last {
            self.shared.control.send(Frame::Reset { id, status: status::PROTOCOL_ERROR }).ok();
            return false;
        }
        self.last = id;
        if self.shared.lock().len() >= MAX_STREAMS {
            self.refused += 1;
            self.shared.control.send(Frame::Reset { id, status: status::REFUSED_STREAM }).ok();
            return self.refused <= MAX_REFUSED;
        }
        self.shared.control.send(Frame::SynReply { id, fin: false, headers: Vec::new() }).ok();
        let stream = self.shared.stream(id, headers);
        self.end(id, fin);
        // Nobody accepts any more: dropping the stream resets it.
        self.accept.send(stream).await.ok();
        true
    }

    fn end(&self, id: u32, fin: bool) {
        if fin {
            self.shared.lock().remove(&id);
        }
    }

    /// For peers that honour windows. One that sends without reading gets none.
    fn credit(&self, id: u32, bytes: u32) {
        if bytes >= CREDIT && self.shared.packets.capacity() > 0 {
            self.shared.control.send(Frame::WindowUpdate { id, delta: bytes }).ok();
            self.shared.control.send(Frame::WindowUpdate { id: 0, delta: bytes }).ok();
        }
    }
}

async fn write(
    mut to: impl AsyncWrite + Unpin,
    mut packets: mpsc::Receiver<Packet>,
    mut control: mpsc::UnboundedReceiver<Frame>,
    finish: CancellationToken,
    shared: Shared,
) {
    let mut encoder = Encoder::default();
    let mut out = BytesMut::with_capacity(BATCH);
    let mut last = false;
    while !last {
        // What answers comes before data; the end comes after all that was queued.
        let first = tokio::select! {
            biased;
            () = shared.over.cancelled() => return,
            Some(frame) = control.recv() => Some(frame),
            Some(packet) = packets.recv() => Some(frame_of(packet)),
            () = finish.cancelled() => { last = true; None }
        };
        let mut next = first;
        while let Some(frame) = next {
            if let Err(error) = encoder.put(&frame, &mut out) {
                tracing::debug!(%error, "a frame could not be written");
            }
            next = if out.len() >= BATCH { None } else { waiting(&mut control, &mut packets) };
        }
        if last && encoder.put(&Frame::GoAway { last: 0 }, &mut out).is_err() {
            return;
        }
        let written = tokio::select! {
            biased;
            () = shared.over.cancelled() => return,
            written = async { to.write_all(&out).await?; to.flush().await } => written,
        };
        if written.is_err() {
            shared.over.cancel();
            return;
        }
        out.clear();
        shared.activity.touch();
    }
    to.shutdown().await.ok();
}

fn waiting(
    control: &mut mpsc::UnboundedReceiver<Frame>,
    packets: &mut mpsc::Receiver<Packet>,
) -> Option<Frame> {
    control.try_recv().ok().or_else(|| packets.try_recv().ok().map(frame_of))
}

fn frame_of(packet: Packet) -> Frame {
    match packet {
        Packet::Data { tag, bytes } => Frame::Data { id: tag, fin: false, bytes },
        Packet::End { tag } => Frame::Data { id: tag, fin: true, bytes: Bytes::new() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(kind: &str) -> Headers {
        vec![("streamtype".to_owned(), kind.to_owned())]
    }

    async fn echo(mut incoming: Incoming) {
        while let Some(mut stream) = incoming.recv().await {
            tokio::spawn(async move {
                tokio::io::copy(&mut stream.reader, &mut stream.writer).await.ok();
                stream.writer.shutdown().await.ok();
            });
        }
    }

    #[tokio::test]
    async fn streams_echo_side_by_side_with_half_close() {
        let (near, far) = tokio::io::duplex(16 * 1024);
        let (_server, incoming) = Connection::server(far);
        tokio::spawn(echo(incoming));
        let mut client = Connection::client(near);
        let streams: Vec<Stream> = (0..8).map(|_| client.open(headers("data"))).collect();
        let round = streams.into_iter().enumerate().map(|(index, mut stream)| async move {
            let sent = vec![index as u8; 1 << 20];
            let (reader, writer) = (&mut stream.reader, &mut stream.writer);
            let mut got = Vec::new();
            let (wrote, read) = tokio::join!(
                async {
                    writer.write_all(&sent).await?;
                    writer.shutdown().await
                },
                reader.read_to_end(&mut got)
            );
            wrote.unwrap();
            read.unwrap();
            assert!(got == sent);
        });
        futures::future::join_all(round).await;
        client.finish().await;
    }

    #[tokio::test]
    async fn ten_thousand_streams_end_the_connection_instead_of_filling_memory() {
        let (near, far) = tokio::io::duplex(1 << 20);
        let (server, mut incoming) = Connection::server(far);
        let holder = tokio::spawn(async move {
            let mut held = Vec::new();
            while let Some(stream) = incoming.recv().await {
                held.push(stream);
            }
            held.len()
        });
        let mut client = Connection::client(near);
        let opened: Vec<Stream> = (0..10_000).map(|_| client.open(headers("data"))).collect();
        tokio::time::timeout(Duration::from_secs(20), server.closed()).await.expect("it is ended");
        assert_eq!(holder.await.unwrap(), MAX_STREAMS);
        drop(opened);
    }

    #[tokio::test]
    async fn a_client_that_vanishes_ends_reading_and_writing() {
        let (near, far) = tokio::io::duplex(4096);
        let (server, mut incoming) = Connection::server(far);
        let mut client = Connection::client(near);
        let open = client.open(headers("stdin"));
        let mut stream = incoming.recv().await.unwrap();
        assert_eq!(stream.header("streamtype"), Some("stdin"));
        drop((open, client));
        let mut rest = Vec::new();
        stream.reader.read_to_end(&mut rest).await.unwrap();
        server.closed().await;
        while stream.writer.write_all(&[0; 4096]).await.is_ok() {}
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_makes_writers_wait() {
        let (near, far) = tokio::io::duplex(4096);
        let (_server, mut incoming) = Connection::server(far);
        let (frames, mut encoder) = (&mut BytesMut::new(), Encoder::default());
        encoder.put(&Frame::SynStream { id: 1, fin: false, headers: headers("stdout") }, frames).unwrap();
        let (_from, mut to) = tokio::io::split(near);
        to.write_all(frames).await.unwrap();
        let mut stream = incoming.recv().await.unwrap();
        let mut taken = 0;
        let limit = Duration::from_millis(200);
        while let Ok(count) = tokio::time::timeout(limit, stream.writer.write(&[0; 32 * 1024])).await {
            taken += count.unwrap();
            assert!(taken < 4 << 20, "nobody reads, and {taken} bytes were taken");
        }
    }
}
