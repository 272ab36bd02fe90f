//! Packets that no honest guest sends, hosts that die at the wrong moment, and what must come of them.
#![allow(missing_docs)]

mod support;

use a3s_box_vsock::Header;
use a3s_box_vsock::connection::BUFFER;
use a3s_box_vsock::device::{MAX_CONNECTIONS, MAX_RESETS};
use a3s_box_vsock::packet::{HOST_CID, NO_MORE_READ, NO_MORE_SENT, Operation, STREAM};
use support::{GUEST_CID, HOST_PORT, Shared, World};

const KEY: (u32, u32) = (5000, HOST_PORT);

fn packet(operation: Operation) -> Header {
    Header {
        from_cid: GUEST_CID,
        to_cid: HOST_CID,
        from_port: KEY.0,
        to_port: KEY.1,
        length: 0,
        kind: STREAM,
        op: operation as u16,
        flags: 0,
        room: 1 << 20,
        forwarded: 0,
    }
}

/// An open connection that the guest dialled.
fn connected() -> (World, Shared) {
    let (mut world, socket) = (World::new(), Shared::default());
    world.device.host_mut().listening.push_back(socket.clone());
    world.guest_dials(KEY.0, KEY.1);
    world.guest_takes(8, 4000);
    assert!(world.ends[&KEY].open);
    (world, socket)
}

fn send(world: &mut World, bytes: &[u8]) {
    world.device.from_guest(&Header { length: bytes.len() as u32, ..packet(Operation::Data) }, bytes);
}

/// The next packet is a refusal of this one.
fn refused(world: &mut World, header: &Header) {
    let answer = world.device.to_guest(&mut [0; 64]).expect("an answer");
    assert_eq!(answer.op, Operation::Reset as u16);
    assert_eq!(
        (answer.from_cid, answer.from_port, answer.to_port),
        (HOST_CID, header.to_port, header.from_port)
    );
    assert_eq!(answer.kind, header.kind);
}

#[test]
fn packets_of_other_addresses_are_not_heard() {
    let (mut world, socket) = connected();
    for (from_cid, to_cid) in
        [(0, HOST_CID), (2, HOST_CID), (4, HOST_CID), (GUEST_CID, 3), (u64::MAX, u64::MAX)]
    {
        world.device.from_guest(&Header { from_cid, to_cid, ..packet(Operation::Reset) }, &[]);
        world
            .device
            .from_guest(&Header { from_cid, to_cid, from_port: 1, ..packet(Operation::Request) }, &[]);
    }
    assert!(!world.device.has_packets() && !socket.0.borrow().dropped);
    assert_eq!(world.device.connections(), 1);
}

#[test]
fn what_belongs_to_no_connection_is_reset_and_a_reset_never() {
    let mut world = World::new();
    for op in (0..10).chain([255, u16::MAX]) {
        for kind in [STREAM, 0, 2, 9] {
            let header = Header { op, kind, to_port: 77, ..packet(Operation::Reset) };
            world.device.from_guest(&header, &[]);
            if op == Operation::Reset as u16 {
                assert!(!world.device.has_packets());
            } else {
                refused(&mut world, &header);
            }
        }
    }
    assert_eq!(world.device.connections(), 0);
}

#[test]
fn a_packet_whose_length_lies_ends_its_connection_and_no_other() {
    for (length, bytes) in [(0, 5), (5, 4), (u32::MAX, 64), (1 << 31, 0)] {
        let (mut world, socket) = connected();
        socket.0.borrow_mut().room = 1000;
        send(&mut world, b"before");
        let header = Header { length, ..packet(Operation::Data) };
        world.device.from_guest(&header, &vec![7; bytes]);
        refused(&mut world, &header);
        assert!(socket.0.borrow().dropped, "length {length} of {bytes}");
        assert_eq!(socket.0.borrow().got, b"before");
    }
}

#[test]
fn words_out_of_turn_end_the_connection() {
    let cases = [
        packet(Operation::Request),
        packet(Operation::Response),
        Header { op: 0, ..packet(Operation::Data) },
        Header { op: 8, ..packet(Operation::Data) },
    ];
    for header in cases {
        let (mut world, socket) = connected();
        world.device.from_guest(&header, &[]);
        refused(&mut world, &header);
        assert!(socket.0.borrow().dropped && world.device.connections() == 0, "{header:?}");
        assert!(!world.device.has_packets());
    }
}

#[test]
fn bytes_before_the_answer_or_after_the_end_are_never_delivered() {
    let (mut world, socket) = (World::new(), Shared::default());
    socket.0.borrow_mut().room = 1000;
    world.device.host_mut().listening.push_back(socket.clone());
    world.guest_dials(KEY.0, KEY.1);
    send(&mut world, b"early");
    assert!(socket.0.borrow().got.is_empty() && socket.0.borrow().dropped);

    let (mut world, socket) = connected();
    socket.0.borrow_mut().room = 1000;
    world.guest_shuts(KEY, NO_MORE_SENT);
    assert!(socket.0.borrow().saw_end && !socket.0.borrow().dropped);
    send(&mut world, b"late");
    assert!(socket.0.borrow().got.is_empty() && socket.0.borrow().dropped);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_loses_the_connection_and_the_rest_stays_bounded() {
    let (mut world, socket) = connected();
    send(&mut world, &vec![1; BUFFER]);
    assert!(!world.device.has_packets(), "the whole buffer may be used");
    send(&mut world, &[2]);
    refused(&mut world, &packet(Operation::Data));
    assert!(!socket.0.borrow().dropped, "what was sent by the rules is still delivered");
    socket.0.borrow_mut().room = usize::MAX;
    world.report(&socket);
    assert_eq!(socket.0.borrow().got, vec![1; BUFFER]);
    assert!(socket.0.borrow().dropped && world.device.connections() == 0);
}

#[test]
fn credit_that_lies_sends_bytes_into_the_guests_own_memory_only() {
    let (mut world, socket) = connected();
    socket.0.borrow_mut().waiting.extend(vec![5; 10_000]);
    world.report(&socket);
    for (room, forwarded) in [(0, 0), (0, u32::MAX), (10, 11), (5, u32::MAX), (u32::MAX, 1 << 31)] {
        world.device.from_guest(&Header { room, forwarded, ..packet(Operation::CreditUpdate) }, &[]);
        let mut buffer = [0; 100];
        for _ in 0..3 {
            if let Some(header) = world.device.to_guest(&mut buffer) {
                assert!(header.length as usize <= buffer.len());
            }
        }
    }
    assert!(!socket.0.borrow().dropped);
}

#[test]
fn a_guest_gets_so_many_connections_and_no_more() {
    let mut world = World::new();
    let sockets: Vec<Shared> = (0..MAX_CONNECTIONS + 10).map(|_| Shared::default()).collect();
    world.device.host_mut().listening.extend(sockets.iter().cloned());
    for port in 0..sockets.len() as u32 {
        world.device.from_guest(&Header { from_port: port, ..packet(Operation::Request) }, &[]);
    }
    assert_eq!(world.device.connections(), MAX_CONNECTIONS);
    assert_eq!(world.device.host().listening.len(), 10, "the host is not even asked");
    // The host's own are closed at once then, and have room again when the guest lets some go.
    let late = Shared::default();
    world.host_dials(100, &late);
    assert!(late.0.borrow().dropped);
    world.device.from_guest(&packet_of(0, Operation::Reset), &[]);
    let late = Shared::default();
    world.host_dials(100, &late);
    assert!(!late.0.borrow().dropped);
}

fn packet_of(port: u32, operation: Operation) -> Header {
    Header { from_port: port, ..packet(operation) }
}

#[test]
fn a_guest_that_takes_no_packet_makes_nothing_grow() {
    let mut world = World::new();
    let mut taken = 0;
    for port in 0..100_000 {
        if !world.device.takes_packets() {
            break;
        }
        world.device.from_guest(&Header { to_port: 9, ..packet_of(port, Operation::Request) }, &[]);
        taken += 1;
    }
    assert_eq!(taken, MAX_RESETS);
    while world.device.to_guest(&mut [0; 64]).is_some() {}
    assert!(world.device.takes_packets());
    // Dialling and resetting again and again.
    for _ in 0..10_000 {
        world.device.host_mut().listening.push_back(Shared::default());
        world.device.from_guest(&packet(Operation::Request), &[]);
        world.device.from_guest(&packet(Operation::Reset), &[]);
    }
    assert_eq!(world.device.connections(), 0);
    assert!(!world.device.has_packets(), "nothing of them waits");
}

/// The worker of the helper before this device panicked here, and the pod was lost.
#[test]
fn a_host_that_is_gone_before_the_guest_answers_is_a_connection_that_ends_and_nothing_else() {
    let (mut world, steady) = connected();
    for index in 0..200 {
        let socket = Shared::default();
        if index % 2 == 1 {
            socket.0.borrow_mut().waiting.extend(b"an order");
        }
        world.host_dials(1026, &socket);
        if index % 3 == 0 {
            world.guest_takes(1, 4000);
        }
        (socket.0.borrow_mut().closed, socket.0.borrow_mut().ended) = (true, true);
        world.report(&socket);
        world.guest_takes(index % 5, 4000);
    }
    world.guest_takes(2000, 4000);
    let ends: Vec<_> = world.ends.iter().filter(|(key, _)| key.0 == 1026).map(|(_, end)| end).collect();
    assert_eq!(ends.len(), 200);
    assert!(ends.iter().all(|end| end.reset));
    assert_eq!(ends.iter().filter(|end| end.got == b"an order").count(), 100);
    assert_eq!(world.device.connections(), 1);
    steady.0.borrow_mut().room = 100;
    send(&mut world, b"still here");
    assert_eq!(steady.0.borrow().got, b"still here");
}

#[test]
fn a_guest_that_closes_is_answered_at_once_and_what_it_sent_still_arrives() {
    let (mut world, socket) = connected();
    world.guest_sends(KEY, &[3; 50_000]);
    world.guest_shuts(KEY, NO_MORE_READ | NO_MORE_SENT);
    world.guest_takes(1, 64);
    assert!(world.ends[&KEY].reset, "its ports are free before the host has read");
    assert!(!socket.0.borrow().dropped);
    // The same ports again: another connection.
    let second = Shared::default();
    second.0.borrow_mut().room = 100;
    world.device.host_mut().listening.push_back(second.clone());
    world.guest_dials(KEY.0, KEY.1);
    world.guest_takes(8, 64);
    send(&mut world, b"new");
    socket.0.borrow_mut().room = usize::MAX;
    world.report(&socket);
    assert_eq!(socket.0.borrow().got, vec![3; 50_000]);
    assert!(socket.0.borrow().dropped && !second.0.borrow().dropped);
    assert_eq!(second.0.borrow().got, b"new");
    send(&mut world, b" and known");
    assert_eq!(second.0.borrow().got, b"new and known");
}
