//! The CRI v1 services on top of the runtime: the only crate that knows CRI protobufs.
//!
//! ```text
//! unix socket -> server -> runtime_service / image_service   one line per RPC
//!                              -> sandbox, container, exec, image, stats, status   what each group does
//!                                   -> convert   messages <-> core types, and all validation
//!                                   -> filter    what lists show
//!                                   -> error     every failure to one gRPC code
//! ```
//!
//! Nothing here keeps state: a request is validated, handed to the runtime or the image store, awaited,
//! and its outcome put into a message. Changes go on in the runtime's own tasks when a client goes away;
//! a pull stops, and what it has finished stays for the next one.

mod batches;
pub mod client;
mod container;
pub mod convert;
mod deadline;
pub mod error;
mod events;
mod exec;
pub mod filter;
mod image;
mod image_service;
pub mod proto;
mod runtime_service;
mod sandbox;
pub mod server;
mod service;
mod settings;
mod stats;
mod status;
mod streaming;

pub use service::CriService;
pub use settings::{CgroupDriver, Condition, CriSettings};
pub use streaming::Containers;
