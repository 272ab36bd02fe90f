//! Byte streams between the tasks that own a connection and whoever uses one of its streams.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::{CancellationToken, PollSender};

/// What one stream keeps for a reader that does not read. Then its whole connection waits: clients in Go send whatever
/// the windows say. As servers in Go do after 50 frames, of 32 KiB as their clients write them; this is a little more.
const STREAM_BUFFER: usize = 2 * 1024 * 1024;

/// The largest piece of one write, so that the streams of a connection take turns.
const MAX_PIECE: usize = 32 * 1024;

/// The connection's end of an incoming stream. Dropping it ends the stream.
#[derive(Debug, Clone)]
pub(crate) struct Inbox {
    chunks: mpsc::UnboundedSender<(Bytes, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
}

/// The user's end of an incoming stream. Once it is dropped, what still comes is thrown away.
#[derive(Debug)]
pub struct ChunkReader {
    chunks: mpsc::UnboundedReceiver<(Bytes, OwnedSemaphorePermit)>,
    current: Option<(Bytes, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
}

pub(crate) fn inbox() -> (Inbox, ChunkReader) {
    let room = Arc::new(Semaphore::new(STREAM_BUFFER));
    let (sender, receiver) = mpsc::unbounded_channel();
    let reader = ChunkReader { chunks: receiver, current: None, room: room.clone() };
    (Inbox { chunks: sender, room }, reader)
}

impl Inbox {
    /// Hands bytes over; waits while the stream's buffer is full.
    pub(crate) async fn push(&self, bytes: Bytes) {
        let size = bytes.len().min(STREAM_BUFFER) as u32;
        if size == 0 {
            return;
        }
        // Closed by a reader that is gone: nobody wants the bytes.
        if let Ok(room) = self.room.clone().acquire_many_owned(size).await {
            self.chunks.send((bytes, room)).ok();
        }
    }
}

impl AsyncRead for ChunkReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.current.is_none() {
            self.current = ready!(self.chunks.poll_recv(context));
        }
        if let Some((bytes, _)) = &mut self.current {
            let take = bytes.len().min(buffer.remaining());
            buffer.put_slice(&bytes[..take]);
            bytes.advance(take);
            if bytes.is_empty() {
                self.current = None;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for ChunkReader {
    fn drop(&mut self) {
        self.room.close();
    }
}

/// What a user's end sends to the task that writes.
#[derive(Debug)]
pub(crate) enum Packet {
    /// Bytes of the stream `tag`.
    Data { tag: u32, bytes: Bytes },
    /// Its end.
    End { tag: u32 },
}

/// The user's end of an outgoing stream. Writing waits while the connection takes nothing; shutting it down ends the
/// stream.
pub struct ChunkWriter {
    packets: PollSender<Packet>,
    tag: u32,
    ended: bool,
    /// Called when it is dropped before its end.
    abandon: Option<Box<dyn FnOnce() + Send + Sync>>,
    /// Cancelled when the other side wants no more of this stream.
    unwanted: Option<CancellationToken>,
}

impl ChunkWriter {
    pub(crate) fn new(
        packets: mpsc::Sender<Packet>,
        tag: u32,
        abandon: Option<Box<dyn FnOnce() + Send + Sync>>,
    ) -> Self {
        Self { packets: PollSender::new(packets), tag, ended: false, abandon, unwanted: None }
    }

    /// Dropped before its end, it ends nothing: the connection's own end will do.
    pub(crate) fn keep(mut self) -> Self {
        self.abandon = None;
        self
    }

    /// Writing fails once the token is cancelled.
    pub(crate) fn until(mut self, unwanted: CancellationToken) -> Self {
        self.unwanted = Some(unwanted);
        self
    }

    fn is_over(&self) -> bool {
        self.ended || self.unwanted.as_ref().is_some_and(CancellationToken::is_cancelled)
    }

    fn poll_send(&mut self, context: &mut Context<'_>, packet: Packet) -> Poll<io::Result<()>> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.packets.poll_reserve(context)).map_err(gone)?;
        Poll::Ready(self.packets.send_item(packet).map_err(gone))
    }
}

impl AsyncWrite for ChunkWriter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_over() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.packets.poll_reserve(context)).map_err(gone)?;
        let bytes = Bytes::copy_from_slice(&bytes[..bytes.len().min(MAX_PIECE)]);
        let (tag, count) = (self.tag, bytes.len());
        self.packets.send_item(Packet::Data { tag, bytes }).map_err(gone)?;
        Poll::Ready(Ok(count))
    }

    /// What was written is in order before everything that any stream writes later; there is nothing to wait for.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_over() {
            return Poll::Ready(Ok(()));
        }
        let tag = self.tag;
        ready!(self.poll_send(context, Packet::End { tag }))?;
        self.ended = true;
        Poll::Ready(Ok(()))
    }
}

impl Drop for ChunkWriter {
    fn drop(&mut self) {
        if let (false, Some(abandon)) = (self.ended, self.abandon.take()) {
            abandon();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn a_reader_that_does_not_read_holds_the_sender_and_one_that_is_gone_does_not() {
        let (inbox, mut reader) = inbox();
        let chunk = Bytes::from(vec![7; 64 * 1024]);
        for _ in 0..STREAM_BUFFER / chunk.len() {
            inbox.push(chunk.clone()).await;
        }
        let mut beyond = std::pin::pin!(inbox.push(chunk.clone()));
        assert!(futures::poll!(&mut beyond).is_pending());
        let mut taken = vec![0; 64 * 1024];
        reader.read_exact(&mut taken).await.unwrap();
        beyond.await;
        drop(reader);
        inbox.push(chunk).await;
    }
}
