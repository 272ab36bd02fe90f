//! A program at a terminal, as a person sits before one: keys, screen, window size.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::pty::openpty;
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

/// The longest that anything is waited for.
const LIMIT: Duration = Duration::from_secs(60);

/// The master of a terminal, and the program on it.
pub struct Terminal {
    keys: File,
    /// Keeps the terminal and its settings when the program has ended.
    slave: OwnedFd,
    former: Termios,
    screen: mpsc::UnboundedReceiver<Vec<u8>>,
    /// What was not yet waited for.
    seen: String,
    child: Child,
}

impl Terminal {
    /// Starts a program with a new terminal as its controlling one.
    pub fn start(program: &Command, rows: u16, columns: u16) -> Result<Self> {
        let pty = openpty(None, None)?;
        tcsetwinsize(&pty.master, window(rows, columns))?;
        let end = || -> Result<Stdio> { Ok(Stdio::from(pty.slave.try_clone()?)) };
        let program = program.as_std();
        // util-linux's setsid: only the foreground process of a controlling terminal hears that its size has changed.
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg(program.get_program())
            .args(program.get_args())
            .stdin(end()?)
            .stdout(end()?)
            .stderr(end()?)
            .kill_on_drop(true)
            .spawn()
            .context("starting setsid (Debian package util-linux)")?;
        let former = tcgetattr(&pty.slave)?;
        let keys = File::from(pty.master);
        let mut reader = keys.try_clone()?;
        let (sender, screen) = mpsc::unbounded_channel();
        // Ends with the last slave, which is ours.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { keys, slave: pty.slave, former, screen, seen: String::new(), child })
    }

    /// Types.
    pub fn keys(&mut self, keys: &str) -> Result<()> {
        Ok(self.keys.write_all(keys.as_bytes())?)
    }

    /// Waits until the text is on the screen, after what was waited for before.
    pub async fn until(&mut self, text: &str) -> Result<()> {
        let deadline = tokio::time::Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return Ok(());
            }
            let more = tokio::time::timeout_at(deadline, self.screen.recv()).await;
            let more = more.ok().flatten().with_context(|| {
                format!("{text:?} does not appear on the screen, which shows {:?}", self.seen)
            })?;
            self.seen.push_str(&String::from_utf8_lossy(&more));
        }
    }

    /// Gives the window another size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        Ok(tcsetwinsize(&self.keys, window(rows, columns))?)
    }

    /// Waits for the program's end; it must have left the terminal as it was.
    pub async fn end(mut self) -> Result<ExitStatus> {
        let status = tokio::time::timeout(LIMIT, self.child.wait())
            .await
            .with_context(|| format!("the program does not end; its screen shows {:?}", self.seen))??;
        let now = tcgetattr(&self.slave)?;
        let modes = |termios: &Termios| {
            (termios.input_modes, termios.output_modes, termios.control_modes, termios.local_modes)
        };
        ensure!(modes(&now) == modes(&self.former), "the terminal's settings were not given back");
        Ok(status)
    }
}

fn window(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
