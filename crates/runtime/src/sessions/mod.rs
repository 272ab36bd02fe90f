//! Sessions: the workloads in a box.

mod begin;
mod driver;
mod end;
mod exec;
mod exit;
mod request;
mod sources;
mod volumes;

pub(crate) use driver::{SessionCommand, SessionDriver, SessionStart, Told};
pub(crate) use exec::{ExecPlan, exec_streams, exec_sync};
pub(crate) use request::{BoxFacts, layer_name, volume_name};
pub(crate) use volumes::layer as layer_attachment;
