//! What processes have open.

use std::fs;
use std::path::Path;

/// No more links are read in one go.
const MAX_LINKS: usize = 4096;

/// Open files of the processes, and those of them that are sockets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Open {
    /// All.
    pub files: u64,
    /// Sockets, of the first 4096.
    pub sockets: u64,
}

/// Counts for processes by their ids, as `cgroup.procs` lists them. One that has ended has nothing open.
pub fn count(processes: &str) -> Open {
    let mut open = Open::default();
    let mut links = MAX_LINKS;
    for pid in processes.lines() {
        let folder = Path::new("/proc").join(pid).join("fd");
        // Its size is the number of its entries: kernel 6.2, proc_pid_fd(5).
        open.files += fs::metadata(&folder).map_or(0, |metadata| metadata.len());
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            if links == 0 {
                break;
            }
            links -= 1;
            let target = fs::read_link(entry.path()).unwrap_or_default();
            open.sockets += u64::from(target.to_string_lossy().starts_with("socket:"));
        }
    }
    open
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn files_and_sockets_of_this_process_are_counted() {
        let id = std::process::id().to_string();
        let before = count(&id);
        let pair = UnixStream::pair().unwrap();
        let after = count(&format!("{id}\n4194305\n"));
        // Other tests open and close files meanwhile.
        assert!(after.sockets >= 2 && after.sockets >= before.sockets, "{before:?} {after:?}");
        drop(pair);
        assert_eq!(count(""), Open::default());
    }
}
