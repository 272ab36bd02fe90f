//! What is left of boxes that are gone, and the attempts to give it back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use a3s_box_core::BoxId;

use super::release::{object, release, remove_orphan};
use crate::api::Leftover;
use crate::clock::now_ns;
use crate::error::{FailedStage, RuntimeError};
use crate::records::BoxRecord;
use crate::shared::Shared;

/// Pauses between attempts; the last one stays.
const PAUSES: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(30), Duration::from_secs(120)];

/// A box that is gone and may still hold something.
pub(crate) enum Owed {
    /// One that never got ready; its ledger says what it holds.
    HalfMade(Box<BoxRecord>),
    /// One that no record knows.
    Orphan(BoxId),
}

impl Owed {
    pub(crate) fn id(&self) -> &BoxId {
        match self {
            Self::HalfMade(record) => &record.id,
            Self::Orphan(id) => id,
        }
    }

    /// Gives back what can be given back. What cannot is noted in [`Leftovers`].
    pub(crate) async fn settle(&mut self, shared: &Shared) -> Result<(), RuntimeError> {
        let settled = match self {
            Self::HalfMade(record) => undo(shared, record).await,
            Self::Orphan(id) => remove_orphan(shared, id).await,
        };
        match &settled {
            Ok(()) => shared.leftovers.cross_out(self.id()),
            Err(error) => {
                tracing::error!(id = %self.id(), %error, "something of a pod sandbox that is gone is left; it will be tried again");
                shared.leftovers.note(self.id(), error);
            }
        }
        settled
    }

    /// Settles until nothing is left or the daemon ends.
    pub(crate) async fn insist(mut self, shared: Arc<Shared>) {
        let last = PAUSES[PAUSES.len() - 1];
        for pause in PAUSES.into_iter().chain(std::iter::repeat(last)) {
            tokio::select! {
                () = shared.closing.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            if self.settle(&shared).await.is_ok() {
                tracing::info!(id = %self.id(), "nothing is left of a pod sandbox that was not given back at once");
                return;
            }
        }
    }
}

async fn undo(shared: &Shared, record: &mut BoxRecord) -> Result<(), RuntimeError> {
    let mut errors = release(shared, record, None, |_| true).await;
    let recorded = match errors.as_slice() {
        [] => shared.records.delete_box(&record.id).await,
        [_, ..] => shared.records.put_box(record).await,
    };
    let name = object(&record.id);
    errors
        .extend(recorded.err().map(|error| RuntimeError::storage(FailedStage::Remove, name.clone(), error)));
    RuntimeError::all_of(FailedStage::Remove, &name, &errors).map_or(Ok(()), Err)
}

/// What could not be given back yet.
#[derive(Default)]
pub(crate) struct Leftovers(Mutex<BTreeMap<BoxId, Leftover>>);

impl Leftovers {
    fn note(&self, id: &BoxId, error: &RuntimeError) {
        let mut all = self.lock();
        let first = || Leftover { id: id.clone(), since_ns: now_ns(), attempts: 0, error: String::new() };
        let leftover = all.entry(id.clone()).or_insert_with(first);
        leftover.attempts += 1;
        leftover.error = error.to_string();
    }

    fn cross_out(&self, id: &BoxId) {
        self.lock().remove(id);
    }

    /// All of them, by id.
    pub(crate) fn list(&self) -> Vec<Leftover> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<BoxId, Leftover>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
