//! The tree that the kernel shows of an image's EROFS layers under an overlay, compared with what `umoci unpack` makes of
//! the same image.
//!
//! Everything runs in a mount namespace of its own, so that mounts and loop devices go with the program.

mod curious;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};
use a3s_box_e2e::image::{Encoding, Image, MANIFEST_TYPE};
use a3s_box_image::{ImageStore, ImageStoreConfig};
use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use crate::debian;

/// How many differences of an image are printed.
const SHOWN: usize = 20;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where downloaded Debian packages are kept.
    #[arg(long)]
    packages: PathBuf,
    /// Leave out the image of more than 600 MB; the result says so.
    #[arg(long)]
    without_large: bool,
}

/// Compares all images; an error if any file differs. Call it before any other thread starts.
pub(crate) fn run(options: &Options) -> Result<()> {
    private_mounts()?;
    let (mut words, mut differing) = (Vec::new(), 0);
    for (name, layers) in debian::IMAGES {
        if *name == "large" && options.without_large {
            words.push("large left out as asked".to_owned());
            continue;
        }
        let encodings: &[Encoding] = match *name {
            "small" => &[Encoding::Gzip],
            "files" => &[Encoding::Plain],
            // Not zstd, which the umoci of Debian 12 refuses.
            _ => &[Encoding::Gzip, Encoding::Plain],
        };
        let made = debian::make(layers, encodings, &options.packages)?;
        differing += compare(name, made.image, &mut words)?;
    }
    differing += compare("curious", curious::image(&options.packages)?, &mut words)?;
    println!("compared: {}", words.join("; "));
    if differing > 0 {
        bail!("{differing} differences from what umoci unpacks");
    }
    Ok(())
}

/// Gives this program mounts of its own. No other thread may run yet.
pub(crate) fn private_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace needs root")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)
        .context("making the mounts private")
}

/// Returns the number of differences and adds the image's line to `words`.
fn compare(name: &str, image: Image, words: &mut Vec<String>) -> Result<usize> {
    let started = Instant::now();
    let scratch = tempfile::Builder::new().prefix("compare-").tempdir().context("creating a folder")?;
    let layout = scratch.path().join("layout");
    write_layout(&layout, image)?;
    let bundle = scratch.path().join("bundle");
    tool(
        Command::new("umoci")
            .args(["unpack", "--image"])
            .arg(format!("{}:test", layout.display()))
            .arg(&bundle),
    )?;
    let layers = pull(&scratch.path().join("state"), &layout)?;
    for layer in &layers {
        tool(Command::new("fsck.erofs").arg(layer))?;
    }
    let mut mounts = Mounts::new(&scratch.path().join("mounts"));
    let merged = mounts.overlay(&layers)?;
    let result = tree::compare(&bundle.join("rootfs"), &merged)?;
    for difference in result.differences.iter().take(SHOWN) {
        println!("{name}: {difference}");
    }
    let line = format!(
        "{name} ({} layers): {} entries, {} MB, {} differences",
        layers.len(),
        result.entries,
        result.bytes / 1_000_000,
        result.differences.len(),
    );
    println!("{line}, {:.1} s", started.elapsed().as_secs_f64());
    words.push(line);
    drop(mounts);
    scratch.close().context("removing the folder of the comparison")?;
    Ok(result.differences.len())
}

/// Writes an OCI layout with the image as `test`.
pub(crate) fn write_layout(path: &Path, image: Image) -> Result<()> {
    let blobs = path.join("blobs/sha256");
    fs::create_dir_all(&blobs).with_context(|| format!("creating {}", blobs.display()))?;
    let manifest = json!({
        "mediaType": MANIFEST_TYPE,
        "digest": image.manifest.digest,
        "size": image.manifest.bytes.len(),
        "annotations": { "org.opencontainers.image.ref.name": "test" },
    });
    for blob in image.blobs.into_iter().chain([image.manifest]) {
        let hex = blob.digest.strip_prefix("sha256:").context("a blob without a sha256 digest")?;
        fs::write(blobs.join(hex), &blob.bytes).with_context(|| format!("writing blob {hex}"))?;
    }
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(path.join("index.json"), index.to_string()).context("writing index.json")?;
    fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).context("writing oci-layout")
}

/// The EROFS files of the layout's image, lowest first.
pub(crate) fn pull(state: &Path, layout: &Path) -> Result<Vec<PathBuf>> {
    let runtime = tokio::runtime::Runtime::new().context("starting the async runtime")?;
    let store = ImageStore::open(ImageStoreConfig::new(state), Arc::new(Forgetful))?;
    let reference = format!("oci:{}:test", layout.display());
    runtime.block_on(store.pull(&reference, None, None))?;
    Ok(store.resolve(&reference)?.layers.into_iter().map(|layer| layer.erofs).collect())
}

/// Records that nobody reads again.
struct Forgetful;

impl Storage for Forgetful {
    fn get(&self, _: Table, _: &str) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(None)
    }

    fn scan(&self, _: Table) -> Result<Vec<Record>, StorageError> {
        Ok(Vec::new())
    }

    fn commit(&self, _: Vec<Change>) -> Result<(), StorageError> {
        Ok(())
    }
}

/// Mounts that go with this value; their loop devices go with them.
pub(crate) struct Mounts {
    root: PathBuf,
    made: Vec<PathBuf>,
}

impl Mounts {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), made: Vec::new() }
    }

    fn add(&mut self, name: &str, kind: &str, options: &str, source: &Path) -> Result<PathBuf> {
        let target = self.root.join(name);
        fs::create_dir_all(&target).with_context(|| format!("creating {}", target.display()))?;
        tool(Command::new("mount").args(["-t", kind, "-o", options]).arg(source).arg(&target))?;
        self.made.push(target.clone());
        Ok(target)
    }

    /// The layers, lowest first, as a container would see them.
    pub(crate) fn overlay(&mut self, layers: &[PathBuf]) -> Result<PathBuf> {
        let mut lower = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            lower.insert(0, self.add(&number.to_string(), "erofs", "loop,ro", layer)?.display().to_string());
        }
        if let [only] = &lower[..] {
            // An overlay wants two directories.
            return Ok(PathBuf::from(only));
        }
        self.add("merged", "overlay", &format!("lowerdir={}", lower.join(":")), Path::new("overlay"))
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for target in self.made.iter().rev() {
            if let Err(error) = umount2(target, MntFlags::empty()) {
                eprintln!("unmounting {}: {error}", target.display());
            }
        }
    }
}

/// Runs a tool that has to be there and to succeed.
pub(crate) fn tool(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
