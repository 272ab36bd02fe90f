//! One per box: enters the pod's namespaces, jails itself, becomes the virtual machine.
//!
//! `a3s-box-vmm run PLAN` is started by the daemon with its status pipe as standard output and the box's log as
//! standard error. It outlives the daemon. See `a3s_box_vmm::launch` for the sequence.

mod clock;
mod counts;
mod dialled;
mod file_server;
mod inherited;
mod jail;
mod krun;
mod logs;
mod outer;
mod panics;
mod privileges;
mod qemu;
mod share;
mod speed;
mod status;
mod tap;
mod vsock;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use a3s_box_vmm::launch::{Hypervisor, LaunchSpec};
use a3s_box_vmm::users::HELD;
use anyhow::Context;

use crate::outer::Role;
use crate::status::Status;

/// A step of setting up failed. Guests that power off end the process with 0.
const SETUP_FAILED: u8 = 71;

const USAGE: &str = "usage: a3s-box-vmm run PLAN | kvm-speed | hold-users | file-server FD | vsock PORT=FD… (started by a3s-box itself)";

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match args.as_slice() {
        [verb, plan] if verb == "run" => run_box(Path::new(plan)),
        [verb] if verb == "kvm-speed" => print_speed(),
        [verb] if verb == "hold-users" => hold_users(),
        [verb, ports @ ..] if verb == vsock::ROLE => vsock::run(ports),
        [verb, agent] if verb == file_server::ROLE => file_server::run(agent),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn print_speed() -> ExitCode {
    match speed::measure() {
        Ok(micros) => {
            println!("{micros}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Is a process in a user namespace of its own until its standard input ends: see `a3s_box_vmm::users`.
fn hold_users() -> ExitCode {
    let held = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)
        .map_err(io::Error::from)
        .and_then(|()| io::stdout().write_all(&[HELD]))
        .and_then(|()| io::stdout().flush())
        .and_then(|()| io::copy(&mut io::stdin(), &mut io::sink()));
    match held {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("a3s-box-vmm: hold a user namespace: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_box(plan: &Path) -> ExitCode {
    outer::close_strays();
    let status = match Status::take() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("a3s-box-vmm: {error:#}");
            return ExitCode::from(SETUP_FAILED);
        }
    };
    match run(plan, &status) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("a3s-box-vmm: {error:#}");
            status.failed(&format!("{error:#}"));
            ExitCode::from(SETUP_FAILED)
        }
    }
}

fn run(plan: &Path, status: &Status) -> anyhow::Result<ExitCode> {
    let spec = read_spec(plan)?;
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
