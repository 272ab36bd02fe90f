//! How a session ends: on request, by itself, or with its box.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use a3s_box_core::lifecycle::{Decision, SessionPhase, SessionRequest, StopCause};
use a3s_box_core::spec::{MountSource, MountSpec};
use a3s_box_protocol::proto::ExitStatus;

use super::driver::{Exists, SessionDriver, Stopping};
use super::exit::ExitNews;
use crate::agent_client::AgentError;
use crate::boxes::{BoxCommand, BoxLife, LiveBox, Obituary};
use crate::clock::now_ns;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::events::Happened;
use crate::registry::Reply;

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// The longest that an ended session waits for its last output. A process that inherited the pipes may keep
/// them open for ever.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// The same where the VM is gone: nothing more comes than what is in the sockets.
const GONE_DRAIN_LIMIT: Duration = Duration::from_millis(500);

/// News of an end that come this soon after a session was taken up are of an end that came before.
const SEEN_LATE: Duration = Duration::from_secs(2);

/// The exit code of a session that was killed with its VM.
const KILLED: i32 = 137;
/// The exit code of a session whose end nobody saw.
const UNKNOWN: i32 = 255;

impl SessionDriver {
    pub(super) async fn stop(&mut self, grace: Duration, reply: Reply<()>) {
        match self.record.phase.decide(SessionRequest::Stop) {
            Decision::AlreadyDone => drop(reply.send(Ok(()))),
            Decision::Deny(reason) => {
                drop(reply.send(Err(self.error(ErrorKind::FailedPrecondition, FailedStage::Stop, reason))));
            }
            Decision::Accept => {
                self.begin_stop(grace).await;
                if let Some(stopping) = &mut self.stopping {
                    stopping.waiters.push(reply);
                }
            }
        }
    }

    /// Starts to stop, or hurries a stop that is under way.
    pub(super) async fn begin_stop(&mut self, grace: Duration) {
        let deadline = Instant::now() + grace;
        match &mut self.stopping {
            Some(stopping) if stopping.killed => {}
            Some(stopping) => stopping.deadline = stopping.deadline.min(deadline),
            None => {
                self.stopping =
                    Some(Stopping { killed: false, deadline, waiters: Vec::new(), removals: Vec::new() });
                if let (Some(live), false) = (self.live.clone(), grace.is_zero()) {
                    let signal =
                        if self.record.spec.stop_signal > 0 { self.record.spec.stop_signal } else { SIGTERM };
                    if let Err(error) =
                        live.agent.signal_session(self.record.id.to_string(), signal, false).await
                    {
                        tracing::warn!(id = %self.record.id, %error, "the stop signal was not delivered");
                    }
                }
            }
        }
    }

    /// The grace is over: kill. The killed one still lives: end its VM.
    pub(super) async fn escalate(&mut self) -> Exists {
        let limit = self.shared.config.kill_limit;
        let Some(stopping) = &mut self.stopping else { return Exists::Yes };
        let already_killed = std::mem::replace(&mut stopping.killed, true);
        stopping.deadline = Instant::now() + limit;
        let Some(live) = self.live.clone() else { return Exists::Yes };
        if already_killed {
            let detail = format!("{} did not end within {limit:?} of being killed", self.object());
            self.boxed.send(BoxCommand::AgentLost(detail)).await.ok();
        } else if let Err(error) = self.kill(&live).await {
            tracing::warn!(id = %self.record.id, %error, "SIGKILL was not delivered");
        }
        Exists::Yes
    }

    pub(super) async fn kill(&self, live: &LiveBox) -> Result<bool, AgentError> {
        live.agent.signal_session(self.record.id.to_string(), SIGKILL, true).await
    }

    pub(super) async fn remove(&mut self, reply: Reply<()>) -> Exists {
        if let SessionPhase::Running { .. } = self.record.phase {
            self.begin_stop(Duration::ZERO).await;
            if let Some(stopping) = &mut self.stopping {
                stopping.removals.push(reply);
            }
            return Exists::Yes;
        }
        let errors = self.forget().await;
        match RuntimeError::all_of(FailedStage::Remove, &self.object(), &errors) {
            Some(error) => {
                reply.send(Err(error)).ok();
                Exists::Yes
            }
            None => {
                self.shared.registry.leave_session(&self.record.id);
                self.tell(Happened::Deleted);
                reply.send(Ok(())).ok();
                Exists::No
            }
        }
    }

    /// Takes it out of the guest, its volumes out of the share, and its record out of the store. The record goes last
    /// and only if nothing is left.
    pub(super) async fn forget(&mut self) -> Vec<RuntimeError> {
        let mut errors = Vec::new();
        if let Some(live) = self.live.clone() {
            if let Err(error) = live.agent.delete_session(self.record.id.to_string()).await {
                errors.push(error.at(FailedStage::Remove, self.object()));
            }
            // Made by a build that attached them for this session alone.
            for name in &self.record.volumes {
                let target = format!("{}/{name}", a3s_box_protocol::SHARE_VOLUMES);
                if let Err(error) = live.machine.detach(&target).await {
                    errors.push(self.caused(ErrorKind::Internal, FailedStage::Remove, error));
                }
            }
            let id = self.record.id.clone();
            let hosted = |mount: &MountSpec| matches!(mount.source, MountSource::Host { .. });
            if self.record.spec.mounts.iter().any(hosted)
                && let Some(Err(error)) = self.ask_box(|reply| BoxCommand::ReleaseVolumes(id, reply)).await
            {
                errors.push(error);
            }
        }
        let box_ended = matches!(&*self.life.borrow(), BoxLife::Gone(_));
        if box_ended || errors.is_empty() {
            // Whatever was in a guest that has ended is gone with it.
            errors.clear();
            std::fs::remove_file(self.shared.log_record(&self.record.id)).ok();
            if let Err(error) = self.shared.records.delete_session(&self.record.id).await {
                errors.push(RuntimeError::storage(FailedStage::Remove, self.object(), error));
            }
        }
        errors
    }

    pub(super) async fn exited(&mut self, news: ExitNews) -> Exists {
        self.exit = None;
        self.drain(DRAIN_LIMIT).await;
        let started_at_ns = self.started_at();
        match news {
            ExitNews::Status(status) => {
                let (code, reason) = verdict(&status);
                self.record.phase = SessionPhase::Exited {
                    started_at_ns,
                    finished_at_ns: if self.seen_late() {
                        finished_at(&status, started_at_ns)
                    } else {
                        now_ns()
                    },
                    code,
                    reason: reason.to_owned(),
                    message: String::new(),
                };
                self.settle_end().await;
            }
            ExitNews::Unknown => {
                self.end(started_at_ns, UNKNOWN, "Unknown", "the guest agent does not know the container")
                    .await;
            }
        }
        self.answer_stop().await
    }

    pub(super) async fn box_gone(&mut self, obituary: Obituary) -> Exists {
        (self.live, self.foreign) = (None, None);
        self.exit = None;
        self.drain(GONE_DRAIN_LIMIT).await;
        let code = match obituary.cause {
            StopCause::Requested
            | StopCause::GuestPowerOff
            | StopCause::GuestPanic { .. }
            | StopCause::VmmDied { .. } => KILLED,
            StopCause::AgentLost { .. } => UNKNOWN,
        };
        match self.record.phase {
            SessionPhase::Exited { .. } => {}
            SessionPhase::Created | SessionPhase::Running { .. } => {
                self.end(self.started_at(), code, obituary.cause.reason(), &obituary.message).await;
            }
        }
        self.answer_stop().await
    }

    pub(super) async fn answer_stop(&mut self) -> Exists {
        let Some(stopping) = self.stopping.take() else { return Exists::Yes };
        for waiter in stopping.waiters {
            waiter.send(Ok(())).ok();
        }
        let mut exists = Exists::Yes;
        for removal in stopping.removals {
            match exists {
                Exists::Yes => exists = self.remove(removal).await,
                Exists::No => drop(removal.send(Ok(()))),
            }
        }
        exists
    }

    pub(super) async fn end(&mut self, started_at_ns: i64, code: i32, reason: &str, message: &str) {
        self.record.phase = SessionPhase::Exited {
            started_at_ns,
            finished_at_ns: now_ns(),
            code,
            reason: reason.to_owned(),
            message: message.to_owned(),
        };
        self.settle_end().await;
    }

    /// The end is a fact whether it can be written or not. As long as the VM lives the agent keeps it, and a
    /// daemon that comes back asks.
    pub(super) async fn settle_end(&mut self) {
        if let Err(error) = self.shared.records.put_session(&self.record).await {
            tracing::error!(id = %self.record.id, %error, "the end of a container was not recorded");
        }
        self.publish();
    }

    pub(super) async fn drain(&mut self, limit: Duration) {
        let Some(log) = self.log.take() else { return };
        log.ended.cancel();
        if timeout(limit, log.done.cancelled()).await.is_err() {
            tracing::debug!(id = %self.record.id, "a process that outlives the container holds its output open");
            self.log = Some(log);
        }
    }

    /// Guests' clocks drift; the host's time is right for an end that the host has seen.
    fn seen_late(&self) -> bool {
        self.resumed_at.is_some_and(|resumed| resumed.elapsed() < SEEN_LATE)
    }
}

/// CRI's exit code and reason.
fn verdict(status: &ExitStatus) -> (i32, &'static str) {
    let code = status.code.clamp(0, 255);
    let reason = match (status.oom_killed, code) {
        (true, _) => "OOMKilled",
        (false, 0) => "Completed",
        (false, _) => "Error",
    };
    (code, reason)
}

/// The guest's word for when it ended, if it can be true.
fn finished_at(status: &ExitStatus, started_at_ns: i64) -> i64 {
    let now = now_ns();
    match i64::try_from(status.exited_at_ns) {
        Ok(said) if (started_at_ns..=now).contains(&said) => said,
        Ok(_) | Err(_) => now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_out_of_memory_kill_is_told_apart_from_other_kills() {
        let status = |code, oom_killed| ExitStatus { code, oom_killed, ..ExitStatus::default() };
        assert_eq!(verdict(&status(137, true)), (137, "OOMKilled"));
        assert_eq!(verdict(&status(137, false)), (137, "Error"));
        assert_eq!(verdict(&status(0, false)), (0, "Completed"));
        assert_eq!(verdict(&status(-5, false)), (0, "Completed"));
        assert_eq!(verdict(&status(70_000, false)), (255, "Error"));
    }

    #[test]
    fn a_guest_cannot_end_before_it_started_or_in_the_future() {
        let at = |exited_at_ns| ExitStatus { exited_at_ns, ..ExitStatus::default() };
        let started = now_ns() - 1_000_000_000;
        assert_eq!(finished_at(&at(started as u64 + 5), started), started + 5);
        assert!(finished_at(&at(1), started) > started);
        assert!(finished_at(&at(u64::MAX), started) <= now_ns());
    }
}
