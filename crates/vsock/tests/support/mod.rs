//! A host and a guest for the device: sockets that give short counts, block and fail, and a guest that keeps the rules and
//! checks that the device does.
#![allow(dead_code, reason = "each test file uses its part")]

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::rc::Rc;

use a3s_box_vsock::Header;
use a3s_box_vsock::device::{Device, Token};
use a3s_box_vsock::packet::{HOST_CID, NO_MORE_READ, NO_MORE_SENT, Operation, STREAM};
use a3s_box_vsock::stream::{Host, Readiness, Stream};

pub(crate) const GUEST_CID: u64 = 3;
/// Somebody listens on this port of the host, and on no other.
pub(crate) const HOST_PORT: u32 = 1024;
/// The guest's buffer.
const ROOM: u32 = 9000;

/// What the device and the test know of a socket.
#[derive(Debug, Default)]
pub(crate) struct Socket {
    /// Sent by the host and not yet taken.
    pub(crate) waiting: VecDeque<u8>,
    /// Everything that the host has got.
    pub(crate) got: Vec<u8>,
    /// How much more the host's side has room for.
    pub(crate) room: usize,
    /// The host sends no more.
    pub(crate) ended: bool,
    /// The host has closed it.
    pub(crate) closed: bool,
    /// The device has ended writing, or dropped it: the host has seen the end.
    pub saw_end: bool,
    /// The device reads no more.
    pub(crate) refused: bool,
    pub(crate) dropped: bool,
    /// This call fails, and all after it.
    pub fails_at: Option<u32>,
    pub(crate) failed: bool,
    calls: u32,
    pub(crate) token: Option<Token>,
}

impl Socket {
    /// Pieces are short and calls are interrupted, in a fixed pattern.
    fn call(&mut self, failure: io::ErrorKind) -> io::Result<usize> {
        self.calls += 1;
        self.failed |= self.fails_at == Some(self.calls);
        if self.failed {
            return Err(failure.into());
        }
        if self.calls.is_multiple_of(5) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        Ok(if self.calls.is_multiple_of(3) { 3 } else { usize::MAX })
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Shared(pub(crate) Rc<RefCell<Socket>>);

#[derive(Debug)]
pub(crate) struct End(Shared);

impl Stream for End {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut socket = self.0.0.borrow_mut();
        let most = socket.call(io::ErrorKind::ConnectionReset)?;
        if socket.waiting.is_empty() {
            let over = socket.ended || socket.closed || socket.refused;
            return if over { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let count = buffer.len().min(socket.waiting.len()).min(most);
        for (place, byte) in buffer.iter_mut().zip(socket.waiting.drain(..count)) {
            *place = byte;
        }
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut socket = self.0.0.borrow_mut();
        assert!(!socket.saw_end, "a byte after the end");
        let most = socket.call(io::ErrorKind::BrokenPipe)?;
        if socket.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = bytes.len().min(socket.room).min(most);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        socket.room -= count;
        socket.got.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn end_writing(&mut self) {
        self.0.0.borrow_mut().saw_end = true;
    }

    fn end_reading(&mut self) {
        self.0.0.borrow_mut().refused = true;
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut socket = self.0.0.borrow_mut();
        (socket.dropped, socket.saw_end) = (true, true);
    }
}

#[derive(Debug, Default)]
pub(crate) struct MockHost {
    /// Given to the guest's next connections, in this order.
    pub(crate) listening: VecDeque<Shared>,
}

impl Host for MockHost {
    type Stream = End;

    fn dial(&mut self, port: u32) -> io::Result<End> {
        if port != HOST_PORT {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.listening.pop_front().map(End).ok_or(io::ErrorKind::ConnectionRefused.into())
    }

    fn watch(&mut self, stream: &End, token: Token) -> io::Result<()> {
        stream.0.0.borrow_mut().token = Some(token);
        Ok(())
    }
}

/// One connection as the guest knows it.
#[derive(Debug)]
pub(crate) struct GuestEnd {
    pub(crate) port: u32,
    pub(crate) peer: u32,
    pub(crate) open: bool,
    pub(crate) got: Vec<u8>,
    pub(crate) sent: Vec<u8>,
    /// The device said that no more bytes come; it may say no byte after that.
    pub saw_end: bool,
    /// The device said that nobody reads any more.
    pub(crate) unwanted: bool,
    pub(crate) reset: bool,
    pub(crate) ended: bool,
    pub(crate) refused: bool,
    pub(crate) closed: bool,
    peer_room: u32,
    peer_forwarded: u32,
    /// Bytes read by the program of the guest.
    read: u32,
}

impl GuestEnd {
    fn new(port: u32, peer: u32) -> Self {
        Self {
            port,
            peer,
            open: false,
            got: Vec::new(),
            sent: Vec::new(),
            saw_end: false,
            unwanted: false,
            reset: false,
            ended: false,
            refused: false,
            closed: false,
            peer_room: 0,
            peer_forwarded: 0,
            read: 0,
        }
    }

    pub(crate) fn packet(&self, operation: Operation) -> Header {
        Header {
            from_cid: GUEST_CID,
            to_cid: HOST_CID,
            from_port: self.port,
            to_port: self.peer,
            length: 0,
            kind: STREAM,
            op: operation as u16,
            flags: 0,
            room: ROOM,
            forwarded: self.read,
        }
    }

    /// How many bytes the device has room for, as far as the guest knows.
    pub(crate) fn may_send(&self) -> usize {
        let under_way = (self.sent.len() as u32).wrapping_sub(self.peer_forwarded);
        self.peer_room.saturating_sub(under_way) as usize
    }

    pub(crate) fn lives(&self) -> bool {
        self.open && !self.reset && !self.closed
    }
}

pub(crate) struct World {
    pub(crate) device: Device<MockHost>,
    /// By the guest's and the host's port.
    pub(crate) ends: BTreeMap<(u32, u32), GuestEnd>,
    /// The guest's port on which nobody listens.
    pub(crate) deaf: u32,
    pub(crate) resets: usize,
}

impl World {
    pub(crate) fn new() -> Self {
        Self {
            device: Device::new(GUEST_CID, MockHost::default()),
            ends: BTreeMap::new(),
            deaf: 9,
            resets: 0,
        }
    }

    pub(crate) fn guest_dials(&mut self, port: u32, peer: u32) {
        let end = GuestEnd::new(port, peer);
        let request = end.packet(Operation::Request);
        self.ends.insert((port, peer), end);
        self.device.from_guest(&request, &[]);
    }

    /// The guest has room for so many packets.
    pub(crate) fn guest_takes(&mut self, packets: usize, payload: usize) {
        for _ in 0..packets {
            let mut buffer = vec![0; payload];
            let Some(header) = self.device.to_guest(&mut buffer) else { return };
            self.take(&header, &buffer[..header.length as usize]);
        }
    }

    fn take(&mut self, header: &Header, payload: &[u8]) {
        assert_eq!((header.from_cid, header.to_cid, header.kind), (HOST_CID, GUEST_CID, STREAM));
        let key = (header.to_port, header.from_port);
        let operation = header.operation().expect("an operation of the standard");
        if operation == Operation::Reset {
            self.resets += 1;
        }
        if operation == Operation::Request {
            let mut end = GuestEnd::new(key.0, key.1);
            end.open = key.0 != self.deaf;
            end.reset = !end.open;
            (end.peer_room, end.peer_forwarded) = (header.room, header.forwarded);
            let answer = end.packet(if end.open { Operation::Response } else { Operation::Reset });
            assert!(self.ends.insert(key, end).is_none(), "ports that are taken");
            return self.device.from_guest(&answer, &[]);
        }
        let Some(end) = self.ends.get_mut(&key) else {
            panic!("{operation:?} for a connection that never was");
        };
        assert!(!end.reset, "{operation:?} after the end of the connection");
        if operation == Operation::Reset {
            end.reset = true;
            return;
        }
        (end.peer_room, end.peer_forwarded) = (header.room, header.forwarded);
        match operation {
            Operation::Response => end.open = true,
            Operation::Data => {
                assert!(end.open && !end.saw_end, "bytes before the beginning or after the end");
                end.got.extend_from_slice(payload);
                assert!(end.got.len() as u32 - end.read <= ROOM, "more bytes than there was room for");
            }
            Operation::Shutdown => {
                end.saw_end |= header.flags & NO_MORE_SENT != 0;
                end.unwanted |= header.flags & NO_MORE_READ != 0;
            }
            Operation::CreditRequest => {
                let answer = end.packet(Operation::CreditUpdate);
                self.device.from_guest(&answer, &[]);
            }
            Operation::CreditUpdate => {}
            Operation::Request | Operation::Reset => unreachable!("handled above"),
        }
    }

    /// The program of the guest reads so many bytes.
    pub(crate) fn guest_reads(&mut self, key: (u32, u32), count: usize) {
        let end = self.ends.get_mut(&key).unwrap();
        if !end.lives() {
            return;
        }
        end.read = (end.read as usize + count).min(end.got.len()) as u32;
        let update = end.packet(Operation::CreditUpdate);
        self.device.from_guest(&update, &[]);
    }

    /// It sends as many of them as it may.
    pub(crate) fn guest_sends(&mut self, key: (u32, u32), bytes: &[u8]) {
        let end = self.ends.get_mut(&key).unwrap();
        if !end.lives() || end.ended || end.unwanted || !self.device.takes_packets() {
            return;
        }
        let count = bytes.len().min(end.may_send());
        end.sent.extend_from_slice(&bytes[..count]);
        let header = Header { length: count as u32, ..end.packet(Operation::Data) };
        self.device.from_guest(&header, &bytes[..count]);
    }

    pub(crate) fn guest_shuts(&mut self, key: (u32, u32), flags: u32) {
        let end = self.ends.get_mut(&key).unwrap();
        if !end.lives() {
            return;
        }
        end.ended |= flags & NO_MORE_SENT != 0;
        end.refused |= flags & NO_MORE_READ != 0;
        let both = NO_MORE_READ | NO_MORE_SENT;
        end.closed |= flags & both == both;
        let header = Header { flags, ..end.packet(Operation::Shutdown) };
        self.device.from_guest(&header, &[]);
    }

    /// What the host did is reported as epoll does.
    pub(crate) fn report(&mut self, socket: &Shared) {
        let (token, readiness) = {
            let socket = socket.0.borrow();
            let Some(token) = socket.token.filter(|_| !socket.dropped) else { return };
            let readable = !socket.waiting.is_empty() || socket.ended || socket.closed;
            let writable = socket.room > 0 || socket.closed;
            (token, Readiness { readable, writable, closed: socket.closed })
        };
        self.device.ready(token, readiness);
    }

    pub(crate) fn host_dials(&mut self, port: u32, socket: &Shared) {
        self.device.dial(port, End(socket.clone()));
        self.report(socket);
    }
}
