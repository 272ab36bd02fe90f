//! What took how long, for `--timings`.

use std::time::{Duration, Instant};

use a3s_box_runtime::Stage;

/// Stages in the order of their end.
#[derive(Default)]
pub(crate) struct Timings {
    stages: Vec<(String, Duration)>,
}

impl Timings {
    /// Records a stage that began at `since` and ends now.
    pub(crate) fn record(&mut self, name: &str, since: Instant) {
        self.stages.push((name.to_owned(), since.elapsed()));
    }

    /// Records a stage that began at `since` and ended at `until`.
    pub(crate) fn record_until(&mut self, name: &str, since: Instant, until: Instant) {
        self.stages.push((name.to_owned(), until.duration_since(since)));
    }

    /// Records the stages of a box's start.
    pub(crate) fn record_box(&mut self, timeline: &[Stage]) {
        self.stages.extend(timeline.iter().map(|stage| (format!("  {}", stage.name), stage.took)));
    }

    pub(crate) fn render(&self) -> String {
        let width = self.stages.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let line =
            |(name, took): &(String, Duration)| format!("{name:<width$}  {:>7} ms\n", took.as_millis());
        self.stages.iter().map(line).collect()
    }
}
