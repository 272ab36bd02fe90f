//! Giving pages of guest memory back to the host.

use std::io;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::Advice;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::ranges::{Discard, PAGE, Region};

pub(super) use super::super::rings::hold as holds;

/// The regions in the order in which a [`Discard`] counts them.
pub(super) fn regions(memory: &GuestMemoryMmap) -> Vec<Region> {
    memory.iter().map(|region| Region { start: region.start_addr().0, length: region.len() }).collect()
}

/// Gives back what [`judge`](super::ranges::judge) allowed; the guest reads something else there from now on.
///
/// Memory without a file reads as zeros then, a private copy of a file as that file. Of memory that is a file, the file
/// itself must let go of the pages: another mapping's advice would only unmap them.
pub(super) fn give_back(memory: &GuestMemoryMmap, discard: Discard) -> io::Result<()> {
    let region = memory.iter().nth(discard.region);
    let region = region.ok_or_else(|| io::Error::other("the guest has no such region of memory"))?;
    match region.file_offset() {
        Some(file) if region.flags() & libc::MAP_SHARED != 0 => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            Ok(fallocate(file.file(), flags, file.start() + discard.offset, discard.length)?)
        }
        Some(_) | None => advise(region, discard),
    }
}

#[allow(unsafe_code)]
fn advise(region: &GuestRegionMmap, discard: Discard) -> io::Result<()> {
    // Once more, because what follows cannot be undone.
    let end = discard.offset.checked_add(discard.length);
    if end.is_none_or(|end| end > region.len()) || !discard.offset.is_multiple_of(PAGE) {
        return Err(io::Error::other("a range outside its region of memory"));
    }
    let start = region.as_ptr().wrapping_add(discard.offset as usize);
    // SAFETY: the range is whole pages of one mapping that `region` keeps alive. It is guest memory, which changes at any
    // time and is never borrowed.
    Ok(unsafe { rustix::mm::madvise(start.cast(), discard.length as usize, Advice::LinuxDontNeed) }?)
}
