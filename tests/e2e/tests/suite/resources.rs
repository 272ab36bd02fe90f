//! Limits: kept, changed while a container runs, and what happens to who exceeds them.

use a3s_box_cri::proto::{
    ContainerConfig, ContainerState, LinuxContainerConfig, LinuxContainerResources,
    UpdateContainerResourcesRequest, UpdatePodSandboxResourcesRequest,
};
use a3s_box_e2e::client::Client;
use anyhow::{Context, Result, ensure};
use tonic::{Code, Status};

use crate::suite::{Suite, exit_code, launch, logged};

const MIB: i64 = 1024 * 1024;

fn limited(config: ContainerConfig, resources: LinuxContainerResources) -> ContainerConfig {
    let linux = LinuxContainerConfig { resources: Some(resources), ..config.linux.unwrap_or_default() };
    ContainerConfig { linux: Some(linux), ..config }
}

fn memory(bytes: i64) -> LinuxContainerResources {
    LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() }
}

async fn update(client: &mut Client, id: &str, resources: LinuxContainerResources) -> Result<(), Status> {
    let request = UpdateContainerResourcesRequest {
        container_id: id.to_owned(),
        linux: Some(resources),
        ..Default::default()
    };
    client.runtime.update_container_resources(request).await.map(drop)
}

/// A file of the container's own cgroup.
async fn cgroup(client: &mut Client, id: &str, file: &str) -> Result<String> {
    let path = format!("/sys/fs/cgroup/{file}");
    let read = client.exec(id, &["cat", &path], 20).await?;
    ensure!(read.exit_code == 0, "{read:?}");
    Ok(String::from_utf8(read.stdout)?.trim().to_owned())
}

pub(crate) async fn limits_change_while_a_container_runs(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("limits")?;
    let pod = client.run_pod(&config).await?;
    let quota = LinuxContainerResources { cpu_quota: 20_000, cpu_period: 50_000, ..memory(64 * MIB) };
    let script = "head -c 20000000 /dev/zero > /dev/shm/held; echo held; sleep 3600";
    let id = launch(&mut client, &pod, limited(suite.script("main", script), quota), &config).await?;
    logged(&config, "main", "held").await?;
    ensure!(cgroup(&mut client, &id, "memory.max").await? == (64 * MIB).to_string());
    ensure!(cgroup(&mut client, &id, "cpu.max").await? == "20000 50000");

    update(&mut client, &id, memory(96 * MIB)).await?;
    ensure!(cgroup(&mut client, &id, "memory.max").await? == (96 * MIB).to_string());
    ensure!(cgroup(&mut client, &id, "cpu.max").await? == "20000 50000", "what is not given stays");
    let shown = client.container_status(&id).await?.resources.and_then(|resources| resources.linux);
    let shown = shown.context("a status without resources")?;
    ensure!(shown.memory_limit_in_bytes == 96 * MIB && shown.cpu_quota == 20_000, "{shown:?}");
    update(&mut client, &id, LinuxContainerResources { cpu_quota: -1, ..Default::default() }).await?;
    ensure!(cgroup(&mut client, &id, "cpu.max").await? == "max 50000");

    // All or nothing: the new quota goes with the memory that cannot be.
    let both = LinuxContainerResources { cpu_quota: 30_000, ..memory(8 * MIB) };
    let less = update(&mut client, &id, both).await.err().context("a limit below what is used")?;
    ensure!(less.code() == Code::FailedPrecondition && less.message().contains("in use"), "{less}");
    ensure!(cgroup(&mut client, &id, "cpu.max").await? == "max 50000", "half of a change");
    let more = update(&mut client, &id, memory(1 << 50)).await.err().context("more than the box has")?;
    ensure!(more.code() == Code::FailedPrecondition && more.message().contains("cannot grow"), "{more}");
    let odd = update(&mut client, &id, LinuxContainerResources { cpu_quota: 5, ..Default::default() }).await;
    let odd = odd.err().context("a quota of 5 µs")?;
    ensure!(odd.code() == Code::InvalidArgument && odd.message().contains("linux.cpu_quota"), "{odd}");

    let pods = |resources| UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.clone(),
        overhead: None,
        resources: Some(resources),
    };
    client.runtime.update_pod_sandbox_resources(pods(memory(128 * MIB))).await?;
    let beyond = client.runtime.update_pod_sandbox_resources(pods(memory(1 << 50))).await.map(drop);
    let beyond = beyond.err().context("a pod larger than its box")?;
    ensure!(beyond.code() == Code::FailedPrecondition, "{beyond}");

    client.stop(&id, 0).await?;
    let late = update(&mut client, &id, memory(96 * MIB)).await.err().context("limits of what has ended")?;
    ensure!(late.code() == Code::FailedPrecondition, "{late}");
    client.remove_pod(&pod).await?;
    let gone = update(&mut client, &id, memory(96 * MIB)).await.err().context("limits of what is gone")?;
    ensure!(gone.code() == Code::NotFound, "{gone}");
    Ok(())
}

pub(crate) async fn who_takes_too_much_memory_is_killed_and_it_is_said(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("too-much-memory")?;
    let pod = client.run_pod(&config).await?;
    let other = launch(&mut client, &pod, suite.script("other", "sleep 3600"), &config).await?;
    let greedy = limited(suite.script("greedy", "exec tail /dev/zero"), memory(32 * MIB));
    let id = launch(&mut client, &pod, greedy, &config).await?;
    exit_code(&client, &id).await?;
    let status = client.container_status(&id).await?;
    ensure!(status.reason == "OOMKilled" && status.exit_code == 137, "{status:?}");
    let other = client.container_status(&other).await?;
    ensure!(other.state() == ContainerState::ContainerRunning, "{other:?}");
    client.remove_pod(&pod).await?;
    Ok(())
}
