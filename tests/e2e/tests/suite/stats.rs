//! Statistics: true figures of what a container uses.

use std::collections::HashMap;
use std::time::Duration;

use a3s_box_cri::proto::{
    ContainerStats, ContainerStatsFilter, ContainerStatsRequest, LinuxPodSandboxStats,
    ListContainerStatsRequest, ListMetricDescriptorsRequest, ListPodSandboxMetricsRequest,
    ListPodSandboxStatsRequest, PodSandboxStatsFilter, PodSandboxStatsRequest, StreamPodSandboxStatsRequest,
    UInt64Value,
};
use a3s_box_e2e::client::Client;
use a3s_box_e2e::wait;
use anyhow::{Context, Result, ensure};
use tonic::Code;

use crate::suite::{Suite, launch};

const MIB: u64 = 1024 * 1024;
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) async fn a_containers_use_of_cpu_memory_and_disk_is_told(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("stats")?;
    let pod = client.run_pod(&config).await?;
    let busy = launch(&mut client, &pod, suite.script("busy", "while :; do :; done"), &config).await?;
    let idle = launch(&mut client, &pod, suite.script("idle", "sleep 3600"), &config).await?;

    let first = stats(&mut client, &busy).await?;
    ensure!(memory(&first)? > 0 && cpu(&first)? > 0, "{first:?}");
    let used = cpu(&first)?;
    let rate = wait::until("200 ms of processor time and a rate", LIMIT, || {
        let (mut client, busy) = (client.clone(), busy.clone());
        async move {
            let now = stats(&mut client, &busy).await?;
            let rate = number(now.cpu.and_then(|cpu| cpu.usage_nano_cores)).ok();
            Ok(rate.filter(|_| cpu(&now).is_ok_and(|cpu| cpu > used + 200_000_000)))
        }
    })
    .await?;
    ensure!(rate > 10_000_000, "a busy loop uses {rate} ns of processor time per second");

    let before = layer(&stats(&mut client, &idle).await?)?;
    let write = ["sh", "-c", "head -c 1048576 /dev/urandom > /file && mkdir /folder"];
    let written = client.exec(&idle, &write, 20).await?;
    ensure!(written.exit_code == 0, "{written:?}");
    wait::until("the file in the writable layer", LIMIT, || {
        let (mut client, idle) = (client.clone(), idle.clone());
        async move {
            let after = layer(&stats(&mut client, &idle).await?)?;
            Ok((after.0 >= before.0 + MIB && after.1 >= before.1 + 2).then_some(()))
        }
    })
    .await?;

    let filter = ContainerStatsFilter { pod_sandbox_id: pod.clone(), ..Default::default() };
    let listed = list(&mut client, filter).await?;
    let ids: Vec<&str> =
        listed.iter().filter_map(|item| Some(item.attributes.as_ref()?.id.as_str())).collect();
    ensure!(ids == [busy.as_str(), idle.as_str()], "listed {ids:?}");
    let filter = ContainerStatsFilter { id: idle[..13].to_owned(), ..Default::default() };
    ensure!(list(&mut client, filter).await?.len() == 1, "a filter by the start of an id");

    let last = cpu(&stats(&mut client, &busy).await?)?;
    client.stop(&busy, 0).await?;
    ensure!(cpu(&stats(&mut client, &busy).await?)? >= last, "an ended container's counter went backwards");
    client.remove(&busy).await?;
    let request = ContainerStatsRequest { container_id: busy };
    let gone =
        client.runtime.container_stats(request).await.err().context("statistics of what is removed")?;
    ensure!(gone.code() == Code::NotFound, "{gone}");
    client.remove_pod(&pod).await?;
    Ok(())
}

pub(crate) async fn a_pods_use_and_its_traffic_are_told(suite: &Suite) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("pod-stats")?;
    let pod = client.run_pod(&config).await?;
    let first = launch(&mut client, &pod, suite.script("first", "sleep 3600"), &config).await?;
    let second = launch(&mut client, &pod, suite.script("second", "sleep 3600"), &config).await?;

    let before = pod_stats(&mut client, &pod).await?;
    ensure!(before.containers.len() == 2, "{before:?}");
    ensure!(number(before.process.and_then(|process| process.process_count))? >= 2, "two containers sleep");
    let (received, sent) = traffic(&before)?;
    let ping = client.exec(
        &first,
        &["sh", "-c", "ping -c 3 -w 20 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')"],
        30,
    );
    let ping = ping.await?;
    ensure!(ping.exit_code == 0, "{ping:?}");
    let after = pod_stats(&mut client, &pod).await?;
    let (received, sent) = (traffic(&after)?.0 - received, traffic(&after)?.1 - sent);
    ensure!(received >= 3 * 64 && sent >= 3 * 64, "three pings were {received} bytes in and {sent} out");
    let waited = after.cpu.as_ref().and_then(|cpu| cpu.psi).and_then(|psi| psi.some);
    ensure!(waited.is_some(), "the guest's kernel measures pressure: {after:?}");

    // What a container had used is not forgotten with it.
    let used = number(after.cpu.and_then(|cpu| cpu.usage_core_nano_seconds))?;
    client.stop(&first, 0).await?;
    client.remove(&first).await?;
    let later = pod_stats(&mut client, &pod).await?;
    ensure!(number(later.cpu.and_then(|cpu| cpu.usage_core_nano_seconds))? >= used, "it went backwards");
    ensure!(later.containers.len() == 1, "{:?}", later.containers);

    let filter = PodSandboxStatsFilter { id: pod.clone(), ..Default::default() };
    let request = ListPodSandboxStatsRequest { filter: Some(filter.clone()) };
    let listed = client.runtime.list_pod_sandbox_stats(request).await?.into_inner().stats;
    ensure!(listed.len() == 1, "{listed:?}");
    let request = StreamPodSandboxStatsRequest { filter: Some(filter) };
    let mut stream = client.runtime.stream_pod_sandbox_stats(request).await?.into_inner();
    let message = stream.message().await?.context("a stream without a message")?;
    ensure!(message.pod_sandbox_stats.len() == 1, "{message:?}");

    let described =
        client.runtime.list_metric_descriptors(ListMetricDescriptorsRequest {}).await?.into_inner();
    let labels: HashMap<String, usize> =
        described.descriptors.into_iter().map(|metric| (metric.name, metric.label_keys.len())).collect();
    let told = client.runtime.list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {}).await?.into_inner();
    let ours = told.pod_metrics.into_iter().find(|metrics| metrics.pod_sandbox_id == pod);
    let ours = ours.context("no metrics of the pod")?;
    let container = ours.container_metrics.iter().find(|metrics| metrics.container_id == second);
    let container = container.context("no metrics of the container")?;
    for metric in ours.metrics.iter().chain(&container.metrics) {
        ensure!(labels.get(&metric.name) == Some(&metric.label_values.len()), "{metric:?}");
    }
    let memory = container.metrics.iter().find(|metric| metric.name == "container_memory_working_set_bytes");
    ensure!(number(memory.and_then(|metric| metric.value))? > 0, "{memory:?}");
    // A guest's kernel alone takes more.
    let machine = ours.metrics.iter().find(|metric| metric.name == "a3s_box_vmm_memory_bytes");
    ensure!(number(machine.and_then(|metric| metric.value))? > 10 << 20, "{machine:?}");
    client.remove_pod(&pod).await?;
    Ok(())
}

async fn pod_stats(client: &mut Client, id: &str) -> Result<LinuxPodSandboxStats> {
    let request = PodSandboxStatsRequest { pod_sandbox_id: id.to_owned() };
    let answer = client.runtime.pod_sandbox_stats(request).await?.into_inner();
    answer.stats.and_then(|stats| stats.linux).context("an answer without statistics")
}

/// Bytes received and sent.
fn traffic(stats: &LinuxPodSandboxStats) -> Result<(u64, u64)> {
    let network = stats.network.as_ref().context("the network is missing")?;
    let interface = network.default_interface.as_ref().context("the interface is missing")?;
    ensure!(interface.name == "eth0" && network.interfaces.is_empty(), "{network:?}");
    Ok((number(interface.rx_bytes)?, number(interface.tx_bytes)?))
}

async fn stats(client: &mut Client, id: &str) -> Result<ContainerStats> {
    let request = ContainerStatsRequest { container_id: id.to_owned() };
    client.runtime.container_stats(request).await?.into_inner().stats.context("an answer without statistics")
}

async fn list(client: &mut Client, filter: ContainerStatsFilter) -> Result<Vec<ContainerStats>> {
    let request = ListContainerStatsRequest { filter: Some(filter) };
    Ok(client.runtime.list_container_stats(request).await?.into_inner().stats)
}

fn number(value: Option<UInt64Value>) -> Result<u64> {
    value.map(|value| value.value).context("a figure is missing")
}

fn cpu(stats: &ContainerStats) -> Result<u64> {
    number(stats.cpu.as_ref().and_then(|cpu| cpu.usage_core_nano_seconds))
}

fn memory(stats: &ContainerStats) -> Result<u64> {
    number(stats.memory.as_ref().and_then(|memory| memory.working_set_bytes))
}

/// Bytes and inodes.
fn layer(stats: &ContainerStats) -> Result<(u64, u64)> {
    let layer = stats.writable_layer.as_ref().context("the writable layer is missing")?;
    Ok((number(layer.used_bytes)?, number(layer.inodes_used)?))
}
