//! Virtual machines that end when nobody asked them to: everybody is told at once, and why.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use a3s_box_cri::proto::{
    ContainerState, ContainerStatus, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxSandboxSecurityContext, PodSandboxConfig, PodSandboxState,
};
use a3s_box_e2e::client::Client;
use a3s_box_e2e::initramfs::{Initramfs, installed_agent};
use a3s_box_e2e::sample::busybox;
use a3s_box_e2e::wait;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bad_machine::broken;
use crate::suite::{Suite, launch, logged};

/// How soon the end of a machine is told: no limit of the daemon's passes, though the machine may have other work. Emulated
/// in an emulator, everything takes longer.
fn at_once(suite: &Suite) -> Duration {
    Duration::from_secs(if suite.backend() == "libkrun" { 8 } else { 4 })
}

async fn state(client: &mut Client, pod: &str) -> Result<(PodSandboxState, i32)> {
    let state = client.pod_status(pod).await?.state();
    let info = client.pod_info(pod).await?;
    let pid = info["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).context("a pid")?;
    Ok((state, pid))
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

/// Ends the machine of a pod of the suite's daemon.
async fn dies(
    suite: &Suite,
    name: &str,
    end: impl AsyncFnOnce(&mut Client, &str, i32) -> Result<()>,
) -> Result<ContainerStatus> {
    dies_at(suite, &mut suite.client()?, name, end).await
}

/// Ends a pod's machine with `end`, and checks what is told of it and that kubelet's next steps work.
async fn dies_at(
    suite: &Suite,
    client: &mut Client,
    name: &str,
    end: impl AsyncFnOnce(&mut Client, &str, i32) -> Result<()>,
) -> Result<ContainerStatus> {
    let (mut config, pod, container) = privileged(suite, client, name).await?;
    let (_, vmm) = state(client, &pod).await?;
    end(client, &container, vmm).await?;
    let gone = || fs::metadata(format!("/proc/{vmm}")).is_err();
    wait::until("the machine's end", Duration::from_secs(20), || {
        let gone = gone();
        async move { Ok(gone.then_some(())) }
    })
    .await?;
    let died = Instant::now();
    let status = loop {
        let told = state(client, &pod).await?.0;
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
        let group = cgroup_of(u32::try_from(vmm)?, "memory")?;
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

/// The host's cgroup where `controller` counts the process.
pub(crate) fn cgroup_of(pid: u32, controller: &str) -> Result<PathBuf> {
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
    let (mount, path) = match of(controller) {
        Some(path) => (
            mounted(controller).with_context(|| format!("the controller {controller} is not mounted"))?,
            path,
        ),
        None => ("/sys/fs/cgroup".to_owned(), of("").context("cgroup v2 is not mounted")?),
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

/// Nobody in a guest can kill its first process. This /init leaves somebody behind who overwrites the agent's code when
/// a container asks for it.
const ASSASSIN: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /see
(
    until [ "$($b cat /see/sys/vm/overcommit_ratio)" = 77 ]; do $b sleep 0.1; done
    code=$($b grep -m 1 r-xp /see/1/maps)
    start=$((0x${code%%-*} / 4096))
    code=${code#*-}
    end=$((0x${code%% *} / 4096))
    $b dd if=/dev/zero of=/see/1/mem bs=4096 seek=$start count=$((end - start)) conv=notrunc
) &
exec /agent
"#;

pub(crate) async fn an_agent_that_is_killed_is_told(suite: &Suite) -> Result<()> {
    let mut initramfs = Initramfs::default();
    initramfs.devices();
    initramfs.folder("see");
    initramfs.folder("bin");
    initramfs.program("bin/busybox", &busybox()?);
    initramfs.program("agent", &installed_agent(suite.layout())?);
    initramfs.program("init", ASSASSIN.as_bytes());
    let path = suite.state().join("assassin.cpio");
    initramfs.write(&path)?;
    let extra = [("vmm.initramfs", &*path.to_string_lossy())];
    let (daemon, mut client) = broken(suite, "assassin", suite.backend(), &extra).await?;
    client.pull(suite.shell()).await?;
    let kill = async |client: &mut Client, container: &str, _: i32| {
        // The answer dies with the agent.
        let _ = client
            .exec(container, &["sh", "-c", "echo 77 > /proc/sys/vm/overcommit_ratio; sleep 20"], 20)
            .await;
        Ok(())
    };
    let status = dies_at(suite, &mut client, "assassin", kill).await?;
    ensure!((status.exit_code, status.reason.as_str()) == (255, "AgentLost"), "{status:?}");
    ensure!(status.message.contains("Attempted to kill init!"), "{status:?}");
    let ended = daemon.stop().await?;
    ensure!(ended.success(), "the daemon ended with {ended}");
    Ok(())
}
