//! The version of the layout of the records.

use redb::{Database, ReadableDatabase, TableDefinition, WriteTransaction};
use thiserror::Error;

/// Brings records from one layout to the next.
type Step = fn(&WriteTransaction) -> Result<(), redb::Error>;

/// The first step leads from layout 1 to layout 2. A field that older records lack needs no step if it has a default.
const STEPS: &[Step] = &[];

/// The layout that this build writes. Raised when records change in a way that an older build
/// would misread.
pub const SCHEMA_VERSION: u32 = STEPS.len() as u32 + 1;

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
    bring_to_the_end_of(STEPS, database)
}

/// All steps and the number are one transaction: a step that fails leaves the file to the older build.
fn bring_to_the_end_of(steps: &[Step], database: &Database) -> Result<(), SchemaError> {
    let newest = steps.len() as u32 + 1;
    let found = read(database)?;
    match found {
        Some(found) if found > newest => return Err(SchemaError::Newer { found }),
        Some(found) if found == newest => return Ok(()),
        Some(_) | None => {}
    }
    let transaction = database.begin_write()?;
    // A file without a number is empty.
    if let Some(found) = found {
        tracing::info!(from = found, to = newest, "the records are brought to a newer layout");
        for step in &steps[found.saturating_sub(1) as usize..] {
            step(&transaction)?;
        }
    }
    transaction.open_table(SCHEMA)?.insert(KEY, newest)?;
    transaction.commit()?;
    Ok(())
}

fn read(database: &Database) -> Result<Option<u32>, SchemaError> {
    match database.begin_read()?.open_table(SCHEMA) {
        Ok(table) => Ok(redb::ReadableTable::get(&table, KEY)?.map(|version| version.value())),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use redb::ReadableTable;
    use redb::backends::InMemoryBackend;

    use super::*;

    #[test]
    fn records_of_a_newer_build_are_refused_with_what_to_do() {
        let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        let nothing: Step = |_| Ok(());
        bring_to_the_end_of(&[nothing; SCHEMA_VERSION as usize], &database).unwrap();
        let error = agree(&database).unwrap_err();
        assert!(matches!(error, SchemaError::Newer { found } if found == SCHEMA_VERSION + 1));
        assert!(error.to_string().contains("run the newer version"), "{error}");
        assert_eq!(read(&database).unwrap(), Some(SCHEMA_VERSION + 1), "a refused file is not changed");
    }
    #[test]
    fn records_of_an_older_build_go_through_all_steps_or_none() {
        const NOTES: TableDefinition<'static, &str, u32> = TableDefinition::new("notes");
        let note = |database: &Database| -> Option<u32> {
            let table = database.begin_read().unwrap().open_table(NOTES).ok()?;
            table.get("n").unwrap().map(|value| value.value())
        };
        let first: Step = |transaction| {
            transaction.open_table(NOTES)?.insert("n", 1)?;
            Ok(())
        };
        let second: Step = |transaction| {
            let mut notes = transaction.open_table(NOTES)?;
            let before = notes.get("n")?.map_or(0, |value| value.value());
            notes.insert("n", before + 1)?;
            Ok(())
        };
        let fails: Step = |_| Err(redb::Error::Corrupted("the step said so".to_owned()));

        let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        bring_to_the_end_of(&[], &database).unwrap();
        bring_to_the_end_of(&[first, fails], &database).unwrap_err();
        assert_eq!((read(&database).unwrap(), note(&database)), (Some(1), None));
        bring_to_the_end_of(&[first, second], &database).unwrap();
        assert_eq!((read(&database).unwrap(), note(&database)), (Some(3), Some(2)));
        bring_to_the_end_of(&[first, second], &database).unwrap();
        assert_eq!(note(&database), Some(2), "a step is taken once");
    }
}
