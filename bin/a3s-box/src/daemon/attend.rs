//! This terminal, or these pipes, and a call: from the connection to its outcome.

use std::io;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};

use a3s_box_streaming::ChunkWriter;
use a3s_box_streaming::backend::{TerminalSize, Wanted};
use a3s_box_streaming::client::{Call, Outcome, OutcomeError, Sizes, Target, Transport};

use super::detach::DetachKeys;
use crate::failure::{self, exit_code};
use crate::streams::{self, Copied, Event};
use crate::terminal::{RawMode, window_size};

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The other side said so.
    Code(i32),
    /// The user left.
    Detached,
    /// This program was asked to end, or nobody reads its output any more.
    Ours(u8),
}

/// What a call is to be connected to.
pub(super) struct Attendance {
    pub(super) wanted: Wanted,
    pub(super) tty: bool,
    /// The user may leave by keys.
    pub(super) keys: bool,
}

impl Attendance {
    /// Connects and copies until the end.
    pub(super) async fn at(self, target: &Target) -> anyhow::Result<End> {
        let mut events = streams::listen().context("could not listen for signals")?;
        let Call { stdin, stdout, stderr, sizes, outcome } =
            Call::connect(target, Transport::WebSocket, self.wanted, self.tty).await?;
        // Given back on every way out, also while panicking.
        let _raw = match self.tty && self.wanted.stdin {
            true => Some(RawMode::enter().context("could not switch the terminal to raw mode")?),
            false => None,
        };
        let (leave, left) = oneshot::channel();
        if let Some(stdin) = stdin {
            // Not joined: a read of a terminal ends when the user types something.
            let keys = self.keys.then(|| (DetachKeys::default(), leave));
            tokio::spawn(input(stdin, keys));
        }
        let outputs =
            streams::outputs(stdout.map(|from| Box::new(from) as _), stderr.map(|from| Box::new(from) as _));
        tokio::select! {
            // An end that is there already comes before what the user does now.
            biased;
            end = finished(outputs, outcome) => end,
            Ok(()) = left => Ok(End::Detached),
            code = attend(&mut events, sizes) => Ok(End::Ours(code)),
        }
    }
}

/// All output, then the outcome.
async fn finished(
    outputs: impl Future<Output = io::Result<Copied>>,
    outcome: Outcome,
) -> anyhow::Result<End> {
    match outputs.await.context("could not copy the output")? {
        Copied::ReaderGone => Ok(End::Ours(failure::BROKEN_PIPE)),
        Copied::ToTheEnd => match outcome.wait().await {
            Ok(code) => Ok(End::Code(code)),
            Err(error @ (OutcomeError::Failed { .. } | OutcomeError::Lost)) => Err(error.into()),
        },
    }
}

/// Tells sizes until a signal asks to end. Keys such as Ctrl-C do not come here in raw mode: they are the guest's.
async fn attend(events: &mut mpsc::Receiver<Event>, mut sizes: Option<Sizes>) -> u8 {
    tell_size(&mut sizes).await;
    loop {
        match events.recv().await {
            Some(Event::Resized) => tell_size(&mut sizes).await,
            Some(Event::Signal(number)) => return exit_code(128 + number),
            None => std::future::pending().await,
        }
    }
}

async fn tell_size(sizes: &mut Option<Sizes>) {
    if let (Some(sizes), Some((height, width))) = (sizes, window_size()) {
        sizes.tell(TerminalSize { width, height }).await;
    }
}

/// Copies our stdin until either side ends. A process that closed its input is no failure.
async fn input(mut to: ChunkWriter, keys: Option<(DetachKeys, oneshot::Sender<()>)>) {
    let (mut keys, leave) = keys.unzip();
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
        let (passed, left) = match &mut keys {
            Some(keys) => keys.pass(&buffer[..count]),
            None => (buffer[..count].to_vec(), false),
        };
        if to.write_all(&passed).await.is_err() {
            return;
        }
        if left {
            // The end of input is not told: the container goes on waiting for some.
            leave.map(|leave| leave.send(()));
            return;
        }
    }
    to.shutdown().await.ok();
}
