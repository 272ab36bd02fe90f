//! A pod that was started by another build: `cargo xtask soak --across OTHER_LAYOUT`.
//!
//! Its records, its VM, and the agent in it are that build's; the daemon that goes on with it is this one.

use std::fs;
use std::path::Path;
use std::time::Duration;

use a3s_box_cri::proto::{ContainerConfig, ContainerState, Mount, PodSandboxConfig, PodSandboxState};
use a3s_box_e2e::client::Client;
use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::layout::Layout;
use a3s_box_e2e::registry::write_hosts_toml;
use anyhow::{Context, Result, ensure};

use crate::suite::{Suite, exit_code, launch, log_lines, logged};

/// The layout of the other build.
const OTHER: &str = "A3S_BOX_OTHER_DIST";

/// How long there is no daemon: longer than the container that ends meanwhile runs.
const AWAY: Duration = Duration::from_secs(8);

/// What the pod was left with.
struct Left {
    pod: String,
    /// Runs, and logs a line after the other.
    steady: String,
    /// Ends while there is no daemon.
    leaver: String,
    /// Was never started.
    waiting: String,
}

pub(crate) async fn a_pod_outlives_the_build_that_started_it(suite: &Suite) -> Result<()> {
    let Some(other) = std::env::var_os(OTHER) else {
        println!("SKIPPED: {OTHER} names no layout of another build (cargo xtask soak --across)");
        return Ok(());
    };
    let other = Layout::at(Path::new(&other))?;
    let settings = Settings {
        state: suite.state().join("across"),
        backend: suite.backend().to_owned(),
        subnet: "10.213.83.0/24".to_owned(),
        extra: Vec::new(),
    };
    write_hosts_toml(&settings.certs_dir(), &suite.registry().host())?;
    let shared = suite.state().join("across-shared");
    fs::create_dir_all(&shared)?;
    let config = suite.pod("across")?;

    let (daemon, mut client) =
        Daemon::start(&other, &settings).await.context("starting the other build's daemon")?;
    let version = client.version().await?.runtime_version;
    let left = leave(suite, &mut client, &config, &shared).await.context("with the other build")?;
    let ended = daemon.stop().await?;
    ensure!(ended.success(), "the other build's daemon ended with {ended}");
    let before = log_lines(&config, "steady")?.len();
    tokio::time::sleep(AWAY).await;

    let (daemon, mut client) = Daemon::start(suite.layout(), &settings)
        .await
        .context("starting this build's daemon on its state")?;
    let now = client.version().await?.runtime_version;
    go_on(suite, &mut client, &config, &shared, &left).await.context("with this build")?;
    let lines = end(&mut client, &config, &left).await.context("ending it with this build")?;
    let ended = daemon.stop().await?;
    ensure!(ended.success(), "this build's daemon ended with {ended}");
    println!(
        "started by {version}, ended by {now}: {lines} lines once each, {before} of them before the change"
    );
    Ok(())
}

fn with_shared(mut config: ContainerConfig, shared: &Path) -> ContainerConfig {
    config.mounts.push(Mount {
        container_path: "/shared".to_owned(),
        host_path: shared.to_string_lossy().into_owned(),
        ..Default::default()
    });
    config
}

/// Makes a pod as the other build does it.
async fn leave(suite: &Suite, client: &mut Client, config: &PodSandboxConfig, shared: &Path) -> Result<Left> {
    client.pull(suite.shell()).await?;
    let pod = client.run_pod(config).await?;
    let script = "trap 'echo told to stop; exit 0' TERM; echo mine > /shared/file; i=0; \
                  while [ ! -e /tmp/stop ]; do echo line $i; i=$((i+1)); sleep 0.05; done; echo total $i; \
                  while :; do sleep 1 & wait $!; done";
    let steady = with_shared(suite.script("steady", script), shared);
    let steady = launch(client, &pod, steady, config).await?;
    logged(config, "steady", "line 3").await?;
    let waiting = client.create(&pod, suite.script("waiting", "echo started late"), config).await?;
    let leaver = launch(client, &pod, suite.script("leaver", "sleep 4; echo gone; exit 3"), config).await?;
    Ok(Left { pod, steady, leaver, waiting })
}

/// Everything of the pod works on.
async fn go_on(
    suite: &Suite,
    client: &mut Client,
    config: &PodSandboxConfig,
    shared: &Path,
    left: &Left,
) -> Result<()> {
    let pods = client.pods().await?;
    ensure!(pods == [left.pod.clone()], "pods: {pods:?}");
    let status = client.pod_status(&left.pod).await?;
    ensure!(status.state() == PodSandboxState::SandboxReady, "{status:?}");
    let status = client.container_status(&left.steady).await?;
    ensure!(status.state() == ContainerState::ContainerRunning, "{status:?}");
    let said =
        client.exec(&left.steady, &["sh", "-c", "cat /shared/file; echo oops >&2; exit 5"], 30).await?;
    ensure!(said.exit_code == 5 && said.stdout == b"mine\n" && said.stderr == b"oops\n", "{said:?}");

    let code = exit_code(client, &left.leaver).await?;
    ensure!(code == 3, "the container that ended while there was no daemon has code {code}");
    let lines = log_lines(config, "leaver")?;
    ensure!(lines.iter().map(|line| line.2.as_str()).eq(["gone"]), "{lines:?}");
    client.remove(&left.leaver).await?;
    client.start(&left.waiting).await.context("starting what the other build has created")?;
    ensure!(exit_code(client, &left.waiting).await? == 0);
    logged(config, "waiting", "started late").await?;

    let script = "echo ours >> /shared/file; cat /shared/file";
    let new = with_shared(suite.script("new", script), shared);
    let new = launch(client, &left.pod, new, config).await.context("a new container in the old pod")?;
    ensure!(exit_code(client, &new).await? == 0);
    logged(config, "new", "ours").await?;
    ensure!(fs::read_to_string(shared.join("file"))? == "mine\nours\n");
    client.remove(&new).await?;
    Ok(())
}

/// Ends the pod; how many lines its log has, each once.
async fn end(client: &mut Client, config: &PodSandboxConfig, left: &Left) -> Result<usize> {
    client.exec(&left.steady, &["touch", "/tmp/stop"], 30).await?;
    a3s_box_e2e::wait::until("the last line", Duration::from_secs(30), || {
        let lines = log_lines(config, "steady");
        async move { Ok(lines?.iter().any(|line| line.2.starts_with("total ")).then_some(())) }
    })
    .await?;
    client.stop(&left.steady, 20).await?;
    let status = client.container_status(&left.steady).await?;
    ensure!(status.exit_code == 0, "{status:?}");
    let lines: Vec<String> = log_lines(config, "steady")?.into_iter().map(|line| line.2).collect();
    let count = lines.iter().filter(|line| line.starts_with("line ")).count();
    let mut expected: Vec<String> = (0..count).map(|number| format!("line {number}")).collect();
    expected.extend([format!("total {count}"), "told to stop".to_owned()]);
    let differs = lines.iter().zip(&expected).position(|(line, expected)| line != expected);
    ensure!(
        lines == expected,
        "of {} lines the first wrong one is number {differs:?}: {:?}",
        lines.len(),
        differs.map(|at| &lines[at])
    );
    client.stop_pod(&left.pod).await?;
    let status = client.pod_status(&left.pod).await?;
    ensure!(status.state() == PodSandboxState::SandboxNotready, "{status:?}");
    client.remove_pod(&left.pod).await?;
    Ok(count)
}
