//! The version of the layout of the records.

use redb::{Database, ReadableDatabase, TableDefinition};
use thiserror::Error;

/// The layout that this build writes. Raised when records change in a way that an older build
/// would misread.
pub const SCHEMA_VERSION: u32 = 1;

const SCHEMA: TableDefinition<'static, &str, u32> = TableDefinition::new("schema");
const KEY: &str = "version";

/// The layout's version could not be agreed on.
#[derive(Debug, Error)]
pub enum SchemaError {
    /// The file was written by a newer build.
    #[error(
        "its records have layout {found}, this program knows layouts up to {SCHEMA_VERSION}; \
         run the newer version that wrote them, or start with another state folder"
    )]
    Newer {
        /// The version in the file.
        found: u32,
    },
    /// The version could not be read or written.
    #[error("the layout's version could not be read or written: {0}")]
    Database(#[source] Box<redb::Error>),
}

impl<E: Into<redb::Error>> From<E> for SchemaError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

/// Refuses a newer layout; brings an older or an empty file to ours.
pub(crate) fn agree(database: &Database) -> Result<(), SchemaError> {
    match read(database)? {
        Some(found) if found > SCHEMA_VERSION => Err(SchemaError::Newer { found }),
        Some(SCHEMA_VERSION) => Ok(()),
        // Layout 1 is the first: an older number means an empty file that was never finished.
        Some(_) | None => write(database, SCHEMA_VERSION),
    }
}

fn read(database: &Database) -> Result<Option<u32>, SchemaError> {
    match database.begin_read()?.open_table(SCHEMA) {
        Ok(table) => Ok(redb::ReadableTable::get(&table, KEY)?.map(|version| version.value())),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn write(database: &Database, version: u32) -> Result<(), SchemaError> {
    let transaction = database.begin_write()?;
    transaction.open_table(SCHEMA)?.insert(KEY, version)?;
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use redb::backends::InMemoryBackend;

    #[test]
    fn records_of_a_newer_build_are_refused_with_what_to_do() {
        let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        write(&database, SCHEMA_VERSION + 1).unwrap();
        let error = agree(&database).unwrap_err();
        assert!(matches!(error, SchemaError::Newer { found } if found == SCHEMA_VERSION + 1));
        assert!(error.to_string().contains("run the newer version"), "{error}");
        assert_eq!(read(&database).unwrap(), Some(SCHEMA_VERSION + 1), "a refused file is not changed");
    }
}
