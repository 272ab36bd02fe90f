//! Explicit conversions between CRI's messages and the types of `a3s_box_core`.
//!
//! Inward they are also the validation: a request that asks for what a virtual machine cannot give is
//! refused by the name of the field, never half obeyed. What is accepted without effect says so at
//! the place where it is read.

pub mod container;
pub mod image;
pub mod metrics;
pub mod resources;
pub mod sandbox;
pub mod security;
pub mod signal;
pub mod stats;
pub mod status;
pub mod users;

use std::collections::{BTreeMap, HashMap};

use thiserror::Error;

/// A request that cannot be served as it is. The client gets INVALID_ARGUMENT.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field}: {problem}")]
pub struct InvalidRequest {
    /// Path of the field from the request down: `config.linux.sysctls["a/b"]`.
    pub field: String,
    /// What is wrong with it and what to do.
    pub problem: String,
}

impl InvalidRequest {
    /// An error about `field`.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }

    /// A field that must be given and is not.
    pub fn missing(field: impl Into<String>) -> Self {
        Self::new(field, "is required")
    }
}

/// Unwraps a message that must be there.
pub(crate) fn required<T>(value: Option<T>, field: &str) -> Result<T, InvalidRequest> {
    value.ok_or_else(|| InvalidRequest::missing(field))
}

/// Refuses an empty text.
pub(crate) fn non_empty(value: String, field: &str) -> Result<String, InvalidRequest> {
    if value.is_empty() { Err(InvalidRequest::missing(field)) } else { Ok(value) }
}

/// `None` for protobuf's way of not giving a text.
pub(crate) fn given(value: String) -> Option<String> {
    Some(value).filter(|text| !text.is_empty())
}

/// A user or group id, which CRI sends in 64 bits and the kernel keeps in 32.
pub(crate) fn kernel_id(value: i64, field: &str) -> Result<u32, InvalidRequest> {
    // u32::MAX means "no id" to chown(2) and setresuid(2).
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or_else(|| InvalidRequest::new(field, format!("{value} is not an id (0 to {})", u32::MAX - 1)))
}

/// Maps in a stable order.
pub(crate) fn sorted(map: HashMap<String, String>) -> BTreeMap<String, String> {
    map.into_iter().collect()
}

/// Maps as prost wants them.
pub(crate) fn unsorted(map: &BTreeMap<String, String>) -> HashMap<String, String> {
    map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}
