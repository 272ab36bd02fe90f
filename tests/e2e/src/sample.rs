//! The images that the demo and the suite run, made of Debian's statically linked busybox.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::image::{Encoding, Image, Layer};

const BUSYBOX: &str = "/bin/busybox";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n\
    app:x:1000:1000:app:/home/app:/bin/sh\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\napp:x:1000:\nextra:x:2000:app\n";

/// Debian's busybox, which needs no library.
pub fn busybox() -> Result<Vec<u8>> {
    fs::read(BUSYBOX).with_context(|| format!("reading {BUSYBOX} (Debian's busybox-static)"))
}

/// A layer with a shell, its tools and the usual directories.
pub fn busybox_layer() -> Result<Layer> {
    let program = busybox()?;
    let mut layer = Layer::new();
    for directory in
        ["bin", "dev", "etc", "home", "home/app", "proc", "root", "run", "sys", "usr", "usr/bin", "var"]
    {
        layer = layer.directory(directory, 0o755)?;
    }
    layer = layer.directory("tmp", 0o1777)?.file("bin/busybox", 0o755, &program)?;
    for applet in applets()? {
        if applet != "busybox" {
            layer = layer.hard_link(&format!("bin/{applet}"), "bin/busybox")?;
        }
    }
    layer.file("etc/passwd", 0o644, PASSWD.as_bytes())?.file("etc/group", 0o644, GROUP.as_bytes())
}

fn applets() -> Result<Vec<String>> {
    let output = Command::new(BUSYBOX).arg("--list").output().context("listing busybox's applets")?;
    if !output.status.success() {
        bail!("busybox --list ended with {}", output.status);
    }
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// The demo's image: greets, then waits to be stopped.
pub fn hello() -> Result<Image> {
    let greeting = Layer::new().directory("srv", 0o755)?.file(
        "srv/hello",
        0o755,
        b"#!/bin/sh\n\
          echo \"Hello from $(hostname): kernel $(uname -r), $(nproc) cpu(s), pid $$\"\n\
          trap 'echo stopped by SIGTERM; exit 0' TERM\n\
          while :; do sleep 1 & wait $!; done\n",
    )?;
    Image::new(
        vec![(busybox_layer()?, Encoding::Gzip), (greeting, Encoding::Gzip)],
        &json!({ "Cmd": ["/srv/hello"], "Env": ["PATH=/bin:/usr/bin"], "WorkingDir": "/" }),
    )
}

/// A shell that does what the container's command says.
pub fn shell() -> Result<Image> {
    Image::new(
        vec![(busybox_layer()?, Encoding::Gzip)],
        &json!({ "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["sleep 3600"], "Env": ["PATH=/bin:/usr/bin", "FROM_IMAGE=yes"] }),
    )
}

/// A shell, and the program of containers that share a volume as `neighbour`, with others of this machine.
pub fn with_neighbour(neighbour: &str, programs: &[&str]) -> Result<Image> {
    let programs = with_libraries(Layer::new(), &[&[neighbour], programs].concat())?;
    let name = Layer::new().symlink("bin/neighbour", neighbour)?;
    Image::new(
        vec![(busybox_layer()?, Encoding::Gzip), (programs, Encoding::Gzip), (name, Encoding::Gzip)],
        &json!({ "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["sleep 3600"], "Env": ["PATH=/bin:/usr/bin"] }),
    )
}

/// A shell, and programs of this machine with the libraries that they need.
pub fn with_programs(programs: &[&str]) -> Result<Image> {
    let programs = with_libraries(Layer::new(), programs)?;
    Image::new(
        vec![(busybox_layer()?, Encoding::Gzip), (programs, Encoding::Gzip)],
        &json!({ "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["sleep 3600"], "Env": ["PATH=/bin:/usr/bin"] }),
    )
}

/// Adds programs of this machine and the libraries that they need.
pub fn with_libraries(mut layer: Layer, programs: &[&str]) -> Result<Layer> {
    let mut files = BTreeSet::new();
    for program in programs {
        let output = Command::new("ldd").arg(program).output().context("starting ldd")?;
        if !output.status.success() {
            bail!("ldd {program} ended with {}", output.status);
        }
        files.insert((*program).to_owned());
        let text = String::from_utf8(output.stdout)?;
        files.extend(text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned));
    }
    let mut folders = BTreeSet::new();
    for file in &files {
        let ancestors: Vec<_> =
            Path::new(file).ancestors().skip(1).filter(|path| *path != Path::new("/")).collect();
        for folder in ancestors.into_iter().rev() {
            let folder = folder.to_string_lossy().trim_start_matches('/').to_owned();
            if folders.insert(folder.clone()) {
                layer = layer.directory(&folder, 0o755)?;
            }
        }
        let contents = fs::read(file).with_context(|| format!("reading {file}"))?;
        layer = layer.file(file.trim_start_matches('/'), 0o755, &contents)?;
    }
    Ok(layer)
}
