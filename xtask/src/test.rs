//! `cargo xtask test`: every check there is, each stage named and timed, with a summary of what ran at the end.
//!
//! A failing stage does not stop the others. What a machine cannot run is skipped and the summary says why.
//!
//! Everything that the stages run is compiled once, by the stage `build`, with one choice of features. The suite in the
//! virtual node keeps one processor busy for minutes, whatever the machine has: it runs beside the stages that follow it.
//! The checks that only compute take what time both end-to-end suites leave.

mod deny;
pub(crate) mod e2e;
mod fuzz;
mod skipped;
mod umoci;

use std::num::NonZero;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;

use crate::{packages, paths, process, tools, ui};
use skipped::Skipped;

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

/// When a stage runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// After the stages before it.
    Next,
    /// Beside the stages after it, where there is more than one processor.
    Beside,
    /// After others of this kind and beside everything after them, with the time that those leave.
    Idle,
}

struct Stage {
    name: &'static str,
    turn: Turn,
    action: fn(&Context<'_>) -> Result<Done>,
}

const fn stage(name: &'static str, turn: Turn, action: fn(&Context<'_>) -> Result<Done>) -> Stage {
    Stage { name, turn, action }
}

const STAGES: &[Stage] = &[
    stage("format", Turn::Next, format),
    stage("build", Turn::Next, build),
    stage("unit", Turn::Next, unit),
    stage("e2e-libkrun", Turn::Beside, e2e::libkrun),
    stage("clippy", Turn::Idle, clippy),
    stage("doc", Turn::Idle, doc),
    stage("deny", Turn::Idle, deny::policy),
    stage("advisories", Turn::Idle, deny::advisories),
    stage("umoci", Turn::Idle, umoci::run),
    stage("fuzz", Turn::Idle, fuzz::run),
    stage("e2e-qemu", Turn::Next, e2e::qemu),
    stage("e2e-libkrun-2", Turn::Next, e2e::libkrun_late),
];

/// What a stage that takes only what others leave adds to its niceness: as much as there is.
const IDLE: i32 = 19;

/// What the stages of one run share.
pub(crate) struct Context<'a> {
    options: &'a Options,
    end_to_end: e2e::Programs,
}

struct Report {
    name: &'static str,
    time: Duration,
    outcome: Result<Done>,
}

impl Report {
    /// Of stages that cannot tell how they ended.
    fn of_a_panic() -> Self {
        let outcome = Err(anyhow!("the thread of these stages panicked"));
        Self { name: "(beside)", time: Duration::ZERO, outcome }
    }
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        for stage in STAGES {
            println!("{}", stage.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(unknown) = options.only.iter().find(|only| !STAGES.iter().any(|stage| stage.name == *only)) {
        bail!("there is no stage {unknown}; `cargo xtask test --list` names them");
    }
    packages::ensure(packages::Set::Test)?;
    let started = Instant::now();
    let chosen: Vec<&Stage> = STAGES
        .iter()
        .filter(|stage| options.only.is_empty() || options.only.iter().any(|only| only == stage.name))
        .collect();
    let reports = run_stages(&chosen, &Context { options, end_to_end: e2e::Programs::default() });
    Ok(summarize(&reports, started.elapsed()))
}

/// Runs the stages; the reports are in the stages' order.
fn run_stages(stages: &[&'static Stage], context: &Context<'_>) -> Vec<Report> {
    let side_by_side = thread::available_parallelism().map_or(1, NonZero::get) > 1;
    let idle = || {
        // The thread's own, and with it its children's. Who may not is as fast as the others.
        let _ = rustix::process::nice(IDLE);
        let idle = stages.iter().filter(|stage| stage.turn == Turn::Idle);
        idle.map(|stage| run_stage(stage, context)).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let mut beside = Vec::new();
        let mut reports = Vec::new();
        let mut idle = Some(idle);
        for stage in stages {
            match stage.turn {
                Turn::Next => reports.push(run_stage(stage, context)),
                _ if !side_by_side => reports.push(run_stage(stage, context)),
                Turn::Beside => beside.push(scope.spawn(move || vec![run_stage(stage, context)])),
                Turn::Idle => beside.extend(idle.take().map(|idle| scope.spawn(idle))),
            }
        }
        let panicked = |_| vec![Report::of_a_panic()];
        reports.extend(beside.into_iter().flat_map(|thread| thread.join().unwrap_or_else(panicked)));
        reports.sort_by_key(|report| stages.iter().position(|stage| stage.name == report.name));
        reports
    })
}

fn run_stage(stage: &Stage, context: &Context<'_>) -> Report {
    let name = stage.name;
    ui::heading(&format!("stage {name}"));
    let started = Instant::now();
    let outcome = (stage.action)(context);
    match &outcome {
        Ok(Done::Passed(_)) => {}
        Ok(Done::Skipped(reason)) => ui::note(&format!("stage {name} skipped: {reason}")),
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
        println!("  {:<13} {word} {:>8}  {words}", report.name, ui::time(report.time));
    }
    println!("  {:<13} {:>16}", "total", ui::time(total));
    println!("stages: {passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn format(_: &Context<'_>) -> Result<Done> {
    formatted()?;
    Ok(Done::Passed("workspace and fuzz targets".to_owned()))
}

pub(crate) fn formatted() -> Result<()> {
    process::run(tools::cargo().args(["fmt", "--all", "--check"])).context("run `cargo fmt --all`")?;
    process::run(tools::cargo().args(["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))
        .context("run `cargo fmt --manifest-path fuzz/Cargo.toml`")
}

/// Compiles every program and test that a later stage runs.
fn build(context: &Context<'_>) -> Result<Done> {
    // These compile the unit tests along, and have more to do side by side.
    context.end_to_end.get()?;
    process::run(nextest()?.arg("--no-run"))?;
    Ok(Done::Passed("programs, tests, guest image".to_owned()))
}

/// clippy over these targets of the workspace, warnings denied.
pub(crate) fn clippy_of(targets: &[&str]) -> Command {
    let mut cargo = tools::cargo();
    cargo.args(["clippy", "--workspace", "--locked"]).args(targets).args(["--", "-D", "warnings"]);
    cargo
}

fn clippy(_: &Context<'_>) -> Result<Done> {
    // The end-to-end suite is no test of plain `cargo test`, so "all targets" leaves it out.
    for targets in [&["--all-targets"][..], &["--test", "suite"]] {
        process::run(&mut clippy_of(targets))?;
    }
    Ok(Done::Passed("all targets, warnings denied".to_owned()))
}

fn unit(_: &Context<'_>) -> Result<Done> {
    let mut words = String::new();
    let skipped = Skipped::start()?;
    process::through(
        nextest()?
            .args(["--no-fail-fast", "--color", ui::color_choice()])
            .env(a3s_box_testing::SKIPPED_TESTS, skipped.path()),
        |line| {
            if let Some((_, counts)) = line.split_once("tests run: ") {
                words = counts.to_owned();
            }
        },
    )?;
    Ok(Done::Passed(skipped.corrected(&words)?))
}

/// `cargo nextest run --workspace`, to be completed.
pub(crate) fn nextest() -> Result<Command> {
    let mut runner = if process::exists("cargo-nextest") {
        tools::cargo()
    } else {
        let mut nextest = Command::new(tools::ensure(tools::CARGO_NEXTEST)?);
        nextest.current_dir(paths::repo());
        nextest
    };
    runner.args(["nextest", "run", "--workspace", "--locked"]);
    Ok(runner)
}

/// rustdoc over everything, private items too: a link that leads nowhere is an error.
pub(crate) fn rustdoc() -> Command {
    let mut cargo = tools::cargo();
    cargo.args(["doc", "--workspace", "--locked", "--no-deps", "--document-private-items", "--quiet"]);
    // Modules point to their private parts, which are documented here.
    cargo.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links");
    cargo
}

/// Every link of the documentation leads somewhere.
fn doc(_: &Context<'_>) -> Result<Done> {
    process::run(&mut rustdoc())?;
    Ok(Done::Passed("links of the documentation".to_owned()))
}
