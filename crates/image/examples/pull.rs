//! Pulls images into a directory and prints their records: `pull ROOT REFERENCE…`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};
use a3s_box_image::{ImageStore, ImageStoreConfig};

/// Records that are gone with the process.
#[derive(Default)]
struct Memory(Mutex<BTreeMap<(&'static str, String), Vec<u8>>>);

impl Storage for Memory {
    fn get(&self, table: Table, key: &str) -> Result<Option<Vec<u8>>, StorageError> {
        let records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(records.get(&(table.0, key.to_owned())).cloned())
    }

    fn scan(&self, table: Table) -> Result<Vec<Record>, StorageError> {
        let records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = records.iter().filter(|((name, _), _)| *name == table.0);
        Ok(ours.map(|((_, key), value)| (key.clone(), value.clone())).collect())
    }

    fn commit(&self, changes: Vec<Change>) -> Result<(), StorageError> {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for change in changes {
            match change {
                Change::Put { table, key, value } => records.insert((table.0, key), value),
                Change::Delete { table, key } => records.remove(&(table.0, key)),
            };
        }
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let root = arguments.next().ok_or("usage: pull ROOT REFERENCE…")?;
    let store = ImageStore::open(ImageStoreConfig::new(root), Arc::new(Memory::default()))?;
    for reference in arguments {
        let begun = Instant::now();
        let record = store.pull(&reference, None, None).await?;
        println!("{reference}: {} ms\n{record:#?}", begun.elapsed().as_millis());
        println!("{:#?}", store.resolve(&reference)?);
    }
    Ok(())
}
