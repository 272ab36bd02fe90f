//! What a box's owner does about volumes: it attaches each source once, and detaches it after its last session.

use std::io;
use std::os::fd::OwnedFd;

use tokio::task::spawn_blocking;
use tokio::time::timeout;

use a3s_box_core::SessionId;
use a3s_box_protocol::SHARE_VOLUMES;
use a3s_box_protocol::versions::{self, Ability};
use a3s_box_vmm::error::AttachError;
use a3s_box_vmm::{Attachment, Machine};

use super::driver::{ATTACH_LIMIT, BoxDriver};
use super::release::object;
use crate::error::{ErrorKind, FailedStage, RuntimeError};
use crate::records::BoxRecord;
use crate::sessions::volume_name;
use crate::sources::{Access, Due, Placed, Source, SourceKey, Wanted, part_of};

/// A source that is to be in the share, with its root open.
struct Rooted {
    name: String,
    root: OwnedFd,
    recursive_readonly: bool,
    propagate: bool,
}

/// A source that contains another one.
struct Found {
    name: String,
    inside: String,
    root: OwnedFd,
}

impl BoxDriver {
    /// Makes the sources of a session visible to the guest. Of one that fails the session's holdings stay on record:
    /// whoever forgets the session releases them.
    pub(super) async fn attach_volumes(
        &mut self,
        session: &SessionId,
        wanted: Vec<Wanted>,
    ) -> Result<Vec<Placed>, RuntimeError> {
        let Some(live) = self.live() else {
            return Err(self.denied(FailedStage::Attach, "the pod sandbox is not ready"));
        };
        let before = self.record.sources.clone();
        let (mut placed, mut rooted) = (Vec::with_capacity(wanted.len()), Vec::with_capacity(wanted.len()));
        for wanted in wanted {
            let (mount, root) = self.place(session, wanted).await;
            placed.push(mount);
            rooted.push(root);
        }
        if let Err(error) = self.save(FailedStage::Attach).await {
            self.record.sources = before;
            return Err(error);
        }
        for root in rooted {
            self.bring(live.machine.as_ref(), root).await?;
        }
        Ok(placed)
    }

    /// Finds the source of a mount among those of the box, or adds it, and has it held by the session.
    async fn place(&mut self, session: &SessionId, wanted: Wanted) -> (Placed, Rooted) {
        let shared = versions::speak(self.record.agent_protocol)
            .is_ok_and(|abilities| abilities.has(Ability::SharedVolumes));
        let Wanted { index, source, key, path, location, readonly, recursive_readonly, propagate } = wanted;
        let in_guest = key.tree.refused_in_guest(shared, readonly, recursive_readonly);
        let known =
            if shared { self.record.sources.whole(&key).map(|known| known.name.clone()) } else { None };
        let around =
            if shared && known.is_none() { self.around(&key, location.as_deref()).await } else { None };
        let (name, sub_path, root) = match (known, around) {
            (Some(name), _) => (name, String::new(), source),
            (None, Some(found)) => (found.name, found.inside, found.root),
            (None, None) => {
                let name = volume_name(session, index);
                self.record.sources.add(Source::new(name.clone(), key, path, location));
                (name, String::new(), source)
            }
        };
        self.record.sources.hold(&name, session, Access::of(readonly));
        let mount = Placed { index, name: name.clone(), sub_path, readonly: in_guest };
        (mount, Rooted { name, root, recursive_readonly, propagate })
    }

    /// A source of the box that contains the one with this key.
    async fn around(&self, key: &SourceKey, location: Option<&std::path::Path>) -> Option<Found> {
        for (source, inside) in self.record.sources.around(key, location?) {
            // A name that is no text cannot be said to the agent.
            let Some(said) = inside.to_str().map(str::to_owned) else { continue };
            let (path, whole, part) = (source.path.clone(), source.key.clone(), key.clone());
            let look = spawn_blocking(move || part_of(&path, &whole, &inside, &part));
            if let Ok(Ok(Some(root))) = timeout(ATTACH_LIMIT, look).await {
                return Some(Found { name: source.name.clone(), inside: said, root });
            }
        }
        None
    }

    /// Attaches a source, or lets the host allow what its holders may do.
    async fn bring(&mut self, machine: &dyn Machine, rooted: Rooted) -> Result<(), RuntimeError> {
        let Rooted { name, root, recursive_readonly, propagate } = rooted;
        let access = match self.record.sources.due(&name) {
            None => return Ok(()),
            Some(Due::Attach(access)) => {
                let attachment = Attachment {
                    source: root,
                    target: target(&name),
                    readonly: access == Access::ReadOnly,
                    recursive_readonly,
                    propagate,
                    id_mapped: self.record.sources.users(&name),
                };
                match self.limited(&name, machine.attach(attachment)).await? {
                    Ok(()) => access,
                    // By a daemon before this one, for sessions that may have been allowed something else.
                    Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => {
                        self.allow(machine, &name, access).await?
                    }
                    Err(error) => return Err(self.not_attached(error)),
                }
            }
            Some(Due::Open) => self.allow(machine, &name, Access::Writable).await?,
            // Nothing was released.
            Some(Due::Close | Due::Detach) => return Ok(()),
        };
        self.record.sources.is_attached(&name, access);
        Ok(())
    }

    /// What the host lets through then. One that cannot be closed stays open: the guest refuses writes too.
    async fn allow(&self, machine: &dyn Machine, name: &str, access: Access) -> Result<Access, RuntimeError> {
        let target = target(name);
        let changed = self.limited(name, machine.set_readonly(&target, access == Access::ReadOnly)).await?;
        match (changed, access) {
            (Ok(()), _) => Ok(access),
            (Err(_), Access::ReadOnly) => Ok(Access::Writable),
            (Err(error), Access::Writable) => Err(self.not_attached(error)),
        }
    }

    async fn limited<T>(&self, name: &str, work: impl Future<Output = T>) -> Result<T, RuntimeError> {
        timeout(ATTACH_LIMIT, work).await.map_err(|_| {
            let path = self.record.sources.path(name).unwrap_or_default();
            let what = format!("attaching the volume {}", path.display());
            RuntimeError::timeout(FailedStage::Attach, object(&self.record.id), ATTACH_LIMIT, &what)
        })
    }

    fn not_attached(&self, error: AttachError) -> RuntimeError {
        let kind = match error.source.kind() {
            io::ErrorKind::Unsupported => ErrorKind::FailedPrecondition,
            _ => ErrorKind::Internal,
        };
        RuntimeError::caused(kind, FailedStage::Attach, object(&self.record.id), error)
    }

    /// Takes a session that is no more out of what it held. What nobody holds then is detached; what could not be is tried
    /// again with the next one.
    pub(super) async fn release_volumes(&mut self, session: &SessionId) -> Result<(), RuntimeError> {
        let Some(live) = self.live() else { return Ok(()) };
        let released = self.record.sources.release(session);
        let (changed, errors) = settle(&mut self.record, live.machine.as_ref()).await;
        let errors: Vec<_> = errors
            .into_iter()
            .map(|error| {
                RuntimeError::caused(ErrorKind::Internal, FailedStage::Remove, object(&self.record.id), error)
            })
            .collect();
        if let Some(error) = RuntimeError::all_of(FailedStage::Remove, &object(&self.record.id), &errors) {
            return Err(error);
        }
        if released || changed { self.save(FailedStage::Remove).await } else { Ok(()) }
    }
}

/// Has the host do what is due when holders are gone; whether anything was detached, and what could not be.
async fn settle(record: &mut BoxRecord, machine: &dyn Machine) -> (bool, Vec<AttachError>) {
    let (mut changed, mut errors) = (false, Vec::new());
    for (name, due) in record.sources.due_after_release() {
        let target = target(&name);
        match due {
            Due::Detach => match detach(machine, &target).await {
                Ok(()) => {
                    record.sources.is_detached(&name);
                    changed = true;
                }
                Err(error) => errors.push(error),
            },
            Due::Close => match machine.set_readonly(&target, true).await {
                Ok(()) => record.sources.is_attached(&name, Access::ReadOnly),
                // A file that was open for writing is closed a moment after its process has ended. The guest's own mounts refuse
                // writes in any case.
                Err(error) => {
                    tracing::debug!(id = %record.id, %error, "a volume without writers stays writable")
                }
            },
            Due::Attach(_) | Due::Open => {}
        }
    }
    (changed, errors)
}

/// Takes sessions out of a box's sources that no record knows: of a daemon that ended while it removed them.
pub(crate) async fn forget_unknown_holders(
    record: &mut BoxRecord,
    machine: &dyn Machine,
    exists: impl Fn(&SessionId) -> bool,
) -> bool {
    let forgotten = record.sources.keep_holders(exists);
    let (changed, errors) = settle(record, machine).await;
    for error in errors {
        tracing::error!(id = %record.id, %error, "a volume that no container has was not detached");
    }
    forgotten || changed
}

async fn detach(machine: &dyn Machine, target: &str) -> Result<(), AttachError> {
    let late = |_| AttachError {
        step: "remove",
        target: target.to_owned(),
        source: io::Error::new(io::ErrorKind::TimedOut, format!("it took longer than {ATTACH_LIMIT:?}")),
    };
    timeout(ATTACH_LIMIT, machine.detach(target)).await.unwrap_or_else(|elapsed| Err(late(elapsed)))
}

fn target(name: &str) -> String {
    format!("{SHARE_VOLUMES}/{name}")
}
