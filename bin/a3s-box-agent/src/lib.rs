//! The guest's PID 1: boots the box, runs sessions, carries their stdio over vsock, powers off.
//!
//! The same program is every role in the guest, told apart by `argv[0]`: process 1 (`boot`), and the helper
//! processes that become sessions' processes (`stage`). docs/guest.md has the picture.

/// Says something on the console. A console that cannot be written to is no reason to fail, and process 1 must not
/// panic over it.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "a3s-box-agent: {}", format_args!($($text)*));
    }};
}

pub mod boot;
pub mod clock;
pub mod control;
pub mod forget;
pub mod netlink;
pub mod paths;
pub mod power;
pub mod reaper;
pub mod rpc;
pub mod sandbox;
pub mod session;
pub mod spawn;
pub mod stage;
pub mod stats;
pub mod stdio;
pub mod streams;
pub mod sys;
pub mod vsock;

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

/// What a stage exits with when it executed nothing: as Kubernetes knows a container that could not start.
const NOT_STARTED: u8 = 128;

/// Plays the role that `argv[0]` names.
pub fn main() -> ExitCode {
    let role = std::env::args_os().next().unwrap_or_default();
    let is = |name: &std::ffi::CStr| role.as_bytes() == name.to_bytes();
    if is(stage::SESSION) {
        stage::session();
    } else if is(stage::EXEC) {
        stage::exec();
    } else if is(stage::PAUSE) {
        stage::pause();
    } else if is(stage::USERS) {
        stage::make_users();
    } else if is(stage::REMOVE) {
        return remove();
    } else if std::process::id() == 1 {
        return init();
    } else {
        eprintln!("a3s-box-agent {}: runs as process 1 of a box", env!("CARGO_PKG_VERSION"));
        return ExitCode::from(2);
    }
    ExitCode::from(NOT_STARTED)
}

fn init() -> ExitCode {
    let reason = match boot::run() {
        Ok(()) => "the agent has stopped serving".to_owned(),
        Err(error) => error.to_string(),
    };
    say!("fatal: {reason}");
    power::off()
}

fn remove() -> ExitCode {
    match stage::remove::empty(Path::new(paths::TRASH)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say!("delete old writable layers: {error}");
            ExitCode::FAILURE
        }
    }
}
