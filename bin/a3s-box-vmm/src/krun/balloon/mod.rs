//! A memory balloon that takes only what the guest has no use for (virtio 1.3, section 5.5: free page reporting).
//!
//! The guest puts the addresses of free pages into a queue and leaves the pages alone until they are answered; they are
//! given back to the host meanwhile. Nothing is ever asked of the guest: the balloon proper stays empty.
//!
//! libkrun's own device trusts the reports. Here [`ranges`] decides, from numbers alone, which of them may be followed, and
//! everything else is counted and left alone.
//!
//! ```text
//! guest ── reporting queue ──▶ worker ──▶ ranges (may it?) ──▶ memory (do it) ──▶ answer
//! ```

mod memory;
mod ranges;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::Arc;

use msb_krun_devices::virtio::{
    ActivateError, ActivateResult, DeviceQueue, InterruptTransport, QueueConfig, VirtioDevice,
    VirtioStateError,
};
use vm_memory::GuestMemoryMmap;

use ranges::Tally;
use worker::Worker;

/// Virtio's number of this kind of device.
pub(crate) const TYPE_BALLOON: u32 = 5;
const VERSION_1: u64 = 1 << 32;
const REPORTS: u64 = 1 << 5;

/// Linux wants to report 32 ranges at once.
const QUEUE_SIZE: u16 = 32;
/// Inflate, deflate, report. Linux numbers only the queues of features that were offered.
const QUEUES: [QueueConfig; 3] = [QueueConfig::new(QUEUE_SIZE); 3];
const REPORTING: usize = 2;

/// num_pages, actual, free_page_hint_cmd_id and poison_val: all zero for ever.
const CONFIG_LENGTH: u64 = 16;

/// The device.
///
/// ```text
/// idle ── activate ──▶ running ── quiesce, reset ──▶ idle
/// ```
#[derive(Default)]
pub(crate) struct Balloon {
    acked: u64,
    running: Option<Worker>,
    tally: Arc<Tally>,
}

impl VirtioDevice for Balloon {
    fn avail_features(&self) -> u64 {
        VERSION_1 | REPORTS
    }

    fn acked_features(&self) -> u64 {
        self.acked
    }

    fn set_acked_features(&mut self, acked_features: u64) {
        self.acked = acked_features & self.avail_features();
    }

    fn device_type(&self) -> u32 {
        TYPE_BALLOON
    }

    fn device_name(&self) -> &str {
        "balloon"
    }

    fn queue_config(&self) -> &[QueueConfig] {
        &QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let left = CONFIG_LENGTH.saturating_sub(offset);
        let length = data.len().min(left as usize);
        data[..length].fill(0);
    }

    /// The guest tells how many pages it has given: none.
    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(
        &mut self,
        mem: GuestMemoryMmap,
        interrupt: InterruptTransport,
        queues: Vec<DeviceQueue>,
    ) -> ActivateResult {
        if queues.len() != QUEUES.len() || self.running.is_some() {
            return Err(ActivateError::BadActivate);
        }
        let worker = Worker::start(mem, interrupt, queues, Arc::clone(&self.tally));
        self.running = Some(worker.map_err(ActivateError::EpollCtl)?);
        Ok(())
    }

    fn is_activated(&self) -> bool {
        self.running.is_some()
    }

    fn reset(&mut self) -> bool {
        self.acked = 0;
        self.running.take().is_none_or(|worker| worker.stop().is_ok())
    }

    fn supports_quiesce(&self) -> bool {
        true
    }

    fn quiesce(&mut self) -> Result<Vec<DeviceQueue>, VirtioStateError> {
        let worker = self.running.take();
        let worker = worker.ok_or(VirtioStateError::InvalidLifecycle("the balloon is not running"))?;
        worker.stop().map_err(VirtioStateError::Device)
    }
}
