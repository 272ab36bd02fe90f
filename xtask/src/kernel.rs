//! The guest kernel: Debian's source, our fragment, one uncompressed ELF that both VMMs load.
//!
//! Cached by content under the user's cache folder: the key is the digest of the fragment, of the exact version of
//! Debian's source package and of [`RECIPE`]. Which source version was taken for a fragment is recorded beside it, so
//! a built kernel is found again without asking Debian; `--refresh` asks.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::debian::{Package, Suite};
use crate::{digest, paths, process, ui};

/// Part of every key: raise it when the steps below change what comes out.
const RECIPE: &str = "1";

/// The first long-term series that mounts EROFS from a file without a loop device.
const SOURCE: &str = "linux-source-6.12";

/// Lines that `make vmlinux` prints with our fragment: the progress bar's length.
const EXPECTED_STEPS: u64 = 2_200;

#[derive(Args, Default)]
pub(crate) struct Options {
    /// Ask Debian for a newer source package even if a kernel for this configuration is cached.
    #[arg(long)]
    pub(crate) refresh: bool,
}

/// A finished kernel in the cache.
pub(crate) struct Kernel {
    /// Stripped ELF with a PVH entry point.
    pub(crate) vmlinux: PathBuf,
}

/// Finds the kernel of the current fragment in the cache, or builds it.
pub(crate) fn ensure(options: &Options) -> Result<Kernel> {
    let fragment_path = paths::repo().join("guest/kernel.config");
    let fragment =
        fs::read_to_string(&fragment_path).with_context(|| format!("reading {}", fragment_path.display()))?;
    let cache = paths::cache()?.join("kernel");
    let pointer = cache.join(format!("built-{}", digest::key(&[fragment.as_bytes(), RECIPE.as_bytes()])));
    if !options.refresh
        && let Some(entry) = paths::read_optional(&pointer)?
    {
        let kernel = Kernel { vmlinux: cache.join(entry.trim()).join("vmlinux") };
        if kernel.vmlinux.exists() {
            return Ok(kernel);
        }
    }

    ui::heading("guest kernel");
    let suite = Suite::trixie()?;
    let source = suite.candidate(SOURCE)?;
    let entry = entry_name(&fragment, &source);
    let dir = cache.join(&entry);
    if !dir.join("vmlinux").exists() {
        build(&suite, &source, &fragment, &dir)?;
    }
    paths::write_atomic(&pointer, format!("{entry}\n").as_bytes())?;
    Ok(Kernel { vmlinux: dir.join("vmlinux") })
}

fn entry_name(fragment: &str, source: &Package) -> String {
    let key = digest::key(&[fragment.as_bytes(), source.version.as_bytes(), RECIPE.as_bytes()]);
    format!("{}-{key}", source.version)
}

fn build(suite: &Suite, source: &Package, fragment: &str, destination: &Path) -> Result<()> {
    let started = Instant::now();
    let staging = paths::Staging::for_destination(destination.to_path_buf())?;
    ui::note(&format!(
        "{} {} with guest/kernel.config, once; kept in {}",
        source.name,
        source.version,
        destination.display()
    ));
    suite.unpack(source, staging.path())?;
    let log = staging.path().join("build.log");
    let tree = unpack_source(staging.path(), &log)?;
    configure(&tree, fragment, &log)?;
    compile(&tree, &log)?;

    let finished = staging.path().join("finished");
    fs::create_dir(&finished).with_context(|| format!("creating {}", finished.display()))?;
    let vmlinux = finished.join("vmlinux");
    process::logged(
        process::command("strip", ["-o".as_ref(), vmlinux.as_os_str(), tree.join("vmlinux").as_os_str()])
            .current_dir(&tree),
        &log,
    )?;
    for (from, to) in [(tree.join(".config"), "config"), (log, "build.log")] {
        fs::copy(&from, finished.join(to)).with_context(|| format!("keeping {}", from.display()))?;
    }
    staging.publish(&finished)?;
    ui::note(&format!("built in {}", ui::time(started.elapsed())));
    Ok(())
}

fn unpack_source(staging: &Path, log: &Path) -> Result<PathBuf> {
    ui::note("unpacking the source");
    let archive = staging.join(format!("usr/src/{SOURCE}.tar.xz"));
    process::logged(
        process::command("tar", ["-xf".as_ref(), archive.as_os_str()]).current_dir(staging),
        log,
    )?;
    Ok(staging.join(SOURCE))
}

/// tinyconfig, our fragment on top, everything else at its default; then checks that we got what we asked for.
fn configure(tree: &Path, fragment: &str, log: &Path) -> Result<()> {
    let ours = tree.join("a3s-box.config");
    fs::write(&ours, fragment).with_context(|| format!("writing {}", ours.display()))?;
    process::logged(process::command("make", ["tinyconfig"]).current_dir(tree), log)?;
    process::logged(
        process::command("scripts/kconfig/merge_config.sh", ["-m", ".config", "a3s-box.config"])
            .current_dir(tree),
        log,
    )?;
    process::logged(process::command("make", ["olddefconfig"]).current_dir(tree), log)?;
    let config =
        fs::read_to_string(tree.join(".config")).context("reading the kernel's final configuration")?;
    let lost = lost_options(fragment, &config);
    if !lost.is_empty() {
        bail!(
            "Kconfig did not accept these lines of guest/kernel.config (a dependency is missing, or the name changed):\n  {}",
            lost.join("\n  ")
        );
    }
    Ok(())
}

/// The fragment's lines that the final configuration does not honour.
fn lost_options<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let set: std::collections::HashMap<&str, &str> =
        config.lines().filter_map(|line| line.split_once('=')).collect();
    fragment
        .lines()
        .filter(|line| line.starts_with("CONFIG_"))
        .filter(|line| match line.split_once('=') {
            Some((name, "n")) => set.contains_key(name),
            Some((name, value)) => set.get(name) != Some(&value),
            None => true,
        })
        .collect()
}

fn compile(tree: &Path, log: &Path) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    ui::note(&format!("compiling with {jobs} job(s)"));
    let mut counter = ui::Counter::new("objects", EXPECTED_STEPS);
    let built = process::watched(
        process::command("make", [format!("-j{jobs}"), "vmlinux".to_owned()])
            .current_dir(tree)
            .env("KBUILD_BUILD_USER", "a3s-box")
            .env("KBUILD_BUILD_HOST", "a3s-box")
            .env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
        log,
        |_| counter.step(),
    );
    counter.finish();
    built
}

#[cfg(test)]
mod tests {
    use super::lost_options;

    #[test]
    fn an_option_that_kconfig_dropped_or_forced_is_reported() {
        let fragment = "# words\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=64\nCONFIG_D=n\n";
        let config = "CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=8\n# CONFIG_D is not set\n";
        assert_eq!(lost_options(fragment, config), ["CONFIG_B=n", "CONFIG_C=64"]);
    }
}
