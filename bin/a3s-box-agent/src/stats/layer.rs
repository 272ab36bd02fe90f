//! How much a writable layer takes: its files are counted.
//!
//! The tree belongs to a workload that may change it at any moment. So every directory is opened from the top with the
//! kernel's promise that the way leads through no symbolic link, no mount and not out of the tree; and the number of files,
//! the directories that wait and the time are bounded. What lies beyond a bound, or deeper than a path can say, is
//! missing, and the result says so.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// More files are not counted.
const MAX_INODES: u64 = 1_000_000;
/// Directories that were seen and not yet entered.
const MAX_WAITING: usize = 16 * 1024;
/// The clock is looked at whenever so many files were counted.
const CLOCK_EVERY: u64 = 64;

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const INSIDE: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_XDEV);

/// What a tree takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Blocks on the disk.
    pub bytes: u64,
    /// Files of every kind, directories and the top among them. Names of the same file count once.
    pub inodes: u64,
    /// Nothing is missing.
    pub complete: bool,
}

/// Counts a tree until `end` at the latest. It fails if the top cannot be opened.
pub fn measure(top: &Path, end: Instant) -> io::Result<Usage> {
    let top = rustix::fs::openat(CWD, top, DIRECTORY, Mode::empty())?;
    let mut count = Count {
        usage: Usage { bytes: 0, inodes: 0, complete: true },
        linked: HashSet::new(),
        waiting: Vec::new(),
        end,
    };
    count.add(&rustix::fs::fstat(&top)?);
    count.waiting.push(PathBuf::new());
    while let Some(path) = count.waiting.pop() {
        if !count.directory(&top, &path) {
            count.usage.complete = false;
            break;
        }
    }
    Ok(count.usage)
}

struct Count {
    usage: Usage,
    /// Files with several names that have been counted.
    linked: HashSet<u64>,
    waiting: Vec<PathBuf>,
    end: Instant,
}

impl Count {
    /// `false`: a bound is reached.
    fn directory(&mut self, top: &OwnedFd, path: &Path) -> bool {
        let below = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let directory = match rustix::fs::openat2(top, below, DIRECTORY, Mode::empty(), INSIDE) {
            Ok(directory) => directory,
            Err(error) => {
                self.missed(error);
                return true;
            }
        };
        let entries = match Dir::read_from(&directory) {
            Ok(entries) => entries,
            Err(error) => {
                self.missed(error);
                return true;
            }
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    self.missed(error);
                    break;
                }
            };
            let name: CString = entry.file_name().to_owned();
            if name.as_bytes() == b"." || name.as_bytes() == b".." {
                continue;
            }
            if self.is_over() {
                return false;
            }
            self.entry(rustix::fd::AsFd::as_fd(&directory), &name, path);
        }
        true
    }

    fn entry(&mut self, directory: BorrowedFd<'_>, name: &CString, path: &Path) {
        let stat = match rustix::fs::statat(directory, name.as_c_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(error) => return self.missed(error),
        };
        self.add(&stat);
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            if self.waiting.len() < MAX_WAITING {
                self.waiting.push(path.join(OsStr::from_bytes(name.as_bytes())));
            } else {
                self.usage.complete = false;
            }
        }
    }

    fn add(&mut self, stat: &Stat) {
        let several_names = stat.st_nlink > 1 && FileType::from_raw_mode(stat.st_mode) != FileType::Directory;
        if several_names && !self.linked.insert(stat.st_ino) {
            return;
        }
        self.usage.inodes += 1;
        self.usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
    }

    /// What the workload has deleted or replaced in the meantime was not missed.
    fn missed(&mut self, error: Errno) {
        if !matches!(error, Errno::NOENT | Errno::NOTDIR) {
            self.usage.complete = false;
        }
    }

    fn is_over(&self) -> bool {
        let inodes = self.usage.inodes;
        inodes >= MAX_INODES || (inodes.is_multiple_of(CLOCK_EVERY) && Instant::now() >= self.end)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn files_count_what_they_take_and_their_names_once() {
        let top = tempfile::tempdir().unwrap();
        let empty = measure(top.path(), soon()).unwrap();
        assert_eq!((empty.inodes, empty.complete), (1, true));
        fs::create_dir(top.path().join("sub")).unwrap();
        fs::write(top.path().join("sub/file"), vec![1; 1024 * 1024]).unwrap();
        fs::hard_link(top.path().join("sub/file"), top.path().join("again")).unwrap();
        fs::File::create(top.path().join("sparse")).unwrap().set_len(1 << 40).unwrap();
        let usage = measure(top.path(), soon()).unwrap();
        assert_eq!((usage.inodes, usage.complete), (4, true));
        assert!((1024 * 1024..2 * 1024 * 1024).contains(&usage.bytes), "{usage:?}");
    }

    #[test]
    fn links_lead_nowhere() {
        let outside = tempfile::tempdir().unwrap();
        for name in 0..20 {
            fs::write(outside.path().join(name.to_string()), "").unwrap();
        }
        let top = tempfile::tempdir().unwrap();
        symlink(outside.path(), top.path().join("link")).unwrap();
        assert_eq!(measure(top.path(), soon()).unwrap().inodes, 2);
        // As if a directory was replaced by a link between its being seen and its being entered.
        let mut count = Count {
            usage: Usage { bytes: 0, inodes: 0, complete: true },
            linked: HashSet::new(),
            waiting: Vec::new(),
            end: soon(),
        };
        let opened = rustix::fs::openat(CWD, top.path(), DIRECTORY, Mode::empty()).unwrap();
        for path in ["link", "link/..", ".."] {
            count.directory(&opened, Path::new(path));
            assert_eq!(count.usage.inodes, 0, "{path}");
        }
    }

    #[test]
    fn a_count_that_runs_out_of_time_says_that_it_is_partial() {
        let top = tempfile::tempdir().unwrap();
        for name in 0..200 {
            fs::write(top.path().join(name.to_string()), "").unwrap();
        }
        let usage = measure(top.path(), Instant::now()).unwrap();
        assert!(!usage.complete && usage.inodes < 200, "{usage:?}");
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_counted_as_far_as_paths_reach() {
        let top = tempfile::tempdir().unwrap();
        let mut at = rustix::fs::open(top.path(), DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..3_000 {
            rustix::fs::mkdirat(&at, "deeper", Mode::from_raw_mode(0o700)).unwrap();
            at = rustix::fs::openat(&at, "deeper", DIRECTORY, Mode::empty()).unwrap();
        }
        let usage = measure(top.path(), soon()).unwrap();
        assert!(!usage.complete && usage.inodes > 500, "{usage:?}");
        crate::stage::remove::empty(top.path()).unwrap();
    }
}
