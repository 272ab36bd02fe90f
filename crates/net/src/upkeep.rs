//! What is done for the network as a whole, and for pods that are connected: GC and CHECK.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use a3s_box_core::BoxId;
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};

use crate::cni::{Chain, ConfError, NetworkList, PluginError, ValidAttachment, conf};
use crate::config::NetMode;
use crate::exclusion::Pass;
use crate::names;
use crate::pods::PodNetworking;
use crate::record::{Connection, RecordError, Records};

/// How long a GC may take altogether: set-ups and teardowns wait for it.
const GC_LIMIT: Duration = Duration::from_secs(30);
/// How long a moment is waited for in which no plugin runs.
const QUIET_LIMIT: Duration = Duration::from_secs(600);
const QUIET_POLL: Duration = Duration::from_millis(500);
/// How long one plugin may take for CHECK: a teardown of the pod waits for it.
const CHECK_LIMIT: Duration = Duration::from_secs(10);

/// Why the network was not relieved of what belongs to nobody.
#[derive(Debug, Error)]
pub enum GcError {
    /// The node has no usable network configuration.
    #[error(transparent)]
    Configuration(#[from] ConfError),
    /// Which attachments are valid is not known. With too short a list plugins would take addresses from living pods.
    #[error("what pods hold cannot be listed")]
    Records(#[from] RecordError),
    /// The lock file cannot be used.
    #[error("cannot lock {} against set-ups and teardowns", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There was no moment without a set-up or teardown.
    #[error("for {QUIET_LIMIT:?} there was always a set-up or teardown under way")]
    NeverQuiet,
    /// It was ended.
    #[error("network {network:?}: the garbage collection took longer than {GC_LIMIT:?} and was ended")]
    TimedOut {
        /// The network's name.
        network: String,
    },
    /// Plugins failed.
    #[error("network {network:?}: {}", list(errors))]
    Plugins {
        /// The network's name.
        network: String,
        /// In their order.
        errors: Vec<PluginError>,
    },
}

fn list(errors: &[PluginError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// What is wrong with a pod's network.
#[derive(Debug, Error)]
pub enum CheckError {
    /// A plugin says so, or cannot be asked.
    #[error(transparent)]
    Plugin(#[from] PluginError),
    /// The pod's record cannot be read.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl PodNetworking {
    /// Has the plugins of the node's network release what belongs to no pod. Waits for a moment in which no
    /// plugin runs. Networks that do not know GC, or have it disabled, are left alone.
    pub async fn collect_garbage(&self) -> Result<(), GcError> {
        if self.config.mode != NetMode::Cni {
            return Ok(());
        }
        let list = match conf::discover(&self.config.conf_dir) {
            Err(ConfError::Missing { .. }) => return Ok(()),
            other => other?,
        };
        let chain = Chain { list: &list, bin_dirs: &self.config.bin_dirs, limit: self.config.plugin_timeout };
        if !chain.knows_gc() {
            return Ok(());
        }
        let _alone = self.quiet().await?;
        let valid = self.valid_attachments(&list).await?;
        let network = || list.name.clone();
        let errors = timeout(GC_LIMIT, chain.gc(&valid)).await;
        match errors.map_err(|_| GcError::TimedOut { network: network() })? {
            errors if errors.is_empty() => {
                tracing::info!(network = list.name, attachments = valid.len(), "CNI garbage was collected");
                Ok(())
            }
            errors => Err(GcError::Plugins { network: network(), errors }),
        }
    }

    async fn quiet(&self) -> Result<Pass, GcError> {
        let deadline = Instant::now() + QUIET_LIMIT;
        let path = || self.config.gc_lock.clone();
        while Instant::now() < deadline {
            match self.exclusion.alone().map_err(|source| GcError::Lock { path: path(), source })? {
                Some(pass) => return Ok(pass),
                None => sleep(QUIET_POLL).await,
            }
        }
        Err(GcError::NeverQuiet)
    }

    /// Those of this instance and of the others that it knows. A record that cannot be read counts for this network: it may.
    async fn valid_attachments(&self, list: &NetworkList) -> Result<Vec<ValidAttachment>, GcError> {
        let mut valid = attachments(&self.records, list).await?;
        for dir in other_caches(&self.config.other_caches)? {
            valid.extend(attachments(&Records::new(dir), list).await?);
        }
        valid.sort();
        Ok(valid)
    }

    /// Whether a pod is still connected as it was, according to its plugins. What cannot be checked is in order: a pod
    /// that CNI did not connect, a network that does not know CHECK or has it disabled.
    pub async fn check(&self, box_id: &BoxId) -> Result<(), CheckError> {
        let _turn = self.turns.take(box_id).await;
        let Some(record) = self.records.read(box_id).await? else { return Ok(()) };
        let (Some(Connection::Cni(connection)), Some(_)) = (record.connection, record.network) else {
            return Ok(());
        };
        let limit = self.config.plugin_timeout.min(CHECK_LIMIT);
        let chain = Chain { list: &connection.list, bin_dirs: &self.config.bin_dirs, limit };
        match connection.result.filter(|_| chain.knows_check()) {
            Some(result) => Ok(chain.check(&connection.attachment, &result).await?),
            None => Ok(()),
        }
    }
}

async fn attachments(records: &Records, list: &NetworkList) -> Result<Vec<ValidAttachment>, RecordError> {
    let mut valid = Vec::new();
    for id in records.ids().await? {
        match records.read(&id).await {
            Ok(Some(record)) => match record.connection {
                Some(Connection::Cni(cni)) if cni.list.name == list.name => valid.push(ValidAttachment {
                    container_id: cni.attachment.container_id,
                    interface: cni.attachment.interface,
                }),
                Some(Connection::Cni(_) | Connection::Local { .. }) | None => {}
            },
            Ok(None) => {}
            Err(_) => valid.push(ValidAttachment {
                container_id: names::container_id(&id).to_owned(),
                interface: names::INTERFACE.to_owned(),
            }),
        }
    }
    Ok(valid)
}

/// `<parent>/*/cni`
fn other_caches(parent: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let io_error = |source| RecordError::Io { path: parent.to_owned(), step: "list the directory", source };
    match fs::read_dir(parent) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries
            .map_err(io_error)?
            .map(|entry| entry.map(|entry| entry.path().join("cni")).map_err(io_error))
            .collect(),
    }
}
