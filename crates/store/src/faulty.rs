//! A store that fails when it is told to: the seam through which tests of every owner inject faults.

use std::sync::Mutex;

use thiserror::Error;

use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};

/// The error of a call that was made to fail.
#[derive(Debug, Error)]
#[error("injected fault at call {call}")]
pub struct Injected {
    /// Which call it was, counted from 1.
    pub call: usize,
}

#[derive(Debug, Default)]
struct Countdown {
    calls: usize,
    fail_at: Option<usize>,
}

/// Passes every call on to an inner store, except the one that is to fail. A commit that fails
/// changes nothing, as the seam promises.
#[derive(Debug)]
pub struct FaultyStore<S> {
    inner: S,
    countdown: Mutex<Countdown>,
}

impl<S: Storage> FaultyStore<S> {
    /// Never fails until [`FaultyStore::fail_at`] says so.
    pub fn new(inner: S) -> Self {
        Self { inner, countdown: Mutex::default() }
    }

    /// Counts calls anew and fails the `call`-th from now, counted from 1.
    pub fn fail_at(&self, call: usize) {
        *self.lock() = Countdown { calls: 0, fail_at: Some(call) };
    }

    /// Fails nothing from now on. Answers how many calls there were since the last [`FaultyStore::fail_at`].
    pub fn heal(&self) -> usize {
        std::mem::take(&mut *self.lock()).calls
    }

    fn count(&self, operation: &str) -> Result<(), StorageError> {
        let mut countdown = self.lock();
        countdown.calls += 1;
        let call = countdown.calls;
        if countdown.fail_at == Some(call) {
            return Err(StorageError {
                operation: operation.to_owned(),
                source: Box::new(Injected { call }),
            });
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Countdown> {
        self.countdown.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl<S: Storage> Storage for FaultyStore<S> {
    fn get(&self, table: Table, key: &str) -> Result<Option<Vec<u8>>, StorageError> {
        self.count("read a record")?;
        self.inner.get(table, key)
    }

    fn scan(&self, table: Table) -> Result<Vec<Record>, StorageError> {
        self.count("read a table")?;
        self.inner.scan(table)
    }

    fn commit(&self, changes: Vec<Change>) -> Result<(), StorageError> {
        self.count("write changes")?;
        self.inner.commit(changes)
    }
}
