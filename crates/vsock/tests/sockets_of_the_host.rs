//! The device with real unix sockets, and a guest that is this test.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use a3s_box_vsock::packet::{HOST_CID, NO_MORE_READ, NO_MORE_SENT, Operation, STREAM};
use a3s_box_vsock::{Header, Vsock};

const GUEST_CID: u64 = 3;
const HOST_PORT: u32 = 1024;

struct Fixture {
    dir: tempfile::TempDir,
    vsock: Vsock,
    ready: UnixListener,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("guest_1026")).unwrap();
        let path = dir.path().join("guest_1024");
        let ready = UnixListener::bind(&path).unwrap();
        let paths = BTreeMap::from([(HOST_PORT, path)]);
        let vsock = Vsock::new(GUEST_CID, vec![(1026, listener)], paths).unwrap();
        Self { dir, vsock, ready }
    }

    fn dial(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("guest_1026")).unwrap()
    }

    /// The next packet to the guest and its payload.
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        self.vsock.look().unwrap();
        let mut buffer = vec![0; 4000];
        let header = self.vsock.device.to_guest(&mut buffer)?;
        buffer.truncate(header.length as usize);
        Some((header, buffer))
    }

    fn expect(&mut self, operation: Operation) -> (Header, Vec<u8>) {
        let (header, bytes) = self.next().unwrap_or_else(|| panic!("no packet instead of {operation:?}"));
        assert_eq!(header.operation(), Some(operation), "{header:?}");
        (header, bytes)
    }

    /// The guest's answer on a connection, as the other direction of this packet.
    fn say(&mut self, to: &Header, operation: Operation, flags: u32, bytes: &[u8]) {
        let header = Header {
            from_cid: GUEST_CID,
            to_cid: HOST_CID,
            from_port: to.to_port,
            to_port: to.from_port,
            length: bytes.len() as u32,
            kind: STREAM,
            op: operation as u16,
            flags,
            room: 1 << 18,
            forwarded: 0,
        };
        self.vsock.device.from_guest(&header, bytes);
    }

    /// A connection that the host dialled and the guest took.
    fn open(&mut self) -> (UnixStream, Header) {
        let host = self.dial();
        let (request, _) = self.expect(Operation::Request);
        assert_eq!(request.to_port, 1026);
        self.say(&request, Operation::Response, 0, &[]);
        (host, request)
    }
}

fn all(host: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn each_side_ends_its_direction_and_the_other_goes_on() {
    let mut fixture = Fixture::new();
    let (mut host, key) = fixture.open();
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(fixture.expect(Operation::Data).1, b"question");
    assert_eq!(fixture.expect(Operation::Shutdown).0.flags, NO_MORE_SENT);
    fixture.say(&key, Operation::Data, 0, b"answer");
    fixture.say(&key, Operation::Shutdown, NO_MORE_SENT, &[]);
    assert_eq!(all(&mut host), b"answer");
    fixture.expect(Operation::Reset);
    assert_eq!(fixture.vsock.device.connections(), 0);
}

#[test]
fn a_host_that_writes_and_closes_at_once_is_heard_to_its_end() {
    let mut fixture = Fixture::new();
    let mut host = fixture.dial();
    host.write_all(&[7; 9000]).unwrap();
    drop(host);
    let (request, _) = fixture.expect(Operation::Request);
    fixture.say(&request, Operation::Response, 0, &[]);
    let mut got = Vec::new();
    while got.len() < 9000 {
        got.extend(fixture.expect(Operation::Data).1);
    }
    assert_eq!(got, [7; 9000]);
    fixture.expect(Operation::Reset);
    assert_eq!(fixture.vsock.device.connections(), 0);
}

#[test]
fn the_guests_last_bytes_come_before_the_end_and_the_end_is_no_error() {
    let mut fixture = Fixture::new();
    let (mut host, key) = fixture.open();
    // Bytes that the guest will never read: a socket that is closed over them would break the other end.
    host.write_all(&[1; 50_000]).unwrap();
    fixture.say(&key, Operation::Data, 0, &[9; 60_000]);
    fixture.say(&key, Operation::Shutdown, NO_MORE_READ | NO_MORE_SENT, &[]);
    assert_eq!(all(&mut host), [9; 60_000]);
    assert_eq!(host.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_host_that_does_not_read_gets_everything_later() {
    let mut fixture = Fixture::new();
    let (mut host, key) = fixture.open();
    let mut sent = 0;
    // Until both the socket and the buffer are full, as the device's credit says.
    let mut room = (a3s_box_vsock::connection::BUFFER as u32, 0);
    while let count @ 1.. = (room.0 - (sent - room.1)).min(60_000) {
        fixture.say(&key, Operation::Data, 0, &vec![4; count as usize]);
        sent += count;
        while let Some((header, _)) = fixture.next() {
            assert_eq!(header.operation(), Some(Operation::CreditUpdate));
            room = (header.room, header.forwarded);
        }
    }
    assert!(sent > a3s_box_vsock::connection::BUFFER as u32, "{sent}");
    fixture.say(&key, Operation::Shutdown, NO_MORE_READ | NO_MORE_SENT, &[]);
    let reader = std::thread::spawn(move || all(&mut host));
    while !reader.is_finished() {
        fixture.vsock.look().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(reader.join().unwrap().len(), sent as usize);
}

#[test]
fn the_guest_dials_the_ports_that_it_may_and_no_other() {
    let mut fixture = Fixture::new();
    let from = |port| Header { from_port: port, ..Header::parse(&[0; 44]) };
    let dial = |port| Header { to_port: 40_000, ..from(port) };
    fixture.say(&dial(HOST_PORT), Operation::Request, 0, &[]);
    let (header, _) = fixture.expect(Operation::Response);
    fixture.say(&header, Operation::Data, 0, b"ready");
    fixture.say(&header, Operation::Shutdown, NO_MORE_READ | NO_MORE_SENT, &[]);
    assert_eq!(all(&mut fixture.ready.accept().unwrap().0), b"ready");
    fixture.expect(Operation::Reset);
    // Not even the ports that the host dials: they would lead back into the guest.
    for port in [1025, 1026, 22, 0, u32::MAX] {
        fixture.say(&dial(port), Operation::Request, 0, &[]);
        fixture.expect(Operation::Reset);
    }
    // Nobody listens any more.
    let Fixture { dir, mut vsock, ready } = fixture;
    drop(ready);
    vsock.device.from_guest(
        &Header {
            op: 1,
            kind: STREAM,
            from_cid: GUEST_CID,
            to_cid: HOST_CID,
            from_port: 1,
            ..dial(HOST_PORT)
        },
        &[],
    );
    assert_eq!(vsock.device.connections(), 0);
    drop(dir);
}

#[test]
fn two_hundred_dials_that_are_dropped_at_once_leave_nothing() {
    let mut fixture = Fixture::new();
    for _ in 0..200 {
        drop(fixture.dial());
        fixture.vsock.look().unwrap();
    }
    let mut resets = 0;
    while let Some((header, bytes)) = fixture.next() {
        assert!(bytes.is_empty());
        match header.operation().unwrap() {
            Operation::Request => fixture.say(&header, Operation::Response, 0, &[]),
            Operation::Reset => resets += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((resets, fixture.vsock.device.connections()), (200, 0));
}
