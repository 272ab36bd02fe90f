//! Boxes: one microVM each.

mod bring_up;
mod contact;
mod driver;
mod live;
mod owed;
mod plan;
mod release;
mod volumes;

pub(crate) use contact::Contact;
pub(crate) use driver::{BoxCommand, BoxDriver, BoxStart};
pub(crate) use live::{BoxLife, Foreign, LiveBox, Obituary, faulted};
pub(crate) use owed::{Leftovers, Owed};
pub(crate) use release::{find_vm, found};
pub(crate) use volumes::forget_unknown_holders;
