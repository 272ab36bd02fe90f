//! A number in a file that several processes have mapped.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap};

const LENGTH: usize = 4096;

/// The first eight bytes of a file. The mapping lasts as long as the process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counter(&'static AtomicU64);

impl Counter {
    /// Maps a file, which gets room for it.
    #[allow(unsafe_code)]
    pub(crate) fn map(file: &File) -> io::Result<Self> {
        file.set_len(LENGTH as u64)?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
        let start = unsafe { mmap(std::ptr::null_mut(), LENGTH, protection, flags, file, 0) }?;
        // SAFETY: the mapping is aligned to a page, never unmapped, and the file is never cut shorter; other processes may
        // change the number at any time, as an atomic allows.
        Ok(Self(unsafe { &*start.cast::<AtomicU64>() }))
    }

    pub(crate) fn add_one(self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
