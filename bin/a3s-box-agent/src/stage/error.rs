//! Why a stage gave up.

use std::io;

use thiserror::Error;

use super::environment::EnvironmentError;
use super::program::ProgramError;
use super::user::UserError;
use crate::control::{Failure, FailureKind};

/// A stage that could not go on.
#[derive(Debug, Error)]
pub enum StageError {
    /// A system call failed on something that we own.
    #[error("{step} {object}: {source}")]
    System {
        /// What was tried, e.g. `mount`.
        step: &'static str,
        /// On what.
        object: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A mount cannot be made where or as it was asked.
    #[error("mount at {target}: {step}: {source}")]
    Mount {
        /// Path in the session.
        target: String,
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What an image volume shall show of its image is not there.
    #[error("mount at {target}: the image has no {sub_path:?}: {source}")]
    SubPath {
        /// Path in the session.
        target: String,
        /// Path in the image.
        sub_path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An option of a mount is not known.
    #[error("mount at {target}: unknown option {option:?}")]
    MountOption {
        /// Path in the session.
        target: String,
        /// The option.
        option: String,
    },
    /// A mount without a source, or with a name that leaves the share.
    #[error("mount at {target}: {reason}")]
    MountSource {
        /// Path in the session.
        target: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The working directory.
    #[error("working directory {path:?}: {source}")]
    WorkingDirectory {
        /// As asked for.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A resource limit.
    #[error("rlimit {name}: {reason}")]
    Rlimit {
        /// `RLIMIT_…`.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The groups that may ping, which the user namespace must have.
    #[error("sysctl net.ipv4.ping_group_range = {value:?}, in the pod's user namespace: {source}")]
    PingGroups {
        /// As asked for.
        value: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The user does not exist.
    #[error(transparent)]
    User(#[from] UserError),
    /// The environment.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// The program cannot be executed.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The agent sent something that is no specification.
    #[error("the specification is malformed: {0}")]
    Specification(#[from] prost::DecodeError),
}

impl StageError {
    /// How callers must tell it apart.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::System { .. } | Self::Specification(_) => FailureKind::Internal,
            Self::Mount { .. }
            | Self::SubPath { .. }
            | Self::MountOption { .. }
            | Self::MountSource { .. }
            | Self::WorkingDirectory { .. }
            | Self::Rlimit { .. }
            | Self::PingGroups { .. }
            | Self::User(_)
            | Self::Environment(_) => FailureKind::Invalid,
            Self::Program(ProgramError::NotFound { .. }) => FailureKind::ProgramNotFound,
            Self::Program(ProgramError::Denied { .. }) => FailureKind::ProgramDenied,
            Self::Program(ProgramError::Failed { .. } | ProgramError::Nothing | ProgramError::Nul { .. }) => {
                FailureKind::ProgramBroken
            }
        }
    }

    /// As it is sent to the agent.
    pub fn to_failure(&self) -> Failure {
        Failure::new(self.kind(), self.to_string())
    }
}

/// Names the step and the object of a system call that failed.
pub(crate) trait Context<T> {
    fn context(self, step: &'static str, object: impl std::fmt::Display) -> Result<T, StageError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, step: &'static str, object: impl std::fmt::Display) -> Result<T, StageError> {
        self.map_err(|e| StageError::System { step, object: object.to_string(), source: e.into() })
    }
}
