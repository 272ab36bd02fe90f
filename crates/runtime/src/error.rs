//! What can go wrong with boxes and sessions. `kind` decides what a client sees; the message names the
//! stage, the object and the remedy.

use std::time::Duration;

use thiserror::Error;

use a3s_box_core::storage::StorageError;

/// The kinds that callers tell apart: `cri` maps each to a gRPC code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The object does not exist.
    NotFound,
    /// The name is taken by another object.
    AlreadyExists,
    /// The request itself is wrong.
    InvalidArgument,
    /// The object is not in a state that allows it.
    FailedPrecondition,
    /// The node lacks memory, disk or descriptors.
    ResourceExhausted,
    /// It did not happen in time.
    DeadlineExceeded,
    /// Another component failed; trying again may help.
    Unavailable,
    /// A fault of ours or of the guest.
    Internal,
}

/// The stage of work that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailedStage {
    /// Taking the name and writing the record.
    Reserve,
    /// Setting up the pod's network.
    Network,
    /// Making the scratch disk.
    Scratch,
    /// Starting the VMM.
    Vmm,
    /// The guest's way from power-on to its agent.
    Boot,
    /// Telling the agent about the pod.
    Configure,
    /// Attaching images and volumes.
    Attach,
    /// Preparing a session in the guest.
    Create,
    /// Executing a session's process.
    Start,
    /// Executing a further process.
    Exec,
    /// Ending a session or box.
    Stop,
    /// Removing what is left.
    Remove,
    /// Writing the log.
    Log,
    /// Looking an object up.
    Lookup,
}

impl FailedStage {
    /// The word for messages and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Reserve => "reserve",
            Self::Network => "network",
            Self::Scratch => "scratch",
            Self::Vmm => "vmm",
            Self::Boot => "boot",
            Self::Configure => "configure",
            Self::Attach => "attach",
            Self::Create => "create",
            Self::Start => "start",
            Self::Exec => "exec",
            Self::Stop => "stop",
            Self::Remove => "remove",
            Self::Log => "log",
            Self::Lookup => "lookup",
        }
    }
}

/// An operation on a box or session that failed.
#[derive(Debug, Error)]
#[error("{} of {object} failed: {message}", stage.word())]
pub struct RuntimeError {
    /// What a client is to see.
    pub kind: ErrorKind,
    /// Where.
    pub stage: FailedStage,
    /// On what: `pod sandbox 0123…`, `container 4567… (name)`.
    pub object: String,
    /// Why and what to do, with the guest's last words where there are any.
    pub message: String,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl RuntimeError {
    /// An error without a deeper cause.
    pub fn new(kind: ErrorKind, stage: FailedStage, object: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind, stage, object: object.into(), message: message.into(), source: None }
    }

    /// Something did not happen in time.
    pub fn timeout(stage: FailedStage, object: impl Into<String>, limit: Duration, what: &str) -> Self {
        Self::new(ErrorKind::DeadlineExceeded, stage, object, format!("{what} took longer than {limit:?}"))
    }

    /// A record that could not be written or read.
    pub fn storage(stage: FailedStage, object: impl Into<String>, source: StorageError) -> Self {
        Self {
            kind: ErrorKind::Internal,
            stage,
            object: object.into(),
            message: source.to_string(),
            source: Some(Box::new(source)),
        }
    }
}
