//! The last words of a box: the ends of its logs, fit for an error message.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::launch::{CONSOLE_LOG, VMM_LOG};

/// The ends of the VMM's log and of the guest's console, at most `bytes` together.
pub(crate) fn last_words(dir: &Path, bytes: usize) -> String {
    let log = tail(&dir.join(VMM_LOG), bytes / 2).unwrap_or_default();
    let console = tail(&dir.join(CONSOLE_LOG), bytes - log.len().min(bytes)).unwrap_or_default();
    match (log.is_empty(), console.is_empty()) {
        (true, true) => "nothing was said".to_owned(),
        (false, true) => cut(format!("VMM: {log}"), bytes),
        (true, false) => cut(format!("console: {console}"), bytes),
        (false, false) => cut(format!("VMM: {log}; console: {console}"), bytes),
    }
}

fn tail(path: &Path, bytes: usize) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.seek(SeekFrom::End(0))?;
    let start = length.saturating_sub(bytes as u64);
    file.seek(SeekFrom::Start(start))?;
    let mut end = Vec::with_capacity(bytes);
    file.take(bytes as u64).read_to_end(&mut end)?;
    Ok(readable(&String::from_utf8_lossy(&end)))
}

/// Lines joined by `|`; terminal escape sequences and control characters removed.
fn readable(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\u{1b}' => skip_escape(&mut rest),
            '\n' => plain.push('\n'),
            '\t' => plain.push(' '),
            c if c.is_control() => {}
            c => plain.push(c),
        }
    }
    plain.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" | ")
}

fn skip_escape(rest: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    if rest.next_if_eq(&'[').is_some() {
        while rest.next_if(|c| !c.is_ascii_alphabetic()).is_some() {}
    }
    rest.next();
}

/// Keeps the end.
fn cut(text: String, bytes: usize) -> String {
    let mut start = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_put_escape_sequences_into_our_messages() {
        assert_eq!(readable("a\u{1b}[31;1mred\u{1b}[0m\u{7}\r\n\n\u{1b}cb\t2"), "ared | b 2");
    }

    #[test]
    fn the_end_is_kept_and_both_logs_have_their_share() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(last_words(dir.path(), 100), "nothing was said");
        std::fs::write(dir.path().join(CONSOLE_LOG), format!("{}\nKernel panic\n", "x".repeat(5000)))
            .unwrap();
        std::fs::write(dir.path().join(VMM_LOG), format!("{}\nno such disk\n", "y".repeat(5000))).unwrap();
        let words = last_words(dir.path(), 200);
        assert!(words.len() <= 200, "{}", words.len());
        assert!(words.contains("no such disk") && words.ends_with("Kernel panic"), "{words}");
    }

    #[test]
    fn cutting_never_splits_a_character() {
        assert_eq!(cut("aé".to_owned(), 1), "");
    }
}
