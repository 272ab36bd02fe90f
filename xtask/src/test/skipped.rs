//! Tests that could not run on this machine: they say so in a file, since Rust's harness counts them as passed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use crate::ui;

/// The file of one run of the tests.
pub(super) struct Skipped(NamedTempFile);

impl Skipped {
    pub(super) fn start() -> Result<Self> {
        Ok(Self(NamedTempFile::new().context("making the list of skipped tests")?))
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Shows each skipped test with its reason, and corrects the runner's `N passed, …`.
    pub(super) fn corrected(&self, counts: &str) -> Result<String> {
        let list = fs::read_to_string(self.path()).context("reading the list of skipped tests")?;
        for line in list.lines() {
            ui::note(&format!("skipped: {line}"));
        }
        Ok(corrected(counts, list.lines().count()))
    }
}

/// `9 passed, 0 skipped` with two tests that only said that they could not run is `7 passed, 2 skipped`.
fn corrected(counts: &str, more: usize) -> String {
    let change = |part: &str| {
        let (number, words) = part.split_once(' ')?;
        let number: usize = number.parse().ok()?;
        Some(match words.split(' ').next()? {
            "passed" => format!("{} {words}", number.checked_sub(more)?),
            "skipped" => format!("{} {words}", number + more),
            _ => part.to_owned(),
        })
    };
    let parts: Vec<String> =
        counts.split(", ").map(|part| change(part).unwrap_or_else(|| part.to_owned())).collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::corrected;

    #[test]
    fn a_test_that_could_not_run_is_no_passed_one() {
        assert_eq!(corrected("9 passed, 0 skipped", 2), "7 passed, 2 skipped");
        assert_eq!(
            corrected("8 passed (1 slow), 1 failed, 3 skipped", 1),
            "7 passed (1 slow), 1 failed, 4 skipped"
        );
        assert_eq!(corrected("9 passed, 0 skipped", 0), "9 passed, 0 skipped");
    }
}
