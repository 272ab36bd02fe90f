//! The device over queues in memory that a test lays out as guests do, and as they should not.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use a3s_box_protocol::{GUEST_CID, READY_PORT};
use a3s_box_vsock::packet::{HEADER, HOST_CID, Operation, STREAM};
use a3s_box_vsock::{Header, Vsock};
use vhost_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vhost_user_backend::{VhostUserBackendMut, VringMutex, VringT};
use vmm_sys_util::epoll::EventSet;

use super::backend::{Backend, SOCKETS_CHANGED};

const MEMORY: usize = 1 << 20;
const PLACES: u16 = 64;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// The parts of a queue, from its beginning on.
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Packets of the guest lie from here on, room for packets to it from [`ROOM`] on.
const DATA: u64 = 0x2_0000;
const ROOM: u64 = 0x8_0000;

/// An address in a queue.
fn place(queue: usize, offset: u64) -> GuestAddress {
    GuestAddress(0x1_0000 * queue as u64 + offset)
}

struct Fixture {
    dir: tempfile::TempDir,
    ready: UnixListener,
    backend: Backend,
    memory: GuestMemoryMmap,
    rings: [VringMutex; 2],
    /// Descriptors used so far of each queue.
    used: [u16; 2],
    /// And chains.
    chains: [u16; 2],
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ready");
        let ready = UnixListener::bind(&path).unwrap();
        let listener = UnixListener::bind(dir.path().join("guest")).unwrap();
        let vsock =
            Vsock::new(GUEST_CID.into(), vec![(1026, listener)], BTreeMap::from([(READY_PORT, path)]))
                .unwrap();
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let shared = GuestMemoryAtomic::new(memory.clone());
        let rings = [0, 1].map(|queue| {
            let ring = VringMutex::new(shared.clone(), PLACES).unwrap();
            ring.set_queue_size(PLACES);
            let [descriptors, available, used] = [DESCRIPTORS, AVAILABLE, USED].map(|at| place(queue, at).0);
            ring.set_queue_info(descriptors, available, used).unwrap();
            ring.set_queue_ready(true);
            ring.set_enabled(true);
            ring
        });
        Self { dir, ready, backend: Backend::new(vsock, shared), memory, rings, used: [0; 2], chains: [0; 2] }
    }

    /// Puts a chain of descriptors, each with its address and length, into a queue.
    fn chain(&mut self, queue: usize, flags: u16, pieces: &[(u64, u32)]) {
        let first = self.used[queue];
        self.used[queue] += pieces.len() as u16;
        for (index, (address, length)) in (first..).zip(pieces) {
            let last = index + 1 == self.used[queue];
            let flags = if last { flags } else { flags | NEXT };
            let descriptor = [
                &address.to_le_bytes()[..],
                &length.to_le_bytes(),
                &flags.to_le_bytes(),
                &(index + 1).to_le_bytes(),
            ];
            self.memory
                .write_slice(&descriptor.concat(), place(queue, DESCRIPTORS + 16 * u64::from(index)))
                .unwrap();
        }
        let chains = self.chains[queue];
        self.chains[queue] += 1;
        self.memory.write_obj(first, place(queue, AVAILABLE + 4 + 2 * u64::from(chains))).unwrap();
        self.memory.write_obj(chains + 1, place(queue, AVAILABLE + 2)).unwrap();
    }

    fn used_chains(&self, queue: usize) -> u16 {
        self.rings[queue].queue_used_idx().unwrap()
    }

    fn event(&mut self, event: u16) {
        self.backend.handle_event(event, EventSet::IN, &self.rings, 0).unwrap();
    }

    /// A packet of the guest in pieces of that many bytes.
    fn say(&mut self, operation: Operation, payload: &[u8], piece: usize) {
        let header = Header {
            from_cid: GUEST_CID.into(),
            to_cid: HOST_CID,
            from_port: 4000,
            to_port: READY_PORT,
            length: payload.len() as u32,
            kind: STREAM,
            op: operation as u16,
            flags: 3,
            room: 1 << 18,
            forwarded: 0,
        };
        let bytes = [&header.bytes(), payload].concat();
        self.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        let places = bytes.chunks(piece).scan(DATA, |at, piece| {
            *at += piece.len() as u64;
            Some((*at - piece.len() as u64, piece.len() as u32))
        });
        let places: Vec<_> = places.collect();
        self.chain(1, 0, &places);
        self.event(1);
    }

    /// Gives the device room of these sizes; what it put there.
    fn take(&mut self, sizes: &[u32]) -> Vec<u8> {
        let places = sizes.iter().scan(ROOM, |at, size| {
            *at += u64::from(*size);
            Some((*at - u64::from(*size), *size))
        });
        let places: Vec<_> = places.collect();
        self.chain(0, WRITE, &places);
        self.event(0);
        let mut bytes = vec![0; sizes.iter().sum::<u32>() as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(ROOM)).unwrap();
        bytes
    }

    /// A connection that the guest has dialled.
    fn connected() -> (Self, UnixStream) {
        let mut fixture = Self::new();
        fixture.say(Operation::Request, &[], HEADER);
        let response = fixture.take(&[4096]);
        assert_eq!(operation(&response), Some(Operation::Response));
        let host = fixture.ready.accept().unwrap().0;
        (fixture, host)
    }
}

fn operation(packet: &[u8]) -> Option<Operation> {
    Header::parse(packet.first_chunk().unwrap()).operation()
}

/// The device before this one lost what was beyond the first descriptors of a write of more than 32 KiB.
#[test]
fn a_long_write_arrives_in_however_many_pieces_the_guest_lays_it() {
    let sent: Vec<u8> = (0..64 << 10).map(|n: u32| (n % 251) as u8).collect();
    for piece in [4096, 1300, 65_000, 1 << 20] {
        let (mut fixture, mut host) = Fixture::connected();
        fixture.say(Operation::Data, &sent, piece);
        let mut got = vec![0; sent.len()];
        host.read_exact(&mut got).unwrap();
        assert!(got == sent, "in pieces of {piece}");
        assert_eq!(fixture.used_chains(1), 2);
    }
}

#[test]
fn a_header_may_lie_in_pieces_on_both_ways() {
    let (mut fixture, mut host) = Fixture::connected();
    fixture.say(Operation::Data, b"hello", 7);
    let mut got = [0; 5];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    host.write_all(b"and you").unwrap();
    fixture.event(SOCKETS_CHANGED);
    let packet = fixture.take(&[10, 20, 16, 3]);
    assert_eq!(operation(&packet), Some(Operation::Data));
    assert_eq!(&packet[HEADER..], b"and y");
    assert_eq!(&fixture.take(&[44, 100])[HEADER..HEADER + 2], b"ou");
}

#[test]
fn chains_that_hold_no_packet_are_given_back_and_change_nothing() {
    let (mut fixture, mut host) = Fixture::connected();
    let before = fixture.used_chains(1);
    let nowhere = MEMORY as u64;
    let bad: [&[(u64, u32)]; 6] = [
        &[(DATA, 43)],
        &[(nowhere, 44)],
        &[(nowhere - 4, 44)],
        &[(u64::MAX - 8, 44)],
        &[(DATA, 44), (nowhere, 1)],
        &[(DATA, u32::MAX)],
    ];
    for pieces in bad {
        fixture.chain(1, 0, pieces);
    }
    // To be written only: nothing to be read.
    fixture.chain(1, WRITE, &[(DATA, 100)]);
    fixture.event(1);
    assert_eq!(fixture.used_chains(1) - before, 7);
    let rooms: [&[(u64, u32)]; 3] = [&[(ROOM, 44)], &[(nowhere, 4096)], &[(ROOM, 4096), (nowhere, 1)]];
    host.write_all(b"waits").unwrap();
    for pieces in rooms {
        fixture.chain(0, WRITE, pieces);
    }
    fixture.event(SOCKETS_CHANGED);
    let packet = fixture.take(&[4096]);
    assert_eq!((operation(&packet), &packet[HEADER..HEADER + 5]), (Some(Operation::Data), &b"waits"[..]));
}

#[test]
fn a_host_that_dials_and_goes_before_the_guest_has_room_ends_nothing_else() {
    let (mut fixture, mut host) = Fixture::connected();
    for _ in 0..200 {
        drop(UnixStream::connect(fixture.dir.path().join("guest")).unwrap());
        fixture.event(SOCKETS_CHANGED);
    }
    fixture.say(Operation::Data, b"still here", 4096);
    let mut got = [0; 10];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"still here");
}

#[test]
fn the_guests_address_is_its_configuration() {
    let fixture = Fixture::new();
    assert_eq!(fixture.backend.get_config(0, 8), u64::from(GUEST_CID).to_le_bytes());
    assert_eq!(fixture.backend.get_config(0, 4), GUEST_CID.to_le_bytes());
    for (offset, size) in [(0, 9), (8, 1), (u32::MAX, u32::MAX)] {
        assert!(fixture.backend.get_config(offset, size).is_empty());
    }
}
