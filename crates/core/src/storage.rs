//! The seam to durable records.
//!
//! Records are opaque bytes (JSON of their owner) under a key in a named table. The seam is
//! this small so that tests can fail any call of it and so that owners decide about shapes.

use thiserror::Error;

/// A table: a name that only its owner uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Table(pub &'static str);

/// One change of a batch.
#[derive(Debug, Clone)]
pub enum Change {
    /// Sets the record under a key, replacing any former one.
    Put {
        /// Where.
        table: Table,
        /// Under which key.
        key: String,
        /// The record.
        value: Vec<u8>,
    },
    /// Removes the record under a key; a missing one is no error.
    Delete {
        /// Where.
        table: Table,
        /// Under which key.
        key: String,
    },
}

/// A record and its key, as `scan` returns them.
pub type Record = (String, Vec<u8>);

/// A storage operation that failed. A failed `commit` changed nothing.
#[derive(Debug, Error)]
#[error("the state store could not {operation}: {source}")]
pub struct StorageError {
    /// What was tried, as a phrase: "read table boxes".
    pub operation: String,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Durable records. Calls block for as long as the disk does: async callers move them to a
/// blocking thread.
pub trait Storage: Send + Sync + 'static {
    /// The record under `key`.
    fn get(&self, table: Table, key: &str) -> Result<Option<Vec<u8>>, StorageError>;

    /// All records of a table in the order of their keys.
    fn scan(&self, table: Table) -> Result<Vec<Record>, StorageError>;

    /// Applies all changes or none; they are durable when this returns.
    fn commit(&self, changes: Vec<Change>) -> Result<(), StorageError>;
}
