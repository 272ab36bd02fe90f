//! From a plan to a running `a3s-box-vmm`, or to nothing at all.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use a3s_box_protocol::READY_PORT;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::unix::pipe;

use crate::error::LaunchError;
use crate::launch::{CONSOLE_LOG, FACTS_FILE, LaunchSpec, PLAN_FILE, Report, VMM_LOG, VSOCK_DIR};
use crate::machine::BoxMachine;
use crate::ports::Ports;
use crate::process::{self, Watched, describe};
use crate::seam::{BootTimes, MachineFacts};
use crate::words::last_words;

/// How much of the log a launch error carries.
const WORDS: usize = 1200;

/// Something that must be installed.
pub(crate) struct Part<'a> {
    pub(crate) what: &'static str,
    pub(crate) path: &'a Path,
    pub(crate) remedy: &'static str,
}

/// The first part that is not there is the error.
pub(crate) fn check(parts: &[Part<'_>]) -> Result<(), LaunchError> {
    match parts.iter().find(|part| !part.path.exists()) {
        None => Ok(()),
        Some(Part { what, path, remedy }) => {
            Err(LaunchError::MissingPart { what, path: path.to_path_buf(), remedy })
        }
    }
}

/// Starts a box. Dropping the future, like any error, ends what it has started.
pub(crate) async fn launch(vmm: &Path, spec: LaunchSpec, limit: Duration) -> Result<BoxMachine, LaunchError> {
    let launched = Instant::now();
    let plan = &spec.plan;
    check(&[
        Part {
            what: "the guest kernel",
            path: &plan.kernel,
            remedy: "build it (cargo xtask build) or set its path",
        },
        Part {
            what: "the initramfs",
            path: &plan.initramfs,
            remedy: "build it (cargo xtask build) or set its path",
        },
    ])?;
    if !spec.trial {
        let remedy = "it should have been made for this box";
        check(&[Part { what: "the scratch disk", path: &plan.scratch, remedy }])?;
    }
    let ports = prepare(&spec)?;
    let ready = ports.listen(READY_PORT).map_err(|source| LaunchError::Io {
        step: "listen for the guest in",
        path: plan.dir.join(VSOCK_DIR),
        source,
    })?;
    let mut starting = Starting::spawn(vmm, &spec)?;
    let spawned = launched.elapsed();
    match tokio::time::timeout(limit, starting.up()).await {
        Ok(up) => up?,
        Err(_) => return Err(LaunchError::Timeout { limit, last_words: last_words(&plan.dir, WORDS) }),
    }
    let (process, facts) = starting.finish()?;
    let times = BootTimes { spawned, vmm_up: launched.elapsed(), ready: None };
    tracing::debug!(id = plan.id.short(), pid = facts.pid, ?times, "the VMM is up");
    Ok(BoxMachine {
        facts,
        program: vmm.to_owned(),
        dir: plan.dir.clone(),
        process,
        ports,
        ready: Mutex::new(Some(ready)),
        launched,
        times: Mutex::new(times),
    })
}

/// Writes what the process reads. What an earlier attempt left in the directory is replaced.
fn prepare(spec: &LaunchSpec) -> Result<Ports, LaunchError> {
    let dir = &spec.plan.dir;
    let io = |step: &'static str, path: PathBuf| move |source| LaunchError::Io { step, path, source };
    let sockets = dir.join(VSOCK_DIR);
    match std::fs::remove_dir_all(&sockets) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io("empty", sockets)(error)),
        Ok(()) | Err(_) => {}
    }
    std::fs::DirBuilder::new().mode(0o700).create(&sockets).map_err(io("create", sockets))?;
    match std::fs::remove_file(dir.join(FACTS_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io("remove", dir.join(FACTS_FILE))(error));
        }
        Ok(()) | Err(_) => {}
    }
    let path = dir.join(PLAN_FILE);
    let json = serde_json::to_vec_pretty(spec)
        .map_err(|error| io("write the plan to", path.clone())(error.into()))?;
    private_file(&path).and_then(|mut file| file.write_all(&json)).map_err(io("write the plan to", path))?;
    private_file(&dir.join(CONSOLE_LOG)).map_err(io("create", dir.join(CONSOLE_LOG)))?;
    Ports::open(dir).map_err(io("open", dir.join(VSOCK_DIR)))
}

fn private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// A launch that is under way. Unless it is finished, dropping it ends every process of it.
struct Starting {
    dir: PathBuf,
    /// The outer process; it ends as soon as the inner one runs.
    outer: Option<Child>,
    /// The inner process, once it is known.
    inner: Option<(OwnedFd, MachineFacts)>,
    reports: Lines<BufReader<pipe::Receiver>>,
    /// The same pipe, for reading without the runtime.
    pipe: OwnedFd,
    backend: crate::seam::BackendKind,
}

impl Starting {
    fn spawn(vmm: &Path, spec: &LaunchSpec) -> Result<Self, LaunchError> {
        let dir = &spec.plan.dir;
        let log_path = dir.join(VMM_LOG);
        // Appending: the file is cut while others write to it.
        private_file(&log_path)
            .and_then(|_| OpenOptions::new().append(true).open(&log_path))
            .map_err(|source| LaunchError::Io { step: "create", path: log_path, source })
            .and_then(|log| {
                let io = |source| LaunchError::Io { step: "start", path: vmm.to_owned(), source };
                let (reader, writer) = io::pipe().map_err(io)?;
                let pipe = OwnedFd::from(reader);
                let reports = pipe.try_clone().and_then(pipe::Receiver::from_owned_fd).map_err(io)?;
                let outer = Command::new(vmm)
                    .arg("run")
                    .arg(dir.join(PLAN_FILE))
                    .env_clear()
                    // libkrun names its process after this.
                    .env("HOSTNAME", spec.plan.id.short())
                    .current_dir("/")
                    .stdin(Stdio::null())
                    .stdout(writer)
                    .stderr(log)
                    .spawn()
                    .map_err(io)?;
                Ok(Self {
                    dir: dir.clone(),
                    outer: Some(outer),
                    inner: None,
                    reports: BufReader::new(reports).lines(),
                    pipe,
                    backend: spec.backend(),
                })
            })
    }

    /// Reads reports until the VM is up.
    async fn up(&mut self) -> Result<(), LaunchError> {
        loop {
            let line = self.reports.next_line().await;
            match line.ok().flatten().map(|line| serde_json::from_str::<Report>(&line)) {
                Some(Ok(Report::Started { pid, start_ticks })) => self.started(pid, start_ticks)?,
                Some(Ok(Report::Up)) if self.inner.is_some() => return Ok(()),
                Some(Ok(Report::Up)) | Some(Err(_)) | None => {
                    let last_words = last_words(&self.dir, WORDS);
                    return Err(LaunchError::EndedEarly { exit: self.end(), last_words });
                }
                Some(Ok(Report::Failed { message })) => {
                    return Err(LaunchError::EndedEarly { exit: self.end(), last_words: message });
                }
            }
        }
    }

    /// The inner process is our child: until it is reaped its pid cannot belong to another.
    fn started(&mut self, pid: i32, start_ticks: u64) -> Result<(), LaunchError> {
        let pidfd = Pid::from_raw(pid)
            .ok_or(io::ErrorKind::InvalidData.into())
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from))
            .map_err(|source| LaunchError::Io { step: "watch the VMM of", path: self.dir.clone(), source })?;
        self.inner = Some((pidfd, MachineFacts { backend: self.backend, pid, start_ticks }));
        if let Some(mut outer) = self.outer.take() {
            // It ends right after this report.
            tokio::task::spawn_blocking(move || outer.wait());
        }
        Ok(())
    }

    /// Ends everything and tells how it ended, for people.
    fn end(&mut self) -> String {
        if let Some((pidfd, _)) = self.inner.take() {
            // A process that cannot be killed has ended.
            let _ = process::kill(&pidfd);
            return describe(&process::reap(&pidfd));
        }
        match self.outer.take() {
            Some(mut outer) => {
                let _ = outer.kill();
                outer.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
            }
            None => "ended".to_owned(),
        }
    }

    fn finish(mut self) -> Result<(Watched, MachineFacts), LaunchError> {
        let watched = self.inner.as_ref().map(|(pidfd, facts)| {
            pidfd.try_clone().and_then(Watched::new).map(|watched| (watched, facts.clone()))
        });
        match watched {
            Some(Ok(finished)) => {
                self.inner = None;
                Ok(finished)
            }
            Some(Err(source)) => {
                Err(LaunchError::Io { step: "watch the VMM of", path: self.dir.clone(), source })
            }
            None => {
                Err(LaunchError::EndedEarly { exit: self.end(), last_words: last_words(&self.dir, WORDS) })
            }
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let Some(mut outer) = self.outer.take() else {
            if self.inner.is_some() {
                self.end();
            }
            return;
        };
        // The outer process may have started the inner one and reported it, unread. Once the outer one has ended
        // the pipe says so, or nothing was started: the inner one does not run before it was reported.
        let _ = outer.kill();
        let _ = outer.wait();
        if let Some(pid) = drain_started(&self.pipe).and_then(Pid::from_raw)
            && let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
        {
            let _ = process::kill(&pidfd);
            process::reap(&pidfd);
        }
    }
}

/// Looks for a Started report that is still in the pipe. Reports are written whole, and a line that was read was
/// also handled: there is no await between the two.
fn drain_started(pipe: &OwnedFd) -> Option<i32> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    // The pipe does not block: tokio has made it so.
    while let Ok(count @ 1..) = rustix::io::read(pipe, &mut chunk) {
        bytes.extend_from_slice(&chunk[..count]);
    }
    let text = String::from_utf8_lossy(&bytes);
    text.lines().find_map(|line| match serde_json::from_str(line) {
        Ok(Report::Started { pid, .. }) => Some(pid),
        Ok(Report::Up | Report::Failed { .. }) | Err(_) => None,
    })
}
