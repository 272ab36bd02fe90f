//! What happens to pods and containers, as kubelet's evented PLEG listens to it.

use a3s_box_core::BoxId;
use a3s_box_runtime::{Event, EventStream, EventsMissed, Happened, Subject};
use futures::{Stream, StreamExt};
use tonic::Status;

use crate::convert::status;
use crate::proto::{ContainerEventResponse, ContainerEventType, ContainerStatus};
use crate::service::CriService;

impl CriService {
    /// Events from now on. A listener that does not keep up is told so and let go: kubelet then lists everything and
    /// listens again.
    pub(crate) fn container_events(
        &self,
    ) -> impl Stream<Item = Result<ContainerEventResponse, Status>> + Send + use<> {
        let service = self.clone();
        let events =
            futures::stream::unfold(Some(self.boxes.events()), move |events: Option<EventStream>| {
                let service = service.clone();
                async move {
                    let mut events = events?;
                    match events.next().await? {
                        Ok(event) => Some((Ok(service.event(&event)), Some(events))),
                        Err(error @ EventsMissed { .. }) => {
                            tracing::warn!("a listener of events is let go: {error}");
                            Some((Err(Status::resource_exhausted(error.to_string())), None))
                        }
                    }
                }
            });
        events.take_until(self.stopping.clone().cancelled_owned())
    }

    /// The statuses are those of now: they show the event, and perhaps later ones. A pod that is gone is shown as it was
    /// at the event, by which listeners know whose it is; containers that are gone are not shown.
    fn event(&self, event: &Event) -> ContainerEventResponse {
        let (container_id, boxed) = match &event.subject {
            Subject::Box(id) => (id.to_string(), id),
            Subject::Session(id, boxed) => (id.to_string(), boxed),
        };
        let kind = match event.happened {
            Happened::Created => ContainerEventType::ContainerCreatedEvent,
            Happened::Started => ContainerEventType::ContainerStartedEvent,
            Happened::Stopped => ContainerEventType::ContainerStoppedEvent,
            Happened::Deleted => ContainerEventType::ContainerDeletedEvent,
        };
        ContainerEventResponse {
            container_id,
            container_event_type: kind.into(),
            created_at: event.at_ns,
            pod_sandbox_status: Some(match self.boxes.box_status(boxed) {
                Ok(state) => status::sandbox_status(&state),
                Err(_) => status::sandbox_status(&event.boxed),
            }),
            containers_statuses: self.container_statuses(boxed),
        }
    }

    /// All containers of a pod.
    pub(crate) fn container_statuses(&self, boxed: &BoxId) -> Vec<ContainerStatus> {
        let sessions = self.boxes.list_sessions_of(boxed);
        sessions.iter().map(|state| status::container_status(state, self.shown_image(state))).collect()
    }
}
