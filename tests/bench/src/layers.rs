//! The start of a container's file system with one EROFS file per layer under the overlay, and with one file of all
//! layers merged, in the same rounds: what the choice in docs/images.md was made by.
//!
//! The kernel of this machine mounts here; in a box it is the guest's, with the files behind virtio-fs.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use a3s_box_e2e::image::{Encoding, Image, Layer};
use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{Advice, fadvise};
use serde_json::json;

use crate::compare::{Mounts, private_mounts, pull, tool, write_layout};
use crate::debian;
use crate::samples::Samples;

/// Files that are read after the start, spread over the tree.
const READ: usize = 300;

/// A static program, the top layer of every image.
const PROGRAM: &[&str] = &["busybox-static"];

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where downloaded Debian packages are kept.
    #[arg(long)]
    packages: PathBuf,
    /// Runs of every candidate per image.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
}

/// The times of one start, each from its beginning.
struct Start {
    mounted: Duration,
    executed: Duration,
    read: Duration,
}

#[derive(Default)]
struct Series {
    mounted: Samples,
    executed: Samples,
    read: Samples,
}

impl Series {
    fn push(&mut self, start: &Start) {
        self.mounted.push(start.mounted);
        self.executed.push(start.executed);
        self.read.push(start.read);
    }
}

/// Call it before any other thread starts.
pub(crate) fn run(options: &Options) -> Result<()> {
    private_mounts()?;
    let mut images: Vec<(String, Vec<Layer>)> = Vec::new();
    for (name, layers) in debian::IMAGES.iter().filter(|(name, _)| *name != "small") {
        // The image of many files in one layer is taken apart: one layer has nothing to merge.
        let layers: Vec<&[&str]> = match layers {
            [only] => only.iter().map(std::slice::from_ref).collect(),
            layers => layers.to_vec(),
        };
        let layers = layers.into_iter().map(|packages| Ok(debian::layer(packages, &options.packages)?.0));
        images.push(((*name).to_owned(), layers.collect::<Result<_>>()?));
    }
    let small = |number: usize| Layer::new().file(&format!("etc/layer-{number}"), 0o644, b"x");
    images.push(("tiny layers".to_owned(), (0..63).map(small).collect::<Result<_>>()?));
    for (name, mut layers) in images {
        layers.push(debian::layer(PROGRAM, &options.packages)?.0);
        measure(&name, layers, options.rounds).with_context(|| format!("measuring {name}"))?;
    }
    Ok(())
}

fn measure(name: &str, layers: Vec<Layer>, rounds: u32) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("layers-").tempdir().context("creating a folder")?;
    let at = |name: &str| scratch.path().join(name);
    let files = convert(layers, &at("layers"))?;
    let (archive, paths) = merge(&files, &at("mounts"))?;
    let merged = convert(vec![Layer::from_archive(archive)], &at("merged"))?;
    println!(
        "\n{name}: {} layers of {} MB in all, the last of {} MB; merged {} MB; {rounds} round(s), {} files read",
        files.len(),
        megabytes(&files)?,
        megabytes(&files[files.len() - 1..])?,
        megabytes(&merged)?,
        paths.len()
    );
    for (label, cold) in [("from memory", false), ("from disk", true)] {
        let candidates = [&files, &merged];
        let mut series: [Series; 2] = Default::default();
        for round in 0..rounds as usize {
            for step in 0..2 {
                let index = (round + step) % 2;
                series[index].push(&start(candidates[index], &at("start"), &paths, cold)?);
            }
        }
        print(label, &series);
    }
    scratch.close().context("removing the folder of the measurement")
}

/// The EROFS files of an image of these layers.
fn convert(layers: Vec<Layer>, folder: &Path) -> Result<Vec<PathBuf>> {
    let layers = layers.into_iter().map(|layer| (layer, Encoding::Plain)).collect();
    let layout = folder.join("layout");
    write_layout(&layout, Image::new(layers, &json!({}))?)?;
    let files = pull(&folder.join("state"), &layout)?;
    fs::remove_dir_all(&layout).context("removing the layout")?;
    Ok(files)
}

/// The tar of what an overlay shows of the layers, and some of the files in it.
fn merge(files: &[PathBuf], folder: &Path) -> Result<(Vec<u8>, Vec<PathBuf>)> {
    let mut mounts = Mounts::new(folder);
    let root = mounts.overlay(files)?;
    let mut tar = Command::new("tar");
    tar.args(["--create", "--format=posix", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-C"]);
    let output = tar.arg(&root).arg(".").stderr(Stdio::inherit()).output().context("starting tar")?;
    if !output.status.success() {
        bail!("tar of {} ended with {}", root.display(), output.status);
    }
    let (mut all, mut todo) = (Vec::new(), vec![root.clone()]);
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_file() {
                all.push(entry.path().strip_prefix(&root)?.to_owned());
            }
        }
    }
    all.sort();
    let every = all.len().div_ceil(READ).max(1);
    Ok((output.stdout, all.into_iter().step_by(every).collect()))
}

fn megabytes(files: &[PathBuf]) -> Result<u64> {
    let mut blocks = 0;
    for file in files {
        blocks += fs::metadata(file)?.blocks();
    }
    Ok(blocks * 512 / 1_000_000)
}

/// Mounts the files, lowest first, with a writable directory above, runs a program in it, and reads.
fn start(files: &[PathBuf], folder: &Path, paths: &[PathBuf], cold: bool) -> Result<Start> {
    let (upper, work, root) = (folder.join("upper"), folder.join("work"), folder.join("root"));
    let lower: Vec<PathBuf> = (0..files.len()).map(|number| folder.join(number.to_string())).collect();
    for directory in lower.iter().chain([&upper, &work, &root]) {
        fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    if cold {
        for file in files {
            fadvise(File::open(file)?, 0, None, Advice::DontNeed).context("dropping a file's pages")?;
        }
    }
    let begun = Instant::now();
    for (file, target) in files.iter().zip(&lower) {
        mount(Some(file), target, Some("erofs"), MsFlags::MS_RDONLY, None::<&str>)
            .with_context(|| format!("mounting {}: a kernel since 6.12 is needed", file.display()))?;
    }
    let names: Vec<String> = lower.iter().rev().map(|path| path.display().to_string()).collect();
    let options =
        format!("lowerdir={},upperdir={},workdir={}", names.join(":"), upper.display(), work.display());
    mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .context("mounting the overlay")?;
    let mounted = begun.elapsed();
    tool(Command::new("chroot").arg(&root).args(["/bin/busybox", "true"]))?;
    let executed = begun.elapsed();
    let mut buffer = vec![0; 1 << 20];
    for path in paths {
        let mut file = File::open(root.join(path)).with_context(|| format!("opening {}", path.display()))?;
        while file.read(&mut buffer)? > 0 {}
    }
    let read = begun.elapsed();
    for target in [&root].into_iter().chain(&lower) {
        umount2(target, MntFlags::empty()).with_context(|| format!("unmounting {}", target.display()))?;
    }
    fs::remove_dir_all(folder).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })?;
    Ok(Start { mounted, executed, read })
}

fn print(label: &str, series: &[Series; 2]) {
    println!("{label:<14}{:>12}{:>12}{:>10}{:>14}", "layers ms", "merged ms", "noise", "layers/merged");
    let [layers, merged] = series;
    for (what, ours, its) in [
        ("mounted", &layers.mounted, &merged.mounted),
        ("program ran", &layers.executed, &merged.executed),
        ("files read", &layers.read, &merged.read),
    ] {
        println!(
            "  {what:<12}{:>12.2}{:>12.2}{:>10.2}{:>14.2}",
            ours.percentile(50),
            its.percentile(50),
            ours.noise(),
            ours.ratio_to(its)
        );
    }
}
