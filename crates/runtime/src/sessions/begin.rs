//! How a session comes to be, or is taken up again.

use std::io;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use a3s_box_core::lifecycle::SessionPhase;
use a3s_box_protocol::proto::{SessionState, session_state};

use super::driver::{ATTACH_LIMIT, Exists, SessionDriver};
use super::{request, sources, volumes};
use crate::boxes::{BoxCommand, BoxLife, LiveBox};
use crate::clock::now_ns;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::events::Happened;
use crate::log;
use crate::records::SessionRecord;
use crate::registry::Reply;

impl SessionDriver {
    pub(super) async fn begin(&mut self, reply: Reply<()>) -> Exists {
        match self.create().await {
            Ok(()) => {
                self.tell(Happened::Created);
                self.outcome.send_replace(Some(Ok(())));
                reply.send(Ok(())).ok();
                Exists::Yes
            }
            Err(error) => {
                let left = self.forget().await;
                self.shared.registry.leave_session(&self.record.id);
                let error = error.with_leftovers(&left);
                self.outcome.send_replace(Some(Err(error.clone())));
                reply.send(Err(error)).ok();
                self.refuse_queued();
                Exists::No
            }
        }
    }

    pub(super) async fn create(&mut self) -> Result<(), RuntimeError> {
        let live = self.require_live(FailedStage::Create)?;
        let mut message = request::create(&self.record, &live.facts)
            .map_err(|error| self.caused(ErrorKind::InvalidArgument, FailedStage::Create, error))?;
        let readonly = sources::examine(self.record.spec.mounts.clone())
            .await
            .map_err(|error| self.caused(ErrorKind::InvalidArgument, FailedStage::Create, error))?;
        // In the guest too, which then shows it: programs look before they write.
        for (mount, _) in message.mounts.iter_mut().zip(readonly).filter(|(_, readonly)| *readonly) {
            mount.readonly = true;
        }
        self.save(FailedStage::Create).await?;
        self.attach_layers().await?;
        self.attach_volumes(&live).await?;
        match live.agent.create_session(message).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.agent_error(&live, FailedStage::Create, error).await),
        }
    }

    pub(super) async fn attach_layers(&self) -> Result<(), RuntimeError> {
        let (reply, answer) = oneshot::channel();
        let own = self.record.image.layers.iter();
        let volumes = self.record.spec.mounts.iter().flat_map(|mount| mount.source.layers());
        let command = BoxCommand::AttachLayers(own.chain(volumes).cloned().collect(), reply);
        let gone =
            || self.error(ErrorKind::FailedPrecondition, FailedStage::Attach, "the pod sandbox is gone");
        self.boxed.send(command).await.map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    pub(super) async fn attach_volumes(&self, live: &LiveBox) -> Result<(), RuntimeError> {
        for (index, mount) in self.record.spec.mounts.iter().enumerate() {
            let attachment = volumes::volume(&self.record.id, index, mount)
                .await
                .map_err(|error| self.caused(ErrorKind::InvalidArgument, FailedStage::Attach, error))?;
            let Some(attachment) = attachment else { continue };
            match timeout(ATTACH_LIMIT, live.machine.attach(attachment)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    let kind = match error.source.kind() {
                        io::ErrorKind::Unsupported => ErrorKind::FailedPrecondition,
                        _ => ErrorKind::Internal,
                    };
                    return Err(self.caused(kind, FailedStage::Attach, error));
                }
                Err(_) => {
                    let what = format!("attaching the volume at {}", mount.target);
                    return Err(RuntimeError::timeout(
                        FailedStage::Attach,
                        self.object(),
                        ATTACH_LIMIT,
                        &what,
                    ));
                }
            }
        }
        Ok(())
    }

    pub(super) async fn resume(&mut self, state: Option<SessionState>) -> Exists {
        let Some(live) = self.live.clone() else { return self.resume_ended().await };
        let guest = state.map(|state| state.phase());
        match (&self.record.phase, guest) {
            (SessionPhase::Exited { .. }, _)
            | (SessionPhase::Created, Some(session_state::Phase::Created)) => Exists::Yes,
            // Its making was never finished: nobody has learned its id.
            (SessionPhase::Created, None) => {
                let errors = self.forget().await;
                tracing::info!(id = %self.record.id, ?errors, "a container that was half made is gone");
                self.shared.registry.leave_session(&self.record.id);
                self.refuse_queued();
                Exists::No
            }
            (SessionPhase::Created, Some(session_state::Phase::Running | session_state::Phase::Exited)) => {
                self.record.phase = SessionPhase::Running { started_at_ns: now_ns() };
                self.resume_running(&live);
                Exists::Yes
            }
            (SessionPhase::Running { .. }, _) => {
                self.resume_running(&live);
                Exists::Yes
            }
        }
    }

    pub(super) fn resume_running(&mut self, live: &Arc<LiveBox>) {
        self.log = Some(log::resume(self.log_plan(live), &self.shared.tasks, &self.shared.closing));
        self.resumed_at = Some(Instant::now());
        self.watch_exit(live);
        self.publish();
    }

    /// The box ended while no daemon looked.
    pub(super) async fn resume_ended(&mut self) -> Exists {
        let gone = match &*self.life.borrow() {
            BoxLife::Gone(obituary) => obituary.clone(),
            BoxLife::Starting | BoxLife::Live(_) | BoxLife::Foreign(_) => return Exists::Yes,
        };
        self.box_gone(gone).await
    }
}

/// What an agent would say of a session that is as its record says.
pub(super) fn as_recorded(record: &SessionRecord) -> SessionState {
    let phase = match record.phase {
        SessionPhase::Created => session_state::Phase::Created,
        SessionPhase::Running { .. } => session_state::Phase::Running,
        SessionPhase::Exited { .. } => session_state::Phase::Exited,
    };
    SessionState { session_id: record.id.to_string(), phase: phase.into(), ..SessionState::default() }
}
