//! The steps as a table that grows line by line.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Prints each step with the time since the one before.
pub(crate) struct Table {
    last: Instant,
    colours: bool,
}

impl Table {
    pub(crate) fn new() -> Self {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { last: Instant::now(), colours }
    }

    /// A step is done; `result` is what a reader wants to see of it.
    pub(crate) fn step(&mut self, name: &str, result: &str) {
        let time = duration(self.last.elapsed());
        self.line(&format!(
            "  {} {name:<18} {} {result}",
            self.paint("32", "✓"),
            self.paint("2", &format!("{time:>9}  "))
        ));
        self.last = Instant::now();
    }

    /// Something to read under the last step.
    pub(crate) fn quote(&mut self, text: &str) {
        self.line(&format!("      {}", self.paint("36", text)));
        self.last = Instant::now();
    }

    pub(crate) fn close(&self, total: Duration, state: &Path) {
        self.line(&format!(
            "\n  {} in all; state folder {}",
            self.paint("1", &duration(total)),
            state.display()
        ));
    }

    /// A reader who has gone away must not keep us from cleaning up.
    fn line(&self, text: &str) {
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

fn duration(duration: Duration) -> String {
    let milliseconds = duration.as_secs_f64() * 1000.0;
    if milliseconds < 1000.0 {
        format!("{milliseconds:.1} ms")
    } else {
        format!("{:.2} s", milliseconds / 1000.0)
    }
}
