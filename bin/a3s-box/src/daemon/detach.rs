//! The keys that leave a container: Ctrl-P Ctrl-Q, as docker has them.

const KEYS: [u8; 2] = [0x10, 0x11];

/// Looks for the keys in what is typed, across pieces.
#[derive(Debug, Default)]
pub(super) struct DetachKeys {
    /// The first key was typed; it is passed on once another one than the second follows.
    begun: bool,
}

impl DetachKeys {
    /// What of the piece is for the container; `true` if it is left after that.
    pub(super) fn pass(&mut self, piece: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(piece.len() + 1);
        for key in piece {
            match (self.begun, *key) {
                (true, key) if key == KEYS[1] => return (passed, true),
                (true, key) => {
                    passed.push(KEYS[0]);
                    self.begun = key == KEYS[0];
                    if !self.begun {
                        passed.push(key);
                    }
                }
                (false, key) if key == KEYS[0] => self.begun = true,
                (false, key) => passed.push(key),
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_keys_in_a_row_leave_also_in_two_pieces() {
        assert_eq!(DetachKeys::default().pass(b"ab\x10\x11c"), (b"ab".to_vec(), true));
        let mut keys = DetachKeys::default();
        assert_eq!(keys.pass(b"a\x10"), (b"a".to_vec(), false));
        assert_eq!(keys.pass(b"\x11"), (Vec::new(), true));
    }

    #[test]
    fn the_first_key_alone_is_the_containers() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.pass(b"\x10x\x11\x10\x10"), (b"\x10x\x11\x10".to_vec(), false));
        assert_eq!(keys.pass(b"y"), (b"\x10y".to_vec(), false));
    }
}
