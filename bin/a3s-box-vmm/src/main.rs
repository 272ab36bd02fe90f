//! One per box: enters the pod's namespaces, jails itself, becomes the virtual machine.
//!
//! `a3s-box-vmm run PLAN` is started by the daemon with its status pipe as standard output and the box's log as
//! standard error. It outlives the daemon. See `a3s_box_vmm::launch` for the sequence.

mod jail;
mod krun;
mod logs;
mod outer;
mod privileges;
mod qemu;
mod status;
mod tap;

use std::path::Path;
use std::process::ExitCode;

use a3s_box_vmm::launch::{Hypervisor, LaunchSpec};
use anyhow::{Context, bail};

use crate::outer::Role;
use crate::status::Status;

/// A step of setting up failed. Guests that power off end the process with 0.
const SETUP_FAILED: u8 = 71;

fn main() -> ExitCode {
    let status = match Status::take() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("a3s-box-vmm: {error:#}");
            return ExitCode::from(SETUP_FAILED);
        }
    };
    match run(&status) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("a3s-box-vmm: {error:#}");
            status.failed(&format!("{error:#}"));
            ExitCode::from(SETUP_FAILED)
        }
    }
}

fn run(status: &Status) -> anyhow::Result<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let (Some(verb), Some(plan), None) = (args.next(), args.next(), args.next()) else {
        bail!("usage: a3s-box-vmm run PLAN (started by the a3s-box daemon)");
    };
    if verb != "run" {
        bail!("usage: a3s-box-vmm run PLAN (started by the a3s-box daemon)");
    }
    let spec = read_spec(Path::new(&plan))?;
    match outer::split(&spec, status)? {
        Role::Outer => Ok(ExitCode::SUCCESS),
        Role::Inner => inner(&spec, status),
    }
}

fn read_spec(path: &Path) -> anyhow::Result<LaunchSpec> {
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("parse {}", path.display()))
}

/// The first process of the box's PID namespace.
fn inner(spec: &LaunchSpec, status: &Status) -> anyhow::Result<ExitCode> {
    let opened = jail::Opened::open(spec)?;
    jail::enter(spec)?;
    match &spec.hypervisor {
        Hypervisor::Libkrun => krun::run(spec, opened, status),
        Hypervisor::Qemu(qemu) => qemu::run(spec, qemu, opened, status),
    }
}
