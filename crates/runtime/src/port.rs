//! A connection to a port of a pod, as its client holds it; the guest's side is in [`a3s_box_protocol::chunks`].

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex, split};
use tokio::net::UnixStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use a3s_box_protocol::chunks::carry;

/// Bytes between the client and the task that carries them.
const BUFFER: usize = 64 * 1024;

/// What the client has sent before it went may take so long to be read in the pod.
const LINGER: Duration = Duration::from_secs(5);

/// Its shutdown is TCP's half-close. When it is dropped the connection in the pod ends, after what was sent.
#[derive(Debug)]
pub(crate) struct PortConnection {
    io: DuplexStream,
    /// Set before the stream ends, if that is no end of the server's.
    broken: Arc<OnceLock<io::ErrorKind>>,
    _gone: DropGuard,
}

impl PortConnection {
    /// Starts to carry.
    pub(crate) fn new(connection: UnixStream, tasks: &TaskTracker, closing: &CancellationToken) -> Self {
        let (io, inner) = duplex(BUFFER);
        let (gone, closing) = (CancellationToken::new(), closing.clone());
        let guard = gone.clone().drop_guard();
        let broken = Arc::new(OnceLock::new());
        let tell = broken.clone();
        tasks.spawn(async move {
            let ((mut from, mut to), (mut read, mut write)) = (split(connection), split(inner));
            let abandoned = async {
                gone.cancelled().await;
                tokio::time::sleep(LINGER).await;
            };
            tokio::select! {
                carried = carry(&mut from, &mut to, &mut read, &mut write) => {
                    if let Err(error) = carried {
                        tracing::debug!(%error, "a connection to a port of a pod broke");
                        tell.get_or_init(|| error.kind());
                    }
                }
                () = abandoned => {}
                () = closing.cancelled() => {}
            }
        });
        Self { io, broken, _gone: guard }
    }
}

impl AsyncRead for PortConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(context, buffer))?;
        match self.broken.get() {
            Some(&kind) if buffer.filled().len() == before && buffer.remaining() > 0 => {
                Poll::Ready(Err(kind.into()))
            }
            Some(_) | None => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for PortConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn connect() -> (PortConnection, UnixStream, TaskTracker) {
        let (near, far) = UnixStream::pair().unwrap();
        let tasks = TaskTracker::new();
        let connection = PortConnection::new(near, &tasks, &CancellationToken::new());
        tasks.close();
        (connection, far, tasks)
    }

    /// The guest's side of a connection whose server reads everything and answers with it.
    async fn echo(connection: UnixStream) -> io::Result<()> {
        let (server, inner) = duplex(1000);
        let ((mut from, mut to), (mut read, mut write)) = (split(connection), split(inner));
        let answer = async {
            let (mut questions, mut answers) = split(server);
            let mut got = Vec::new();
            questions.read_to_end(&mut got).await?;
            answers.write_all(&got).await?;
            answers.shutdown().await
        };
        tokio::try_join!(carry(&mut from, &mut to, &mut read, &mut write), answer).map(drop)
    }

    #[tokio::test]
    async fn both_directions_carry_bytes_and_end_by_themselves() {
        let (mut connection, far, tasks) = connect();
        let guest = tokio::spawn(echo(far));
        let sent: Vec<u8> = (0..200_000).map(|i: u32| (i % 241) as u8).collect();
        connection.write_all(&sent).await.unwrap();
        connection.shutdown().await.unwrap();
        let mut got = Vec::new();
        connection.read_to_end(&mut got).await.unwrap();
        assert!(got == sent);
        guest.await.unwrap().unwrap();
        tasks.wait().await;
    }

    #[tokio::test]
    async fn what_was_sent_before_the_client_went_arrives() {
        let (mut connection, far, tasks) = connect();
        connection.write_all(b"last words").await.unwrap();
        drop(connection);
        let (server, inner) = duplex(1000);
        let ((mut from, mut to), (mut read, mut write)) = (split(far), split(inner));
        let (mut words, mut nothing) = split(server);
        nothing.shutdown().await.unwrap();
        let mut got = Vec::new();
        let (carried, read) =
            tokio::join!(carry(&mut from, &mut to, &mut read, &mut write), words.read_to_end(&mut got));
        carried.unwrap();
        read.unwrap();
        assert_eq!(got, b"last words");
        tasks.wait().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_stays_is_left_when_the_client_has_gone() {
        let (connection, mut far, tasks) = connect();
        drop(connection);
        tasks.wait().await;
        let mut rest = Vec::new();
        far.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, [0; 4], "an end, and nothing else");
    }
}
