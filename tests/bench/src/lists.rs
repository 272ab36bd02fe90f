//! Lists of very many containers: what kubelet asks for every few seconds.

use std::time::{Duration, Instant};

use a3s_box_cri::proto::{
    ListContainerStatsRequest, ListContainersRequest, StreamContainerStatsRequest, StreamContainersRequest,
    StreamPodSandboxMetricsRequest,
};
use a3s_box_e2e::client::Client;
use anyhow::{Result, ensure};
use prost::Message;

use crate::pair::Pair;

/// What a gRPC client takes unless it was told otherwise.
const MESSAGE_LIMIT: usize = 4 << 20;

/// What an answer consists of.
#[derive(Default)]
struct Answer {
    items: usize,
    messages: usize,
    largest: usize,
    took: Duration,
}

impl Answer {
    fn add(&mut self, message: &impl Message, items: usize) {
        self.items += items;
        self.messages += 1;
        self.largest = self.largest.max(message.encoded_len());
    }
}

/// Makes containers that are not started, and lists them.
pub(crate) async fn run(count: u32, pair: &mut Pair) -> Result<()> {
    pair.ours.fill(count).await?;
    println!("\n{count} containers listed, created and not started; ms");
    println!("{:<36}{:>8}{:>10}{:>16}{:>10}", "", "items", "messages", "largest, KiB", "ms");
    let client = pair.ours.client();
    show("ListContainers", &containers(client.clone()).await?, count)?;
    show("StreamContainers", &stream_containers(client.clone()).await?, count)?;
    show("ListContainerStats", &stats(client.clone()).await?, count)?;
    show("StreamContainerStats", &stream_stats(client.clone()).await?, count)?;
    show("StreamPodSandboxMetrics", &stream_metrics(client).await?, count)?;
    if let Some(peer) = &mut pair.peer {
        peer.pod.fill(count).await?;
        show("containerd: ListContainers", &containers(peer.pod.client()).await?, count)?;
        show("containerd: ListContainerStats", &stats(peer.pod.client()).await?, 0)?;
    }
    Ok(())
}

fn show(call: &str, answer: &Answer, least: u32) -> Result<()> {
    let kib = answer.largest.div_ceil(1024);
    let took = answer.took.as_secs_f64() * 1000.0;
    println!("{call:<36}{:>8}{:>10}{kib:>16}{took:>10.1}", answer.items, answer.messages);
    ensure!(answer.items >= least as usize, "{call}: {} of {least} are told", answer.items);
    ensure!(answer.largest <= MESSAGE_LIMIT, "{call}: a message of {} bytes", answer.largest);
    Ok(())
}

async fn containers(mut client: Client) -> Result<Answer> {
    let (mut answer, started) = (Answer::default(), Instant::now());
    let message = client.runtime.list_containers(ListContainersRequest::default()).await?.into_inner();
    answer.add(&message, message.containers.len());
    Ok(Answer { took: started.elapsed(), ..answer })
}

async fn stream_containers(mut client: Client) -> Result<Answer> {
    let (mut answer, started) = (Answer::default(), Instant::now());
    let mut stream = client.runtime.stream_containers(StreamContainersRequest::default()).await?.into_inner();
    while let Some(message) = stream.message().await? {
        answer.add(&message, message.containers.len());
    }
    Ok(Answer { took: started.elapsed(), ..answer })
}

async fn stats(mut client: Client) -> Result<Answer> {
    let (mut answer, started) = (Answer::default(), Instant::now());
    let request = ListContainerStatsRequest::default();
    let message = client.runtime.list_container_stats(request).await?.into_inner();
    answer.add(&message, message.stats.len());
    Ok(Answer { took: started.elapsed(), ..answer })
}

async fn stream_stats(mut client: Client) -> Result<Answer> {
    let (mut answer, started) = (Answer::default(), Instant::now());
    let request = StreamContainerStatsRequest::default();
    let mut stream = client.runtime.stream_container_stats(request).await?.into_inner();
    while let Some(message) = stream.message().await? {
        answer.add(&message, message.container_stats.len());
    }
    Ok(Answer { took: started.elapsed(), ..answer })
}

async fn stream_metrics(mut client: Client) -> Result<Answer> {
    let (mut answer, started) = (Answer::default(), Instant::now());
    let request = StreamPodSandboxMetricsRequest::default();
    let mut stream = client.runtime.stream_pod_sandbox_metrics(request).await?.into_inner();
    while let Some(message) = stream.message().await? {
        let containers = message.pod_sandbox_metrics.iter().map(|pod| pod.container_metrics.len()).sum();
        answer.add(&message, containers);
    }
    Ok(Answer { took: started.elapsed(), ..answer })
}
