//! Connections: channels as byte streams, and a byte stream for a tunnel.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes, handshake};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::channels::{Event, Protocol};
use crate::activity::Activity;
use crate::chunks::{ChunkReader, ChunkWriter, Inbox, Packet, inbox};

/// The largest message of a client; Kubernetes' clients send at most 32 KiB and a byte.
const MAX_MESSAGE: usize = 256 * 1024;
/// Pieces of data that wait to be written.
const QUEUE: usize = 32;
/// The longest that a client gets to take what was written and close.
const LINGER: Duration = Duration::from_secs(5);
/// The most bytes of a tunnel that are under way in one direction.
const TUNNEL: usize = 64 * 1024;

/// The answer to a client's `Sec-WebSocket-Key`.
pub(crate) fn accept_key(key: &[u8]) -> String {
    handshake::derive_accept_key(key)
}

async fn start<S>(io: S, role: Role) -> WebSocketStream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .max_write_buffer_size(4 * MAX_MESSAGE);
    WebSocketStream::from_raw_socket(io, role, Some(config)).await
}

/// The handle of a connection with channels. Dropping it cuts the connection off.
pub(crate) struct Connection {
    packets: mpsc::Sender<Packet>,
    activity: Activity,
    tasks: TaskTracker,
    finish: CancellationToken,
    over: CancellationToken,
}

impl Connection {
    /// Serves the channels of a client; those that are in `incoming` can be read.
    pub(crate) async fn serve<S>(
        io: S,
        protocol: Protocol,
        incoming: &[u8],
    ) -> (Self, HashMap<u8, ChunkReader>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Self::new(start(io, Role::Server).await, Role::Server, protocol, incoming)
    }

    /// Uses the channels of a server; those that are in `incoming` can be read.
    pub(crate) async fn client<S>(
        io: S,
        protocol: Protocol,
        incoming: &[u8],
    ) -> (Self, HashMap<u8, ChunkReader>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Self::new(start(io, Role::Client).await, Role::Client, protocol, incoming)
    }

    fn new<S>(
        socket: WebSocketStream<S>,
        role: Role,
        protocol: Protocol,
        incoming: &[u8],
    ) -> (Self, HashMap<u8, ChunkReader>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (sink, source) = socket.split();
        let (packets, data) = mpsc::channel(QUEUE);
        let (mut inboxes, mut readers) = (HashMap::new(), HashMap::new());
        for channel in incoming {
            let (inbox, reader) = inbox();
            inboxes.insert(*channel, inbox);
            readers.insert(*channel, reader);
        }
        let (activity, over) = (Activity::new(), CancellationToken::new());
        let (tasks, finish) = (TaskTracker::new(), CancellationToken::new());
        tasks.spawn(read(source, protocol, inboxes, activity.clone(), over.clone()));
        let encode = move |packet| match (packet, role) {
            (Packet::Data { tag, bytes }, _) => Some(protocol.encode(tag as u8, &bytes)),
            (Packet::End { tag }, Role::Client) => protocol.encode_close(tag as u8),
            // A server's ends are told by the end of the connection.
            (Packet::End { .. }, Role::Server) => None,
        };
        tasks.spawn(write(sink, encode, data, finish.clone(), activity.clone(), over.clone()));
        tasks.close();
        (Self { packets, activity, tasks, finish, over }, readers)
    }

    /// The sending end of a channel.
    pub(crate) fn writer(&self, channel: u8) -> ChunkWriter {
        ChunkWriter::new(self.packets.clone(), u32::from(channel), None)
    }

    /// Sends an empty message, by which clients know that the channels are served.
    pub(crate) async fn greet(&self, channel: u8) {
        self.packets.send(Packet::Data { tag: u32::from(channel), bytes: Bytes::new() }).await.ok();
    }

    /// Cancelled once the client is gone.
    pub(crate) fn gone(&self) -> CancellationToken {
        self.over.clone()
    }

    /// Answers once the client is gone.
    pub(crate) async fn closed(&self) {
        self.over.cancelled().await;
    }

    /// Answers once nothing was transferred for so long.
    pub(crate) async fn idle(&self, limit: Duration) {
        self.activity.idle(limit).await;
    }

    /// Sends what was written, says good-bye and closes.
    pub(crate) async fn finish(self) {
        self.finish.cancel();
        tokio::time::timeout(LINGER, self.tasks.wait()).await.ok();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

async fn read<S>(
    mut source: SplitStream<WebSocketStream<S>>,
    protocol: Protocol,
    mut inboxes: HashMap<u8, Inbox>,
    activity: Activity,
    over: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let _guard = over.clone().drop_guard();
    loop {
        let message = tokio::select! {
            biased;
            () = over.cancelled() => return,
            message = source.next() => message,
        };
        let Some(Ok(message)) = message else { return };
        activity.touch();
        match protocol.decode(message) {
            Ok(Event::Data(channel, bytes)) => {
                if let Some(inbox) = inboxes.get(&channel) {
                    tokio::select! {
                        () = over.cancelled() => return,
                        () = inbox.push(bytes) => {}
                    }
                }
            }
            Ok(Event::Close(channel)) => drop(inboxes.remove(&channel)),
            Ok(Event::Other) => {}
            // The library answers; the next read is the end.
            Ok(Event::Bye) => inboxes.clear(),
            Err(error) => {
                tracing::debug!(%error, "a WebSocket connection was ended");
                return;
            }
        }
    }
}

async fn write<S>(
    mut sink: SplitSink<WebSocketStream<S>, Message>,
    encode: impl Fn(Packet) -> Option<Message>,
    mut packets: mpsc::Receiver<Packet>,
    finish: CancellationToken,
    activity: Activity,
    over: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        // The end comes after all that was queued.
        let packet = tokio::select! {
            biased;
            () = over.cancelled() => return,
            Some(packet) = packets.recv() => packet,
            () = finish.cancelled() => break,
        };
        let mut next = Some(packet);
        let sent = async {
            while let Some(packet) = next.take() {
                if let Some(message) = encode(packet) {
                    sink.feed(message).await?;
                }
                next = packets.try_recv().ok();
            }
            sink.flush().await
        };
        let sent = tokio::select! {
            biased;
            () = over.cancelled() => return,
            sent = sent => sent,
        };
        if sent.is_err() {
            over.cancel();
            return;
        }
        activity.touch();
    }
    sink.send(good_bye()).await.ok();
}

/// A good end says so: clients take one without a code for a failure.
fn good_bye() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() }))
}

/// A WebSocket whose binary messages are the bytes of another protocol.
pub(crate) async fn tunnel<S>(io: S) -> DuplexStream
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sink, mut source) = start(io, Role::Server).await.split();
    let (near, far) = tokio::io::duplex(TUNNEL);
    let (mut from, mut to) = tokio::io::split(far);
    tokio::spawn(async move {
        let inbound = async {
            while let Some(Ok(message)) = source.next().await {
                if let Message::Binary(bytes) = message
                    && to.write_all(&bytes).await.is_err()
                {
                    break;
                }
            }
            to.shutdown().await.ok();
        };
        let outbound = async {
            let mut buffer = vec![0; TUNNEL];
            while let Ok(count @ 1..) = from.read(&mut buffer).await {
                let message = Message::Binary(Bytes::copy_from_slice(&buffer[..count]));
                if sink.send(message).await.is_err() {
                    break;
                }
            }
            sink.send(good_bye()).await.ok();
        };
        // A client that is gone reads nothing more; what is written ends by itself, and then the client has its time.
        tokio::pin!(inbound, outbound);
        tokio::select! {
            () = &mut inbound => {}
            () = &mut outbound => drop(tokio::time::timeout(LINGER, inbound).await),
        }
    });
    near
}
