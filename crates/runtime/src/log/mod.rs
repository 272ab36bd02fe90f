//! The logs of sessions, in the format that kubelet reads.

mod file;
mod format;
mod position;
mod tap;
mod writer;

pub(crate) use tap::tap;
pub(crate) use writer::{LogHandle, LogPlan, Sink, resume, start};
