//! How much may be under way in each direction of a connection.
//!
//! All counters are modulo 2³², as they are on the wire. A guest that lies about its own gets less or more bytes sent
//! into its own memory, which is its own affair: nothing on the host depends on them.

use crate::connection::BUFFER;
use crate::packet::Header;

/// The guest is told of room when it has grown by so much. It never has to wait for room that it was not told of, since
/// the rest of the buffer is larger.
const TELL_AT: u32 = BUFFER as u32 / 4;

#[derive(Debug)]
pub(crate) struct Credit {
    /// Bytes of the guest that have been passed on.
    forwarded: u32,
    /// And of so many of them it knows.
    told: u32,
    /// It asked.
    asked: bool,
    /// Bytes sent to the guest.
    sent: u32,
    /// Its room in all, as it said last.
    guest_room: u32,
    /// What of `sent` it has passed on, as it said last.
    guest_forwarded: u32,
    /// It was asked for its room, and has said nothing of any since.
    asking: bool,
}

impl Credit {
    pub(crate) fn new() -> Self {
        Self {
            forwarded: 0,
            told: 0,
            asked: false,
            sent: 0,
            guest_room: 0,
            guest_forwarded: 0,
            asking: false,
        }
    }

    /// Every packet of the guest tells.
    pub(crate) fn heard(&mut self, header: &Header) {
        self.guest_room = header.room;
        self.guest_forwarded = header.forwarded;
        // An answer that there is still none is not asked for again: the guest tells when its program has read.
        self.asking &= self.room() == 0;
    }

    /// The guest wants to know.
    pub(crate) fn asked(&mut self) {
        self.asked = true;
    }

    /// Bytes of the guest have reached the host, or never will.
    pub(crate) fn forward(&mut self, count: usize) {
        self.forwarded = self.forwarded.wrapping_add(count as u32);
    }

    /// The guest should be told.
    pub(crate) fn is_due(&self) -> bool {
        self.asked || self.forwarded.wrapping_sub(self.told) >= TELL_AT
    }

    /// How many bytes the guest has room for.
    pub(crate) fn room(&self) -> u32 {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Bytes are on their way to the guest.
    pub(crate) fn send(&mut self, count: usize) {
        self.sent = self.sent.wrapping_add(count as u32);
    }

    /// There is no room, and nobody has asked for it yet.
    pub(crate) fn must_ask(&self) -> bool {
        self.room() == 0 && !self.asking
    }

    pub(crate) fn ask(&mut self) {
        self.asking = true;
    }

    /// A packet to the guest tells: its room and what was passed on.
    pub(crate) fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.asked = false;
        (BUFFER as u32, self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::HEADER;

    fn said(credit: &mut Credit, room: u32, forwarded: u32) -> u32 {
        credit.heard(&Header { room, forwarded, ..Header::parse(&[0; HEADER]) });
        credit.room()
    }

    #[test]
    fn counters_run_over_their_end() {
        let mut credit = Credit::new();
        credit.sent = u32::MAX - 9;
        assert_eq!(said(&mut credit, 100, u32::MAX - 9), 100);
        credit.send(60);
        assert_eq!(credit.room(), 40);
        assert_eq!(said(&mut credit, 100, 50), 100);
        credit.told = u32::MAX;
        credit.forwarded = u32::MAX;
        credit.forward(BUFFER / 4);
        assert!(credit.is_due());
    }

    /// Each answer "none" would be asked about again, and host and guest would do nothing else.
    #[test]
    fn a_full_guest_is_asked_once() {
        let mut credit = Credit::new();
        assert!(credit.must_ask());
        credit.ask();
        assert_eq!(said(&mut credit, 0, 0), 0);
        assert!(!credit.must_ask());
        assert_eq!(said(&mut credit, 10, 0), 10);
        credit.send(10);
        assert!(credit.must_ask());
    }

    #[test]
    fn a_guest_that_passed_on_what_was_never_sent_or_shrinks_its_buffer_has_no_room() {
        let mut credit = Credit::new();
        assert_eq!(said(&mut credit, 100, 1), 0);
        assert_eq!(said(&mut credit, 100, 0), 100);
        credit.send(80);
        assert_eq!(said(&mut credit, 50, 0), 0);
    }
}
