//! The host's side: unix sockets, and one epoll that knows of all changes.
//!
//! A socket that is listened on stands for one port of the guest: who connects to it dials that port. Where the guest may
//! dial the host, a path names the socket that somebody else listens on. A guest that does not answer, or refuses, closes
//! the connection; nothing is said on it but the guest's own bytes.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::device::{Device, Token};
use crate::stream::{Host, Readiness, Stream};

/// Changes taken from the kernel at once.
const CHANGES: usize = 64;

/// Connections accepted from one socket before others have their turn.
const ACCEPTS: usize = 64;

/// Tokens of listening sockets; those of connections are counted from one and never get there.
const LISTENERS: u64 = 1 << 63;

impl Stream for UnixStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Read::read(self, buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Write::write(self, bytes)
    }

    fn end_writing(&mut self) {
        // Only a socket that is gone altogether refuses, and then its reader knows.
        let _ = self.shutdown(Shutdown::Write);
    }

    fn end_reading(&mut self) {
        let _ = self.shutdown(Shutdown::Read);
    }
}

/// Connects to the host's sockets, and watches.
#[derive(Debug)]
pub struct UnixHost {
    epoll: OwnedFd,
    paths: BTreeMap<u32, PathBuf>,
}

impl Host for UnixHost {
    type Stream = UnixStream;

    fn dial(&mut self, port: u32) -> io::Result<UnixStream> {
        let path = self.paths.get(&port).ok_or(io::ErrorKind::ConnectionRefused)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // A socket whose queue is full is an error too: the guest may try again, the device never waits.
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(UnixStream::from(socket))
    }

    fn watch(&mut self, stream: &UnixStream, token: Token) -> io::Result<()> {
        let changes = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.epoll, stream, EventData::new_u64(token.0), changes)?)
    }
}

/// The device with its sockets.
#[derive(Debug)]
pub struct Vsock {
    /// The device.
    pub device: Device<UnixHost>,
    listeners: Vec<(u32, UnixListener)>,
}

impl Vsock {
    /// A device of the guest with this address. `listeners`: which port of the guest each stands for. `paths`: what listens
    /// on the ports of the host that the guest may dial.
    pub fn new(
        guest_cid: u64,
        listeners: Vec<(u32, UnixListener)>,
        paths: BTreeMap<u32, PathBuf>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (index, (_, listener)) in listeners.iter().enumerate() {
            listener.set_nonblocking(true)?;
            epoll::add(&epoll, listener, EventData::new_u64(LISTENERS + index as u64), EventFlags::IN)?;
        }
        Ok(Self { device: Device::new(guest_cid, UnixHost { epoll, paths }), listeners })
    }

    /// Takes note of everything that has happened to the sockets. Never waits: whoever calls it waits for [`Self::as_fd`]
    /// to be readable.
    pub fn look(&mut self) -> io::Result<()> {
        let mut changes = Vec::with_capacity(CHANGES);
        loop {
            changes.clear();
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            let spare = rustix::buffer::spare_capacity(&mut changes);
            match epoll::wait(&self.device.host().epoll, spare, Some(&now)) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let mut listening = false;
            for change in &changes {
                match change.data.u64().checked_sub(LISTENERS) {
                    Some(index) => {
                        listening = true;
                        self.accept(index as usize)?;
                    }
                    None => self.device.ready(Token(change.data.u64()), readiness(change.flags)),
                }
            }
            // A host that dials without end shall not keep the others waiting: it is seen again by the next look.
            if listening || changes.len() < CHANGES {
                return Ok(());
            }
        }
    }

    fn accept(&mut self, index: usize) -> io::Result<()> {
        for _ in 0..ACCEPTS {
            let Some((port, listener)) = self.listeners.get(index) else { return Ok(()) };
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    let port = *port;
                    self.device.dial(port, stream);
                }
                Err(error) => return accept_failed(error),
            }
        }
        Ok(())
    }
}

/// Whoever dialled may have gone already, and descriptors may have run out, which passes.
fn accept_failed(error: io::Error) -> io::Result<()> {
    match Errno::from_io_error(&error) {
        Some(
            Errno::AGAIN | Errno::INTR | Errno::CONNABORTED | Errno::MFILE | Errno::NFILE | Errno::NOMEM,
        ) => Ok(()),
        _ => Err(error),
    }
}

fn readiness(flags: EventFlags) -> Readiness {
    let any = |wanted: EventFlags| flags.intersects(wanted);
    Readiness {
        readable: any(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR),
        writable: any(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR),
        closed: any(EventFlags::HUP),
    }
}

impl AsFd for Vsock {
    /// Readable when there is something to look at.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.host().epoll.as_fd()
    }
}
