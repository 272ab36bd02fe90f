//! `target/dist/`: everything as it would be installed under `/`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, anyhow};
use clap::Args;

use crate::{initramfs, kernel, paths, process, tools, ui};

#[derive(Args)]
pub(crate) struct Options {
    /// Cargo profile of the host's binaries. `release` takes longer and is what a package should contain.
    #[arg(long, default_value = "quick")]
    pub(crate) profile: String,
    /// Where to lay it out [default: target/dist].
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
}

/// The packages and binaries that make up the host side.
const BINARIES: &[(&str, &str, &str)] = &[
    ("a3s-box", "a3s-box", "usr/bin"),
    ("a3s-box-cri-runtime", "a3s-box-cri-runtime", "usr/bin"),
    ("a3s-box-vmm-bin", "a3s-box-vmm", "usr/libexec/a3s-box"),
];

/// Builds what is missing and lays everything out; returns the layout's root.
pub(crate) fn build(options: &Options) -> Result<PathBuf> {
    build_with(options, &[])
}

/// The same; binaries of further packages are built along and stay in cargo's folder.
///
/// Kernel, agent and the host's binaries are built side by side: each of them has long stretches that keep one processor
/// busy (unpacking, linking), in which the others use the rest.
pub(crate) fn build_with(options: &Options, further: &[&str]) -> Result<PathBuf> {
    let root = options.out.clone().unwrap_or_else(|| paths::target().join("dist"));
    let (kernel, agent, binaries) = thread::scope(|scope| {
        let kernel = scope.spawn(|| kernel::ensure(&kernel::Options::default()));
        let agent = scope.spawn(initramfs::agent);
        ui::heading("binaries");
        let binaries = build_binaries(&options.profile, further);
        Ok::<_, anyhow::Error>((joined(kernel)?, joined(agent)?, binaries?))
    })?;

    // Assembled beside the old layout and swapped in whole: a daemon that starts meanwhile never sees half of one.
    let staging = paths::Staging::for_destination(root)?;
    let tree = staging.path().join("root");
    for (package, from) in BINARIES.iter().zip(&binaries) {
        let (_, name, folder) = package;
        install(from, &tree.join(folder).join(name), 0o755)?;
    }
    install(&kernel.vmlinux, &tree.join("usr/lib/a3s-box/vmlinux"), 0o644)?;
    initramfs::pack(&agent, &tree.join("usr/lib/a3s-box/initramfs.cpio"))?;
    let deploy = paths::repo().join("deploy");
    install(&deploy.join("config.toml"), &tree.join("etc/a3s-box/config.toml"), 0o644)?;
    install(&deploy.join("a3s-box.service"), &tree.join("usr/lib/systemd/system/a3s-box.service"), 0o644)?;
    staging.publish(&tree)
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| Err(anyhow!("a thread of the build panicked")))
}

/// One call of cargo for everything that runs on the host: each choice of packages has its own features of shared
/// dependencies, so that a second choice would compile most of them again. The demo is therefore built along; and with
/// `dev` the choice is everything, tests too, because what only tests depend on counts as well.
fn build_binaries(profile: &str, further: &[&str]) -> Result<Vec<PathBuf>> {
    let mut cargo = tools::cargo();
    cargo.args(["build", "--locked", "--profile", profile]);
    if profile == "dev" {
        cargo.args(["--workspace", "--all-targets"]);
    } else {
        cargo.arg("--bins");
        for (package, _, _) in BINARIES {
            cargo.args(["--package", package]);
        }
        for package in ["a3s-box-e2e"].iter().chain(further) {
            cargo.args(["--package", package]);
        }
    }
    process::run(&mut cargo).context("building the host's binaries")?;
    let folder = profile_folder(profile);
    Ok(BINARIES.iter().map(|(_, name, _)| folder.join(name)).collect())
}

/// Where cargo puts what it builds with a profile: the profile `dev` lives in `debug`.
pub(crate) fn profile_folder(profile: &str) -> PathBuf {
    paths::target().join(if profile == "dev" { "debug" } else { profile })
}

fn install(from: &Path, to: &Path, permissions: u32) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("installing {} as {}", from.display(), to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(permissions))
        .with_context(|| format!("setting the permissions of {}", to.display()))
}
