//! Boxes and sessions: lifecycle, driver tasks, agent client, recovery.

mod api;
mod attached;
mod config;
mod error;
mod manager;
pub mod network;

pub use api::{BoxStatus, ExecOutput, NetworkReadiness, ResolvedUser, SessionStatus, Stage};
pub use attached::{Attached, StdinWriter, StreamReader};
pub use config::RuntimeConfig;
pub use error::{ErrorKind, FailedStage, RuntimeError};
pub use manager::BoxManager;
pub use network::{NetworkSetting, PodNetworks};
