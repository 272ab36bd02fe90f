//! Debian packages used as material, not installed: the kernel's source and the virtual node's kernel.
//!
//! A package index of our own under the cache folder, so that the machine's apt configuration stays as it is and the
//! same suite is used on Debian 12 and 13. Signatures are checked against Debian's keyring as always.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{paths, process, ui};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The archive that this machine's apt already uses: its nearest mirror, reached as the machine reaches it.
fn mirror() -> Result<String> {
    let format = "$(RELEASE) $(COMPONENT) $(REPO_URI)";
    let targets = process::output(&mut process::command(
        "apt-get",
        ["indextargets", "--format", format, "Created-By: Packages"],
    ))?;
    main_archive(&targets)
        .context("apt on this machine knows no Debian archive: its sources name no `main` of a release")
}

/// The first archive with a release itself (`bookworm main …`), not its updates or its security fixes.
fn main_archive(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
        [release, "main", archive] if !release.contains(['-', '/']) => Some(archive.to_owned()),
        _ => None,
    })
}

/// The private index of one Debian suite.
pub(crate) struct Suite {
    dir: PathBuf,
    name: &'static str,
}

/// One package version found in the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
}

impl Suite {
    /// Opens Debian 13's index and brings it up to date. Needs the network.
    pub(crate) fn trixie() -> Result<Self> {
        let suite = Self { dir: paths::cache()?.join("apt/trixie"), name: "trixie" };
        suite.prepare()?;
        let log = suite.dir.join("log");
        ui::note(&format!("reading Debian's package index ({})", suite.name));
        process::logged(suite.apt("apt-get").args(["-q", "update"]), &log)
            .with_context(|| format!("reading Debian's index of {}", suite.name))?;
        Ok(suite)
    }

    fn prepare(&self) -> Result<()> {
        for dir in ["lists/partial", "cache/archives/partial"] {
            let dir = self.dir.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        let sources = format!("deb [signed-by={KEYRING}] {} {} main\n", mirror()?, self.name);
        paths::write_atomic(&self.dir.join("sources.list"), sources.as_bytes())
    }

    fn apt(&self, program: &str) -> Command {
        let set = |key: &str, path: &str| format!("-o{key}={}", self.dir.join(path).display());
        process::command(
            program,
            [
                set("Dir::Etc::sourcelist", "sources.list"),
                "-oDir::Etc::sourceparts=/dev/null".to_owned(),
                set("Dir::State::Lists", "lists"),
                set("Dir::Cache", "cache"),
                // As root apt would drop to a user who may not enter the cache folder.
                "-oAPT::Sandbox::User=root".to_owned(),
            ],
        )
    }

    /// The version of a package that this suite offers now.
    pub(crate) fn candidate(&self, name: &str) -> Result<Package> {
        let record = process::output(self.apt("apt-cache").args(["show", "--no-all-versions", name]))?;
        let version = field(&record, "Version")
            .with_context(|| format!("Debian {} has no package {name}", self.name))?;
        Ok(Package { name: name.to_owned(), version: version.to_owned() })
    }

    /// The package that a meta package stands for: its first dependency whose name starts with `prefix`.
    pub(crate) fn behind(&self, meta: &str, prefix: &str) -> Result<Package> {
        let record = process::output(self.apt("apt-cache").args(["show", "--no-all-versions", meta]))?;
        let depends = field(&record, "Depends").with_context(|| format!("{meta} depends on nothing"))?;
        let name = depends
            .split(',')
            .filter_map(|entry| entry.split_whitespace().next())
            .find(|name| name.starts_with(prefix))
            .with_context(|| format!("{meta} depends on no package named {prefix}…, but on: {depends}"))?;
        self.candidate(name)
    }

    /// Downloads a package and unpacks its files into `into`.
    pub(crate) fn unpack(&self, package: &Package, into: &Path) -> Result<()> {
        let download = into.join(".download");
        fs::create_dir_all(&download).with_context(|| format!("creating {}", download.display()))?;
        let log = self.dir.join("log");
        let wanted = format!("{}={}", package.name, package.version);
        process::logged(self.apt("apt-get").args(["-q", "download", &wanted]).current_dir(&download), &log)
            .with_context(|| format!("downloading Debian's {wanted}"))?;
        let deb = only_file(&download)?;
        process::logged(
            process::command("dpkg-deb", ["-x".as_ref(), deb.as_os_str(), into.as_os_str()])
                .current_dir(into),
            &log,
        )
        .with_context(|| format!("unpacking {}", deb.display()))?;
        fs::remove_dir_all(&download).with_context(|| format!("removing {}", download.display()))
    }
}

fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

fn only_file(dir: &Path) -> Result<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))? {
        files.push(entry.with_context(|| format!("listing {}", dir.display()))?.path());
    }
    match files.as_slice() {
        [file] => Ok(file.clone()),
        _ => bail!("expected one downloaded package in {}, found {}", dir.display(), files.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::{field, main_archive};

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let record = "Package: x\nVersion-Note: no\nVersion: 6.12.117-1\nDepends: a (= 1), b\n";
        assert_eq!(field(record, "Version"), Some("6.12.117-1"));
        assert_eq!(field(record, "Depends"), Some("a (= 1), b"));
        assert_eq!(field(record, "Provides"), None);
    }

    #[test]
    fn the_archive_is_the_releases_own_not_that_of_its_fixes() {
        let targets = "bookworm-security main http://mirror.test/debian-security/\n\
                       bookworm main http://mirror.test/debian/\n\
                       bookworm-updates main http://other.test/debian/\n";
        assert_eq!(main_archive(targets).as_deref(), Some("http://mirror.test/debian/"));
        assert_eq!(main_archive("bookworm contrib http://mirror.test/debian/\n"), None);
    }
}
