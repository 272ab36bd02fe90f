//! The table of connections: packets in, packets out, no I/O of its own.

use std::collections::{HashMap, VecDeque};

use crate::connection::{After, Connection, Key, Word};
use crate::packet::{HOST_CID, Header, Operation, STREAM};
use crate::stream::{Host, Readiness};

/// So many connections may exist at once. A guest's next one is refused, a host's closed.
pub const MAX_CONNECTIONS: usize = 1024;

/// So many refusals may wait for the guest to have room. While they do no packet of it is taken.
pub const MAX_RESETS: usize = 1024;

/// Bytes that one packet to the guest carries at most: the standard has no limit, Linux takes so many.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// The host's end of connections that it dials has ports from here on, each once until all were used: a late word of the
/// guest about an old connection meets no new one.
const FIRST_PORT: u32 = 1 << 30;

/// Names a connection to whoever looks after its stream. No token is used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// The device.
#[derive(Debug)]
pub struct Device<H: Host> {
    guest_cid: u64,
    host: H,
    connections: HashMap<Token, Connection<H::Stream>>,
    /// Those that the guest knows.
    known: HashMap<Key, Token>,
    /// Connections that may have something to say, each once.
    turns: VecDeque<Token>,
    resets: VecDeque<Header>,
    next_token: u64,
    next_port: u32,
}

impl<H: Host> Device<H> {
    /// A device of the guest with this address.
    pub fn new(guest_cid: u64, host: H) -> Self {
        Self {
            guest_cid,
            host,
            connections: HashMap::new(),
            known: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_token: 0,
            next_port: FIRST_PORT,
        }
    }

    /// Where streams come from.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// The same, to be changed.
    pub fn host_mut(&mut self) -> &mut H {
        &mut self.host
    }

    /// How many connections there are, with those that only the host still reads.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Whether a packet of the guest may be taken now. If not, it is when the guest has taken some of ours.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Whether [`Self::to_guest`] is worth a call.
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// Takes a packet of the guest: its header, and as much of its payload as there was.
    pub fn from_guest(&mut self, header: &Header, payload: &[u8]) {
        if header.from_cid != self.guest_cid || header.to_cid != HOST_CID {
            return;
        }
        let operation = header.operation().filter(|_| header.kind == STREAM);
        let whole = payload.len() == header.length as usize;
        let key = Key { guest: header.from_port, host: header.to_port };
        let known = self.known.get(&key).copied().filter(|_| header.kind == STREAM);
        match (known, operation.filter(|_| whole)) {
            (Some(token), Some(operation)) => {
                let Some(connection) = self.connections.get_mut(&token) else { return };
                let after = connection.received(header, operation, payload);
                self.settle(token, after);
            }
            (Some(token), None) => {
                let Some(connection) = self.connections.get_mut(&token) else { return };
                let after = connection.received(header, Operation::Reset, &[]);
                self.refuse(header);
                self.settle(token, after);
            }
            (None, Some(Operation::Request)) => self.answer(key, header),
            // Nobody answers a reset: two sides would never stop.
            (None, _) if header.op == Operation::Reset as u16 => {}
            (None, _) => self.refuse(header),
        }
    }

    /// The guest dials.
    fn answer(&mut self, key: Key, request: &Header) {
        if self.connections.len() >= MAX_CONNECTIONS {
            return self.refuse(request);
        }
        let token = self.token();
        let dialled = self.host.dial(key.host);
        let watched = dialled.and_then(|stream| self.host.watch(&stream, token).map(|()| stream));
        match watched {
            Ok(stream) => self.insert(token, Connection::answering(key, stream, request)),
            Err(_) => self.refuse(request),
        }
    }

    /// The host dials a port of the guest. A guest that has too many connections gets no other: the host sees its stream
    /// end.
    pub fn dial(&mut self, guest_port: u32, stream: H::Stream) {
        if self.connections.len() >= MAX_CONNECTIONS {
            return;
        }
        let key = self.free_key(guest_port);
        let token = self.token();
        if self.host.watch(&stream, token).is_ok() {
            self.insert(token, Connection::dialling(key, stream));
        }
    }

    fn token(&mut self) -> Token {
        self.next_token += 1;
        Token(self.next_token)
    }

    /// Ends, since there are more ports than connections.
    fn free_key(&mut self, guest: u32) -> Key {
        loop {
            let key = Key { guest, host: self.next_port };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.known.contains_key(&key) {
                return key;
            }
        }
    }

    fn insert(&mut self, token: Token, connection: Connection<H::Stream>) {
        self.known.insert(connection.key, token);
        self.connections.insert(token, connection);
        self.settle(token, After::Stays);
    }

    /// A stream has changed.
    pub fn ready(&mut self, token: Token, readiness: Readiness) {
        if let Some(connection) = self.connections.get_mut(&token) {
            let after = connection.ready(readiness);
            self.settle(token, after);
        }
    }

    fn settle(&mut self, token: Token, after: After) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let key = connection.key;
        match after {
            After::Stays => {
                if connection.has_word() && !std::mem::replace(&mut connection.queued, true) {
                    self.turns.push_back(token);
                }
            }
            After::Leaves { reset } => {
                let drains = connection.drains();
                self.known.remove(&key);
                if reset {
                    let header = self.header(key, Operation::Reset);
                    self.resets.push_back(header);
                }
                if drains {
                    self.unqueue(token);
                } else {
                    self.forget(token);
                }
            }
            After::Gone => self.forget(token),
        }
    }

    fn forget(&mut self, token: Token) {
        self.unqueue(token);
        if let Some(connection) = self.connections.remove(&token) {
            // A connection that drains is known no more, and its ports may belong to another.
            if self.known.get(&connection.key) == Some(&token) {
                self.known.remove(&connection.key);
            }
            connection.close();
        }
    }

    fn unqueue(&mut self, token: Token) {
        if let Some(connection) = self.connections.get_mut(&token)
            && std::mem::take(&mut connection.queued)
        {
            self.turns.retain(|other| *other != token);
        }
    }

    /// Answers a packet that belongs to nothing.
    fn refuse(&mut self, header: &Header) {
        let key = Key { guest: header.from_port, host: header.to_port };
        self.resets.push_back(Header { kind: header.kind, ..self.header(key, Operation::Reset) });
    }

    fn header(&self, key: Key, operation: Operation) -> Header {
        Header {
            from_cid: HOST_CID,
            to_cid: self.guest_cid,
            from_port: key.host,
            to_port: key.guest,
            length: 0,
            kind: STREAM,
            op: operation as u16,
            flags: 0,
            room: 0,
            forwarded: 0,
        }
    }

    /// The next packet for the guest, with its payload at the beginning of `buffer`, which is at least one byte. Connections
    /// take turns, a packet each.
    pub fn to_guest(&mut self, buffer: &mut [u8]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(token) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            connection.queued = false;
            let (key, word) = (connection.key, connection.word(buffer));
            match word {
                Word::Packet { operation, flags, length } => {
                    let (room, forwarded) = connection.tell();
                    self.settle(token, After::Stays);
                    let header = self.header(key, operation);
                    return Some(Header { flags, length: length as u32, room, forwarded, ..header });
                }
                Word::Reset => {
                    self.forget(token);
                    return Some(self.header(key, Operation::Reset));
                }
                Word::Nothing => {}
            }
        }
        None
    }
}
