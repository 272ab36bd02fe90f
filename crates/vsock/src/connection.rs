//! One connection.
//!
//! ```text
//!   the host connects                    the guest's REQUEST, and somebody listens on the host
//!         │                                    │
//!         v                                    v
//!      Dialling ──────RESPONSE──────┐      Answering
//!         │                         v          │ RESPONSE is sent
//!         │                       Open <───────┘
//!         │                         │  to the guest:  Flowing ─> Ended (by the host)  | Refused (by the guest)
//!         │                         │  to the host:   Flowing ─> Ending ─> Ended (by the guest) | Broken (by the host)
//!         │                         │
//!         │ RST                     ├── both directions are over: RST is sent ──────────────┐
//!         │                         ├── the guest closes, resets or breaks the rules        │
//!         │                         v                                                       │
//!         │                      Draining: the guest knows it no more; what it had sent     │
//!         v                         v      is still passed on to the host                   v
//!       (gone)                    (gone)                                                  (gone)
//! ```
//!
//! A host that closes while the guest has not answered changes nothing at once: the guest gets what the host had sent,
//! and then the end. A guest that closes is let go at once, so that its socket need not wait for a slow reader here.

use std::collections::VecDeque;
use std::io;

use crate::credit::Credit;
use crate::packet::{Header, NO_MORE_READ, NO_MORE_SENT, Operation};
use crate::stream::{Readiness, Stream};

/// Bytes of a guest that are kept for a host that does not read.
pub const BUFFER: usize = 128 * 1024;

/// How often what a guest will not read is asked for, at most, before its socket is closed.
const DISCARDS: usize = 256;

/// The ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) guest: u32,
    pub(crate) host: u32,
}

#[derive(Debug)]
enum Phase {
    /// The host waits for the guest's answer.
    Dialling {
        /// REQUEST was sent.
        asked: bool,
        /// The host has closed meanwhile.
        closed: bool,
    },
    /// The guest waits for ours.
    Answering {
        /// The host has closed meanwhile.
        closed: bool,
    },
    /// Bytes flow, as far as each direction is open.
    Open {
        to_guest: ToGuest,
        to_host: ToHost,
        /// Flags of the SHUTDOWNs that were sent.
        told: u32,
    },
    /// The guest has gone; what it sent is still passed on.
    Draining,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ToGuest {
    Flowing,
    /// The host sends no more, and all that it sent is on its way.
    Ended,
    /// The guest reads no more.
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ToHost {
    Flowing,
    /// The guest sends no more; the host has not taken everything yet.
    Ending,
    /// And now it has.
    Ended,
    /// The host reads no more.
    Broken,
}

/// What becomes of a connection after something happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// It goes on.
    Stays,
    /// The guest is done with it. `reset`: it is told so. The connection is kept while it [`Connection::drains`].
    Leaves { reset: bool },
    /// Nobody is interested any more.
    Gone,
}

/// A connection's next word to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// A packet with that many bytes of payload.
    Packet { operation: Operation, flags: u32, length: usize },
    /// RST, and the connection is gone.
    Reset,
    /// None after all.
    Nothing,
}

impl Word {
    fn plain(operation: Operation) -> Self {
        Self::Packet { operation, flags: 0, length: 0 }
    }
}

#[derive(Debug)]
pub(crate) struct Connection<S> {
    pub(crate) key: Key,
    /// It waits for its turn to say something to the guest.
    pub(crate) queued: bool,
    stream: S,
    phase: Phase,
    credit: Credit,
    /// Bytes of the guest that the host has not taken.
    unsent: VecDeque<u8>,
    /// The stream may have bytes: it did not say otherwise since its last change.
    readable: bool,
    /// The stream may have room.
    writable: bool,
}

impl<S: Stream> Connection<S> {
    /// The host dials.
    pub(crate) fn dialling(key: Key, stream: S) -> Self {
        Self::new(key, stream, Phase::Dialling { asked: false, closed: false })
    }

    /// The guest has dialled with this packet.
    pub(crate) fn answering(key: Key, stream: S, request: &Header) -> Self {
        let mut connection = Self::new(key, stream, Phase::Answering { closed: false });
        connection.credit.heard(request);
        connection
    }

    fn new(key: Key, stream: S, phase: Phase) -> Self {
        Self {
            key,
            queued: false,
            stream,
            phase,
            credit: Credit::new(),
            unsent: VecDeque::new(),
            readable: true,
            writable: true,
        }
    }

    /// The guest has gone and bytes of it are left.
    pub(crate) fn drains(&self) -> bool {
        matches!(self.phase, Phase::Draining) && !self.unsent.is_empty()
    }

    /// What a packet to the guest says of credit.
    pub(crate) fn tell(&mut self) -> (u32, u32) {
        self.credit.tell()
    }

    /// A packet of the guest with its whole payload.
    pub(crate) fn received(&mut self, header: &Header, operation: Operation, payload: &[u8]) -> After {
        self.credit.heard(header);
        match operation {
            Operation::Reset => self.guest_left(false),
            Operation::Response => match self.phase {
                Phase::Dialling { asked: true, closed } => {
                    self.open(closed);
                    After::Stays
                }
                _ => self.guest_left(true),
            },
            Operation::Data => self.data(payload),
            Operation::Shutdown => self.shutdown(header.flags),
            Operation::CreditUpdate => After::Stays,
            Operation::CreditRequest => {
                self.credit.asked();
                After::Stays
            }
            // The ports are taken.
            Operation::Request => self.guest_left(true),
        }
    }

    fn open(&mut self, closed: bool) {
        let to_host = if closed { ToHost::Broken } else { ToHost::Flowing };
        self.phase = Phase::Open { to_guest: ToGuest::Flowing, to_host, told: 0 };
    }

    fn data(&mut self, payload: &[u8]) -> After {
        match &self.phase {
            Phase::Open { to_host: ToHost::Flowing, .. } if self.unsent.len() + payload.len() <= BUFFER => {}
            // It may not know yet.
            Phase::Open { to_host: ToHost::Broken, .. } => {
                self.credit.forward(payload.len());
                return After::Stays;
            }
            // More than there was room for, or after its own end, or before there was a connection.
            _ => return self.guest_left(true),
        }
        let mut rest = payload;
        while self.unsent.is_empty() && self.writable && !rest.is_empty() {
            match self.stream.write(rest) {
                Ok(count @ 1..) => {
                    self.credit.forward(count);
                    rest = rest.get(count..).unwrap_or_default();
                }
                Ok(0) => self.writable = false,
                Err(error) => self.write_failed(&error),
            }
        }
        match &self.phase {
            Phase::Open { to_host: ToHost::Broken, .. } => self.credit.forward(rest.len()),
            _ => self.unsent.extend(rest),
        }
        After::Stays
    }

    fn shutdown(&mut self, flags: u32) -> After {
        let Phase::Open { to_guest, to_host, .. } = &mut self.phase else { return self.guest_left(true) };
        if flags & NO_MORE_READ != 0 && *to_guest == ToGuest::Flowing {
            *to_guest = ToGuest::Refused;
            self.stream.end_reading();
        }
        if flags & NO_MORE_SENT != 0 && *to_host == ToHost::Flowing {
            *to_host = ToHost::Ending;
        }
        let both = NO_MORE_READ | NO_MORE_SENT;
        if flags & both == both {
            return self.guest_left(true);
        }
        self.flush();
        After::Stays
    }

    /// From here on the guest knows nothing of the connection. `reset`: it has to be told so.
    fn guest_left(&mut self, reset: bool) -> After {
        self.stream.end_reading();
        self.phase = Phase::Draining;
        self.flush();
        After::Leaves { reset }
    }

    /// The stream has changed.
    pub(crate) fn ready(&mut self, readiness: Readiness) -> After {
        self.readable |= readiness.readable || readiness.closed;
        self.writable |= readiness.writable || readiness.closed;
        if readiness.closed {
            match &mut self.phase {
                Phase::Dialling { closed, .. } | Phase::Answering { closed } => *closed = true,
                Phase::Open { .. } | Phase::Draining => self.host_reads_no_more(),
            }
        }
        self.flush();
        match self.phase {
            Phase::Draining if self.unsent.is_empty() => After::Gone,
            _ => After::Stays,
        }
    }

    /// Gives the host what it has room for, and its end after the last byte.
    fn flush(&mut self) {
        while self.writable && !self.unsent.is_empty() {
            match self.stream.write(self.unsent.as_slices().0) {
                Ok(count @ 1..) => {
                    self.credit.forward(count);
                    self.unsent.drain(..count.min(self.unsent.len()));
                }
                Ok(0) => self.writable = false,
                Err(error) => self.write_failed(&error),
            }
        }
        if let Phase::Open { to_host: to_host @ ToHost::Ending, .. } = &mut self.phase
            && self.unsent.is_empty()
        {
            *to_host = ToHost::Ended;
            self.stream.end_writing();
        }
    }

    fn write_failed(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::WouldBlock => self.writable = false,
            io::ErrorKind::Interrupted => {}
            _ => {
                self.writable = false;
                self.host_reads_no_more();
            }
        }
    }

    fn host_reads_no_more(&mut self) {
        self.credit.forward(self.unsent.len());
        self.unsent.clear();
        if let Phase::Open { to_host, .. } = &mut self.phase
            && *to_host != ToHost::Ended
        {
            *to_host = ToHost::Broken;
        }
    }

    /// There may be something to say to the guest: with room for it [`Self::word`] is worth a call.
    pub(crate) fn has_word(&self) -> bool {
        match &self.phase {
            Phase::Dialling { asked, .. } => !asked,
            Phase::Answering { .. } => true,
            Phase::Open { to_guest, to_host, told } => {
                let bytes = *to_guest == ToGuest::Flowing
                    && self.readable
                    && (self.credit.room() > 0 || self.credit.must_ask());
                bytes
                    || is_over(*to_guest, *to_host)
                    || untold(*to_guest, *to_host, *told) != 0
                    || self.credit.is_due()
            }
            Phase::Draining => false,
        }
    }

    /// The next word to the guest, whose bytes are put into `buffer`.
    pub(crate) fn word(&mut self, buffer: &mut [u8]) -> Word {
        match self.phase {
            Phase::Dialling { asked: false, closed } => {
                self.phase = Phase::Dialling { asked: true, closed };
                Word::plain(Operation::Request)
            }
            Phase::Answering { closed } => {
                self.open(closed);
                Word::plain(Operation::Response)
            }
            Phase::Open { .. } => self.open_word(buffer),
            Phase::Dialling { asked: true, .. } | Phase::Draining => Word::Nothing,
        }
    }

    fn open_word(&mut self, buffer: &mut [u8]) -> Word {
        if let Some(length) = self.read(buffer) {
            return Word::Packet { operation: Operation::Data, flags: 0, length };
        }
        let Phase::Open { to_guest, to_host, told } = &mut self.phase else { return Word::Nothing };
        if is_over(*to_guest, *to_host) {
            return Word::Reset;
        }
        let flags = untold(*to_guest, *to_host, *told);
        if flags != 0 {
            *told |= flags;
            // All flags so far, since a receiver may take the last packet's word for the whole.
            return Word::Packet { operation: Operation::Shutdown, flags: *told, length: 0 };
        }
        if self.credit.is_due() {
            return Word::plain(Operation::CreditUpdate);
        }
        if *to_guest == ToGuest::Flowing && self.readable && self.credit.must_ask() {
            self.credit.ask();
            return Word::plain(Operation::CreditRequest);
        }
        Word::Nothing
    }

    /// Takes bytes from the host for the guest, as many as it has room for.
    fn read(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let room = buffer.len().min(self.credit.room() as usize);
        while let Phase::Open { to_guest: to_guest @ ToGuest::Flowing, .. } = &mut self.phase
            && self.readable
            && room > 0
        {
            match self.stream.read(&mut buffer[..room]) {
                Ok(0) => *to_guest = ToGuest::Ended,
                Ok(count) => {
                    self.credit.send(count);
                    return Some(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    *to_guest = ToGuest::Ended;
                    self.host_reads_no_more();
                }
            }
        }
        None
    }

    /// Closes the stream. What the guest did not want to read is taken first: a socket that is closed over unread bytes
    /// shows its other end an error instead of the end.
    pub(crate) fn close(mut self) {
        let mut scrap = [0; 4096];
        for _ in 0..DISCARDS {
            match self.stream.read(&mut scrap) {
                Ok(1..) => {}
                Ok(0) | Err(_) => break,
            }
        }
    }
}

fn is_over(to_guest: ToGuest, to_host: ToHost) -> bool {
    let no_more_sent = match to_guest {
        ToGuest::Flowing => false,
        ToGuest::Ended | ToGuest::Refused => true,
    };
    let no_more_read = match to_host {
        ToHost::Flowing | ToHost::Ending => false,
        ToHost::Ended | ToHost::Broken => true,
    };
    no_more_sent && no_more_read
}

/// What the host has ended and the guest was not told.
fn untold(to_guest: ToGuest, to_host: ToHost, told: u32) -> u32 {
    let sent = if to_guest == ToGuest::Ended { NO_MORE_SENT } else { 0 };
    let read = if to_host == ToHost::Broken { NO_MORE_READ } else { 0 };
    (sent | read) & !told
}
