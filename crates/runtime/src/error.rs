//! What can go wrong with boxes and sessions. `kind` decides what a client sees; the message names the
//! stage, the object and the remedy.

use std::sync::Arc;
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
    /// Connecting to a port of the pod.
    PortForward,
    /// Ending a session or box.
    Stop,
    /// Removing what is left.
    Remove,
    /// Writing the log.
    Log,
    /// Changing limits.
    Update,
    /// Measuring what a session uses.
    Stats,
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
            Self::PortForward => "port-forward",
            Self::Stop => "stop",
            Self::Remove => "remove",
            Self::Log => "log",
            Self::Update => "update",
            Self::Stats => "stats",
            Self::Lookup => "lookup",
        }
    }
}

/// Why a program could not be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProgramFault {
    /// There is no such program.
    NotFound,
    /// It may not or cannot be executed.
    NotExecutable,
}

/// An operation on a box or session that failed. It can be cloned, because everybody who joined the
/// operation is told the same.
#[derive(Debug, Clone, Error)]
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
    pub source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl RuntimeError {
    /// An error without a deeper cause.
    pub fn new(
        kind: ErrorKind,
        stage: FailedStage,
        object: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self { kind, stage, object: object.into(), message: message.into(), source: None }
    }

    /// Something did not happen in time.
    pub fn timeout(stage: FailedStage, object: impl Into<String>, limit: Duration, what: &str) -> Self {
        Self::new(ErrorKind::DeadlineExceeded, stage, object, format!("{what} took longer than {limit:?}"))
    }

    /// An error with its cause; the message is the cause's own and those of its causes.
    pub fn caused(
        kind: ErrorKind,
        stage: FailedStage,
        object: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self { kind, stage, object: object.into(), message: told(&source), source: Some(Arc::new(source)) }
    }

    /// A record that could not be written or read.
    pub fn storage(stage: FailedStage, object: impl Into<String>, source: StorageError) -> Self {
        Self::caused(ErrorKind::Internal, stage, object, source)
    }

    /// What is wrong with the program, where that is why a session did not start.
    pub fn program_fault(&self) -> Option<ProgramFault> {
        self.source.as_ref()?.downcast_ref::<crate::agent_client::AgentError>()?.program_fault()
    }

    /// Adds what the guest said last, if it said anything.
    pub fn with_last_words(mut self, words: &str) -> Self {
        let words = words.trim();
        if !words.is_empty() && !self.message.contains(words) {
            self.message.push_str("; the guest's last words: ");
            self.message.push_str(words);
        }
        self
    }

    /// Adds what could not be undone after the failure.
    pub fn with_leftovers(mut self, errors: &[RuntimeError]) -> Self {
        for error in errors {
            self.message.push_str("; and while undoing it, ");
            self.message.push_str(&error.to_string());
        }
        self
    }

    /// One error of several, which all happened; `None` if none did.
    pub fn all_of(stage: FailedStage, object: &str, errors: &[RuntimeError]) -> Option<Self> {
        let first = errors.first()?;
        let messages: Vec<String> = errors.iter().map(ToString::to_string).collect();
        Some(Self {
            kind: first.kind,
            stage,
            object: object.to_owned(),
            message: messages.join("; "),
            source: first.source.clone(),
        })
    }
}

/// A cause with its own causes, each told once: some errors repeat their source's words.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Error)]
    #[error("outer")]
    struct Outer(#[source] Inner);

    #[derive(Debug, Error)]
    #[error("inner: {0}")]
    struct Inner(#[source] std::io::Error);

    #[test]
    fn every_cause_is_told_once() {
        let cause = Outer(Inner(std::io::Error::other("no disk")));
        let error = RuntimeError::caused(ErrorKind::Internal, FailedStage::Vmm, "pod sandbox x", cause);
        assert_eq!(error.to_string(), "vmm of pod sandbox x failed: outer: inner: no disk");
    }
}
