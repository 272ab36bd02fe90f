//! The task that reads a connection.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

use super::connection::{LINGER, Shared, Stream};
use super::frame::{Decoder, Frame, SpdyError, goodbye, status};
use super::headers::Headers;
use super::streams::due;

/// Streams that are open at the same time.
pub(super) const MAX_STREAMS: usize = 1024;
/// Streams beyond that are refused one by one; a peer that goes on is cut off.
const MAX_REFUSED: usize = 1000;
/// What all streams of a connection keep for readers that do not read.
const MAX_BUFFERED: usize = 8 << 20;
/// What is charged for a piece of data besides its bytes: what keeping it costs.
const OVERHEAD: usize = 256;
/// Shorter pieces are copied, so that they do not keep the block that they were read in.
const COPIED: usize = 16 * 1024;
/// As much is read at once.
const BLOCK: usize = 64 * 1024;

pub(super) struct Reader {
    shared: Arc<Shared>,
    /// Absent on the side that opens streams: it accepts none.
    accept: Option<mpsc::Sender<Stream>>,
    room: Arc<Semaphore>,
    refused: usize,
    /// Bytes that came on any stream since the last window update for the connection.
    uncredited: u32,
}

/// Data with its share of a connection's memory.
struct Charged {
    bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Charged {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, accept: Option<mpsc::Sender<Stream>>) -> Self {
        Self { shared, accept, room: Arc::new(Semaphore::new(MAX_BUFFERED)), refused: 0, uncredited: 0 }
    }

    pub(super) async fn run(mut self, mut from: impl AsyncRead + Unpin) {
        let shared = self.shared.clone();
        // Ends the writer, and with it everybody who writes.
        let _over = shared.over.clone().drop_guard();
        // Whoever else ends the connection is not to wait for the other side.
        let outcome = tokio::select! {
            biased;
            () = shared.over.cancelled() => Ok(()),
            outcome = self.read(&mut from) => outcome,
        };
        // Ends everybody who reads or accepts.
        shared.streams.clear();
        drop(self);
        if let Err(error) = outcome {
            tracing::debug!(%error, "a SPDY connection is ended");
            shared.finish(goodbye::PROTOCOL_ERROR);
            timeout(LINGER, shared.over.cancelled()).await.ok();
        }
    }

    async fn read(&mut self, from: &mut (impl AsyncRead + Unpin)) -> Result<(), SpdyError> {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::with_capacity(BLOCK);
        loop {
            while let Some(frame) = decoder.next(&mut buffer)? {
                self.take(frame).await?;
            }
            buffer.reserve(BLOCK);
            match from.read_buf(&mut buffer).await {
                Ok(1..) => self.shared.activity.touch(),
                Ok(0) | Err(_) => return Ok(()),
            }
        }
    }

    async fn take(&mut self, frame: Frame) -> Result<(), SpdyError> {
        let Shared { streams, outbox, .. } = &*self.shared;
        match frame {
            Frame::SynStream { id, fin, headers } => self.open(id, fin, headers).await?,
            Frame::Data { id, fin, bytes } => {
                self.data(id, bytes).await;
                if fin {
                    self.shared.streams.end_receiving(id);
                }
            }
            Frame::SynReply { id, fin: true, .. } | Frame::Headers { id, fin: true, .. } => {
                streams.end_receiving(id);
            }
            Frame::Reset { id, .. } => {
                streams.remove(id);
            }
            // Those with our own numbers would be answers; we ask nothing.
            Frame::Ping(id) if self.is_peers(id) => outbox.answer(Frame::Ping(id)).await,
            Frame::SynReply { .. }
            | Frame::Headers { .. }
            | Frame::Ping(_)
            | Frame::GoAway { .. }
            | Frame::WindowUpdate { .. } => {}
        }
        Ok(())
    }

    /// Numbers of the side that opens streams are odd.
    fn is_peers(&self, id: u32) -> bool {
        id.is_multiple_of(2) != self.accept.is_some()
    }

    async fn open(&mut self, id: u32, fin: bool, headers: Headers) -> Result<(), SpdyError> {
        if !self.is_peers(id) || self.shared.last.fetch_max(id, Ordering::Relaxed) >= id {
            return Err(SpdyError::StreamId(id));
        }
        let accept = self.accept.as_ref().filter(|_| self.shared.streams.len() < MAX_STREAMS);
        let Some(accept) = accept else {
            self.refused += 1;
            if self.refused > MAX_REFUSED {
                return Err(SpdyError::Flood(MAX_REFUSED));
            }
            self.shared.outbox.answer(Frame::Reset { id, status: status::REFUSED_STREAM }).await;
            return Ok(());
        };
        self.shared.outbox.answer(Frame::SynReply { id, fin: false, headers: Vec::new() }).await;
        let stream = self.shared.stream(id, headers);
        if fin {
            self.shared.streams.end_receiving(id);
        }
        // Nobody accepts any more: dropping the stream resets it.
        accept.send(stream).await.ok();
        Ok(())
    }

    /// Hands data to its stream, waiting while that is full; data of no stream is thrown away.
    async fn data(&mut self, id: u32, bytes: Bytes) {
        let count = bytes.len() as u32;
        if let Some(inbox) = self.shared.streams.inbox(id) {
            inbox.push(self.charged(bytes).await).await;
        }
        // For peers that honour windows: those in Go send whatever they like.
        if let Some(delta) = self.shared.streams.received(id, count) {
            self.shared.outbox.credit(id, delta);
        }
        if let Some(delta) = due(&mut self.uncredited, count) {
            self.shared.outbox.credit(0, delta);
        }
    }

    async fn charged(&self, bytes: Bytes) -> Bytes {
        let size = (bytes.len() + OVERHEAD) as u32;
        // Never closed.
        let room = self.room.clone().acquire_many_owned(size).await.ok();
        let bytes = if bytes.len() < COPIED { Bytes::copy_from_slice(&bytes) } else { bytes };
        Bytes::from_owner(Charged { bytes, _room: room })
    }
}
