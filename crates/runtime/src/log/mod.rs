//! The logs of sessions, in the format that kubelet reads.

mod file;
mod format;
mod position;
mod writer;

pub(crate) use writer::{LogHandle, LogPlan, Sink, start};
