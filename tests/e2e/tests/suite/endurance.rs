//! The same things very often: kills of the daemon and of VMMs, pods that come and go.
//!
//! Short in the suite; `cargo xtask soak` sets A3S_BOX_SOAK and takes its time.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use a3s_box_cri::proto::{ContainerState, PodSandboxConfig, PodSandboxState};
use a3s_box_e2e::client::Client;
use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::processes::{descriptors, memory};
use a3s_box_e2e::registry::write_hosts_toml;
use anyhow::{Context, Result, bail, ensure};
use tonic::{Code, Status};

use crate::suite::{Suite, exit_code, launch, log_lines, logged};
use crate::{deaths, endings, networks};

/// How often something is done, by how much time there is. The virtual node emulates in an emulation.
fn rounds(suite: &Suite, short: u32, long: u32) -> u32 {
    let soak = std::env::var("A3S_BOX_SOAK").ok();
    match (soak.as_deref(), suite.backend()) {
        (None, "libkrun") => short.div_ceil(3),
        (None, _) => short,
        (Some("whole"), _) => long,
        // The virtual node is ten times slower.
        (Some(_), "libkrun") => long / 10,
        (Some(_), _) => long,
    }
}

/// How long a daemon may be away, and a call may take beside. A start of a pod is undone by each kill that comes before its
/// end, so on a busy machine it takes several.
const PATIENCE: Duration = Duration::from_secs(180);

/// Repeats a call that may be repeated until a daemon answers it.
async fn patient<T>(what: &str, mut call: impl AsyncFnMut() -> Result<T, Status>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match call().await {
            Err(status) if interrupted(&status) && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            other => return other.with_context(|| what.to_owned()),
        }
    }
}

/// The daemon went away, and not: it says no.
fn interrupted(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
}

/// One pod's life as kubelet leads it; `false`: a call that kubelet does not repeat was interrupted.
async fn one_life(suite: &Suite, client: &mut Client, config: &PodSandboxConfig) -> Result<bool> {
    let pod = {
        let client = client.clone();
        patient("RunPodSandbox", async || client.clone().run_pod(config).await).await?
    };
    let created = async {
        let id = client.create(&pod, suite.script("main", "echo hello; exit 7"), config).await?;
        client.start(&id).await?;
        Ok::<_, Status>(id)
    };
    let whole = match created.await {
        Err(status) if interrupted(&status) => false,
        Err(status) => return Err(status).context("making the container"),
        Ok(container) => {
            let deadline = Instant::now() + PATIENCE;
            let status = loop {
                let client = client.clone();
                let status =
                    patient("ContainerStatus", async || client.clone().container_status(&container).await)
                        .await?;
                if status.state() == ContainerState::ContainerExited {
                    break status;
                }
                ensure!(Instant::now() < deadline, "the container did not end: {status:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            ensure!(status.exit_code == 7, "{status:?}");
            let lines = log_lines(config, "main")?;
            ensure!(lines.len() == 1 && lines[0].2 == "hello", "{lines:?}");
            true
        }
    };
    let client = client.clone();
    patient("RemovePodSandbox", async || client.clone().remove_pod(&pod).await).await?;
    fs::remove_file(format!("{}/main.log", config.log_directory)).ok();
    Ok(whole)
}

/// Lives until told to stop, with commands in the steady container beside; how many lives were whole.
async fn load(suite: &Suite, mut client: Client, steady: &str, name: &str, stop: &AtomicBool) -> Result<u32> {
    let mut whole = 0;
    let mut config = suite.pod(name)?;
    while !stop.load(Ordering::Relaxed) {
        whole += u32::from(one_life(suite, &mut client, &config).await?);
        if let Some(metadata) = &mut config.metadata {
            metadata.attempt += 1;
        }
        let said = client.exec(steady, &["echo", "x"], 30).await;
        match said {
            Err(status) if interrupted(&status) => {}
            other => ensure!(other.context("ExecSync")?.stdout == b"x\n"),
        }
    }
    Ok(whole)
}

/// The longest that a daemon lives before it is killed: about what two lives of pods take.
const MOMENTS_MILLIS: u64 = 4000;

/// The moments are the same in every run, as far as clocks allow.
pub(crate) async fn pods_survive_kills_of_the_daemon_at_random_moments(suite: &Suite) -> Result<()> {
    let kills = rounds(suite, 10, 200);
    let settings = Settings {
        state: suite.state().join("killed-daemon"),
        backend: suite.backend().to_owned(),
        subnet: "10.213.82.0/24".to_owned(),
        extra: Vec::new(),
    };
    write_hosts_toml(&settings.certs_dir(), &suite.registry().host())?;
    let (mut daemon, mut client) = Daemon::start(suite.layout(), &settings).await?;
    client.pull(suite.shell()).await?;
    let config = suite.pod("steady")?;
    let pod = client.run_pod(&config).await?;
    let script =
        "i=0; while [ ! -e /tmp/stop ]; do echo line $i; i=$((i+1)); sleep 0.01; done; echo total $i";
    let container = launch(&mut client, &pod, suite.script("main", script), &config).await?;

    let stop = AtomicBool::new(false);
    let killer = async {
        let mut state = 0x9e37_79b9_u64;
        for _ in 0..kills {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            tokio::time::sleep(Duration::from_millis((state >> 33) % MOMENTS_MILLIS)).await;
            // Dropping it is `kill -9`.
            drop(daemon);
            daemon = Daemon::start(suite.layout(), &settings).await?.0;
        }
        Ok::<_, anyhow::Error>(daemon)
    };
    // Whatever ends first ends the others.
    let killer = async {
        let ended = killer.await;
        stop.store(true, Ordering::Relaxed);
        ended
    };
    let (daemon, first, second) = tokio::try_join!(
        killer,
        load(suite, client.clone(), &container, "coming", &stop),
        load(suite, client.clone(), &container, "going", &stop)
    )?;
    ensure!(first + second > 0, "no pod lived a whole life under {kills} kills");

    let told = {
        let client = client.clone();
        patient("ListPodSandbox", async || client.clone().pods().await).await?
    };
    ensure!(told == [pod.clone()], "pods after the last kill: {told:?}");
    let status = client.pod_status(&pod).await?;
    ensure!(status.state() == PodSandboxState::SandboxReady, "{status:?}");
    client.exec(&container, &["touch", "/tmp/stop"], 30).await?;
    ensure!(exit_code(&client, &container).await? == 0);
    let lines: Vec<String> = log_lines(&config, "main")?.into_iter().map(|line| line.2).collect();
    let (total, lines) = lines.split_last().context("no line was logged")?;
    let expected: Vec<String> = (0..lines.len()).map(|number| format!("line {number}")).collect();
    if let Some(at) = (0..lines.len()).find(|at| lines[*at] != expected[*at]) {
        bail!("of {} lines number {at} is {:?} after {kills} kills", lines.len(), lines[at]);
    }
    ensure!(*total == format!("total {}", lines.len()), "{total:?} after {} lines", lines.len());
    client.remove_pod(&pod).await?;
    let ended = daemon.stop().await?;
    ensure!(ended.success(), "the daemon ended with {ended}");
    println!("{kills} kills, {} lives whole, {} lines once each", first + second, lines.len());
    Ok(())
}

/// In the long form only: once is part of every run.
pub(crate) async fn vmms_are_killed_again_and_again(suite: &Suite) -> Result<()> {
    for round in 0..rounds(suite, 0, 20) {
        deaths::a_killed_vmm_takes_its_containers_along(suite)
            .await
            .with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

pub(crate) async fn pods_on_a_dual_stack_network_come_and_go(suite: &Suite) -> Result<()> {
    networks::come_and_go(suite, rounds(suite, 5, 100)).await
}

pub(crate) async fn streams_end_in_every_order_and_lose_no_byte(suite: &Suite) -> Result<()> {
    endings::every_order(suite, rounds(suite, 2, 100)).await
}

pub(crate) async fn dials_that_are_dropped_at_once_lose_no_pod(suite: &Suite) -> Result<()> {
    endings::dials_that_are_dropped(suite, rounds(suite, 200, 5000)).await
}

/// A helper of QEMU's stopped for good when the daemon was killed between a dial and the guest's answer; its pods stayed Ready
/// for a minute, answered nothing, and were lost.
pub(crate) async fn no_pod_is_lost_when_the_daemon_is_killed_while_it_dials(suite: &Suite) -> Result<()> {
    const PODS: usize = 3;
    let kills = rounds(suite, 6, 100);
    let settings = Settings {
        state: suite.state().join("killed-dialling"),
        backend: suite.backend().to_owned(),
        subnet: "10.213.83.0/24".to_owned(),
        extra: Vec::new(),
    };
    write_hosts_toml(&settings.certs_dir(), &suite.registry().host())?;
    let (mut daemon, mut client) = Daemon::start(suite.layout(), &settings).await?;
    client.pull(suite.shell()).await?;
    let mut pods = Vec::new();
    for number in 0..PODS {
        let config = suite.pod(&format!("dialled-{number}"))?;
        let pod = client.run_pod(&config).await?;
        pods.push((
            pod.clone(),
            launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?,
        ));
    }
    for kill in 0..kills {
        // Each exec dials for its call and for each of its streams.
        let storm = (0..8 * PODS).map(|index| {
            let (mut client, container) = (client.clone(), pods[index % PODS].1.clone());
            tokio::spawn(async move { client.exec(&container, &["true"], 30).await.is_ok() })
        });
        let storm: Vec<_> = storm.collect();
        tokio::time::sleep(Duration::from_millis(u64::from(20 + kill * 53 % 400))).await;
        drop(daemon);
        futures::future::join_all(storm).await;
        (daemon, client) = Daemon::start(suite.layout(), &settings).await?;
        let mut lost = Vec::new();
        for (pod, container) in &pods {
            let said = client.exec(container, &["echo", "x"], 10).await;
            if !said.is_ok_and(|said| said.stdout == b"x\n") {
                lost.push(pod);
            }
        }
        ensure!(
            lost.is_empty(),
            "after kill {kill} of {kills} nothing is heard of {} of {PODS} pods",
            lost.len()
        );
    }
    for (pod, _) in &pods {
        client.remove_pod(pod).await?;
    }
    let ended = daemon.stop().await?;
    ensure!(ended.success(), "the daemon ended with {ended}");
    println!("{kills} kills while the daemon dialled, none of {PODS} pods lost");
    Ok(())
}

pub(crate) async fn many_pods_come_and_go(suite: &Suite) -> Result<()> {
    const AT_ONCE: u32 = 10;
    let pods = rounds(suite, 10, 300);
    let daemon = suite.daemon_pid()?;
    let figures = || Ok::<_, anyhow::Error>((memory(daemon, "VmRSS")?, descriptors(daemon)?));
    let (next, done) = (Arc::new(AtomicU32::new(0)), AtomicU32::new(0));
    let after_a_third = std::sync::Mutex::new(None);
    let worker = async |number: u32| {
        let mut client = suite.client()?;
        let mut ids = BTreeSet::new();
        loop {
            let pod = next.fetch_add(1, Ordering::Relaxed);
            if pod >= pods {
                return Ok::<_, anyhow::Error>(ids.len());
            }
            let mut config = suite.pod(&format!("many-{number}"))?;
            config.metadata.get_or_insert_default().attempt = pod;
            let id = client.run_pod(&config).await.with_context(|| format!("pod {pod}"))?;
            let container =
                launch(&mut client, &id, suite.script("main", "echo up; sleep 60"), &config).await?;
            logged(&config, "main", "up").await?;
            let said = client.exec(&container, &["echo", "x"], 30).await?;
            ensure!(said.stdout == b"x\n", "{said:?}");
            client.remove_pod(&id).await?;
            fs::remove_file(format!("{}/main.log", config.log_directory)).ok();
            ids.insert(id);
            if done.fetch_add(1, Ordering::Relaxed) + 1 == pods.div_ceil(3) {
                *after_a_third.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(figures()?);
            }
        }
    };
    let workers = (0..AT_ONCE.min(pods)).map(worker);
    let made: usize = futures::future::try_join_all(workers).await?.into_iter().sum();
    ensure!(made == pods as usize, "{made} pods with ids of their own, of {pods}");
    let early = after_a_third.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let ((early, _), (late, open)) = (early.context("a third was never done")?, figures()?);
    println!(
        "{pods} pods; the daemon has {early} KiB after a third, {late} KiB at the end, {open} descriptors"
    );
    // Ten pods at once are in the first figure too; what grows with each pod shows.
    ensure!(late < early + (8 << 10), "the daemon grew from {early} to {late} KiB");
    Ok(())
}
