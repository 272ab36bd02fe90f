//! What the device asks of the host. Nothing here ever waits.

use std::io;

use crate::device::Token;

/// One end of a connection on the host: a socket that does not block.
///
/// `read` and `write` are those of a non-blocking socket: `WouldBlock` says that there is nothing, or no room, until
/// [`Host::watch`]'s owner reports otherwise; any other error is final.
pub trait Stream {
    /// Takes bytes that the host has sent. 0: it will send no more, and everything it sent was taken.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Gives bytes to the host; how many it took.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Ends the direction to the host: its reader sees the end after what was written.
    fn end_writing(&mut self);

    /// Ends the direction from the host: its writer gets an error. What it had written can still be read.
    fn end_reading(&mut self);
}

/// Where streams come from, and who looks after them.
pub trait Host {
    /// An end of a connection. Dropping it closes it.
    type Stream: Stream;

    /// Connects to whoever listens for the guest on a port of the host.
    fn dial(&mut self, port: u32) -> io::Result<Self::Stream>;

    /// From now on changes of the stream's readiness are reported to [`crate::Device::ready`] under this token, until
    /// the stream is dropped; what it is ready for now counts as a change.
    fn watch(&mut self, stream: &Self::Stream, token: Token) -> io::Result<()>;
}

/// What has happened to a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Readiness {
    /// There may be bytes, or the end.
    pub readable: bool,
    /// There may be room.
    pub writable: bool,
    /// The host has closed it: nobody reads any more, and what is left to be read ends.
    pub closed: bool,
}
