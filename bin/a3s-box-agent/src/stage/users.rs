//! A session's users as the guest knows them: its own, or those of the pod's user namespace.
//!
//! Only at the very end does a stage enter that namespace: what it sets up before is the guest's root's to make,
//! and belongs to the session's root all the same because it is given away by number.

use std::os::fd::{AsFd, OwnedFd};

use a3s_box_protocol::proto::{CreateSessionRequest, IdRange, UserNamespace};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{Gid, Mode, OFlags, Uid};

use super::error::{Context, StageError};
use super::tree::{attach, bind};
use super::user::{Identity, UserError};
use crate::session::layers;
use crate::sys;

/// Numbers of the guest.
#[derive(Debug, Clone, Copy)]
pub struct Owner {
    /// User.
    pub uid: Uid,
    /// Group.
    pub gid: Gid,
}

/// Whose users a session has.
#[derive(Debug)]
pub struct Users(Option<Mapped>);

#[derive(Debug)]
struct Mapped {
    uids: IdRange,
    gids: IdRange,
    namespace: OwnedFd,
}

impl Users {
    /// Those of the namespace that the agent has given us at [`super::USER_NS_FD`] if there is a mapping.
    pub fn take(mapping: Option<UserNamespace>) -> Result<Self, StageError> {
        let Some(mapping) = mapping else { return Ok(Self(None)) };
        let namespace = sys::inherited(super::USER_NS_FD).context("take", "the user namespace")?;
        let (uids, gids) = (mapping.uids.unwrap_or_default(), mapping.gids.unwrap_or_default());
        Ok(Self(Some(Mapped { uids, gids, namespace })))
    }

    /// To whom what is made for the session goes; `None` is us.
    pub fn root(&self) -> Option<Owner> {
        let mapped = self.0.as_ref()?;
        Some(Owner { uid: Uid::from_raw(mapped.uids.start), gid: Gid::from_raw(mapped.gids.start) })
    }

    /// A user of the session. All of its groups must exist too.
    pub fn owner(&self, identity: &Identity) -> Result<Owner, UserError> {
        let Some(mapped) = &self.0 else {
            return Ok(Owner { uid: Uid::from_raw(identity.uid), gid: Gid::from_raw(identity.gid) });
        };
        for group in &identity.groups {
            outside(&mapped.gids, *group, "group")?;
        }
        Ok(Owner {
            uid: Uid::from_raw(outside(&mapped.uids, identity.uid, "user")?),
            gid: Gid::from_raw(outside(&mapped.gids, identity.gid, "group")?),
        })
    }

    /// The guest's number of a group of the session, if it has one.
    pub fn group(&self, id: u32) -> Option<u32> {
        match &self.0 {
            Some(mapped) => outside(&mapped.gids, id, "group").ok(),
            None => Some(id),
        }
    }

    /// Covers the session's layers, in this mount namespace, with id-mapped copies of themselves.
    pub fn map_layers(&self, request: &CreateSessionRequest) -> Result<(), StageError> {
        let Some(mapped) = &self.0 else { return Ok(()) };
        for name in layers::names(request) {
            let place = layers::place(&name);
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let layer = rustix::fs::open(&place, flags, Mode::empty()).context("open", &place)?;
            bind(&layer, false)
                .and_then(|copy| sys::map_users(copy.as_fd(), mapped.namespace.as_fd()).map(|()| copy))
                .and_then(|copy| attach(copy, &layer))
                .context("map the users of", &place)?;
        }
        Ok(())
    }

    /// Enters the namespace with all capabilities in it and none outside. The copy of the mounts belongs to it, so
    /// that its root may mount, and may not take away what was mounted for it.
    pub fn enter(self) -> Result<(), StageError> {
        let Some(mapped) = self.0 else { return Ok(()) };
        setns(mapped.namespace, CloneFlags::CLONE_NEWUSER).context("join", "the user namespace")?;
        unshare(CloneFlags::CLONE_NEWNS).context("unshare", "the mount namespace")
    }
}

fn outside(range: &IdRange, id: u32, kind: &'static str) -> Result<u32, UserError> {
    if id < range.count {
        Ok(range.start + id)
    } else {
        Err(UserError::Unmapped { kind, id, count: range.count })
    }
}
