//! The handle of a running VM: the same for both backends.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use a3s_box_protocol::{READY_PORT, framing, proto};
use async_trait::async_trait;
use tokio::net::{UnixListener, UnixStream};

use crate::error::{AttachError, ConnectError, LaunchError, MachineError};
use crate::ports::Ports;
use crate::process::{Watched, describe};
use crate::seam::{Attachment, BootTimes, HostUsage, Machine, MachineExit, MachineFacts};
use crate::words::GuestFault;
use crate::{attach, usage, words};

/// How much of its last words an error carries.
const WORDS: usize = 1200;

/// A box's process, its sockets and its directory.
pub(crate) struct BoxMachine {
    pub(crate) facts: MachineFacts,
    /// The `a3s-box-vmm`.
    pub(crate) program: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) process: Watched,
    pub(crate) ports: Ports,
    /// Taken by the first call of `ready`.
    pub(crate) ready: Mutex<Option<UnixListener>>,
    pub(crate) launched: Instant,
    pub(crate) times: Mutex<BootTimes>,
}

impl BoxMachine {
    pub(crate) fn adopt(
        program: &Path,
        dir: &Path,
        facts: &MachineFacts,
    ) -> Result<Option<Box<dyn Machine>>, LaunchError> {
        let found = Watched::find(facts).map_err(|source| LaunchError::Io {
            step: "look for the process of",
            path: dir.to_owned(),
            source,
        })?;
        let Some(process) = found else { return Ok(None) };
        let ports = Ports::open(dir).map_err(|source| LaunchError::Io {
            step: "open the sockets of",
            path: dir.to_owned(),
            source,
        })?;
        Ok(Some(Box::new(Self {
            facts: facts.clone(),
            program: program.to_owned(),
            dir: dir.to_owned(),
            process,
            ports,
            ready: Mutex::new(None),
            launched: Instant::now(),
            times: Mutex::default(),
        })))
    }

    fn listener(&self) -> io::Result<UnixListener> {
        let taken = self.ready.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        taken.map_or_else(|| self.ports.listen(READY_PORT), Ok)
    }

    fn jailed(&self, target: &str) -> Result<attach::Jailed, AttachError> {
        let pidfd = self.process.pidfd().try_clone();
        let error = |source| AttachError { step: "prepare", target: target.to_owned(), source };
        Ok(attach::Jailed { pid: self.facts.pid, pidfd: pidfd.map_err(error)? })
    }

    fn words(&self) -> String {
        words::last_words(&self.dir, WORDS)
    }
}

async fn read_ready(listener: UnixListener) -> Result<proto::Ready, framing::FramingError> {
    let (mut stream, _) = listener.accept().await?;
    framing::read_message(&mut stream).await
}

#[async_trait]
impl Machine for BoxMachine {
    fn facts(&self) -> MachineFacts {
        self.facts.clone()
    }

    async fn ready(&self, limit: Duration) -> Result<proto::Ready, MachineError> {
        let listener = self.listener().map_err(framing::FramingError::from)?;
        tokio::select! {
            // A guest that said it was ready and then ended was ready: its message is taken first.
            biased;
            ready = read_ready(listener) => {
                let ready = ready?;
                self.times.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).ready = Some(self.launched.elapsed());
                Ok(ready)
            }
            exit = self.process.wait() => {
                Err(MachineError::Ended { exit: describe(&exit), last_words: self.words() })
            }
            () = tokio::time::sleep(limit) => Err(MachineError::NotReady { limit, last_words: self.words() }),
        }
    }

    async fn connect(&self, port: u32) -> Result<UnixStream, ConnectError> {
        self.ports.dial(port).await.map_err(|source| ConnectError { port, source })
    }

    async fn attach(&self, attachment: Attachment) -> Result<(), AttachError> {
        let jailed = self.jailed(&attachment.target)?;
        attach::attach(self.program.clone(), jailed, attachment).await
    }

    async fn set_readonly(&self, target: &str, readonly: bool) -> Result<(), AttachError> {
        attach::set_readonly(self.jailed(target)?, target, readonly).await
    }

    async fn detach(&self, target: &str) -> Result<(), AttachError> {
        attach::detach(self.jailed(target)?, target).await
    }

    async fn wait(&self) -> MachineExit {
        self.process.wait().await
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.process.kill().map_err(|source| MachineError::Signal { pid: self.facts.pid, source })
    }

    async fn host_usage(&self) -> Option<HostUsage> {
        let pid = self.facts.pid;
        let usage = tokio::task::spawn_blocking(move || usage::of_tree(pid)).await.ok()?.ok()?;
        // Only now: while it has not ended the pid was its own.
        let running = tokio::time::timeout(Duration::ZERO, self.process.wait()).await.is_err();
        running.then_some(usage)
    }

    fn times(&self) -> BootTimes {
        *self.times.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    async fn guest_fault(&self) -> Option<GuestFault> {
        words::guest_fault(&self.dir)
    }

    async fn last_words(&self, bytes: usize) -> String {
        words::last_words(&self.dir, bytes)
    }
}
