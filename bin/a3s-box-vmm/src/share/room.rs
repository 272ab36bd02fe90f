//! Room for the files that a guest knows.
//!
//! A file server keeps a descriptor for every file whose inode the guest's kernel holds, and the guest's kernel holds inodes
//! for as long as it has memory: a walk over a large volume would use up the process's descriptors. The server cannot
//! take one back. So the guest is asked to forget, over a vsock connection that its agent opens
//! ([`a3s_box_protocol::FORGET_PORT`]), in time and more than once; as the room gets short, what makes it shorter has to wait. A guest that
//! does not forget is refused further files, and harms nobody else.
//!
//! ```text
//! descriptors  0 ───────── 1/2 ─────────── 3/4 ─────────────── all
//!                           asked: names    asked: contents too    refused (ENFILE)
//!                                           every new file waits
//! ```

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use a3s_box_protocol::{FORGET_CONTENTS, FORGET_NAMES};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use super::place::{Place, closing_matters};

/// The guest is asked again whenever it has taken so much of the room since: a sixteenth.
const AGAIN: u64 = 16;

/// How long a new file waits when the room is short. The guest's agent takes about as long to answer.
const WAIT: Duration = Duration::from_millis(1);

/// The files that the guest holds.
pub(crate) struct Room {
    /// Descriptors for the guest's files.
    limit: u64,
    held: Mutex<Held>,
    /// Files and directories that the guest has opened.
    open: AtomicU64,
    agent: Mutex<Agent>,
}

#[derive(Default)]
struct Held {
    inodes: HashMap<u64, Known>,
    /// How many descriptors there were when the guest was last asked.
    asked: u64,
}

/// An inode that the guest knows.
struct Known {
    /// How often it was told of it since it last forgot it.
    times: u64,
    place: Place,
}

impl Room {
    /// For so many descriptors. `listener` is where the guest's agent comes, if it does; it does not block.
    pub(crate) fn new(limit: u64, listener: Option<UnixListener>) -> Self {
        let agent = Mutex::new(Agent { listener, connection: None });
        Self { limit, held: Mutex::default(), open: AtomicU64::new(0), agent }
    }

    /// The guest is about to be told of an inode, which it finds by this name in a directory. `mounted`: another file system
    /// begins there. An error is for the guest, and the caller makes the server forget the inode.
    pub(crate) fn learn(&self, inode: u64, directory: u64, name: &[u8], mounted: bool) -> io::Result<()> {
        let ask = {
            let mut held = self.held();
            let count = held.inodes.len() as u64;
            let parent = held.inodes.get(&directory).map(|known| known.place);
            match held.inodes.entry(inode) {
                Entry::Occupied(known) => {
                    known.into_mut().times += 1;
                    return Ok(());
                }
                Entry::Vacant(_) if self.used(count) >= self.limit => None,
                Entry::Vacant(new) => {
                    let place = Place::of(parent, directory, name, mounted, closing_matters);
                    new.insert(Known { times: 1, place });
                    Some(self.whether_to_ask(&mut held))
                }
            }
        };
        self.make_room(ask.ok_or_else(|| self.refusal())?);
        Ok(())
    }

    /// For a guest that has used up its room. It is asked each time: what it could not forget before it may forget now, and
    /// nothing else would ever ask.
    fn refusal(&self) -> io::Error {
        self.make_room(Ask::Contents);
        io::Error::from_raw_os_error(libc::ENFILE)
    }

    /// Whether there is room for so many descriptors more. Asked before something is made: a file must not stay behind of which
    /// the guest was told that it could not be made.
    pub(crate) fn check(&self, more: u64) -> io::Result<()> {
        let used = self.used(self.held().inodes.len() as u64);
        if used.saturating_add(more) > self.limit { Err(self.refusal()) } else { Ok(()) }
    }

    /// Whether the guest has to say when it closes this file, which it opens with these flags.
    pub(crate) fn closing_matters(&self, inode: u64, flags: u32) -> bool {
        let writes = flags as i32 & libc::O_ACCMODE != libc::O_RDONLY;
        writes && self.held().inodes.get(&inode).is_none_or(|known| known.place.closing_matters())
    }

    /// The guest has forgotten `times` of the times that it was told of an inode.
    pub(crate) fn forget(&self, inode: u64, times: u64) {
        let mut held = self.held();
        if let Entry::Occupied(mut known) = held.inodes.entry(inode) {
            match known.get().times.checked_sub(times) {
                None | Some(0) => drop(known.remove()),
                Some(left) => known.get_mut().times = left,
            }
        }
        let used = self.used(held.inodes.len() as u64);
        held.asked = held.asked.min(used);
    }

    /// The guest is about to open a file.
    fn open(&self) -> io::Result<()> {
        self.check(1)?;
        let ask = self.whether_to_ask(&mut self.held());
        self.make_room(ask);
        self.open.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Opens something, if there is room for it. `handle` says whether the answer has a handle, which the guest will close.
    pub(crate) fn opened<T>(
        &self,
        open: impl FnOnce() -> io::Result<T>,
        handle: impl FnOnce(&T) -> bool,
    ) -> io::Result<T> {
        self.open()?;
        let answer = open();
        if !answer.as_ref().is_ok_and(handle) {
            self.close();
        }
        answer
    }

    /// The guest has closed a file, or could not open it.
    pub(crate) fn close(&self) {
        // A guest may close what it never opened.
        let _ = self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| open.checked_sub(1));
    }

    /// The guest has gone, or begins anew.
    pub(crate) fn clear(&self) {
        *self.held() = Held::default();
        self.open.store(0, Ordering::Relaxed);
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn used(&self, inodes: u64) -> u64 {
        inodes.saturating_add(self.open.load(Ordering::Relaxed))
    }

    fn whether_to_ask(&self, held: &mut Held) -> Ask {
        let used = self.used(held.inodes.len() as u64);
        if used < self.limit / 2 {
            return Ask::Nothing;
        }
        let short = used >= self.limit / 4 * 3;
        if used < held.asked + (self.limit / AGAIN).max(1) && held.asked >= self.limit / 2 {
            return if short { Ask::Wait } else { Ask::Nothing };
        }
        held.asked = used;
        if short { Ask::Contents } else { Ask::Names }
    }

    fn make_room(&self, ask: Ask) {
        let byte = match ask {
            Ask::Nothing => return,
            Ask::Names => Some(FORGET_NAMES),
            Ask::Contents => Some(FORGET_CONTENTS),
            Ask::Wait => None,
        };
        if let Some(byte) = byte {
            self.agent.lock().unwrap_or_else(PoisonError::into_inner).tell(byte);
        }
        if matches!(ask, Ask::Contents | Ask::Wait) {
            // Not by sleep(2): the file server's filter has no call for it.
            std::thread::park_timeout(WAIT);
        }
    }
}

/// What is to be done about the room.
#[derive(Clone, Copy)]
enum Ask {
    Nothing,
    Names,
    Contents,
    Wait,
}

/// The way to the guest's agent. Nothing here waits for it.
struct Agent {
    listener: Option<UnixListener>,
    connection: Option<OwnedFd>,
}

impl Agent {
    fn tell(&mut self, byte: u8) {
        // A guest that opens another connection has given the one before up.
        // Not by the standard library's ways to use a socket: the file server's filter lacks their calls.
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        while let Some(Ok(connection)) = self.listener.as_ref().map(|listener| accept_with(listener, flags)) {
            self.connection = Some(connection);
        }
        match self.connection.as_ref().map(|connection| rustix::io::write(connection, &[byte])) {
            // Where it has not read what it was told before, that says the same.
            Some(Ok(_) | Err(Errno::AGAIN)) | None => {}
            Some(Err(_)) => self.connection = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn room(limit: u64) -> (Room, UnixStream, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let room = Room::new(limit, Some(listener));
        let agent = UnixStream::connect(&path).unwrap();
        agent.set_nonblocking(true).unwrap();
        (room, agent, dir)
    }

    fn told(agent: &mut UnixStream) -> Vec<u8> {
        let mut bytes = [0; 64];
        match agent.read(&mut bytes) {
            Ok(length) => bytes[..length].to_vec(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Vec::new(),
            Err(error) => panic!("{error}"),
        }
    }

    impl Room {
        fn know(&self, inode: u64) -> io::Result<()> {
            self.learn(inode, 1, b"file", false)
        }
    }

    fn is_full(answer: io::Result<()>) -> bool {
        answer.is_err_and(|error| error.raw_os_error() == Some(libc::ENFILE))
    }

    #[test]
    fn the_guest_is_asked_at_half_and_again_and_for_contents_when_room_is_short() {
        let (room, mut agent, _dir) = room(64);
        (0..31).for_each(|inode| room.know(inode).unwrap());
        assert_eq!(told(&mut agent), b"");
        room.know(31).unwrap();
        assert_eq!(told(&mut agent), [FORGET_NAMES]);
        (32..35).for_each(|inode| room.know(inode).unwrap());
        assert_eq!(told(&mut agent), b"");
        room.know(35).unwrap();
        assert_eq!(told(&mut agent), [FORGET_NAMES]);
        (36..64).for_each(|inode| room.know(inode).unwrap());
        assert_eq!(told(&mut agent), [[FORGET_NAMES; 2].as_slice(), &[FORGET_CONTENTS; 5]].concat());
        assert!(is_full(room.know(64)));
        // What it knows costs nothing.
        room.know(7).unwrap();
    }

    // It could forget nothing when it was asked (all was in use), and nobody would have asked it again.
    #[test]
    fn a_guest_that_is_refused_is_asked_each_time() {
        let (room, mut agent, _dir) = room(16);
        (0..16).for_each(|inode| room.know(inode).unwrap());
        told(&mut agent);
        assert!(is_full(room.know(16)) && is_full(room.open()) && is_full(room.check(1)));
        assert_eq!(told(&mut agent), [FORGET_CONTENTS; 3]);
    }

    #[test]
    fn what_is_forgotten_makes_room_when_every_mention_is_taken_back() {
        let (room, mut agent, _dir) = room(16);
        (0..16).for_each(|inode| room.know(inode).unwrap());
        room.know(3).unwrap();
        room.forget(3, 1);
        assert!(is_full(room.know(100)));
        room.forget(3, 1);
        room.know(100).unwrap();
        (0..16).for_each(|inode| room.forget(inode, 1));
        told(&mut agent);
        // And it is asked from the beginning.
        (200..207).for_each(|inode| room.know(inode).unwrap());
        assert_eq!(told(&mut agent)[0], FORGET_NAMES);
    }

    #[test]
    fn open_files_take_room_too_and_a_guest_cannot_close_more_than_it_opened() {
        let (room, _agent, _dir) = room(4);
        (0..3).for_each(|_| room.open().unwrap());
        room.know(1).unwrap();
        assert!(is_full(room.open()) && is_full(room.know(2)));
        (0..9).for_each(|_| room.close());
        room.forget(1, u64::MAX);
        (0..4).for_each(|_| room.open().unwrap());
        assert!(is_full(room.open()));
        room.clear();
        room.open().unwrap();
    }

    #[test]
    fn an_agent_that_reads_nothing_or_has_gone_delays_nobody() {
        let (room, agent, dir) = room(2);
        for inode in 0..2000 {
            room.know(inode % 2).unwrap();
            room.forget(inode % 2, 1);
        }
        drop(agent);
        (0..4).for_each(|inode| drop(room.know(inode)));
        room.clear();
        // Another one is heard.
        let mut agent = UnixStream::connect(dir.path().join("socket")).unwrap();
        room.know(1).unwrap();
        let mut byte = [0];
        agent.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [FORGET_CONTENTS]);
        assert!(Room::new(8, None).know(1).is_ok());
    }

    #[test]
    fn who_only_reads_need_not_say_that_a_file_is_closed() {
        let room = Room::new(8, None);
        room.learn(2, 1, b"pod", false).unwrap();
        // Nothing is there by that name, so nothing is known of its file system.
        room.learn(3, 2, b"no-such-volume", true).unwrap();
        room.learn(4, 3, b"file", false).unwrap();
        assert!(!room.closing_matters(4, libc::O_RDONLY as u32));
        assert!(
            room.closing_matters(4, libc::O_WRONLY as u32) && room.closing_matters(4, libc::O_RDWR as u32)
        );
        assert!(room.closing_matters(99, libc::O_RDWR as u32));
    }
}
