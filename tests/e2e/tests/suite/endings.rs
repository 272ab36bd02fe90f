//! Ten megabytes through every kind of stream, whose ends are closed in every order; digests tell what arrived.
//!
//! On QEMU writes of a guest over 32 KiB were lost once, half-closes were not passed on, and a dial whose dialler had gone
//! stopped the device for good, with the pod still Ready.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use a3s_box_cri::proto::{ContainerState, ExecRequest, PodSandboxConfig, PortForwardRequest};
use a3s_box_e2e::client::Client;
use a3s_box_e2e::streams::{all, forward, kind, spdy};
use a3s_box_e2e::wait;
use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use crate::suite::{Suite, launch, log_lines, logged};

const BYTES: usize = 10 << 20;

/// Digits of a digest.
const DIGEST: usize = 64;

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that repeat nowhere near.
fn bytes(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9);
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    std::iter::repeat_with(next).take(BYTES).collect()
}

struct Pod<'a> {
    client: &'a mut Client,
    pod: &'a str,
    container: &'a str,
}

impl Pod<'_> {
    /// Runs a script with that input, read by it to its end; what it printed.
    async fn exec(&mut self, script: &str, input: Option<&[u8]>) -> Result<Vec<u8>> {
        let request = ExecRequest {
            container_id: self.container.to_owned(),
            cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
            tty: false,
            stdin: input.is_some(),
            stdout: true,
            stderr: false,
        };
        let url = self.client.runtime.exec(request).await?.into_inner().url;
        let mut connection = spdy(&url, "v4.channel.k8s.io").await?;
        let mut error = connection.open(kind("error"));
        let stdin = input.map(|bytes| (connection.open(kind("stdin")), bytes));
        let mut out = connection.open(kind("stdout"));
        let feed = async {
            let Some((mut stdin, bytes)) = stdin else { return Ok(()) };
            stdin.writer.write_all(bytes).await?;
            stdin.writer.shutdown().await?;
            anyhow::Ok(())
        };
        let ((), out) = tokio::try_join!(feed, all(&mut out))?;
        let status = String::from_utf8(all(&mut error).await?)?;
        ensure!(status.contains("Success"), "{script}: {status}");
        Ok(out)
    }

    async fn told(&mut self, script: &str, input: Option<&[u8]>) -> Result<String> {
        let out = self.exec(script, input).await?;
        let text = String::from_utf8_lossy(&out).into_owned();
        let digest = text.get(..DIGEST).with_context(|| format!("{script} says {text:?}"))?;
        Ok(digest.to_owned())
    }

    async fn execs(&mut self, input: &[u8]) -> Result<()> {
        let kept = self.told("sha256sum /tmp/data", None).await?;
        // The guest ends first.
        ensure!(digest(&self.exec("cat /tmp/data", None).await?) == kept, "an output lost bytes");
        // The host ends its direction first, and the guest still answers.
        ensure!(self.told("sha256sum", Some(input)).await? == digest(input), "an input lost bytes");
        ensure!(self.exec("cat", Some(input)).await? == input, "an echo lost bytes");
        // The guest ends its direction first, and still reads.
        let late = "cat /tmp/data; exec >&- 2>&-; sha256sum > /tmp/late";
        ensure!(
            digest(&self.exec(late, Some(input)).await?) == kept,
            "an output before the input lost bytes"
        );
        ensure!(self.told("cat /tmp/late", None).await? == digest(input), "a late input lost bytes");
        Ok(())
    }

    async fn ports(&mut self, input: &[u8]) -> Result<()> {
        let kept = self.told("sha256sum /tmp/data", None).await?;
        let request = PortForwardRequest { pod_sandbox_id: self.pod.to_owned(), port: vec![] };
        let url = self.client.runtime.port_forward(request).await?.into_inner().url;
        let mut connection = spdy(&url, "portforward.k8s.io").await?;
        let ports = [(9001, None), (9002, Some(input)), (9003, Some(input))];
        for (id, (port, input)) in ports.into_iter().enumerate() {
            let (mut error, mut data) = forward(&mut connection, id, port);
            let (reader, writer) = (&mut data.reader, &mut data.writer);
            let feed = async {
                writer.write_all(input.unwrap_or_default()).await?;
                if input.is_some() {
                    writer.shutdown().await?;
                }
                anyhow::Ok(())
            };
            let read = async {
                let mut got = Vec::new();
                let reading = tokio::io::AsyncReadExt::read_to_end(reader, &mut got);
                tokio::time::timeout(Duration::from_secs(120), reading).await??;
                anyhow::Ok(got)
            };
            let ((), got) = tokio::try_join!(feed, read).with_context(|| format!("port {port}"))?;
            data.writer.shutdown().await.ok();
            let right = match input {
                None => digest(&got) == kept,
                Some(input) if port == 9002 => got.get(..DIGEST) == Some(digest(input).as_bytes()),
                Some(input) => got == input,
            };
            ensure!(right, "port {port}: {} bytes came, and not the right ones", got.len());
            let words = String::from_utf8(all(&mut error).await?)?;
            ensure!(words.is_empty(), "port {port}: {words}");
        }
        connection.finish().await;
        Ok(())
    }
}

/// Makes the data that the guest sends, and serves: 9001 sends it and closes, 9002 answers with the digest of what came,
/// 9003 sends back what comes.
const SERVE: &str = "head -c 7864320 /dev/urandom | base64 > /tmp/data; \
    nc -ll -p 9001 -e cat /tmp/data & nc -ll -p 9002 -e sha256sum & nc -ll -p 9003 -e cat & \
    sleep 1; echo serving; while :; do sleep 1; done";

pub(crate) async fn every_order(suite: &Suite, rounds: u32) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("endings")?;
    let id = client.run_pod(&config).await?;
    let container = launch(&mut client, &id, suite.script("main", SERVE), &config).await?;
    logged(&config, "main", "serving").await?;
    for round in 0..rounds {
        let input = bytes(round.into());
        let mut pod = Pod { client: &mut client, pod: &id, container: &container };
        pod.execs(&input).await.with_context(|| format!("execs of round {round}"))?;
        pod.ports(&input).await.with_context(|| format!("ports of round {round}"))?;
        log(suite, &mut client, &id, &config, round)
            .await
            .with_context(|| format!("log of round {round}"))?;
        if (round + 1) % 10 == 0 {
            println!("{} rounds", round + 1);
        }
    }
    client.remove_pod(&id).await?;
    println!("{rounds} rounds of {BYTES} bytes through execs, ports and logs");
    Ok(())
}

/// A container that ends with its last byte.
async fn log(
    suite: &Suite,
    client: &mut Client,
    pod: &str,
    config: &PodSandboxConfig,
    round: u32,
) -> Result<()> {
    let script = "head -c 7864320 /dev/urandom | base64 > /tmp/f; cat /tmp/f; sha256sum /tmp/f";
    let mut log = suite.script("log", script);
    log.metadata.get_or_insert_default().attempt = round;
    let container = launch(client, pod, log, config).await?;
    let ended = wait::until("the end of the log's container", Duration::from_secs(120), || {
        let (mut client, container) = (client.clone(), container.clone());
        async move {
            let status = client.container_status(&container).await?;
            let ended = status.state() == ContainerState::ContainerExited;
            Ok(ended.then_some(status.exit_code))
        }
    });
    ensure!(ended.await? == 0);
    let lines: Vec<String> = log_lines(config, "log")?.into_iter().map(|line| line.2).collect();
    let (told, lines) = lines.split_last().context("nothing was logged")?;
    let text: String = lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
    ensure!(told.get(..DIGEST) == Some(digest(text.as_bytes()).as_str()), "{} bytes were logged", text.len());
    client.remove(&container).await?;
    fs::remove_file(Path::new(&config.log_directory).join("log.log"))?;
    Ok(())
}

/// Dials the guest as the daemon does, and goes away at once: so does a daemon that is killed while it dials.
fn dial_and_go(folder: &Path, port: u32, words: &[u8]) -> Result<()> {
    // A socket's address has no room for the whole path.
    let folder = fs::File::open(folder).with_context(|| format!("opening {}", folder.display()))?;
    let mut stream = UnixStream::connect(format!("/proc/self/fd/{}/guest_{port}", folder.as_raw_fd()))?;
    std::io::Write::write_all(&mut stream, words).context("saying something")
}

pub(crate) async fn dials_that_are_dropped(suite: &Suite, dials: u32) -> Result<()> {
    let mut client = suite.client()?;
    let config = suite.pod("dropped-dials")?;
    let pod = client.run_pod(&config).await?;
    let script = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done";
    let container = launch(&mut client, &pod, suite.script("main", script), &config).await?;
    logged(&config, "main", "line 0").await?;
    let folder = suite.state().join("run/boxes").join(&pod).join("vsock");
    for dial in 0..dials {
        let port = if dial % 2 == 0 { 1025 } else { 1026 };
        let words: &[u8] = if dial % 3 == 0 { b"PRI * HTTP/2.0\r\n" } else { b"" };
        dial_and_go(&folder, port, words).with_context(|| format!("dial {dial}"))?;
        if dial % 20 == 0 {
            let said =
                client.exec(&container, &["echo", "x"], 30).await.with_context(|| format!("dial {dial}"))?;
            ensure!(said.stdout == b"x\n", "after dial {dial}: {said:?}");
        }
    }
    let said = client.exec(&container, &["echo", "still here"], 30).await.context("exec after the dials")?;
    ensure!(said.stdout == b"still here\n", "{said:?}");
    let now = log_lines(&config, "main")?.len();
    logged(&config, "main", &format!("line {}", now + 10)).await?;
    let lines: Vec<String> = log_lines(&config, "main")?.into_iter().map(|line| line.2).collect();
    let expected: Vec<String> = (0..lines.len()).map(|number| format!("line {number}")).collect();
    ensure!(lines == expected, "lines are missing among {}", lines.len());
    client.remove_pod(&pod).await?;
    Ok(())
}
