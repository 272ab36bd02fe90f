//! Boxes: one microVM each.

mod bring_up;
mod driver;
mod live;
mod release;

pub(crate) use driver::{BoxCommand, BoxDriver, BoxStart};
pub(crate) use live::{BoxLife, LiveBox, Obituary, faulted};
pub(crate) use release::{find_vm, release, remove_orphans};
