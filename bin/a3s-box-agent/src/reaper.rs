//! Process 1 reaps everything; those who started a process learn how it ended.
//!
//! One lock covers the table of awaited processes, starting (so that no process is reaped before it is in
//! the table) and signalling (so that no signal goes to a pid that was reaped and given anew).

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::spawn::{Spawn, spawn};
use crate::sys;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + number for a signal.
    pub code: i32,
    /// The signal that ended it, or 0.
    pub signal: i32,
    /// Nanoseconds since the epoch.
    pub at_ns: u64,
}

/// Processes that are reaped in one go before other work gets its turn.
const BATCH: usize = 256;

/// The table of awaited processes.
#[derive(Debug, Clone, Default)]
pub struct Reaper {
    awaited: Arc<Mutex<HashMap<i32, oneshot::Sender<Exit>>>>,
}

impl Reaper {
    fn awaited(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<Exit>>> {
        self.awaited.lock().expect("nobody panics under this lock")
    }

    /// Starts a process; the receiver gets its end.
    pub fn spawn(&self, process: &Spawn<'_>) -> io::Result<(Pid, oneshot::Receiver<Exit>)> {
        let mut awaited = self.awaited();
        let pid = spawn(process)?;
        let (sender, receiver) = oneshot::channel();
        awaited.insert(pid.as_raw_pid(), sender);
        Ok((pid, receiver))
    }

    /// Sends a signal to a process that was started here; `false` if it has ended.
    pub fn signal(&self, pid: Pid, number: i32) -> io::Result<bool> {
        let awaited = self.awaited();
        if !awaited.contains_key(&pid.as_raw_pid()) {
            return Ok(false);
        }
        sys::kill(pid.as_raw_pid(), number)?;
        Ok(true)
    }

    /// Reaps for ever. Must be started before the first process.
    pub async fn run(self) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            while self.reap(BATCH)? == BATCH {
                tokio::task::yield_now().await;
            }
            children.recv().await;
        }
    }

    /// Reaps at most `limit` processes and says how many there were.
    fn reap(&self, limit: usize) -> io::Result<usize> {
        for reaped in 0..limit {
            let mut awaited = self.awaited();
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(waiter) = awaited.remove(&pid.as_raw_pid()) {
                        let signal = status.terminating_signal().unwrap_or(0);
                        let code = status.exit_status().unwrap_or(128 + signal);
                        // Whoever waited may have given up.
                        let _ = waiter.send(Exit { code, signal, at_ns: now_ns() });
                    }
                }
                Ok(None) | Err(Errno::CHILD) => return Ok(reaped),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(limit)
    }
}

/// Nanoseconds since the epoch by the guest's clock.
pub fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}
