//! Who exists: boxes and sessions by id and by name.
//!
//! A name is taken when its owner is entered and free again when the owner is removed; nothing in
//! between keeps it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use a3s_box_core::lifecycle::SessionPhase;
use a3s_box_core::spec::{BoxSpec, PodIdentity};
use a3s_box_core::{BoxId, SessionId};

use crate::api::{BoxStatus, SessionStatus};
use crate::boxes::{BoxCommand, BoxLife};
use crate::error::RuntimeError;
use crate::sessions::SessionCommand;

/// How the making of a box or session went; `None` while it goes on.
pub(crate) type Outcome = Option<Result<(), RuntimeError>>;

/// The reply of a driver.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, RuntimeError>>;

/// A box, as others reach it.
pub(crate) struct BoxEntry {
    pub(crate) id: BoxId,
    pub(crate) spec: BoxSpec,
    pub(crate) commands: mpsc::Sender<BoxCommand>,
    pub(crate) status: watch::Receiver<BoxStatus>,
    pub(crate) life: watch::Receiver<BoxLife>,
    pub(crate) outcome: watch::Receiver<Outcome>,
    /// Ends a start that is under way.
    pub(crate) cancel: CancellationToken,
}

/// A session, as others reach it.
pub(crate) struct SessionEntry {
    pub(crate) box_id: BoxId,
    pub(crate) commands: mpsc::Sender<SessionCommand>,
    pub(crate) status: watch::Receiver<SessionStatus>,
    pub(crate) outcome: watch::Receiver<Outcome>,
}

/// Whether a name could be taken.
pub(crate) enum Entered<E> {
    /// It is the caller's.
    New,
    /// It is another's.
    Taken(E),
}

/// Whether a session could be entered.
pub(crate) enum EnteredSession {
    /// It is the caller's.
    New,
    /// Another has its name and attempt.
    Taken(Arc<SessionEntry>),
    /// Another attempt of its name still runs in the box.
    Rival(Box<SessionStatus>),
}

/// How many ids start with a text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Matches<I> {
    None,
    One(I),
    Many,
}

type SessionName = (BoxId, String, u32);

#[derive(Default)]
struct Maps {
    boxes: BTreeMap<BoxId, Arc<BoxEntry>>,
    box_names: HashMap<PodIdentity, BoxId>,
    sessions: BTreeMap<SessionId, Arc<SessionEntry>>,
    session_names: HashMap<SessionName, SessionId>,
}

impl Maps {
    fn rival(&self, (boxed, name, _): &SessionName) -> Option<SessionStatus> {
        self.sessions.values().filter(|entry| entry.box_id == *boxed).find_map(|entry| {
            let status = entry.status.borrow();
            let runs = matches!(status.phase, SessionPhase::Running { .. });
            (runs && status.spec.name == *name).then(|| status.clone())
        })
    }
}

/// The boxes and sessions of this node.
#[derive(Default)]
pub(crate) struct Registry(Mutex<Maps>);

impl Registry {
    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a box unless another has its identity.
    pub(crate) fn enter_box(&self, entry: Arc<BoxEntry>) -> Entered<Arc<BoxEntry>> {
        let mut maps = self.maps();
        let identity = &entry.spec.identity;
        if let Some(other) = maps.box_names.get(identity).and_then(|id| maps.boxes.get(id)) {
            return Entered::Taken(other.clone());
        }
        maps.box_names.insert(identity.clone(), entry.id.clone());
        maps.boxes.insert(entry.id.clone(), entry);
        Entered::New
    }

    pub(crate) fn leave_box(&self, id: &BoxId) {
        let mut maps = self.maps();
        if let Some(entry) = maps.boxes.remove(id) {
            maps.box_names.remove(&entry.spec.identity);
        }
    }

    /// Enters a session unless another has its name and attempt in the box, or is another attempt of it that runs: two
    /// of one container at once are nobody's wish, but what a client asks for that has overlooked the first.
    pub(crate) fn enter_session(&self, entry: Arc<SessionEntry>) -> EnteredSession {
        let mut maps = self.maps();
        let (id, name) = names(&entry);
        if let Some(other) = maps.session_names.get(&name).and_then(|id| maps.sessions.get(id)) {
            return EnteredSession::Taken(other.clone());
        }
        if let Some(rival) = maps.rival(&name) {
            return EnteredSession::Rival(Box::new(rival));
        }
        maps.session_names.insert(name, id.clone());
        maps.sessions.insert(id, entry);
        EnteredSession::New
    }

    /// Enters a session of an earlier daemon, whatever else there is.
    pub(crate) fn enter_known_session(&self, entry: Arc<SessionEntry>) {
        let mut maps = self.maps();
        let (id, name) = names(&entry);
        maps.session_names.insert(name, id.clone());
        maps.sessions.insert(id, entry);
    }

    pub(crate) fn leave_session(&self, id: &SessionId) {
        let mut maps = self.maps();
        if let Some(entry) = maps.sessions.remove(id) {
            maps.session_names.remove(&names(&entry).1);
        }
    }

    pub(crate) fn get_box(&self, id: &BoxId) -> Option<Arc<BoxEntry>> {
        self.maps().boxes.get(id).cloned()
    }

    pub(crate) fn get_session(&self, id: &SessionId) -> Option<Arc<SessionEntry>> {
        self.maps().sessions.get(id).cloned()
    }

    pub(crate) fn boxes(&self) -> Vec<Arc<BoxEntry>> {
        self.maps().boxes.values().cloned().collect()
    }

    pub(crate) fn sessions(&self) -> Vec<Arc<SessionEntry>> {
        self.maps().sessions.values().cloned().collect()
    }

    pub(crate) fn sessions_of(&self, id: &BoxId) -> Vec<Arc<SessionEntry>> {
        self.maps().sessions.values().filter(|entry| entry.box_id == *id).cloned().collect()
    }

    pub(crate) fn match_box(&self, prefix: &str) -> Matches<BoxId> {
        pick(self.maps().boxes.keys(), BoxId::as_str, prefix)
    }

    pub(crate) fn match_session(&self, prefix: &str) -> Matches<SessionId> {
        pick(self.maps().sessions.keys(), SessionId::as_str, prefix)
    }
}

fn names(entry: &SessionEntry) -> (SessionId, SessionName) {
    let status = entry.status.borrow();
    (status.id.clone(), (entry.box_id.clone(), status.spec.name.clone(), status.spec.attempt))
}

/// An empty text names nothing, rather than everything.
fn pick<'a, I: Clone + 'a>(
    ids: impl Iterator<Item = &'a I>,
    text: fn(&I) -> &str,
    prefix: &str,
) -> Matches<I> {
    let mut found = ids.filter(|id| !prefix.is_empty() && text(id).starts_with(prefix));
    match (found.next(), found.next()) {
        (None, _) => Matches::None,
        (Some(id), None) => Matches::One(id.clone()),
        (Some(_), Some(_)) => Matches::Many,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_must_name_one_thing() {
        let ids: Vec<BoxId> = [[0x11; 32], [0x12; 32]].map(BoxId::from_random).into();
        let pick = |prefix| pick(ids.iter(), BoxId::as_str, prefix);
        assert_eq!(pick("11"), Matches::One(ids[0].clone()));
        assert_eq!(pick(ids[1].as_str()), Matches::One(ids[1].clone()));
        assert_eq!(pick("1"), Matches::Many);
        assert_eq!(pick("2"), Matches::None);
        assert_eq!(pick(""), Matches::None);
    }
}
