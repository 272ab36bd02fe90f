//! Debian's containerd with its whole state in one folder.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use a3s_box_e2e::client::Client;
use a3s_box_e2e::daemon::tail;
use a3s_box_e2e::network::{self, PLUGINS};
use a3s_box_e2e::wait;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Of its pods' addresses.
const SUBNET: &str = "10.213.84.0/24";

const LIMIT: Duration = Duration::from_secs(30);

/// A running containerd; [`Containerd::stop`] is the way to end it.
pub(crate) struct Containerd {
    child: Child,
}

impl Containerd {
    /// Starts one that reads `certs_dir` for its registries. Without an image for their sandboxes it runs no pods.
    pub(crate) async fn start(
        folder: &Path,
        certs_dir: &Path,
        sandbox_image: Option<&str>,
    ) -> Result<(Self, Client)> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let socket = folder.join("c.sock");
        let conf = network::write_configuration(&folder.join("cni"), "a3s-box-bench-peer", SUBNET)?;
        let config = folder.join("config.toml");
        // Not every root may lower a process's OOM score.
        let pods = sandbox_image.map_or(String::new(), |image| {
            format!(
                "[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = {image:?}\nrestrict_oom_score_adj = true\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
                 runtime_type = \"io.containerd.runc.v2\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\nRoot = {:?}\n",
                folder.join("runc"),
            )
        });
        let text = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n[grpc]\naddress = {socket:?}\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"overlayfs\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nconf_dir = {conf:?}\nbin_dir = {PLUGINS:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = {certs_dir:?}\n{pods}",
            folder.join("root"),
            folder.join("state"),
            folder.join("opt"),
        );
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let log = folder.join("log");
        let output = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let child = Command::new("containerd")
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .context("starting containerd (Debian package containerd)")?;
        let mut containerd = Self { child };
        let process = &mut containerd.child;
        let client = wait::until("containerd's first answer", LIMIT, move || {
            let ended = process.try_wait();
            let socket = socket.clone();
            async move {
                if let Some(status) = ended? {
                    bail!("containerd ended with {status}");
                }
                let Ok(mut client) = Client::connect(&socket).await else { return Ok(None) };
                Ok(client.version().await.is_ok().then_some(client))
            }
        })
        .await
        .with_context(|| format!("containerd's log:\n{}", tail(&log)))?;
        Ok((containerd, client))
    }

    /// The end of its log.
    pub(crate) fn log_tail(folder: &Path) -> String {
        tail(&folder.join("log"))
    }

    /// Asks it to end and waits for that.
    pub(crate) async fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("process ids are positive")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).context("asking containerd to stop")?;
        let child = &mut self.child;
        wait::until("containerd's end", LIMIT, move || {
            let ended = child.try_wait();
            async move { Ok(ended?) }
        })
        .await
        .map(drop)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Already reaped after `stop`; otherwise a failure brought us here and only the end matters.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
