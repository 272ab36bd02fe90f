//! Virtual machines that end when nobody asked them to: everybody is told at once, and why.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use a3s_box_cri::proto::{
    ContainerState, ContainerStatus, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxSandboxSecurityContext, PodSandboxConfig, PodSandboxState, PodSandboxStatusRequest,
};
use a3s_box_e2e::client::Client;
use a3s_box_e2e::wait;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::suite::{Suite, launch, logged};

/// How soon the end of a machine is told; emulated in an emulator, everything takes longer.
fn at_once(suite: &Suite) -> Duration {
    Duration::from_secs(if suite.backend() == "libkrun" { 5 } else { 1 })
}

async fn state(client: &mut Client, pod: &str) -> Result<(PodSandboxState, i32)> {
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: true };
    let answer = client.runtime.pod_sandbox_status(request).await?.into_inner();
    let info: serde_json::Value =
        serde_json::from_str(answer.info.get("info").context("verbose status has info")?)?;
    let pid = info["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).context("a pid")?;
    Ok((answer.status.context("a status")?.state(), pid))
}

/// A pod whose container may do everything that its guest's root may.
async fn privileged(
    suite: &Suite,
    client: &mut Client,
    name: &str,
) -> Result<(PodSandboxConfig, String, String)> {
    let mut config = suite.pod(name)?;
    config.linux.get_or_insert_default().security_context =
        Some(LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
    let pod = client.run_pod(&config).await?;
    let mut container = suite.script("main", "echo up; sleep 3600");
    let context = LinuxContainerSecurityContext { privileged: true, ..Default::default() };
    container.linux = Some(LinuxContainerConfig { security_context: Some(context), ..Default::default() });
    let container = launch(client, &pod, container, &config).await?;
    logged(&config, "main", "up").await?;
    Ok((config, pod, container))
}

/// Ends a pod's machine with `end`, and checks what is told of it and that kubelet's next steps work.
async fn dies(
    suite: &Suite,
    name: &str,
    end: impl AsyncFnOnce(&mut Client, &str, i32) -> Result<()>,
) -> Result<ContainerStatus> {
    let mut client = suite.client()?;
    let (mut config, pod, container) = privileged(suite, &mut client, name).await?;
    let (_, vmm) = state(&mut client, &pod).await?;
    end(&mut client, &container, vmm).await?;
    let gone = || fs::metadata(format!("/proc/{vmm}")).is_err();
    wait::until("the machine's end", Duration::from_secs(20), || {
        let gone = gone();
        async move { Ok(gone.then_some(())) }
    })
    .await?;
    let died = Instant::now();
    let status = loop {
        let told = state(&mut client, &pod).await?.0;
        let status = client.container_status(&container).await?;
        if told == PodSandboxState::SandboxNotready && status.state() == ContainerState::ContainerExited {
            break status;
        }
        ensure!(died.elapsed() < at_once(suite), "still {told:?} and {:?}", status.state());
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let asked = Instant::now();
    client.stop_pod(&pod).await?;
    client.remove_pod(&pod).await?;
    ensure!(asked.elapsed() < at_once(suite), "stop and remove took {:?}", asked.elapsed());
    if let Some(metadata) = &mut config.metadata {
        metadata.attempt += 1;
    }
    let next = client.run_pod(&config).await.context("the next attempt of the pod")?;
    client.remove_pod(&next).await?;
    Ok(status)
}

pub(crate) async fn a_killed_vmm_takes_its_containers_along(suite: &Suite) -> Result<()> {
    let kill = async |_: &mut Client, _: &str, vmm: i32| Ok(kill(Pid::from_raw(vmm), Signal::SIGKILL)?);
    let status = dies(suite, "killed", kill).await?;
    ensure!((status.exit_code, status.reason.as_str()) == (137, "VMKilled"), "{status:?}");
    ensure!(status.message.contains("signal 9"), "{status:?}");
    Ok(())
}

/// A node whose memory is overcommitted: its kernel ends the VM, and people must learn that from the pod.
pub(crate) async fn a_vmm_that_the_host_kills_for_memory_is_told(suite: &Suite) -> Result<()> {
    let starve = async |client: &mut Client, container: &str, vmm: i32| {
        let group = memory_group(vmm)?;
        let (used, limit) = match group.join("memory.max").exists() {
            true => ("memory.current", "memory.max"),
            false => ("memory.usage_in_bytes", "memory.limit_in_bytes"),
        };
        let used: u64 = fs::read_to_string(group.join(used))?.trim().parse()?;
        fs::write(group.join(limit), (used + (16 << 20)).to_string())?;
        let script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=60 2> /dev/null; echo lived";
        let said = client.exec(container, &["sh", "-c", script], 30).await;
        ensure!(said.is_err(), "60 MiB did not pass the limit: {said:?}");
        Ok(())
    };
    let status = dies(suite, "starved", starve).await?;
    ensure!((status.exit_code, status.reason.as_str()) == (137, "VMKilled"), "{status:?}");
    ensure!(status.message.contains("ran out of memory"), "{status:?}");
    Ok(())
}

/// The cgroup that bounds a process's memory on the host.
fn memory_group(pid: i32) -> Result<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let of = |wanted: &str| {
        groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let controllers = fields.next()?;
            controllers.split(',').any(|name| name == wanted).then(|| fields.next()).flatten()
        })
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mounted = |end: &str| {
        let line = mounts.lines().find(|line| line.contains(" - cgroup") && line.ends_with(end))?;
        line.split(' ').nth(4).map(str::to_owned)
    };
    let (mount, path) = match of("memory") {
        Some(path) => (mounted("memory").context("the memory controller is mounted")?, path),
        None => ("/sys/fs/cgroup".to_owned(), of("").context("cgroup v2 is mounted")?),
    };
    Ok(PathBuf::from(mount).join(path.trim_start_matches('/')))
}

pub(crate) async fn a_guests_panic_is_told_with_its_words(suite: &Suite) -> Result<()> {
    let panic = async |client: &mut Client, container: &str, _: i32| {
        // The answer dies with the guest.
        let _ = client.exec(container, &["sh", "-c", "echo c > /proc/sysrq-trigger"], 20).await;
        Ok(())
    };
    let status = dies(suite, "panicked", panic).await?;
    ensure!((status.exit_code, status.reason.as_str()) == (137, "GuestPanic"), "{status:?}");
    ensure!(status.message.contains("sysrq triggered crash"), "{status:?}");
    ensure!(status.message.contains("its last words: "), "{status:?}");
    Ok(())
}

pub(crate) async fn a_guest_that_powers_itself_off_is_told(suite: &Suite) -> Result<()> {
    let off = async |client: &mut Client, container: &str, _: i32| {
        let _ = client.exec(container, &["sh", "-c", "echo b > /proc/sysrq-trigger"], 20).await;
        Ok(())
    };
    let status = dies(suite, "off", off).await?;
    ensure!((status.exit_code, status.reason.as_str()) == (137, "GuestPowerOff"), "{status:?}");
    Ok(())
}
