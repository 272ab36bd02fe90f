//! Where the installed parts are: beside the running program, or where the configuration says.
//!
//! ```text
//! <usr>/bin/a3s-box, a3s-box-cri-runtime       the running program
//! <usr>/libexec/a3s-box/                       a3s-box-vmm
//! <usr>/lib/a3s-box/                           vmlinux, initramfs.cpio
//! ```
//!
//! `<usr>` follows from the program's own path, so that a tree works wherever it was unpacked. A program that was
//! started from cargo's target folder looks into the tree that `cargo xtask build` laid out beside it.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::Config;

/// A part that boxes need and that somebody must have installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// `a3s-box-vmm`, the process of each box.
    Vmm,
    /// The guest kernel.
    Kernel,
    /// The initramfs with the agent.
    Initramfs,
    /// QEMU.
    Qemu,
    /// The maker of scratch disks.
    MkfsExt4,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Vmm, Self::Kernel, Self::Initramfs, Self::Qemu, Self::MkfsExt4];

    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmm => "a3s-box-vmm",
            Self::Kernel => "guest kernel",
            Self::Initramfs => "guest initramfs",
            Self::Qemu => "QEMU",
            Self::MkfsExt4 => "mkfs.ext4",
        }
    }

    /// What puts it there.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Vmm => "build it with `cargo xtask build`, or name its directory with vmm.helpers",
            Self::Kernel => "build it with `cargo xtask build`, or name it with vmm.kernel",
            Self::Initramfs => "build it with `cargo xtask build`, or name it with vmm.initramfs",
            Self::Qemu => "install the Debian package qemu-system-x86, or name the program with vmm.qemu",
            Self::MkfsExt4 => "install the Debian package e2fsprogs",
        }
    }

    /// Whether boxes on libkrun need it too.
    pub fn needed_without_qemu(self) -> bool {
        match self {
            Self::Vmm | Self::Kernel | Self::Initramfs | Self::MkfsExt4 => true,
            Self::Qemu => false,
        }
    }
}

/// A part that is nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{} is missing (tried {}); {}", part.name(), Paths(tried), part.remedy())]
pub struct MissingPart {
    /// Which.
    pub part: Part,
    /// Every path that was looked at, in order.
    pub tried: Vec<PathBuf>,
}

struct Paths<'a>(&'a [PathBuf]);

impl fmt::Display for Paths<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, path) in self.0.iter().enumerate() {
            write!(f, "{}{}", if at == 0 { "" } else { ", " }, path.display())?;
        }
        Ok(())
    }
}

/// Where parts are looked for.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Directories that stand for `<usr>`, in the order of search.
    usr: Vec<PathBuf>,
    /// Directories of programs, as PATH says.
    path: Vec<PathBuf>,
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    helpers: Option<PathBuf>,
    qemu: Option<PathBuf>,
}

impl Layout {
    /// The layout of the running program under a configuration.
    pub fn of(config: &Config) -> Self {
        let program = std::env::current_exe().unwrap_or_default();
        let path = std::env::var_os("PATH").unwrap_or_default();
        Self::at(config, &program, std::env::split_paths(&path))
    }

    /// The layout of a program at some place.
    pub fn at(config: &Config, program: &Path, path: impl Iterator<Item = PathBuf>) -> Self {
        // sbin is where Debian keeps mkfs.ext4, and the PATH of many users does not name it.
        let sbin = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
        Self {
            usr: usr_of(program),
            path: path.filter(|dir| dir.is_absolute()).chain(sbin).collect(),
            kernel: config.vmm.kernel.clone(),
            initramfs: config.vmm.initramfs.clone(),
            helpers: config.vmm.helpers.clone(),
            qemu: config.vmm.qemu.clone(),
        }
    }

    /// The path of a part, or an error that names every path tried.
    pub fn find(&self, part: Part) -> Result<PathBuf, MissingPart> {
        let mut tried = self.candidates(part);
        let mut seen = std::collections::HashSet::new();
        tried.retain(|path| seen.insert(path.clone()));
        match tried.iter().find(|path| path.is_file()) {
            Some(path) => Ok(path.clone()),
            None => Err(MissingPart { part, tried }),
        }
    }

    fn candidates(&self, part: Part) -> Vec<PathBuf> {
        match part {
            Part::Vmm => self.helper("a3s-box-vmm"),
            Part::Kernel => self.chosen_or(&self.kernel, "lib/a3s-box/vmlinux"),
            Part::Initramfs => self.chosen_or(&self.initramfs, "lib/a3s-box/initramfs.cpio"),
            Part::Qemu => match &self.qemu {
                Some(path) => vec![path.clone()],
                None => self.programs("qemu-system-x86_64"),
            },
            Part::MkfsExt4 => self.programs("mkfs.ext4"),
        }
    }

    /// What was configured is meant: a fallback would hide the typing error.
    fn chosen_or(&self, chosen: &Option<PathBuf>, below_usr: &str) -> Vec<PathBuf> {
        match chosen {
            Some(path) => vec![path.clone()],
            None => self.usr.iter().map(|usr| usr.join(below_usr)).collect(),
        }
    }

    fn helper(&self, name: &str) -> Vec<PathBuf> {
        match &self.helpers {
            Some(dir) => vec![dir.join(name)],
            None => self.usr.iter().map(|usr| usr.join("libexec/a3s-box").join(name)).collect(),
        }
    }

    fn programs(&self, name: &str) -> Vec<PathBuf> {
        self.path.iter().map(|dir| dir.join(name)).collect()
    }
}

/// `<usr>/bin/x` gives `<usr>`; `target/debug/x` gives `target/dist/usr`; `/usr` comes last.
fn usr_of(program: &Path) -> Vec<PathBuf> {
    let mut usr = Vec::new();
    if let Some(parent) = program.parent().and_then(Path::parent) {
        usr.push(parent.to_path_buf());
        usr.push(parent.join("dist/usr"));
    }
    usr.push("/usr".into());
    usr
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }

    fn layout(config: &Config, program: &Path) -> Layout {
        Layout::at(config, program, std::iter::empty())
    }

    #[test]
    fn parts_are_found_relative_to_the_program_wherever_the_tree_lies() {
        let dir = tempfile::tempdir().unwrap();
        let usr = dir.path().join("opt/somewhere/usr");
        touch(&usr.join("libexec/a3s-box/a3s-box-vmm"));
        touch(&usr.join("lib/a3s-box/vmlinux"));
        let layout = layout(&Config::default(), &usr.join("bin/a3s-box"));
        assert_eq!(layout.find(Part::Vmm).unwrap(), usr.join("libexec/a3s-box/a3s-box-vmm"));
        assert_eq!(layout.find(Part::Kernel).unwrap(), usr.join("lib/a3s-box/vmlinux"));
    }

    #[test]
    fn a_program_in_cargos_target_folder_finds_the_tree_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let initramfs = dir.path().join("target/dist/usr/lib/a3s-box/initramfs.cpio");
        touch(&initramfs);
        let layout = layout(&Config::default(), &dir.path().join("target/debug/a3s-box"));
        assert_eq!(layout.find(Part::Initramfs).unwrap(), initramfs);
    }

    #[test]
    fn a_missing_part_names_every_path_and_the_remedy() {
        let error =
            layout(&Config::default(), Path::new("/x/usr/bin/a3s-box")).find(Part::Kernel).unwrap_err();
        assert_eq!(
            error.to_string(),
            "guest kernel is missing (tried /x/usr/lib/a3s-box/vmlinux, /x/usr/dist/usr/lib/a3s-box/vmlinux, \
             /usr/lib/a3s-box/vmlinux); build it with `cargo xtask build`, or name it with vmm.kernel"
        );
    }

    #[test]
    fn a_configured_part_has_no_fallback() {
        let dir = tempfile::tempdir().unwrap();
        touch(&dir.path().join("usr/lib/a3s-box/vmlinux"));
        let mut config = Config::default();
        config.vmm.kernel = Some("/nonexistent/vmlinux".into());
        let error = layout(&config, &dir.path().join("usr/bin/a3s-box")).find(Part::Kernel).unwrap_err();
        assert_eq!(error.tried, [PathBuf::from("/nonexistent/vmlinux")]);
    }

    #[test]
    fn a_directory_is_no_program() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("qemu-system-x86_64")).unwrap();
        let mut config = Config::default();
        config.vmm.qemu = Some(dir.path().join("qemu-system-x86_64"));
        assert!(layout(&config, Path::new("/x/bin/y")).find(Part::Qemu).is_err());
    }
}
