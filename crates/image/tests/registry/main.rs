//! Pulls over HTTP, from a registry in this process.

mod common;
mod misbehaves;
mod pulls;
