//! What containers may expect of the files of a volume beyond reading and writing them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use a3s_box_cri::proto::{
    ContainerConfig, LinuxContainerConfig, LinuxContainerSecurityContext, LinuxSandboxSecurityContext, Mount,
};
use a3s_box_e2e::processes::printed;
use anyhow::{Result, ensure};
use rustix::fs::getxattr;

use crate::bad_machine::broken;
use crate::suite::{Suite, exit_code, exit_code_within, launch, log_lines};

fn at(host: &Path, inside: &str) -> Vec<Mount> {
    vec![Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.to_owned(),
        ..Default::default()
    }]
}

/// Descriptors of a process of the box, at most.
const DESCRIPTORS: usize = 1024;
/// Three walks over all files: thousands of requests, each of which takes milliseconds where everything is emulated.
const WALKS: Duration = Duration::from_secs(120);
/// In folders of a hundred each.
const FILES: usize = 700;

/// A guest that has seen more files than its host may hold open is made to forget, and notices nothing.
pub(crate) async fn more_files_than_descriptors_are_walked(suite: &Suite) -> Result<()> {
    let (daemon, mut client) = broken(suite, "few-descriptors", suite.backend(), &[]).await?;
    let (pid, limit) = (format!("--pid={}", daemon.pid()), format!("--nofile={DESCRIPTORS}:{DESCRIPTORS}"));
    printed(Command::new("prlimit").args([pid, limit]))?;
    let many = suite.state().join("many");
    for number in 0..FILES {
        let within = many.join((number / 100).to_string());
        fs::create_dir_all(&within)?;
        fs::write(within.join(number.to_string()), number.to_string())?;
    }
    client.pull(suite.shell()).await?;
    let config = suite.pod("many")?;
    let pod = client.run_pod(&config).await?;
    // Twice, so that what was forgotten is looked up again; then with contents, which keep a file in mind.
    let script = "ls -lR /many | grep -c '^-'; ls -lR /many | grep -c '^-'; \
        find /many -type f -exec cat {} + | wc -c; touch /many/new && echo made";
    let container = ContainerConfig { mounts: at(&many, "/many"), ..suite.script("main", script) };
    let container = launch(&mut client, &pod, container, &config).await?;
    exit_code_within(WALKS, &client, &container).await?;
    let lines: Vec<String> = log_lines(&config, "main")?.into_iter().map(|line| line.2).collect();
    let bytes: usize = (0..FILES).map(|number| number.to_string().len()).sum();
    ensure!(lines == [&FILES.to_string(), &FILES.to_string(), &bytes.to_string(), "made"], "{lines:?}");
    ensure!(many.join("new").exists());
    client.remove_pod(&pod).await?;
    let status = daemon.stop().await?;
    ensure!(status.success(), "the daemon ended with {status}");
    fs::remove_dir_all(&many)?;
    Ok(())
}

/// An overlay keeps its state in attributes that only a host's administrator may set.
pub(crate) async fn an_overlay_keeps_its_state_on_a_volume(suite: &Suite) -> Result<()> {
    if suite.backend() == "libkrun" {
        println!("SKIPPED: libkrun's file server cannot leave a whiteout behind");
        return Ok(());
    }
    // A tmpfs: where the state is on an overlay itself, that cannot carry another one.
    let volume = tempfile::Builder::new().prefix("e2e-overlay-").tempdir_in("/dev/shm")?;
    let mut client = suite.client()?;
    let mut config = suite.pod("overlay")?;
    config.linux.get_or_insert_default().security_context =
        Some(LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
    let pod = client.run_pod(&config).await?;
    let script = "set -e; mkdir -p /v/low/hidden /v/up /v/work /m; echo old >/v/low/changed; echo x >/v/low/gone; \
        touch /v/low/hidden/old; mount='mount -t overlay o -o lowerdir=/v/low,upperdir=/v/up,workdir=/v/work /m'; \
        $mount; echo new >/m/changed; rm /m/gone; rm -r /m/hidden; mkdir /m/hidden; echo in >/m/hidden/new; \
        mv /m/changed /m/moved; umount /m; $mount; cd /m; find . | sort; cat moved hidden/new; cat /v/low/changed";
    let context = LinuxContainerSecurityContext { privileged: true, ..Default::default() };
    let linux = Some(LinuxContainerConfig { security_context: Some(context), ..Default::default() });
    let container =
        ContainerConfig { linux, mounts: at(volume.path(), "/v"), ..suite.script("main", script) };
    let container = launch(&mut client, &pod, container, &config).await?;
    let code = exit_code(&client, &container).await?;
    let lines: Vec<String> = log_lines(&config, "main")?.into_iter().map(|line| line.2).collect();
    let expected = [".", "./hidden", "./hidden/new", "./moved", "new", "in", "old"];
    ensure!(code == 0 && lines == expected, "{code}: {lines:?}");
    let mut opaque = [0; 8];
    let length =
        getxattr(volume.path().join("up/hidden"), "user.a3s-box.trusted.overlay.opaque", &mut opaque[..])?;
    ensure!(opaque[..length] == *b"y", "{opaque:?}");
    client.remove_pod(&pod).await?;
    Ok(())
}
