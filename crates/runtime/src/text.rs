//! Text that came from a guest, made fit for messages and logs.

/// The most characters of a guest's text that go into a message.
pub(crate) const MESSAGE_LIMIT: usize = 2048;

/// Replaces control characters, which could forge log lines or drive a terminal, and cuts the text.
pub(crate) fn printable(text: &str, limit: usize) -> String {
    text.chars().take(limit).map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_escapes_do_not_survive() {
        assert_eq!(printable("a\x1b[31mb\r\nc", 99), "a [31mb \nc");
        assert_eq!(printable("äöü", 2), "äö");
    }
}
