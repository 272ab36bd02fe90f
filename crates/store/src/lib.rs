//! Durable records (redb) behind the `Storage` seam of core.

mod redb_store;

pub use redb_store::{OpenError, RedbStore};
