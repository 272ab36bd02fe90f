//! What happens to boxes and sessions, for whoever listens.
//!
//! ```text
//! box:      Created, Started (it is ready) ── Stopped ── Deleted
//! session:  Created ── Started ── Stopped ── Deleted
//! ```
//!
//! Events of one object come in its order, and after its status shows them. A box that never got ready had none.

use std::sync::Arc;

use tokio::sync::broadcast;

use a3s_box_core::lifecycle::{BoxPhase, SessionPhase};
use a3s_box_core::{BoxId, SessionId};

use crate::api::BoxStatus;
use crate::clock::now_ns;

/// So many are kept for a listener that is slow; then it misses the oldest and is told how many.
const KEPT: usize = 4096;

/// Whom an event is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A box.
    Box(BoxId),
    /// A session and its box.
    Session(SessionId, BoxId),
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happened {
    /// It exists.
    Created,
    /// It runs.
    Started,
    /// It has ended, by itself or because it was asked to.
    Stopped,
    /// It exists no more.
    Deleted,
}

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Whom it is about.
    pub subject: Subject,
    /// What happened.
    pub happened: Happened,
    /// Nanoseconds since the epoch, by the host's clock.
    pub at_ns: i64,
    /// The box as it was then, the event's own or that of its session: who hears of its end may find it gone.
    pub boxed: Arc<BoxStatus>,
}

/// A listener that was too slow has missed events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{missed} events came faster than they were read; list everything again")]
pub struct EventsMissed {
    /// How many.
    pub missed: u64,
}

/// Events from a moment on.
#[derive(Debug)]
pub struct EventStream(broadcast::Receiver<Event>);

impl EventStream {
    /// The next one. `None`: the runtime has ended.
    pub async fn next(&mut self) -> Option<Result<Event, EventsMissed>> {
        match self.0.recv().await {
            Ok(event) => Some(Ok(event)),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Err(EventsMissed { missed })),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// Where events are told. Nobody may be listening.
#[derive(Debug)]
pub(crate) struct Events(broadcast::Sender<Event>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::Sender::new(KEPT))
    }
}

impl Events {
    pub(crate) fn listen(&self) -> EventStream {
        EventStream(self.0.subscribe())
    }

    pub(crate) fn tell(&self, subject: Subject, happened: Happened, boxed: BoxStatus) {
        self.0.send(Event { subject, happened, at_ns: now_ns(), boxed: Arc::new(boxed) }).ok();
    }

    /// A box's phase has changed.
    pub(crate) fn box_phase(&self, before: &BoxPhase, now: BoxStatus) {
        for happened in of_box(before, &now.phase) {
            self.tell(Subject::Box(now.id.clone()), *happened, now.clone());
        }
    }

    /// A session's phase has changed, in a box that is so.
    pub(crate) fn session_phase(
        &self,
        id: &SessionId,
        before: &SessionPhase,
        now: &SessionPhase,
        boxed: impl FnOnce() -> BoxStatus,
    ) {
        if let Some(happened) = of_session(before, now) {
            let boxed = boxed();
            self.tell(Subject::Session(id.clone(), boxed.id.clone()), happened, boxed);
        }
    }
}

fn of_box(before: &BoxPhase, now: &BoxPhase) -> &'static [Happened] {
    match (before, now) {
        (BoxPhase::Reserved | BoxPhase::Prepared | BoxPhase::Booting, BoxPhase::Ready) => {
            &[Happened::Created, Happened::Started]
        }
        (BoxPhase::Ready | BoxPhase::Stopping, BoxPhase::Stopped(_)) => &[Happened::Stopped],
        (
            BoxPhase::Reserved
            | BoxPhase::Prepared
            | BoxPhase::Booting
            | BoxPhase::Ready
            | BoxPhase::Stopping
            | BoxPhase::Stopped(_),
            _,
        ) => &[],
    }
}

fn of_session(before: &SessionPhase, now: &SessionPhase) -> Option<Happened> {
    match (before, now) {
        (SessionPhase::Created, SessionPhase::Running { .. }) => Some(Happened::Started),
        (SessionPhase::Created | SessionPhase::Running { .. }, SessionPhase::Exited { .. }) => {
            Some(Happened::Stopped)
        }
        (SessionPhase::Created | SessionPhase::Running { .. } | SessionPhase::Exited { .. }, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use a3s_box_core::lifecycle::StopCause;

    use super::*;

    #[test]
    fn a_box_that_was_never_ready_has_no_events() {
        let stopped = BoxPhase::Stopped(StopCause::Requested);
        assert!(of_box(&BoxPhase::Booting, &stopped).is_empty());
        assert_eq!(of_box(&BoxPhase::Booting, &BoxPhase::Ready), [Happened::Created, Happened::Started]);
        assert!(of_box(&BoxPhase::Ready, &BoxPhase::Stopping).is_empty());
        assert_eq!(of_box(&BoxPhase::Stopping, &stopped), [Happened::Stopped]);
        // Published again, or taken up by another daemon.
        assert!(of_box(&BoxPhase::Ready, &BoxPhase::Ready).is_empty());
        assert!(of_box(&stopped, &stopped).is_empty());
    }

    fn boxed() -> BoxStatus {
        BoxStatus {
            id: BoxId::from_random([1; 32]),
            spec: Default::default(),
            phase: BoxPhase::Ready,
            created_at_ns: 0,
            ips: Vec::new(),
            backend: String::new(),
            kernel_release: String::new(),
            vmm_pid: None,
            timeline: Vec::new(),
            dir: Default::default(),
        }
    }

    #[tokio::test]
    async fn a_slow_listener_is_told_what_it_missed_and_goes_on() {
        let events = Events::default();
        let mut listener = events.listen();
        let subject = Subject::Box(BoxId::from_random([1; 32]));
        for _ in 0..KEPT {
            events.tell(subject.clone(), Happened::Created, boxed());
        }
        events.tell(subject.clone(), Happened::Stopped, boxed());
        assert_eq!(listener.next().await, Some(Err(EventsMissed { missed: 1 })));
        assert_eq!(listener.next().await.unwrap().unwrap().happened, Happened::Created);
    }
}
