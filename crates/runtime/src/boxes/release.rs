//! Giving back what a box holds on the host.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::timeout;

use a3s_box_core::BoxId;
use a3s_box_vmm::{Machine, read_facts, read_plan};

use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::network::NetworkSetting;
use crate::records::{BoxRecord, HostObject};
use crate::shared::Shared;

/// The longest until a killed VM is gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// A cgroup stays busy for a moment after its last process has ended.
const CGROUP_TRIES: u32 = 50;
const CGROUP_PAUSE: Duration = Duration::from_millis(20);

/// How an error names a box.
pub(crate) fn object(id: &BoxId) -> String {
    format!("pod sandbox {}", id.short())
}

/// Releases the objects of the ledger that `which` picks, in the reverse order of their making, and crosses
/// out those that are gone. Goes on past errors and returns them.
///
/// A VM that did not end keeps its objects: nothing is pulled away from under a running process.
pub(crate) async fn release(
    shared: &Shared,
    record: &mut BoxRecord,
    machine: Option<&Arc<dyn Machine>>,
    which: impl Fn(&HostObject) -> bool,
) -> Vec<RuntimeError> {
    let mut errors = Vec::new();
    for held in record.ledger.clone().into_iter().rev().filter(|held| which(held)) {
        let released = match &held {
            HostObject::Vmm => end_vm(shared, record, machine).await,
            HostObject::Network => disconnect(shared, record).await,
            HostObject::Cgroup(path) => remove_cgroup(&record.id, path).await,
            HostObject::CgroupParent(path) => crate::cgroup::remove_parent(path)
                .map_err(|error| failed(&record.id, at("cgroup", path, error))),
            HostObject::StateDir(path) | HostObject::RunDir(path) => remove_dir(&record.id, path).await,
        };
        match released {
            Ok(()) => record.ledger.retain(|other| *other != held),
            Err(error) => {
                let is_vm = held == HostObject::Vmm;
                errors.push(error);
                if is_vm {
                    break;
                }
            }
        }
    }
    errors
}

/// Ends the VM of a box, the given one or the one that is found, and waits until it is gone.
pub(crate) async fn end_vm(
    shared: &Shared,
    record: &BoxRecord,
    machine: Option<&Arc<dyn Machine>>,
) -> Result<(), RuntimeError> {
    let machine = match machine {
        Some(machine) => Some(machine.clone()),
        None => find_vm(shared, record).await?,
    };
    match machine {
        Some(machine) => kill_vm(&record.id, machine.as_ref()).await,
        None => Ok(()),
    }
}

async fn kill_vm(id: &BoxId, machine: &dyn Machine) -> Result<(), RuntimeError> {
    machine.kill().await.map_err(|error| failed(id, error))?;
    match timeout(KILL_LIMIT, machine.wait()).await {
        Ok(_) => Ok(()),
        Err(_) => {
            let what = "the end of the killed VM";
            Err(RuntimeError::timeout(FailedStage::Stop, object(id), KILL_LIMIT, what))
        }
    }
}

/// The VM of a record whose launch may or may not have happened. The VMM leaves its facts in the box's directory
/// before it boots anything, so a crash between launch and record loses none.
pub(crate) async fn find_vm(
    shared: &Shared,
    record: &BoxRecord,
) -> Result<Option<Arc<dyn Machine>>, RuntimeError> {
    let Some(plan) = &record.plan else { return Ok(None) };
    let facts = match &record.machine {
        Some(facts) => Some(facts.clone()),
        None => read_facts(&plan.dir).map_err(|error| failed(&record.id, error))?,
    };
    let Some(facts) = facts else { return Ok(None) };
    let adopted = shared.vmm.adopt(&plan.dir, &facts).await.map_err(|error| failed(&record.id, error))?;
    Ok(adopted.map(Arc::from))
}

async fn disconnect(shared: &Shared, record: &BoxRecord) -> Result<(), RuntimeError> {
    match &shared.config.network {
        NetworkSetting::None => Ok(()),
        NetworkSetting::Pods(pods) => pods
            .teardown(&record.id, record.network.as_ref())
            .await
            .map_err(|error| failed(&record.id, error)),
    }
}

async fn remove_cgroup(id: &BoxId, path: &Path) -> Result<(), RuntimeError> {
    for attempt in 1.. {
        match crate::cgroup::remove(path) {
            Ok(()) => break,
            Err(error) if attempt < CGROUP_TRIES && error.kind() == io::ErrorKind::ResourceBusy => {
                tokio::time::sleep(CGROUP_PAUSE).await;
            }
            Err(error) => {
                return Err(failed(id, at("cgroup", path, error)));
            }
        }
    }
    Ok(())
}

async fn remove_dir(id: &BoxId, path: &Path) -> Result<(), RuntimeError> {
    let owned = path.to_owned();
    let removed = spawn_blocking(move || std::fs::remove_dir_all(owned))
        .await
        .unwrap_or_else(|e| Err(io::Error::other(e)));
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed(id, at("directory", path, error)))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// An error with the path that it is about.
fn at(what: &str, path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what} {}: {error}", path.display()))
}

fn failed(id: &BoxId, error: impl std::error::Error + Send + Sync + 'static) -> RuntimeError {
    RuntimeError::caused(ErrorKind::Internal, FailedStage::Remove, object(id), error)
}

/// Boxes of which something is found: directories, networks.
pub(crate) async fn found(shared: &Shared) -> HashSet<BoxId> {
    let parents = parents(shared);
    let listed = spawn_blocking(move || parents.iter().flat_map(|parent| ids_in(parent)).collect()).await;
    let mut found: HashSet<BoxId> = listed.unwrap_or_else(|error| {
        tracing::warn!(%error, "directories without a record were not looked for");
        HashSet::new()
    });
    if let NetworkSetting::Pods(pods) = &shared.config.network {
        match pods.held().await {
            Ok(held) => found.extend(held),
            Err(error) => tracing::warn!(%error, "networks without a record were not looked for"),
        }
    }
    found
}

/// Where boxes have directories.
fn parents(shared: &Shared) -> [PathBuf; 2] {
    [&shared.config.run_dir, &shared.config.state_dir].map(|dir| dir.join("boxes"))
}

/// Removes what a box holds that no record knows, as after the loss of the state store.
///
/// In the order in which a box is taken down: nothing is pulled away from under a running VM.
pub(crate) async fn remove_orphan(shared: &Shared, id: &BoxId) -> Result<(), RuntimeError> {
    let directories = parents(shared).map(|parent| parent.join(id.as_str()));
    let facts = read_facts(&directories[0]).map_err(|error| failed(id, error))?;
    if let Some(facts) = facts {
        let adopted = shared.vmm.adopt(&directories[0], &facts).await;
        if let Some(machine) = adopted.map_err(|error| failed(id, error))? {
            kill_vm(id, machine.as_ref()).await?;
        }
    }
    if let NetworkSetting::Pods(pods) = &shared.config.network {
        pods.teardown(id, None).await.map_err(|error| failed(id, error))?;
    }
    // A plan that cannot be read belongs to a box that never started.
    let plan = read_plan(&directories[0]).ok().flatten();
    for cgroup in plan.into_iter().flat_map(|plan| plan.cgroups) {
        remove_cgroup(id, &cgroup).await?;
    }
    for directory in &directories {
        remove_dir(id, directory).await?;
    }
    Ok(())
}

/// The boxes that have a directory in `parent`.
fn ids_in(parent: &Path) -> Vec<BoxId> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}
