//! Volumes that several containers of a pod, or several mounts of one, have in common.
//!
//! Guards: each mount was a file system of its own in the guest. Sockets of the other container refused every connection, both
//! got the same lock, pipes blocked for ever, mapped files stood still, and what the other one had renamed or removed was seen
//! up to a second later.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use a3s_box_cri::proto::{ContainerConfig, Mount, PodSandboxConfig};
use a3s_box_e2e::client::{Client, image};
use a3s_box_e2e::sample;
use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use crate::bad_machine::broken;
use crate::suite::{Suite, launch, logged};

/// A command in a container; emulated in an emulator, everything takes longer.
const SECONDS: i64 = 60;

/// What a container finds that shares everything with one that holds it.
const SHARED: &str = "socket hello\nflock held\nfcntl held\nmap counts\n";

fn mount(host: &Path, inside: &str, readonly: bool) -> Mount {
    Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.to_owned(),
        readonly,
        ..Default::default()
    }
}

/// The name of the image whose containers have `neighbour` and these programs.
fn push(suite: &Suite, programs: &[&str]) -> Result<String> {
    let built = sample::with_neighbour(env!("CARGO_BIN_EXE_a3s-box-neighbour"), programs)?;
    suite.registry().push("e2e/neighbour", &format!("{}", programs.len()), &built)
}

/// Containers of one pod.
struct Pod<'a> {
    suite: &'a Suite,
    client: Client,
    image: String,
    config: PodSandboxConfig,
    id: String,
}

impl<'a> Pod<'a> {
    async fn run(suite: &'a Suite, mut client: Client, name: &str, programs: &[&str]) -> Result<Self> {
        let image = push(suite, programs)?;
        client.pull(&image).await?;
        let config = suite.pod(name)?;
        let id = client.run_pod(&config).await?;
        Ok(Self { suite, client, image, config, id })
    }

    async fn launch(&mut self, name: &str, script: &str, mounts: Vec<Mount>) -> Result<String> {
        let image = Some(image(&self.image));
        let container = ContainerConfig { image, mounts, ..self.suite.script(name, script) };
        launch(&mut self.client, &self.id, container, &self.config).await
    }

    /// What a script says in a container.
    async fn says(&mut self, container: &str, script: &str) -> Result<String> {
        let said = self.client.exec(container, &["sh", "-c", script], SECONDS).await?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(said.exit_code == 0, "{script}: {} {}", said.exit_code, text(&said.stderr));
        Ok(text(&said.stdout))
    }

    async fn expect(&mut self, container: &str, script: &str, expected: &str) -> Result<()> {
        let said = self.says(container, script).await?;
        ensure!(said == expected, "{script}: {said:?} and not {expected:?}");
        Ok(())
    }

    /// The options of what the pod's machine has attached, as the host sees them.
    async fn attached(&mut self) -> Result<Vec<String>> {
        let info = self.client.pod_info(&self.id).await?;
        let vmm = info["pid"].as_i64().with_context(|| format!("a process: {info}"))?;
        let table = fs::read_to_string(format!("/proc/{vmm}/mountinfo"))?;
        let fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let attached = fields.filter(|fields| fields.get(4).is_some_and(|at| at.starts_with("/share/pod/")));
        Ok(attached.map(|fields| fields[5].to_owned()).collect())
    }

    async fn remove(mut self) -> Result<()> {
        Ok(self.client.remove_pod(&self.id).await?)
    }
}

/// Starts `neighbour hold` in the background of a shell and waits until it holds.
fn holding(directory: &str) -> String {
    format!("neighbour hold {directory} > /tmp/said & until grep -q holding /tmp/said; do sleep 0.1; done")
}

pub(crate) async fn containers_of_a_pod_share_one_file_system(suite: &Suite) -> Result<()> {
    let volume = suite.state().join("shared");
    fs::create_dir_all(volume.join("part/deep"))?;
    let (daemon, client) = broken(suite, "shared-volumes", suite.backend(), &[]).await?;
    let mut pod = Pod::run(suite, client, "shared-volumes", &[]).await?;
    let fixed = pod.launch("fixed", "sleep 3600", vec![mount(&volume, "/fixed", true)]).await?;
    let attached = pod.attached().await?;
    ensure!(attached.len() == 1 && attached[0].starts_with("ro,"), "{attached:?}");
    let first = pod.launch("first", "exec neighbour hold /v", vec![mount(&volume, "/v", false)]).await?;
    logged(&pod.config, "first", "holding").await?;
    // What is attached is counted by the pod, not by the daemon that attached it.
    drop(daemon);
    let (daemon, client) = broken(suite, "shared-volumes", suite.backend(), &[]).await?;
    pod.client = client;
    let mounts = vec![
        mount(&volume, "/a", false),
        mount(&volume, "/b", false),
        mount(&volume, "/fixed", true),
        mount(&volume.join("part/deep"), "/part", false),
    ];
    let second = pod.launch("second", "sleep 3600", mounts).await?;
    let attached = pod.attached().await?;
    ensure!(attached.len() == 1 && attached[0].starts_with("rw,"), "{attached:?}");

    pod.expect(&second, "neighbour try /a", SHARED).await?;
    pod.expect(
        &fixed,
        "cat /fixed/map | head -c 1 | wc -c; touch /fixed/never 2>&1 || true",
        "1\ntouch: /fixed/never: Read-only file system\n",
    )
    .await?;
    pod.expect(&second, "touch /fixed/never 2>&1 || true", "touch: /fixed/never: Read-only file system\n")
        .await?;
    pod.says(&first, &holding("/v/part/deep")).await?;
    pod.expect(&second, "neighbour try /part", SHARED).await?;
    two_targets(&mut pod, &second).await?;
    pod.says(&first, "mkfifo /v/pipe; (echo through > /v/pipe) > /dev/null 2>&1 &").await?;
    pod.expect(&second, "timeout 20 cat /b/pipe", "through\n").await?;
    events(&mut pod, &first, &second).await?;

    for container in [&second, &first] {
        pod.client.remove(container).await?;
    }
    ensure!(!volume.join("never").exists());
    pod.expect(&fixed, "cat /fixed/x-noticed", "noticed\n").await?;
    pod.client.remove(&fixed).await?;
    let attached = pod.attached().await?;
    ensure!(attached.is_empty(), "{attached:?}");
    pod.remove().await?;
    ensure!(daemon.stop().await?.success());
    Ok(())
}

/// Two mounts of a container: what one has seen, another one changes.
async fn two_targets(pod: &mut Pod<'_>, container: &str) -> Result<()> {
    let script = "cd /a; echo one > x; cat /b/x; \
        for n in 1 2 3 4 5; do echo $n > t; mv t x; cat /b/x; rm x; test -e /b/x && echo still there; echo - > x; cat /b/x > /dev/null; done; \
        mkdir own; neighbour hold /a/own > /tmp/said & until grep -q holding /tmp/said; do sleep 0.1; done; neighbour try /b/own";
    pod.expect(container, script, &format!("one\n1\n2\n3\n4\n5\n{SHARED}")).await
}

/// One container watches, another one writes.
async fn events(pod: &mut Pod<'_>, watcher: &str, writer: &str) -> Result<()> {
    let watch =
        "neighbour watch /v > /tmp/events 2>&1 & until grep -q watching /tmp/events; do sleep 0.1; done";
    pod.says(watcher, watch).await?;
    pod.says(writer, "echo noticed > /a/x-noticed").await?;
    let wait = "for n in $(seq 100); do grep event /tmp/events && exit; sleep 0.1; done; echo nothing";
    pod.expect(watcher, wait, "event x-noticed\n").await
}

/// Guards: both got the lock of a database, and its index of a shared map was one for each.
pub(crate) async fn databases_in_two_containers_wait_for_each_other(suite: &Suite) -> Result<()> {
    let volume = suite.state().join("database");
    fs::create_dir_all(&volume)?;
    let mut pod = Pod::run(suite, suite.client()?, "databases", &["/usr/bin/sqlite3"]).await?;
    let mounts = || vec![mount(&volume, "/v", false)];
    let (first, second) = (
        pod.launch("first", "sleep 3600", mounts()).await?,
        pod.launch("second", "sleep 3600", mounts()).await?,
    );
    let sql = |said: &str| format!("sqlite3 -cmd '.timeout 30000' /v/db \"{said}\"");
    pod.expect(&first, &sql("pragma journal_mode=wal; create table t(who, n)"), "wal\n").await?;
    let insert = |who: &str| {
        let one = sql(&format!("insert into t select '{who}', count(*) from t"));
        format!("for n in $(seq 20); do {one} || exit 1; done")
    };
    let mut other = Pod {
        suite,
        client: pod.client.clone(),
        image: String::new(),
        config: pod.config.clone(),
        id: String::new(),
    };
    let (one, two) = (insert("one"), insert("two"));
    tokio::try_join!(pod.says(&first, &one), other.says(&second, &two))?;
    // Whoever counted wrong was not let wait, or did not see what the other one had written.
    let count = sql("select count(*), count(distinct n), count(distinct who) from t; pragma integrity_check");
    for container in [&first, &second] {
        pod.expect(container, &count, "40|40|2\nok\n").await?;
    }
    let hold = "(echo 'begin exclusive;'; sleep 20) | sqlite3 /v/db > /dev/null 2>&1 & sleep 2";
    pod.says(&first, hold).await?;
    let locked = pod.says(&second, "sqlite3 /v/db 'begin exclusive' 2>&1 || true").await?;
    ensure!(locked.contains("database is locked"), "{locked:?}");
    pod.remove().await
}

pub(crate) async fn two_targets_of_a_run_are_one_file_system(suite: &Suite) -> Result<()> {
    let folder: PathBuf = suite.state().join("run-shared");
    fs::create_dir_all(&folder)?;
    let name = push(suite, &[])?;
    let volumes = ["/a", "/b"].map(|inside| format!("{}:{inside}", folder.display()));
    let state = suite.state().join("run-shared-state");
    let script = format!("{}; neighbour try /b; echo two > /a/t; mv /a/t /a/x; cat /b/x", holding("/a"));
    let mut command = Command::new(suite.layout().cli());
    command.arg("--config").arg(suite.state().join("config.toml"));
    command.arg("--root").arg(state.join("root")).arg("--run-dir").arg(state.join("run"));
    command.args([
        "run",
        "--quiet",
        "--network",
        "none",
        "-v",
        &volumes[0],
        "-v",
        &volumes[1],
        &name,
        "--",
        &script,
    ]);
    let output = tokio::time::timeout(Duration::from_secs(120), command.kill_on_drop(true).output());
    let output = output.await.context("a3s-box did not end in time")??;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(stdout == format!("{SHARED}two\n"), "{stdout:?} {stderr:?}");
    Ok(())
}
