//! The agent's wire as every build has spoken it: docs/versioning.md.
//!
//! A running agent is as old as its box. What the daemon sends must be what that agent reads, and what it answers must mean
//! to this build what it meant to the build that it is of.

mod descriptor;
mod framing;
mod messages;

use a3s_box_golden::Goldens;

/// The golden files of one part of the wire.
fn goldens(part: &str) -> Goldens {
    Goldens::of(env!("CARGO_MANIFEST_DIR"), &format!("wire/{part}"))
}
