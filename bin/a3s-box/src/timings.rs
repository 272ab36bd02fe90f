//! What took how long, for `--timings`.

use std::time::Instant;

use a3s_box_runtime::Stage;

/// Stages in the order of their end.
pub(crate) struct Timings {
    began: Instant,
    stages: Vec<Stage>,
}

impl Timings {
    /// Of something that began at `began`.
    pub(crate) fn since(began: Instant) -> Self {
        Self { began, stages: Vec::new() }
    }

    /// Records a stage that began at `since` and ends now.
    pub(crate) fn record(&mut self, name: &str, since: Instant) {
        self.record_until(name, since, Instant::now());
    }

    /// Records a stage that began at `since` and ended at `until`.
    pub(crate) fn record_until(&mut self, name: &str, since: Instant, until: Instant) {
        let (at, took) = (since.duration_since(self.began), until.duration_since(since));
        self.stages.push(Stage { name: name.to_owned(), at, took });
    }

    /// Records the stages of the start of a box that began at `since`.
    pub(crate) fn record_box(&mut self, since: Instant, timeline: &[Stage]) {
        let offset = since.duration_since(self.began);
        self.stages.extend(timeline.iter().map(|stage| Stage {
            name: format!("  {}", stage.name),
            at: offset + stage.at,
            took: stage.took,
        }));
    }

    pub(crate) fn render(&self) -> String {
        let width = self.stages.iter().map(|stage| stage.name.chars().count()).max().unwrap_or(0);
        let line = |Stage { name, at, took }: &Stage| {
            format!("{name:<width$}  {:>7} ms  from {:>7} ms\n", took.as_millis(), at.as_millis())
        };
        self.stages.iter().map(line).collect()
    }
}
