//! The last words of a box: the ends of its logs, fit for an error message.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::launch::{CONSOLE_LOG, VMM_LOG};

/// A panic is followed by the state of the processors.
const FAULT_TAIL: usize = 64 * 1024;
/// How much of its words are kept.
const FAULT_LENGTH: usize = 300;

/// The ends of the VMM's log and of the guest's console, at most `bytes` together.
pub fn last_words(dir: &Path, bytes: usize) -> String {
    let log = tail(&dir.join(VMM_LOG), bytes / 2).unwrap_or_default();
    let console = tail(&dir.join(CONSOLE_LOG), bytes - log.len().min(bytes)).unwrap_or_default();
    match (log.is_empty(), console.is_empty()) {
        (true, true) => "nothing was said".to_owned(),
        (false, true) => cut(format!("VMM: {log}"), bytes),
        (true, false) => cut(format!("console: {console}"), bytes),
        (false, false) => cut(format!("VMM: {log}; console: {console}"), bytes),
    }
}

/// Why a guest that has ended did so, as far as its console tells. The guest writes what it likes there: it can lie about
/// its own end only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestFault {
    /// The kernel panicked.
    Panic(String),
    /// The agent, without which the kernel panics, ended or gave up.
    Agent(String),
}

/// Looks for a fault at the end of a box's console.
pub fn guest_fault(dir: &Path) -> Option<GuestFault> {
    let console = end(&dir.join(CONSOLE_LOG), FAULT_TAIL).ok()?;
    String::from_utf8_lossy(&console).lines().rev().find_map(fault)
}

fn fault(line: &str) -> Option<GuestFault> {
    let said = |mark: &str| Some(cut(readable(line.split_once(mark)?.1), FAULT_LENGTH));
    if let Some(words) = said("a3s-box-agent: fatal: ") {
        return Some(GuestFault::Agent(words));
    }
    let words = said("Kernel panic - not syncing: ")?;
    let words = words.trim_end_matches(" ]---").to_owned();
    // Process 1 is the agent.
    let of_agent = words.starts_with("Attempted to kill init!");
    Some(if of_agent { GuestFault::Agent(words) } else { GuestFault::Panic(words) })
}

fn tail(path: &Path, bytes: usize) -> io::Result<String> {
    end(path, bytes).map(|end| readable(&String::from_utf8_lossy(&end)))
}

fn end(path: &Path, bytes: usize) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.seek(SeekFrom::End(0))?;
    let start = length.saturating_sub(bytes as u64);
    file.seek(SeekFrom::Start(start))?;
    let mut end = Vec::with_capacity(bytes);
    file.take(bytes as u64).read_to_end(&mut end)?;
    Ok(end)
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
    fn a_panic_is_told_from_the_agents_end_and_from_a_power_off() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(guest_fault(dir.path()), None);
        let said = |text: &str| {
            std::fs::write(dir.path().join(CONSOLE_LOG), text).unwrap();
            guest_fault(dir.path())
        };
        assert_eq!(said("[ 1.0] reboot: Restarting system\r\n"), None);
        let trace = "[ 3.1] Call Trace:\r\n".repeat(100);
        let panic = format!("[ 3.0] Kernel panic - not syncing: sysrq triggered crash\u{1b}[0m\r\n{trace}");
        assert_eq!(said(&panic), Some(GuestFault::Panic("sysrq triggered crash".to_owned())));
        let init = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009";
        let expected = GuestFault::Agent("Attempted to kill init! exitcode=0x00000009".to_owned());
        assert_eq!(said(init), Some(expected));
        let expected = GuestFault::Agent("mount /dev/vda: No such device".to_owned());
        assert_eq!(said("a3s-box-agent: fatal: mount /dev/vda: No such device\nx\n"), Some(expected));
        let long = said(&format!("Kernel panic - not syncing: {}", "é".repeat(5000))).unwrap();
        assert!(matches!(long, GuestFault::Panic(words) if words.len() <= FAULT_LENGTH));
    }

    #[test]
    fn cutting_never_splits_a_character() {
        assert_eq!(cut("aé".to_owned(), 1), "");
    }
}
