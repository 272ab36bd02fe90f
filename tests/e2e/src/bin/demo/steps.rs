//! What kubelet does for a pod, in its order.

use std::fs;
use std::path::Path;
use std::time::Duration;

use a3s_box_cri::proto::{
    ContainerConfig, ContainerMetadata, LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxMetadata,
    StatusResponse,
};
use a3s_box_e2e::client::{Client, image};
use a3s_box_e2e::daemon::Settings;
use a3s_box_e2e::wait;
use anyhow::{Context, Result, bail, ensure};

use crate::table::Table;

const FIRST_LINE_LIMIT: Duration = Duration::from_secs(10);
const GRACE_SECONDS: i64 = 5;

pub(crate) async fn run(
    client: &mut Client,
    settings: &Settings,
    reference: &str,
    table: &mut Table,
) -> Result<()> {
    let version = client.version().await?;
    table.step(
        "Version",
        &format!("{} {}, CRI {}", version.runtime_name, version.runtime_version, version.runtime_api_version),
    );

    let status = client.status().await?;
    table.step("Status", &conditions(&status)?);
    if let Some(words) = status.info.get("hypervisor").and_then(|text| hypervisor(text)) {
        table.quote(&words);
    }

    let id = client.pull(reference).await?;
    table.step("PullImage", &short(&id));

    let pod = pod_config(settings)?;
    let sandbox = client.run_pod(&pod).await?;
    table.step("RunPodSandbox", &format!("{}{}", short(&sandbox), address(client, &sandbox).await?));

    let container = client.create(&sandbox, container_config(reference), &pod).await?;
    table.step("CreateContainer", &short(&container));

    client.start(&container).await?;
    table.step("StartContainer", "running");

    let log = settings.logs().join("demo").join("hello.log");
    let line = first_line(&log).await?;
    table.step("log", &log.file_name().unwrap_or_default().to_string_lossy());
    table.quote(&line);

    let exec = client.exec(&container, &["uname", "-r"], 10).await?;
    let guest = String::from_utf8_lossy(&exec.stdout).trim().to_owned();
    ensure!(
        exec.exit_code == 0,
        "uname ended with {}: {}",
        exec.exit_code,
        String::from_utf8_lossy(&exec.stderr)
    );
    let host =
        fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the host's kernel version")?;
    if guest == host.trim() {
        bail!("the container runs on the host's kernel {guest}: this is no microVM");
    }
    table.step("ExecSync uname -r", &format!("{guest} (the host runs {})", host.trim()));

    client.stop(&container, GRACE_SECONDS).await?;
    let ended = client.container_status(&container).await?;
    table.step("StopContainer", &format!("exit code {} after SIGTERM", ended.exit_code));
    client.remove(&container).await?;
    table.step("RemoveContainer", "");
    client.stop_pod(&sandbox).await?;
    table.step("StopPodSandbox", "");
    client.remove_pod(&sandbox).await?;
    table.step("RemovePodSandbox", "");
    client.remove_image(reference).await?;
    table.step("RemoveImage", "");
    Ok(())
}

/// All conditions, of which the one about the runtime itself must hold.
fn conditions(status: &StatusResponse) -> Result<String> {
    let conditions = &status.status.as_ref().context("Status answered without a status")?.conditions;
    let mut words = Vec::new();
    for condition in conditions {
        if condition.r#type == "RuntimeReady" && !condition.status {
            bail!("the runtime is not ready: {}: {}", condition.reason, condition.message);
        }
        words.push(format!("{}={}", condition.r#type, condition.status));
    }
    Ok(words.join(", "))
}

/// Which VMM runs the pods and why, from Status' verbose part.
fn hypervisor(info: &str) -> Option<String> {
    let info: serde_json::Value = serde_json::from_str(info).ok()?;
    Some(format!("{}: {}", info["backend"].as_str()?, info["reason"].as_str()?))
}

fn pod_config(settings: &Settings) -> Result<PodSandboxConfig> {
    let log_directory = settings.logs().join("demo");
    fs::create_dir_all(&log_directory).with_context(|| format!("creating {}", log_directory.display()))?;
    Ok(PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "hello".to_owned(),
            uid: "demo-hello".to_owned(),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        hostname: "hello".to_owned(),
        log_directory: log_directory.to_string_lossy().into_owned(),
        linux: Some(LinuxPodSandboxConfig::default()),
        ..Default::default()
    })
}

fn container_config(reference: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: "hello".to_owned(), attempt: 0 }),
        image: Some(image(reference)),
        log_path: "hello.log".to_owned(),
        ..Default::default()
    }
}

async fn address(client: &mut Client, sandbox: &str) -> Result<String> {
    let ip = client.pod_status(sandbox).await?.network.map(|network| network.ip).unwrap_or_default();
    Ok(if ip.is_empty() { String::new() } else { format!(", {ip}") })
}

/// The message of the log's first line, in CRI's format: time, stream, tag, message.
async fn first_line(log: &Path) -> Result<String> {
    wait::until("the container's first line", FIRST_LINE_LIMIT, || async {
        let text = fs::read_to_string(log).unwrap_or_default();
        Ok(text.split_once('\n').map(|(line, _)| line.splitn(4, ' ').nth(3).unwrap_or(line).to_owned()))
    })
    .await
    .with_context(|| format!("reading {}", log.display()))
}

/// Ids are long; this much tells them apart.
fn short(id: &str) -> String {
    const SHOWN: usize = 13;
    id.strip_prefix("sha256:").unwrap_or(id).chars().take(SHOWN).collect()
}
