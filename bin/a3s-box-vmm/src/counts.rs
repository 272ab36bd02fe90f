//! The file that holds the counts of the share's requests: see `a3s_box_vmm::share_requests`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use a3s_box_vmm::share_requests::{REQUESTS_FILE, Requests};
use anyhow::{Context, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Makes the file in the box's directory, with nothing counted.
pub(crate) fn create(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join(REQUESTS_FILE);
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&path);
    let made = file.and_then(|file| file.set_len(Requests::LENGTH as u64).map(|()| file));
    made.with_context(|| format!("make {}", path.display()))
}

/// The counts in such a file, for as long as the process lives. The file itself need not stay open.
#[allow(unsafe_code)]
pub(crate) fn map(file: &File) -> anyhow::Result<&'static Requests> {
    let length = file.metadata().context("look at the file of counts")?.len();
    ensure!(length == Requests::LENGTH as u64, "the file of counts has {length} bytes");
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, at an address of the kernel's choice, that replaces nothing.
    let mapped = unsafe { mmap(std::ptr::null_mut(), Requests::LENGTH, access, MapFlags::SHARED, file, 0) };
    let mapped = mapped.context("map the file of counts")?;
    // SAFETY: `Requests` is made of atomic numbers, for which any content is valid and which others may change meanwhile. The
    // mapping is as long, aligned to a page, and never unmapped.
    Ok(unsafe { &*mapped.cast::<Requests>() })
}

#[cfg(test)]
mod tests {
    use a3s_box_vmm::share_requests::{Kind, Snapshot};

    use super::*;

    #[test]
    fn what_one_process_counts_another_reads_and_a_new_box_starts_at_zero() {
        let dir = tempfile::tempdir().unwrap();
        let requests = map(&create(dir.path()).unwrap()).unwrap();
        requests.count(Kind::Lookup);
        requests.count(Kind::Lookup);
        assert_eq!(Snapshot::read(dir.path()).unwrap().kinds(), [(Kind::Lookup, 2)]);
        create(dir.path()).unwrap();
        assert_eq!(Snapshot::read(dir.path()).unwrap().total(), 0);
    }

    #[test]
    fn a_file_that_is_too_short_is_not_mapped() {
        let file = tempfile::tempfile().unwrap();
        assert!(map(&file).unwrap_err().to_string().contains("0 bytes"));
    }
}
