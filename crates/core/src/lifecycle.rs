//! The two state machines, as pure decisions.
//!
//! ```text
//! box:      Reserved -> Prepared -> Booting -> Ready -> Stopping -> Stopped -> (removed)
//!               |           |           |         |                    ^
//!               +-----------+-----------+---------+--- failure/death --+
//!
//! session:  Created -> Running -> Exited -> (removed)
//! ```
//!
//! A request is put to `decide`, which answers what is to be done with it; the task that owns the object
//! then acts. Nothing here performs an effect.

use serde::{Deserialize, Serialize};

/// Where a box is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BoxPhase {
    /// Its name is taken, nothing exists yet.
    Reserved,
    /// Its VM has all that it needs to start.
    Prepared,
    /// Its VM was started.
    Booting,
    /// Its agent answers; sessions may be made.
    Ready,
    /// It is being stopped on request.
    Stopping,
    /// Its VM is gone.
    Stopped(StopCause),
}

/// Why a box is stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopCause {
    /// A client asked for it.
    Requested,
    /// The guest powered itself off.
    GuestPowerOff,
    /// The guest's kernel panicked.
    GuestPanic {
        /// What was seen, with the console's last words.
        detail: String,
    },
    /// The VM was killed or failed.
    VmmDied {
        /// What was seen, with the console's last words.
        detail: String,
    },
    /// The agent ended, and its guest with it, or no longer answers although the VM runs; the VM was ended.
    AgentLost {
        /// What was seen.
        detail: String,
    },
}

impl StopCause {
    /// CRI's reason word for the sessions that died with the box.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Requested => "Stopped",
            Self::GuestPowerOff => "GuestPowerOff",
            Self::GuestPanic { .. } => "GuestPanic",
            Self::VmmDied { .. } => "VMKilled",
            Self::AgentLost { .. } => "AgentLost",
        }
    }
}

/// Where a session is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionPhase {
    /// Prepared in the guest; nothing runs.
    Created,
    /// Its process runs.
    Running {
        /// Nanoseconds since the epoch.
        started_at_ns: i64,
    },
    /// Its process has ended, or never could be started.
    Exited {
        /// 0 if it never ran.
        started_at_ns: i64,
        /// Nanoseconds since the epoch.
        finished_at_ns: i64,
        /// 0 to 255; 128 + number for a signal.
        code: i32,
        /// One word: `Completed`, `Error`, `OOMKilled`, `StartError`, `VMKilled`, …
        reason: String,
        /// For people.
        message: String,
    },
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Do it.
    Accept,
    /// It is as the client wants it; answer success and do nothing.
    AlreadyDone,
    /// Refuse, for this reason (a clause that follows "because").
    Deny(&'static str),
}

/// What clients ask of a box.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BoxRequest {
    /// Make, start or execute something in it.
    Use,
    /// Stop it.
    Stop,
    /// Remove it, stopping it first if need be.
    Remove,
}

/// What clients ask of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionRequest {
    /// Run its process.
    Start,
    /// Execute a further process, or resize its terminal.
    Exec,
    /// End its process.
    Stop,
    /// Remove it, ending it first if need be.
    Remove,
}

impl BoxPhase {
    /// Decides about a request in this phase.
    pub fn decide(&self, request: BoxRequest) -> Decision {
        match (request, self) {
            (BoxRequest::Use, Self::Ready) => Decision::Accept,
            (BoxRequest::Use, Self::Reserved | Self::Prepared | Self::Booting) => {
                Decision::Deny("the pod sandbox is still starting")
            }
            (BoxRequest::Use, Self::Stopping | Self::Stopped(_)) => {
                Decision::Deny("the pod sandbox is not ready")
            }
            (BoxRequest::Stop, Self::Stopped(_)) => Decision::AlreadyDone,
            (
                BoxRequest::Stop | BoxRequest::Remove,
                Self::Reserved | Self::Prepared | Self::Booting | Self::Ready | Self::Stopping,
            )
            | (BoxRequest::Remove, Self::Stopped(_)) => Decision::Accept,
        }
    }

    /// CRI knows two states of a sandbox; only a box that can be used is READY.
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }
}

impl SessionPhase {
    /// Decides about a request in this phase.
    pub fn decide(&self, request: SessionRequest) -> Decision {
        match (request, self) {
            (SessionRequest::Start, Self::Created)
            | (SessionRequest::Exec | SessionRequest::Stop, Self::Running { .. })
            | (SessionRequest::Remove, Self::Created | Self::Running { .. } | Self::Exited { .. }) => {
                Decision::Accept
            }
            (SessionRequest::Start, Self::Running { .. }) => {
                Decision::Deny("the container is already running")
            }
            (SessionRequest::Start, Self::Exited { .. }) => Decision::Deny("the container has exited"),
            (SessionRequest::Exec, Self::Created) => Decision::Deny("the container was not started"),
            (SessionRequest::Exec, Self::Exited { .. }) => Decision::Deny("the container has exited"),
            (SessionRequest::Stop, Self::Created | Self::Exited { .. }) => Decision::AlreadyDone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn box_phases() -> Vec<BoxPhase> {
        vec![
            BoxPhase::Reserved,
            BoxPhase::Prepared,
            BoxPhase::Booting,
            BoxPhase::Ready,
            BoxPhase::Stopping,
            BoxPhase::Stopped(StopCause::Requested),
        ]
    }

    #[test]
    fn a_box_can_be_removed_in_every_phase() {
        for phase in box_phases() {
            assert_eq!(phase.decide(BoxRequest::Remove), Decision::Accept, "{phase:?}");
        }
    }

    #[test]
    fn only_a_ready_box_can_be_used() {
        for phase in box_phases() {
            assert_eq!(phase.decide(BoxRequest::Use) == Decision::Accept, phase.is_ready(), "{phase:?}");
        }
    }

    #[test]
    fn stop_is_never_denied() {
        for phase in box_phases() {
            assert!(!matches!(phase.decide(BoxRequest::Stop), Decision::Deny(_)), "{phase:?}");
        }
        let exited = SessionPhase::Exited {
            started_at_ns: 1,
            finished_at_ns: 2,
            code: 0,
            reason: String::new(),
            message: String::new(),
        };
        for phase in [SessionPhase::Created, SessionPhase::Running { started_at_ns: 1 }, exited] {
            assert!(!matches!(phase.decide(SessionRequest::Stop), Decision::Deny(_)), "{phase:?}");
        }
    }
}
