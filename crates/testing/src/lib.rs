//! What the tests of several crates share.

use std::fs::File;
use std::io::Write;

/// Names the file in which a run of all tests collects which of them could not run: one line each, `TEST: REASON`.
pub const SKIPPED_TESTS: &str = "A3S_BOX_SKIPPED_TESTS";

/// Says that the current test cannot run on this machine, and why; the caller returns then.
///
/// Rust's test harness has no word for this and counts the test as passed, so `cargo xtask test` reads the file and
/// counts again.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    eprintln!("SKIPPED: {test}: {reason}");
    let Some(list) = std::env::var_os(SKIPPED_TESTS) else { return };
    let noted = File::options()
        .append(true)
        .create(true)
        .open(&list)
        // One write: tests of several processes share the file.
        .and_then(|mut file| file.write_all(format!("{test}: {reason}\n").as_bytes()));
    assert!(noted.is_ok(), "{} cannot be written: {noted:?}", list.display());
}
