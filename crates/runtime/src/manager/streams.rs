//! Streams for clients that come and go: further processes, running sessions, ports of a pod.
//!
//! The signatures are settled so that callers can be built against them. Each call answers
//! `FailedPrecondition` until the guest's side of it exists.

use a3s_box_core::spec::ProcessSpec;
use a3s_box_core::{BoxId, SessionId};

use super::{BoxManager, session_object};
use crate::attached::Attached;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::execution::{Execution, PortStream};

impl BoxManager {
    /// Runs a further process in a running session, with streams and without a time limit.
    pub async fn exec(
        &self,
        id: &SessionId,
        process: ProcessSpec,
        stdin: bool,
    ) -> Result<Execution, RuntimeError> {
        self.session_status(id)?;
        let _ = (process, stdin);
        Err(unavailable(FailedStage::Exec, session_object(id), "exec with streams"))
    }

    /// Connects one more client to a running session; it gets the output from now on.
    pub async fn attach_running(&self, id: &SessionId, stdin: bool) -> Result<Attached, RuntimeError> {
        self.session_status(id)?;
        let _ = stdin;
        Err(unavailable(FailedStage::Attach, session_object(id), "attaching to a running container"))
    }

    /// Connects to a TCP port on the loopback addresses of a pod. The stream's shutdown is TCP's half-close.
    pub async fn dial(&self, id: &BoxId, port: u16) -> Result<PortStream, RuntimeError> {
        self.box_status(id)?;
        let object = format!("port {port} of pod sandbox {}", id.short());
        Err(unavailable(FailedStage::Attach, object, "port forwarding"))
    }
}

fn unavailable(stage: FailedStage, object: String, what: &str) -> RuntimeError {
    RuntimeError::new(ErrorKind::FailedPrecondition, stage, object, format!("{what} is not available yet"))
}
