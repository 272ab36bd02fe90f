//! Machines and guests that do not work: a daemon of its own with a broken part.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use a3s_box_cri::proto::ContainerState;
use a3s_box_e2e::client::Client;
use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::image::{Encoding, Image, Layer};
use a3s_box_e2e::initramfs::Initramfs;
use a3s_box_e2e::processes::{descriptors, printed};
use a3s_box_e2e::registry::write_hosts_toml;
use a3s_box_e2e::sample::busybox;
use a3s_box_e2e::wait;
use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::{Code, Status};

use crate::deaths::cgroup_of;
use crate::suite::{Suite, exit_code, launch, log_lines, logged};

/// A second daemon with its own state and these extra lines of configuration.
pub(crate) async fn broken(
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
    write_hosts_toml(&settings.certs_dir(), &suite.registry().host())?;
    Daemon::start(suite.layout(), &settings).await
}

/// An initramfs whose /init is a program that never reports to the host.
fn mute_initramfs(suite: &Suite) -> Result<String> {
    // Without a terminal and an inittab busybox's init waits for somebody to type.
    let mut initramfs = Initramfs::default();
    initramfs.program("init", &busybox()?);
    let path = suite.state().join("mute.cpio");
    initramfs.write(&path)?;
    Ok(path.to_string_lossy().into_owned())
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

/// A small ext4 in a file; unmounted with this value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, mebibytes: u64) -> Result<Self> {
        fs::create_dir_all(&at).with_context(|| format!("creating {}", at.display()))?;
        let image = at.with_extension("img");
        fs::File::create(&image)?.set_len(mebibytes << 20)?;
        // Room that is root's only would hide that a disk is full.
        printed(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image))?;
        mount_file(&image, &at)?;
        Ok(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The comparison of the machine after the scenario tells when this failed.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Mounts the ext4 in a file. mount(8) would leave a folder in /run.
pub(crate) fn mount_file(file: &Path, at: &Path) -> Result<()> {
    let device = printed(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
    let mounted = mount(Some(device.as_str()), at, Some("ext4"), MsFlags::empty(), None::<&str>);
    // One that is mounted goes when it is unmounted.
    printed(Command::new("losetup").args(["--detach", &device]))?;
    mounted.with_context(|| format!("mounting {device}"))
}

pub(crate) async fn a_full_disk_fails_the_pull_and_says_so(suite: &Suite) -> Result<()> {
    let noise: Vec<u8> = (0..16_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let layer = Layer::new().file("noise", 0o644, &noise)?;
    let image = Image::new(vec![(layer, Encoding::Plain)], &serde_json::json!({}))?;
    let reference = suite.registry().push("e2e/large", "1", &image)?;

    let disk = SmallDisk::mount(suite.state().join("nospace/root"), 16)?;
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

/// Takes all the space there is, until it is dropped.
struct Filler(PathBuf);

impl Filler {
    fn fill(disk: &SmallDisk) -> Result<Self> {
        let filler = Self(disk.0.join("filler"));
        let mut file = fs::File::create(&filler.0)?;
        for block in [1 << 20, 4096, 1] {
            let zeros = vec![0; block];
            while file.write_all(&zeros).is_ok() {}
        }
        // What is only planned to be written has no blocks yet.
        file.sync_all()?;
        Ok(filler)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // A disk that stays full fails the scenario by itself.
        let _ = fs::remove_file(&self.0);
    }
}

/// Records, scratch disks and logs have no room: new pods fail, old ones go on, and no line is lost.
pub(crate) async fn a_full_disk_fails_new_pods_and_keeps_the_others(suite: &Suite) -> Result<()> {
    const LINES: usize = 40_000;
    // So much that the guest cannot keep it for a log that is not written.
    const PADDING: &str = "................................................";
    let root = SmallDisk::mount(suite.state().join("full/root"), 128)?;
    let logs = SmallDisk::mount(suite.state().join("full/logs"), 24)?;
    let no_logs = Filler::fill(&logs)?;
    let (daemon, mut client) = broken(suite, "full", suite.backend(), &[]).await?;
    client.pull(suite.shell()).await?;
    let mut config = suite.pod("old")?;
    config.log_directory = logs.0.to_string_lossy().into_owned();
    let pod = client.run_pod(&config).await?;
    let script =
        format!("i=0; while [ $i -lt {LINES} ]; do echo line $i {PADDING}; i=$((i+1)); done; echo the end");
    let container = launch(&mut client, &pod, suite.script("main", &script), &config).await?;
    let sleeper = launch(&mut client, &pod, suite.script("side", "sleep 3600"), &config).await?;
    let filler = Filler::fill(&root)?;
    let error = client.run_pod(&suite.pod("new")?).await.err().context("a pod was made on a full disk")?;
    ensure!(error.message().to_lowercase().contains("space"), "{error}");
    ensure!(client.pods().await? == [pod.clone()], "the failed pod is listed");
    let said = client.exec(&sleeper, &["echo", "still here"], 30).await?;
    ensure!(said.stdout == b"still here\n", "{said:?}");
    let status = client.container_status(&container).await?;
    ensure!(status.state() == ContainerState::ContainerRunning, "it waits for its log: {status:?}");

    drop(filler);
    let new = client.run_pod(&suite.pod("new")?).await.context("the pod, when there is room again")?;
    client.remove_pod(&new).await?;
    drop(no_logs);
    // Emulated in an emulator, so many lines take their time.
    wait::until("the container's end", Duration::from_secs(180), || {
        let (mut client, container) = (client.clone(), container.clone());
        async move {
            let status = client.container_status(&container).await?;
            Ok((status.state() == ContainerState::ContainerExited).then_some(()))
        }
    })
    .await?;
    logged(&config, "main", "the end").await?;
    ensure!(exit_code(&client, &container).await? == 0);
    let lines = log_lines(&config, "main")?;
    ensure!(lines.len() == LINES + 1, "{} lines of {LINES}", lines.len());
    for (number, line) in lines[..LINES].iter().enumerate() {
        ensure!(line.2 == format!("line {number} {PADDING}"), "line {number} is {:?}", line.2);
    }
    client.remove_pod(&pod).await?;
    let status = daemon.stop().await?;
    ensure!(status.success(), "the daemon ended with {status}");
    drop((root, logs));
    Ok(())
}

fn limit_descriptors(daemon: &Daemon, soft: usize) -> Result<()> {
    let (pid, limit) = (format!("--pid={}", daemon.pid()), format!("--nofile={soft}:"));
    printed(Command::new("prlimit").args([pid, limit])).map(drop)
}

/// A daemon that has no descriptors left says so, and serves again when there are some.
pub(crate) async fn a_daemon_without_descriptors_recovers(suite: &Suite) -> Result<()> {
    let (daemon, mut client) = broken(suite, "nofile", suite.backend(), &[]).await?;
    client.pull(suite.shell()).await?;
    let config = suite.pod("old")?;
    let pod = client.run_pod(&config).await?;
    let script =
        "i=0; while [ ! -e /tmp/stop ]; do echo line $i; i=$((i+1)); sleep 0.05; done; echo total $i";
    let container = launch(&mut client, &pod, suite.script("main", script), &config).await?;

    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid()))?;
    let files = limits.lines().find(|line| line.starts_with("Max open files"));
    let usual: usize = files.and_then(|line| line.split_whitespace().nth(3)).context("a limit")?.parse()?;
    limit_descriptors(&daemon, descriptors(daemon.pid())? + 3)?;
    let calls = (0..8).map(|number| {
        let (mut client, config) = (client.clone(), suite.pod(&format!("new-{number}")));
        async move { Ok::<_, anyhow::Error>(client.run_pod(&config?).await) }
    });
    let answers = futures::future::try_join_all(calls).await?;
    let refused: Vec<&Status> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
    ensure!(refused.len() >= 4, "{answers:?}");
    ensure!(
        refused.iter().all(|status| status.message().contains("Too many open files")),
        "{:?}",
        refused.iter().map(|status| status.message()).collect::<Vec<_>>()
    );
    // Those who come now wait for a descriptor; they must not keep the daemon from serving the others.
    let socket = suite.state().join("nofile/run/a3s-box.sock");
    let waiting: Vec<_> = (0..8).map(|_| UnixStream::connect(&socket)).collect::<Result<_, _>>()?;
    client.status().await.context("a client that is connected")?;
    limit_descriptors(&daemon, usual)?;
    drop(waiting);

    for pod in answers.into_iter().flatten() {
        client.remove_pod(&pod).await?;
    }
    let new = client.run_pod(&suite.pod("new")?).await.context("a pod, when there are descriptors again")?;
    client.remove_pod(&new).await?;
    Client::connect(&socket).await?.version().await.context("a client that comes later")?;
    client.exec(&container, &["touch", "/tmp/stop"], 30).await?;
    ensure!(exit_code(&client, &container).await? == 0);
    let lines: Vec<String> = log_lines(&config, "main")?.into_iter().map(|line| line.2).collect();
    let expected = (0..lines.len() - 1).map(|number| format!("line {number}"));
    let expected: Vec<String> = expected.chain([format!("total {}", lines.len() - 1)]).collect();
    ensure!(lines == expected, "{lines:?}");
    client.remove_pod(&pod).await?;
    let status = daemon.stop().await?;
    ensure!(status.success(), "the daemon ended with {status}");
    Ok(())
}

/// A cgroup that bounds how many threads its processes may have; removed with this value.
struct FewThreads(PathBuf);

impl FewThreads {
    /// A group below the process's own, with the process in it.
    fn around(pid: u32) -> Result<Self> {
        let parent = cgroup_of(pid, "pids")?;
        if parent.join("cgroup.controllers").exists() {
            fs::write(parent.join("cgroup.subtree_control"), "+pids")?;
        }
        let group = Self(parent.join(format!("a3s-box-e2e-{pid}")));
        fs::create_dir(&group.0).with_context(|| format!("making {}", group.0.display()))?;
        fs::write(group.0.join("cgroup.procs"), pid.to_string())?;
        Ok(group)
    }

    fn allow(&self, more: Option<u32>) -> Result<()> {
        let limit = match more {
            None => "max".to_owned(),
            Some(more) => {
                let now: u32 = fs::read_to_string(self.0.join("pids.current"))?.trim().parse()?;
                (now + more).to_string()
            }
        };
        fs::write(self.0.join("pids.max"), limit).context("setting the limit")
    }
}

impl Drop for FewThreads {
    fn drop(&mut self) {
        // The comparison of the machine after the scenario tells when this failed.
        let _ = fs::remove_dir(&self.0);
    }
}

/// A daemon that may start no thread and no process says so, and serves again when it may.
pub(crate) async fn a_daemon_without_processes_recovers(suite: &Suite) -> Result<()> {
    let (daemon, mut client) = broken(suite, "noproc", suite.backend(), &[]).await?;
    client.pull(suite.shell()).await?;
    let config = suite.pod("old")?;
    let pod = client.run_pod(&config).await?;
    let container = launch(&mut client, &pod, suite.script("main", "sleep 3600"), &config).await?;
    let group = FewThreads::around(daemon.pid())?;
    group.allow(Some(0))?;
    for number in 0..4 {
        let answer = client.run_pod(&suite.pod(&format!("new-{number}"))?).await;
        let error = answer.err().context("a pod was made without a process")?;
        ensure!(error.message().contains("Resource temporarily unavailable"), "{error}");
    }
    let said = client.exec(&container, &["echo", "still here"], 30).await?;
    ensure!(said.stdout == b"still here\n", "{said:?}");
    group.allow(None)?;
    let new =
        client.run_pod(&suite.pod("new")?).await.context("a pod, when processes may be started again")?;
    ensure!(client.pods().await?.len() == 2, "the failed pods are listed");
    for pod in [new, pod] {
        client.remove_pod(&pod).await?;
    }
    let status = daemon.stop().await?;
    ensure!(status.success(), "the daemon ended with {status}");
    drop(group);
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
