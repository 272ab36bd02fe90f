//! What libkrun has to say, in the box's log.

use log::{LevelFilter, Log, Metadata, Record};

struct ToStandardError;

static LOGGER: ToStandardError = ToStandardError;

/// Sends errors to standard error, which is the box's log. Warnings come with every connection that is closed.
pub(crate) fn errors() {
    // It fails only if there is a logger already.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Error);
    }
}

impl Log for ToStandardError {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            eprintln!("{}: {}", record.target(), record.args());
        }
    }

    fn flush(&self) {}
}
