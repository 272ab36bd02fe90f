//! How a layer's bytes get from the network, or from a file, to the thread that converts them.

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::traffic::Traffic;
use crate::digest::Digest;
use crate::progress::PullProgress;
use crate::registry::BlobSink;

/// Bytes of one blob between the network and the thread that converts it: a bound on memory.
const QUEUE_BYTES: usize = 1 << 20;
/// Pieces of it; small ones count by number, so that their bookkeeping is bounded too.
const QUEUE_PIECES: usize = 64;

/// Tells who wants to know how much of a layer has come.
pub(super) struct Meter {
    pub(super) progress: Arc<dyn PullProgress>,
    pub(super) traffic: Arc<Traffic>,
    pub(super) layer: Digest,
    pub(super) bytes: u64,
}

impl Meter {
    fn add(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        self.traffic.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.progress.layer_bytes(&self.layer, self.bytes);
    }
}

/// What goes from the network to the converting thread.
enum Piece {
    /// With its share of the queue, which the reader gives back.
    Bytes(Bytes, Option<OwnedSemaphorePermit>),
    /// The blob is complete; without it the channel closed early.
    End,
}

/// The two ends of a queue.
pub(super) fn queue(meter: Meter) -> (Feed, Pieces) {
    let (sender, receiver) = mpsc::channel(QUEUE_PIECES);
    let feed = Feed { sender, room: Arc::new(Semaphore::new(QUEUE_BYTES)), meter };
    (feed, Pieces { receiver, piece: Bytes::new(), share: None, ended: false })
}

/// The network's end.
pub(super) struct Feed {
    sender: mpsc::Sender<Piece>,
    room: Arc<Semaphore>,
    pub(super) meter: Meter,
}

impl Feed {
    /// Says that the blob is complete.
    pub(super) async fn end(self) {
        // A reader that has gone away told why.
        let _ = self.sender.send(Piece::End).await;
    }
}

impl BlobSink for Feed {
    async fn take(&mut self, bytes: Bytes) -> bool {
        self.meter.add(bytes.len());
        let share = bytes.len().min(QUEUE_BYTES) as u32;
        let share = tokio::select! {
            share = Arc::clone(&self.room).acquire_many_owned(share) => share.ok(),
            // Who waits for room must not wait for a reader that has gone away.
            () = self.sender.closed() => return false,
        };
        self.sender.send(Piece::Bytes(bytes, share)).await.is_ok()
    }
}

/// The converting thread's end.
pub(super) struct Pieces {
    receiver: mpsc::Receiver<Piece>,
    piece: Bytes,
    share: Option<OwnedSemaphorePermit>,
    ended: bool,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            // What was read is not in memory any more before more is.
            (self.piece, self.share) = (Bytes::new(), None);
            match self.receiver.blocking_recv() {
                Some(Piece::Bytes(bytes, share)) => (self.piece, self.share) = (bytes, share),
                Some(Piece::End) => self.ended = true,
                None => return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the download stopped")),
            }
        }
        let n = buffer.len().min(self.piece.len());
        buffer[..n].copy_from_slice(&self.piece.split_to(n));
        Ok(n)
    }
}

/// A blob in a file, read as long as the pull lives.
pub(super) struct WatchedFile {
    pub(super) file: io::Take<File>,
    pub(super) alive: Weak<()>,
    pub(super) meter: Meter,
}

impl Read for WatchedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.alive.strong_count() == 0 {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the pull was given up"));
        }
        let n = self.file.read(buffer)?;
        if n > 0 {
            self.meter.add(n);
        }
        Ok(n)
    }
}
