//! Errors of the seam. Each names the object and carries the operating system's word.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

/// A box that could not be started or found again.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// A part that a backend needs is not installed.
    #[error("{what} is missing at {}; {remedy}", path.display())]
    MissingPart {
        /// Which part: "the guest kernel".
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What the operator can do.
        remedy: &'static str,
    },
    /// A step of the host failed.
    #[error("could not {step} {}: {source}", path.display())]
    Io {
        /// What was tried, as a phrase: "write the plan to".
        step: &'static str,
        /// On which object.
        path: PathBuf,
        /// The operating system's word.
        #[source]
        source: std::io::Error,
    },
    /// The `a3s-box-vmm` process ended before its VM was up.
    #[error("the VMM ended while it was set up ({exit}): {last_words}")]
    EndedEarly {
        /// Exit code or signal, for people.
        exit: String,
        /// The end of its log.
        last_words: String,
    },
    /// The process did not report within the limit.
    #[error("the VMM was not up within {limit:?}: {last_words}")]
    Timeout {
        /// The limit.
        limit: Duration,
        /// The end of its log.
        last_words: String,
    },
}

/// An operation on a running VM that failed.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The VM ended instead.
    #[error("the VM ended ({exit}); its last words: {last_words}")]
    Ended {
        /// How, for people.
        exit: String,
        /// The end of console and log.
        last_words: String,
    },
    /// The guest did not report in time.
    #[error("the guest did not get ready within {limit:?}; its last words: {last_words}")]
    NotReady {
        /// The limit.
        limit: Duration,
        /// The end of console and log.
        last_words: String,
    },
    /// The guest sent something that is no Ready message.
    #[error("the guest's ready message is malformed: {0}")]
    BadReady(#[from] a3s_box_protocol::framing::FramingError),
    /// The process could not be signalled.
    #[error("could not signal process {pid}: {source}")]
    Signal {
        /// Which.
        pid: i32,
        /// The operating system's word.
        #[source]
        source: std::io::Error,
    },
}

/// A guest port that could not be dialled.
#[derive(Debug, Error)]
#[error("could not connect to guest port {port}: {source}")]
pub struct ConnectError {
    /// Which.
    pub port: u32,
    /// The operating system's word.
    #[source]
    pub source: std::io::Error,
}

/// A mount that could not be attached or removed.
#[derive(Debug, Error)]
#[error("could not {step} the mount {target} of the box: {source}")]
pub struct AttachError {
    /// What was tried: "clone", "enter the namespace for", "place".
    pub step: &'static str,
    /// Where, relative to the share.
    pub target: String,
    /// The operating system's word.
    #[source]
    pub source: std::io::Error,
}
