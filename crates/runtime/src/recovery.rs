//! What a daemon does about the boxes of the one before it.
//!
//! | record says            | VM runs                     | VM is gone                 |
//! |------------------------|-----------------------------|----------------------------|
//! | reserved … booting     | undone: nobody knows its id | undone                     |
//! | ready                  | taken up, agent asked       | stopped, with its cause    |
//! | … of another protocol  | left alone, and said so     | stopped, with its cause    |
//! | stopping               | stopped for good            | stopped for good           |
//! | stopped                | as it is                    | as it is                   |

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use a3s_box_core::lifecycle::{BoxPhase, StopCause};
use a3s_box_core::{BoxId, SessionId};
use a3s_box_protocol::proto::SessionState;
use a3s_box_protocol::versions;
use a3s_box_vmm::{guest_fault, last_words};

use crate::agent_client::Agent;
use crate::api::Quarantined;
use crate::boxes::{
    BoxCommand, BoxStart, Contact, Foreign, LiveBox, Obituary, Owed, faulted, find_vm,
    forget_unknown_holders, found,
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

/// How long the start of the daemon waits for boxes of the one before it, so that what clients see first is how it is.
/// Agents that are well answer within milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);

/// Brings the registry to what is found: when this comes back every box and session is in it. What takes long goes on
/// while the daemon serves, so that one box that does not answer, or cannot be given back, holds up no other. Fails only if
/// the records cannot be read.
pub(crate) async fn recover(shared: &Arc<Shared>) -> Result<Vec<Quarantined>, RuntimeError> {
    let failed = |error| RuntimeError::storage(FailedStage::Lookup, "the state store", error);
    let loaded = shared.records.load().await.map_err(failed)?;
    let known: HashSet<BoxId> = loaded.boxes.iter().map(|record| record.id.clone()).collect();
    let orphans = found(shared).await.into_iter().filter(|id| !known.contains(id));
    let mut unfinished: Vec<JoinHandle<()>> =
        orphans.map(|id| continued(shared, settle(shared.clone(), Owed::Orphan(id)))).collect();
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
    let going_on = futures::stream::iter(work).buffer_unordered(PARALLEL).collect::<Vec<_>>().await;
    unfinished.extend(going_on.into_iter().flatten());
    for orphan in sessions.into_values().flatten() {
        tracing::warn!(id = %orphan.id, pod = %orphan.box_id, "the record of a container whose pod sandbox is unknown is removed");
        forget_session(shared, &orphan).await;
    }
    if tokio::time::timeout(PATIENCE, futures::future::join_all(unfinished)).await.is_err() {
        tracing::warn!(
            "not every pod sandbox of the last daemon has answered or is gone yet; the others are served"
        );
    }
    Ok(loaded.quarantined)
}

/// Work that goes on while the daemon serves; what the daemon's end interrupts the next one finds.
fn continued(shared: &Arc<Shared>, work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    let closing = shared.closing.clone();
    shared.tasks.spawn(async move {
        closing.run_until_cancelled(work).await;
    })
}

/// Gives back what is owed, or goes on trying.
async fn settle(shared: Arc<Shared>, mut owed: Owed) {
    match owed.settle(&shared).await {
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

/// Enters a box, unless it was half made. What is still to be done for it goes on.
async fn recover_box(
    shared: &Arc<Shared>,
    record: BoxRecord,
    sessions: Vec<SessionRecord>,
) -> Option<JoinHandle<()>> {
    match record.phase.clone() {
        BoxPhase::Reserved | BoxPhase::Prepared | BoxPhase::Booting => {
            Some(continued(shared, undo(shared.clone(), record, sessions)))
        }
        BoxPhase::Ready => adopt(shared, record, sessions).await,
        BoxPhase::Stopping => {
            let ended = BoxStart::Ended(Obituary::of(StopCause::Requested));
            let (boxed, _) = enter(shared, record, ended, sessions);
            Some(continued(shared, finish_stop(boxed)))
        }
        BoxPhase::Stopped(cause) => {
            enter(shared, record, BoxStart::Ended(Obituary::of(cause)), sessions);
            None
        }
    }
}

async fn undo(shared: Arc<Shared>, record: BoxRecord, sessions: Vec<SessionRecord>) {
    for session in &sessions {
        forget_session(&shared, session).await;
    }
    settle(shared, Owed::HalfMade(Box::new(record))).await;
}

async fn forget_session(shared: &Shared, session: &SessionRecord) {
    if let Err(error) = shared.records.delete_session(&session.id).await {
        tracing::error!(id = %session.id, %error, "the record of a container was not removed");
    }
}

async fn adopt(
    shared: &Arc<Shared>,
    mut record: BoxRecord,
    sessions: Vec<SessionRecord>,
) -> Option<JoinHandle<()>> {
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
        enter(shared, record, BoxStart::Ended(Obituary::of(cause)), sessions);
        return None;
    };
    let abilities = match versions::speak(record.agent_protocol) {
        Ok(abilities) => abilities,
        Err(why) => {
            resume_network(shared, &record.id).await;
            leave_alone(shared, record, sessions, Foreign { machine, why });
            return None;
        }
    };
    let exists = |id: &SessionId| sessions.iter().any(|session| session.id == *id);
    if forget_unknown_holders(&mut record, machine.as_ref(), exists).await
        && let Err(error) = shared.records.put_box(&record).await
    {
        tracing::error!(id = %record.id, %error, "what became of a pod sandbox's volumes was not recorded");
    }
    let live = Arc::new(LiveBox {
        abilities,
        agent: Agent::new(machine.clone(), shared.config.call_limit),
        contact: Contact::of(&record.dir, shared.config.lost_after).await,
        facts: BoxFacts::of(&record),
        network: record.network.clone(),
        machine,
    });
    tracing::info!(id = %record.id, containers = sessions.len(), "pod sandbox is taken up");
    let (boxed, waiting) = enter(shared, record, BoxStart::Adopted(live.clone()), sessions);
    Some(continued(shared, catch_up(shared.clone(), boxed, live, waiting)))
}

/// A session that waits for what its agent says of it.
type Waiting = (SessionId, oneshot::Sender<Option<SessionState>>);

/// Tells the sessions of a box that was taken up how they are. Until then requests to them wait, and nobody else's.
async fn catch_up(shared: Arc<Shared>, boxed: Arc<BoxEntry>, live: Arc<LiveBox>, waiting: Vec<Waiting>) {
    let limit = live.contact.patience(LIST_LIMIT);
    let listing = tokio::time::timeout(limit, live.contact.ask(live.agent.list_sessions()));
    let (listed, ()) = tokio::join!(listing, resume_network(&shared, &boxed.id));
    let id = &boxed.id;
    match listed {
        Ok(Ok(states)) => {
            end_unknown(&shared, &live, id, &states).await;
            for (session, sender) in waiting {
                let state = states.iter().find(|state| state.session_id == session.as_str()).cloned();
                // Its owner has ended with the daemon.
                sender.send(state).ok();
            }
        }
        failed => {
            match failed {
                Ok(Err(error)) => {
                    tracing::warn!(%id, %error, "the guest agent did not list its containers");
                }
                Ok(Ok(_)) | Err(_) => {
                    tracing::warn!(%id, "the guest agent did not list its containers in time");
                }
            }
            drop(waiting);
            // A box without containers has nobody else who would notice.
            if live.contact.regain(&live.agent).await.is_err() {
                let detail =
                    format!("the guest agent could not be reached for {:?}", shared.config.lost_after);
                boxed.commands.send(BoxCommand::AgentLost(detail)).await.ok();
            }
        }
    }
}

/// A box whose agent is of a build that this one does not speak to runs on: its pod still serves, and the build that
/// started it can take it up again. Nothing of its records is changed, so that it finds them as it left them.
fn leave_alone(shared: &Arc<Shared>, record: BoxRecord, sessions: Vec<SessionRecord>, foreign: Foreign) {
    tracing::error!(
        id = %record.id,
        pod = %record.spec.identity.name,
        namespace = %record.spec.identity.namespace,
        containers = sessions.len(),
        "a pod sandbox runs on, but nothing can be asked of it, and the output of its containers is not fetched, because {}",
        foreign.why
    );
    // Nobody will tell the sessions how they are: dropping what they wait for says so.
    drop(enter(shared, record, BoxStart::Foreign(Arc::new(foreign)), sessions));
}

/// What is not resumed stays as it is: a pod is kept from more, not from less.
async fn resume_network(shared: &Shared, id: &BoxId) {
    if let NetworkSetting::Pods(pods) = &shared.config.network
        && let Err(error) = pods.resume(id).await
    {
        tracing::error!(%id, %error, "what the network of a pod sandbox needs of the daemon was not resumed");
    }
}

/// Ends the containers in a guest that nobody here knows: kubelet has no way to, and starts them anew. One that is being
/// made right now is known before its agent is asked to make it.
async fn end_unknown(shared: &Shared, live: &LiveBox, id: &BoxId, states: &[SessionState]) {
    let is_known = |session: &String| {
        session.parse::<SessionId>().is_ok_and(|session| shared.registry.get_session(&session).is_some())
    };
    for session in states.iter().map(|state| &state.session_id).filter(|session| !is_known(session)) {
        let session = printable(session, MESSAGE_LIMIT);
        match live.agent.delete_session(session.clone()).await {
            Ok(()) => tracing::warn!(%id, session, "a container that no record knows was ended"),
            Err(error) => {
                tracing::error!(%id, session, %error, "a container that no record knows was not ended")
            }
        }
    }
}

/// Enters a box and its sessions and starts their owners. A session whose sender is dropped takes itself to be as
/// recorded.
fn enter(
    shared: &Arc<Shared>,
    record: BoxRecord,
    start: BoxStart,
    sessions: Vec<SessionRecord>,
) -> (Arc<BoxEntry>, Vec<Waiting>) {
    let (boxed, driver) = prepare_box(shared, record);
    driver.announce(&start);
    shared.registry.enter_box(boxed.clone());
    shared.tasks.spawn(driver.run(start));
    let mut waiting = Vec::with_capacity(sessions.len());
    for session in sessions {
        let (sender, state) = oneshot::channel();
        waiting.push((session.id.clone(), sender));
        let (entry, driver) = prepare_session(shared, &boxed, session);
        shared.registry.enter_known_session(entry);
        shared.tasks.spawn(driver.run(SessionStart::Resume(state)));
    }
    (boxed, waiting)
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
