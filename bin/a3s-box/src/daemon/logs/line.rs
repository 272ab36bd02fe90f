//! A line of a log file: `<RFC 3339 time> <stdout|stderr> <P|F> <text>`. `P` is a part: the line goes on in the next one
//! of its stream.

use std::io::{self, Write};

use jiff::Timestamp;

#[derive(Debug, PartialEq, Eq)]
struct Line<'a> {
    time: &'a str,
    of_stderr: bool,
    partial: bool,
    text: &'a [u8],
}

impl<'a> Line<'a> {
    /// Without its newline.
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut fields = bytes.splitn(4, |byte| *byte == b' ');
        let time = str::from_utf8(fields.next()?).ok()?;
        let of_stderr = match fields.next()? {
            b"stdout" => false,
            b"stderr" => true,
            _ => return None,
        };
        let partial = match fields.next()? {
            b"P" => true,
            b"F" => false,
            _ => return None,
        };
        Some(Self { time, of_stderr, partial, text: fields.next()? })
    }
}

/// Prints lines to where the container wrote them.
pub(super) struct Printer<O, E> {
    stdout: O,
    stderr: E,
    since: Option<Timestamp>,
    timestamps: bool,
    /// Whether the last line of stdout and of stderr goes on.
    open: [bool; 2],
}

impl<O: Write, E: Write> Printer<O, E> {
    pub(super) fn new(stdout: O, stderr: E, since: Option<Timestamp>, timestamps: bool) -> Self {
        Self { stdout, stderr, since, timestamps, open: [false; 2] }
    }

    /// Prints a line of the file. What is no line of a log is passed over.
    pub(super) fn print(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(line) = Line::parse(bytes.strip_suffix(b"\n").unwrap_or(bytes)) else { return Ok(()) };
        if let Some(since) = self.since
            && line.time.parse::<Timestamp>().is_ok_and(|time| time < since)
        {
            return Ok(());
        }
        let out: &mut dyn Write = if line.of_stderr { &mut self.stderr } else { &mut self.stdout };
        let open = &mut self.open[usize::from(line.of_stderr)];
        if self.timestamps && !*open {
            write!(out, "{} ", line.time)?;
        }
        out.write_all(line.text)?;
        if !line.partial {
            out.write_all(b"\n")?;
        }
        *open = line.partial;
        Ok(())
    }

    /// What was printed is to be seen now.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()?;
        self.stderr.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: [&str; 5] = [
        "2026-01-02T10:00:00.000000000Z stdout F one\n",
        "2026-01-02T10:00:01.000000000Z stderr P half \n",
        "2026-01-02T10:00:02.000000000Z stdout F \n",
        "2026-01-02T10:00:03.000000000Z stderr F and half\n",
        "no line of a log\n",
    ];

    fn printed(since: Option<&str>, timestamps: bool) -> (String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let since = since.map(|since| since.parse().unwrap());
        let mut printer = Printer::new(&mut out, &mut err, since, timestamps);
        LOG.iter().for_each(|line| printer.print(line.as_bytes()).unwrap());
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn streams_stay_apart_and_parts_become_lines() {
        assert_eq!(printed(None, false), ("one\n\n".to_owned(), "half and half\n".to_owned()));
    }

    #[test]
    fn what_is_older_is_left_out_whatever_the_zone_of_the_question() {
        let (out, err) = printed(Some("2026-01-02T12:00:02+02:00"), false);
        assert_eq!((out.as_str(), err.as_str()), ("\n", "and half\n"));
    }

    #[test]
    fn a_line_of_parts_has_one_time() {
        let (_, err) = printed(None, true);
        assert_eq!(err, "2026-01-02T10:00:01.000000000Z half and half\n");
    }
}
