//! Reads what a guest sends as soon as it comes, whatever its reader waits for.
//!
//! One backend's VMM writes to the host's sockets without a time limit and from the thread that serves all of the box's
//! connections: a socket that is full stops every other stream of the box, and its agent's answers. What may be under
//! way is limited by what the host has acknowledged, so there is room for all of it here.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, SimplexStream, WriteHalf, simplex};
use tokio::net::unix::OwnedReadHalf;
use tokio_util::task::AbortOnDropHandle;

use a3s_box_protocol::MAX_UNACKNOWLEDGED;

/// The agent stops once so much is not acknowledged; what it was reading from the pipe then still comes.
const ROOM: usize = MAX_UNACKNOWLEDGED + 64 * 1024;

/// Read at once.
const BATCH: usize = 64 * 1024;

/// The reading end. Dropping it ends the reading.
#[derive(Debug)]
pub(crate) struct Drain {
    ready: ReadHalf<SimplexStream>,
    /// Taken when it has said how the connection ended.
    reading: Option<AbortOnDropHandle<io::Result<()>>>,
}

impl Drain {
    /// Starts to read. A guest that sends more than it may waits, and its box with it.
    pub(crate) fn start(mut from: OwnedReadHalf) -> Self {
        let (ready, mut inbox) = simplex(ROOM);
        let reading = tokio::spawn(async move {
            let ended = pass_on(&mut from, &mut inbox).await;
            // Dropping this half alone would not be seen by the other.
            inbox.shutdown().await.and(ended)
        });
        Self { ready, reading: Some(AbortOnDropHandle::new(reading)) }
    }

    /// Appends what has arrived to `buffer`; 0 is the end. Cancel safe.
    pub(crate) async fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        let count = self.ready.read_buf(buffer).await?;
        if count == 0
            && let Some(reading) = &mut self.reading
        {
            let ended = reading.await.unwrap_or_else(|aborted| Err(io::Error::other(aborted)));
            self.reading = None;
            ended?;
        }
        Ok(count)
    }
}

async fn pass_on(from: &mut OwnedReadHalf, inbox: &mut WriteHalf<SimplexStream>) -> io::Result<()> {
    let mut buffer = vec![0; BATCH];
    loop {
        match from.read(&mut buffer).await? {
            0 => return Ok(()),
            count => inbox.write_all(&buffer[..count]).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    /// A container printed into a log on a full disk, or a client stopped reading: the whole box stood still.
    #[tokio::test]
    async fn a_guest_never_waits_while_it_keeps_to_its_window() {
        let (near, mut guest) = UnixStream::pair().unwrap();
        let (from, _acknowledgements) = near.into_split();
        let mut drain = Drain::start(from);
        let sent: Vec<u8> = (0..MAX_UNACKNOWLEDGED).map(|i| (i % 251) as u8).collect();
        guest.write_all(&sent).await.unwrap();
        drop(guest);
        let mut got = Vec::new();
        while drain.read(&mut got).await.unwrap() > 0 {}
        assert!(got == sent);
        assert_eq!(drain.read(&mut got).await.unwrap(), 0, "an end stays");
    }

    /// Who breaks off is told from who ends: the first is connected to again.
    #[tokio::test]
    async fn a_broken_connection_is_an_error_after_its_bytes() {
        let (near, guest) = UnixStream::pair().unwrap();
        let (from, mut acknowledgements) = near.into_split();
        let mut drain = Drain::start(from);
        // Unread bytes at the guest's side make its close a reset.
        acknowledgements.write_all(b"unread").await.unwrap();
        guest.try_write(b"last").unwrap();
        drop(guest);
        let mut got = Vec::new();
        while got.len() < 4 {
            drain.read(&mut got).await.unwrap();
        }
        assert_eq!(drain.read(&mut got).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(got, b"last");
    }
}
