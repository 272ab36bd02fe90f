//! How the two directions of a TCP stream share one connection with the guest.
//!
//! ```text
//! frame:  u32, big-endian; its highest bit tells the kind
//!         0 | length   a piece of that many bytes, which follow; length 0 ends the direction
//!         1 | count    so many bytes of the other direction have reached their reader
//! ```
//!
//! A side sends at most [`WINDOW`] bytes more than the other side has said to have passed on, and always reads what
//! comes. So a stream that nobody reads stops itself only: one backend's VMM stands still, with everything in its box,
//! while a connection to the host is full. The end is told in band because the devices of boxes that still run need not
//! pass on the half-close of a connection.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, simplex};
use tokio::sync::{Semaphore, watch};

use crate::MAX_GUEST_WRITE;

/// Bytes that one direction may have under way.
pub const WINDOW: usize = 512 * 1024;

/// Octets before a piece.
const HEADER: usize = 4;

/// The most bytes of one piece: with its length it fits into one write of the guest.
const MAX_CHUNK: usize = MAX_GUEST_WRITE - HEADER;

/// Bytes taken from a stream, or from the connection, at once.
const BATCH: usize = 64 * 1024;

/// Bytes are reported as passed on when there are so many, or when there are no more.
const REPORT: usize = WINDOW / 4;

const PASSED_ON: u32 = 1 << 31;

#[derive(Debug, PartialEq, Eq)]
enum Frame {
    Piece(usize),
    End,
    PassedOn(usize),
}

impl Frame {
    fn read(header: [u8; HEADER]) -> io::Result<Self> {
        let word = u32::from_be_bytes(header);
        match (word & PASSED_ON != 0, (word & !PASSED_ON) as usize) {
            (false, 0) => Ok(Self::End),
            (false, length @ 1..=MAX_CHUNK) => Ok(Self::Piece(length)),
            (true, count @ 1..=WINDOW) => Ok(Self::PassedOn(count)),
            (false, length) => {
                Err(invalid(format!("a piece of {length} bytes; at most {MAX_CHUNK} are allowed")))
            }
            (true, count) => Err(invalid(format!("{count} bytes passed on; at most {WINDOW} are under way"))),
        }
    }

    fn header(&self) -> [u8; HEADER] {
        let word = match *self {
            Self::Piece(length) => length as u32,
            Self::End => 0,
            Self::PassedOn(count) => count as u32 | PASSED_ON,
        };
        word.to_be_bytes()
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// Carries a stream over a connection until both directions have ended and everything has been passed on at the other
/// side. Host and guest do the same; `read` and `write` are the stream's local end. Dropping the future breaks the
/// stream.
pub async fn carry(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    read: &mut (impl AsyncRead + Unpin),
    write: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let (mut inbox, mut arrivals) = simplex(WINDOW);
    let incoming = Incoming { window: Semaphore::new(WINDOW), ended: AtomicBool::new(false) };
    let (passed_on, reports) = watch::channel(Passed::default());
    let both = async {
        tokio::try_join!(
            deliver(&mut inbox, write, &incoming.ended, passed_on),
            send(read, to, &incoming.window, reports)
        )
    };
    tokio::select! {
        biased;
        done = both => done.map(drop),
        Err(error) = receive(from, &mut arrivals, &incoming) => Err(error),
    }
}

/// What the other side has said.
struct Incoming {
    /// How many bytes it will take. Closed with the connection.
    window: Semaphore,
    /// It has said its end.
    ended: AtomicBool,
}

/// How much has reached the local end.
#[derive(Debug, Default, Clone, Copy)]
struct Passed {
    bytes: u64,
    /// That was all.
    all: bool,
}

/// Reads the connection, and never waits for anybody else.
async fn receive(
    from: &mut (impl AsyncRead + Unpin),
    arrivals: &mut (impl AsyncWrite + Unpin),
    incoming: &Incoming,
) -> io::Result<()> {
    let mut from = BufReader::with_capacity(BATCH, from);
    loop {
        let mut header = [0; HEADER];
        match from.read_exact(&mut header).await {
            Ok(_) => {}
            // The other side may go when both have had everything: whether that is so is decided where it is known.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error),
        }
        match Frame::read(header)? {
            Frame::Piece(_) if incoming.ended.load(Ordering::Relaxed) => {
                return Err(invalid("a piece after the end".to_owned()));
            }
            Frame::Piece(length) => {
                let mut left = length;
                while left > 0 {
                    let bytes = from.fill_buf().await?;
                    let bytes = &bytes[..bytes.len().min(left)];
                    if bytes.is_empty() {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    let within = tokio::task::unconstrained(arrivals.write_all(bytes));
                    // With the window kept there is room, so that this is done at once.
                    tokio::select! {
                        biased;
                        written = within => written?,
                        () = std::future::ready(()) => {
                            return Err(invalid("more bytes than were asked for".to_owned()));
                        }
                    }
                    let count = bytes.len();
                    from.consume(count);
                    left -= count;
                }
            }
            Frame::End => {
                incoming.ended.store(true, Ordering::Relaxed);
                arrivals.shutdown().await?;
            }
            Frame::PassedOn(count) => {
                if incoming.window.available_permits() + count > WINDOW {
                    return Err(invalid("more bytes passed on than were sent".to_owned()));
                }
                incoming.window.add_permits(count);
            }
        }
    }
    incoming.window.close();
    arrivals.shutdown().await
}

/// Passes on what has arrived, and its end.
async fn deliver(
    inbox: &mut (impl AsyncRead + Unpin),
    write: &mut (impl AsyncWrite + Unpin),
    ended: &AtomicBool,
    passed_on: watch::Sender<Passed>,
) -> io::Result<()> {
    let mut buffer = vec![0; BATCH];
    loop {
        let count = inbox.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        write.write_all(&buffer[..count]).await?;
        passed_on.send_modify(|passed| passed.bytes += count as u64);
    }
    if !ended.load(Ordering::Relaxed) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    write.shutdown().await?;
    passed_on.send_modify(|passed| passed.all = true);
    Ok(())
}

/// Sends the local end's bytes as far as the other side takes them, and reports to it what it was passed on.
async fn send(
    read: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    window: &Semaphore,
    mut reports: watch::Receiver<Passed>,
) -> io::Result<()> {
    let mut buffer = vec![0; HEADER + BATCH];
    let (mut reported, mut ended) = (0, false);
    loop {
        let due = |passed: &Passed| passed.bytes - reported >= REPORT as u64 || passed.all;
        let passed = *reports.borrow_and_update();
        if due(&passed) && passed.bytes > reported {
            let count = (passed.bytes - reported).min(WINDOW as u64);
            let written = async {
                to.write_all(&Frame::PassedOn(count as usize).header()).await?;
                to.flush().await
            };
            match written.await {
                // Who has had everything may be gone.
                Err(error) if !(ended && passed.all) => return Err(error),
                Ok(()) | Err(_) => reported += count,
            }
            continue;
        }
        if ended && passed.all {
            break;
        }
        tokio::select! {
            biased;
            known = async { reports.wait_for(due).await.is_ok() }, if !passed.all => {
                // `deliver` says that it has ended before it ends.
                if !known {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            count = read_within(read, &mut buffer[HEADER..], window), if !ended => {
                let count = count?;
                ended = count == 0;
                if ended {
                    to.write_all(&Frame::End.header()).await?;
                }
                let mut sent = 0;
                while sent < count {
                    let length = (count - sent).min(MAX_CHUNK);
                    // Where a piece's header goes lie the last octets of the piece before it, which are sent.
                    buffer[sent..sent + HEADER].copy_from_slice(&Frame::Piece(length).header());
                    to.write_all(&buffer[sent..sent + HEADER + length]).await?;
                    sent += length;
                }
                to.flush().await?;
            }
        }
    }
    // Closing before the other side has it all could lose what is on the way.
    match window.acquire_many(WINDOW as u32).await {
        Ok(_) => Ok(()),
        Err(_) if window.available_permits() == WINDOW => Ok(()),
        Err(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Reads as much as the window allows, at least a byte. Cancel safe. 0 is the end.
async fn read_within(
    read: &mut (impl AsyncRead + Unpin),
    buffer: &mut [u8],
    window: &Semaphore,
) -> io::Result<usize> {
    if window.acquire().await.is_err() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    // Only this side takes permits: there cannot become fewer.
    let room = window.available_permits().min(buffer.len());
    let count = read.read(&mut buffer[..room]).await?;
    window.forget_permits(count);
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{DuplexStream, duplex, split};
    use tokio::task::JoinHandle;

    use super::*;

    /// One side: its local end and its task.
    fn side(connection: DuplexStream) -> (DuplexStream, JoinHandle<io::Result<()>>) {
        let (local, inner) = duplex(1000);
        let task = tokio::spawn(async move {
            let ((mut from, mut to), (mut read, mut write)) = (split(connection), split(inner));
            carry(&mut from, &mut to, &mut read, &mut write).await
        });
        (local, task)
    }

    fn sample(length: u32) -> Vec<u8> {
        (0..length).map(|i| (i % 251) as u8).collect()
    }

    /// A side whose other side the test plays.
    fn half() -> (DuplexStream, DuplexStream, JoinHandle<io::Result<()>>) {
        let (near, far) = duplex(4 * WINDOW);
        let (local, task) = side(near);
        (local, far, task)
    }

    #[tokio::test]
    async fn both_directions_carry_bytes_and_end_by_themselves() {
        let (near, far) = duplex(1000);
        let ((mut here, near), (mut there, far)) = (side(near), side(far));
        let sent = sample(3_000_000);
        let echo = tokio::spawn(async move {
            let mut got = Vec::new();
            there.read_to_end(&mut got).await.unwrap();
            // The other direction's end has come; this one goes on.
            there.write_all(&got).await.unwrap();
            there.shutdown().await.unwrap();
        });
        here.write_all(&sent).await.unwrap();
        here.shutdown().await.unwrap();
        let mut got = Vec::new();
        here.read_to_end(&mut got).await.unwrap();
        assert!(got == sent);
        echo.await.unwrap();
        near.await.unwrap().unwrap();
        far.await.unwrap().unwrap();
    }

    /// A guest that answers before it reads must not wait for a client that sends before it reads, and the
    /// connection must never stand still.
    #[tokio::test(start_paused = true)]
    async fn a_direction_that_nobody_reads_does_not_stop_the_other() {
        let (near, far) = duplex(1000);
        let ((mut here, _near), (mut there, _far)) = (side(near), side(far));
        let (sent, answer) = (sample(3 * WINDOW as u32), sample(3 * WINDOW as u32 + 1));
        let expected = answer.clone();
        let server = tokio::spawn(async move {
            there.write_all(&answer).await.unwrap();
            there.shutdown().await.unwrap();
            there
        });
        // Nobody reads this at the other end: the window and the buffers take some, then it waits.
        let stuck = tokio::time::timeout(Duration::from_secs(5), here.write_all(&sent)).await;
        assert!(stuck.is_err());
        let mut got = Vec::new();
        here.read_to_end(&mut got).await.unwrap();
        assert!(got == expected);
        server.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_the_window_is_sent_unasked() {
        let (mut local, mut far, task) = half();
        let sent = sample(2 * WINDOW as u32);
        let write = tokio::time::timeout(Duration::from_secs(1), local.write_all(&sent)).await;
        assert!(write.is_err(), "nobody has passed on anything");
        let mut got = 0;
        let mut header = [0; HEADER];
        while let Ok(read) = tokio::time::timeout(Duration::from_secs(1), far.read_exact(&mut header)).await {
            read.unwrap();
            let Frame::Piece(length) = Frame::read(header).unwrap() else { panic!("{header:?}") };
            far.read_exact(&mut vec![0; length]).await.unwrap();
            got += length;
        }
        assert_eq!(got, WINDOW);
        task.abort();
    }

    #[tokio::test]
    async fn a_side_that_breaks_the_rules_is_an_error() {
        let many = |count: usize| {
            let piece = [&Frame::Piece(MAX_CHUNK).header()[..], &[7; MAX_CHUNK]].concat();
            piece.repeat(count)
        };
        let after_the_end = [&Frame::End.header()[..], &Frame::Piece(1).header(), b"x"].concat();
        for (bytes, kind) in [
            (vec![0x7f, 0xff, 0xff, 0xff, 1], io::ErrorKind::InvalidData),
            (Frame::PassedOn(1).header().to_vec(), io::ErrorKind::InvalidData),
            (vec![0x80, 0, 0, 0], io::ErrorKind::InvalidData),
            (after_the_end, io::ErrorKind::InvalidData),
            (many(WINDOW / MAX_CHUNK + 2), io::ErrorKind::InvalidData),
            (vec![0, 0, 0, 9, 1], io::ErrorKind::UnexpectedEof),
            (vec![0, 0], io::ErrorKind::UnexpectedEof),
            (vec![], io::ErrorKind::UnexpectedEof),
        ] {
            let (local, mut far, task) = half();
            far.write_all(&bytes).await.unwrap();
            drop(far);
            assert_eq!(task.await.unwrap().unwrap_err().kind(), kind, "{} bytes", bytes.len());
            drop(local);
        }
    }

    #[tokio::test]
    async fn who_goes_before_it_has_taken_everything_is_an_error() {
        let (mut local, mut far, task) = half();
        local.write_all(b"word").await.unwrap();
        local.shutdown().await.unwrap();
        far.write_all(&Frame::End.header()).await.unwrap();
        let mut got = [0; 12];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"\0\0\0\x04word\0\0\0\0");
        drop(far);
        assert_eq!(task.await.unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn who_has_taken_everything_may_go() {
        let (mut local, mut far, task) = half();
        local.write_all(b"word").await.unwrap();
        local.shutdown().await.unwrap();
        far.read_exact(&mut [0; 12]).await.unwrap();
        far.write_all(&[Frame::End.header(), Frame::PassedOn(4).header()].concat()).await.unwrap();
        drop(far);
        task.await.unwrap().unwrap();
    }
}
