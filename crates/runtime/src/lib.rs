//! Boxes and sessions: lifecycle, driver tasks, agent client, recovery.
//!
//! ```text
//!   BoxManager ──queue──► BoxDriver (one task per box) ──► phases: reserve, prepare, boot, configure
//!        │                   ▲    │ life: starting, live, gone
//!        │      attach layers│    ▼
//!        └─────queue──► SessionDriver (one task per session) ──► agent, log writer
//! ```
//!
//! Each box and each session is owned by one task; it alone changes the object, writes its record and
//! publishes its state. Whoever asks gets an answer from the owner or reads what it has published.

mod agent_client;
mod api;
mod attached;
mod boxes;
mod cgroup;
mod clock;
mod config;
mod drain;
mod error;
mod events;
mod execution;
mod limits;
mod log;
mod manager;
pub mod network;
mod port;
mod records;
mod recovery;
mod registry;
mod scratch;
mod sessions;
mod shared;
mod sources;
mod stats;
mod streams;
mod text;

pub use a3s_box_vmm::HostUsage;
pub use api::{
    BoxStatus, BoxUsage, CpuUsage, ExecOutput, IoUsage, Leftover, MemoryUsage, NetworkReadiness, Pressure,
    Pressures, Quarantined, ResolvedUser, SessionStatus, SessionUsage, Stage, Stall, Usage,
    WritableLayerUsage,
};
pub use attached::{Attached, StdinWriter, StreamReader};
pub use config::RuntimeConfig;
pub use error::{ErrorKind, FailedStage, ProgramFault, RuntimeError};
pub use events::{Event, EventStream, EventsMissed, Happened, Subject};
pub use execution::{ByteStream, ExecTerminal, Execution, ExitCode, PortStream};
pub use manager::BoxManager;
pub use network::{NetworkSetting, PodNetworks};
