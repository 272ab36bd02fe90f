//! Debian's docker-registry on a free loopback port, and pushing to it.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::http::{Answer, request};
use crate::image::{Blob, Image, MANIFEST_TYPE};

const PROGRAM: &str = "docker-registry";
const START_LIMIT: Duration = Duration::from_secs(20);

/// A running registry; ends with this value.
pub struct Registry {
    child: Child,
    address: SocketAddr,
}

impl Registry {
    /// Starts a registry that keeps everything in `folder`.
    pub fn start(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let address = free_address()?;
        let config = folder.join("config.yml");
        fs::write(&config, configuration(folder, address))
            .with_context(|| format!("writing {}", config.display()))?;
        let log = folder.join("log");
        let output = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let child = Command::new(PROGRAM)
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Ctrl-C is for whoever started us; the registry is stopped in its turn.
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {PROGRAM} (Debian package docker-registry)"))?;
        let mut registry = Self { child, address };
        registry.wait_until_it_answers(&log)?;
        Ok(registry)
    }

    fn wait_until_it_answers(&mut self, log: &Path) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        while TcpStream::connect(self.address).is_err() {
            let ended = self.child.try_wait().context("watching the registry")?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(log).unwrap_or_default();
                bail!("{PROGRAM} did not come up on {}: {log}", self.address);
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// `127.0.0.1:PORT`, as it stands in image references.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Pushes an image and returns its reference.
    pub fn push(&self, repository: &str, tag: &str, image: &Image) -> Result<String> {
        for blob in &image.blobs {
            self.push_blob(repository, blob)
                .with_context(|| format!("pushing {} to {repository}", blob.digest))?;
        }
        let target = format!("/v2/{repository}/manifests/{tag}");
        let answer = request(self.address, "PUT", &target, MANIFEST_TYPE, &image.manifest.bytes)?;
        expect(&answer, 201, "pushing the manifest")?;
        Ok(format!("{}/{repository}:{tag}", self.address))
    }

    fn push_blob(&self, repository: &str, blob: &Blob) -> Result<()> {
        let target = format!("/v2/{repository}/blobs/uploads/");
        let opened = request(self.address, "POST", &target, "application/octet-stream", b"")?;
        expect(&opened, 202, "opening an upload")?;
        let location = opened.header("location").context("the registry named no place for the upload")?;
        let path =
            location.split_once("://").map_or(location, |(_, rest)| &rest[rest.find('/').unwrap_or(0)..]);
        let joint = if path.contains('?') { '&' } else { '?' };
        let target = format!("{path}{joint}digest={}", blob.digest);
        let stored = request(self.address, "PUT", &target, "application/octet-stream", &blob.bytes)?;
        expect(&stored, 201, "uploading")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn expect(answer: &Answer, status: u16, what: &str) -> Result<()> {
    if answer.status != status {
        bail!("{what}: the registry answered {}: {}", answer.status, String::from_utf8_lossy(&answer.body));
    }
    Ok(())
}

fn configuration(folder: &Path, address: SocketAddr) -> String {
    let storage: PathBuf = folder.join("storage");
    format!(
        "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\n\
         http:\n  addr: {address}\n",
        storage.display()
    )
}

/// A port that was free a moment ago: the registry cannot report one that it chose itself.
pub fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("looking for a free port")?;
    Ok(listener.local_addr()?)
}

/// Tells a daemon's `certs.d` that a registry speaks plain HTTP.
pub fn write_hosts_toml(certs_dir: &Path, host: &str) -> Result<()> {
    let folder = certs_dir.join(host);
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let text = format!(
        "server = \"http://{host}\"\n\n[host.\"http://{host}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
    );
    let file = folder.join("hosts.toml");
    fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
}
