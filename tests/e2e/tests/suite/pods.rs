//! Pod sandboxes: identity, life, removal, lists.

use std::fs;

use a3s_box_cri::proto::{
    ContainerFilter, ContainerState, ContainerStateValue, ListContainersRequest, ListPodSandboxRequest,
    PodSandboxFilter, PodSandboxState, PodSandboxStateValue,
};
use a3s_box_e2e::client::Client;
use anyhow::{Context, Result, ensure};

use crate::suite::{Suite, exit_code, launch};

pub(crate) async fn the_daemon_says_who_it_is_and_that_it_is_ready(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let version = client.version().await?;
    ensure!(version.runtime_name == "a3s-box", "runtime name {}", version.runtime_name);
    ensure!(version.runtime_api_version == "v1", "API version {}", version.runtime_api_version);
    let status = client.status().await?;
    let conditions = status.status.context("Status has a status")?.conditions;
    for kind in ["RuntimeReady", "NetworkReady"] {
        let condition = conditions.iter().find(|condition| condition.r#type == kind).context(kind)?;
        ensure!(condition.status, "{kind} is false: {}: {}", condition.reason, condition.message);
    }
    ensure!(
        status.runtime_handlers.iter().any(|handler| handler.name == "a3s-box"),
        "the runtime handler a3s-box is missing: {:?}",
        status.runtime_handlers
    );
    Ok(())
}

pub(crate) async fn a_pod_lives_its_life_in_a_kernel_of_its_own(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("life")?;
    let pod = client.run_pod(&config).await?;
    let ready = client.pod_status(&pod).await?;
    ensure!(ready.state() == PodSandboxState::SandboxReady, "state {:?}", ready.state());
    ensure!(ready.metadata == config.metadata, "metadata {:?}", ready.metadata);
    ensure!(ready.created_at > 0);
    let address = ready.network.context("a pod has a network")?.ip;
    ensure!(address.starts_with("10.213.79."), "address {address:?}");
    // Clients abbreviate ids.
    ensure!(client.pod_status(&pod[..13]).await?.id == pod);

    let container = client.create(&pod, suite.script("main", "sleep 3600"), &config).await?;
    let created = client.container_status(&container).await?;
    ensure!(created.state() == ContainerState::ContainerCreated && created.started_at == 0, "{created:?}");
    client.start(&container).await?;
    let running = client.container_status(&container).await?;
    ensure!(
        running.state() == ContainerState::ContainerRunning && running.started_at >= running.created_at,
        "{running:?}"
    );

    let kernel = client.exec(&container, &["uname", "-r"], 10).await?;
    let kernel = String::from_utf8_lossy(&kernel.stdout).trim().to_owned();
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(kernel != host.trim() && kernel.ends_with("a3s-box"), "the container's kernel is {kernel}");
    let interface = client.exec(&container, &["ip", "-4", "addr", "show", "eth0"], 10).await?;
    let interface = String::from_utf8_lossy(&interface.stdout).into_owned();
    ensure!(interface.contains(&address), "eth0 has not the pod's address {address}: {interface}");
    let hostname = client.exec(&container, &["hostname"], 10).await?;
    ensure!(hostname.stdout == b"life\n", "hostname {:?}", String::from_utf8_lossy(&hostname.stdout));

    client.stop(&container, 0).await?;
    client.stop(&container, 0).await.context("a second stop")?;
    let ended = client.container_status(&container).await?;
    ensure!(ended.state() == ContainerState::ContainerExited && ended.exit_code == 137, "{ended:?}");
    ensure!(ended.finished_at >= ended.started_at);
    client.remove(&container).await?;
    client.remove(&container).await.context("a second removal")?;

    client.stop_pod(&pod).await?;
    ensure!(client.pod_status(&pod).await?.state() == PodSandboxState::SandboxNotready);
    client.stop_pod(&pod).await.context("a second stop of the pod")?;
    client.remove_pod(&pod).await?;
    client.remove_pod(&pod).await.context("a second removal of the pod")?;
    ensure!(client.pods().await?.is_empty());
    Ok(())
}

pub(crate) async fn a_running_pod_is_removed_by_force(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("forced")?;
    let pod = client.run_pod(&config).await?;
    launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    client.remove_pod(&pod).await?;
    ensure!(client.pods().await?.is_empty() && client.containers().await?.is_empty());
    Ok(())
}

pub(crate) async fn two_pods_run_side_by_side_and_lists_are_filtered(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let (left, right) = (suite.pod("left")?, suite.pod("right")?);
    let mut other = client.clone();
    let (first, second) = tokio::join!(client.run_pod(&left), other.run_pod(&right));
    let (first, second) = (first?, second?);
    let sleeping = launch(&mut client, &first, suite.script("sleeping", "sleep 3600"), &left).await?;
    let ended = launch(&mut client, &second, suite.script("ended", "exit 3"), &right).await?;
    ensure!(exit_code(&client, &ended).await? == 3);

    let by_label = PodSandboxFilter {
        label_selector: [("app".to_owned(), "right".to_owned())].into(),
        ..Default::default()
    };
    ensure!(pods(&mut client, by_label).await? == [second.as_str()]);
    let by_id = PodSandboxFilter { id: first[..12].to_owned(), ..Default::default() };
    ensure!(pods(&mut client, by_id).await? == [first.as_str()]);

    let running = ContainerFilter {
        state: Some(ContainerStateValue { state: ContainerState::ContainerRunning.into() }),
        ..Default::default()
    };
    ensure!(containers(&mut client, running).await? == [sleeping.as_str()]);
    let in_second = ContainerFilter { pod_sandbox_id: second.clone(), ..Default::default() };
    ensure!(containers(&mut client, in_second).await? == [ended.as_str()]);

    // Stopping one pod is none of the other's business.
    client.stop_pod(&second).await?;
    let not_ready = PodSandboxFilter {
        state: Some(PodSandboxStateValue { state: PodSandboxState::SandboxNotready.into() }),
        ..Default::default()
    };
    ensure!(pods(&mut client, not_ready).await? == [second.as_str()]);
    ensure!(client.exec(&sleeping, &["true"], 10).await?.exit_code == 0);
    for pod in [first, second] {
        client.remove_pod(&pod).await?;
    }
    Ok(())
}

async fn pods(client: &mut Client, filter: PodSandboxFilter) -> Result<Vec<String>> {
    let answer =
        client.runtime.list_pod_sandbox(ListPodSandboxRequest { filter: Some(filter) }).await?.into_inner();
    Ok(answer.items.into_iter().map(|pod| pod.id).collect())
}

async fn containers(client: &mut Client, filter: ContainerFilter) -> Result<Vec<String>> {
    let answer =
        client.runtime.list_containers(ListContainersRequest { filter: Some(filter) }).await?.into_inner();
    Ok(answer.containers.into_iter().map(|container| container.id).collect())
}
