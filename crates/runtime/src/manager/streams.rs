//! Streams for clients that come and go: further processes, running sessions, ports of a pod.

use a3s_box_core::lifecycle::{BoxRequest, Decision};
use a3s_box_core::spec::ProcessSpec;
use a3s_box_core::{BoxId, SessionId};
use a3s_box_protocol::versions::Ability;

use super::{BoxManager, box_object, closing, session_object};
use crate::attached::Attached;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::execution::{Execution, PortStream};
use crate::port::PortConnection;
use crate::sessions::{SessionCommand, exec_streams};
use crate::streams;

impl BoxManager {
    /// Runs a further process in a running session, with streams and without a time limit. What `process` leaves
    /// empty is the session's own.
    pub async fn exec(
        &self,
        id: &SessionId,
        process: ProcessSpec,
        stdin: bool,
    ) -> Result<Execution, RuntimeError> {
        let (plan, shared) = (self.exec_plan(id, process)?, self.shared.clone());
        // A client that gives up half-way must not leave a process whose output nobody reads.
        let starting = self.shared.tasks.spawn(async move { exec_streams(plan, stdin, &shared).await });
        starting.await.unwrap_or_else(|_| Err(closing(&session_object(id))))
    }

    /// Connects one more client to a running session; it gets the output from now on. A client that does not keep
    /// up is told so and let go; the log and the other clients do not wait for it.
    pub async fn attach_running(&self, id: &SessionId, stdin: bool) -> Result<Attached, RuntimeError> {
        self.ask_session(id, |reply| SessionCommand::Attach { stdin, reply }).await
    }

    /// Connects to a TCP port on the loopback addresses of a pod. The stream's shutdown is TCP's half-close.
    pub async fn dial(&self, id: &BoxId, port: u16) -> Result<PortStream, RuntimeError> {
        let stage = FailedStage::PortForward;
        let refused =
            |reason: &str| RuntimeError::new(ErrorKind::FailedPrecondition, stage, box_object(id), reason);
        if let Decision::Deny(reason) = self.box_status(id)?.phase.decide(BoxRequest::Use) {
            return Err(refused(reason));
        }
        let live = self.reach(id).map_err(|reason| refused(&reason))?;
        if !live.abilities.has(Ability::Ports) {
            return Err(refused("its guest agent is of a version that does not forward ports"));
        }
        match streams::open_port(live.machine.as_ref(), port).await {
            Ok(stream) => Ok(Box::new(PortConnection::new(stream, &self.shared.tasks, &self.shared.closing))),
            Err(error) => Err(RuntimeError::caused(ErrorKind::Unavailable, stage, box_object(id), error)),
        }
    }
}
