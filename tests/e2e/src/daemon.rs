//! A daemon of our own: its whole state in one folder, stopped and looked after.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Client;
use crate::layout::Layout;
use crate::{network, wait};

/// The trial boot of `backend = "auto"` is part of the start.
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// A path in a socket address has room for 107 bytes.
const SOCKET_PATH_MAX: usize = 107;

/// Where and how a daemon runs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Everything it writes lies below this folder.
    pub state: PathBuf,
    /// auto, qemu or libkrun.
    pub backend: String,
    /// Pod addresses.
    pub subnet: String,
    /// Further settings, as key and value, on top of the file.
    pub extra: Vec<(String, String)>,
}

impl Settings {
    /// Registries' `hosts.toml` go here.
    pub fn certs_dir(&self) -> PathBuf {
        self.state.join("certs.d")
    }

    /// Pods' log directories go here.
    pub fn logs(&self) -> PathBuf {
        self.state.join("logs")
    }

    fn run_dir(&self) -> PathBuf {
        self.state.join("run")
    }

    fn write_configuration(&self) -> Result<PathBuf> {
        fs::create_dir_all(&self.state).with_context(|| format!("creating {}", self.state.display()))?;
        let conf = network::write_configuration(&self.state.join("cni"), "a3s-box-e2e", &self.subnet)?;
        let text = format!(
            "root = {:?}\nrun_dir = {:?}\n[log]\nlevel = \"info,a3s_box_runtime=debug,a3s_box_vmm=debug\"\n\
             [vmm]\nbackend = {:?}\n[network]\nconf_dir = {conf:?}\nbin_dirs = [{:?}]\n[images]\ncerts_dirs = [{:?}]\n",
            self.state.join("root"),
            self.run_dir(),
            self.backend,
            network::PLUGINS,
            self.certs_dir(),
        );
        let file = self.state.join("config.toml");
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }
}

/// A running daemon. Dropping it kills the process but leaves its pods: [`Daemon::stop`] is the way to end.
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts the layout's daemon and waits until it answers on its socket.
    pub async fn start(layout: &Layout, settings: &Settings) -> Result<(Self, Client)> {
        let config = settings.write_configuration()?;
        let socket = settings.run_dir().join("a3s-box.sock");
        if socket.as_os_str().len() > SOCKET_PATH_MAX {
            bail!("{} is too long for a socket: put the state folder nearer to the root", socket.display());
        }
        let log = settings.state.join("daemon.log");
        let output = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        let mut command = Command::new(layout.daemon());
        // The environment overrides the file, and this program's own may speak of backends.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("A3S_BOX_") {
                command.env_remove(name);
            }
        }
        let child = command
            .env_remove("CRI_SOCKET_PATH")
            .arg("--config")
            .arg(config)
            .args(settings.extra.iter().map(|(key, value)| format!("--set={key}={value}")))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Ctrl-C is for whoever started us: pods are removed first, then the daemon is stopped.
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {}", layout.daemon().display()))?;
        let mut daemon = Self { child, socket, log };
        let client = daemon.ready().await?;
        Ok((daemon, client))
    }

    async fn ready(&mut self) -> Result<Client> {
        let (child, socket, log) = (&mut self.child, &self.socket, &self.log);
        wait::until("the daemon's first answer", START_LIMIT, move || {
            let ended = child.try_wait();
            let (socket, log) = (socket.clone(), log.clone());
            async move {
                if let Some(status) = ended? {
                    bail!("the daemon ended with {status}; its log:\n{}", tail(&log));
                }
                let Ok(mut client) = Client::connect(&socket).await else { return Ok(None) };
                Ok(client.version().await.is_ok().then_some(client))
            }
        })
        .await
        .with_context(|| format!("the daemon's log:\n{}", tail(&self.log)))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    /// Asks it to end and waits for that.
    pub async fn stop(mut self) -> Result<ExitStatus> {
        let pid = i32::try_from(self.child.id()).context("process ids are positive")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).context("asking the daemon to stop")?;
        let child = &mut self.child;
        wait::until("the daemon's end", STOP_LIMIT, move || {
            let ended = child.try_wait();
            async move { Ok(ended?) }
        })
        .await
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already reaped after `stop`; otherwise a failure brought us here and only the end matters.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The last lines of a log.
pub fn tail(path: &Path) -> String {
    const LINES: usize = 25;
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
