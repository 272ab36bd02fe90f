//! The environment of a process: the given entries, later ones win, and what every program expects to find.

use std::collections::HashMap;

use thiserror::Error;

/// What a process gets when nobody says otherwise.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An entry that is no assignment.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("environment entry {index} ({entry:?}) is not NAME=value")]
pub struct EnvironmentError {
    /// Counted from 0.
    pub index: usize,
    /// Its first 64 characters.
    pub entry: String,
}

/// Merges `entries` and adds PATH, HOME and, for terminals, TERM where they are not set.
pub fn merge(entries: &[String], home: &str, terminal: bool) -> Result<Vec<String>, EnvironmentError> {
    let mut last = HashMap::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        match entry.split_once('=') {
            Some((name, _)) if !name.is_empty() && !entry.contains('\0') => last.insert(name, index),
            _ => return Err(EnvironmentError { index, entry: entry.chars().take(64).collect() }),
        };
    }
    let mut merged: Vec<String> = entries
        .iter()
        .enumerate()
        .filter(|(index, entry)| entry.split_once('=').is_some_and(|(name, _)| last[name] == *index))
        .map(|(_, entry)| entry.clone())
        .collect();
    if !last.contains_key("PATH") {
        merged.push(format!("PATH={DEFAULT_PATH}"));
    }
    if !last.contains_key("HOME") {
        merged.push(format!("HOME={home}"));
    }
    if terminal && !last.contains_key("TERM") {
        merged.push("TERM=xterm".to_owned());
    }
    Ok(merged)
}

/// The value of `name` in a merged environment.
pub fn value<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    environment.iter().find_map(|entry| entry.split_once('=').filter(|(n, _)| *n == name).map(|(_, v)| v))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| (*t).to_owned()).collect()
    }

    #[test]
    fn later_entries_win_and_defaults_fill_the_gaps() {
        let merged = merge(&entries(&["A=1", "B=x=y", "A=2", "PATH=/bin"]), "/root", false).unwrap();
        assert_eq!(merged, ["B=x=y", "A=2", "PATH=/bin", "HOME=/root"]);
    }

    #[test]
    fn a_terminal_gets_a_term_and_an_empty_value_counts_as_set() {
        let merged = merge(&entries(&["HOME=", "TERM=vt100"]), "/root", true).unwrap();
        assert_eq!(merged, ["HOME=", "TERM=vt100", &format!("PATH={DEFAULT_PATH}")]);
        assert_eq!(value(&merged, "HOME"), Some(""));
    }

    #[test]
    fn entries_that_are_no_assignments_are_named() {
        for bad in ["NAME", "=value", "A=\0"] {
            let error = merge(&entries(&["OK=1", bad]), "/", false).unwrap_err();
            assert_eq!((error.index, error.entry.as_str()), (1, bad));
        }
    }

    #[test]
    fn ten_thousand_entries_are_merged() {
        let many: Vec<String> = (0..10_000).map(|i| format!("N{}=v{i}", i % 5_000)).collect();
        let merged = merge(&many, "/", false).unwrap();
        assert_eq!(merged.len(), 5_002);
        assert_eq!(value(&merged, "N7"), Some("v5007"));
    }
}
