//! The pid namespace of sessions that share their processes.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use a3s_box_protocol::proto::UserNumbers;
use prost::Message;

use super::Table;
use crate::control;
use crate::session::launch::{self, Control};
use crate::session::{Namespaces, SessionError};
use crate::spawn::{PidSpace, Spawn};
use crate::stage;

/// The pod's shared pid namespace, held by a process of ours that reaps in it.
#[derive(Debug)]
pub(super) struct PodPids {
    /// Sessions are born in it.
    pub(super) namespace: OwnedFd,
    _control: Control,
}

impl Table {
    /// Says as whom process 1 of the pod's shared processes is to run. Only the first word counts.
    pub fn set_init_user(&self, user: UserNumbers) {
        self.inner.init_user.get_or_init(|| user);
    }

    /// As whom process 1 of the pod runs, by the guest's numbers.
    fn init_user(&self) -> UserNumbers {
        let user = self.inner.init_user.get().copied().unwrap_or_default();
        match self.inner.users.get() {
            Some(users) => users.outside(user),
            None => user,
        }
    }

    /// Made for the first session that shares, and anew after its end.
    pub(super) async fn pod_pids(&self) -> Result<Arc<PodPids>, SessionError> {
        let mut pod = self.inner.pod.lock().await;
        if let Some(pids) = &*pod {
            return Ok(Arc::clone(pids));
        }
        let (ours, theirs) = control::pair().map_err(SessionError::launch("make a control socket"))?;
        let ours = Control::new(ours).map_err(SessionError::launch("poll the control socket"))?;
        let user = self.init_user().encode_to_vec();
        let spec = launch::memory_file(&user).map_err(SessionError::launch("write the specification"))?;
        let spawn = Spawn {
            role: stage::PAUSE,
            descriptors: vec![(theirs.as_fd(), stage::CONTROL_FD), (spec.as_fd(), stage::SPEC_FD)],
            cgroup: None,
            pid_space: PidSpace::New,
        };
        let (pid, exit) =
            self.inner.reaper.spawn(&spawn).map_err(SessionError::launch("start the pod's init"))?;
        drop(theirs);
        match ours.receive().await.map_err(SessionError::launch("hear from the pod's init"))? {
            Some((control::Report::Ready(_), _)) => {}
            Some((control::Report::Failure(failure), _)) => return Err(SessionError::Stage(failure)),
            None => return Err(SessionError::StageDied { out_of_memory: false }),
        }
        let namespaces = Namespaces::of(pid).map_err(SessionError::launch("open the pod's pid namespace"))?;
        let pids = Arc::new(PodPids { namespace: namespaces.pid, _control: ours });
        *pod = Some(Arc::clone(&pids));
        let table = self.clone();
        tokio::spawn(async move {
            // Its namespace dies with it; the next session that shares gets a new one.
            let _ = exit.await;
            table.inner.pod.lock().await.take();
        });
        Ok(pids)
    }
}
