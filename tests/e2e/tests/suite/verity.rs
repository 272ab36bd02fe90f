//! Layers that are sealed with fs-verity.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Output;

use a3s_box_e2e::image::{Encoding, Image, Layer};
use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{UnmountFlags, unmount};
use serde_json::json;
use tokio::process::Command;

use crate::bad_machine::mount_file;
use crate::suite::Suite;

/// The kernel says what its ext4 can do.
const FEATURE: &str = "/sys/fs/ext4/features/verity";
const DISK: u64 = 32 << 20;
/// What the layer's file is full of.
const MARK: &[u8] = b"sealed by the kernel, whoever writes below it\n";

/// Of the smallest file systems.
const BLOCK: usize = 1024;

/// A file system that can seal, in a file.
struct Disk {
    file: PathBuf,
    mounted: PathBuf,
}

impl Disk {
    async fn make(folder: &Path) -> Result<Self> {
        let disk = Self { file: folder.join("disk"), mounted: folder.join("mounted") };
        fs::create_dir_all(&disk.mounted)?;
        File::create(&disk.file)?.set_len(DISK)?;
        command("mkfs.ext4", &["-q", "-O", "verity"], &[&disk.file]).await?;
        mount_file(&disk.file, &disk.mounted)?;
        Ok(disk)
    }

    fn unmount(&self) -> Result<()> {
        unmount(&self.mounted, UnmountFlags::empty()).context("unmounting the disk")
    }

    /// Changes the layer on the disk, behind the file system's back. What former files left there changes too.
    async fn corrupt(&self) -> Result<()> {
        self.unmount()?;
        let mut bytes = fs::read(&self.file)?;
        let mut changed = false;
        // A file's first byte lies where a block begins.
        for block in bytes.chunks_mut(BLOCK).filter(|block| block.starts_with(MARK)) {
            block[0] = b'S';
            changed = true;
        }
        ensure!(changed, "the layer's bytes are not on the disk");
        fs::write(&self.file, bytes)?;
        mount_file(&self.file, &self.mounted)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Only a failed scenario leaves it mounted.
        let _ = self.unmount();
    }
}

/// What it prints.
async fn command(program: &str, options: &[&str], paths: &[&Path]) -> Result<String> {
    let done = Command::new(program).args(options).args(paths).kill_on_drop(true).output().await;
    let done = done.with_context(|| format!("starting {program}"))?;
    if !done.status.success() {
        bail!("{program} {options:?} {paths:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
    Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
}

async fn a3s_box(suite: &Suite, disk: &Disk, arguments: &[&str]) -> Result<(Output, String)> {
    let mut command = Command::new(suite.layout().cli());
    command.arg("--config").arg(suite.state().join("config.toml"));
    command
        .arg("--root")
        .arg(disk.mounted.join("root"))
        .arg("--run-dir")
        .arg(suite.state().join("verity-run"));
    command.args(["--set", "images.fs_verity=true"]).args(arguments).kill_on_drop(true);
    let output = command.output().await.context("starting a3s-box")?;
    let text = [output.stdout.as_slice(), &output.stderr].concat();
    Ok((output, String::from_utf8_lossy(&text).into_owned()))
}

pub(crate) async fn a_sealed_layer_cannot_change(suite: &Suite) -> Result<()> {
    if !Path::new(FEATURE).exists() {
        println!("SKIPPED: this kernel's ext4 has no fs-verity ({FEATURE})");
        return Ok(());
    }
    let layer = Layer::new().file("sealed", 0o644, &MARK.repeat(2000))?;
    let image = Image::new(vec![(layer, Encoding::Gzip)], &json!({ "Cmd": ["/sealed"] }))?;
    let name = suite.registry().push("e2e/sealed", "1", &image)?;
    let folder = suite.state().join("verity");
    fs::create_dir_all(&folder)?;
    let disk = Disk::make(&folder).await?;

    let (pulled, text) = a3s_box(suite, &disk, &["pull", &name]).await?;
    ensure!(pulled.status.success(), "{text}");
    let (good, text) = a3s_box(suite, &disk, &["images", "verify"]).await?;
    ensure!(good.status.success(), "{text}");
    let layers = find(&disk.mounted, "erofs")?;
    let [layer] = layers.as_slice() else { bail!("one layer: {layers:?}") };
    let refused =
        File::options().write(true).open(layer).err().context("a sealed file was opened to write")?;
    ensure!(refused.kind() == std::io::ErrorKind::PermissionDenied, "{refused}");

    // The same bytes in another file are not what was sealed.
    let copy = layer.with_extension("copy");
    fs::copy(layer, &copy)?;
    fs::rename(&copy, layer)?;
    let (run, text) = a3s_box(suite, &disk, &["run", &name]).await?;
    ensure!(!run.status.success() && text.contains("fs-verity digest is missing"), "{text}");
    let (bad, text) = a3s_box(suite, &disk, &["images", "verify"]).await?;
    ensure!(bad.status.code() == Some(1) && text.contains("fs-verity digest is missing"), "{text}");
    let (repaired, text) = a3s_box(suite, &disk, &["images", "verify", "--repair"]).await?;
    ensure!(repaired.status.success(), "{text}");

    disk.corrupt().await?;
    let (bad, text) = a3s_box(suite, &disk, &["images", "verify"]).await?;
    ensure!(bad.status.code() == Some(1) && text.contains("cannot be read"), "{text}");
    let (repaired, text) = a3s_box(suite, &disk, &["images", "verify", "--repair"]).await?;
    ensure!(repaired.status.success(), "{text}");
    disk.unmount()
}

fn find(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(find(&path, extension)?);
        } else if path.extension().is_some_and(|other| other == extension) {
            found.push(path);
        }
    }
    Ok(found)
}
