//! What the compiler of `proto/runtime/v1/api.proto` generates: messages, clients and servers.
//!
//! The words are in the proto file. Nothing outside of this crate should use these types except
//! clients of the socket: the demo and the end-to-end suite.

#![allow(missing_docs, unreachable_pub, clippy::all)]

tonic::include_proto!("runtime.v1");
