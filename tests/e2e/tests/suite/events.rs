//! What kubelet's evented PLEG hears.

use std::time::Duration;

use a3s_box_cri::proto::ContainerEventType::{
    ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent,
};
use a3s_box_cri::proto::{ContainerEventResponse, ContainerState, GetEventsRequest, PodSandboxState};
use anyhow::{Context, Result, ensure};
use tonic::Streaming;

use crate::suite::{Suite, launch};

const LIMIT: Duration = Duration::from_secs(60);

/// The next event of that pod; the suite's daemon has no others at the time.
async fn next(events: &mut Streaming<ContainerEventResponse>) -> Result<ContainerEventResponse> {
    let next = tokio::time::timeout(LIMIT, events.message()).await.context("no event came")?;
    next?.context("the stream of events has ended")
}

pub(crate) async fn a_pods_life_is_told_in_order(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let mut events = client.runtime.get_container_events(GetEventsRequest {}).await?.into_inner();
    let config = suite.pod("events")?;
    let pod = client.run_pod(&config).await?;
    for expected in [ContainerCreatedEvent, ContainerStartedEvent] {
        let event = next(&mut events).await?;
        ensure!(event.container_id == pod && event.container_event_type() == expected, "{event:?}");
        let status = event.pod_sandbox_status.context("a pod that lives has a status")?;
        ensure!(status.state() == PodSandboxState::SandboxReady && !status.id.is_empty(), "{status:?}");
    }
    let container = launch(&mut client, &pod, suite.script("main", "exit 3"), &config).await?;
    for expected in [ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent] {
        let event = next(&mut events).await?;
        ensure!(event.container_id == container && event.container_event_type() == expected, "{event:?}");
        let [status] = event.containers_statuses.as_slice() else { anyhow::bail!("{event:?}") };
        ensure!(status.id == container, "{status:?}");
        if expected == ContainerStoppedEvent {
            ensure!(
                status.state() == ContainerState::ContainerExited && status.exit_code == 3,
                "the status shows the end: {status:?}"
            );
        }
    }
    client.remove_pod(&pod).await?;
    let mut told = Vec::new();
    loop {
        let event = next(&mut events).await?;
        let last = event.container_id == pod && event.container_event_type() == ContainerDeletedEvent;
        // kubelet learns from it whose event this is, and logs an error where there is none.
        let status = event.pod_sandbox_status.as_ref().with_context(|| format!("whose event? {event:?}"))?;
        ensure!(status.id == pod && status.metadata == config.metadata, "{status:?}");
        told.push((event.container_id.clone(), event.container_event_type()));
        if last {
            break;
        }
    }
    let of_pod: Vec<_> = told.iter().filter(|(id, _)| *id == pod).map(|(_, kind)| *kind).collect();
    ensure!(of_pod == [ContainerStoppedEvent, ContainerDeletedEvent], "{told:?}");
    ensure!(told.contains(&(container, ContainerDeletedEvent)), "{told:?}");
    Ok(())
}
