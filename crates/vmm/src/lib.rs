//! The Vmm seam and its backends: the only crate that names a hypervisor.

pub mod error;
pub mod seam;

pub use seam::{Attachment, BackendKind, BoxPlan, Machine, MachineExit, MachineFacts, PlanNetwork, PlanNic, Vmm};
