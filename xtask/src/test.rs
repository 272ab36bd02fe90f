//! `cargo xtask test`: every check there is, each stage named and timed, with a summary of what ran at the end.
//!
//! A failing stage does not stop the others. What a machine cannot run is skipped and the summary says why.

mod deny;
pub(crate) mod e2e;
mod fuzz;
mod umoci;

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{packages, paths, process, tools, ui};

#[derive(Args)]
pub(crate) struct Options {
    /// Run only these stages (see --list); may be repeated.
    #[arg(long)]
    only: Vec<String>,
    /// Print the names of the stages and end.
    #[arg(long)]
    list: bool,
    /// Seconds that each fuzz target gets; those of network protocols never less than a minute.
    #[arg(long, default_value_t = 20)]
    fuzz_seconds: u64,
    /// Compare an image of more than 700 MB with umoci, too.
    #[arg(long)]
    with_large_image: bool,
}

/// How a stage ended when it did not fail.
pub(crate) enum Done {
    /// With a word about what ran, for the summary.
    Passed(String),
    /// With the reason.
    Skipped(String),
}

type Action = fn(&Options) -> Result<Done>;

const STAGES: &[(&str, Action)] = &[
    ("format", format),
    ("clippy", clippy),
    ("deny", deny::policy),
    ("advisories", deny::advisories),
    ("unit", unit),
    ("doc", doc),
    ("fuzz", fuzz::run),
    ("umoci", umoci::run),
    ("e2e-qemu", e2e::qemu),
    ("e2e-libkrun", e2e::libkrun),
];

struct Report {
    name: &'static str,
    time: Duration,
    outcome: Result<Done>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        for (name, _) in STAGES {
            println!("{name}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(unknown) = options.only.iter().find(|only| !STAGES.iter().any(|(name, _)| name == *only)) {
        bail!("there is no stage {unknown}; `cargo xtask test --list` names them");
    }
    packages::ensure(packages::Set::Test)?;
    let started = Instant::now();
    let reports: Vec<Report> = STAGES
        .iter()
        .filter(|(name, _)| options.only.is_empty() || options.only.iter().any(|only| only == name))
        .map(|(name, action)| run_stage(name, *action, options))
        .collect();
    Ok(summarize(&reports, started.elapsed()))
}

fn run_stage(name: &'static str, action: Action, options: &Options) -> Report {
    ui::heading(&format!("stage {name}"));
    let started = Instant::now();
    let outcome = action(options);
    match &outcome {
        Ok(Done::Passed(_)) => {}
        Ok(Done::Skipped(reason)) => ui::note(&format!("skipped: {reason}")),
        Err(error) => ui::failure(error),
    }
    Report { name, time: started.elapsed(), outcome }
}

/// Prints the table and the closing line; the exit code says whether everything that could run passed.
fn summarize(reports: &[Report], total: Duration) -> ExitCode {
    println!("\n{}", ui::bold("summary"));
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for report in reports {
        let (word, words) = match &report.outcome {
            Ok(Done::Passed(words)) => {
                passed += 1;
                (ui::green("passed "), words.clone())
            }
            Ok(Done::Skipped(reason)) => {
                skipped += 1;
                (ui::yellow("skipped"), reason.clone())
            }
            Err(error) => {
                failed += 1;
                (ui::red("FAILED "), format!("{error:#}").lines().next().unwrap_or_default().to_owned())
            }
        };
        println!("  {:<12} {word} {:>8}  {words}", report.name, ui::time(report.time));
    }
    println!("  {:<12} {:>16}", "total", ui::time(total));
    println!("stages: {passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn format(_: &Options) -> Result<Done> {
    process::run(tools::cargo().args(["fmt", "--all", "--check"])).context("run `cargo fmt --all`")?;
    process::run(tools::cargo().args(["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))
        .context("run `cargo fmt --manifest-path fuzz/Cargo.toml`")?;
    Ok(Done::Passed("workspace and fuzz targets".to_owned()))
}

fn clippy(_: &Options) -> Result<Done> {
    // The end-to-end suite is no test of plain `cargo test`, so "all targets" leaves it out.
    for targets in [&["--all-targets"][..], &["--test", "suite"]] {
        let mut cargo = tools::cargo();
        cargo.args(["clippy", "--workspace", "--locked"]).args(targets).args(["--", "-D", "warnings"]);
        process::run(&mut cargo)?;
    }
    Ok(Done::Passed("all targets, warnings denied".to_owned()))
}

fn unit(_: &Options) -> Result<Done> {
    let mut runner = if process::exists("cargo-nextest") {
        tools::cargo()
    } else {
        let mut nextest = Command::new(tools::ensure(tools::CARGO_NEXTEST)?);
        nextest.current_dir(paths::repo());
        nextest
    };
    let mut words = String::new();
    process::through(
        runner.args([
            "nextest",
            "run",
            "--workspace",
            "--locked",
            "--no-fail-fast",
            "--color",
            ui::color_choice(),
        ]),
        |line| {
            if let Some((_, counts)) = line.split_once("tests run: ") {
                words = counts.to_owned();
            }
        },
    )?;
    Ok(Done::Passed(words))
}

fn doc(_: &Options) -> Result<Done> {
    process::run(tools::cargo().args(["test", "--doc", "--workspace", "--locked", "--quiet"]))?;
    Ok(Done::Passed("examples in the documentation".to_owned()))
}
