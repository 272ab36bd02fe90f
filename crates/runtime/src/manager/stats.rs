//! Asking boxes what they and their sessions use: one call for each box, several boxes at once.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;

use a3s_box_core::network::InterfaceUsage;
use a3s_box_core::{BoxId, SessionId};
use a3s_box_vmm::HostUsage;

use super::{BoxManager, box_object, not_found, session_object};
use crate::api::{BoxUsage, SessionUsage, Usage};
use crate::boxes::{BoxLife, LiveBox};
use crate::clock::now_ns;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::network::NetworkSetting;
use crate::registry::SessionEntry;
use crate::stats::from_wire;

/// Boxes that are asked at the same time.
const AT_ONCE: usize = 16;

/// The longest that a network's figures are waited for.
const NETWORK_LIMIT: Duration = Duration::from_secs(2);

/// Sessions of one box, by id: what a guest says of others is not listened to.
type Wanted = BTreeSet<SessionId>;

/// What is to be told of a box.
#[derive(Default)]
struct Told {
    total: Option<Usage<BoxId>>,
    sessions: Vec<SessionUsage>,
}

impl BoxManager {
    /// What one session uses. One whose box is gone is told as it was last.
    pub async fn session_usage(&self, id: &SessionId) -> Result<SessionUsage, RuntimeError> {
        let entry = self.shared.registry.get_session(id).ok_or_else(|| not_found(&session_object(id)))?;
        let wanted = Wanted::from([id.clone()]);
        let told = self.ask_usage(&entry.box_id, &wanted).await?;
        told.sessions.into_iter().next().or_else(|| self.shared.figures.last(id)).ok_or_else(|| {
            RuntimeError::new(
                ErrorKind::FailedPrecondition,
                FailedStage::Stats,
                session_object(id),
                "its pod sandbox is not running, and nothing was measured while it was",
            )
        })
    }

    /// What those of the sessions use that exist and of which something is known. A box that does not answer in time costs
    /// its own sessions their place, and no others.
    pub async fn list_session_usage(&self, ids: &HashSet<SessionId>) -> Vec<SessionUsage> {
        let entries = self.shared.registry.sessions();
        self.shared.figures.retain(&entries.iter().map(session_id).collect());
        let mut boxes: BTreeMap<BoxId, Wanted> = BTreeMap::new();
        for entry in &entries {
            let id = session_id(entry);
            if ids.contains(&id) {
                boxes.entry(entry.box_id.clone()).or_default().insert(id);
            }
        }
        let asked = stream::iter(boxes)
            .map(|(box_id, wanted)| async move { self.usage_or_nothing(&box_id, &wanted).await });
        asked.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await.concat()
    }

    async fn usage_or_nothing(&self, box_id: &BoxId, wanted: &Wanted) -> Vec<SessionUsage> {
        let told = self.ask_usage(box_id, wanted).await;
        told.map(|told| told.sessions).unwrap_or_else(|error| {
            tracing::warn!(pod_sandbox = box_id.short(), "its containers are left out of a list: {error}");
            Vec::new()
        })
    }

    /// What a box and its sessions use. One that is not up is told as it was last.
    pub async fn box_usage(&self, id: &BoxId) -> Result<BoxUsage, RuntimeError> {
        let entry = self.shared.registry.get_box(id).ok_or_else(|| not_found(&box_object(id)))?;
        let wanted: Wanted = self.list_sessions_of(&entry.id).into_iter().map(|state| state.id).collect();
        let (told, network, host) = tokio::join!(
            self.ask_usage(&entry.id, &wanted),
            self.ask_network(&entry.id),
            self.ask_host(&entry.id)
        );
        let told = told?;
        if told.total.is_none() && told.sessions.is_empty() && self.live(&entry.id).is_none() {
            return Err(RuntimeError::new(
                ErrorKind::FailedPrecondition,
                FailedStage::Stats,
                box_object(&entry.id),
                "it is not running, and nothing was measured while it was",
            ));
        }
        let at_ns = told.total.as_ref().map_or_else(now_ns, |total| total.at_ns);
        let (id, sessions) = (entry.id.clone(), told.sessions);
        Ok(BoxUsage { id, at_ns, total: told.total, network, host, sessions })
    }

    async fn ask_host(&self, box_id: &BoxId) -> Option<HostUsage> {
        self.live(box_id)?.machine.host_usage().await
    }

    /// What those of the boxes use that exist and of which something is known, oldest first. One that does not answer in
    /// time is left out.
    pub async fn list_box_usage(&self, ids: &HashSet<BoxId>) -> Vec<BoxUsage> {
        let boxes: Vec<BoxId> = self.list_boxes().into_iter().map(|state| state.id).collect();
        self.shared.box_figures.retain(&boxes.iter().cloned().collect());
        let chosen = boxes.into_iter().filter(|id| ids.contains(id));
        let asked = stream::iter(chosen).map(|id| async move {
            let usage = self.box_usage(&id).await;
            usage
                .inspect_err(|error| {
                    tracing::warn!(pod_sandbox = id.short(), "it is left out of a list: {error}");
                })
                .ok()
        });
        asked.buffered(AT_ONCE).filter_map(std::future::ready).collect().await
    }

    /// A network that cannot be asked costs the pod its place in this table only.
    async fn ask_network(&self, box_id: &BoxId) -> Vec<InterfaceUsage> {
        let NetworkSetting::Pods(pods) = &self.shared.config.network else { return Vec::new() };
        let Some(live) = self.live(box_id) else { return Vec::new() };
        let Some(network) = &live.network else { return Vec::new() };
        let asked = tokio::time::timeout(NETWORK_LIMIT, pods.usage(network)).await;
        let problem = match asked {
            Ok(Ok(usage)) => return usage,
            Ok(Err(fault)) => fault.to_string(),
            Err(_) => format!("no answer within {NETWORK_LIMIT:?}"),
        };
        if self.is_live(box_id, &live) {
            tracing::warn!(pod_sandbox = box_id.short(), "its traffic is not known: {problem}");
        }
        Vec::new()
    }

    /// What is not up is told as it was last.
    async fn ask_usage(&self, box_id: &BoxId, wanted: &Wanted) -> Result<Told, RuntimeError> {
        let (figures, box_figures) = (&self.shared.figures, &self.shared.box_figures);
        let last = || Told {
            total: box_figures.last(box_id),
            sessions: wanted.iter().filter_map(|id| figures.last(id)).collect(),
        };
        let Some(live) = self.live(box_id) else { return Ok(last()) };
        let ids = wanted.iter().map(ToString::to_string).collect();
        let answer = match live.agent.stats(ids).await {
            Ok(answer) => answer,
            // It ended while it was asked.
            Err(_) if !self.is_live(box_id, &live) => return Ok(last()),
            Err(error) => return Err(error.at(FailedStage::Stats, box_object(box_id))),
        };
        let (read_at, now, disk) = (now_ns(), Instant::now(), self.scratch_disk(box_id));
        let mut told = Told::default();
        if let Some(said) = &answer.pod {
            let usage = from_wire(box_id.clone(), read_at, said, box_figures.last(box_id), disk.clone());
            // It has no layer of its own.
            let usage = Usage { writable_layer: None, ..usage };
            told.total = Some(box_figures.update(usage, now));
        }
        for id in wanted {
            let said = answer.sessions.iter().find(|stats| stats.session_id == id.as_str());
            told.sessions.extend(match said {
                Some(stats) => {
                    let usage = from_wire(id.clone(), read_at, stats, figures.last(id), disk.clone());
                    Some(figures.update(usage, now))
                }
                // It is being created or removed.
                None => figures.last(id),
            });
        }
        Ok(told)
    }

    fn is_live(&self, box_id: &BoxId, live: &Arc<LiveBox>) -> bool {
        let Some(entry) = self.shared.registry.get_box(box_id) else { return false };
        let life = entry.life.borrow();
        match &*life {
            BoxLife::Live(now) => Arc::ptr_eq(now, live),
            BoxLife::Starting | BoxLife::Foreign(_) | BoxLife::Gone(_) => false,
        }
    }

    fn scratch_disk(&self, box_id: &BoxId) -> PathBuf {
        crate::scratch::disk_of(&self.shared.config.state_dir, box_id)
    }
}

fn session_id(entry: &Arc<SessionEntry>) -> SessionId {
    entry.status.borrow().id.clone()
}
