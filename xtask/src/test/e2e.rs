//! The end-to-end suite against an installed layout, once for each VMM backend.
//!
//! libkrun needs a /dev/kvm that can run a guest; so that the suite runs on every machine it runs in the virtual node.
//! The layout is built with the `dev` profile, whose artefacts the unit tests have compiled already.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::{Context, Done};
use crate::{dist, node, packages, paths, process, tools, ui};

const NODE_MEMORY_MIB: u32 = 6144;
/// How many nodes may fail by themselves in one run, and one more.
const MAX_NODES: usize = 5;
/// Beside the other stages the suite takes about twice its own time.
const NODE_LIMIT: Duration = Duration::from_secs(40 * 60);

pub(super) fn qemu(context: &Context<'_>) -> Result<Done> {
    on_qemu(&context.end_to_end, &[], &[])
}

/// Most of the suite on libkrun. It takes twice as long as the one on QEMU, so [`libkrun_late`] has the rest.
pub(super) fn libkrun(context: &Context<'_>) -> Result<Done> {
    on_libkrun(&context.end_to_end, &[], LATE, &[], NODE_LIMIT)
}

/// The scenarios of [`LATE`] on libkrun, in a node of their own.
pub(super) fn libkrun_late(context: &Context<'_>) -> Result<Done> {
    let (_, suite) = context.end_to_end.get()?;
    let list = process::output(Command::new(&suite).arg("--list"))?;
    on_libkrun(&context.end_to_end, &[], &early(&list), &[], NODE_LIMIT)
}

/// Modules that are left to the second node: about a third of the time that the suite takes.
const LATE: &[&str] = &["bad_machine::", "endurance::", "networks::"];

/// The scenarios of a list that are not [`LATE`]. The one at the end of the suite looks at what is left of all.
fn early(list: &str) -> Vec<&str> {
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    names.filter(|name| !LATE.iter().any(|module| name.starts_with(module)) && *name != LAST).collect()
}

/// Every node ends with it.
const LAST: &str = "suite::nothing_is_left_when_the_daemon_has_stopped";

const SOAK_LIMIT: Duration = Duration::from_secs(6 * 60 * 60);

/// The scenarios that do the same things very often, in their long form; or, with the layout of another build, the one in
/// which this build goes on with a pod of that one's.
pub(crate) fn soak(backend: Backend, across: Option<&Path>, scenarios: &str, long: &str) -> Result<()> {
    packages::ensure(packages::Set::Test)?;
    let programs = Programs::default();
    let (only, environment) = match across {
        None => ([scenarios], [("A3S_BOX_SOAK", long.to_owned())]),
        Some(other) => {
            let other = other.canonicalize().with_context(|| format!("no layout at {}", other.display()))?;
            (["across::"], [("A3S_BOX_OTHER_DIST", other.to_string_lossy().into_owned())])
        }
    };
    let done = match backend {
        Backend::Qemu => on_qemu(&programs, &only, &environment)?,
        Backend::Libkrun => on_libkrun(&programs, &only, &[], &environment, SOAK_LIMIT)?,
    };
    match done {
        Done::Passed(words) | Done::Skipped(words) => ui::note(&words),
    }
    Ok(())
}

/// What runs the pods' machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backend {
    /// On this machine, by software emulation.
    Qemu,
    /// In the virtual KVM node.
    Libkrun,
}

fn on_qemu(programs: &Programs, only: &[&str], environment: &[(&str, String)]) -> Result<Done> {
    need_root()?;
    let (layout, suite) = programs.get()?;
    let mut outcome = Outcome::default();
    let ran = process::lines(
        Command::new(&suite)
            .args(ARGUMENTS)
            .args(only)
            .env("A3S_BOX_DIST", &layout)
            .env("A3S_BOX_BACKEND", "qemu")
            .envs(environment.iter().cloned())
            .current_dir(paths::repo()),
        |line| {
            println!("{line}");
            outcome.note(line);
        },
    );
    outcome.tell_slowest("qemu");
    ran.with_context(|| format!("backend qemu: {outcome}"))?;
    Ok(Done::Passed(format!("backend qemu (software emulation): {outcome}")))
}

/// Its lines are marked: other stages print between them.
fn on_libkrun(
    programs: &Programs,
    only: &[&str],
    without: &[&str],
    environment: &[(&str, String)],
    limit: Duration,
) -> Result<Done> {
    let (layout, suite) = programs.get()?;
    let mut command = vec![suite.to_string_lossy().into_owned()];
    command.extend(ARGUMENTS.iter().chain(only).map(|argument| (*argument).to_owned()));
    command.extend(skip(WITHOUT_VMM));
    command.extend(skip(without));
    let mut variables = environment.to_vec();
    variables.push(("A3S_BOX_DIST", layout.to_string_lossy().into_owned()));
    variables.push(("A3S_BOX_BACKEND", "libkrun".to_owned()));
    let attempt = |command: &[String], outcome: &mut Outcome| {
        let run = node::Run { command, environment: &variables, memory_mib: NODE_MEMORY_MIB, limit };
        run.execute(|line| {
            println!("libkrun | {line}");
            outcome.note(line);
        })
    };
    // QEMU's emulation of nested virtualisation crashes or stops the node itself now and then. That is no result of the
    // suite, neither way: it is said, and another node runs what has not passed. A scenario that failed before is run again,
    // because a node that breaks is no witness against it.
    let (mut done, mut nodes) = (Vec::new(), 1);
    let (code, outcome) = loop {
        let mut outcome = Outcome::default();
        match attempt(&command, &mut outcome) {
            Err(error) if error.is::<node::NodeStopped>() && nodes < MAX_NODES => {
                let failed = match outcome.failed.as_slice() {
                    [] => String::new(),
                    names => format!("; {} had failed in it", names.join(", ")),
                };
                ui::note(&format!(
                    "the virtual node itself failed{failed}; another runs the rest. {error:#}"
                ));
                command.extend(skip(&outcome.passed));
                done.append(&mut outcome.passed);
                nodes += 1;
            }
            other => break (other.with_context(|| format!("backend libkrun: {outcome}"))?, outcome),
        }
    };
    outcome.tell_slowest("libkrun");
    let before = match nodes {
        1 => String::new(),
        _ => format!("{} passed in {} node(s) that failed; then ", done.len(), nodes - 1),
    };
    if code != 0 {
        bail!("backend libkrun: the suite ended with exit code {code}: {before}{outcome}");
    }
    Ok(Done::Passed(format!("backend libkrun (KVM in the virtual node): {before}{outcome}")))
}

fn skip(scenarios: &[impl AsRef<str>]) -> impl Iterator<Item = String> {
    scenarios.iter().flat_map(|name| ["--skip".to_owned(), name.as_ref().to_owned()])
}

/// Scenarios in which no machine runs. The run on QEMU has them; in the node they would take minutes.
const WITHOUT_VMM: &[&str] =
    &["bad_registry::", "images::a_pull_survives_kills_of_the_daemon_at_random_moments"];

/// One daemon serves all scenarios in turn.
const ARGUMENTS: &[&str] = &["--test-threads=1"];

/// How many of the longest scenarios are named at the end.
const SLOWEST: usize = 8;

/// What the suite said of itself.
struct Outcome {
    counts: String,
    passed: Vec<String>,
    /// Scenarios that could not run, each with its reason. They count among the passed ones of `counts`.
    skipped: Vec<String>,
    /// When the last scenario ended.
    last_end: Instant,
    /// How long each scenario took, with what the suite did before it.
    times: Vec<(Duration, String)>,
    /// Scenarios that failed, as they are told while the suite runs.
    failed: Vec<String>,
    /// Runs, and prints something of its own meanwhile.
    running: Option<String>,
    /// Failed scenarios with the first line of each one's reason.
    failures: Vec<String>,
    /// The next line is the last failure's reason.
    reason_follows: bool,
}

impl Default for Outcome {
    fn default() -> Self {
        Self {
            counts: String::new(),
            passed: Vec::new(),
            skipped: Vec::new(),
            last_end: Instant::now(),
            times: Vec::new(),
            failed: Vec::new(),
            running: None,
            failures: Vec::new(),
            reason_follows: false,
        }
    }
}

impl Outcome {
    fn note(&mut self, line: &str) {
        if let Some((_, reason)) = line.split_once("SKIPPED: ") {
            let name =
                self.running.clone().unwrap_or_else(|| line.split(' ').nth(1).unwrap_or_default().into());
            self.skipped.push(format!("{name} ({reason})"));
        }
        if self.reason_follows
            && let Some(failure) = self.failures.last_mut()
        {
            failure.push_str(": ");
            failure.push_str(line.trim());
        }
        self.reason_follows = false;
        if let Some(result) = line.strip_prefix("test result: ") {
            result.trim().clone_into(&mut self.counts);
        } else if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" ----")) {
            self.failures.push(name.to_owned());
            self.reason_follows = true;
        } else if let Some((name, end)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
        {
            self.running = Some(name.trim().to_owned());
            self.ended(end);
        } else {
            self.ended(line);
        }
    }

    fn ended(&mut self, word: &str) {
        if let ("ok" | "FAILED", Some(name)) = (word, &self.running) {
            self.times.push((self.last_end.elapsed(), name.clone()));
            self.last_end = Instant::now();
        }
        match word {
            "ok" => self.passed.extend(self.running.take()),
            "FAILED" => self.failed.extend(self.running.take()),
            _ => {}
        }
    }
}

impl Outcome {
    /// Names the scenarios that took longest, to know where the time goes.
    fn tell_slowest(&self, backend: &str) {
        let mut times = self.times.clone();
        times.sort_by(|a, b| b.cmp(a));
        let slowest: Vec<String> =
            times.iter().take(SLOWEST).map(|(time, name)| format!("{name} {}", ui::time(*time))).collect();
        ui::note(&format!("{backend}: the longest scenarios: {}", slowest.join(", ")));
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.counts)?;
        if !self.skipped.is_empty() {
            write!(f, "; {} of these skipped: {}", self.skipped.len(), self.skipped.join(", "))?;
        }
        match self.failures.as_slice() {
            // A suite that did not come to its end has not told the reasons.
            [] if !self.failed.is_empty() => write!(f, "; failed: {}", self.failed.join(", ")),
            failures => failures.iter().try_for_each(|failure| write!(f, "; {failure}")),
        }
    }
}

fn need_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!("pods need network namespaces, taps and cgroups: run as root")
}

/// The installed layout and the suite's program, built once for both backends.
#[derive(Default)]
pub(crate) struct Programs(Mutex<Option<(PathBuf, PathBuf)>>);

impl Programs {
    /// The layout and the suite.
    pub(crate) fn get(&self) -> Result<(PathBuf, PathBuf)> {
        let mut built = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if built.is_none() {
            *built = Some(build()?);
        }
        built.clone().context("building the layout and the suite")
    }
}

fn build() -> Result<(PathBuf, PathBuf)> {
    let out = paths::target().join("test-dist");
    let layout = dist::build(&dist::Options { profile: "dev".to_owned(), out: Some(out) })?;
    let messages = process::output(
        tools::cargo()
            .args(["test", "--workspace", "--test", "suite", "--no-run", "--message-format=json"])
            .stderr(std::process::Stdio::inherit()),
    )
    .context("building the end-to-end suite")?;
    let suite = executable(&messages).context("cargo named no executable for the end-to-end suite")?;
    Ok((layout, suite))
}

fn executable(messages: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "suite")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::{LAST, Outcome, early, executable};

    #[test]
    fn the_second_node_runs_what_the_first_does_not_and_both_look_at_the_end() {
        let list = format!("cli::run: test\nendurance::kills: test\n{LAST}: test\n\n3 tests, 0 benchmarks\n");
        assert_eq!(early(&list), ["cli::run"]);
    }

    #[test]
    fn failures_are_told_with_their_reasons() {
        let mut outcome = Outcome::default();
        for line in [
            "test a::a   ... ok",
            "test a::c ... words",
            "ok",
            "test a::b ... FAILED",
            "---- a::b ----",
            "no pod",
            "  caused by: x",
            "test result: FAILED. 1 failed",
        ] {
            outcome.note(line);
        }
        assert_eq!(outcome.to_string(), "FAILED. 1 failed; a::b: no pod");
        assert_eq!(outcome.passed, ["a::a", "a::c"]);
        assert_eq!(outcome.failed, ["a::b"]);
    }

    #[test]
    fn a_scenario_that_could_not_run_is_named() {
        let mut outcome = Outcome::default();
        for line in ["test a::b ... SKIPPED: no verity", "ok", "test result: ok. 1 passed"] {
            outcome.note(line);
        }
        assert_eq!(outcome.to_string(), "ok. 1 passed; 1 of these skipped: a::b (no verity)");
    }

    #[test]
    fn the_suite_is_found_among_cargos_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"a3s_box_e2e\"},\"executable\":null}\n\
                        {\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"suite\"},\"executable\":\"/t/suite-1\"}\n";
        assert_eq!(executable(messages).expect("named").to_str(), Some("/t/suite-1"));
    }
}
