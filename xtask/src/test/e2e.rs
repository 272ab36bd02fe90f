//! The end-to-end suite against an installed layout, once for each VMM backend.
//!
//! libkrun needs a /dev/kvm that can run a guest; so that the suite runs on every machine it runs in the virtual node.
//! The layout is built with the `dev` profile, whose artefacts the unit tests have compiled already.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Done, Options};
use crate::{dist, node, paths, process, tools, ui};

const NODE_MEMORY_MIB: u32 = 6144;
const NODE_LIMIT: Duration = Duration::from_secs(15 * 60);

pub(super) fn qemu(_: &Options) -> Result<Done> {
    need_root()?;
    let (layout, suite) = prepare()?;
    let mut counts = String::new();
    let ran = process::lines(
        Command::new(&suite)
            .args(ARGUMENTS)
            .env("A3S_BOX_DIST", &layout)
            .env("A3S_BOX_BACKEND", "qemu")
            .current_dir(paths::repo()),
        |line| {
            println!("{line}");
            note_counts(line, &mut counts);
        },
    );
    ran.with_context(|| format!("backend qemu: {counts}"))?;
    Ok(Done::Passed(format!("backend qemu (software emulation): {counts}")))
}

pub(super) fn libkrun(_: &Options) -> Result<Done> {
    let (layout, suite) = prepare()?;
    let mut command = vec![suite.to_string_lossy().into_owned()];
    command.extend(ARGUMENTS.iter().map(|argument| (*argument).to_owned()));
    let run = node::Run {
        command: &command,
        environment: &[
            ("A3S_BOX_DIST", layout.to_string_lossy().into_owned()),
            ("A3S_BOX_BACKEND", "libkrun".to_owned()),
        ],
        memory_mib: NODE_MEMORY_MIB,
        limit: NODE_LIMIT,
    };
    let mut counts = String::new();
    let mut attempt = || {
        run.execute(|line| {
            println!("{line}");
            note_counts(line, &mut counts);
        })
    };
    // QEMU's emulation of nested virtualisation crashes or stops the node itself now and then. That is no result of the
    // suite, neither way: it is said and the suite runs once more. What the suite reports is never repeated.
    let (code, remark) = match attempt() {
        Err(error) if error.is::<node::NodeStopped>() => {
            ui::note(&format!("the virtual node itself failed; once more. {error:#}"));
            (attempt()?, ", after the node itself had failed once")
        }
        other => (other?, ""),
    };
    if code != 0 {
        bail!("backend libkrun: the suite ended with exit code {code}: {counts}{remark}");
    }
    Ok(Done::Passed(format!("backend libkrun (KVM in the virtual node): {counts}{remark}")))
}

/// One daemon serves all scenarios in turn.
const ARGUMENTS: &[&str] = &["--test-threads=1"];

fn note_counts(line: &str, counts: &mut String) {
    if let Some(result) = line.strip_prefix("test result: ") {
        result.trim().clone_into(counts);
    }
}

fn need_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!("pods need network namespaces, taps and cgroups: run as root")
}

/// The layout and the suite's program; a second call finds everything built.
fn prepare() -> Result<(PathBuf, PathBuf)> {
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
    use super::executable;

    #[test]
    fn the_suite_is_found_among_cargos_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"a3s_box_e2e\"},\"executable\":null}\n\
                        {\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"suite\"},\"executable\":\"/t/suite-1\"}\n";
        assert_eq!(executable(messages).expect("named").to_str(), Some("/t/suite-1"));
    }
}
