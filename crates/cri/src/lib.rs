//! The CRI v1 services on top of the runtime: the only crate that knows CRI protobufs.

pub mod proto;
