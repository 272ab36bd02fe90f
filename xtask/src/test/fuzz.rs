//! The fuzz targets, on stable Rust: the compiler's coverage pass is asked for directly, libFuzzer is linked as usual.

use std::num::NonZero;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs, iter, thread};

use anyhow::{Context as _, Result, anyhow, bail};

use super::{Context, Done};
use crate::{paths, process, tools};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What cargo-fuzz passes, less the sanitizers that only a nightly compiler accepts.
const FLAGS: &str = "--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions=on";

/// Targets of what strangers send to a port: they run at least as long as [`PROTOCOL_SECONDS`], however short the
/// others are.
const PROTOCOLS: &[&str] = &["channels", "spdy"];
const PROTOCOL_SECONDS: u64 = 60;

/// As many targets at once as there are processors, so that a second of each is one.
pub(super) fn run(context: &Context<'_>) -> Result<Done> {
    let options = context.options;
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
    let runs: Vec<(&str, u64)> =
        targets.iter().map(|target| (target.as_str(), seconds(target, options.fuzz_seconds))).collect();
    let next = AtomicUsize::new(0);
    let work = || -> Vec<Result<String>> {
        iter::from_fn(|| runs.get(next.fetch_add(1, Ordering::Relaxed)))
            .map(|(target, seconds)| {
                let inputs = fuzz(&folder, target, *seconds)?;
                Ok(format!("{target} {inputs} runs in {seconds} s"))
            })
            .collect()
    };
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let outcomes: Vec<Result<String>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..processors.min(runs.len())).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .flat_map(|worker| {
                worker.join().unwrap_or_else(|_| vec![Err(anyhow!("a fuzz run's thread panicked"))])
            })
            .collect()
    });
    let words: Vec<String> = outcomes.into_iter().collect::<Result<_>>()?;
    Ok(Done::Passed(words.join(", ")))
}

/// How long a target runs.
fn seconds(target: &str, given: u64) -> u64 {
    let least = if PROTOCOLS.contains(&target) { PROTOCOL_SECONDS } else { 1 };
    given.max(least)
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
    use super::{runs, seconds};

    #[test]
    fn the_protocols_get_their_minute() {
        let all = ["spdy", "channels", "reference"];
        assert_eq!(all.map(|target| seconds(target, 5)), [60, 60, 5]);
        assert_eq!(all.map(|target| seconds(target, 90)), [90, 90, 90]);
    }

    #[test]
    fn the_last_run_in_the_log_counts() {
        let log =
            "stat::number_of_executed_units: 7\nDone\nstat::number_of_executed_units: 42\nDone 42 runs\n";
        assert_eq!(runs(log), Some(42));
        assert_eq!(runs("killed"), None);
    }
}
