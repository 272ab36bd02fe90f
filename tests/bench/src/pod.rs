//! A pod of either runtime and what is measured in it, through CRI.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use a3s_box_cri::proto::{
    ContainerConfig, ContainerMetadata, ContainerState, ExecRequest, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PortForwardRequest,
};
use a3s_box_e2e::client::{Client, image};
use a3s_box_e2e::streams::{all, forward, kind, spdy};
use a3s_box_e2e::wait;
use a3s_box_streaming::ChunkReader;
use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

/// Bytes that the client reads or writes at once.
const PIECE: usize = 64 * 1024;

/// Bytes of an answer that are read at once.
const BUFFER: u64 = 256 * 1024;

/// Containers of each of the pods that a list is filled with.
const CROWD: usize = 100;

/// The longest for one measurement.
const LIMIT: Duration = Duration::from_secs(300);

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Out,
    /// Out, after a pipe from another process.
    PipedOut,
    In,
}

impl Direction {
    /// The order that pump obeys.
    pub(crate) fn order(self, bytes: u64) -> Vec<u8> {
        [self.letter().as_bytes(), &bytes.to_be_bytes()].concat()
    }

    /// The order's first byte.
    pub(crate) fn letter(self) -> &'static str {
        match self {
            Self::Out => "s",
            Self::PipedOut => "p",
            Self::In => "r",
        }
    }

    /// Gives the order on a connection and moves the bytes, to the last one of the answer.
    pub(crate) fn run(self, connection: &mut (impl Read + Write), bytes: u64) -> Result<()> {
        connection.write_all(&self.order(bytes))?;
        let mut missing = match self {
            Self::Out | Self::PipedOut => bytes,
            Self::In => {
                let piece = vec![b'x'; PIECE];
                for _ in 0..bytes / PIECE as u64 {
                    connection.write_all(&piece)?;
                }
                1
            }
        };
        let mut buffer = vec![0; missing.min(BUFFER) as usize];
        while missing > 0 {
            let room = missing.min(BUFFER) as usize;
            let count = connection.read(&mut buffer[..room]).context("reading the answer")?;
            ensure!(count > 0, "the answer ended with {missing} bytes missing");
            missing -= count as u64;
        }
        Ok(())
    }
}

/// The calls of a container's life, in their order.
pub(crate) const STEPS: [&str; 5] =
    ["CreateContainer", "StartContainer", "ExecSync", "StopContainer", "RemoveContainer"];

/// How long each of [`STEPS`] took.
pub(crate) type Steps = [Duration; STEPS.len()];

/// A pod with a container that waits and one that serves a port.
pub(crate) struct Pod {
    runtime: &'static str,
    client: Client,
    config: PodSandboxConfig,
    id: String,
    image: String,
    idle: String,
    port: u16,
    containers: u32,
}

impl Pod {
    pub(crate) async fn start(
        runtime: &'static str,
        mut client: Client,
        reference: &str,
        logs: &Path,
        name: &str,
        host_network: bool,
    ) -> Result<Self> {
        let logs = logs.join(name);
        fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
        let network = if host_network { NamespaceMode::Node } else { NamespaceMode::Pod };
        let namespaces = NamespaceOption { network: network.into(), ..NamespaceOption::default() };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            log_directory: logs.to_string_lossy().into_owned(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces),
                    privileged: true,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let id = client.run_pod(&config).await.context("running a pod")?;
        // Free on the host, too: containerd's pod has the host's network.
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut pod = Self {
            runtime,
            client,
            config,
            id,
            image: reference.to_owned(),
            idle: String::new(),
            port,
            containers: 0,
        };
        (pod.idle, _) = pod.launch(&["/pump", "pause"], false).await?;
        let (_, log) = pod.launch(&["/pump", "serve", "tcp", &port.to_string()], false).await?;
        said(&log, "serving").await?;
        Ok(pod)
    }

    pub(crate) fn runtime(&self) -> &'static str {
        self.runtime
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The pod's IPv4 address.
    pub(crate) async fn address(&mut self) -> Result<Ipv4Addr> {
        let network = self.client.pod_status(&self.id).await?.network.context("a network status")?;
        network.ip.parse().with_context(|| format!("address {:?}", network.ip))
    }

    /// What a command prints.
    pub(crate) async fn output(&mut self, command: &[&str]) -> Result<String> {
        let said = self.client.exec(&self.idle, command, LIMIT.as_secs().cast_signed()).await?;
        ensure!(said.exit_code == 0, "{command:?}: {}", String::from_utf8_lossy(&said.stderr));
        Ok(String::from_utf8(said.stdout)?)
    }

    /// Starts a container; its id and its log.
    pub(crate) async fn launch(&mut self, command: &[&str], privileged: bool) -> Result<(String, PathBuf)> {
        let (config, log) = self.container(command, privileged);
        let id = self.client.create(&self.id, config, &self.config).await.context("creating a container")?;
        self.client.start(&id).await.with_context(|| format!("starting {command:?}"))?;
        Ok((id, log))
    }

    /// Starts a container that waits, with a directory of the host mounted at `/volume`; its id.
    pub(crate) async fn launch_with_volume(&mut self, host: &Path) -> Result<String> {
        let (config, _) = self.container(&["/pump", "pause"], false);
        let mount = Mount {
            container_path: "/volume".to_owned(),
            host_path: host.to_string_lossy().into_owned(),
            ..Default::default()
        };
        let config = ContainerConfig { mounts: vec![mount], ..config };
        let id = self.client.create(&self.id, config, &self.config).await.context("creating a container")?;
        self.client.start(&id).await.context("starting a container")?;
        Ok(id)
    }

    /// A container's whole life. It is killed at once: its program has no signal handlers.
    pub(crate) async fn cycle(&mut self) -> Result<Steps> {
        let (config, _) = self.container(&["/pump", "pause"], false);
        let mut steps = Steps::default();
        let mut last = Instant::now();
        let mut step = 0;
        let mut done = || {
            let now = Instant::now();
            steps[step] = now - std::mem::replace(&mut last, now);
            step += 1;
        };
        let id = self.client.create(&self.id, config, &self.config).await.context(STEPS[0])?;
        done();
        self.client.start(&id).await.context(STEPS[1])?;
        done();
        let said = self.client.exec(&id, &["/pump", "bytes", "1"], 60).await.context(STEPS[2])?;
        done();
        self.client.stop(&id, 0).await.context(STEPS[3])?;
        done();
        self.client.remove(&id).await.context(STEPS[4])?;
        done();
        ensure!(said.stdout == b"x" && said.exit_code == 0, "{said:?}");
        Ok(steps)
    }

    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Makes so many containers that are not started, in further pods.
    pub(crate) async fn fill(&mut self, containers: u32) -> Result<()> {
        for first in (0..containers).step_by(CROWD) {
            let mut config = self.config.clone();
            let name = format!("crowd-{first}");
            config.metadata = Some(PodSandboxMetadata {
                uid: format!("uid-{name}"),
                name,
                namespace: "bench".to_owned(),
                attempt: 0,
            });
            let pod = self.client.run_pod(&config).await.context("running a further pod")?;
            for _ in first..containers.min(first + CROWD as u32) {
                let (container, _) = self.container(&["/pump", "pause"], false);
                let container = ContainerConfig { annotations: annotations(), ..container };
                self.client.create(&pod, container, &config).await.context("filling a pod")?;
            }
        }
        Ok(())
    }

    /// A container's configuration and its log.
    fn container(&mut self, command: &[&str], privileged: bool) -> (ContainerConfig, PathBuf) {
        self.containers += 1;
        let name = format!("c{}", self.containers);
        let log_path = format!("{name}.log");
        let log = Path::new(&self.config.log_directory).join(&log_path);
        let namespaces = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name, attempt: 0 }),
            image: Some(image(&self.image)),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log_path,
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    privileged,
                    namespace_options: namespaces.and_then(|context| context.namespace_options.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        (config, log)
    }

    async fn exec_url(&mut self, command: &[&str]) -> Result<String> {
        let request = ExecRequest {
            container_id: self.idle.clone(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty: false,
            stdin: false,
            stdout: true,
            stderr: true,
        };
        Ok(self.client.runtime.exec(request).await.context("Exec")?.into_inner().url)
    }

    /// From connecting to the end of a command's output.
    pub(crate) async fn exec(&mut self, bytes: u64) -> Result<Duration> {
        let url = self.exec_url(&["/pump", "bytes", &bytes.to_string()]).await?;
        let run = async {
            let started = Instant::now();
            let mut connection = spdy(&url, "v4.channel.k8s.io").await?;
            let mut error = connection.open(kind("error"));
            let (mut out, _err) = (connection.open(kind("stdout")), connection.open(kind("stderr")));
            let count = take(&mut out.reader, u64::MAX).await?;
            let taken = started.elapsed();
            ensure!(count == bytes, "{count} bytes of {bytes} came");
            let status = String::from_utf8(all(&mut error).await?)?;
            ensure!(status.contains("Success"), "{status}");
            Ok(taken)
        };
        tokio::time::timeout(LIMIT, run).await.context("an exec does not end")?
    }

    /// From the order to its last byte, on a connection to the server's port.
    pub(crate) async fn forward(&mut self, direction: Direction, bytes: u64) -> Result<Duration> {
        let request =
            PortForwardRequest { pod_sandbox_id: self.id.clone(), port: vec![i32::from(self.port)] };
        let url = self.client.runtime.port_forward(request).await.context("PortForward")?.into_inner().url;
        let run = async {
            let mut connection = spdy(&url, "portforward.k8s.io").await?;
            let (_error, mut data) = forward(&mut connection, 0, self.port);
            let started = Instant::now();
            data.writer.write_all(&direction.order(bytes)).await?;
            let expected = match direction {
                Direction::Out | Direction::PipedOut => bytes,
                Direction::In => {
                    let piece = vec![b'x'; PIECE];
                    for _ in 0..bytes / PIECE as u64 {
                        data.writer.write_all(&piece).await?;
                    }
                    1
                }
            };
            let count = take(&mut data.reader, expected).await?;
            ensure!(count == expected, "{count} bytes of {expected} came");
            let taken = started.elapsed();
            data.writer.shutdown().await?;
            Ok(taken)
        };
        tokio::time::timeout(LIMIT, run).await.context("a forwarded connection stands still")?
    }

    /// From the container's start until its last line is in its log.
    pub(crate) async fn log(&mut self, bytes: u64, width: u64) -> Result<Duration> {
        let started = Instant::now();
        let command = ["/pump", "lines", &bytes.to_string(), &width.to_string()];
        let (id, log) = self.launch(&command, false).await?;
        said(&log, "end").await?;
        let taken = started.elapsed();
        let written = fs::metadata(&log)?.len();
        // Lines whose width is no divisor of a pipe's size leave a remainder that is not written.
        ensure!(written + PIECE as u64 > bytes, "the log has {written} bytes");
        let client = &self.client;
        wait::until("the container's end", LIMIT, || {
            let (mut client, id) = (client.clone(), id.clone());
            async move {
                let status = client.container_status(&id).await?;
                Ok((status.state() == ContainerState::ContainerExited).then_some(()))
            }
        })
        .await?;
        self.client.remove(&id).await?;
        fs::remove_file(&log).with_context(|| format!("removing {}", log.display()))?;
        Ok(taken)
    }

    /// From connecting to the first byte of output, of `parallel` commands at a time.
    pub(crate) async fn latencies(&mut self, parallel: usize, turns: usize) -> Result<Vec<Duration>> {
        let mut measured = Vec::new();
        for _ in 0..turns {
            let mut urls = Vec::new();
            for _ in 0..parallel {
                urls.push(self.exec_url(&["/pump", "bytes", "1"]).await?);
            }
            let mut running = JoinSet::new();
            for url in urls {
                running.spawn(async move { first_byte(&url).await });
            }
            while let Some(done) = running.join_next().await {
                measured.push(done??);
            }
        }
        Ok(measured)
    }
}

/// About as many and as long as kubelet's.
fn annotations() -> HashMap<String, String> {
    let key = |index| format!("io.kubernetes.container.annotation{index}");
    (0..6).map(|index| (key(index), "x".repeat(40))).collect()
}

async fn first_byte(url: &str) -> Result<Duration> {
    let started = Instant::now();
    let mut connection = spdy(url, "v4.channel.k8s.io").await?;
    let mut error = connection.open(kind("error"));
    let (mut out, _err) = (connection.open(kind("stdout")), connection.open(kind("stderr")));
    out.reader.read_u8().await.context("reading the first byte")?;
    let taken = started.elapsed();
    let status = String::from_utf8(all(&mut error).await?)?;
    ensure!(status.contains("Success"), "{status}");
    Ok(taken)
}

/// Reads up to so many bytes; how many came.
async fn take(from: &mut ChunkReader, limit: u64) -> Result<u64> {
    let (mut count, mut buffer) = (0, vec![0; PIECE]);
    while count < limit {
        match from.read(&mut buffer).await? {
            0 => break,
            some => count += some as u64,
        }
    }
    Ok(count)
}

/// Waits until that is the last line of a log.
pub(crate) async fn said(log: &Path, word: &str) -> Result<()> {
    let ending = format!(" F {word}\n");
    wait::until(&format!("the line {word:?} in {}", log.display()), LIMIT, || {
        let found = ends_in(log, &ending);
        async move { Ok(found.then_some(())) }
    })
    .await
}

fn ends_in(log: &Path, ending: &str) -> bool {
    let tail = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        file.seek(SeekFrom::End(-(ending.len() as i64)))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(text)
    };
    tail().is_ok_and(|text| text == ending)
}
