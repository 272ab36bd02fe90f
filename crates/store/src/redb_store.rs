//! The store itself.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fmt, fs, io};

use redb::backends::InMemoryBackend;
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, TableError,
};
use thiserror::Error;

use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};

use crate::schema::{self, SchemaError};

/// How often a store that another process holds is tried again.
const RETRY: Duration = Duration::from_millis(50);

/// Memory for pages: the records of a node are a few hundred KiB.
const CACHE: usize = 8 * 1024 * 1024;

/// A store that could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error(
        "the state store {} is in use by another process (waited {waited:?}); stop the other a3s-box daemon, \
         or give this one a state folder of its own with --root",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// How long it was tried.
        waited: Duration,
    },
    /// The directory for it could not be made.
    #[error("could not make the directory {}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The operating system's word.
        #[source]
        source: std::io::Error,
    },
    /// A new file could not be made.
    #[error("could not make the state store {}: {source}", path.display())]
    Make {
        /// The file.
        path: PathBuf,
        /// The operating system's word.
        #[source]
        source: io::Error,
    },
    /// The file is damaged, or the disk failed.
    #[error("could not open the state store {}: {source}", path.display())]
    Database {
        /// The file.
        path: PathBuf,
        /// The database's word.
        #[source]
        source: Box<DatabaseError>,
    },
    /// The file has a layout that this build cannot use.
    #[error("cannot use the state store {}: {source}", path.display())]
    Schema {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: SchemaError,
    },
}

/// Records in a redb file, or in memory.
///
/// redb refuses everything after its first failed write: the store is opened anew then, so that a disk that was full
/// for a moment stops the daemon for that moment only.
pub struct RedbStore {
    /// `None`: to be opened by who needs it next.
    database: RwLock<Option<Database>>,
    open: Box<dyn Fn() -> Result<Database, OpenError> + Send + Sync>,
}

impl RedbStore {
    /// Opens or makes the file. While another process holds it, waits for up to `wait`. A new one gets its name once it
    /// is whole and on the disk: half a file would be one that no later start can open.
    pub fn open(path: &Path, wait: Duration) -> Result<Self, OpenError> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .map_err(|source| OpenError::Directory { path: parent.to_owned(), source })?;
        }
        if !path.exists() {
            make(path)?;
        }
        let database = open_when_free(path, wait)?;
        schema::agree(&database).map_err(|source| OpenError::Schema { path: path.to_owned(), source })?;
        let path = path.to_owned();
        Ok(Self::of(database, move || open_when_free(&path, Duration::ZERO)))
    }

    /// A store that ends with the value.
    pub fn in_memory() -> Result<Self, OpenError> {
        // Memory does not fail, so nobody will want this a second time.
        Self::on(InMemoryBackend::new)
    }

    /// A store on something else than a file.
    pub(crate) fn on<B: StorageBackend>(
        backend: impl Fn() -> B + Send + Sync + 'static,
    ) -> Result<Self, OpenError> {
        let path = PathBuf::from("(memory)");
        let open = {
            let path = path.clone();
            move || {
                let created = Database::builder().set_cache_size(CACHE).create_with_backend(backend());
                created.map_err(|source| OpenError::Database { path: path.clone(), source: Box::new(source) })
            }
        };
        let database = open()?;
        schema::agree(&database).map_err(|source| OpenError::Schema { path, source })?;
        Ok(Self::of(database, open))
    }

    fn of(
        database: Database,
        open: impl Fn() -> Result<Database, OpenError> + Send + Sync + 'static,
    ) -> Self {
        Self { database: RwLock::new(Some(database)), open: Box::new(open) }
    }

    /// Works on the database, and opens it first if the last one to do so met a failing disk.
    fn with<T>(
        &self,
        operation: String,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StorageError> {
        let failed = |source| StorageError { operation: operation.clone(), source };
        let database = self.opened().map_err(|error| failed(Box::new(error)))?;
        // Empty only if another caller has just met a failing disk: this one would have too.
        let Some(open) = &*database else { return Err(failed(Box::new(redb::Error::PreviousIo))) };
        let result = work(open);
        drop(database);
        if let Err(redb::Error::Io(_) | redb::Error::PreviousIo) = &result {
            *self.database.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        result.map_err(|source| failed(Box::new(source)))
    }

    fn opened(&self) -> Result<RwLockReadGuard<'_, Option<Database>>, OpenError> {
        let read = || self.database.read().unwrap_or_else(PoisonError::into_inner);
        let database = read();
        if database.is_some() {
            return Ok(database);
        }
        drop(database);
        let mut slot = self.database.write().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some((self.open)()?);
            tracing::info!("the state store was opened anew after the disk had failed");
        }
        drop(slot);
        Ok(read())
    }
}

impl fmt::Debug for RedbStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedbStore").field("database", &self.database).finish_non_exhaustive()
    }
}

/// Makes an empty store and gives it its name, unless another process was faster.
fn make(path: &Path) -> Result<(), OpenError> {
    let failed = |source| OpenError::Make { path: path.to_owned(), source };
    let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(failed(io::ErrorKind::InvalidFilename.into()));
    };
    let prefix = format!("{name}.new-");
    let new = parent.join(format!("{prefix}{}", std::process::id()));
    // One of a process of this number that was killed.
    remove(&new).map_err(failed)?;
    let database = Database::create(&new)
        .map_err(|source| OpenError::Database { path: new.clone(), source: Box::new(source) })?;
    schema::agree(&database).map_err(|source| OpenError::Schema { path: new.clone(), source })?;
    drop(database);
    match fs::hard_link(&new, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists && !path.exists() => {
            return Err(failed(error));
        }
        // Another process's store, which may already be in use.
        Ok(()) | Err(_) => {}
    }
    // Now that there is one, whoever still makes one needs it no more.
    for entry in fs::read_dir(parent).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)) {
            remove(&entry.path()).map_err(failed)?;
        }
    }
    fs::File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn open_when_free(path: &Path, wait: Duration) -> Result<Database, OpenError> {
    let start = Instant::now();
    loop {
        match Database::builder().set_cache_size(CACHE).create(path) {
            Ok(database) => return Ok(database),
            Err(DatabaseError::DatabaseAlreadyOpen) if start.elapsed() < wait => {
                sleep(RETRY.min(wait.saturating_sub(start.elapsed())));
            }
            Err(DatabaseError::DatabaseAlreadyOpen) => {
                return Err(OpenError::InUse { path: path.to_owned(), waited: start.elapsed() });
            }
            Err(source) => {
                return Err(OpenError::Database { path: path.to_owned(), source: Box::new(source) });
            }
        }
    }
}

fn definition(table: Table) -> TableDefinition<'static, &'static str, &'static [u8]> {
    TableDefinition::new(table.0)
}

impl Storage for RedbStore {
    fn get(&self, table: Table, key: &str) -> Result<Option<Vec<u8>>, StorageError> {
        self.with(format!("read {key} of table {}", table.0), |database| get(database, table, key))
    }

    fn scan(&self, table: Table) -> Result<Vec<Record>, StorageError> {
        self.with(format!("read table {}", table.0), |database| scan(database, table))
    }

    fn commit(&self, changes: Vec<Change>) -> Result<(), StorageError> {
        self.with(format!("write {} changes", changes.len()), |database| commit(database, changes))
    }
}

fn get(database: &Database, table: Table, key: &str) -> Result<Option<Vec<u8>>, redb::Error> {
    match database.begin_read()?.open_table(definition(table)) {
        Ok(open) => Ok(open.get(key)?.map(|value| value.value().to_vec())),
        // A table exists from its first record on.
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn scan(database: &Database, table: Table) -> Result<Vec<Record>, redb::Error> {
    let open = match database.begin_read()?.open_table(definition(table)) {
        Ok(open) => open,
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut records = Vec::new();
    for entry in open.iter()? {
        let (key, value) = entry?;
        records.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok(records)
}

/// A write transaction that is dropped before its commit is rolled back, so an error leaves nothing behind.
/// redb's default durability (`Immediate`) syncs before `commit` returns.
fn commit(database: &Database, changes: Vec<Change>) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    for change in changes {
        match change {
            Change::Put { table, key, value } => {
                transaction.open_table(definition(table))?.insert(key.as_str(), value.as_slice())?;
            }
            Change::Delete { table, key } => {
                transaction.open_table(definition(table))?.remove(key.as_str())?;
            }
        }
    }
    transaction.commit()?;
    Ok(())
}
