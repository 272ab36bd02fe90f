//! What both backends' file servers say to a guest beyond their libraries.

pub(crate) mod attributes;
pub(crate) mod place;
pub(crate) mod room;

/// How long a guest may believe what it was told of a file.
pub(crate) const CACHED: std::time::Duration = std::time::Duration::from_secs(1);
