//! The Debian packages this project builds and runs with, each with its reason.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{process, ui};

/// What somebody is about to do, from less to more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Set {
    /// Compile everything.
    Build,
    /// And run pods from a local registry.
    Demo,
    /// And run the checks and the virtual KVM node.
    Test,
    /// And run the peers that benchmarks compare with.
    Bench,
}

/// Package, when it is first needed, and what for.
const PACKAGES: &[(&str, Set, &str)] = &[
    ("bc", Set::Build, "guest kernel: its build computes constants with it"),
    ("binutils", Set::Build, "guest kernel and Rust: linker, strip"),
    ("bison", Set::Build, "guest kernel: Kconfig's parser"),
    ("ca-certificates", Set::Build, "crates.io over TLS"),
    ("debian-archive-keyring", Set::Build, "Debian 13's signatures, for the kernel's source"),
    ("flex", Set::Build, "guest kernel: Kconfig's scanner"),
    ("gcc", Set::Build, "guest kernel, the linker driver of Rust, C parts of crates"),
    ("libc6-dev", Set::Build, "headers and static libc of the guest agent"),
    ("libcap-ng-dev", Set::Build, "a3s-box-vmm links it: the library of its file server"),
    ("libelf-dev", Set::Build, "guest kernel: objtool reads ELF"),
    ("libseccomp-dev", Set::Build, "a3s-box-vmm links it: the library of its file server"),
    ("make", Set::Build, "guest kernel"),
    ("xz-utils", Set::Build, "the kernel's source and the node's modules are xz-compressed"),
    ("busybox-static", Set::Demo, "the program in the sample image"),
    ("containernetworking-plugins", Set::Demo, "CNI: bridge, host-local, loopback, portmap"),
    ("docker-registry", Set::Demo, "a registry on loopback to pull from"),
    ("e2fsprogs", Set::Demo, "mkfs.ext4 for the boxes' scratch disks"),
    ("iproute2", Set::Demo, "looking for leftover links and network namespaces"),
    ("iptables", Set::Demo, "CNI's portmap and masquerading"),
    ("nftables", Set::Demo, "the built-in network of nodes without CNI"),
    ("qemu-system-x86", Set::Demo, "the VMM where KVM cannot be used; the virtual KVM node"),
    ("erofs-utils", Set::Test, "mkfs.erofs makes layers for tests; fsck.erofs checks our EROFS writer"),
    ("kmod", Set::Test, "virtual KVM node: depmod"),
    ("g++", Set::Test, "fuzz targets: libFuzzer is C++"),
    ("socat", Set::Test, "speaks TCP, UDP and SCTP of both families in pods"),
    ("sqlite3", Set::Test, "one database in two containers of a pod"),
    ("umoci", Set::Test, "unpacks images, to compare with"),
    ("containerd", Set::Bench, "the runtime that pulls are compared with"),
    ("iperf3", Set::Bench, "measures pods' networks"),
    ("skopeo", Set::Bench, "copies images for umoci"),
];

/// Installs what is missing for `set`; as an ordinary user it says what an administrator has to type.
pub(crate) fn ensure(set: Set) -> Result<()> {
    if !process::exists("apt-get") || !process::exists("dpkg-query") {
        bail!("this is not a Debian machine (no apt-get): install by hand {}", names(set).join(" "));
    }
    let missing = missing(set)?;
    if missing.is_empty() {
        return Ok(());
    }
    ui::heading("installing Debian packages");
    for (name, _, reason) in
        PACKAGES.iter().filter(|(name, _, _)| missing.iter().any(|missing| missing == name))
    {
        ui::note(&format!("{name:<28} {reason}"));
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "{} Debian package(s) are missing and only root can install them:\n  \
             sudo apt-get update && sudo apt-get install -y --no-install-recommends {}",
            missing.len(),
            missing.join(" ")
        );
    }
    process::run(apt_get().args(["-qq", "update"])).context("reading the package index")?;
    process::run(apt_get().args(["-qq", "install", "-y", "--no-install-recommends"]).args(&missing))
        .context("installing Debian packages")?;
    if missing.iter().any(|name| name == "docker-registry") {
        keep_registry_stopped()?;
    }
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    // Another apt, such as the machine's own upgrades, may be at work: wait for it.
    command.args(["-o", "DPkg::Lock::Timeout=300"]);
    command
}

/// Installing docker-registry starts it as a service on port 5000. We only want the program.
fn keep_registry_stopped() -> Result<()> {
    if !Path::new("/run/systemd/system").exists() {
        return Ok(());
    }
    process::run(&mut process::command("systemctl", ["--quiet", "disable", "--now", "docker-registry"]))
        .context("stopping the registry service that the package's installation started")
}

fn names(set: Set) -> Vec<String> {
    PACKAGES.iter().filter(|(_, from, _)| *from <= set).map(|(name, _, _)| (*name).to_owned()).collect()
}

fn missing(set: Set) -> Result<Vec<String>> {
    let listing = process::output(&mut process::command(
        "dpkg-query",
        ["-W", "-f=${binary:Package} ${db:Status-Status}\n"],
    ))?;
    let installed = installed(&listing);
    Ok(PACKAGES
        .iter()
        .filter(|(_, from, _)| *from <= set)
        .filter(|(name, _, _)| !installed.contains(name))
        .map(|(name, _, _)| (*name).to_owned())
        .collect())
}

fn installed(listing: &str) -> BTreeSet<&str> {
    listing
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(_, status)| *status == "installed")
        // Multi-arch packages are listed as name:architecture.
        .map(|(name, _)| name.split(':').next().unwrap_or(name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{PACKAGES, Set, installed, names};

    #[test]
    fn a_removed_package_with_leftover_configuration_is_not_installed() {
        let found = installed("gcc installed\nlibc6-dev:amd64 installed\nmake config-files\n");
        assert!(found.contains("gcc") && found.contains("libc6-dev") && !found.contains("make"));
    }

    #[test]
    fn every_larger_set_contains_the_smaller_one() {
        let (build, demo, test, bench) =
            (names(Set::Build), names(Set::Demo), names(Set::Test), names(Set::Bench));
        assert!(build.iter().all(|name| demo.contains(name)));
        assert!(demo.iter().all(|name| test.contains(name)));
        assert!(test.iter().all(|name| bench.contains(name)));
        assert_eq!(bench.len(), PACKAGES.len());
    }
}
