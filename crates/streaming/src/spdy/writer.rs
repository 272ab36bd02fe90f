//! The task that writes a connection.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::connection::Shared;
use super::frame::{Encoder, Frame, goodbye};
use crate::chunks::Packet;

/// As much is written at once.
const BATCH: usize = 128 * 1024;

pub(super) async fn run(
    mut to: impl AsyncWrite + Unpin,
    mut packets: mpsc::Receiver<Packet>,
    shared: Arc<Shared>,
) {
    let outcome = tokio::select! {
        biased;
        () = shared.over.cancelled() => return,
        outcome = write(&mut to, &mut packets, &shared) => outcome,
    };
    // After a good-bye without reproach the other side may still read, and closes when it has.
    if outcome.is_err() || shared.farewell() != goodbye::OK {
        shared.over.cancel();
    }
}

/// Until the connection is finished.
async fn write(
    to: &mut (impl AsyncWrite + Unpin),
    packets: &mut mpsc::Receiver<Packet>,
    shared: &Shared,
) -> io::Result<()> {
    let mut encoder = Encoder::default();
    let mut out = BytesMut::with_capacity(BATCH);
    loop {
        // What answers comes before data; the end comes after all that was queued.
        let (mut packet, mut last) = tokio::select! {
            biased;
            () = shared.outbox.filled() => (None, false),
            Some(packet) = packets.recv() => (Some(packet), false),
            () = shared.finish.cancelled() => (None, true),
        };
        loop {
            // In this order: a stream's first frame is in the outbox before anybody can write to it.
            for frame in shared.outbox.take() {
                put(&mut encoder, &frame, &mut out);
            }
            if let Some(packet) = packet.take() {
                put_packet(&mut encoder, packet, shared, &mut out);
            }
            if out.len() >= BATCH {
                last = false;
                break;
            }
            match packets.try_recv() {
                Ok(next) => packet = Some(next),
                Err(_) => break,
            }
        }
        if last {
            let accepted = shared.last.load(Ordering::Relaxed);
            put(&mut encoder, &Frame::GoAway { last: accepted, status: shared.farewell() }, &mut out);
        }
        to.write_all(&out).await?;
        to.flush().await?;
        shared.activity.touch();
        if last {
            return to.shutdown().await;
        }
        out.clear();
    }
}

fn put_packet(encoder: &mut Encoder, packet: Packet, shared: &Shared, out: &mut BytesMut) {
    let (Packet::Data { tag: id, .. } | Packet::End { tag: id }) = packet;
    // A stream that was reset takes nothing any more.
    if !shared.streams.sends(id) {
        return;
    }
    match packet {
        Packet::Data { bytes, .. } => put(encoder, &Frame::Data { id, fin: false, bytes }, out),
        Packet::End { .. } => {
            put(encoder, &Frame::Data { id, fin: true, bytes: Bytes::new() }, out);
            shared.streams.end_sending(id);
        }
    }
}

fn put(encoder: &mut Encoder, frame: &Frame, out: &mut BytesMut) {
    if let Err(error) = encoder.put(frame, out) {
        tracing::debug!(%error, "a frame could not be written");
    }
}
