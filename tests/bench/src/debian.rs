//! Images made of Debian packages, which the machine's own apt downloads once.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use a3s_box_e2e::image::{Encoding, Image, Layer};
use anyhow::{Context, Result, bail};
use serde_json::json;

/// Names an image and, per layer, the packages in it.
pub(crate) const IMAGES: &[(&str, &[&[&str]])] = &[
    ("small", &[&["bash"]]),
    ("files", &[&["vim-runtime", "git", "perl-modules-5.36", "libpython3.11-stdlib", "iso-codes"]]),
    (
        "large",
        &[
            &["libllvm14"],
            &["libllvm15"],
            &["openjdk-17-jre-headless"],
            &["cpp-12"],
            &["gcc-12"],
            &["g++-12"],
            &["libwebkit2gtk-4.0-37"],
            &["git", "vim-runtime"],
        ],
    ),
];

/// An image with what there is to know about its size.
pub(crate) struct Made {
    pub(crate) image: Image,
    /// Content of its regular files.
    pub(crate) bytes: u64,
    /// Entries in its layers.
    pub(crate) entries: u64,
}

/// Makes an image; `cache` keeps the packages. The layers take the encodings in turn.
pub(crate) fn make(layers: &[&[&str]], encodings: &[Encoding], cache: &Path) -> Result<Made> {
    let (mut made, mut bytes, mut entries) = (Vec::new(), 0, 0);
    for (packages, encoding) in layers.iter().zip(encodings.iter().cycle()) {
        let (layer, size, count) = layer(packages, cache)?;
        bytes += size;
        entries += count;
        made.push((layer, *encoding));
    }
    Ok(Made { image: Image::new(made, &json!({ "Cmd": ["/bin/bash"] }))?, bytes, entries })
}

/// One layer of packages, with the bytes of its files and the number of its entries.
pub(crate) fn layer(packages: &[&str], cache: &Path) -> Result<(Layer, u64, u64)> {
    let (mut bytes, mut entries) = (0, 0);
    let (mut layer, mut seen) = (Layer::new(), BTreeSet::new());
    for package in packages {
        let file = download(package, cache)?;
        let mut unpack = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&file)
            .stdout(Stdio::piped())
            .spawn()
            .context("starting dpkg-deb")?;
        let output = unpack.stdout.take().context("dpkg-deb's output")?;
        for entry in tar::Archive::new(output).entries()? {
            let mut entry = entry?;
            let path = entry.path()?.to_string_lossy().into_owned();
            let path = path.trim_start_matches("./").trim_end_matches('/').to_owned();
            if path.is_empty() || !seen.insert(path.clone()) {
                continue;
            }
            let mode = entry.header().mode()?;
            let target = entry.link_name()?.map(|name| name.to_string_lossy().into_owned());
            let kind = entry.header().entry_type();
            layer = match (kind, target) {
                (tar::EntryType::Directory, _) => layer.directory(&path, mode)?,
                (tar::EntryType::Symlink, Some(target)) => layer.symlink(&path, &target)?,
                (tar::EntryType::Link, Some(target)) => {
                    layer.hard_link(&path, target.trim_start_matches("./"))?
                }
                (tar::EntryType::Regular, _) => {
                    let mut content = Vec::new();
                    entry.read_to_end(&mut content)?;
                    bytes += content.len() as u64;
                    layer.file(&path, mode, &content)?
                }
                (kind, _) => bail!("{package} has {path} of type {kind:?}"),
            };
            entries += 1;
        }
        let status = unpack.wait()?;
        if !status.success() {
            bail!("dpkg-deb on {} ended with {status}", file.display());
        }
    }
    Ok((layer, bytes, entries))
}

/// The package's file, from the cache where it is there.
fn download(package: &str, cache: &Path) -> Result<PathBuf> {
    if let Some(file) = cached(package, cache)? {
        return Ok(file);
    }
    fs::create_dir_all(cache).with_context(|| format!("creating {}", cache.display()))?;
    let status = Command::new("apt-get")
        .args(["-qq", "download", package])
        .current_dir(cache)
        .status()
        .context("starting apt-get")?;
    if !status.success() {
        bail!(
            "apt-get download {package} ended with {status}: does the machine's apt know Debian 12's packages?"
        );
    }
    cached(package, cache)?.with_context(|| format!("apt-get downloaded no file for {package}"))
}

fn cached(package: &str, cache: &Path) -> Result<Option<PathBuf>> {
    if !cache.exists() {
        return Ok(None);
    }
    let prefix = format!("{package}_");
    for entry in fs::read_dir(cache)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(&prefix) && name.ends_with(".deb") {
            return Ok(Some(path));
        }
    }
    Ok(None)
}
