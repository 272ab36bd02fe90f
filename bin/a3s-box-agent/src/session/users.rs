//! The pod's user namespace, with the namespaces that belong to it: network, host name and IPC.
//!
//! The agent itself moves into those three, so that all that it does for the pod is done there; it stays
//! the guest's root.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use a3s_box_protocol::proto::{IdRange, NetworkInterface, UserNamespace, UserNumbers};
use nix::sched::{CloneFlags, setns};

use super::SessionError;
use super::launch::{self, Control};
use crate::control::{self, Report};
use crate::netlink;
use crate::reaper::Reaper;
use crate::spawn::{PidSpace, Spawn};
use crate::stage;

/// A user namespace that the pod's sessions join.
#[derive(Debug)]
pub struct Users {
    /// Itself.
    pub namespace: OwnedFd,
    /// As the host asked.
    pub mapping: UserNamespace,
}

impl Users {
    /// The guest's numbers of a user of the pod; what the pod does not have is its last one.
    pub fn outside(&self, user: UserNumbers) -> UserNumbers {
        let number = |range: &Option<IdRange>, id: u32| {
            let range = range.unwrap_or_default();
            range.start + id.min(range.count.saturating_sub(1))
        };
        UserNumbers { uid: number(&self.mapping.uids, user.uid), gid: number(&self.mapping.gids, user.gid) }
    }

    /// Makes the namespaces, takes the NICs along and enters.
    pub async fn enter(
        reaper: &Reaper,
        mapping: &UserNamespace,
        interfaces: &[NetworkInterface],
        ping_groups: Option<&str>,
    ) -> Result<Self, SessionError> {
        let (ours, theirs) = control::pair().map_err(SessionError::launch("make a control socket"))?;
        let control = Control::new(ours).map_err(SessionError::launch("poll the control socket"))?;
        let spec = launch::memory_file(ping_groups.unwrap_or_default().as_bytes())
            .map_err(SessionError::launch("write the specification"))?;
        let spawn = Spawn {
            role: stage::USERS,
            descriptors: vec![(theirs.as_fd(), stage::CONTROL_FD), (spec.as_fd(), stage::SPEC_FD)],
            cgroup: None,
            pid_space: PidSpace::Same,
        };
        // It ends when its control socket does.
        let (pid, _) =
            reaper.spawn(&spawn).map_err(SessionError::launch("start the user namespace's process"))?;
        drop(theirs);
        await_report(&control).await?;
        let file = |name: &str| format!("/proc/{}/{name}", pid.as_raw_pid());
        let refused = |step| move |source| SessionError::Users { step, source };
        for (name, range) in [("uid_map", &mapping.uids), ("gid_map", &mapping.gids)] {
            std::fs::write(file(name), line(range)).map_err(refused("map ids"))?;
        }
        control.go().map_err(SessionError::launch("go on"))?;
        await_report(&control).await?;
        let open = |kind: &str| File::open(file(&format!("ns/{kind}"))).map(OwnedFd::from);
        let namespace = open("user").map_err(refused("open the user namespace"))?;
        let network = open("net").map_err(refused("open its network"))?;
        for interface in interfaces {
            netlink::move_to(interface, network.as_fd()).map_err(|error| SessionError::Users {
                step: "move the network interface",
                source: io::Error::other(error),
            })?;
        }
        let join = |namespace, kind| setns(namespace, kind).map_err(io::Error::from);
        join(network, CloneFlags::CLONE_NEWNET)
            .and_then(|()| join(open("uts")?, CloneFlags::CLONE_NEWUTS))
            .and_then(|()| join(open("ipc")?, CloneFlags::CLONE_NEWIPC))
            .and_then(|()| netlink::loopback_up())
            .map_err(refused("enter the pod's network, host name and IPC"))?;
        Ok(Self { namespace, mapping: *mapping })
    }
}

async fn await_report(control: &Control) -> Result<(), SessionError> {
    match control.receive().await.map_err(SessionError::launch("hear from the user namespace's process"))? {
        Some((Report::Ready(_), _)) => Ok(()),
        Some((Report::Failure(failure), _)) => Err(SessionError::Stage(failure)),
        None => Err(SessionError::StageDied { out_of_memory: false }),
    }
}

fn line(range: &Option<IdRange>) -> String {
    let range = range.unwrap_or_default();
    format!("0 {} {}", range.start, range.count)
}
