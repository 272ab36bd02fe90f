//! Asking boxes what their sessions use: one call for each box, several boxes at once.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::stream;

use a3s_box_core::{BoxId, SessionId};

use super::{BoxManager, not_found, session_object};
use crate::api::SessionUsage;
use crate::boxes::{BoxLife, LiveBox};
use crate::clock::now_ns;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::registry::SessionEntry;
use crate::stats::from_wire;

/// Boxes that are asked at the same time.
const AT_ONCE: usize = 16;

/// Sessions of one box, by id: what a guest says of others is not listened to.
type Wanted = BTreeSet<SessionId>;

impl BoxManager {
    /// What one session uses. One whose box is gone is told as it was last.
    pub async fn session_usage(&self, id: &SessionId) -> Result<SessionUsage, RuntimeError> {
        let entry = self.shared.registry.get_session(id).ok_or_else(|| not_found(&session_object(id)))?;
        let wanted = Wanted::from([id.clone()]);
        let told = self.ask_usage(&entry.box_id, &wanted).await?;
        told.into_iter().next().or_else(|| self.shared.figures.last(id)).ok_or_else(|| {
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
        self.ask_usage(box_id, wanted).await.unwrap_or_else(|error| {
            tracing::warn!(pod_sandbox = box_id.short(), "its containers are left out of a list: {error}");
            Vec::new()
        })
    }

    /// Sessions of a box that is not up are told as they were last.
    async fn ask_usage(&self, box_id: &BoxId, wanted: &Wanted) -> Result<Vec<SessionUsage>, RuntimeError> {
        let figures = &self.shared.figures;
        let Some(live) = self.live(box_id) else {
            return Ok(wanted.iter().filter_map(|id| figures.last(id)).collect());
        };
        let ids = wanted.iter().map(ToString::to_string).collect();
        let answer = match live.agent.stats(ids).await {
            Ok(answer) => answer,
            // It ended while it was asked.
            Err(_) if !self.is_live(box_id, &live) => {
                return Ok(wanted.iter().filter_map(|id| figures.last(id)).collect());
            }
            Err(error) => return Err(error.at(FailedStage::Stats, super::box_object(box_id))),
        };
        let (read_at, now) = (now_ns(), Instant::now());
        let mut told = Vec::with_capacity(wanted.len());
        for id in wanted {
            let said = answer.iter().find(|stats| stats.session_id == id.as_str());
            told.extend(match said {
                Some(stats) => {
                    let usage =
                        from_wire(id.clone(), read_at, stats, figures.last(id), self.scratch_disk(box_id));
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
            BoxLife::Starting | BoxLife::Gone(_) => false,
        }
    }

    fn scratch_disk(&self, box_id: &BoxId) -> PathBuf {
        crate::scratch::disk_of(&self.shared.config.state_dir, box_id)
    }
}

fn session_id(entry: &Arc<SessionEntry>) -> SessionId {
    entry.status.borrow().id.clone()
}
