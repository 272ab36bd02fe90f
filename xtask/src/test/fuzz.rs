//! The fuzz targets, on stable Rust: the compiler's coverage pass is asked for directly, libFuzzer is linked as usual.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail};

use super::{Done, Options};
use crate::{paths, process, tools};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What cargo-fuzz passes, less the sanitizers that only a nightly compiler accepts.
const FLAGS: &str = "--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions=on";

/// All targets at once, each for the whole time: they need a core each and share nothing.
pub(super) fn run(options: &Options) -> Result<Done> {
    let targets = targets()?;
    let folder = paths::repo().join("fuzz");
    // The explicit target keeps the instrumentation away from build scripts.
    process::run(
        tools::cargo()
            .args([
                "build",
                "--release",
                "--locked",
                "--bins",
                "--target",
                TARGET,
                "--manifest-path",
                "fuzz/Cargo.toml",
            ])
            .arg("--target-dir")
            .arg(folder.join("target"))
            .env("RUSTFLAGS", FLAGS),
    )
    .context("building the fuzz targets")?;
    let seconds = options.fuzz_seconds.max(1);
    let outcomes: Vec<Result<u64>> = thread::scope(|scope| {
        let running: Vec<_> =
            targets.iter().map(|target| scope.spawn(|| fuzz(&folder, target, seconds))).collect();
        running
            .into_iter()
            .map(|run| run.join().unwrap_or_else(|_| bail!("a fuzz run's thread panicked")))
            .collect()
    });
    let mut words = Vec::new();
    for (target, outcome) in targets.iter().zip(outcomes) {
        words.push(format!("{target} {} runs", outcome?));
    }
    Ok(Done::Passed(format!("{seconds} s each: {}", words.join(", "))))
}

/// Runs one target from its seeds and what earlier runs found; the number of inputs it tried.
fn fuzz(folder: &Path, target: &str, seconds: u64) -> Result<u64> {
    let corpus = folder.join("corpus").join(target);
    let artifacts = folder.join("artifacts").join(target);
    for dir in [&corpus, &artifacts] {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    let mut program = Command::new(folder.join("target").join(TARGET).join("release").join(target));
    program
        .arg(format!("-max_total_time={seconds}"))
        .args(["-timeout=10", "-rss_limit_mb=2048", "-max_len=32768", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(&corpus);
    let seeds = folder.join("seeds").join(target);
    if seeds.exists() {
        program.arg(seeds);
    }
    let log = paths::target().join(format!("fuzz-{target}.log"));
    process::logged(&mut program, &log)
        .with_context(|| format!("fuzz target {target}: the failing input is in {}", artifacts.display()))?;
    let text = fs::read_to_string(&log).with_context(|| format!("reading {}", log.display()))?;
    runs(&text).with_context(|| format!("{} does not say how many inputs were tried", log.display()))
}

/// From libFuzzer's final statistics; the log may hold earlier runs before the last one.
fn runs(log: &str) -> Option<u64> {
    log.lines()
        .rev()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?
        .trim()
        .parse()
        .ok()
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

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn the_last_run_in_the_log_counts() {
        let log =
            "stat::number_of_executed_units: 7\nDone\nstat::number_of_executed_units: 42\nDone 42 runs\n";
        assert_eq!(runs(log), Some(42));
        assert_eq!(runs("killed"), None);
    }
}
