//! Whatever host and guest do, in whatever order and however slowly: what one side sent before it ended arrives at the
//! other, once and in order, before the other hears of the end.
#![allow(missing_docs)]

mod support;

use a3s_box_vsock::connection::BUFFER;
use a3s_box_vsock::packet::{NO_MORE_READ, NO_MORE_SENT};
use proptest::prelude::*;
use support::{HOST_PORT, Shared, World};

#[derive(Debug, Clone)]
enum Act {
    HostDials { deaf: bool, fails_at: Option<u32> },
    GuestDials { deaf: bool, fails_at: Option<u32> },
    HostSends(usize, usize),
    HostReads(usize, usize),
    HostEnds(usize),
    HostCloses(usize),
    GuestSends(usize, usize),
    GuestReads(usize, usize),
    GuestShuts(usize, u32),
    GuestTakes(usize, usize),
}

fn act() -> impl Strategy<Value = Act> {
    let which = 0..4_usize;
    let amount = prop_oneof![1..50_usize, 1..20_000_usize, 100_000..150_000_usize];
    let fails_at = prop_oneof![6 => Just(None), 1 => (1..60_u32).prop_map(Some)];
    prop_oneof![
        1 => (prop::bool::weighted(0.1), fails_at.clone())
            .prop_map(|(deaf, fails_at)| Act::HostDials { deaf, fails_at }),
        1 => (prop::bool::weighted(0.1), fails_at).prop_map(|(deaf, fails_at)| Act::GuestDials { deaf, fails_at }),
        4 => (which.clone(), amount.clone()).prop_map(|(w, n)| Act::HostSends(w, n)),
        4 => (which.clone(), amount.clone()).prop_map(|(w, n)| Act::HostReads(w, n)),
        1 => which.clone().prop_map(Act::HostEnds),
        1 => which.clone().prop_map(Act::HostCloses),
        4 => (which.clone(), amount.clone()).prop_map(|(w, n)| Act::GuestSends(w, n)),
        4 => (which.clone(), amount).prop_map(|(w, n)| Act::GuestReads(w, n)),
        2 => (which, 1..4_u32).prop_map(|(w, flags)| Act::GuestShuts(w, flags)),
        6 => (1..12_usize, 1..5000_usize).prop_map(|(count, size)| Act::GuestTakes(count, size)),
    ]
}

/// A connection as both sides know it; the guest may not know it yet.
struct Pair {
    socket: Shared,
    sent: Vec<u8>,
    /// The guest's and the host's port, once known.
    key: Option<(u32, u32)>,
    deaf: bool,
}

#[derive(Default)]
struct Run {
    pairs: Vec<Pair>,
    /// Makes bytes differ from each other.
    count: usize,
}

impl Run {
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let from = self.count;
        self.count += count;
        (from..from + count).map(|n| (n % 251) as u8).collect()
    }

    fn key(&mut self, world: &World, which: usize) -> Option<(u32, u32)> {
        let (index, pair) = self.pairs.iter_mut().enumerate().nth(which)?;
        // Ports of the guest that the host dials tell the pair.
        let dialled = |key: &&(u32, u32)| key.0 == 100 + index as u32;
        pair.key = pair.key.or_else(|| world.ends.keys().find(dialled).copied());
        pair.key
    }

    fn play(&mut self, world: &mut World, act: &Act) {
        match *act {
            Act::HostDials { deaf, fails_at } if self.pairs.len() < 4 => {
                let socket = Shared::default();
                socket.0.borrow_mut().fails_at = fails_at;
                let port = if deaf { world.deaf } else { 100 + self.pairs.len() as u32 };
                world.host_dials(port, &socket);
                self.pairs.push(Pair { socket, sent: Vec::new(), key: None, deaf });
            }
            Act::GuestDials { deaf, fails_at } if self.pairs.len() < 4 => {
                let socket = Shared::default();
                socket.0.borrow_mut().fails_at = fails_at;
                let key = (5000 + self.pairs.len() as u32, if deaf { 7 } else { HOST_PORT });
                if !deaf {
                    world.device.host_mut().listening.push_back(socket.clone());
                }
                world.guest_dials(key.0, key.1);
                self.pairs.push(Pair { socket, sent: Vec::new(), key: Some(key), deaf });
            }
            Act::HostDials { .. } | Act::GuestDials { .. } => {}
            Act::HostSends(which, count) => {
                let bytes = self.bytes(count);
                let Some(pair) = self.pairs.get_mut(which) else { return };
                {
                    let mut socket = pair.socket.0.borrow_mut();
                    if socket.ended || socket.closed || socket.refused || socket.failed || socket.dropped {
                        return;
                    }
                    socket.waiting.extend(&bytes);
                }
                pair.sent.extend(bytes);
                world.report(&pair.socket.clone());
            }
            Act::HostReads(which, count) => self.at_host(world, which, |socket| socket.room += count),
            Act::HostEnds(which) => self.at_host(world, which, |socket| socket.ended = true),
            Act::HostCloses(which) => {
                self.at_host(world, which, |socket| (socket.closed, socket.ended) = (true, true));
            }
            Act::GuestSends(which, count) => {
                let bytes = self.bytes(count.min(70_000));
                if let Some(key) = self.key(world, which) {
                    world.guest_sends(key, &bytes);
                }
            }
            Act::GuestReads(which, count) => {
                if let Some(key) = self.key(world, which) {
                    world.guest_reads(key, count);
                }
            }
            Act::GuestShuts(which, flags) => {
                if let Some(key) = self.key(world, which) {
                    world.guest_shuts(key, flags);
                }
            }
            Act::GuestTakes(count, size) => world.guest_takes(count, size),
        }
    }

    fn at_host(&self, world: &mut World, which: usize, change: impl FnOnce(&mut support::Socket)) {
        // After it has closed there is nothing to be reported of a socket, and nothing is.
        if let Some(pair) = self.pairs.get(which).filter(|pair| !pair.socket.0.borrow().closed) {
            change(&mut pair.socket.0.borrow_mut());
            world.report(&pair.socket);
        }
    }

    /// Everybody takes what there is.
    fn settle(&mut self, world: &mut World) {
        let progress = |world: &World| {
            let guest: usize = world.ends.values().map(|end| end.got.len() + usize::from(end.reset)).sum();
            guest + world.resets
        };
        let (mut quiet, mut before) = (0, usize::MAX);
        while quiet < 3 {
            for which in 0..self.pairs.len() {
                self.at_host(world, which, |socket| socket.room = 1 << 20);
                if let Some(key) = self.key(world, which) {
                    world.guest_reads(key, usize::MAX >> 1);
                }
            }
            world.guest_takes(64, 4000);
            let (now, busy) = (progress(world), world.device.has_packets());
            quiet = if now == before && !busy { quiet + 1 } else { 0 };
            before = now;
        }
    }

    fn check(&mut self, world: &World) {
        for which in 0..self.pairs.len() {
            let key = self.key(world, which);
            let pair = &self.pairs[which];
            let socket = pair.socket.0.borrow();
            let Some(end) = key.map(|key| &world.ends[&key]).filter(|end| end.open) else {
                assert!(pair.deaf, "pair {which} was never answered");
                assert!(socket.dropped || socket.token.is_none(), "a refused connection is closed");
                continue;
            };
            let context =
                format!("pair {which}: {} {:?}", pair.sent.len(), (end.got.len(), end.saw_end, end.reset));
            assert!(pair.sent.starts_with(&end.got), "{context}");
            assert!(end.sent.starts_with(&socket.got), "{context}");
            let guest_refused = end.refused || end.closed;
            if !guest_refused && !socket.failed {
                assert_eq!(end.got, pair.sent, "{context}");
                assert_eq!(end.saw_end || end.reset, socket.ended || socket.closed, "{context}");
            }
            if !socket.closed && !socket.failed {
                assert_eq!(socket.got, end.sent, "{context}");
                assert_eq!(socket.saw_end, end.ended || end.closed, "{context}");
            }
            if socket.closed || socket.failed {
                assert!(end.unwanted || end.reset || end.ended || end.closed, "nobody reads: {context}");
            }
            if end.lives() && !end.ended && !end.unwanted {
                assert!(end.may_send() > BUFFER / 2, "the guest was not told of room: {context}");
            }
            let over = end.closed || end.reset;
            assert_eq!(over, socket.dropped, "{context}");
        }
        let live = self.pairs.iter().filter(|pair| pair.socket.0.borrow().token.is_some());
        let live = live.filter(|pair| !pair.socket.0.borrow().dropped).count();
        assert_eq!(world.device.connections(), live);
        assert!(!world.device.has_packets());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_arrives_once_in_order_and_before_the_end(acts in prop::collection::vec(act(), 1..120)) {
        let (mut world, mut run) = (World::new(), Run::default());
        for act in &acts {
            run.play(&mut world, act);
        }
        run.settle(&mut world);
        run.check(&world);
        // And when everybody has closed, nothing is left.
        for which in 0..run.pairs.len() {
            run.play(&mut world, &Act::HostCloses(which));
            run.play(&mut world, &Act::GuestShuts(which, NO_MORE_READ | NO_MORE_SENT));
        }
        run.settle(&mut world);
        prop_assert_eq!(world.device.connections(), 0);
    }
}
