//! What every driver task can reach.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use a3s_box_core::{BoxId, SessionId};
use a3s_box_vmm::Vmm;

use crate::boxes::Leftovers;
use crate::config::RuntimeConfig;
use crate::events::Events;
use crate::log::Sink;
use crate::records::{Records, SessionRecord};
use crate::registry::Registry;
use crate::scratch::Scratches;
use crate::stats::Figures;

/// The runtime's parts, shared by its tasks.
pub(crate) struct Shared {
    pub(crate) config: RuntimeConfig,
    pub(crate) records: Records,
    pub(crate) vmm: Arc<dyn Vmm>,
    pub(crate) scratches: Scratches,
    pub(crate) registry: Registry,
    pub(crate) figures: Figures<SessionId>,
    pub(crate) box_figures: Figures<BoxId>,
    pub(crate) events: Events,
    pub(crate) leftovers: Leftovers,
    /// What the network had to complain of boxes that were taken up.
    pub(crate) network_complaints: Mutex<HashMap<BoxId, String>>,
    /// Guests that may boot at once; the others wait in the order in which they came.
    pub(crate) boots: Arc<Semaphore>,
    pub(crate) tasks: TaskTracker,
    /// The daemon ends: tasks stop where they are, boxes run on.
    pub(crate) closing: CancellationToken,
}

impl Shared {
    /// Where the position of a session's log is recorded.
    pub(crate) fn log_record(&self, id: &SessionId) -> std::path::PathBuf {
        self.log_records().join(id.as_str())
    }

    /// The directory of those records.
    pub(crate) fn log_records(&self) -> std::path::PathBuf {
        self.config.run_dir.join("log-positions")
    }

    /// Where a session's output goes.
    pub(crate) fn sink(&self, record: &SessionRecord) -> Sink {
        match &record.log_path {
            Some(path) => Sink::File { path: path.clone(), record: self.log_record(&record.id) },
            None => Sink::Discard,
        }
    }
}
