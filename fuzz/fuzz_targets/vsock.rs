//! A hostile guest's packets to the vsock device, between what hosts do with their sockets.

#![no_main]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use a3s_box_vsock::Header;
use a3s_box_vsock::connection::BUFFER;
use a3s_box_vsock::device::{Device, MAX_CONNECTIONS, MAX_RESETS, Token};
use a3s_box_vsock::packet::{HEADER, HOST_CID, STREAM};
use a3s_box_vsock::stream::{Host, Readiness, Stream};
use libfuzzer_sys::fuzz_target;

const GUEST_CID: u64 = 3;

/// What the host's end of a stream can do at the moment.
#[derive(Debug, Default)]
struct Socket {
    waiting: usize,
    room: usize,
    ended: bool,
    closed: bool,
}

#[derive(Debug, Clone, Default)]
struct End(Rc<RefCell<Socket>>);

impl Stream for End {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut socket = self.0.borrow_mut();
        let count = buffer.len().min(socket.waiting);
        socket.waiting -= count;
        match count {
            0 if socket.ended => Ok(0),
            0 => Err(io::ErrorKind::WouldBlock.into()),
            count => Ok(count),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut socket = self.0.borrow_mut();
        if socket.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = bytes.len().min(socket.room);
        socket.room -= count;
        if count == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
    }

    fn end_writing(&mut self) {}

    fn end_reading(&mut self) {
        self.0.borrow_mut().ended = true;
    }
}

#[derive(Debug, Default)]
struct Sockets(BTreeMap<Token, End>);

impl Host for Sockets {
    type Stream = End;

    fn dial(&mut self, port: u32) -> io::Result<End> {
        if port < 8 { Ok(End::default()) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
    }

    fn watch(&mut self, stream: &End, token: Token) -> io::Result<()> {
        self.0.insert(token, stream.clone());
        Ok(())
    }
}

/// The bytes that are left of the input; zeros when there are no more.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A number that is often small and sometimes at the end of its range.
    fn number(&mut self) -> u32 {
        match self.byte() {
            small @ 0..=0xf0 => small.into(),
            shift @ 0xf1..=0xf8 => 1 << (4 * u32::from(shift - 0xf1) + 3),
            large => u32::MAX - u32::from(large - 0xf9),
        }
    }
}

fn packet(script: &mut Script<'_>) -> Header {
    let what = script.byte();
    if what == 0xff {
        let mut bytes = [0; HEADER];
        bytes.fill_with(|| script.byte());
        return Header::parse(&bytes);
    }
    // Mostly the addresses that are right, few ports, operations of the standard.
    Header {
        from_cid: if what & 0x80 == 0 { GUEST_CID } else { script.byte().into() },
        to_cid: HOST_CID,
        from_port: u32::from(what >> 3 & 3),
        to_port: script.number(),
        length: script.number(),
        kind: if what & 0x40 == 0 { STREAM } else { script.byte().into() },
        op: u16::from(what & 7),
        flags: script.byte().into(),
        room: script.number(),
        forwarded: script.number(),
    }
}

fuzz_target!(|input: &[u8]| {
    let mut script = Script(input);
    let mut device = Device::new(GUEST_CID, Sockets::default());
    let payload = vec![0; BUFFER + 2];
    let mut buffer = vec![0; 5000];
    let mut dials = 0;
    while !script.0.is_empty() {
        match script.byte() {
            0..=0x7f if device.takes_packets() => {
                let header = packet(&mut script);
                let lie = script.byte() == 1;
                let length =
                    (header.length as usize).min(payload.len()) - usize::from(lie && header.length > 0);
                device.from_guest(&header, &payload[..length]);
            }
            0..=0xbf => {
                let room = 1 + script.number() as usize % buffer.len();
                if let Some(header) = device.to_guest(&mut buffer[..room]) {
                    assert!(header.length as usize <= room);
                    assert_eq!((header.from_cid, header.to_cid), (HOST_CID, GUEST_CID));
                    assert!(header.operation().is_some());
                }
            }
            0xc0..=0xcf => {
                dials += 1;
                device.dial(script.byte().into(), End::default());
            }
            _ => {
                let which = script.byte().into();
                let Some((token, end)) = device.host().0.iter().nth(which).map(|(t, e)| (*t, e.clone()))
                else {
                    continue;
                };
                let what = script.byte();
                let mut socket = end.0.borrow_mut();
                let readable = what & 1 != 0 && !socket.ended;
                socket.waiting += if readable { script.number() as usize % 100_000 } else { 0 };
                socket.room += if what & 2 != 0 { script.number() as usize % 300_000 } else { 0 };
                socket.ended |= what & 4 != 0;
                socket.closed |= what & 8 != 0;
                socket.ended |= socket.closed;
                let (writable, closed) = (socket.room > 0, socket.closed);
                drop(socket);
                device.ready(token, Readiness { readable: true, writable, closed });
            }
        }
        assert!(device.connections() <= MAX_CONNECTIONS.min(dials + device.host().0.len()));
    }
    // The host closes everything, and a guest that takes what it is given: it all ends.
    for (token, end) in std::mem::take(&mut device.host_mut().0) {
        (end.0.borrow_mut().closed, end.0.borrow_mut().ended) = (true, true);
        device.ready(token, Readiness { readable: true, writable: true, closed: true });
    }
    let most = MAX_RESETS + 8 * MAX_CONNECTIONS + 100_000;
    let taken = (0..most).take_while(|_| device.to_guest(&mut buffer).is_some()).count();
    assert!(taken < most, "the device never stops talking");
});
