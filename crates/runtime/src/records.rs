//! What is remembered of boxes and sessions, as JSON in the store.
//!
//! A box's record carries a *ledger*: every host object that the box may hold, written down before the
//! first of them is made. Recovery and teardown work through the ledger; an object that was never made or
//! is already gone counts as released. A session's objects live in the guest and in the VMM's
//! mount namespace, so they end with the box and need no ledger.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use a3s_box_core::image::ResolvedImage;
use a3s_box_core::lifecycle::{BoxPhase, SessionPhase};
use a3s_box_core::network::PodNetwork;
use a3s_box_core::spec::{BoxSpec, DnsSpec, SessionSpec};
use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};
use a3s_box_core::{BoxId, SessionId};
use a3s_box_vmm::{BackendKind, BoxPlan, MachineFacts};

use crate::api::{BoxStatus, Quarantined, ResolvedUser, SessionStatus, Stage};
use crate::clock::now_ns;
use crate::sources::Sources;

const BOXES: Table = Table("boxes");
const SESSIONS: Table = Table("sessions");
/// Records of the others that could not be read, under `TABLE/KEY`.
const QUARANTINE: Table = Table("quarantine");

/// A host object that a box holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum HostObject {
    /// Its directory below the run directory.
    RunDir(PathBuf),
    /// Its directory below the state directory, with the scratch disk.
    StateDir(PathBuf),
    /// A level of the host's cgroups that was missing before it; others may have come to use it.
    CgroupParent(PathBuf),
    /// A cgroup of its processes.
    Cgroup(PathBuf),
    /// What the network adapter made for it.
    Network,
    /// The VMM's processes.
    Vmm,
}

/// A box, as it is remembered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct BoxRecord {
    pub(crate) id: BoxId,
    pub(crate) spec: BoxSpec,
    pub(crate) created_at_ns: i64,
    pub(crate) phase: BoxPhase,
    /// In the order in which they are made; released in reverse.
    pub(crate) ledger: Vec<HostObject>,
    pub(crate) dir: PathBuf,
    pub(crate) network: Option<PodNetwork>,
    pub(crate) plan: Option<BoxPlan>,
    pub(crate) machine: Option<MachineFacts>,
    pub(crate) kernel_release: String,
    pub(crate) timeline: Vec<Stage>,
    /// The names of the EROFS files that were attached below `images/`.
    pub(crate) layers: BTreeSet<String>,
    /// What is attached below `pod/`, and for whom.
    #[serde(default)]
    pub(crate) sources: Sources,
    /// The number that its agent said. 0: it has not said it yet, or the box was booted by a build that did not note it.
    #[serde(default)]
    pub(crate) agent_protocol: u32,
}

impl BoxRecord {
    pub(crate) fn status(&self) -> BoxStatus {
        BoxStatus {
            id: self.id.clone(),
            spec: self.spec.clone(),
            phase: self.phase.clone(),
            created_at_ns: self.created_at_ns,
            ips: self.ips(),
            backend: self
                .machine
                .as_ref()
                .map_or_else(String::new, |facts| backend_word(facts.backend).to_owned()),
            kernel_release: self.kernel_release.clone(),
            vmm_pid: self.machine.as_ref().map(|facts| facts.pid),
            timeline: self.timeline.clone(),
            dir: self.dir.clone(),
        }
    }

    pub(crate) fn ips(&self) -> Vec<IpAddr> {
        self.network.iter().flat_map(PodNetwork::ips).collect()
    }

    /// Its resolver: the pod's own, or else the one that its network knows.
    pub(crate) fn dns(&self) -> Option<&DnsSpec> {
        self.spec.dns.as_ref().or_else(|| self.network.as_ref()?.dns.as_ref())
    }

    /// The host name of the guest.
    pub(crate) fn hostname(&self) -> &str {
        if self.spec.hostname.is_empty() { &self.spec.identity.name } else { &self.spec.hostname }
    }
}

fn backend_word(kind: BackendKind) -> &'static str {
    match kind {
        BackendKind::Libkrun => "libkrun",
        BackendKind::Qemu => "qemu",
    }
}

/// A session, as it is remembered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SessionRecord {
    pub(crate) id: SessionId,
    pub(crate) box_id: BoxId,
    pub(crate) spec: SessionSpec,
    pub(crate) image: ResolvedImage,
    pub(crate) created_at_ns: i64,
    pub(crate) phase: SessionPhase,
    pub(crate) log_path: Option<PathBuf>,
    pub(crate) user: Option<ResolvedUser>,
    pub(crate) pid: Option<u32>,
    /// Names below the share's `pod/` that are this session's alone: of one that was made by a build that did not share
    /// sources among sessions.
    #[serde(default)]
    pub(crate) volumes: Vec<String>,
}

impl SessionRecord {
    pub(crate) fn status(&self) -> SessionStatus {
        SessionStatus {
            id: self.id.clone(),
            box_id: self.box_id.clone(),
            spec: self.spec.clone(),
            image_id: self.image.id.clone(),
            image_digest_ref: self.image.digest_ref.clone(),
            phase: self.phase.clone(),
            created_at_ns: self.created_at_ns,
            log_path: self.log_path.clone(),
            user: self.user.clone(),
            pid: self.pid,
            info: self.info(),
        }
    }

    fn info(&self) -> std::collections::BTreeMap<String, String> {
        let mut info = std::collections::BTreeMap::new();
        info.insert("layers".to_owned(), self.image.layers.len().to_string());
        info.insert("args".to_owned(), self.spec.process.args.join(" "));
        info
    }
}

/// The records, reached from async code.
#[derive(Clone)]
pub(crate) struct Records {
    storage: Arc<dyn Storage>,
}

/// What was found at start.
pub(crate) struct Loaded {
    pub(crate) boxes: Vec<BoxRecord>,
    pub(crate) sessions: Vec<SessionRecord>,
    pub(crate) quarantined: Vec<Quarantined>,
}

impl Records {
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage }
    }

    /// Everything. A record that cannot be read is set apart, so that nothing is done by half of it and nothing of it
    /// is lost.
    pub(crate) async fn load(&self) -> Result<Loaded, StorageError> {
        let storage = self.storage.clone();
        blocking(move || load(storage.as_ref()), "read the records").await
    }

    pub(crate) async fn put_box(&self, record: &BoxRecord) -> Result<(), StorageError> {
        self.put(BOXES, record.id.to_string(), record).await
    }

    pub(crate) async fn delete_box(&self, id: &BoxId) -> Result<(), StorageError> {
        self.commit(Change::Delete { table: BOXES, key: id.to_string() }).await
    }

    pub(crate) async fn put_session(&self, record: &SessionRecord) -> Result<(), StorageError> {
        self.put(SESSIONS, record.id.to_string(), record).await
    }

    pub(crate) async fn delete_session(&self, id: &SessionId) -> Result<(), StorageError> {
        self.commit(Change::Delete { table: SESSIONS, key: id.to_string() }).await
    }

    async fn put(&self, table: Table, key: String, record: &impl Serialize) -> Result<(), StorageError> {
        let value = serde_json::to_vec(record).map_err(|source| StorageError {
            operation: format!("encode {key} for table {}", table.0),
            source: Box::new(source),
        })?;
        self.commit(Change::Put { table, key, value }).await
    }

    async fn commit(&self, change: Change) -> Result<(), StorageError> {
        let storage = self.storage.clone();
        blocking(move || storage.commit(vec![change]), "write a record").await
    }
}

/// The one place where this crate waits for the store's disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
    operation: &str,
) -> Result<T, StorageError> {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(source) => Err(StorageError { operation: operation.to_owned(), source: Box::new(source) }),
    }
}

fn load(storage: &dyn Storage) -> Result<Loaded, StorageError> {
    let mut changes = Vec::new();
    let boxes = parse(BOXES, storage.scan(BOXES)?, &mut changes);
    let sessions = parse(SESSIONS, storage.scan(SESSIONS)?, &mut changes);
    if !changes.is_empty() {
        storage.commit(changes)?;
    }
    let quarantined = storage.scan(QUARANTINE)?.into_iter().map(|(key, value)| {
        serde_json::from_slice(&value).unwrap_or_else(|error| Quarantined {
            record: key,
            error: error.to_string(),
            since_ns: 0,
            content: String::from_utf8_lossy(&value).into_owned(),
        })
    });
    let quarantined: Vec<Quarantined> = quarantined.collect();
    for Quarantined { record, error, .. } in &quarantined {
        tracing::warn!(record, error, "the state store has a record in quarantine");
    }
    Ok(Loaded { boxes, sessions, quarantined })
}

/// The records that can be read. `changes` gets what sets the others apart.
fn parse<R: DeserializeOwned>(table: Table, records: Vec<Record>, changes: &mut Vec<Change>) -> Vec<R> {
    let mut parsed = Vec::with_capacity(records.len());
    for (key, value) in records {
        match serde_json::from_slice(&value) {
            Ok(record) => parsed.push(record),
            Err(error) => {
                let name = format!("{}/{key}", table.0);
                tracing::error!(record = name, %error, "a record cannot be read and is set apart");
                let apart = Quarantined {
                    record: name.clone(),
                    error: error.to_string(),
                    since_ns: now_ns(),
                    content: String::from_utf8_lossy(&value).into_owned(),
                };
                // Strings and numbers are always JSON.
                let value = serde_json::to_vec(&apart).unwrap_or(value);
                changes.push(Change::Put { table: QUARANTINE, key: name, value });
                changes.push(Change::Delete { table, key });
            }
        }
    }
    parsed
}

#[cfg(test)]
mod golden;
