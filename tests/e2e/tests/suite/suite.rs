//! What all scenarios share, and what is checked around each.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use a3s_box_cri::proto::{
    ContainerConfig, ContainerMetadata, ContainerState, LinuxPodSandboxConfig, PodSandboxConfig,
    PodSandboxMetadata,
};
use a3s_box_e2e::client::{Client, image};
use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::layout::Layout;
use a3s_box_e2e::machine::{Leftovers, Machine};
use a3s_box_e2e::processes::memory;
use a3s_box_e2e::registry::{Registry, write_hosts_toml};
use a3s_box_e2e::{sample, wait};
use anyhow::{Context, Result, bail, ensure};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::Scenario;

const SUBNET: &str = "10.213.79.0/24";
/// How long a container may take to do what the scenario waits for; emulated in an emulator, that is long.
const CONTAINER_LIMIT: Duration = Duration::from_secs(30);

/// One run: registry, daemon, client.
pub(crate) struct Suite {
    runtime: Runtime,
    layout: Layout,
    settings: Settings,
    registry: Registry,
    shell: String,
    state: Mutex<Option<tempfile::TempDir>>,
    daemon: Mutex<Option<(Daemon, Client)>>,
    /// Before anything was started.
    untouched: Machine,
    /// A pull from a registry that does not answer, which takes its time beside the scenarios.
    hanging: Mutex<Option<JoinHandle<Result<()>>>>,
    /// With the daemon running and no pod. What a failed scenario has left is the next one's starting point.
    idle: Mutex<Machine>,
}

impl Suite {
    pub(crate) fn start() -> Result<Self> {
        let layout = Layout::at(&variable("A3S_BOX_DIST", "target/dist"))?;
        let backend = variable("A3S_BOX_BACKEND", "qemu").to_string_lossy().into_owned();
        let state = tempfile::Builder::new().prefix("e2e-").tempdir().context("making the state folder")?;
        let folder = fs::canonicalize(state.path())?;
        let untouched = Machine::look(&folder)?;
        let settings =
            Settings { state: folder.clone(), backend, subnet: SUBNET.to_owned(), extra: Vec::new() };

        let registry = Registry::start(&folder.join("registry"))?;
        write_hosts_toml(&settings.certs_dir(), &registry.host())?;
        let shell = registry.push("e2e/shell", "1", &sample::shell()?)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let (daemon, mut client) = runtime.block_on(Daemon::start(&layout, &settings))?;
        runtime.block_on(client.pull(&shell)).context("pulling the image that most scenarios use")?;
        let idle = Machine::look(&folder)?;
        Ok(Self {
            runtime,
            layout,
            settings,
            registry,
            shell,
            state: Mutex::new(Some(state)),
            daemon: Mutex::new(Some((daemon, client))),
            untouched,
            hanging: Mutex::default(),
            idle: Mutex::new(idle),
        })
    }

    pub(crate) fn backend(&self) -> &str {
        &self.settings.backend
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn layout_shown(&self) -> String {
        self.layout.daemon().display().to_string()
    }

    pub(crate) fn state(&self) -> &Path {
        &self.settings.state
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The image with a shell; pulled already.
    pub(crate) fn shell(&self) -> &str {
        &self.shell
    }

    pub(crate) fn hanging(&self) -> MutexGuard<'_, Option<JoinHandle<Result<()>>>> {
        self.hanging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn client(&self) -> Result<Client> {
        let daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, client) = daemon.as_ref().context("the daemon has been stopped")?;
        Ok(client.clone())
    }

    /// After a failure the state folder stays for a look.
    pub(crate) fn keep_state(&self) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(state) = state {
            println!("state kept in {}", state.keep().display());
        }
    }

    /// Runs one scenario and checks that it left nothing; after a failure what it left is removed for the next one.
    pub(crate) fn run(&self, scenario: Scenario) -> Result<()> {
        self.runtime.block_on(async {
            let outcome = scenario(self).await;
            let Ok(client) = self.client() else { return outcome };
            let outcome = self.examined(outcome, client).await;
            if outcome.is_err() {
                *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Machine::look(self.state())?;
            }
            outcome
        })
    }

    async fn examined(&self, outcome: Result<()>, mut client: Client) -> Result<()> {
        let left_pods = client.pods().await.context("listing pods after the scenario")?;
        client.remove_everything().await.context("removing what the scenario left")?;
        if let Err(error) = outcome {
            println!("\nthe daemon's log ends with:\n{}", self.daemon_log());
            return Err(error);
        }
        ensure!(left_pods.is_empty(), "the scenario left pods: {left_pods:?}");
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let left = self.left_since(&idle).await?;
        ensure!(left.is_empty(), "left on the machine:\n{left}");
        Ok(())
    }

    /// What is on the machine that was not there before, as far as it is ours.
    async fn left_since(&self, before: &Machine) -> Result<Leftovers> {
        let mut left = Machine::settled(self.state(), before).await?;
        if std::env::var_os("A3S_BOX_E2E_SHARED").is_some() {
            let log =
                fs::read_to_string(self.state().join("daemon.log")).context("reading the daemon's log")?;
            left.0.retain(|(_, name)| names_one_of(name, &log));
        }
        Ok(left)
    }

    pub(crate) fn daemon_log(&self) -> String {
        let daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        daemon.as_ref().map(|(daemon, _)| daemon.log_tail()).unwrap_or_default()
    }

    /// Resident memory of the daemon in KiB.
    pub(crate) fn daemon_memory(&self) -> Result<u64> {
        memory(self.daemon_pid()?, "VmRSS")
    }

    pub(crate) fn daemon_pid(&self) -> Result<u32> {
        let daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        let (daemon, _) = daemon.as_ref().context("the daemon has been stopped")?;
        Ok(daemon.pid())
    }

    /// A pod of that name; its logs go to a folder of its own.
    pub(crate) fn pod(&self, name: &str) -> Result<PodSandboxConfig> {
        let log_directory = self.settings.logs().join(name);
        fs::create_dir_all(&log_directory)
            .with_context(|| format!("creating {}", log_directory.display()))?;
        Ok(PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "e2e".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: log_directory.to_string_lossy().into_owned(),
            labels: [("app".to_owned(), name.to_owned())].into(),
            linux: Some(LinuxPodSandboxConfig::default()),
            ..Default::default()
        })
    }

    /// A container that runs a shell script.
    pub(crate) fn script(&self, name: &str, script: &str) -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(image(&self.shell)),
            command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            log_path: format!("{name}.log"),
            ..Default::default()
        }
    }
}

fn variable(name: &str, default: &str) -> PathBuf {
    std::env::var_os(name).map_or_else(|| PathBuf::from(default), PathBuf::from)
}

/// Whether a name ends in (the beginning of) a box id that the log knows.
fn names_one_of(name: &str, log: &str) -> bool {
    let id: String =
        name.rsplit(|character: char| !character.is_ascii_hexdigit()).next().unwrap_or_default().into();
    id.len() >= 12 && log.contains(&id)
}

/// Creates and starts a container.
pub(crate) async fn launch(
    client: &mut Client,
    pod: &str,
    config: ContainerConfig,
    sandbox: &PodSandboxConfig,
) -> Result<String> {
    let id = client.create(pod, config, sandbox).await?;
    client.start(&id).await?;
    Ok(id)
}

/// Waits until a container has ended by itself; its exit code.
pub(crate) async fn exit_code(client: &Client, container: &str) -> Result<i32> {
    exit_code_within(CONTAINER_LIMIT, client, container).await
}

/// The same, with a limit of its own.
pub(crate) async fn exit_code_within(limit: Duration, client: &Client, container: &str) -> Result<i32> {
    wait::until("the container's end", limit, || {
        let mut client = client.clone();
        async move {
            let status = client.container_status(container).await?;
            Ok((status.state() == ContainerState::ContainerExited).then_some(status.exit_code))
        }
    })
    .await
}

/// A container's log: stream, tag and message of each line. Every line must have CRI's four fields.
pub(crate) fn log_lines(pod: &PodSandboxConfig, name: &str) -> Result<Vec<(String, String, String)>> {
    let path = Path::new(&pod.log_directory).join(format!("{name}.log"));
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    let mut lines = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(4, ' ');
        let (Some(time), Some(stream), Some(tag), Some(message)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            bail!("{}: not a CRI log line: {line:?}", path.display());
        };
        ensure!(time.len() >= 20 && time.as_bytes()[10] == b'T', "not an RFC 3339 time: {time}");
        ensure!(matches!(stream, "stdout" | "stderr"), "not a stream: {stream}");
        ensure!(matches!(tag, "F" | "P"), "not a tag: {tag}");
        lines.push((stream.to_owned(), tag.to_owned(), message.to_owned()));
    }
    Ok(lines)
}

/// Waits until a container has logged a whole line with that message.
pub(crate) async fn logged(pod: &PodSandboxConfig, name: &str, message: &str) -> Result<()> {
    wait::until(&format!("the log line {message:?} of {name}"), CONTAINER_LIMIT, || {
        let found =
            log_lines(pod, name).map(|lines| lines.iter().any(|line| line.1 == "F" && line.2 == message));
        async move { Ok(found?.then_some(())) }
    })
    .await
}

/// The last scenario: the daemon ends on SIGTERM with success, and the machine is as it was before the run.
pub(crate) async fn nothing_is_left_when_the_daemon_has_stopped(suite: &Suite) -> Result<()> {
    let daemon = suite.daemon.lock().unwrap_or_else(PoisonError::into_inner).take();
    let (daemon, _) = daemon.context("the daemon runs until the last scenario")?;
    let log = daemon.log_tail();
    let status = daemon.stop().await?;
    ensure!(status.success(), "the daemon ended with {status}; its log:\n{log}");
    let mut left = suite.left_since(&suite.untouched).await?;
    // The registry is the suite's own and ends with it.
    left.0.retain(|(kind, name)| !(*kind == "process" && name.ends_with("docker-registry")));
    // Only the run itself is named so.
    left.0.retain(|(kind, name)| !(*kind == "file" && Path::new(name) == suite.state()));
    ensure!(left.is_empty(), "left on the machine:\n{left}");
    Ok(())
}
