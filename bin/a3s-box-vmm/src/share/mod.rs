//! What both backends' file servers say to a guest beyond their libraries.

pub(crate) mod attributes;
pub(crate) mod place;
pub(crate) mod room;
