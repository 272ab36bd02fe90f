//! A connection to a port of a pod, as its client holds it: bytes outside, pieces inside (see
//! [`a3s_box_protocol::chunks`]).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

use a3s_box_protocol::chunks::{HEADER, MAX_CHUNK, length};

/// Where the guest's direction is.
#[derive(Debug)]
enum Incoming {
    /// So many octets of the next length are there.
    Header([u8; HEADER], usize),
    /// So many bytes of a piece are still to come.
    Piece(usize),
    /// The guest has said its end.
    Ended,
}

/// Dropping it closes the connection in the pod.
#[derive(Debug)]
pub(crate) struct PortConnection {
    io: UnixStream,
    incoming: Incoming,
    /// A piece of which the socket has not taken everything.
    outgoing: Vec<u8>,
    sent: usize,
    ended: bool,
}

impl PortConnection {
    pub(crate) fn new(io: UnixStream) -> Self {
        let incoming = Incoming::Header([0; HEADER], 0);
        Self { io, incoming, outgoing: Vec::new(), sent: 0, ended: false }
    }

    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.outgoing.len() {
            let count = ready!(Pin::new(&mut self.io).poll_write(context, &self.outgoing[self.sent..]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += count;
        }
        self.outgoing.clear();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    fn queue(&mut self, bytes: &[u8]) {
        self.outgoing.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
        self.outgoing.extend_from_slice(bytes);
    }
}

impl AsyncRead for PortConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            match &mut this.incoming {
                Incoming::Ended => return Poll::Ready(Ok(())),
                Incoming::Header(header, have) => {
                    let mut rest = ReadBuf::new(&mut header[*have..]);
                    ready!(Pin::new(&mut this.io).poll_read(context, &mut rest))?;
                    let count = rest.filled().len();
                    if count == 0 {
                        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                    }
                    *have += count;
                    if *have == HEADER {
                        this.incoming = length(*header)?.map_or(Incoming::Ended, Incoming::Piece);
                    }
                }
                Incoming::Piece(left) => {
                    if buffer.remaining() == 0 {
                        return Poll::Ready(Ok(()));
                    }
                    // The buffer must know that these bytes are initialized, else it would clear them.
                    let room = buffer.remaining().min(*left);
                    let mut part = ReadBuf::new(buffer.initialize_unfilled_to(room));
                    ready!(Pin::new(&mut this.io).poll_read(context, &mut part))?;
                    let count = part.filled().len();
                    if count == 0 {
                        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                    }
                    buffer.advance(count);
                    *left -= count;
                    if *left == 0 {
                        this.incoming = Incoming::Header([0; HEADER], 0);
                    }
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for PortConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_drain(context))?;
        if self.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let count = bytes.len().min(MAX_CHUNK);
        // A piece without bytes would be the end.
        if count > 0 {
            self.queue(&bytes[..count]);
            if let Poll::Ready(Err(error)) = self.poll_drain(context) {
                return Poll::Ready(Err(error));
            }
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_drain(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.ended {
            ready!(self.poll_drain(context))?;
            self.ended = true;
            self.queue(&[]);
        }
        self.poll_drain(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use a3s_box_protocol::chunks::{pack, unpack};

    use super::*;

    #[tokio::test]
    async fn both_directions_carry_bytes_and_end_by_themselves() {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut from, mut to) = far.into_split();
        let guest = tokio::spawn(async move {
            let mut got = Vec::new();
            unpack(&mut from, &mut got).await.unwrap();
            // The host's end has come; the guest's direction goes on.
            pack(&mut got.as_slice(), &mut to).await.unwrap();
        });
        let mut connection = PortConnection::new(near);
        let sent: Vec<u8> = (0..200_000).map(|i: u32| (i % 241) as u8).collect();
        connection.write_all(&sent).await.unwrap();
        connection.shutdown().await.unwrap();
        let mut got = Vec::new();
        connection.read_to_end(&mut got).await.unwrap();
        assert!(got == sent);
        guest.await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_lies_about_a_length_or_breaks_off_is_an_error() {
        for (bytes, kind) in [
            (&[0xff, 0xff, 0xff, 0xff, 1][..], io::ErrorKind::InvalidData),
            (&[0, 0, 0, 9, 1][..], io::ErrorKind::UnexpectedEof),
            (&[0, 0][..], io::ErrorKind::UnexpectedEof),
        ] {
            let (near, mut far) = UnixStream::pair().unwrap();
            far.write_all(bytes).await.unwrap();
            drop(far);
            let error = PortConnection::new(near).read_to_end(&mut Vec::new()).await.unwrap_err();
            assert_eq!(error.kind(), kind);
        }
    }
}
