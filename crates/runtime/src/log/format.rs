//! From a process's bytes to lines of the CRI log format, without any I/O.
//!
//! A line is `<RFC 3339 time with nanoseconds> <stdout|stderr> <P|F> <content>`: `F` ends a line of the
//! process, `P` is a part of one that continues (Kubernetes, "CRI container log format"). A line longer than
//! [`PART`] is cut at every [`PART`] bytes counted from its start, so the cuts do not depend on how the bytes
//! arrived.

use time_format::Stamp;

pub(crate) mod time_format;

/// The longest content of one log line. kubelet and its readers are used to it.
pub(crate) const PART: usize = 16 * 1024;

/// Which output a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Stdout,
    Stderr,
}

impl Source {
    fn word(self) -> &'static [u8] {
        match self {
            Self::Stdout => b"stdout",
            Self::Stderr => b"stderr",
        }
    }
}

/// Appends the lines that `input` is known to contain to `out` and answers how many of its bytes they took.
/// The rest, at most [`PART`] bytes, must be offered again with what follows it.
///
/// A part of exactly [`PART`] bytes waits for the next byte: if that is the line's end, the line is whole.
pub(crate) fn format_lines(input: &[u8], source: Source, stamp: &Stamp, out: &mut Vec<u8>) -> usize {
    let mut taken = 0;
    loop {
        let rest = &input[taken..];
        let window = &rest[..rest.len().min(PART + 1)];
        match memchr::memchr(b'\n', window) {
            Some(end) => {
                push_line(&rest[..end], source, b'F', stamp, out);
                taken += end + 1;
            }
            None if window.len() > PART => {
                push_line(&rest[..PART], source, b'P', stamp, out);
                taken += PART;
            }
            None => return taken,
        }
    }
}

/// Appends what remains at the end of the output: a line that never ended is a part.
pub(crate) fn format_end(rest: &[u8], source: Source, stamp: &Stamp, out: &mut Vec<u8>) {
    if !rest.is_empty() {
        push_line(rest, source, b'P', stamp, out);
    }
}

fn push_line(content: &[u8], source: Source, tag: u8, stamp: &Stamp, out: &mut Vec<u8>) {
    out.extend_from_slice(stamp.as_bytes());
    out.push(b' ');
    out.extend_from_slice(source.word());
    out.extend_from_slice(&[b' ', tag, b' ']);
    out.extend_from_slice(content);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds chunks as a reader does: what is not taken is offered again.
    fn feed(chunks: &[&[u8]]) -> Vec<u8> {
        let stamp = Stamp::at(0);
        let (mut out, mut held) = (Vec::new(), Vec::new());
        for chunk in chunks {
            held.extend_from_slice(chunk);
            let taken = format_lines(&held, Source::Stdout, &stamp, &mut out);
            held.drain(..taken);
            assert!(held.len() <= PART);
        }
        format_end(&held, Source::Stdout, &stamp, &mut out);
        out
    }

    /// The process's bytes, read back out of log lines.
    fn read_back(log: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for line in log.split_inclusive(|b| *b == b'\n') {
            let line = line.strip_suffix(b"\n").unwrap();
            let rest = line.strip_prefix(b"1970-01-01T00:00:00.000000000Z stdout ").unwrap();
            let (tag, content) = (rest[0], &rest[2..]);
            assert!(content.len() <= PART);
            bytes.extend_from_slice(content);
            if tag == b'F' {
                bytes.push(b'\n');
            }
        }
        bytes
    }

    fn output() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            8 => prop::collection::vec(any::<u8>(), 0..200),
            1 => Just(vec![b'x'; PART]),
            1 => Just(vec![b'y'; PART + 1]),
            3 => Just(vec![b'\n']),
        ];
        prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn the_same_bytes_give_the_same_lines_in_any_chunking(
            bytes in output(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..10),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            let log = feed(&chunks);
            prop_assert_eq!(&log, &feed(&[&bytes]));
            prop_assert_eq!(read_back(&log), bytes);
        }
    }

    #[test]
    fn a_line_of_exactly_one_part_is_whole() {
        let mut line = vec![b'a'; PART];
        line.push(b'\n');
        let log = feed(&[&line]);
        assert!(log.starts_with(b"1970-01-01T00:00:00.000000000Z stdout F a"));
        assert_eq!(log.iter().filter(|b| **b == b'\n').count(), 1);
    }

    #[test]
    fn a_last_line_without_an_end_is_a_part() {
        assert_eq!(
            String::from_utf8(feed(&[b"one\n", b"tw", b"o"])).unwrap(),
            "1970-01-01T00:00:00.000000000Z stdout F one\n1970-01-01T00:00:00.000000000Z stdout P two\n"
        );
    }
}
