//! The task that carries one session's output into its log.
//!
//! ```text
//! guest ──bytes──► read ──► format ──► append + record ──► acknowledge ──► guest
//!                                          │ fails: report, wait, again
//! ```
//!
//! One task per session owns the file and both streams, so lines of the two never mix within a line. The
//! guest keeps what is not acknowledged, so a log that cannot be written holds the process back instead of
//! losing its lines.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use a3s_box_protocol::proto::stream_open::Kind;
use a3s_box_vmm::Machine;

use super::file::LogFile;
use super::format::time_format::Stamp;
use super::format::{Source, format_end, format_lines};
use super::tap::Tap;
use crate::clock::now_ns;
use crate::streams::{Output, StreamError, StreamName};

/// The most that is read at once: large enough that the cost of a hand-over to the disk's thread disappears.
const BATCH: usize = 256 * 1024;

/// The first pause after a failed write; it doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// After the process has ended, a line without an end is written when nothing has come for this long. Not every
/// backend passes on the end of a stream before both sides have closed it, and the guest keeps its side
/// open until all is acknowledged.
const IDLE: Duration = Duration::from_millis(100);

/// A log that could not be opened.
#[derive(Debug, Error)]
pub(crate) enum LogError {
    #[error("could not open the log {}: {source}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not take over the output: {0}")]
    Stream(#[from] StreamError),
    #[error("the log of a container that runs on from before could not be taken up yet")]
    NotTakenUp,
    #[error("the log's writer has ended")]
    Ended,
}

/// Where output goes.
#[derive(Debug, Clone)]
pub(crate) enum Sink {
    /// Into a log; `record` is the file of its position.
    File { path: PathBuf, record: PathBuf },
    /// Nowhere: it is read so that the process never waits.
    Discard,
}

/// Whose output goes where.
pub(crate) struct LogPlan {
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) session_id: String,
    pub(crate) terminal: bool,
    pub(crate) sink: Sink,
}

/// What is asked of a writer.
#[derive(Debug)]
enum Request {
    /// Open the log's path anew.
    Reopen(oneshot::Sender<Result<(), LogError>>),
    /// Show the output from now on to one more client.
    Tap(Tap),
}

/// A running writer.
#[derive(Debug, Clone)]
pub(crate) struct LogHandle {
    requests: mpsc::Sender<Request>,
    /// To be cancelled when the process has ended.
    pub(crate) ended: CancellationToken,
    /// Cancelled when both streams have ended and their last line is written.
    pub(crate) done: CancellationToken,
}

impl LogHandle {
    /// Opens the log's path anew. After the writer's end there is nothing to do.
    pub(crate) async fn reopen(&self) -> Result<(), LogError> {
        let (reply, answer) = oneshot::channel();
        if self.requests.send(Request::Reopen(reply)).await.is_err() {
            return if self.done.is_cancelled() { Ok(()) } else { Err(LogError::Ended) };
        }
        // Ended while the request was queued: nobody writes to the former file any more.
        answer.await.unwrap_or(Ok(()))
    }
}

impl LogHandle {
    /// Shows the output from now on to one more client. After the writer's end there is none to come.
    pub(crate) async fn tap(&self, tap: Tap) {
        self.requests.send(Request::Tap(tap)).await.ok();
    }
}

/// Opens the log and the streams, from where the log's record says, and starts to copy.
pub(crate) async fn start(
    plan: LogPlan,
    tasks: &TaskTracker,
    closing: &CancellationToken,
) -> Result<LogHandle, LogError> {
    let ends = Ends::open(&plan).await?;
    Ok(spawn(plan, tasks, closing, Some(ends)))
}

/// Takes up the log of an earlier daemon. What cannot be opened is tried again until the daemon or the VM ends;
/// meanwhile the guest keeps the output.
pub(crate) fn resume(plan: LogPlan, tasks: &TaskTracker, closing: &CancellationToken) -> LogHandle {
    spawn(plan, tasks, closing, None)
}

fn spawn(plan: LogPlan, tasks: &TaskTracker, closing: &CancellationToken, ends: Option<Ends>) -> LogHandle {
    let (sender, requests) = mpsc::channel(4);
    let (done, ended) = (CancellationToken::new(), CancellationToken::new());
    let mut queue = Queue { requests, closing: closing.clone() };
    let (guard, process_ended) = (done.clone().drop_guard(), ended.clone());
    tasks.spawn(async move {
        let ends = match ends {
            Some(ends) => Some((ends, Vec::new())),
            None => insist(&plan, &mut queue).await,
        };
        if let Some((Ends { file, stdout, stderr }, waiting)) = ends {
            let taps = Vec::new();
            let mut writer = Writer { plan, file, stdout, stderr, queue, taps, ended: process_ended };
            for request in waiting {
                writer.serve(request).await;
            }
            writer.run().await;
        }
        drop(guard);
    });
    LogHandle { requests: sender, ended, done }
}

/// Opens the log and the streams in the end; `None`: there is nothing to take up any more. What was asked meanwhile
/// is handed on; a log that still cannot be opened is the answer to who wanted it opened anew.
async fn insist(plan: &LogPlan, queue: &mut Queue) -> Option<(Ends, Vec<Request>)> {
    let mut waiting = Vec::new();
    for failures in 1.. {
        let error = match Ends::open(plan).await {
            Ok(ends) => return Some((ends, waiting)),
            // A container that has ended and was drained has no streams left.
            Err(LogError::Stream(StreamError::Refused(_))) => return None,
            Err(error) => error,
        };
        tracing::warn!(session = %plan.session_id, %error, "the log was not taken up yet; it will be tried again");
        waiting = refuse_reopening(waiting);
        match queue.pause(plan, failures).await {
            Pause::Over => {}
            Pause::Asked(request) => waiting.push(request),
            Pause::End => return None,
        }
    }
    None
}

fn refuse_reopening(waiting: Vec<Request>) -> Vec<Request> {
    let mut others = Vec::new();
    for request in waiting {
        match request {
            Request::Reopen(reply) => drop(reply.send(Err(LogError::NotTakenUp))),
            Request::Tap(_) => others.push(request),
        }
    }
    others
}

/// What ended a pause.
enum Pause {
    Over,
    Asked(Request),
    /// The daemon or the VM has ended.
    End,
}

/// What is asked, and the daemon's end.
struct Queue {
    requests: mpsc::Receiver<Request>,
    closing: CancellationToken,
}

impl Queue {
    /// Between attempts, longer after each failure.
    async fn pause(&mut self, plan: &LogPlan, failures: u32) -> Pause {
        let pause = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(MAX_PAUSE);
        tokio::select! {
            biased;
            () = self.closing.cancelled() => Pause::End,
            _ = plan.machine.wait() => Pause::End,
            Some(request) = self.requests.recv() => Pause::Asked(request),
            () = tokio::time::sleep(pause) => Pause::Over,
        }
    }
}

/// The log and the streams.
struct Ends {
    file: Option<LogFile>,
    stdout: Option<Channel>,
    stderr: Option<Channel>,
}

impl Ends {
    async fn open(plan: &LogPlan) -> Result<Self, LogError> {
        let file = match &plan.sink {
            Sink::File { path, record } => Some(open_file(path.clone(), record.clone()).await?),
            Sink::Discard => None,
        };
        let offset = |source| file.as_ref().map_or(0, |file: &LogFile| file.offset(source));
        let stdout = Channel::open(plan, Source::Stdout, offset(Source::Stdout));
        let stderr = async {
            match plan.terminal {
                true => Ok(None),
                false => Channel::open(plan, Source::Stderr, offset(Source::Stderr)).await.map(Some),
            }
        };
        let (stdout, stderr) = tokio::try_join!(stdout, stderr)?;
        Ok(Self { file, stdout: Some(stdout), stderr })
    }
}

async fn open_file(path: PathBuf, record: PathBuf) -> Result<LogFile, LogError> {
    let shown = path.clone();
    let opened = spawn_blocking(move || LogFile::open(&path, &record)).await;
    opened
        .unwrap_or_else(|aborted| Err(io::Error::other(aborted)))
        .map_err(|source| LogError::Open { path: shown, source })
}

/// One stream, with what has been read of a line that has not ended.
struct Channel {
    source: Source,
    output: Output,
    /// Offset of the first byte of `held`.
    offset: u64,
    held: Vec<u8>,
    /// Clients have seen all bytes before this offset: what comes again on a new connection is not shown twice.
    shown: u64,
    failures: u32,
}

impl Channel {
    async fn open(plan: &LogPlan, source: Source, offset: u64) -> Result<Self, StreamError> {
        let kind = match source {
            Source::Stdout => Kind::Stdout,
            Source::Stderr => Kind::Stderr,
        };
        let name = StreamName { session_id: plan.session_id.clone(), exec_id: String::new(), kind };
        let (output, offset) = Output::open(plan.machine.as_ref(), &name, offset).await?;
        Ok(Self { source, output, offset, held: Vec::new(), shown: offset, failures: 0 })
    }
}

/// Cancel safe: bytes are either in `held` or still in the socket.
async fn read(channel: &mut Option<Channel>) -> io::Result<usize> {
    match channel {
        Some(channel) => {
            channel.held.reserve(BATCH);
            channel.output.read(&mut channel.held).await
        }
        None => std::future::pending().await,
    }
}

struct Writer {
    plan: LogPlan,
    file: Option<LogFile>,
    stdout: Option<Channel>,
    stderr: Option<Channel>,
    queue: Queue,
    taps: Vec<Tap>,
    ended: CancellationToken,
}

/// Answers when an ended process has been silent in the middle of a line.
async fn idle(ended: CancellationToken, holds_part: bool) {
    ended.cancelled().await;
    if !holds_part {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(IDLE).await;
}

impl Writer {
    async fn run(mut self) {
        let (closing, ended) = (self.queue.closing.clone(), self.ended.clone());
        while self.stdout.is_some() || self.stderr.is_some() {
            let parts =
                [&self.stdout, &self.stderr].into_iter().flatten().any(|channel| !channel.held.is_empty());
            // A daemon that ends writes nothing more; rotation comes before new lines, so that a flood of
            // output cannot hold it up. The two outputs are served as they come; silence is last.
            let (source, result) = tokio::select! {
                biased;
                () = closing.cancelled() => return,
                Some(request) = self.queue.requests.recv() => {
                    self.serve(request).await;
                    continue;
                }
                event = async {
                    tokio::select! {
                        result = read(&mut self.stdout) => (Source::Stdout, result),
                        result = read(&mut self.stderr) => (Source::Stderr, result),
                    }
                } => event,
                () = idle(ended.clone(), parts) => {
                    self.flush_parts().await;
                    continue;
                }
            };
            let Some(channel) = self.slot(source).take() else { continue };
            *self.slot(source) = self.advance(channel, result).await;
            if self.slot(source).is_none() {
                self.taps.iter_mut().for_each(|tap| tap.end(source));
            }
        }
    }

    async fn serve(&mut self, request: Request) {
        match request {
            Request::Reopen(reply) => drop(reply.send(self.reopen().await)),
            Request::Tap(mut tap) => {
                for source in [Source::Stdout, Source::Stderr] {
                    if self.slot(source).is_none() {
                        tap.end(source);
                    }
                }
                self.taps.push(tap);
            }
        }
    }

    /// Shows new bytes to the clients that are still there.
    fn show(&mut self, channel: &mut Channel) {
        let end = channel.offset + channel.held.len() as u64;
        let seen = channel.shown.saturating_sub(channel.offset).min(channel.held.len() as u64);
        let news = &channel.held[seen as usize..];
        self.taps.retain_mut(|tap| tap.offer(channel.source, news));
        channel.shown = channel.shown.max(end);
    }

    fn slot(&mut self, source: Source) -> &mut Option<Channel> {
        match source {
            Source::Stdout => &mut self.stdout,
            Source::Stderr => &mut self.stderr,
        }
    }

    async fn flush_parts(&mut self) {
        for source in [Source::Stdout, Source::Stderr] {
            if let Some(mut channel) = self.slot(source).take() {
                self.flush_part(&mut channel).await;
                *self.slot(source) = Some(channel);
            }
        }
    }

    async fn flush_part(&mut self, channel: &mut Channel) {
        let mut lines = Vec::new();
        format_end(&channel.held, channel.source, &Stamp::at(now_ns()), &mut lines);
        let taken = channel.held.len();
        self.commit(channel, lines, taken).await;
    }

    /// Handles what a read brought; `None`: the stream has ended.
    async fn advance(&mut self, mut channel: Channel, result: io::Result<usize>) -> Option<Channel> {
        match result {
            Ok(0) => {
                self.flush_part(&mut channel).await;
                None
            }
            Ok(_) => {
                self.show(&mut channel);
                channel.failures = 0;
                let mut lines = Vec::with_capacity(channel.held.len() + channel.held.len() / 2);
                let taken = format_lines(&channel.held, channel.source, &Stamp::at(now_ns()), &mut lines);
                self.commit(&mut channel, lines, taken).await.then_some(channel)
            }
            Err(error) => self.reconnect(channel, &error).await,
        }
    }

    /// Writes lines until that succeeds, then acknowledges the bytes that they took. `false`: closing.
    async fn commit(&mut self, channel: &mut Channel, lines: Vec<u8>, taken: usize) -> bool {
        if taken == 0 {
            return true;
        }
        let offset = channel.offset + taken as u64;
        if !self.append(lines, channel.source, offset).await {
            return false;
        }
        channel.offset = offset;
        channel.held.drain(..taken);
        channel.output.acknowledge(offset);
        true
    }

    async fn append(&mut self, mut lines: Vec<u8>, source: Source, offset: u64) -> bool {
        let mut pause = FIRST_PAUSE;
        while let Some(mut file) = self.file.take() {
            let written = spawn_blocking(move || {
                let result = file.append(&lines, source, offset);
                (file, lines, result)
            });
            // The task only fails when the runtime shuts down.
            let Ok((file, back, result)) = written.await else { return false };
            self.file = Some(file);
            lines = back;
            let Err(error) = result else { return true };
            tracing::error!(session = %self.plan.session_id, %error, retry_in = ?pause, "the log cannot be written; the container waits");
            let closing = self.queue.closing.clone();
            tokio::select! {
                () = closing.cancelled() => return false,
                Some(request) = self.queue.requests.recv() => self.serve(request).await,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(MAX_PAUSE),
            }
        }
        // Without a file the output is discarded.
        true
    }

    async fn reopen(&mut self) -> Result<(), LogError> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        let Sink::File { path, .. } = &self.plan.sink else { return Ok(()) };
        let reopened = spawn_blocking(move || {
            let result = file.reopen();
            (file, result)
        });
        let (file, result) = reopened.await.map_err(|_| LogError::Ended)?;
        self.file = Some(file);
        result.map_err(|source| LogError::Open { path: path.clone(), source })
    }

    /// A connection broke: what was not acknowledged comes again on a new one, as soon as there can be one. `None`: the
    /// stream, the VM or the daemon has ended.
    async fn reconnect(&mut self, mut channel: Channel, error: &io::Error) -> Option<Channel> {
        tracing::debug!(session = %self.plan.session_id, %error, "the connection of an output broke");
        loop {
            channel.failures += 1;
            match self.queue.pause(&self.plan, channel.failures).await {
                Pause::Over => {}
                Pause::Asked(request) => self.serve(request).await,
                Pause::End => {
                    // The next daemon gets an unfinished line as a whole, a dead VM's has no rest.
                    if !self.queue.closing.is_cancelled() {
                        self.flush_part(&mut channel).await;
                    }
                    return None;
                }
            }
            match Channel::open(&self.plan, channel.source, channel.offset).await {
                Ok(opened) => {
                    return Some(Channel { failures: channel.failures, shown: channel.shown, ..opened });
                }
                Err(StreamError::Refused(_)) => return None,
                Err(error) => {
                    tracing::warn!(session = %self.plan.session_id, %error, "the output is not reachable; it will be tried again");
                }
            }
        }
    }
}
