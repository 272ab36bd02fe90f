//! The vsock device of `a3s_box_vsock` on libkrun's transport.
//!
//! libkrun's own throws away what the guest has not read yet when the host closes its end.
//!
//! ```text
//! guest ── receive, transmit queues ──▶ worker ──▶ a3s_box_vsock ── unix sockets ──▶ host
//! ```

#[cfg(test)]
mod tests;
mod worker;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use a3s_box_protocol::GUEST_CID;
use a3s_box_vmm::launch::socket_name;
use a3s_box_vmm::{BoxPlan, GUEST_DIALS};
use a3s_box_vsock::Vsock as Sockets;
use anyhow::Context;
use msb_krun_devices::virtio::{
    ActivateError, ActivateResult, DeviceQueue, InterruptTransport, QueueConfig, VirtioDevice,
    VirtioStateError,
};
use vm_memory::GuestMemoryMmap;

use worker::Worker;

/// Virtio's number of this kind of device.
pub(crate) const TYPE_VSOCK: u32 = 19;

const VERSION_1: u64 = 1 << 32;

/// Receive, transmit, events; nothing is ever told through the last.
const QUEUES: [QueueConfig; 3] = [QueueConfig::new(256); 3];

/// The device.
///
/// ```text
/// idle ── activate ──▶ running ── quiesce ──▶ idle, with its connections
///                         └────── reset ────▶ idle, without
/// ```
pub(crate) struct Vsock {
    listeners: Vec<(u32, UnixListener)>,
    paths: BTreeMap<u32, PathBuf>,
    acked: u64,
    state: State,
}

enum State {
    /// With the connections of before, if there was a before.
    Idle(Option<Box<Sockets>>),
    Running(Worker),
}

impl Vsock {
    /// Listens in `directory` for the host, which dials ports of the guest there, and finds there what listens on the
    /// ports of the host that the guest dials.
    pub(crate) fn new(plan: &BoxPlan, directory: &Path) -> anyhow::Result<Self> {
        let listen = |port: u32| {
            let path = directory.join(socket_name(port));
            let listener = UnixListener::bind(&path);
            Ok((port, listener.with_context(|| format!("listen on {}", path.display()))?))
        };
        Ok(Self {
            listeners: plan.host_dials().map(listen).collect::<anyhow::Result<_>>()?,
            paths: GUEST_DIALS.map(|port| (port, directory.join(socket_name(port)))).into(),
            acked: 0,
            state: State::Idle(None),
        })
    }

    fn sockets(&mut self) -> io::Result<Box<Sockets>> {
        if let State::Idle(kept) = &mut self.state
            && let Some(sockets) = kept.take()
        {
            return Ok(sockets);
        }
        let again = |(port, listener): &(u32, UnixListener)| Ok((*port, listener.try_clone()?));
        let listeners = self.listeners.iter().map(again).collect::<io::Result<_>>()?;
        Sockets::new(u64::from(GUEST_CID), listeners, self.paths.clone()).map(Box::new)
    }

    /// Stops the worker. Without one nothing changes.
    fn stop(&mut self) -> io::Result<Option<(Box<Sockets>, Vec<DeviceQueue>)>> {
        if !self.is_activated() {
            return Ok(None);
        }
        match std::mem::replace(&mut self.state, State::Idle(None)) {
            State::Running(worker) => worker.stop().map(Some),
            State::Idle(_) => Ok(None),
        }
    }
}

impl VirtioDevice for Vsock {
    fn avail_features(&self) -> u64 {
        VERSION_1
    }

    fn acked_features(&self) -> u64 {
        self.acked
    }

    fn set_acked_features(&mut self, acked_features: u64) {
        self.acked = acked_features & self.avail_features();
    }

    fn device_type(&self) -> u32 {
        TYPE_VSOCK
    }

    fn device_name(&self) -> &str {
        "vsock"
    }

    fn queue_config(&self) -> &[QueueConfig] {
        &QUEUES
    }

    /// The guest's address is all there is.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(GUEST_CID).to_le_bytes();
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        let length = rest.len().min(data.len());
        data[..length].copy_from_slice(&rest[..length]);
        data[length..].fill(0);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(
        &mut self,
        mem: GuestMemoryMmap,
        interrupt: InterruptTransport,
        queues: Vec<DeviceQueue>,
    ) -> ActivateResult {
        if queues.len() != QUEUES.len() || self.is_activated() {
            return Err(ActivateError::BadActivate);
        }
        let sockets = self.sockets().map_err(ActivateError::EpollCtl)?;
        let worker = Worker::start(mem, interrupt, queues, sockets).map_err(ActivateError::EpollCtl)?;
        self.state = State::Running(worker);
        Ok(())
    }

    fn is_activated(&self) -> bool {
        matches!(self.state, State::Running(_))
    }

    fn reset(&mut self) -> bool {
        self.acked = 0;
        let stopped = self.stop().is_ok();
        self.state = State::Idle(None);
        stopped
    }

    fn supports_quiesce(&self) -> bool {
        true
    }

    fn quiesce(&mut self) -> Result<Vec<DeviceQueue>, VirtioStateError> {
        let stopped = self.stop().map_err(VirtioStateError::Device)?;
        let (sockets, queues) = stopped.ok_or(VirtioStateError::InvalidLifecycle("vsock is not running"))?;
        self.state = State::Idle(Some(sockets));
        Ok(queues)
    }
}
