//! Keeps the box's logs from filling the host: a guest can print for ever.
//!
//! Whoever logs writes straight to the file, so that nothing is lost when the process ends at once, as
//! libkrun's does. A thread looks at the files every two seconds and cuts one that has grown too long to its
//! last part. In between a guest can write what a serial port can carry, which is a few megabytes at most.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::time::Duration;

use a3s_box_vmm::launch::LOG_LIMIT;
use anyhow::Context;
use log::{LevelFilter, Log, Metadata, Record};

/// Sends what a library logs, at `level` or graver, to standard error, which is the box's log.
pub(crate) fn of_library(whose: &'static str, level: LevelFilter) {
    // It fails only if there is a logger already.
    if log::set_boxed_logger(Box::new(ToStandardError { whose })).is_ok() {
        log::set_max_level(level);
    }
}

struct ToStandardError {
    whose: &'static str,
}

impl Log for ToStandardError {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            eprintln!("a3s-box-vmm: {}: {}", self.whose, record.args());
        }
    }

    fn flush(&self) {}
}

const INTERVAL: Duration = Duration::from_secs(2);

/// What is left of a log that was cut.
const KEPT: u64 = LOG_LIMIT / 4;

/// Watches `files` for as long as the process lives. They are open for reading and appending.
pub(crate) fn keep_short(mut files: Vec<File>) -> anyhow::Result<()> {
    let watch = move || loop {
        std::thread::sleep(INTERVAL);
        for file in &mut files {
            if let Err(error) = cut(file) {
                eprintln!("a3s-box-vmm: could not cut a log: {error}");
            }
        }
    };
    std::thread::Builder::new()
        .name("logs".into())
        .spawn(watch)
        .map(drop)
        .context("start the thread for the logs")
}

fn cut(file: &mut File) -> io::Result<()> {
    let length = file.metadata()?.len();
    if length <= LOG_LIMIT {
        return Ok(());
    }
    let mut end = Vec::with_capacity(KEPT as usize + 64);
    end.extend_from_slice(b"[a3s-box cut this log here]\n");
    file.seek(SeekFrom::Start(length - KEPT))?;
    file.take(KEPT).read_to_end(&mut end)?;
    file.set_len(0)?;
    file.write_all(&end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn a_long_log_keeps_its_end_and_a_short_one_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "x".repeat(LOG_LIMIT as usize)).unwrap();
        let mut file = OpenOptions::new().read(true).append(true).open(&path).unwrap();
        cut(&mut file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), LOG_LIMIT);
        let mut other = OpenOptions::new().append(true).open(&path).unwrap();
        other.write_all(b"last line\n").unwrap();
        cut(&mut file).unwrap();
        other.write_all(b"after\n").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() < KEPT as usize + 100, "{}", text.len());
        assert!(text.starts_with("[a3s-box cut") && text.ends_with("last line\nafter\n"));
    }
}
