//! The fuzz targets, on stable Rust: the compiler's coverage pass is asked for directly, libFuzzer is linked as usual.

use std::fs;

use anyhow::{Context, Result, bail};

use super::{Done, Options};
use crate::{paths, process, tools};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What cargo-fuzz passes, less the sanitizers that only a nightly compiler accepts.
const FLAGS: &str = "--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions=on";

pub(super) fn run(options: &Options) -> Result<Done> {
    let targets = targets()?;
    let folder = paths::repo().join("fuzz");
    // The explicit target keeps the instrumentation away from build scripts.
    process::run(
        tools::cargo()
            .args(["build", "--release", "--bins", "--target", TARGET, "--manifest-path", "fuzz/Cargo.toml"])
            .arg("--target-dir")
            .arg(folder.join("target"))
            .env("RUSTFLAGS", FLAGS),
    )
    .context("building the fuzz targets")?;
    let seconds = (options.fuzz_seconds / targets.len() as u64).max(1);
    for target in &targets {
        let corpus = folder.join("corpus").join(target);
        let artifacts = folder.join("artifacts").join(target);
        for dir in [&corpus, &artifacts] {
            fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        let program = folder.join("target").join(TARGET).join("release").join(target);
        let log = paths::target().join(format!("fuzz-{target}.log"));
        process::logged(
            std::process::Command::new(program)
                .arg(format!("-max_total_time={seconds}"))
                .args(["-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1"])
                .arg(format!("-artifact_prefix={}/", artifacts.display()))
                .arg(&corpus),
            &log,
        )
        .with_context(|| format!("fuzz target {target}: the failing input is in {}", artifacts.display()))?;
    }
    Ok(Done::Passed(format!("{} for {seconds} s each", targets.join(", "))))
}

/// One target per file in fuzz/fuzz_targets.
fn targets() -> Result<Vec<String>> {
    let dir = paths::repo().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("listing {}", dir.display()))? {
        let path = entry.with_context(|| format!("listing {}", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(name) = path.file_stem()
        {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    if names.is_empty() {
        bail!("{} holds no fuzz target", dir.display());
    }
    names.sort();
    Ok(names)
}
