//! The device as QEMU talks to it.

use std::io;

use a3s_box_protocol::GUEST_CID;
use a3s_box_vsock::Vsock;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vhost_user_backend::{VhostUserBackendMut, VringMutex, VringT};
use vmm_sys_util::epoll::EventSet;

use super::queues::{Mover, Ring};

/// Packets to the guest, packets of the guest. The third queue of the standard, for events, is QEMU's.
const QUEUES: usize = 2;
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;

/// QEMU's queues have 128 places.
const QUEUE_SIZE: usize = 1024;

/// The event that says that something has happened to the sockets. Those up to the number of queues are the framework's.
pub(super) const SOCKETS_CHANGED: u16 = QUEUES as u16 + 1;

/// VIRTIO_RING_F_EVENT_IDX: fewer interrupts.
const EVENT_INDEX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;

pub(super) struct Backend {
    vsock: Vsock,
    mover: Mover,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
}

impl Backend {
    pub(super) fn new(vsock: Vsock, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> Self {
        Self { vsock, mover: Mover::new(), memory }
    }

    /// Moves packets until neither direction has one, or the guest has no room.
    fn work(&mut self, to_guest: &mut Ring, from_guest: &mut Ring) -> Result<(), virtio_queue::Error> {
        let memory = self.memory.memory();
        loop {
            to_guest.disable_notification()?;
            from_guest.disable_notification()?;
            let (mut given, mut taken) = (false, false);
            loop {
                let took = self.mover.take(from_guest, &memory, &mut self.vsock)?;
                let gave = self.mover.give(to_guest, &memory, &mut self.vsock)?;
                (given, taken) = (given | gave, taken | took);
                if !took && !gave {
                    break;
                }
            }
            for (ring, moved) in [(&mut *to_guest, given), (&mut *from_guest, taken)] {
                if moved && ring.needs_notification()? {
                    ring.signal_used_queue().map_err(|_| virtio_queue::Error::QueueNotReady)?;
                }
            }
            // Room for packets is only waited for while there are packets, and packets only while they are taken.
            let more = self.vsock.device.has_packets() && to_guest.enable_notification()?;
            let more = self.vsock.device.takes_packets() && from_guest.enable_notification()? || more;
            if !more {
                return Ok(());
            }
        }
    }
}

impl VhostUserBackendMut for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        VERSION_1 | EVENT_INDEX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // The guest's address is read through the one, the number of queues asked for through the other.
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ
    }

    /// The framework tells each queue.
    fn set_event_idx(&mut self, _enabled: bool) {}

    /// The guest's address, little-endian.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = u64::from(GUEST_CID).to_le_bytes();
        let from = offset as usize;
        let wanted = from.checked_add(size as usize).and_then(|to| config.get(from..to));
        wanted.unwrap_or_default().to_vec()
    }

    /// The framework's memory is the one that this was made with.
    fn update_memory(&mut self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    /// An error would end the worker's thread and nothing else, so it never gets there.
    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        rings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        if event == SOCKETS_CHANGED
            && let Err(error) = self.vsock.look()
        {
            fail(&format!("watch the sockets: {error}"));
        }
        let [to_guest, from_guest] = [TO_GUEST, FROM_GUEST].map(|index| rings.get(index));
        let (Some(to_guest), Some(from_guest)) = (to_guest, from_guest) else {
            fail("QEMU has too few queues")
        };
        let (mut to_guest, mut from_guest) = (to_guest.get_mut(), from_guest.get_mut());
        if !is_served(&to_guest) || !is_served(&from_guest) {
            return Ok(());
        }
        if let Err(error) = self.work(&mut to_guest, &mut from_guest) {
            fail(&format!("use the guest's queues: {error}"));
        }
        Ok(())
    }
}

/// Before the guest's driver is there, and after it has gone, sockets may change all the same.
fn is_served(ring: &Ring) -> bool {
    use virtio_queue::QueueT;
    ring.is_enabled() && ring.get_queue().ready()
}

/// Ends the process and with it the box.
fn fail(what: &str) -> ! {
    eprintln!("a3s-box-vmm: vsock: {what}");
    std::process::exit(1)
}
