//! The system call filter of sessions: a profile (data) and a small compiler to classic BPF.
//!
//! The program is made on the host and travels to the guest as the kernel takes it. The agent neither
//! knows profiles nor compiles anything.

mod profile;
mod program;

use a3s_box_core::spec::SeccompSpec;

/// The program for a process with these capabilities (a bit mask), 8 octets per instruction; empty for none.
pub(crate) fn program(spec: &SeccompSpec, capabilities: u64) -> Vec<u8> {
    match spec {
        SeccompSpec::Unconfined => Vec::new(),
        SeccompSpec::RuntimeDefault => program::encode(&program::compile(&profile::rules(capabilities))),
    }
}
