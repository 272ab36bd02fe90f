//! Stdin of one process.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, Interest};
use tokio::sync::watch;

/// Bytes that are taken from the host at once.
const CHUNK: usize = 64 * 1024;

/// What a connection must know.
#[derive(Debug, Clone)]
struct State {
    /// `None` once it is closed.
    pipe: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Counts connections; the newest one writes.
    connection: u64,
}

/// Our end of a process's stdin.
#[derive(Debug)]
pub struct Input {
    state: watch::Sender<State>,
    /// A terminal stays open when the host's bytes end: closing it would hang up its session.
    is_terminal: bool,
}

impl Input {
    /// For a pipe.
    pub fn pipe(pipe: OwnedFd) -> io::Result<Self> {
        Self::new(pipe, false)
    }

    /// For a terminal's master.
    pub fn terminal(master: OwnedFd) -> io::Result<Self> {
        Self::new(master, true)
    }

    fn new(pipe: OwnedFd, is_terminal: bool) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&pipe, true)?;
        let pipe = crate::sys::poll(pipe, Interest::WRITABLE)?;
        Ok(Self {
            state: watch::Sender::new(State { pipe: Some(Arc::new(pipe)), connection: 0 }),
            is_terminal,
        })
    }

    /// The process reads the end of its input.
    pub fn close(&self) {
        self.state.send_modify(|s| s.pipe = None);
    }

    /// Copies the host's bytes until they end, the input is closed, or a newer connection takes over. The end of the
    /// bytes closes the input, unless it is to stay open.
    pub async fn copy_from(
        &self,
        from_host: &mut (impl AsyncRead + Unpin),
        stay_open: bool,
    ) -> io::Result<()> {
        let mut number = 0;
        self.state.send_modify(|s| {
            s.connection += 1;
            number = s.connection;
        });
        let mut state = self.state.subscribe();
        let over = |s: &State| s.pipe.is_none() || s.connection != number;
        tokio::select! {
            copied = self.copy(from_host) => {
                if !stay_open && !self.is_terminal && copied.is_ok() {
                    self.close();
                }
                copied
            }
            _ = state.wait_for(over) => Ok(()),
        }
    }

    async fn copy(&self, from_host: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(CHUNK);
        loop {
            bytes.clear();
            if from_host.read_buf(&mut bytes).await? == 0 {
                return Ok(());
            }
            let Some(pipe) = self.state.borrow().pipe.clone() else { return Ok(()) };
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let written = pipe.async_io(Interest::WRITABLE, |pipe| match rustix::io::write(pipe, rest) {
                    Err(Errno::INTR) => Ok(0),
                    other => Ok(other?),
                });
                rest = &rest[written.await?..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::io::Read;

    #[tokio::test]
    async fn the_end_of_the_hosts_bytes_is_the_end_of_stdin() {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let input = Input::pipe(write).unwrap();
        input.copy_from(&mut &b"abc"[..], false).await.unwrap();
        let mut text = String::new();
        std::fs::File::from(read).read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
    }

    #[tokio::test]
    async fn stdin_that_stays_open_takes_a_second_connection() {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let input = Input::pipe(write).unwrap();
        input.copy_from(&mut &b"one "[..], true).await.unwrap();
        input.copy_from(&mut &b"two"[..], false).await.unwrap();
        let mut text = String::new();
        std::fs::File::from(read).read_to_string(&mut text).unwrap();
        assert_eq!(text, "one two");
    }

    #[tokio::test]
    async fn a_process_that_reads_nothing_any_more_ends_the_copy() {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let input = Input::pipe(write).unwrap();
        drop(read);
        assert!(input.copy_from(&mut &b"abc"[..], false).await.is_err());
    }
}
