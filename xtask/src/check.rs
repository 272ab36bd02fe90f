//! `cargo xtask check`: what is worth knowing before each commit, in about a minute.
//!
//! Formatting, lints, links of the documentation and unit tests, of the packages that have changed since the branch left
//! main. `cargo xtask test` has the rest.

use std::collections::BTreeSet;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use serde::Deserialize;

use crate::{paths, process, test, tools, ui};

#[derive(Args)]
pub(crate) struct Options {
    /// The commit that changes are counted from [default: where the branch left main, or HEAD on main].
    #[arg(long)]
    since: Option<String>,
    /// Also check the packages that stand on the changed ones.
    #[arg(long)]
    dependents: bool,
    /// Check these packages, whatever has changed; may be repeated.
    #[arg(long, short)]
    package: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let started = Instant::now();
    let workspace = Workspace::read()?;
    let mut chosen: BTreeSet<String> = match options.package.as_slice() {
        [] => workspace.owners(&changed_files(options.since.as_deref())?),
        packages => packages.iter().cloned().collect(),
    };
    if options.dependents {
        workspace.add_dependents(&mut chosen);
    }
    ui::heading("format");
    test::formatted()?;
    if chosen.is_empty() {
        ui::note("no package has changed");
        return Ok(ExitCode::SUCCESS);
    }
    ui::heading(&format!("lints, documentation and tests of {}", listed(&chosen, ", ")));
    // Always the whole workspace: another choice of packages has other features of what they share, and cargo would compile
    // all of that again. What has not changed costs nothing.
    process::run(&mut test::clippy_of(&["--all-targets"]))?;
    process::run(&mut test::rustdoc())?;
    let of_the_chosen: BTreeSet<String> = chosen.iter().map(|name| format!("package({name})")).collect();
    let mut nextest = test::nextest()?;
    // A package may have no test at all, such as the one of what tests share.
    nextest.args(["--no-tests", "pass", "-E", &listed(&of_the_chosen, " | ")]);
    process::run(&mut nextest)?;
    ui::note(&format!("checked in {}", ui::time(started.elapsed())));
    Ok(ExitCode::SUCCESS)
}

fn listed(names: &BTreeSet<String>, separator: &str) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(separator)
}

/// Files that differ from `since`, committed or not; paths from the repository's root.
fn changed_files(since: Option<&str>) -> Result<Vec<String>> {
    let git =
        |arguments: &[&str]| process::output(Command::new("git").args(arguments).current_dir(paths::repo()));
    let since = match since {
        Some(commit) => commit.to_owned(),
        None => git(&["merge-base", "HEAD", "main"]).unwrap_or_else(|_| "HEAD".to_owned()).trim().to_owned(),
    };
    let differing = git(&["diff", "--name-only", &since]).context("asking git what has changed")?;
    let unknown = git(&["ls-files", "--others", "--exclude-standard"]).context("asking git what is new")?;
    Ok(differing.lines().chain(unknown.lines()).map(str::to_owned).collect())
}

/// The packages of the workspace, as `cargo metadata` tells them.
#[derive(Deserialize)]
struct Workspace {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
}

impl Workspace {
    fn read() -> Result<Self> {
        let text = process::output(tools::cargo().args([
            "metadata",
            "--no-deps",
            "--locked",
            "--format-version",
            "1",
        ]))?;
        let mut workspace: Self =
            serde_json::from_str(&text).context("reading what cargo says of the workspace")?;
        let root = format!("{}/", paths::repo().display());
        for package in &mut workspace.packages {
            let folder = package.manifest_path.trim_end_matches("Cargo.toml");
            package.manifest_path = folder.strip_prefix(&root).unwrap_or(folder).to_owned();
        }
        Ok(workspace)
    }

    /// The packages that the files lie in. All of them when the workspace's own manifest has changed.
    fn owners(&self, files: &[String]) -> BTreeSet<String> {
        let everything =
            files.iter().any(|file| ["Cargo.toml", "rust-toolchain.toml"].contains(&file.as_str()));
        self.packages
            .iter()
            .filter(|package| everything || files.iter().any(|file| file.starts_with(&package.manifest_path)))
            .map(|package| package.name.clone())
            .collect()
    }

    /// Adds what depends on one of the packages, directly or not.
    fn add_dependents(&self, chosen: &mut BTreeSet<String>) {
        loop {
            let further: Vec<String> = self
                .packages
                .iter()
                .filter(|package| !chosen.contains(&package.name))
                .filter(|package| {
                    package.dependencies.iter().any(|dependency| chosen.contains(&dependency.name))
                })
                .map(|package| package.name.clone())
                .collect();
            if further.is_empty() {
                return;
            }
            chosen.extend(further);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Dependency, Package, Workspace};

    fn workspace() -> Workspace {
        let package = |name: &str, folder: &str, needs: &[&str]| Package {
            name: name.to_owned(),
            manifest_path: folder.to_owned(),
            dependencies: needs.iter().map(|name| Dependency { name: (*name).to_owned() }).collect(),
        };
        Workspace {
            packages: vec![
                package("core", "crates/core/", &[]),
                package("net", "crates/net/", &["core"]),
                package("cli", "bin/cli/", &["net"]),
                package("image", "crates/image/", &[]),
            ],
        }
    }

    fn owners(files: &[&str]) -> Vec<String> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        workspace().owners(&files).into_iter().collect()
    }

    #[test]
    fn a_file_belongs_to_the_package_of_its_folder() {
        assert_eq!(owners(&["crates/net/src/lib.rs", "docs/networking.md"]), ["net"]);
        assert_eq!(owners(&["crates/network/src/lib.rs"]), [""; 0]);
        assert_eq!(owners(&["Cargo.toml"]).len(), 4);
    }

    #[test]
    fn dependents_are_found_through_others() {
        let mut chosen = ["core".to_owned()].into();
        workspace().add_dependents(&mut chosen);
        assert_eq!(chosen.into_iter().collect::<Vec<_>>(), ["cli", "core", "net"]);
    }
}
