//! The stdio of one process: pipes or a terminal, held here so that neither a host that goes away nor one that
//! is slow loses a byte.
//!
//! ```text
//! process --pipe--> pump --> OutputBuffer (1 MiB unacknowledged) --> stream connection --> host
//! process <--pipe-- stream connection <-- host
//! ```

pub mod buffer;
pub mod input;
pub mod output;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use a3s_box_protocol::proto::stream_open::Kind;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use input::Input;
use output::Output;

/// The agent's side of a process's stdio.
#[derive(Debug)]
pub struct Stdio {
    input: Option<Arc<Input>>,
    output: Arc<Output>,
    /// `None` for terminals, which have one output.
    errors: Option<Arc<Output>>,
    terminal: Option<OwnedFd>,
}

/// The process's ends. With a terminal they are /dev/null until the stage has made the terminal.
#[derive(Debug)]
pub struct ProcessEnds {
    input: OwnedFd,
    output: OwnedFd,
    errors: OwnedFd,
}

impl ProcessEnds {
    /// Stdin, stdout and stderr in this order.
    pub fn all(&self) -> [BorrowedFd<'_>; 3] {
        [self.input.as_fd(), self.output.as_fd(), self.errors.as_fd()]
    }
}

/// How many bytes each output had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// With a terminal: both.
    pub stdout: u64,
    /// Nothing with a terminal.
    pub stderr: u64,
}

/// Stdio that is not yet connected to a process.
#[derive(Debug)]
pub enum Prepared {
    /// Our ends of the pipes.
    Pipes {
        /// Only if stdin was asked for.
        input: Option<OwnedFd>,
        /// Stdout.
        output: OwnedFd,
        /// Stderr.
        errors: OwnedFd,
    },
    /// The master comes from the stage.
    Terminal {
        /// Whether the host may write to it.
        input: bool,
    },
}

/// Makes the pipes, or /dev/null in their place for a terminal.
pub fn prepare(terminal: bool, stdin: bool) -> io::Result<(Prepared, ProcessEnds)> {
    let null = |flags| rustix::fs::open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty());
    if terminal {
        let ends = ProcessEnds {
            input: null(OFlags::RDONLY)?,
            output: null(OFlags::WRONLY)?,
            errors: null(OFlags::WRONLY)?,
        };
        return Ok((Prepared::Terminal { input: stdin }, ends));
    }
    let (their_input, input) = if stdin {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        (read, Some(write))
    } else {
        (null(OFlags::RDONLY)?, None)
    };
    let (output, their_output) = pipe_with(PipeFlags::CLOEXEC)?;
    let (errors, their_errors) = pipe_with(PipeFlags::CLOEXEC)?;
    let ends = ProcessEnds { input: their_input, output: their_output, errors: their_errors };
    Ok((Prepared::Pipes { input, output, errors }, ends))
}

/// The stage of a terminal session sent no terminal.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The stage did not send the terminal.
    #[error("the stage sent no terminal")]
    NoTerminal,
    /// The descriptors cannot be polled.
    #[error("stdio: {0}")]
    Io(#[from] io::Error),
}

impl Prepared {
    /// Starts reading. `terminal` is what the stage sent.
    pub fn start(self, terminal: Option<OwnedFd>) -> Result<Stdio, StdioError> {
        match self {
            Self::Pipes { input, output, errors } => Ok(Stdio {
                input: input.map(Input::pipe).transpose()?.map(Arc::new),
                output: Output::start(output)?,
                errors: Some(Output::start(errors)?),
                terminal: None,
            }),
            Self::Terminal { input } => {
                let master = terminal.ok_or(StdioError::NoTerminal)?;
                let copy = master.try_clone()?;
                let input = if input { Some(Arc::new(Input::terminal(master.try_clone()?)?)) } else { None };
                Ok(Stdio { input, output: Output::start(copy)?, errors: None, terminal: Some(master) })
            }
        }
    }
}

impl Stdio {
    /// Stdin, if it was asked for.
    pub fn input(&self) -> Option<&Arc<Input>> {
        self.input.as_ref()
    }

    /// The output of that kind; a terminal has no stderr.
    pub fn output(&self, kind: Kind) -> Option<&Arc<Output>> {
        match kind {
            Kind::Stdin | Kind::Tcp => None,
            Kind::Stdout => Some(&self.output),
            Kind::Stderr => self.errors.as_ref(),
        }
    }

    /// Sets the terminal's size; `false` if there is no terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<bool> {
        let Some(terminal) = &self.terminal else { return Ok(false) };
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(terminal, size)?;
        Ok(true)
    }

    fn outputs(&self) -> impl Iterator<Item = &Arc<Output>> {
        std::iter::once(&self.output).chain(self.errors.as_ref())
    }

    /// The process has ended: what is in the pipes is still read, but nobody waits for others that hold
    /// them open.
    pub fn process_ended(&self) {
        self.outputs().for_each(|o| o.process_ended());
        if let Some(input) = &self.input {
            input.close();
        }
    }

    /// Waits until all output is read or given up.
    pub async fn drained(&self) {
        for output in self.outputs() {
            output.drained().await;
        }
    }

    /// How much was printed so far; final once the output is drained.
    pub fn totals(&self) -> Totals {
        Totals { stdout: self.output.end(), stderr: self.errors.as_ref().map_or(0, |errors| errors.end()) }
    }

    /// Waits until the host has acknowledged all output.
    pub async fn acknowledged(&self) {
        for output in self.outputs() {
            output.acknowledged().await;
        }
    }

    /// Waits until no connection to an output is open.
    pub async fn unattended(&self) {
        for output in self.outputs() {
            output.unattended().await;
        }
    }

    /// Nobody will ask for it again: pumps and connections end.
    pub fn close(&self) {
        self.outputs().for_each(|o| o.close());
        if let Some(input) = &self.input {
            input.close();
        }
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        self.close();
    }
}
