//! Sessions: the workloads of this box.
//!
//! ```text
//! Creating -> Created -> Running -> Exited -> (deleted)
//!        \-> Failed            (a process that is killed before its start: Created -> Exited)
//! ```
//! One task owns a session's creation and one its end; the handlers of calls only ask and wait, so a host that
//! goes away in the middle of a call changes nothing.

pub mod cgroup;
pub mod devices;
pub mod exec;
pub mod family;
pub mod launch;
pub mod layers;
pub mod table;
pub mod users;
pub mod volumes;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use a3s_box_protocol::proto::{CreateSessionRequest, ResolvedUser};
use rustix::process::Pid;
use thiserror::Error;
use tokio::sync::watch;

use crate::control::Failure;
use crate::paths;
use crate::reaper::Exit;
use crate::stdio::{Stdio, StdioError};
use cgroup::{Cgroup, CgroupError};
use launch::Control;
use layers::{LayerError, Lease};

/// Why something could not be done to a session.
#[derive(Debug, Error)]
pub enum SessionError {
    /// No such session.
    #[error("session {0:?} does not exist")]
    Unknown(String),
    /// No such exec.
    #[error("exec {0:?} does not exist")]
    UnknownExec(String),
    /// An id that cannot be a directory name.
    #[error("{0:?} is no usable id")]
    Id(String),
    /// The id is taken by something else.
    #[error("{0:?} exists already with another specification")]
    Exists(String),
    /// The box is full.
    #[error("there are {0} already, the limit of a box")]
    TooMany(usize),
    /// The session is not in the right phase.
    #[error("session {id:?} {phase}")]
    Phase {
        /// Which.
        id: String,
        /// What it is instead.
        phase: &'static str,
    },
    /// Its creation failed, some time ago.
    #[error("{0}")]
    CreationFailed(Arc<SessionError>),
    /// A layer.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A volume.
    #[error(transparent)]
    Volume(#[from] volumes::VolumeError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The directories on the scratch disk.
    #[error("scratch disk: {step} {path}: {source}")]
    Scratch {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The stage could not be started or heard.
    #[error("{step}: {source}")]
    Launch {
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The stage's own words.
    #[error("{}", .0.message)]
    Stage(Failure),
    /// The stage ended without a word.
    #[error("the process ended while it was being set up{}", if *.out_of_memory { ": out of memory" } else { "" })]
    StageDied {
        /// The memory limit is too small even for the set-up.
        out_of_memory: bool,
    },
    /// Stdio.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The pod's user namespace.
    #[error("user namespace: {step}: {source}")]
    Users {
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The pod has its users already.
    #[error("the box has another user namespace already")]
    OtherUsers,
    /// A signal.
    #[error("signal {number}: {source}")]
    Signal {
        /// As the host gave it.
        number: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The process has ended.
    #[error("the process of {0:?} has ended")]
    Ended(String),
    /// There is no terminal to resize.
    #[error("{0:?} has no terminal")]
    NoTerminal(String),
    /// Killed processes are still there.
    #[error("the processes of {0:?} were killed and have not ended yet")]
    WillNotDie(String),
    /// The agent itself is at fault.
    #[error("the task that does this has failed")]
    TaskFailed,
}

impl SessionError {
    pub(crate) fn launch(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Launch { step, source }
    }
}

/// Where a session is, with what exists only there.
#[derive(Debug, Clone)]
pub enum Phase {
    /// Being set up.
    Creating,
    /// Ready to be started.
    Created(Arc<Live>),
    /// Its process was started.
    Running(Arc<Live>),
    /// Its process has ended.
    Exited(Arc<Live>, End),
    /// It never came to be, and holds nothing.
    Failed(Arc<SessionError>),
}

/// The end of a session's first process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// How.
    pub exit: Exit,
    /// Whether memory was the reason.
    pub oom_killed: bool,
}

/// A session and where it is.
#[derive(Debug)]
pub struct Session {
    /// The host's name for it.
    pub id: String,
    /// What was asked for, to recognise a repeated call.
    pub request: CreateSessionRequest,
    phase: watch::Sender<Phase>,
}

impl Session {
    fn new(request: CreateSessionRequest) -> Self {
        Self { id: request.session_id.clone(), request, phase: watch::Sender::new(Phase::Creating) }
    }

    /// Where it is now.
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// Waits for a phase.
    pub async fn reach(&self, there: impl FnMut(&Phase) -> bool) -> Result<Phase, SessionError> {
        self.phase.subscribe().wait_for(there).await.map(|p| p.clone()).map_err(|_| SessionError::TaskFailed)
    }

    /// The session's holdings, if it came to be.
    pub fn live(&self) -> Result<Arc<Live>, SessionError> {
        match self.phase() {
            Phase::Created(live) | Phase::Running(live) | Phase::Exited(live, _) => Ok(live),
            Phase::Creating => Err(self.wrong("is still being created")),
            Phase::Failed(error) => Err(SessionError::CreationFailed(error)),
        }
    }

    fn wrong(&self, phase: &'static str) -> SessionError {
        SessionError::Phase { id: self.id.clone(), phase }
    }
}

/// What a session holds from its creation to its deletion.
#[derive(Debug)]
pub struct Live {
    /// Its first process.
    pub pid: Pid,
    /// As whom it runs.
    pub user: ResolvedUser,
    /// Its limits.
    pub cgroup: Cgroup,
    /// Its pipes or terminal.
    pub stdio: Stdio,
    /// For execs; dropped when the first process ends, as they would keep its mounts.
    namespaces: Mutex<Option<Arc<Namespaces>>>,
    /// Taken by whoever starts it.
    control: Mutex<Option<Control>>,
    /// Given back by whoever deletes it.
    holdings: Mutex<Option<Holdings>>,
}

impl Live {
    /// What an exec joins, while the first process lives.
    pub fn namespaces(&self) -> Option<Arc<Namespaces>> {
        self.namespaces.lock().expect("nobody panics under this lock").clone()
    }

    fn take_control(&self) -> Option<Control> {
        self.control.lock().expect("nobody panics under this lock").take()
    }

    fn drop_namespaces(&self) {
        self.namespaces.lock().expect("nobody panics under this lock").take();
    }

    fn take_holdings(&self) -> Option<Holdings> {
        self.holdings.lock().expect("nobody panics under this lock").take()
    }
}

/// The namespaces of a session that are its own.
#[derive(Debug)]
pub struct Namespaces {
    /// Mounts.
    pub mount: OwnedFd,
    /// Processes.
    pub pid: OwnedFd,
    /// The view of cgroups.
    pub cgroup: OwnedFd,
}

impl Namespaces {
    /// Those of a process that nobody has reaped yet.
    fn of(pid: Pid) -> io::Result<Self> {
        let open = |kind: &str| {
            std::fs::File::open(format!("/proc/{}/ns/{kind}", pid.as_raw_pid())).map(OwnedFd::from)
        };
        Ok(Self { mount: open("mnt")?, pid: open("pid")?, cgroup: open("cgroup")? })
    }
}

/// Files that a session uses: leased layers and volumes, and a directory on the scratch disk.
#[derive(Debug)]
pub struct Holdings {
    _layers: Lease,
    _volumes: volumes::Lease,
    directory: Directory,
}

/// A session's directory on the scratch disk, with `upper`, `work` and `etc` in it. Dropping it moves it to the trash.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    fn make(id: &str) -> Result<Self, SessionError> {
        let path = paths::session_dir(id);
        let make = |path: &Path| {
            std::fs::create_dir(path).map_err(|source| SessionError::Scratch {
                step: "make",
                path: path.to_owned(),
                source,
            })
        };
        make(&path)?;
        let directory = Self { path };
        for name in ["upper", "work", "etc"] {
            make(&directory.path.join(name))?;
        }
        Ok(directory)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The name in the trash must be new: a session of the same id may have died shortly before. If the move
        // fails, the disk is broken, and the next session of this id says so.
        let name = format!(
            "{}-{}",
            self.path.file_name().unwrap_or_default().to_string_lossy(),
            crate::reaper::now_ns()
        );
        let _ = std::fs::rename(&self.path, Path::new(paths::TRASH).join(name));
    }
}
