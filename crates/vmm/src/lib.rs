//! The Vmm seam and its backends: the only crate that names a hypervisor.
//!
//! [`seam`] is the contract. [`LibkrunVmm`] and [`QemuVmm`] fulfil it by starting one `a3s-box-vmm` process per
//! box with a [`launch::LaunchSpec`]; everything after that (watching, dialling, attaching, ending) is the same
//! for both and lives in `machine`. [`mod@probe`] decides which of the two a machine can use, by trying.

mod attach;
pub mod cmdline;
pub mod error;
pub mod launch;
pub mod libkrun;
mod machine;
mod ports;
pub mod probe;
mod process;
pub mod qemu;
pub mod seam;
pub mod share_requests;
mod starter;
mod sys;
mod usage;
pub mod users;
mod words;

pub use launch::{Accel, read_facts, read_plan};
pub use libkrun::LibkrunVmm;
pub use probe::{ProbeConfig, ProbeError, Requested, Verdict, probe};
pub use qemu::{QemuParts, QemuVmm};
pub use seam::{
    Attachment, BackendKind, BootTimes, BoxPlan, GUEST_DIALS, HostUsage, Machine, MachineExit, MachineFacts,
    PlanNetwork, PlanNic, Vmm,
};
pub use words::{GuestFault, guest_fault, last_words};
