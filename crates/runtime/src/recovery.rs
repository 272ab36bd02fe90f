//! What a daemon does about the boxes of the one before it.
//!
//! | record says            | VM runs                     | VM is gone                 |
//! |------------------------|-----------------------------|----------------------------|
//! | reserved … booting     | undone: nobody knows its id | undone                     |
//! | ready                  | taken up, agent asked       | stopped, with its cause    |
//! | stopping               | stopped for good            | stopped for good           |
//! | stopped                | as it is                    | as it is                   |

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::oneshot;

use a3s_box_core::lifecycle::{BoxPhase, StopCause};
use a3s_box_core::{BoxId, SessionId};
use a3s_box_protocol::proto::SessionState;
use a3s_box_vmm::{guest_fault, last_words};

use crate::agent_client::Agent;
use crate::api::Quarantined;
use crate::boxes::{
    BoxCommand, BoxStart, LiveBox, Obituary, Owed, faulted, find_vm, forget_unknown_holders, found,
};
use crate::error::{FailedStage, RuntimeError};
use crate::manager::{prepare_box, prepare_session};
use crate::network::NetworkSetting;
use crate::records::{BoxRecord, SessionRecord};
use crate::registry::BoxEntry;
use crate::sessions::{BoxFacts, SessionStart};
use crate::shared::Shared;
use crate::text::{MESSAGE_LIMIT, printable};

/// Boxes that are looked at side by side.
const PARALLEL: usize = 16;

/// The longest until an agent has said which sessions it has. One that does not answer in this time is asked
/// again by everybody who needs it.
const LIST_LIMIT: Duration = Duration::from_secs(10);

/// Brings the registry to what is found. Fails only if the records cannot be read.
pub(crate) async fn recover(shared: &Arc<Shared>) -> Result<Vec<Quarantined>, RuntimeError> {
    let failed = |error| RuntimeError::storage(FailedStage::Lookup, "the state store", error);
    let loaded = shared.records.load().await.map_err(failed)?;
    let known: HashSet<BoxId> = loaded.boxes.iter().map(|record| record.id.clone()).collect();
    let orphans = found(shared).await.into_iter().filter(|id| !known.contains(id)).map(Owed::Orphan);
    settle_all(shared, orphans).await;
    remove_positions(shared, loaded.sessions.iter().map(|record| record.id.clone()).collect()).await;
    let mut sessions: HashMap<BoxId, Vec<SessionRecord>> = HashMap::new();
    for session in loaded.sessions {
        sessions.entry(session.box_id.clone()).or_default().push(session);
    }
    let work = loaded.boxes.into_iter().map(|record| {
        let sessions = sessions.remove(&record.id).unwrap_or_default();
        recover_box(shared, record, sessions)
    });
    let work: Vec<_> = work.collect();
    futures::stream::iter(work).buffer_unordered(PARALLEL).collect::<Vec<()>>().await;
    for orphan in sessions.into_values().flatten() {
        tracing::warn!(id = %orphan.id, pod = %orphan.box_id, "the record of a container whose pod sandbox is unknown is removed");
        forget_session(shared, &orphan).await;
    }
    Ok(loaded.quarantined)
}

/// Gives back what is owed, or goes on trying while the daemon serves.
async fn settle_all(shared: &Arc<Shared>, all: impl Iterator<Item = Owed>) {
    let work: Vec<_> = all.map(|owed| settle(shared, owed)).collect();
    futures::stream::iter(work).buffer_unordered(PARALLEL).collect::<Vec<()>>().await;
}

async fn settle(shared: &Arc<Shared>, mut owed: Owed) {
    match owed.settle(shared).await {
        Ok(()) => {
            tracing::warn!(id = %owed.id(), "a pod sandbox that was half made, or that no record knows, is gone")
        }
        Err(_) => drop(shared.tasks.spawn(owed.insist(shared.clone()))),
    }
}

/// Removes where the logs of containers had come to that no record knows.
async fn remove_positions(shared: &Shared, known: HashSet<SessionId>) {
    let dir = shared.log_records();
    let swept = tokio::task::spawn_blocking(move || {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let id = entry.file_name().to_str().and_then(|name| name.parse::<SessionId>().ok());
            if id.is_some_and(|id| !known.contains(&id)) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok::<_, std::io::Error>(())
    });
    if let Ok(Err(error)) = swept.await {
        tracing::warn!(%error, "where the logs of unknown containers had come to was not removed");
    }
}

async fn recover_box(shared: &Arc<Shared>, record: BoxRecord, sessions: Vec<SessionRecord>) {
    match record.phase.clone() {
        BoxPhase::Reserved | BoxPhase::Prepared | BoxPhase::Booting => undo(shared, record, sessions).await,
        BoxPhase::Ready => adopt(shared, record, sessions).await,
        BoxPhase::Stopping => {
            let boxed =
                enter(shared, record, BoxStart::Ended(Obituary::of(StopCause::Requested)), sessions, None);
            finish_stop(boxed).await;
        }
        BoxPhase::Stopped(cause) => {
            enter(shared, record, BoxStart::Ended(Obituary::of(cause)), sessions, None);
        }
    }
}

async fn undo(shared: &Arc<Shared>, record: BoxRecord, sessions: Vec<SessionRecord>) {
    for session in &sessions {
        forget_session(shared, session).await;
    }
    settle(shared, Owed::HalfMade(Box::new(record))).await;
}

async fn forget_session(shared: &Shared, session: &SessionRecord) {
    if let Err(error) = shared.records.delete_session(&session.id).await {
        tracing::error!(id = %session.id, %error, "the record of a container was not removed");
    }
}

async fn adopt(shared: &Arc<Shared>, mut record: BoxRecord, sessions: Vec<SessionRecord>) {
    let found = find_vm(shared, &record).await;
    if let Err(error) = &found {
        tracing::error!(id = %record.id, %error, "the VM of a pod sandbox could not be taken up");
    }
    let Some(machine) = found.ok().flatten() else {
        let cause = died_meanwhile(&record).await;
        record.phase = BoxPhase::Stopped(cause.clone());
        if let Err(error) = shared.records.put_box(&record).await {
            tracing::error!(id = %record.id, %error, "the end of a pod sandbox was not recorded");
        }
        enter(shared, record, BoxStart::Ended(Obituary::of(cause)), sessions, None);
        return;
    };
    let exists = |id: &SessionId| sessions.iter().any(|session| session.id == *id);
    if forget_unknown_holders(&mut record, machine.as_ref(), exists).await
        && let Err(error) = shared.records.put_box(&record).await
    {
        tracing::error!(id = %record.id, %error, "what became of a pod sandbox's volumes was not recorded");
    }
    resume_network(shared, &record.id).await;
    let live = Arc::new(LiveBox {
        agent: Agent::new(machine.clone(), shared.config.call_limit),
        facts: BoxFacts::of(&record),
        network: record.network.clone(),
        machine,
    });
    let states = match tokio::time::timeout(LIST_LIMIT, live.agent.list_sessions()).await {
        Ok(Ok(states)) => Some(states),
        Ok(Err(error)) => {
            tracing::warn!(id = %record.id, %error, "the guest agent did not list its containers");
            None
        }
        Err(_) => {
            tracing::warn!(id = %record.id, "the guest agent did not list its containers in time");
            None
        }
    };
    end_unknown(&live, &record.id, &sessions, states.as_deref()).await;
    tracing::info!(id = %record.id, containers = sessions.len(), "pod sandbox is taken up");
    enter(shared, record, BoxStart::Adopted(live), sessions, states);
}

/// What is not resumed stays as it is: a pod is kept from more, not from less.
async fn resume_network(shared: &Shared, id: &BoxId) {
    if let NetworkSetting::Pods(pods) = &shared.config.network
        && let Err(error) = pods.resume(id).await
    {
        tracing::error!(%id, %error, "what the network of a pod sandbox needs of the daemon was not resumed");
    }
}

/// Ends the containers in a guest that no record knows: kubelet has no way to, and starts them anew.
async fn end_unknown(live: &LiveBox, id: &BoxId, known: &[SessionRecord], states: Option<&[SessionState]>) {
    let unknown = states.unwrap_or_default().iter().map(|state| &state.session_id);
    for session in unknown.filter(|session| !known.iter().any(|record| record.id.as_str() == *session)) {
        let session = printable(session, MESSAGE_LIMIT);
        match live.agent.delete_session(session.clone()).await {
            Ok(()) => tracing::warn!(%id, session, "a container that no record knows was ended"),
            Err(error) => {
                tracing::error!(%id, session, %error, "a container that no record knows was not ended")
            }
        }
    }
}

/// Enters a box and its sessions and starts their owners. `states` is what the agent says; `None`: it did not say,
/// so that sessions are taken to be as recorded.
fn enter(
    shared: &Arc<Shared>,
    record: BoxRecord,
    start: BoxStart,
    sessions: Vec<SessionRecord>,
    states: Option<Vec<SessionState>>,
) -> Arc<BoxEntry> {
    let (boxed, driver) = prepare_box(shared, record);
    driver.announce(&start);
    shared.registry.enter_box(boxed.clone());
    shared.tasks.spawn(driver.run(start));
    for session in sessions {
        let state = match &states {
            Some(states) => states.iter().find(|state| state.session_id == session.id.as_str()).cloned(),
            None => Some(as_recorded(&session)),
        };
        let (entry, driver) = prepare_session(shared, &boxed, session);
        shared.registry.enter_session(entry);
        shared.tasks.spawn(driver.run(SessionStart::Resume(state)));
    }
    boxed
}

fn as_recorded(session: &SessionRecord) -> SessionState {
    use a3s_box_core::lifecycle::SessionPhase;
    use a3s_box_protocol::proto::session_state::Phase;
    let phase = match session.phase {
        SessionPhase::Created => Phase::Created,
        SessionPhase::Running { .. } => Phase::Running,
        SessionPhase::Exited { .. } => Phase::Exited,
    };
    SessionState { session_id: session.id.to_string(), phase: phase.into(), ..SessionState::default() }
}

/// A stop that was under way goes on; if it cannot be finished, the client's next attempt does it.
async fn finish_stop(boxed: Arc<BoxEntry>) {
    let (reply, answer) = oneshot::channel();
    if boxed.commands.send(BoxCommand::Stop(reply)).await.is_ok()
        && let Ok(Err(error)) = answer.await
    {
        tracing::error!(id = %boxed.id, %error, "a stop that was under way could not be finished");
    }
}

/// Nobody can tell any more how its process ended, but its console may.
async fn died_meanwhile(record: &BoxRecord) -> StopCause {
    const WHEN: &str = "while no daemon was watching";
    let dir = record.dir.clone();
    let read =
        tokio::task::spawn_blocking(move || (guest_fault(&dir), last_words(&dir, MESSAGE_LIMIT))).await;
    let (fault, words) = read.unwrap_or_default();
    let words = printable(&words, MESSAGE_LIMIT);
    let with_words = |what: &str| match words.trim() {
        "" => format!("{what}, {WHEN}"),
        words => format!("{what}, {WHEN}; its last words: {words}"),
    };
    match fault {
        Some(fault) => faulted(&fault, with_words),
        None => StopCause::VmmDied { detail: with_words("the VM ended") },
    }
}
