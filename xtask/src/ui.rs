//! What a person sees: stages with their times, progress, the reason of a failure.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Whether standard error is a terminal that may be coloured.
pub(crate) fn fancy() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// What to tell a program whose output passes through us.
pub(crate) fn color_choice() -> &'static str {
    if fancy() { "always" } else { "never" }
}

fn paint(code: &str, text: &str) -> String {
    if fancy() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

pub(crate) fn bold(text: &str) -> String {
    paint("1", text)
}

pub(crate) fn green(text: &str) -> String {
    paint("32", text)
}

pub(crate) fn red(text: &str) -> String {
    paint("31", text)
}

pub(crate) fn yellow(text: &str) -> String {
    paint("33", text)
}

/// Opens a stage: a line of its own, so that a long silence has a name.
pub(crate) fn heading(text: &str) {
    eprintln!("{} {}", bold("==>"), bold(text));
}

/// A remark under the current stage.
pub(crate) fn note(text: &str) {
    eprintln!("    {text}");
}

/// Prints the whole chain of a failure, once.
pub(crate) fn failure(error: &anyhow::Error) {
    eprintln!("{} {error}", red("error:"));
    for cause in error.chain().skip(1) {
        eprintln!("  caused by: {cause}");
    }
}

/// `3m 07s` or `4.2 s`.
pub(crate) fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds >= 60 {
        format!("{}m {:02}s", seconds / 60, seconds % 60)
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

/// Counts towards an expected total: a bar on a terminal, a line every few seconds elsewhere.
pub(crate) struct Counter {
    bar: Option<ProgressBar>,
    what: &'static str,
    expected: u64,
    seen: u64,
    last_line: Instant,
}

impl Counter {
    const LINE_EVERY: Duration = Duration::from_secs(20);

    pub(crate) fn new(what: &'static str, expected: u64) -> Self {
        let bar = fancy().then(|| {
            let bar = ProgressBar::new(expected);
            if let Ok(style) = ProgressStyle::with_template("    {bar:32} {pos:>5}/{len} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.set_message(what);
            bar
        });
        Self { bar, what, expected, seen: 0, last_line: Instant::now() }
    }

    pub(crate) fn step(&mut self) {
        self.seen += 1;
        // The expected total is an estimate: stretch it rather than show more than all.
        if self.seen > self.expected {
            self.expected = self.seen;
        }
        if let Some(bar) = &self.bar {
            bar.set_length(self.expected);
            bar.set_position(self.seen);
        } else if self.last_line.elapsed() >= Self::LINE_EVERY {
            note(&format!("{} of about {} {}", self.seen, self.expected, self.what));
            self.last_line = Instant::now();
        }
    }

    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::time;

    #[test]
    fn times_are_read_at_a_glance() {
        assert_eq!(time(Duration::from_millis(4_210)), "4.2 s");
        assert_eq!(time(Duration::from_secs(187)), "3m 07s");
    }
}
