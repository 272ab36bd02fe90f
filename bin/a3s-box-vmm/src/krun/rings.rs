//! Queues whose memory may be used.

use msb_krun_devices::virtio::Queue;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

/// Whether every ring of the queue lies in one region. libkrun looks only at where the rings end, and panics at a ring
/// that it cannot read.
pub(super) fn hold(memory: &GuestMemoryMmap, queue: &Queue) -> bool {
    let size = usize::from(queue.actual_size());
    let rings =
        [(queue.desc_table, 16 * size), (queue.avail_ring, 6 + 2 * size), (queue.used_ring, 6 + 8 * size)];
    queue.is_valid(memory) && rings.into_iter().all(|(start, length)| memory.get_slice(start, length).is_ok())
}
