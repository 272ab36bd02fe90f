//! Ids, specs, pure state machines and seams of a3s-box: no tokio, no I/O.
//!
//! Everything here is data or a decision. The crates around it do the work:
//! `image`, `net`, `vmm` and `store` are adapters, `runtime` composes them, `cri` speaks
//! to Kubernetes. The words *box* (one microVM, a pod sandbox) and *session* (one workload
//! in it, a container) are defined in ARCHITECTURE.md.

pub mod bandwidth;
pub mod egress;
pub mod foreign;
pub mod id;
pub mod image;
pub mod lifecycle;
pub mod network;
pub mod seccomp;
pub mod spec;
pub mod storage;

pub use id::{BoxId, IdError, SessionId};
