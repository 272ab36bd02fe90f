//! From CRI's limits, which speak cgroup v1, to the files of cgroup v2 in the guest.
//!
//! References: kernel `Documentation/admin-guide/cgroup-v2.rst`; the conversion of shares follows the
//! curve that runc and crun agreed on in 2025, on which 1024 shares are the default weight 100.

use a3s_box_core::spec::Limits;
use a3s_box_protocol::proto::CgroupSetting;

/// The kernel's default period.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// The settings in the order in which they are written: `unified` last, because it is the most specific.
pub(crate) fn settings(limits: &Limits) -> Vec<CgroupSetting> {
    let mut list = Vec::new();
    let mut set = |file: &str, value: String| list.push(CgroupSetting { file: file.to_owned(), value });
    if let Some(shares) = limits.cpu_shares.filter(|shares| *shares > 0) {
        set("cpu.weight", weight(shares).to_string());
    }
    if let Some(max) = cpu_max(limits) {
        set("cpu.max", max);
    }
    if !limits.cpuset_cpus.is_empty() {
        set("cpuset.cpus", limits.cpuset_cpus.clone());
    }
    if !limits.cpuset_mems.is_empty() {
        set("cpuset.mems", limits.cpuset_mems.clone());
    }
    if let Some(max) = limits.memory_bytes.and_then(bound) {
        set("memory.max", max);
    }
    if let Some(max) = swap_max(limits) {
        set("memory.swap.max", max);
    }
    if let Some(max) = limits.pids.and_then(bound) {
        set("pids.max", max);
    }
    for (file, value) in &limits.unified {
        set(file, value.clone());
    }
    list
}

/// CRI: 0 says nothing, a negative number is no limit.
fn bound(value: i64) -> Option<String> {
    match value {
        0 => None,
        1.. => Some(value.to_string()),
        i64::MIN..=-1 => Some("max".to_owned()),
    }
}

fn cpu_max(limits: &Limits) -> Option<String> {
    let period = limits.cpu_period_us.filter(|period| *period > 0);
    let quota = limits.cpu_quota_us.and_then(bound);
    match (quota, period) {
        (None, None) => None,
        (quota, period) => Some(format!(
            "{} {}",
            quota.unwrap_or_else(|| "max".to_owned()),
            period.unwrap_or(DEFAULT_PERIOD_US)
        )),
    }
}

/// cgroup v1 counts memory and swap together, v2 counts swap alone.
fn swap_max(limits: &Limits) -> Option<String> {
    match (limits.memory_swap_bytes?, limits.memory_bytes) {
        (0, _) => None,
        (i64::MIN..=-1, _) => Some("max".to_owned()),
        (both, Some(memory)) if memory > 0 && both >= memory => Some((both - memory).to_string()),
        // Without a memory limit, or with one that is larger, the sum says nothing about swap.
        (_, _) => None,
    }
}

/// Shares 2..=262144 to weight 1..=10000: `10 ^ (l²/612 + 125·l/612 - 7/34)` with `l = log2(shares)`.
fn weight(shares: u64) -> u64 {
    let l = (shares.clamp(2, 262_144) as f64).log2();
    let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
    (10f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(limits: &Limits) -> Vec<String> {
        settings(limits).into_iter().map(|s| format!("{}={}", s.file, s.value)).collect()
    }

    #[test]
    fn no_limits_write_nothing() {
        let limits = Limits {
            cpu_shares: Some(0),
            cpu_quota_us: Some(0),
            cpu_period_us: Some(0),
            memory_bytes: Some(0),
            pids: Some(0),
            ..Limits::default()
        };
        assert!(lines(&limits).is_empty(), "{:?}", lines(&limits));
    }

    #[test]
    fn shares_meet_the_ends_and_the_default_of_weights() {
        assert_eq!(
            [weight(0), weight(2), weight(1024), weight(262_144), weight(u64::MAX)],
            [1, 1, 100, 10_000, 10_000]
        );
    }

    #[test]
    fn every_limit_lands_in_its_file() {
        let limits = Limits {
            cpu_shares: Some(1024),
            cpu_quota_us: Some(50_000),
            cpu_period_us: None,
            cpuset_cpus: "0-1".to_owned(),
            cpuset_mems: "0".to_owned(),
            memory_bytes: Some(100),
            memory_swap_bytes: Some(150),
            pids: Some(-1),
            unified: [("memory.high".to_owned(), "90".to_owned())].into(),
        };
        assert_eq!(
            lines(&limits),
            [
                "cpu.weight=100",
                "cpu.max=50000 100000",
                "cpuset.cpus=0-1",
                "cpuset.mems=0",
                "memory.max=100",
                "memory.swap.max=50",
                "pids.max=max",
                "memory.high=90"
            ]
        );
    }

    #[test]
    fn an_unlimited_quota_keeps_its_period() {
        let limits = Limits { cpu_quota_us: Some(-1), cpu_period_us: Some(10_000), ..Limits::default() };
        assert_eq!(lines(&limits), ["cpu.max=max 10000"]);
    }
}
