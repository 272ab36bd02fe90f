//! Packets through real queues in real memory, with real sockets on the other side.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use a3s_box_vsock::Vsock as Sockets;
use a3s_box_vsock::packet::{HEADER, HOST_CID, Header, Operation, STREAM};
use msb_krun_devices::virtio::{DeviceQueue, Queue};
use msb_krun_utils::eventfd::{EFD_NONBLOCK, EventFd};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::worker::{RECEIVE, TRANSMIT, Traffic};

const CID: u64 = 3;
const PORT: u32 = 1025;

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const SIZE: u16 = 16;
const LENGTH: u64 = 1 << 20;
/// Each queue's rings, and behind them a buffer of 4 KiB for each descriptor.
const QUEUE: u64 = 0x20_000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x3000;
const BUFFER: u32 = 4096;

/// The guest's side.
struct Guest {
    traffic: Traffic,
    memory: GuestMemoryMmap,
    offered: [u16; 2],
    seen: u16,
    directory: TempDir,
}

impl Guest {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LENGTH as usize)]).unwrap();
        let queue = |index: u64| {
            let mut queue = Queue::new(SIZE);
            queue.size = SIZE;
            queue.ready = true;
            queue.desc_table = GuestAddress(index * QUEUE);
            queue.avail_ring = GuestAddress(index * QUEUE + AVAILABLE);
            queue.used_ring = GuestAddress(index * QUEUE + USED);
            DeviceQueue::new(queue, Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()))
        };
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("guest")).unwrap();
        let paths = BTreeMap::from([(1024, directory.path().join("host"))]);
        let sockets = Box::new(Sockets::new(CID, vec![(PORT, listener)], paths).unwrap());
        let traffic = Traffic::new(memory.clone(), (0..3).map(queue).collect(), sockets);
        Self { traffic, memory, offered: [0; 2], seen: 0, directory }
    }

    fn buffer(&self, queue: usize, index: u16) -> u64 {
        queue as u64 * QUEUE + BUFFERS + u64::from(index) * u64::from(BUFFER)
    }

    fn write<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn descriptor(&self, queue: usize, index: u16, (start, length): (u64, u32), flags: u16, next: u16) {
        let at = queue as u64 * QUEUE + 16 * u64::from(index);
        self.write(start, at);
        self.write(length, at + 8);
        self.write(flags, at + 12);
        self.write(next, at + 14);
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let ring = queue as u64 * QUEUE + AVAILABLE;
        self.write(head, ring + 4 + 2 * u64::from(self.offered[queue] % SIZE));
        self.offered[queue] += 1;
        self.write(self.offered[queue], ring + 2);
    }

    fn room(&mut self) {
        let index = self.offered[RECEIVE] % SIZE;
        let buffer = (self.buffer(RECEIVE, index), BUFFER);
        self.descriptor(RECEIVE, index, buffer, WRITABLE, 0);
        self.offer(RECEIVE, index);
    }

    /// A packet in two descriptors, the second with the payload.
    fn send(&mut self, header: &Header, payload: &[u8]) {
        let at = self.buffer(TRANSMIT, 0);
        self.memory.write_slice(&header.bytes(), GuestAddress(at)).unwrap();
        self.memory.write_slice(payload, GuestAddress(at + 64)).unwrap();
        let more = if payload.is_empty() { 0 } else { NEXT };
        self.descriptor(TRANSMIT, 0, (at, HEADER as u32), more, 1);
        self.descriptor(TRANSMIT, 1, (at + 64, payload.len() as u32), 0, 0);
        self.offer(TRANSMIT, 0);
        self.look();
    }

    fn look(&mut self) {
        self.traffic.look().unwrap();
    }

    fn used(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(queue as u64 * QUEUE + USED + 2)).unwrap()
    }

    /// The next packet of the device.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.room();
        self.look();
        if self.seen == self.used(RECEIVE) {
            return None;
        }
        let entry = RECEIVE as u64 * QUEUE + USED + 4 + 8 * u64::from(self.seen % SIZE);
        self.seen += 1;
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(self.buffer(RECEIVE, head as u16))).unwrap();
        let (header, payload) = bytes.split_first_chunk::<HEADER>().unwrap();
        Some((Header::parse(header), payload.to_vec()))
    }

    fn dial(&mut self) -> (UnixStream, Header) {
        let host = UnixStream::connect(self.directory.path().join("guest")).unwrap();
        let (request, payload) = self.receive().unwrap();
        assert_eq!(
            (request.operation(), request.to_port, payload.len()),
            (Some(Operation::Request), PORT, 0)
        );
        (host, request)
    }
}

fn packet(operation: Operation, to: &Header, room: u32, forwarded: u32, length: u32) -> Header {
    Header {
        from_cid: CID,
        to_cid: HOST_CID,
        from_port: to.to_port,
        to_port: to.from_port,
        length,
        kind: STREAM,
        op: operation as u16,
        flags: 0,
        room,
        forwarded,
    }
}

// libkrun's own device threw away what the guest had not read when the host closed its end.
#[test]
fn what_the_host_sent_before_it_closed_reaches_a_guest_that_reads_slowly() {
    let mut guest = Guest::new();
    let (mut host, request) = guest.dial();
    let sent: Vec<u8> = (0..=255).cycle().take(60_000).collect();
    guest.send(&packet(Operation::Response, &request, 1000, 0, 0), &[]);
    host.write_all(&sent).unwrap();
    drop(host);
    let mut received = Vec::new();
    for _ in 0..1000 {
        match guest.receive() {
            Some((header, payload)) if header.operation() == Some(Operation::Data) => {
                received.extend_from_slice(&payload);
                assert!(payload.len() <= 1000, "more than the guest has room for");
                let read = packet(Operation::CreditUpdate, &request, 1000, received.len() as u32, 0);
                guest.send(&read, &[]);
            }
            Some((header, _)) if header.operation() == Some(Operation::Shutdown) => break,
            Some(_) | None => {}
        }
    }
    assert_eq!(received.len(), sent.len());
    assert_eq!(received, sent);
}

#[test]
fn bytes_of_the_guest_arrive_at_the_socket_that_it_dialled() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.directory.path().join("host")).unwrap();
    let ready = Header { from_port: 1024, to_port: 7000, ..Header::parse(&[0; HEADER]) };
    guest.send(&packet(Operation::Request, &ready, 1000, 0, 0), &[]);
    assert_eq!(guest.receive().unwrap().0.operation(), Some(Operation::Response));
    guest.send(&packet(Operation::Data, &ready, 1000, 0, 5), b"hello");
    let (mut host, _) = listener.accept().unwrap();
    let mut hello = [0; 5];
    host.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
}

#[test]
fn chains_that_are_no_packets_are_answered_and_nothing_else_happens() {
    let mut guest = Guest::new();
    let good = guest.buffer(TRANSMIT, 0);
    for (start, length) in
        [(good, 10), (LENGTH - 10, 100), (u64::MAX - 10, 100), (LENGTH + 5, 44), (good, u32::MAX)]
    {
        guest.descriptor(TRANSMIT, 0, (start, length), 0, 0);
        guest.offer(TRANSMIT, 0);
        guest.look();
    }
    assert_eq!(guest.used(TRANSMIT), 5);
    let _host = UnixStream::connect(guest.directory.path().join("guest")).unwrap();
    for (start, length) in
        [(guest.buffer(RECEIVE, 0), HEADER as u32), (LENGTH - 10, 4096), (u64::MAX - 10, 4096)]
    {
        guest.descriptor(RECEIVE, 0, (start, length), WRITABLE, 0);
        guest.offer(RECEIVE, 0);
        guest.look();
    }
    guest.seen = guest.used(RECEIVE);
    assert_eq!(guest.seen, 3);
    assert_eq!(guest.receive().unwrap().0.operation(), Some(Operation::Request));
    assert!(guest.traffic.queues_are_whole(), "a packet is still owned by the device");
}
