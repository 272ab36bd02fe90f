//! Running one plugin for one command.
//!
//! The protocol: parameters in the environment, configuration on standard input, result or error as JSON on
//! standard output, words for people on standard error. A plugin is another company's program, run as root on the
//! critical path of every pod: its time, its output and its descendants are bounded.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command as Process};

use super::conf::NetworkList;
use super::result::ResultError;

/// More than any result needs; a plugin that writes more is broken.
const MAX_STDOUT: usize = 1 << 20;
/// How much of the end of standard error is kept for error messages.
const MAX_STDERR: usize = 2048;

/// `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Connect.
    Add,
    /// Disconnect.
    Del,
    /// Is a pod still connected?
    Check,
    /// Could a pod be connected?
    Status,
    /// Release what belongs to nobody.
    Gc,
    /// Which versions of the specification are spoken?
    Version,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Status => "STATUS",
            Command::Gc => "GC",
            Command::Version => "VERSION",
        })
    }
}

/// What went wrong with a plugin, in its own words where it has some.
#[derive(Debug, Error)]
pub enum PluginError {
    /// No such binary.
    #[error("CNI plugin {plugin:?} is not in {}", dirs(searched))]
    NotFound {
        /// `type`.
        plugin: String,
        /// Where it was looked for.
        searched: Vec<PathBuf>,
    },
    /// The binary cannot be started.
    #[error("CNI plugin {plugin:?} cannot be run ({})", path.display())]
    Spawn {
        /// `type`.
        plugin: String,
        /// The binary.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Talking to it failed.
    #[error("CNI plugin {plugin:?} {command}: the exchange broke off")]
    Io {
        /// `type`.
        plugin: String,
        /// What was asked.
        command: Command,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It did not finish in time. It and its descendants were killed.
    #[error("CNI plugin {plugin:?} {command} took longer than {limit:?} and was killed{said}")]
    TimedOut {
        /// `type`.
        plugin: String,
        /// What was asked.
        command: Command,
        /// How long it had.
        limit: Duration,
        /// Its standard error.
        said: Said,
    },
    /// It wrote without end. It and its descendants were killed.
    #[error("CNI plugin {plugin:?} {command} wrote more than {MAX_STDOUT} bytes and was killed")]
    TooMuchOutput {
        /// `type`.
        plugin: String,
        /// What was asked.
        command: Command,
    },
    /// It failed and said why, as the specification wants it.
    #[error("CNI plugin {plugin:?} {command} failed: {message} (code {code}){said}")]
    Refused {
        /// `type`.
        plugin: String,
        /// What was asked.
        command: Command,
        /// The specification's error code; from 100 on it is the plugin's own.
        code: i64,
        /// `msg`, and `details` where given.
        message: String,
        /// Its standard error.
        said: Said,
    },
    /// It failed without a CNI error on its standard output.
    #[error("CNI plugin {plugin:?} {command} failed ({status}) without saying why in JSON{said}")]
    Failed {
        /// `type`.
        plugin: String,
        /// What was asked.
        command: Command,
        /// Exit code or signal.
        status: ExitStatus,
        /// Its standard error, or else its standard output.
        said: Said,
    },
    /// It claims success, but what it answered is no result.
    #[error("CNI plugin {plugin:?} {command} answered {answer:?}{said}")]
    BadAnswer {
        /// `type`.
        plugin: String,
        /// What was asked.
        command: Command,
        /// The beginning of the answer.
        answer: String,
        /// Its standard error.
        said: Said,
        /// What is wrong with it.
        #[source]
        source: ResultError,
    },
}

/// The end of what a plugin wrote for people; shown as `; it said: …`, or as nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Said(pub String);

impl Said {
    fn new(bytes: &[u8]) -> Self {
        Self(String::from_utf8_lossy(bytes).trim().to_owned())
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "; it said: {}", self.0) }
    }
}

fn dirs(searched: &[PathBuf]) -> String {
    searched.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Finds a plugin's binary.
pub fn find(plugin: &str, bin_dirs: &[PathBuf]) -> Result<PathBuf, PluginError> {
    use std::os::unix::fs::PermissionsExt;
    let runnable =
        |path: &PathBuf| path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    let found = bin_dirs.iter().map(|dir| dir.join(plugin)).find(runnable);
    found.ok_or_else(|| PluginError::NotFound { plugin: plugin.to_owned(), searched: bin_dirs.to_vec() })
}

/// Whether every binary that a network needs is there. Asked before ADD, because a plugin that never ran cannot
/// be asked to undo what it did not do.
pub fn find_all(list: &NetworkList, bin_dirs: &[PathBuf]) -> Result<(), PluginError> {
    list.binaries().try_for_each(|name| find(name, bin_dirs).map(drop))
}

/// One call of a plugin.
#[derive(Debug)]
pub struct Invocation<'a> {
    /// `type`, for messages.
    pub plugin: &'a str,
    /// Its binary.
    pub binary: &'a Path,
    /// What is asked.
    pub command: Command,
    /// The `CNI_*` variables other than `CNI_COMMAND`.
    pub env: Vec<(&'static str, std::ffi::OsString)>,
    /// The configuration.
    pub stdin: Vec<u8>,
    /// How long it may take.
    pub limit: Duration,
}

/// What a plugin that succeeded wrote.
#[derive(Debug)]
pub struct Output {
    /// Its answer.
    pub stdout: Vec<u8>,
    /// The end of its standard error.
    pub said: Said,
}

impl Invocation<'_> {
    /// Runs the plugin to its end. Whoever drops the future, or waits longer than the limit, kills the
    /// plugin's process group.
    pub async fn run(self) -> Result<Output, PluginError> {
        let mut group = self.spawn()?;
        let mut stderr = Tail::default();
        let exchange = self.exchange(&mut group.child, &mut stderr);
        let outcome = tokio::time::timeout(self.limit, exchange).await;
        let said = Said::new(&stderr.bytes);
        match outcome {
            Err(_) => {
                let (plugin, command) = self.names();
                group.kill().await;
                Err(PluginError::TimedOut { plugin, command, limit: self.limit, said })
            }
            Ok(Err(error)) => {
                group.kill().await;
                Err(error)
            }
            Ok(Ok((stdout, status))) => {
                group.finished = true;
                self.judge(stdout, status, said)
            }
        }
    }

    fn spawn(&self) -> Result<Group, PluginError> {
        let mut process = Process::new(self.binary);
        // Plugins look for iptables and the like: they inherit our environment, but no CNI_* that
        // somebody left in it.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CNI_") {
                process.env_remove(name);
            }
        }
        process
            .env("CNI_COMMAND", self.command.to_string())
            .envs(self.env.iter().map(|(name, value)| (*name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let child = process.spawn().map_err(|source| PluginError::Spawn {
            plugin: self.plugin.to_owned(),
            path: self.binary.to_owned(),
            source,
        })?;
        Ok(Group { child, finished: false })
    }

    /// The child is waited for only after its pipes are at their end: until then its process id, which is the group's,
    /// cannot be given to anybody else, and killing the group is safe.
    async fn exchange(
        &self,
        child: &mut Child,
        stderr: &mut Tail,
    ) -> Result<(Vec<u8>, ExitStatus), PluginError> {
        let io_error = |source| {
            let (plugin, command) = self.names();
            PluginError::Io { plugin, command, source }
        };
        let (stdin, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let write = async {
            let Some(mut stdin) = stdin else { return Ok(()) };
            match stdin.write_all(&self.stdin).await {
                // A plugin may answer without having read its configuration.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                other => other,
            }
        };
        let read = read_limited(out);
        let ((), stdout, ()) = tokio::try_join!(write, read, stderr.fill(err)).map_err(io_error)?;
        let Some(stdout) = stdout else {
            let (plugin, command) = self.names();
            return Err(PluginError::TooMuchOutput { plugin, command });
        };
        Ok((stdout, child.wait().await.map_err(io_error)?))
    }

    fn judge(&self, stdout: Vec<u8>, status: ExitStatus, said: Said) -> Result<Output, PluginError> {
        if status.success() {
            return Ok(Output { stdout, said });
        }
        let (plugin, command) = self.names();
        match serde_json::from_slice::<WireError>(&stdout) {
            Ok(error) => {
                let message = match error.details.filter(|d| !d.is_empty()) {
                    Some(details) => format!("{}: {details}", error.msg),
                    None => error.msg,
                };
                Err(PluginError::Refused { plugin, command, code: error.code, message, said })
            }
            Err(_) => {
                let words =
                    if said.0.is_empty() { Said::new(&stdout[..stdout.len().min(MAX_STDERR)]) } else { said };
                Err(PluginError::Failed { plugin, command, status, said: words })
            }
        }
    }

    fn names(&self) -> (String, Command) {
        (self.plugin.to_owned(), self.command)
    }
}

#[derive(Deserialize)]
struct WireError {
    code: i64,
    msg: String,
    #[serde(default)]
    details: Option<String>,
}

/// A plugin and everything it has started, as far as it stays in the group.
struct Group {
    child: Child,
    finished: bool,
}

impl Group {
    fn signal(&self) {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // Gone already is what we want.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }

    async fn kill(mut self) {
        self.signal();
        self.finished = true;
        let _ = self.child.wait().await;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.finished {
            self.signal();
        }
    }
}

/// The last bytes of a stream.
#[derive(Default)]
struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    async fn fill(&mut self, stream: Option<impl AsyncRead + Unpin>) -> io::Result<()> {
        let Some(mut stream) = stream else { return Ok(()) };
        let mut chunk = [0; 1024];
        loop {
            let n = stream.read(&mut chunk).await?;
            if n == 0 {
                return Ok(());
            }
            self.bytes.extend_from_slice(&chunk[..n]);
            let excess = self.bytes.len().saturating_sub(MAX_STDERR);
            self.bytes.drain(..excess);
        }
    }
}

/// `None`: there was more than a result can have.
async fn read_limited(stream: Option<impl AsyncRead + Unpin>) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    let Some(stream) = stream else { return Ok(Some(bytes)) };
    stream.take(MAX_STDOUT as u64 + 1).read_to_end(&mut bytes).await?;
    Ok((bytes.len() <= MAX_STDOUT).then_some(bytes))
}
