//! Durable records (redb) behind the `Storage` seam of core.
//!
//! One file, `state.redb`, holds every table. Table `schema` carries one record, the version of the whole
//! layout: a program opens what is as old as itself or older and refuses what is newer, because a
//! layout that it does not know is one it would damage.

mod faulty;
#[cfg(test)]
mod power_cut;
mod redb_store;
mod schema;

pub use faulty::{FaultyStore, Injected};
pub use redb_store::{OpenError, RedbStore};
pub use schema::{SCHEMA_VERSION, SchemaError};
