//! a3s-box and containerd with runc, a pod of each, asked for the same in the same way.
//!
//! Everything that runs in their containers is one program, `pump`.

use std::fs;
use std::path::{Path, PathBuf};

use a3s_box_e2e::client::Client;
use a3s_box_e2e::daemon::{Daemon, Settings};
use a3s_box_e2e::image::{Encoding, Image, Layer};
use a3s_box_e2e::layout::Layout;
use a3s_box_e2e::registry::{Registry, write_hosts_toml};
use a3s_box_e2e::sample::with_libraries;
use anyhow::{Context, Result};
use serde_json::json;

use crate::containerd::Containerd;
use crate::pod::Pod;

/// Where containerd's shims have their sockets, and its CNI library its results, whatever the configuration says.
const CONTAINERD_STATE: [&str; 2] = ["/run/containerd", "/var/lib/cni"];

/// What both run.
#[derive(clap::Args)]
pub(crate) struct Programs {
    /// The installed layout: target/dist.
    #[arg(long)]
    dist: PathBuf,
    /// The program for the containers, linked statically.
    #[arg(long)]
    pump: PathBuf,
}

/// Both, running.
pub(crate) struct Pair {
    pub(crate) daemon: Daemon,
    pub(crate) client: Client,
    /// The image of both.
    pub(crate) reference: String,
    /// The daemon's folder.
    pub(crate) state: PathBuf,
    pub(crate) ours: Pod,
    /// Left out, and said so, where it cannot run pods.
    pub(crate) peer: Option<Peer>,
    /// Folders that containerd makes, of those that were not there.
    foreign: Vec<&'static str>,
    /// Ends with it.
    _registry: Registry,
}

/// a3s-box alone.
pub(crate) struct Alone {
    pub(crate) daemon: Daemon,
    client: Client,
    reference: String,
    /// The daemon's folder.
    pub(crate) state: PathBuf,
    certs: PathBuf,
    pub(crate) pod: Pod,
    registry: Registry,
}

impl Alone {
    /// `others` are programs of this machine for the containers.
    pub(crate) async fn start(programs: &Programs, others: &[&str], state: &Path) -> Result<Self> {
        let layout = Layout::at(&programs.dist)?;
        let registry = Registry::start(&state.join("registry"))?;
        let reference = registry.push("pump", "latest", &pump_image(&programs.pump, others)?)?;
        let settings = Settings {
            state: state.join("a"),
            // Named, so that no trial boot is part of the start.
            backend: "qemu".to_owned(),
            subnet: "10.213.80.0/24".to_owned(),
            extra: Vec::new(),
        };
        write_hosts_toml(&settings.certs_dir(), &registry.host())?;
        let (daemon, mut client) = Daemon::start(&layout, &settings).await?;
        let started = async {
            client.pull(&reference).await.context("pulling")?;
            Pod::start("a3s-box", client.clone(), &reference, &settings.logs(), "bench", false).await
        };
        match started.await {
            Ok(pod) => {
                let (certs, state) = (settings.certs_dir(), settings.state);
                Ok(Self { daemon, client, reference, state, certs, pod, registry })
            }
            Err(error) => {
                let error = error.context(format!("the daemon's log ends with:\n{}", daemon.log_tail()));
                client.remove_everything().await.context("removing the pods")?;
                daemon.stop().await?;
                Err(error)
            }
        }
    }

    /// Removes everything; the outcome of what was measured, with the daemon's last words if it failed.
    pub(crate) async fn stop(mut self, outcome: Result<()>) -> Result<()> {
        self.client.remove_everything().await.context("removing the pods")?;
        let log = self.daemon.log_tail();
        self.daemon.stop().await?;
        outcome.with_context(|| format!("the daemon's log ends with:\n{log}"))
    }
}

impl Pair {
    /// `others` are programs of this machine for the containers.
    pub(crate) async fn start(programs: &Programs, others: &[&str], state: &Path) -> Result<Self> {
        let foreign = CONTAINERD_STATE.into_iter().filter(|folder| !Path::new(folder).exists()).collect();
        let Alone { daemon, client, reference, state, certs, pod: ours, registry } =
            Alone::start(programs, others, state).await?;
        let folder = state.join("c");
        let peer = match Peer::start(&folder, &certs, &reference).await {
            Ok(peer) => Some(peer),
            Err(error) => {
                println!("\nLEFT OUT: containerd with runc: {error:#}\n{}", Containerd::log_tail(&folder));
                None
            }
        };
        Ok(Self { daemon, client, reference, state, ours, peer, foreign, _registry: registry })
    }

    /// Removes everything; the outcome of what was measured, with the daemon's last words if it failed.
    pub(crate) async fn stop(mut self, outcome: Result<()>) -> Result<()> {
        if let Some(peer) = self.peer {
            peer.stop().await?;
        }
        for folder in self.foreign.into_iter().filter(|folder| Path::new(folder).exists()) {
            fs::remove_dir_all(folder).with_context(|| format!("removing containerd's {folder}"))?;
        }
        remove_cgroups()?;
        self.client.remove_everything().await.context("removing the pods")?;
        let log = self.daemon.log_tail();
        self.daemon.stop().await?;
        outcome.with_context(|| format!("the daemon's log ends with:\n{log}"))
    }
}

/// runc leaves the parent of its containers' cgroups, in each hierarchy. One that is in use cannot be removed.
fn remove_cgroups() -> Result<()> {
    for hierarchy in fs::read_dir("/sys/fs/cgroup").context("listing the cgroup hierarchies")? {
        fs::remove_dir(hierarchy?.path().join("k8s.io")).ok();
    }
    fs::remove_dir("/sys/fs/cgroup/k8s.io").ok();
    Ok(())
}

/// containerd with a pod of its own.
pub(crate) struct Peer {
    daemon: Containerd,
    pub(crate) client: Client,
    pub(crate) pod: Pod,
}

impl Peer {
    async fn start(folder: &Path, certs: &Path, reference: &str) -> Result<Self> {
        let (daemon, mut client) = Containerd::start(folder, certs, Some(reference)).await?;
        client.pull(reference).await.context("pulling")?;
        match Pod::start("containerd", client.clone(), reference, &folder.join("logs"), "bench", true).await {
            Ok(pod) => Ok(Self { daemon, client, pod }),
            Err(error) => {
                client.remove_everything().await.context("removing containerd's pods")?;
                daemon.stop().await?;
                Err(error)
            }
        }
    }

    async fn stop(mut self) -> Result<()> {
        self.client.remove_everything().await.context("removing containerd's pods")?;
        self.daemon.stop().await
    }
}

/// The program and the directories that runtimes mount on. By itself it waits, as a sandbox's image has to.
fn pump_image(pump: &Path, others: &[&str]) -> Result<Image> {
    let program = fs::read(pump).with_context(|| format!("reading {}", pump.display()))?;
    let mut layer = Layer::new();
    for (directory, mode) in
        [("dev", 0o755), ("etc", 0o755), ("proc", 0o755), ("run", 0o755), ("sys", 0o755), ("tmp", 0o1777)]
    {
        layer = layer.directory(directory, mode)?;
    }
    let layer = with_libraries(layer.file("pump", 0o755, &program)?, others)?;
    Image::new(vec![(layer, Encoding::Gzip)], &json!({ "Entrypoint": ["/pump"], "Cmd": ["pause"] }))
}
