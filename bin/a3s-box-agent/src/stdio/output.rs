//! One output stream: a task that reads the pipe (the pump) and at most one connection that sends what was
//! read.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Poll;
use std::time::Duration;

use a3s_box_protocol::MAX_GUEST_WRITE;
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::sync::watch;

use super::buffer::{BeyondEnd, OutputBuffer};

/// After the process has ended, others that hold its pipe open are waited for no longer than this after their
/// last byte.
const QUIET: Duration = Duration::from_millis(200);

/// Room for what the process writes while the agent sends: with the kernel's usual 64 KiB the two wait for each other at
/// every turn. Memory is used only for what is in it.
const PIPE_SIZE: usize = 256 * 1024;

/// Where the stream is. Only ever moves down this list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    /// The pipe is read and its process lives.
    Live,
    /// The process has ended; the rest is being read.
    Draining,
    /// Nothing more will come.
    Ended,
    /// Nobody wants it any more.
    Closed,
}

/// What pump and connection tell each other; a snapshot of the state below the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Progress {
    source: Source,
    base: u64,
    end: u64,
    /// Counts connections; the newest one owns the stream.
    connection: u64,
    /// Connections that are open.
    attached: usize,
}

/// One output stream of a process.
#[derive(Debug)]
pub struct Output {
    buffer: Mutex<OutputBuffer>,
    progress: watch::Sender<Progress>,
}

impl Output {
    /// Starts the pump on our end of a pipe or on a terminal's master.
    pub fn start(pipe: OwnedFd) -> io::Result<Arc<Self>> {
        rustix::io::ioctl_fionbio(&pipe, true)?;
        // A terminal has no such size.
        let _ = rustix::pipe::fcntl_setpipe_size(&pipe, PIPE_SIZE);
        let pipe = crate::sys::poll(pipe, Interest::READABLE)?;
        let start = Progress { source: Source::Live, base: 0, end: 0, connection: 0, attached: 0 };
        let output = Arc::new(Self { buffer: Mutex::default(), progress: watch::Sender::new(start) });
        tokio::spawn(Arc::clone(&output).pump(pipe));
        Ok(output)
    }

    fn buffer(&self) -> MutexGuard<'_, OutputBuffer> {
        self.buffer.lock().expect("nobody panics under this lock")
    }

    fn advance(&self, source: Source) {
        self.progress.send_if_modified(|p| {
            let news = source > p.source;
            p.source = p.source.max(source);
            news
        });
    }

    /// See [`super::Stdio::process_ended`].
    pub fn process_ended(&self) {
        self.advance(Source::Draining);
    }

    /// Nobody will ask for the stream again.
    pub fn close(&self) {
        self.advance(Source::Closed);
    }

    /// How many bytes were read from the pipe.
    pub fn end(&self) -> u64 {
        self.progress.borrow().end
    }

    /// Waits until the pipe is read to its end, or given up.
    pub async fn drained(&self) {
        self.reach(|p| p.source >= Source::Ended).await;
    }

    /// Waits until the host has asked for the stream and acknowledged everything. One that it never asked for it
    /// may still ask for: that a process has ended says nothing about who is on the way to its output.
    pub async fn acknowledged(&self) {
        let taken = |p: &Progress| p.source == Source::Ended && p.base == p.end && p.connection > 0;
        self.reach(|p| p.source == Source::Closed || taken(p)).await;
    }

    /// Waits until no connection is open.
    pub async fn unattended(&self) {
        self.reach(|p| p.attached == 0).await;
    }

    async fn reach(&self, there: impl FnMut(&Progress) -> bool) {
        // The sender is `self`, so the channel cannot close.
        let _ = self.progress.subscribe().wait_for(there).await;
    }

    async fn pump(self: Arc<Self>, pipe: AsyncFd<OwnedFd>) {
        let capacity = rustix::pipe::fcntl_getpipe_size(pipe.get_ref()).unwrap_or(64 * 1024) as u64;
        let mut progress = self.progress.subscribe();
        let mut last = u64::MAX;
        loop {
            let Ok(seen) =
                progress.wait_for(|p| p.source > Source::Draining || p.has_room()).await.map(|p| *p)
            else {
                return;
            };
            if seen.source == Source::Draining && last == u64::MAX {
                // What the process itself has written is in the pipe by now.
                last = seen.end + capacity;
            }
            if seen.source > Source::Draining || seen.end >= last {
                self.advance(Source::Ended);
                return;
            }
            let more = tokio::select! {
                ready = pipe.readable() => match ready {
                    Ok(mut ready) => match ready.try_io(|pipe| self.read_once(pipe.get_ref())) {
                        Ok(Ok(count)) => count > 0,
                        Ok(Err(_)) => false,
                        Err(_would_block) => true,
                    },
                    Err(_) => false,
                },
                // Not before the process has ended; then the time counts anew with every read.
                () = tokio::time::sleep(QUIET), if seen.source == Source::Draining => false,
                changed = progress.wait_for(|p| p.source > seen.source) => changed.is_ok(),
            };
            if !more {
                self.advance(Source::Ended);
                return;
            }
        }
    }

    /// 0 is the end. A terminal whose last user has gone gives EIO.
    fn read_once(&self, pipe: &OwnedFd) -> io::Result<usize> {
        let mut buffer = self.buffer();
        let result = buffer.fill(|chunk| {
            loop {
                match rustix::io::read(pipe, spare_capacity(chunk)) {
                    Err(Errno::INTR) => {}
                    Err(Errno::IO) => return Ok(0),
                    other => return Ok(other?),
                }
            }
        });
        let end = buffer.end();
        drop(buffer);
        self.progress.send_if_modified(|p| std::mem::replace(&mut p.end, end) != end);
        result
    }

    fn acknowledge(&self, offset: u64) -> Result<(), BeyondEnd> {
        let mut buffer = self.buffer();
        buffer.acknowledge(offset)?;
        let base = buffer.base();
        drop(buffer);
        self.progress.send_if_modified(|p| std::mem::replace(&mut p.base, base) != base);
        Ok(())
    }

    /// Gives the stream to a new connection, which wants it from `offset` on; everything before is
    /// acknowledged. What an earlier connection has acknowledged is gone: then the stream goes on after it.
    pub fn attach(self: &Arc<Self>, offset: u64) -> Result<Connection, BeyondEnd> {
        self.acknowledge(offset)?;
        let mut number = 0;
        self.progress.send_modify(|p| {
            p.connection += 1;
            p.attached += 1;
            number = p.connection;
        });
        Ok(Connection { output: Arc::clone(self), number, offset: self.buffer().base() })
    }
}

impl Progress {
    fn has_room(&self) -> bool {
        self.end - self.base < a3s_box_protocol::MAX_UNACKNOWLEDGED as u64
    }
}

/// One connection of the host to a stream.
#[derive(Debug)]
pub struct Connection {
    output: Arc<Output>,
    number: u64,
    offset: u64,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.output.progress.send_modify(|p| p.attached -= 1);
    }
}

impl Connection {
    /// The first byte that will be sent.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Sends and takes acknowledgements until all is acknowledged, the host hangs up, or a newer connection takes over.
    pub async fn run(
        self,
        from_host: &mut (impl AsyncRead + Unpin),
        to_host: &mut (impl AsyncWrite + Unpin),
    ) -> io::Result<()> {
        tokio::select! {
            sent = self.send(to_host) => sent,
            acknowledged = self.take_acknowledgements(from_host) => acknowledged,
        }
    }

    async fn send(&self, to_host: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let mut progress = self.output.progress.subscribe();
        let mut offset = self.offset;
        loop {
            let replaced = |p: &Progress| p.connection != self.number || p.source == Source::Closed;
            let seen =
                progress.wait_for(|p| replaced(p) || p.end > offset || p.source == Source::Ended).await;
            let Ok(seen) = seen.map(|p| *p) else { return Ok(()) };
            if replaced(&seen) {
                return Ok(());
            }
            if offset >= seen.end {
                break;
            }
            offset += self.write_some(to_host, offset).await? as u64;
        }
        to_host.shutdown().await?;
        // The connection stays for the last acknowledgements.
        let _ = progress
            .wait_for(|p| p.base == p.end || p.connection != self.number || p.source == Source::Closed)
            .await;
        Ok(())
    }

    /// Writes from the buffer where it lies; the lock is held only while the kernel copies.
    async fn write_some(&self, to_host: &mut (impl AsyncWrite + Unpin), offset: u64) -> io::Result<usize> {
        poll_fn(|context| {
            let buffer = self.output.buffer();
            let bytes = buffer.from(offset);
            if bytes.is_empty() {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            let bytes = &bytes[..bytes.len().min(MAX_GUEST_WRITE)];
            Pin::new(&mut *to_host).poll_write(context, bytes)
        })
        .await
    }

    async fn take_acknowledgements(&self, from_host: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        loop {
            let offset = from_host.read_u64().await?;
            self.output.acknowledge(offset).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::io::Write;
    use tokio::io::{DuplexStream, duplex};

    fn pipe() -> (OwnedFd, std::fs::File) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        (read, write.into())
    }

    fn connect(output: &Arc<Output>, offset: u64) -> DuplexStream {
        let (host, guest) = duplex(64 * 1024);
        let connection = output.attach(offset).unwrap();
        tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(guest);
            let _ = connection.run(&mut read, &mut write).await;
        });
        host
    }

    async fn read_exactly(host: &mut DuplexStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        host.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    #[tokio::test]
    async fn a_host_that_comes_back_misses_nothing_and_gets_nothing_twice() {
        let (read, mut write) = pipe();
        let output = Output::start(read).unwrap();
        write.write_all(b"hello world").unwrap();
        let mut first = connect(&output, 0);
        assert_eq!(read_exactly(&mut first, 11).await, b"hello world");
        first.write_u64(5).await.unwrap();
        output.reach(|p| p.base == 5).await;
        drop(first);
        drop(write);
        let mut second = connect(&output, 6);
        let mut rest = Vec::new();
        second.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"world");
        second.write_u64(11).await.unwrap();
        output.acknowledged().await;
    }

    #[tokio::test]
    async fn a_newer_connection_takes_the_stream_over() {
        let (read, mut write) = pipe();
        let output = Output::start(read).unwrap();
        let mut first = connect(&output, 0);
        let mut second = connect(&output, 0);
        write.write_all(b"x").unwrap();
        assert_eq!(read_exactly(&mut second, 1).await, b"x");
        let mut nothing = Vec::new();
        first.read_to_end(&mut nothing).await.unwrap();
        assert!(nothing.is_empty());
    }

    #[tokio::test]
    async fn a_process_is_stopped_by_a_host_that_does_not_acknowledge() {
        let (read, mut write) = pipe();
        let output = Output::start(read).unwrap();
        let writer = tokio::task::spawn_blocking(move || {
            for _ in 0..48 {
                write.write_all(&[7; 64 * 1024]).unwrap();
            }
        });
        output.reach(|p| !p.has_room()).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!writer.is_finished());
        let kept = output.progress.borrow().end;
        assert!(kept < 1_200_000, "{kept} bytes are kept");
        let mut host = connect(&output, 0);
        let mut total = 0_u64;
        let mut bytes = vec![0; 32 * 1024];
        while total < 48 * 64 * 1024 {
            total += host.read(&mut bytes).await.unwrap() as u64;
            host.write_u64(total).await.unwrap();
        }
        writer.await.unwrap();
        assert_eq!(host.read(&mut bytes).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn the_stream_ends_although_a_grandchild_keeps_the_pipe() {
        let (read, mut write) = pipe();
        let output = Output::start(read).unwrap();
        write.write_all(b"last words").unwrap();
        output.process_ended();
        output.drained().await;
        let mut host = connect(&output, 0);
        let mut words = Vec::new();
        host.read_to_end(&mut words).await.unwrap();
        assert_eq!(words, b"last words");
        assert!(write.write_all(b"nobody listens").is_err());
    }

    #[tokio::test]
    async fn an_offset_beyond_the_end_is_refused() {
        let (read, _write) = pipe();
        let output = Output::start(read).unwrap();
        assert_eq!(output.attach(1).unwrap_err(), BeyondEnd { offset: 1, end: 0 });
    }
}
