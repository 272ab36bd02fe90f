//! Clients of a running session's output. The log comes first: a client that does not keep up is let go.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

use super::format::Source;
use crate::attached::StreamReader;

/// What a client may be behind.
const BUFFER: usize = 1024 * 1024;

const TOO_SLOW: &[u8] = b"\na3s-box: this client did not keep up with the output and was disconnected\n";

/// The writer's side of one client.
#[derive(Debug)]
pub(crate) struct Tap {
    stdout: Option<DuplexStream>,
    stderr: Option<DuplexStream>,
    too_slow: Arc<AtomicBool>,
}

/// A tap with its client's readers; a terminal has no stderr.
pub(crate) fn tap(terminal: bool) -> (Tap, StreamReader, Option<StreamReader>) {
    let too_slow = Arc::new(AtomicBool::new(false));
    let ends = |last: bool| {
        let (near, far) = tokio::io::duplex(BUFFER);
        let rest = if last { TOO_SLOW } else { &[] };
        (far, Box::new(Client { near, too_slow: too_slow.clone(), rest, ended: false }) as StreamReader)
    };
    let (stdout, out) = ends(terminal);
    let (stderr, err) = if terminal { (None, None) } else { Some(ends(true)).unzip() };
    (Tap { stdout: Some(stdout), stderr, too_slow }, out, err)
}

impl Tap {
    /// Hands bytes over without waiting. `false`: the client is gone or too slow.
    pub(crate) fn offer(&mut self, source: Source, mut bytes: &[u8]) -> bool {
        let Some(stream) = self.stream(source) else { return true };
        let mut context = Context::from_waker(Waker::noop());
        while !bytes.is_empty() {
            match Pin::new(&mut *stream).poll_write(&mut context, bytes) {
                Poll::Ready(Ok(count @ 1..)) => bytes = &bytes[count..],
                Poll::Ready(Ok(0) | Err(_)) => return false,
                Poll::Pending => {
                    self.too_slow.store(true, Ordering::Release);
                    return false;
                }
            }
        }
        true
    }

    /// The output has ended.
    pub(crate) fn end(&mut self, source: Source) {
        match source {
            Source::Stdout => self.stdout = None,
            Source::Stderr => self.stderr = None,
        }
    }

    fn stream(&mut self, source: Source) -> Option<&mut DuplexStream> {
        match source {
            Source::Stdout => self.stdout.as_mut(),
            Source::Stderr => self.stderr.as_mut(),
        }
    }
}

/// The client's side: what was buffered, then word of why there is no more.
struct Client {
    near: DuplexStream,
    too_slow: Arc<AtomicBool>,
    rest: &'static [u8],
    ended: bool,
}

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.ended {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut self.near).poll_read(context, buffer))?;
            if buffer.filled().len() > before || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            self.ended = true;
        }
        if self.too_slow.load(Ordering::Acquire) {
            let take = self.rest.len().min(buffer.remaining());
            let (now, later) = self.rest.split_at(take);
            buffer.put_slice(now);
            self.rest = later;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn a_client_gets_both_outputs_until_they_end() {
        let (mut tap, mut out, err) = tap(false);
        assert!(tap.offer(Source::Stdout, b"out") && tap.offer(Source::Stderr, b"err"));
        tap.end(Source::Stdout);
        let mut text = String::new();
        out.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "out");
        drop(tap);
        text.clear();
        err.unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "err");
    }

    #[tokio::test]
    async fn a_client_that_does_not_keep_up_is_let_go_and_told() {
        let (mut tap, mut out, _) = tap(true);
        let chunk = vec![b'x'; 64 * 1024];
        let mut taken = 0;
        while tap.offer(Source::Stdout, &chunk) {
            taken += chunk.len();
        }
        assert_eq!(taken, BUFFER);
        drop(tap);
        let mut text = String::new();
        out.read_to_string(&mut text).await.unwrap();
        assert!(text.len() > BUFFER && text.ends_with("was disconnected\n"));
    }

    #[tokio::test]
    async fn a_client_that_is_gone_is_no_hindrance() {
        let (mut tap, out, err) = tap(false);
        drop((out, err));
        assert!(!tap.offer(Source::Stdout, b"x"));
    }
}
