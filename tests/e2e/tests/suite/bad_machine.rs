//! Machines and guests that do not work: a daemon of its own with a broken part.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use a3s_box_e2e::client::Client;
use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::image::{Encoding, Image, Layer};
use a3s_box_e2e::registry::write_hosts_toml;
use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::{Code, Status};

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

/// An initramfs whose /init is a program that never reports to the host.
fn mute_initramfs(suite: &Suite) -> Result<String> {
    // Without a terminal and an inittab busybox's init waits for somebody to type.
    let program = fs::read("/bin/busybox").context("reading busybox")?;
    let mut archive = cpio_entry("init", 0o100_755, &program);
    archive.extend(cpio_entry("TRAILER!!!", 0, b""));
    archive.resize(archive.len().next_multiple_of(4096), 0);
    let path = suite.state().join("mute.cpio");
    fs::write(&path, archive).with_context(|| format!("writing {}", path.display()))?;
    Ok(path.to_string_lossy().into_owned())
}

/// One entry of a cpio archive in the kernel's "newc" form.
fn cpio_entry(name: &str, mode: u32, contents: &[u8]) -> Vec<u8> {
    let fields = [1, mode as usize, 0, 0, 1, 0, contents.len(), 0, 0, 0, 0, name.len() + 1, 0];
    let mut entry = b"070701".to_vec();
    entry.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
    entry.extend(name.bytes());
    entry.push(0);
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry.extend(contents);
    entry.resize(entry.len().next_multiple_of(4), 0);
    entry
}

/// Runs a pod that must fail while it boots; its status, with the time it took.
async fn failed_boot(suite: &Suite, name: &str, initramfs: &str, limit: &str) -> Result<(Status, Duration)> {
    let extra = [("vmm.initramfs", initramfs), ("vmm.boot_limit", limit)];
    let (daemon, mut client) = broken(suite, name, suite.backend(), &extra).await?;
    let asked = Instant::now();
    let error = client.run_pod(&suite.pod(name)?).await.err().context("a pod without a guest was run")?;
    let took = asked.elapsed();
    ensure!(error.message().contains("boot"), "the message does not name the stage: {error}");
    ensure!(client.pods().await?.is_empty(), "the failed pod is listed");
    let status = daemon.stop().await?;
    ensure!(status.success(), "the daemon ended with {status}");
    Ok((error, took))
}

pub(crate) async fn a_guest_that_never_gets_ready_fails_in_time_and_leaves_nothing(
    suite: &Suite,
) -> Result<()> {
    let (error, took) = failed_boot(suite, "mute", &mute_initramfs(suite)?, "6s").await?;
    ensure!(error.code() == Code::DeadlineExceeded, "{error}");
    ensure!(took >= Duration::from_secs(6) && took < Duration::from_secs(20), "it took {took:?}");
    Ok(())
}

pub(crate) async fn a_guest_that_dies_while_booting_shows_its_last_words(suite: &Suite) -> Result<()> {
    // The kernel finds no init and panics.
    let empty = suite.state().join("empty.cpio");
    fs::write(&empty, vec![0; 4096]).context("writing an initramfs with nothing in it")?;
    let (error, _) = failed_boot(suite, "noinit", &empty.to_string_lossy(), "60s").await?;
    ensure!(error.message().contains("Kernel panic"), "the guest's last words are missing: {error}");
    Ok(())
}

/// A small file system in memory; unmounted with this value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, mebibytes: u32) -> Result<Self> {
        fs::create_dir_all(&at).with_context(|| format!("creating {}", at.display()))?;
        let size = format!("size={mebibytes}m");
        mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
            .with_context(|| format!("mounting a small disk on {}", at.display()))?;
        Ok(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The comparison of the machine after the scenario tells when this failed.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

pub(crate) async fn a_full_disk_fails_the_pull_and_says_so(suite: &Suite) -> Result<()> {
    let noise: Vec<u8> = (0..16_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let layer = Layer::new().file("noise", 0o644, &noise)?;
    let image = Image::new(vec![(layer, Encoding::Plain)], &serde_json::json!({}))?;
    let reference = suite.registry().push("e2e/large", "1", &image)?;

    let disk = SmallDisk::mount(suite.state().join("nospace/root"), 8)?;
    write_hosts_toml(&suite.state().join("nospace/certs.d"), &suite.registry().host())?;
    let (daemon, mut client) = broken(suite, "nospace", suite.backend(), &[]).await?;
    let error = client.pull(&reference).await.err().context("an image larger than the disk was pulled")?;
    ensure!(error.code() == Code::ResourceExhausted, "{error}");
    ensure!(error.message().contains(&reference) && error.message().contains("space"), "{error}");
    ensure!(
        client.pull(suite.shell()).await.is_ok(),
        "what the failed pull had written takes the disk's space"
    );
    let status = daemon.stop().await?;
    ensure!(status.success(), "the daemon ended with {status}");
    drop(disk);
    Ok(())
}

pub(crate) async fn a_missing_hypervisor_is_named(suite: &Suite) -> Result<()> {
    let started = broken(suite, "noqemu", "qemu", &[("vmm.qemu", "/no/such/qemu")]).await;
    let message = match started {
        Ok((daemon, _)) => bail!("a daemon without a hypervisor started:\n{}", daemon.log_tail()),
        Err(error) => format!("{error:#}"),
    };
    ensure!(message.contains("/no/such/qemu") && message.contains("install"), "{message}");
    Ok(())
}
