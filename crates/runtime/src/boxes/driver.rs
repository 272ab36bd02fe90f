//! The task that owns a box.
//!
//! Requests are queued and answered in turn. Once the box is up, the task watches three things: the
//! VM's end, the queue, and the end of the daemon, in this order, so that no request is acted on in a VM that is
//! known to be dead.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use a3s_box_core::SessionId;
use a3s_box_core::image::Layer;
use a3s_box_core::lifecycle::{BoxPhase, BoxRequest, Decision, SessionPhase, StopCause};
use a3s_box_vmm::{Machine, MachineExit};

use super::bring_up::bring_up;
use super::live::{BoxLife, Foreign, LiveBox, Obituary};
use super::owed::Owed;
use super::release::{object, release};
use crate::api::BoxStatus;
use crate::cgroup;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::events::{Happened, Subject};
use crate::records::{BoxRecord, HostObject};
use crate::registry::{Outcome, Reply, SessionEntry};
use crate::sessions::{SessionCommand, layer_attachment, layer_name};
use crate::shared::Shared;
use crate::sources::{Placed, Sources, Wanted};

/// The longest that the sessions of a box that stops may take to be killed and logged.
const SESSIONS_LIMIT: Duration = Duration::from_secs(5);

/// The longest until sessions have noticed that their box is gone.
const NOTICE_LIMIT: Duration = Duration::from_secs(2);

/// The longest for one mount.
pub(super) const ATTACH_LIMIT: Duration = Duration::from_secs(10);

/// What is asked of a box.
pub(crate) enum BoxCommand {
    /// End it.
    Stop(Reply<()>),
    /// End it and forget it.
    Remove(Reply<()>),
    /// Make layers visible to the guest.
    AttachLayers(Vec<Layer>, Reply<()>),
    /// Make the volumes of a session visible to the guest.
    AttachVolumes(SessionId, Vec<Wanted>, Reply<Vec<Placed>>),
    /// A session that is no more has no use for its volumes.
    ReleaseVolumes(SessionId, Reply<()>),
    /// The agent no longer answers.
    AgentLost(String),
}

/// How a driver begins.
pub(crate) enum BoxStart {
    /// By bringing the box up.
    BringUp,
    /// With a box that an earlier daemon started.
    Adopted(Arc<LiveBox>),
    /// With one that runs, and whose agent cannot be spoken to.
    Foreign(Arc<Foreign>),
    /// With a box that has ended.
    Ended(Obituary),
}

/// Whether the box still exists after a request.
#[derive(PartialEq, Eq)]
enum Exists {
    Yes,
    No,
}

/// The owner of one box.
pub(crate) struct BoxDriver {
    pub(crate) shared: Arc<Shared>,
    pub(crate) record: BoxRecord,
    pub(crate) commands: mpsc::Receiver<BoxCommand>,
    pub(crate) status: watch::Sender<BoxStatus>,
    pub(crate) life: watch::Sender<BoxLife>,
    pub(crate) outcome: watch::Sender<Outcome>,
    pub(crate) cancel: CancellationToken,
    /// The VM, once there was one; also after its end.
    pub(crate) machine: Option<Arc<dyn Machine>>,
}

impl BoxDriver {
    /// Runs until the box is removed or the daemon ends.
    pub(crate) async fn run(mut self, start: BoxStart) {
        self.announce(&start);
        let live = match start {
            BoxStart::BringUp => match self.bring_up().await {
                Some(live) => Some(live),
                None => return,
            },
            BoxStart::Adopted(live) => Some(live),
            BoxStart::Foreign(foreign) => {
                self.machine = Some(foreign.machine.clone());
                None
            }
            BoxStart::Ended(_) => None,
        };
        if let Some(live) = live {
            self.machine = Some(live.machine.clone());
            self.life.send_replace(BoxLife::Live(live));
            self.publish();
        }
        self.outcome.send_replace(Some(Ok(())));
        self.serve().await;
    }

    /// Tells what is known from the beginning, so that sessions whose owners start next see it.
    pub(crate) fn announce(&self, start: &BoxStart) {
        match start {
            BoxStart::BringUp => {}
            BoxStart::Adopted(live) => drop(self.life.send_replace(BoxLife::Live(live.clone()))),
            BoxStart::Foreign(foreign) => drop(self.life.send_replace(BoxLife::Foreign(foreign.clone()))),
            BoxStart::Ended(obituary) => drop(self.life.send_replace(BoxLife::Gone(obituary.clone()))),
        }
    }

    /// `None`: the start failed and everybody knows.
    async fn bring_up(&mut self) -> Option<Arc<LiveBox>> {
        let status = self.status.clone();
        let publish = Box::new(move |record: &BoxRecord| drop(status.send_replace(record.status())));
        let record = self.record.clone();
        match bring_up(self.shared.clone(), record, self.cancel.clone(), publish).await {
            Ok((record, live)) => {
                self.record = record;
                tracing::info!(id = %self.record.id, timeline = %timeline(&self.record), "pod sandbox is ready");
                Some(live)
            }
            Err(failed) => {
                self.record = failed.record;
                self.give_up(failed.error).await;
                None
            }
        }
    }

    /// Forgets a box that never was. Its name is free before its caller is told. What could not be undone
    /// stays on record and is tried again until it is gone.
    async fn give_up(&mut self, error: RuntimeError) {
        tracing::warn!(id = %self.record.id, %error, "pod sandbox could not be started");
        let mut owed = Owed::HalfMade(Box::new(self.record.clone()));
        let settled = owed.settle(&self.shared).await;
        self.shared.registry.leave_box(&self.record.id);
        self.outcome.send_replace(Some(Err(error)));
        self.refuse_queued();
        if settled.is_err() {
            owed.insist(self.shared.clone()).await;
        }
    }

    fn refuse_queued(&mut self) {
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                // It is as they want it.
                BoxCommand::Stop(reply)
                | BoxCommand::Remove(reply)
                | BoxCommand::ReleaseVolumes(_, reply) => drop(reply.send(Ok(()))),
                BoxCommand::AttachLayers(_, reply) => drop(reply.send(Err(self.never_started()))),
                BoxCommand::AttachVolumes(_, _, reply) => drop(reply.send(Err(self.never_started()))),
                BoxCommand::AgentLost(_) => {}
            }
        }
    }

    async fn serve(&mut self) {
        loop {
            let running = self.life.borrow().machine();
            let ended = async {
                match &running {
                    Some(machine) => machine.wait().await,
                    None => std::future::pending().await,
                }
            };
            let closing = self.shared.closing.clone();
            tokio::select! {
                biased;
                exit = ended => self.died(exit).await,
                command = self.commands.recv() => match command {
                    Some(command) => {
                        if self.handle(command).await == Exists::No {
                            return;
                        }
                    }
                    None => return,
                },
                () = closing.cancelled() => return,
            }
        }
    }

    pub(super) fn live(&self) -> Option<Arc<LiveBox>> {
        self.life.borrow().live().ok()
    }

    async fn handle(&mut self, command: BoxCommand) -> Exists {
        match command {
            BoxCommand::Stop(reply) => {
                let stopped = self.stop().await;
                reply.send(stopped).ok();
                Exists::Yes
            }
            BoxCommand::Remove(reply) => {
                let removed = self.remove().await;
                let exists = if removed.is_ok() { Exists::No } else { Exists::Yes };
                if exists == Exists::No {
                    self.shared.registry.leave_box(&self.record.id);
                    let subject = Subject::Box(self.record.id.clone());
                    self.shared.events.tell(subject, Happened::Deleted, self.record.status());
                }
                reply.send(removed).ok();
                if exists == Exists::No {
                    self.refuse_queued();
                }
                exists
            }
            BoxCommand::AttachLayers(layers, reply) => {
                let attached = self.attach_layers(layers).await;
                reply.send(attached).ok();
                Exists::Yes
            }
            BoxCommand::AttachVolumes(session, wanted, reply) => {
                let placed = self.attach_volumes(&session, wanted).await;
                reply.send(placed).ok();
                Exists::Yes
            }
            BoxCommand::ReleaseVolumes(session, reply) => {
                let released = self.release_volumes(&session).await;
                reply.send(released).ok();
                Exists::Yes
            }
            BoxCommand::AgentLost(detail) => {
                self.agent_lost(detail).await;
                Exists::Yes
            }
        }
    }

    /// The VM ended without being asked to.
    async fn died(&mut self, exit: MachineExit) {
        let Some(machine) = self.life.borrow().machine() else { return };
        let cgroups = self.record.plan.as_ref().map(|plan| plan.cgroups.clone()).unwrap_or_default();
        let kills = spawn_blocking(move || cgroup::oom_kills(&cgroups)).await.unwrap_or_default();
        let obituary = Obituary::unexpected(machine.as_ref(), exit, kills > 0).await;
        self.bury(obituary).await;
    }

    async fn agent_lost(&mut self, detail: String) {
        let Some(live) = self.live() else { return };
        let words = live.last_words().await;
        if let Err(error) = live.machine.kill().await {
            tracing::error!(id = %self.record.id, %error, "the VM of a lost agent could not be ended");
        }
        let detail = if words.is_empty() { detail } else { format!("{detail}; its last words: {words}") };
        self.bury(Obituary::of(StopCause::AgentLost { detail })).await;
    }

    async fn bury(&mut self, obituary: Obituary) {
        tracing::warn!(id = %self.record.id, reason = obituary.cause.reason(), message = %obituary.message, "pod sandbox ended");
        self.record.phase = BoxPhase::Stopped(obituary.cause.clone());
        self.record.sources = Sources::default();
        self.life.send_replace(BoxLife::Gone(obituary));
        self.publish();
        // The end is a fact whether it can be written or not; after a restart it would be found again.
        if let Err(error) = self.shared.records.put_box(&self.record).await {
            tracing::error!(id = %self.record.id, %error, "the end of a box was not recorded");
        }
    }

    async fn stop(&mut self) -> Result<(), RuntimeError> {
        match self.record.phase.decide(BoxRequest::Stop) {
            Decision::Deny(reason) => return Err(self.denied(FailedStage::Stop, reason)),
            // A stopped box may still hold what an earlier stop could not release.
            Decision::AlreadyDone => {}
            Decision::Accept => self.end().await?,
        }
        self.release_all_but_run_dir().await
    }

    /// Ends sessions, guest and VM. Fails only if nothing was done yet.
    async fn end(&mut self) -> Result<(), RuntimeError> {
        let before = std::mem::replace(&mut self.record.phase, BoxPhase::Stopping);
        if let Err(error) = self.save(FailedStage::Stop).await {
            self.record.phase = before;
            return Err(error);
        }
        self.publish();
        let sessions = self.shared.registry.sessions_of(&self.record.id);
        if let Some(live) = self.live() {
            self.kill_sessions(&sessions).await;
            self.shut_down(&live).await;
        }
        self.life.send_replace(BoxLife::Gone(Obituary::of(StopCause::Requested)));
        self.record.sources = Sources::default();
        await_exits(&sessions).await;
        self.record.phase = BoxPhase::Stopped(StopCause::Requested);
        self.publish();
        Ok(())
    }

    async fn kill_sessions(&self, sessions: &[Arc<SessionEntry>]) {
        // The others have nothing to be killed, and may be waiting for us while they are made or removed.
        let running =
            |entry: &&Arc<SessionEntry>| matches!(entry.status.borrow().phase, SessionPhase::Running { .. });
        let kills = sessions.iter().filter(running).map(|entry| async move {
            let (reply, answer) = oneshot::channel();
            let command = SessionCommand::Stop { grace: Duration::ZERO, reply };
            if entry.commands.send(command).await.is_ok() {
                // An error or a vanished driver: the shutdown that follows ends the session too.
                answer.await.ok();
            }
        });
        if timeout(SESSIONS_LIMIT, futures::future::join_all(kills)).await.is_err() {
            tracing::warn!(id = %self.record.id, "not all containers ended before their pod sandbox");
        }
    }

    /// Asks the guest to power itself off, so that its volumes are written back; the VM is killed later if it did not.
    async fn shut_down(&self, live: &LiveBox) {
        let limit = self.shared.config.stop_limit;
        let asked = async {
            if let Err(error) = live.agent.shutdown().await {
                tracing::debug!(id = %self.record.id, %error, "the guest did not confirm its shutdown");
            }
            live.machine.wait().await
        };
        if timeout(limit, asked).await.is_err() {
            tracing::warn!(id = %self.record.id, ?limit, "the guest did not shut down in time and is ended");
        }
    }

    async fn release_all_but_run_dir(&mut self) -> Result<(), RuntimeError> {
        let errors = self.release(|held| !matches!(held, HostObject::RunDir(_))).await;
        let saved = self.save(FailedStage::Stop).await;
        self.publish();
        match RuntimeError::all_of(FailedStage::Stop, &object(&self.record.id), &errors) {
            Some(error) => Err(error),
            None => saved,
        }
    }

    async fn release(&mut self, which: fn(&HostObject) -> bool) -> Vec<RuntimeError> {
        let shared = self.shared.clone();
        release(&shared, &mut self.record, self.machine.as_ref(), which).await
    }

    async fn remove(&mut self) -> Result<(), RuntimeError> {
        self.stop().await?;
        self.remove_sessions().await?;
        let errors = self.release(|_| true).await;
        if let Some(error) = RuntimeError::all_of(FailedStage::Remove, &object(&self.record.id), &errors) {
            return Err(error);
        }
        let deleted = self.shared.records.delete_box(&self.record.id).await;
        deleted.map_err(|error| RuntimeError::storage(FailedStage::Remove, object(&self.record.id), error))
    }

    async fn remove_sessions(&self) -> Result<(), RuntimeError> {
        let sessions = self.shared.registry.sessions_of(&self.record.id);
        let removals = sessions.iter().map(|entry| async move {
            let (reply, answer) = oneshot::channel();
            match entry.commands.send(SessionCommand::Remove(reply)).await {
                // A driver that has ended has removed its session.
                Err(_) => Ok(()),
                Ok(()) => answer.await.unwrap_or(Ok(())),
            }
        });
        let errors: Vec<_> =
            futures::future::join_all(removals).await.into_iter().filter_map(Result::err).collect();
        RuntimeError::all_of(FailedStage::Remove, &object(&self.record.id), &errors).map_or(Ok(()), Err)
    }

    /// Layers stay attached as long as the box lives: a container that restarts finds them mounted.
    async fn attach_layers(&mut self, layers: Vec<Layer>) -> Result<(), RuntimeError> {
        let live = self.life.borrow().live();
        let live = live.map_err(|reason| self.denied(FailedStage::Attach, &reason))?;
        let known = self.record.layers.clone();
        for layer in layers {
            let name = layer_name(&layer).map_err(|error| {
                let id = object(&self.record.id);
                RuntimeError::caused(ErrorKind::Internal, FailedStage::Attach, id, error)
            })?;
            if self.record.layers.contains(&name) {
                continue;
            }
            self.attach_layer(&live, layer).await?;
            self.record.layers.insert(name);
        }
        // After a crash before this a layer would be attached twice; the mount point's owner refuses that, and
        // the record is what tells.
        if self.record.layers == known { Ok(()) } else { self.save(FailedStage::Attach).await }
    }

    async fn attach_layer(&self, live: &LiveBox, layer: Layer) -> Result<(), RuntimeError> {
        let id = object(&self.record.id);
        let attachment = layer_attachment(layer).await.map_err(|error| {
            RuntimeError::caused(ErrorKind::Internal, FailedStage::Attach, id.clone(), error)
        })?;
        match timeout(ATTACH_LIMIT, live.machine.attach(attachment)).await {
            Err(_) => Err(RuntimeError::timeout(FailedStage::Attach, id, ATTACH_LIMIT, "attaching a layer")),
            Ok(Ok(())) => Ok(()),
            // A daemon that died after the mount and before its record.
            Ok(Err(error)) if error.source.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Ok(Err(error)) => Err(RuntimeError::caused(ErrorKind::Internal, FailedStage::Attach, id, error)),
        }
    }

    pub(super) async fn save(&self, stage: FailedStage) -> Result<(), RuntimeError> {
        let saved = self.shared.records.put_box(&self.record).await;
        saved.map_err(|error| RuntimeError::storage(stage, object(&self.record.id), error))
    }

    fn publish(&self) {
        let before = self.status.send_replace(self.record.status());
        self.shared.events.box_phase(&before.phase, self.record.status());
    }

    fn never_started(&self) -> RuntimeError {
        self.denied(FailedStage::Attach, "the pod sandbox could not be started")
    }

    pub(super) fn denied(&self, stage: FailedStage, reason: &str) -> RuntimeError {
        RuntimeError::new(ErrorKind::FailedPrecondition, stage, object(&self.record.id), reason)
    }
}

async fn await_exits(sessions: &[Arc<SessionEntry>]) {
    let exits = sessions.iter().map(|entry| {
        let mut status = entry.status.clone();
        async move {
            // A driver that has ended has removed its session.
            status
                .wait_for(|status| !matches!(status.phase, SessionPhase::Running { .. }))
                .await
                .map(drop)
                .ok();
        }
    });
    timeout(NOTICE_LIMIT, futures::future::join_all(exits)).await.ok();
}

fn timeline(record: &BoxRecord) -> String {
    let stages =
        record.timeline.iter().map(|stage| format!("{} {:.1?}+{:.1?}", stage.name, stage.at, stage.took));
    stages.collect::<Vec<_>>().join(", ")
}
