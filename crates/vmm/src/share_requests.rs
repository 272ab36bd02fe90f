//! What a guest asks of its share: which names it may use, and how many requests of each kind came.
//!
//! Both backends' file servers stand on this, each with a wrapper around the library that serves the files.
//!
//! The counts lie in a file of one fixed size in the box's directory. Whoever serves the files has it mapped and counts in
//! place; whoever wants to know reads the file, at any time and also after the box has ended. A guest can make the numbers
//! grow and nothing else.

use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Name of the file with the counts, in the box's directory.
pub const REQUESTS_FILE: &str = "share-requests";

/// Numbers of kinds lie below this.
const SLOTS: usize = 64;

macro_rules! kinds {
    ($($kind:ident = $opcode:literal, $name:literal;)+) => {
        /// The kinds of requests, with their numbers in `linux/fuse.h`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Kind {
            $(
                #[doc = concat!("FUSE_", $name)]
                $kind = $opcode,
            )+
        }

        impl Kind {
            /// Every kind, by number.
            pub const ALL: &[Self] = &[$(Self::$kind,)+];

            /// As in `linux/fuse.h`, without the prefix.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)+
                }
            }
        }
    };
}

kinds! {
    Lookup = 1, "LOOKUP";
    Forget = 2, "FORGET";
    Getattr = 3, "GETATTR";
    Setattr = 4, "SETATTR";
    Readlink = 5, "READLINK";
    Symlink = 6, "SYMLINK";
    Mknod = 8, "MKNOD";
    Mkdir = 9, "MKDIR";
    Unlink = 10, "UNLINK";
    Rmdir = 11, "RMDIR";
    Rename = 12, "RENAME";
    Link = 13, "LINK";
    Open = 14, "OPEN";
    Read = 15, "READ";
    Write = 16, "WRITE";
    Statfs = 17, "STATFS";
    Release = 18, "RELEASE";
    Fsync = 20, "FSYNC";
    Setxattr = 21, "SETXATTR";
    Getxattr = 22, "GETXATTR";
    Listxattr = 23, "LISTXATTR";
    Removexattr = 24, "REMOVEXATTR";
    Flush = 25, "FLUSH";
    Init = 26, "INIT";
    Opendir = 27, "OPENDIR";
    Readdir = 28, "READDIR";
    Releasedir = 29, "RELEASEDIR";
    Fsyncdir = 30, "FSYNCDIR";
    Getlk = 31, "GETLK";
    Setlk = 32, "SETLK";
    Setlkw = 33, "SETLKW";
    Access = 34, "ACCESS";
    Create = 35, "CREATE";
    Bmap = 37, "BMAP";
    Destroy = 38, "DESTROY";
    Ioctl = 39, "IOCTL";
    Poll = 40, "POLL";
    NotifyReply = 41, "NOTIFY_REPLY";
    BatchForget = 42, "BATCH_FORGET";
    Fallocate = 43, "FALLOCATE";
    Readdirplus = 44, "READDIRPLUS";
    Lseek = 46, "LSEEK";
    CopyFileRange = 47, "COPY_FILE_RANGE";
    SetupMapping = 48, "SETUPMAPPING";
    RemoveMapping = 49, "REMOVEMAPPING";
    Syncfs = 50, "SYNCFS";
    Tmpfile = 51, "TMPFILE";
}

/// The counts while they grow: what the file holds, as it lies in memory.
#[derive(Debug)]
#[repr(transparent)]
pub struct Requests([AtomicU64; SLOTS]);

impl Requests {
    /// Length of the file in bytes.
    pub const LENGTH: usize = size_of::<Self>();

    /// Nothing has been asked.
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; SLOTS])
    }

    /// One more request of this kind. RENAME2 counts as RENAME.
    pub fn count(&self, kind: Kind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts as they are now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(std::array::from_fn(|slot| self.0[slot].load(Ordering::Relaxed)))
    }
}

impl Default for Requests {
    fn default() -> Self {
        Self::new()
    }
}

/// The counts of one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot([u64; SLOTS]);

impl Snapshot {
    /// Reads the counts of the box with this directory. They are what the box's file server wrote there: numbers, and
    /// not to be trusted if the server was taken over.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let mut bytes = [0; Requests::LENGTH];
        std::fs::File::open(dir.join(REQUESTS_FILE))?.read_exact(&mut bytes)?;
        let (slots, []) = bytes.as_chunks::<8>() else { unreachable!("the file is made of whole numbers") };
        Ok(Self(std::array::from_fn(|slot| u64::from_ne_bytes(slots[slot]))))
    }

    /// How many requests of this kind there were.
    pub fn of(&self, kind: Kind) -> u64 {
        self.0[kind as usize]
    }

    /// What came since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self(std::array::from_fn(|slot| self.0[slot].wrapping_sub(earlier.0[slot])))
    }

    /// All requests.
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |total, count| total.wrapping_add(*count))
    }

    /// The kinds that came at all, the most frequent first.
    pub fn kinds(&self) -> Vec<(Kind, u64)> {
        let counts = Kind::ALL.iter().map(|kind| (*kind, self.of(*kind)));
        let mut kinds: Vec<_> = counts.filter(|(_, count)| *count > 0).collect();
        kinds.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        kinds
    }
}

/// Whether a guest's file name is the name of one file in the directory that it is looked up in.
///
/// The libraries that serve the files hand a name to the host's kernel as it comes, and to that a name may as well be a path:
/// it would lead out of the share, to whatever else the jail holds. Linux never asks for such names, nor for `.` and `..`, which
/// it resolves by itself.
pub fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    // A guest's kernel could name files of the jail that are not in its share.
    #[test]
    fn what_leads_anywhere_else_is_no_name() {
        for path in [&b""[..], b".", b"..", b"/", b"/etc", b"../x", b"x/..", b"x/", b"x/y", b"x\0", b"\0"] {
            assert!(!is_name(path), "{:?}", String::from_utf8_lossy(path));
        }
        for name in [
            &b"x"[..],
            b"...",
            b".x",
            b"x..",
            b" ",
            b"\\",
            b"\xff\xfe",
            "ö/".trim_end_matches('/').as_bytes(),
        ] {
            assert!(is_name(name), "{:?}", String::from_utf8_lossy(name));
        }
    }

    #[test]
    fn every_kind_has_a_slot_of_its_own_in_the_order_of_its_number() {
        assert!(Kind::ALL.windows(2).all(|pair| (pair[0] as u8) < pair[1] as u8));
        assert!(Kind::ALL.iter().all(|kind| (*kind as usize) < SLOTS));
        assert_eq!((Kind::Readdirplus as u8, Kind::Readdirplus.name()), (44, "READDIRPLUS"));
    }

    #[test]
    fn what_was_counted_is_read_back_from_the_file() {
        let requests = Requests::new();
        let before = requests.snapshot();
        for kind in [Kind::Lookup, Kind::Tmpfile, Kind::Lookup] {
            requests.count(kind);
        }
        let counted = requests.snapshot().since(&before);
        assert_eq!(counted.kinds(), [(Kind::Lookup, 2), (Kind::Tmpfile, 1)]);
        assert_eq!(counted.total(), 3);

        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = counted.0.iter().flat_map(|count| count.to_ne_bytes()).collect();
        assert_eq!(bytes.len(), Requests::LENGTH);
        std::fs::write(dir.path().join(REQUESTS_FILE), &bytes).unwrap();
        assert_eq!(Snapshot::read(dir.path()).unwrap(), counted);
        std::fs::write(dir.path().join(REQUESTS_FILE), &bytes[1..]).unwrap();
        assert!(Snapshot::read(dir.path()).is_err());
    }
}
