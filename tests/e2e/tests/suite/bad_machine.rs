//! Machines and guests that do not work: a daemon of its own with a broken part.

use std::fs;
use std::time::{Duration, Instant};

use a3s_box_e2e::client::Client;
use a3s_box_e2e::daemon::{Daemon, Settings};
use anyhow::{Context, Result, ensure};
use tonic::Code;

use crate::suite::Suite;

/// A second daemon with its own state and these extra lines of configuration.
async fn broken(
    suite: &Suite,
    name: &str,
    backend: &str,
    extra: &[(&str, &str)],
) -> Result<(Daemon, Client)> {
    let settings = Settings {
        state: suite.state().join(name),
        backend: backend.to_owned(),
        subnet: "10.213.80.0/24".to_owned(),
        extra: extra.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
    };
    Daemon::start(suite.layout(), &settings).await
}

pub(crate) async fn a_guest_that_never_gets_ready_fails_in_time_and_leaves_nothing(
    suite: &Suite,
) -> Result<()> {
    // An initramfs without an agent: the kernel finds no init and stops.
    let initramfs = suite.state().join("empty.cpio");
    fs::write(&initramfs, vec![0; 4096]).context("writing an initramfs with nothing in it")?;
    let extra =
        [("vmm.initramfs", initramfs.to_string_lossy().into_owned()), ("vmm.boot_limit", "8s".to_owned())];
    let extra: Vec<(&str, &str)> = extra.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let (daemon, mut client) = broken(suite, "noagent", suite.backend(), &extra).await?;

    let asked = Instant::now();
    let error =
        client.run_pod(&suite.pod("noagent")?).await.err().context("a pod without a guest was run")?;
    ensure!(asked.elapsed() < Duration::from_secs(30), "it took {:?}", asked.elapsed());
    ensure!(!matches!(error.code(), Code::Unknown | Code::Internal), "{error}");
    ensure!(error.message().contains("boot"), "the message does not name the stage: {error}");
    ensure!(client.pods().await?.is_empty(), "the failed pod is listed");
    let status = daemon.stop().await?;
    ensure!(status.success(), "the daemon ended with {status}");
    Ok(())
}

pub(crate) async fn a_missing_hypervisor_is_named(suite: &Suite) -> Result<()> {
    let (daemon, mut client) = broken(suite, "noqemu", "qemu", &[("vmm.qemu", "/no/such/qemu")]).await?;
    let status = client.status().await?.status.context("Status has a status")?;
    let ready = status
        .conditions
        .iter()
        .find(|condition| condition.r#type == "RuntimeReady")
        .context("RuntimeReady")?;
    ensure!(!ready.status && ready.message.contains("/no/such/qemu"), "{ready:?}");
    let error = client.run_pod(&suite.pod("noqemu")?).await.err().context("a pod without a VMM was run")?;
    ensure!(error.message().contains("/no/such/qemu"), "{error}");
    let status = daemon.stop().await?;
    ensure!(status.success(), "the daemon ended with {status}");
    Ok(())
}
