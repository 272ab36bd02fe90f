//! Packets of the device in the guest's memory.
//!
//! A guest lays its packets as it likes: the header and the bytes may lie in one descriptor or in many. What is copied is
//! copied once and judged afterwards, so that a guest that changes its memory meanwhile changes nothing.

use std::io::{Read, Write};

use a3s_box_vsock::connection::BUFFER;
use a3s_box_vsock::device::MAX_PAYLOAD;
use a3s_box_vsock::packet::{HEADER, Header};
use a3s_box_vsock::{Vsock, packet};
use vhost_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vhost_user_backend::VringState;
use virtio_queue::{DescriptorChain, QueueOwnedT};

type Memory = GuestMemoryMmap<()>;
/// A queue with what QEMU said of it.
pub(super) type Ring = VringState<GuestMemoryAtomic<Memory>>;
type Chain<'a> = DescriptorChain<&'a Memory>;

/// Moves packets between the queues and the device.
pub(super) struct Mover {
    /// A packet's bytes on their way. No guest may send more at once than there is room for in all.
    buffer: Vec<u8>,
}

/// What a queue can be no worse than: the guest is told nothing, and the queue is not served.
pub(super) type Moved = Result<bool, virtio_queue::Error>;

impl Mover {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; BUFFER.max(MAX_PAYLOAD)] }
    }

    /// Takes one packet of the guest, if there is one and the device takes any.
    pub(super) fn take(&mut self, ring: &mut Ring, memory: &Memory, vsock: &mut Vsock) -> Moved {
        if !vsock.device.takes_packets() {
            return Ok(false);
        }
        let Some(chain) = ring.get_queue_mut().iter(memory)?.next() else { return Ok(false) };
        let head = chain.head_index();
        // What is no packet is given back all the same: the guest's mistake is its own.
        if let Some((header, length)) = self.read(chain, memory) {
            vsock.device.from_guest(&header, &self.buffer[..length]);
        }
        ring.add_used(head, 0)?;
        Ok(true)
    }

    fn read(&mut self, chain: Chain<'_>, memory: &Memory) -> Option<(Header, usize)> {
        let mut reader = chain.reader(memory).ok()?;
        let mut header = [0; HEADER];
        reader.read_exact(&mut header).ok()?;
        let header = packet::Header::parse(&header);
        let length = (header.length as usize).min(self.buffer.len()).min(reader.available_bytes());
        reader.read_exact(&mut self.buffer[..length]).ok()?;
        Some((header, length))
    }

    /// Gives the guest one packet, if there is one and it has room.
    pub(super) fn give(&mut self, ring: &mut Ring, memory: &Memory, vsock: &mut Vsock) -> Moved {
        if !vsock.device.has_packets() {
            return Ok(false);
        }
        let Some(chain) = ring.get_queue_mut().iter(memory)?.next() else { return Ok(false) };
        let head = chain.head_index();
        let writer = chain.writer(memory).ok();
        let Some(mut writer) = writer.filter(|writer| writer.available_bytes() > HEADER) else {
            // No room for a packet: given back as it is.
            ring.add_used(head, 0)?;
            return Ok(true);
        };
        let room = (writer.available_bytes() - HEADER).min(MAX_PAYLOAD);
        let Some(header) = vsock.device.to_guest(&mut self.buffer[..room]) else {
            ring.get_queue_mut().go_to_previous_position();
            return Ok(false);
        };
        let length = header.length as usize;
        let written =
            writer.write_all(&header.bytes()).and_then(|()| writer.write_all(&self.buffer[..length]));
        ring.add_used(head, if written.is_ok() { (HEADER + length) as u32 } else { 0 })?;
        Ok(true)
    }
}
