//! What a box holds, written down before it is made.
//!
//! One JSON file per box. It carries the network configuration that was used, so that DEL undoes what
//! ADD did even if the operator has changed the configuration since.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use a3s_box_core::BoxId;
use a3s_box_core::egress::EgressPolicy;
use a3s_box_core::network::PodNetwork;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use crate::cni::{Attachment, NetworkList};
use crate::local::LocalConfig;
use crate::turns::Turn;

const SCHEMA: u32 = 1;

/// Why a record cannot be kept or read.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The file system refused.
    #[error("network record {}: cannot {step}", path.display())]
    Io {
        /// The record.
        path: PathBuf,
        /// What was tried, as a verb phrase.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no record, or one of another version.
    #[error("network record {} cannot be understood", path.display())]
    Unreadable {
        /// The record.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It was written by a newer version of this program.
    #[error("network record {} has schema {found}, this version knows up to {SCHEMA}", path.display())]
    Newer {
        /// The record.
        path: PathBuf,
        /// Its schema.
        found: u32,
    },
}

/// What one box holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    schema: u32,
    pub(crate) netns: PathBuf,
    /// `None`: the box has no network.
    pub(crate) connection: Option<Connection>,
    /// Where the box may open connections to; `None`, as in older records: everywhere.
    #[serde(default)]
    pub(crate) egress: Option<EgressPolicy>,
    /// Present once set-up has succeeded.
    pub(crate) network: Option<PodNetwork>,
}

/// Who connected the box. Records from before the local network say CNI, without a word for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Connection {
    Cni(CniConnection),
    Local {
        /// As it was then, so that a change of settings strands no box.
        local: LocalConfig,
    },
}

/// The CNI side of a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CniConnection {
    pub(crate) list: NetworkList,
    pub(crate) attachment: Attachment,
    /// ADD's result, once there is one.
    pub(crate) result: Option<Value>,
}

impl Record {
    pub(crate) fn intent(netns: PathBuf, connection: Option<Connection>) -> Self {
        Self { schema: SCHEMA, netns, connection, egress: None, network: None }
    }
}

/// All records of a daemon.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    dir: PathBuf,
}

impl Records {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn path(&self, id: &BoxId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    /// Replaces the record of `id`; after a crash it is either the old or the new one.
    pub(crate) async fn write(&self, id: &BoxId, record: &Record, turn: &Turn) -> Result<(), RecordError> {
        let path = self.path(id);
        let bytes = serde_json::to_vec(record)
            .map_err(|source| RecordError::Unreadable { path: path.clone(), source })?;
        blocking(&self.path(id), Some(turn), move || write(&path, &bytes)).await?
    }

    /// The record of `id`, if there is one.
    pub(crate) async fn read(&self, id: &BoxId) -> Result<Option<Record>, RecordError> {
        let path = self.path(id);
        blocking(&self.path(id), None, move || read(&path)).await?
    }

    /// Forgets `id`.
    pub(crate) async fn remove(&self, id: &BoxId, turn: &Turn) -> Result<(), RecordError> {
        let path = self.path(id);
        blocking(&self.path(id), Some(turn), move || remove(&path)).await?
    }

    /// Every box that has a record.
    pub(crate) async fn ids(&self) -> Result<Vec<BoxId>, RecordError> {
        let dir = self.dir.clone();
        blocking(&self.dir, None, move || ids(&dir)).await?
    }
}

/// What changes something carries its turn, so that it cannot happen after the next operation has begun.
async fn blocking<T, F>(path: &Path, turn: Option<&Turn>, work: F) -> Result<T, RecordError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let turn = turn.cloned();
    let joined = tokio::task::spawn_blocking(move || {
        let done = work();
        drop(turn);
        done
    })
    .await;
    joined.map_err(|e| io_error(path, "run the file operation", io::Error::other(e)))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), RecordError> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(|e| io_error(path, "make its directory", e))?;
    }
    replace(path, bytes).map_err(|e| io_error(path, "write it", e))
}

/// Replaces a file; after a crash it is either the old or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = unfinished(path);
    let stored = File::create(&new).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_data()?;
        fs::rename(&new, path)
    });
    stored.inspect_err(|_| {
        // Half a file nobody will ask for; the error says what matters.
        let _ = fs::remove_file(&new);
    })
}

fn read(path: &Path) -> Result<Option<Record>, RecordError> {
    let bytes = match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| io_error(path, "read it", e))?,
    };
    let unreadable = |source| RecordError::Unreadable { path: path.to_owned(), source };
    let value: Value = serde_json::from_slice(&bytes).map_err(unreadable)?;
    match value.get("schema").and_then(Value::as_u64) {
        Some(found) if found > u64::from(SCHEMA) => {
            Err(RecordError::Newer { path: path.to_owned(), found: u32::try_from(found).unwrap_or(u32::MAX) })
        }
        _ => serde_json::from_value(value).map(Some).map_err(unreadable),
    }
}

/// Where a record is written before it is one. A process that was killed meanwhile leaves it.
fn unfinished(path: &Path) -> PathBuf {
    path.with_extension("new")
}

fn remove(path: &Path) -> Result<(), RecordError> {
    for file in [unfinished(path), path.to_owned()] {
        match fs::remove_file(&file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error(&file, "remove it", e)),
            _ => {}
        }
    }
    Ok(())
}

fn ids(dir: &Path) -> Result<Vec<BoxId>, RecordError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| io_error(dir, "list the directory", e))?,
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| io_error(dir, "list the directory", e))?.file_name();
        let id = name.to_str().and_then(|n| n.strip_suffix(".json")).and_then(|n| n.parse().ok());
        ids.extend(id);
    }
    ids.sort();
    Ok(ids)
}

fn io_error(path: &Path, step: &'static str, source: io::Error) -> RecordError {
    RecordError::Io { path: path.to_owned(), step, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::turns::Turns;

    #[tokio::test]
    async fn a_record_is_found_again_and_a_strange_file_is_not_taken_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("cni"));
        let id = BoxId::from_random([7; 32]);
        assert_eq!(records.ids().await.unwrap(), []);
        let turn = Turns::default().take(&id).await;
        let record = Record::intent("/run/netns/x".into(), None);
        records.write(&id, &record, &turn).await.unwrap();
        fs::write(dir.path().join("cni/notes.json"), "{}").unwrap();
        assert_eq!(records.read(&id).await.unwrap(), Some(record));
        assert_eq!(records.ids().await.unwrap(), std::slice::from_ref(&id));
        records.remove(&id, &turn).await.unwrap();
        records.remove(&id, &turn).await.unwrap();
        assert_eq!(records.read(&id).await.unwrap(), None);
    }

    #[test]
    fn records_from_before_the_local_network_are_cni_and_new_ones_tell_both_apart() {
        let old = r#"{"schema":1,"netns":"/n","connection":{"list":{"name":"n","version":"1.0.0","plugins":[],"source":"/c"},
            "attachment":{"container_id":"x","netns":"/n","interface":"eth0","args":"","capabilities":{}},"result":null},"network":null}"#;
        let old: Record = serde_json::from_str(old).unwrap();
        assert!(matches!(&old.connection, Some(Connection::Cni(cni)) if cni.list.name == "n"));
        let local = Some(Connection::Local { local: LocalConfig::default() });
        for record in [old, Record::intent("/n".into(), local), Record::intent("/n".into(), None)] {
            let text = serde_json::to_string(&record).unwrap();
            assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record, "{text}");
        }
    }

    #[tokio::test]
    async fn records_that_are_torn_or_newer_are_errors_and_not_taken_for_absent() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        let id = BoxId::from_random([7; 32]);
        fs::write(records.path(&id), "{\"schema\":1,\"netns\":").unwrap();
        assert!(matches!(records.read(&id).await, Err(RecordError::Unreadable { .. })));
        fs::write(records.path(&id), "{\"schema\":9}").unwrap();
        assert!(matches!(records.read(&id).await, Err(RecordError::Newer { found: 9, .. })));
    }
}

#[cfg(test)]
mod golden;
