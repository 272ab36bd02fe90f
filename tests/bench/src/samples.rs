//! What several runs of one thing say.

use std::time::Duration;

/// Durations in the order in which they were measured, at least one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<Duration>);

impl Samples {
    pub(crate) fn push(&mut self, value: Duration) {
        self.0.push(value);
    }

    pub(crate) fn extend(&mut self, values: impl IntoIterator<Item = Duration>) {
        self.0.extend(values);
    }

    /// Megabytes (10^6 bytes) per second, if each sample is the time for so many bytes.
    pub(crate) fn rate(&self, bytes: u64) -> f64 {
        bytes as f64 / 1e3 / self.percentile(50)
    }

    /// Milliseconds below which `percent` of the samples lie (nearest rank).
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        nearest_rank(self.0.iter().map(|value| value.as_secs_f64() * 1e3).collect(), percent)
    }

    /// How much longer than `other` this took: the median over the rounds, each compared with its own round.
    pub(crate) fn ratio_to(&self, other: &Self) -> f64 {
        let ratios = self.0.iter().zip(&other.0).map(|(mine, its)| mine.as_secs_f64() / its.as_secs_f64());
        nearest_rank(ratios.collect(), 50)
    }

    /// Median over minimum: 1.0 on a machine that does nothing else.
    pub(crate) fn noise(&self) -> f64 {
        self.percentile(50) / self.percentile(0)
    }
}

/// The middle one (nearest rank).
pub(crate) fn median(values: Vec<f64>) -> f64 {
    nearest_rank(values, 50)
}

fn nearest_rank(mut values: Vec<f64>, percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Samples;

    fn samples(values: &[u64]) -> Samples {
        Samples(values.iter().copied().map(Duration::from_millis).collect())
    }

    #[test]
    fn percentiles_are_measured_values() {
        let found = samples(&[50, 10, 40, 20, 30]);
        assert_eq!([0, 50, 90].map(|percent| found.percentile(percent)), [10.0, 30.0, 50.0]);
    }

    #[test]
    fn ratios_compare_runs_of_the_same_round() {
        // The machine was ten times slower in the second round: that is no difference between the two.
        assert_eq!(samples(&[20, 200, 20]).ratio_to(&samples(&[10, 100, 10])), 2.0);
    }
}
