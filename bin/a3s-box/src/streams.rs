//! Copying between our stdio and a session's streams, and signals on their way to it.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use a3s_box_runtime::{StdinWriter, StreamReader};

/// How copying an output ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    /// The session closed it.
    ToTheEnd,
    /// Nobody reads ours any more.
    ReaderGone,
}

/// Copies a session's output to ours, each piece at once.
pub(crate) async fn output(mut from: StreamReader, mut to: impl AsyncWrite + Unpin) -> io::Result<Copied> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(Copied::ToTheEnd);
        }
        let written = async {
            to.write_all(&buffer[..read]).await?;
            to.flush().await
        };
        match written.await {
            Ok(()) => {}
            // EIO is what a terminal that was closed says.
            Err(error)
                if error.kind() == io::ErrorKind::BrokenPipe
                    || error.raw_os_error() == Some(nix::libc::EIO) =>
            {
                return Ok(Copied::ReaderGone);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Copies both outputs to their ends, or until one of ours has no reader any more.
pub(crate) async fn outputs(
    stdout: Option<StreamReader>,
    stderr: Option<StreamReader>,
) -> io::Result<Copied> {
    let (stdout, stderr) = (one(stdout, tokio::io::stdout()), one(stderr, tokio::io::stderr()));
    tokio::pin!(stdout, stderr);
    let first = tokio::select! {
        first = &mut stdout => first?,
        first = &mut stderr => {
            return Ok(if first? == Copied::ReaderGone { Copied::ReaderGone } else { stdout.await? });
        }
    };
    Ok(if first == Copied::ReaderGone { Copied::ReaderGone } else { stderr.await? })
}

async fn one(from: Option<StreamReader>, to: impl AsyncWrite + Unpin) -> io::Result<Copied> {
    match from {
        Some(from) => output(from, to).await,
        None => Ok(Copied::ToTheEnd),
    }
}

/// Copies our stdin to a session's until either ends. A session that closed its stdin is no failure.
pub(crate) async fn input(mut to: StdinWriter) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(read @ 1..) = stdin.read(&mut buffer).await {
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
        if to.flush().await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

/// Something the user's side tells a running command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A signal, by number.
    Signal(i32),
    /// The terminal has another size.
    Resized,
}

/// Signals that are forwarded.
const FORWARDED: [i32; 6] = [
    nix::libc::SIGINT,
    nix::libc::SIGTERM,
    nix::libc::SIGHUP,
    nix::libc::SIGQUIT,
    nix::libc::SIGUSR1,
    nix::libc::SIGUSR2,
];

/// Catches this process's signals from now on.
pub(crate) fn listen() -> io::Result<mpsc::Receiver<Event>> {
    let (sender, receiver) = mpsc::channel(16);
    for number in FORWARDED {
        forward(number, Event::Signal(number), sender.clone())?;
    }
    forward(nix::libc::SIGWINCH, Event::Resized, sender)?;
    Ok(receiver)
}

fn forward(number: i32, event: Event, sender: mpsc::Sender<Event>) -> io::Result<()> {
    let mut signals = signal(SignalKind::from_raw(number))?;
    tokio::spawn(async move {
        while signals.recv().await.is_some() {
            if sender.send(event).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// What is done with a signal that asks a command to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// It gets the signal.
    Forward,
    /// It gets the signal, and the user a hint.
    ForwardAndHint,
    /// It is killed.
    Kill,
}

/// Counts a user's attempts to end a command: programs that are process 1 of their box ignore what they do not
/// handle, so that the third attempt kills.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    made: u32,
}

impl Attempts {
    pub(crate) fn decide(&mut self, number: i32) -> Urgency {
        if number != nix::libc::SIGINT && number != nix::libc::SIGTERM {
            return Urgency::Forward;
        }
        self.made += 1;
        match self.made {
            1 => Urgency::Forward,
            2 => Urgency::ForwardAndHint,
            _ => Urgency::Kill,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use super::*;

    struct Broken(i32);

    impl AsyncWrite for Broken {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::Error::from_raw_os_error(self.0)))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn saying(text: &'static str) -> StreamReader {
        Box::new(text.as_bytes())
    }

    #[tokio::test]
    async fn output_is_copied_to_its_end() {
        let mut seen = Vec::new();
        assert_eq!(output(saying("hello"), &mut seen).await.unwrap(), Copied::ToTheEnd);
        assert_eq!(seen, b"hello");
    }

    #[tokio::test]
    async fn a_closed_pipe_or_terminal_ends_the_copy_without_an_error() {
        for errno in [nix::libc::EPIPE, nix::libc::EIO] {
            assert_eq!(output(saying("x"), Broken(errno)).await.unwrap(), Copied::ReaderGone);
        }
        assert!(output(saying("x"), Broken(nix::libc::ENOSPC)).await.is_err());
    }

    #[test]
    fn the_third_attempt_to_end_kills() {
        let mut attempts = Attempts::default();
        let decided = [15, nix::libc::SIGUSR1, 2, 2].map(|number| attempts.decide(number));
        assert_eq!(decided, [Urgency::Forward, Urgency::Forward, Urgency::ForwardAndHint, Urgency::Kill]);
    }
}
