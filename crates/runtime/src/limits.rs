//! From CRI's limits, which speak cgroup v1, to the files of cgroup v2 in the guest.
//!
//! References: kernel `Documentation/admin-guide/cgroup-v2.rst`; the conversion of shares follows the
//! curve that runc and crun agreed on in 2025, on which 1024 shares are the default weight 100.

use a3s_box_core::spec::{BoxSize, Limits};
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

/// What a box is too small for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum BeyondBox {
    #[error(
        "a limit of {wanted} bytes is more than the {mib} MiB of its pod sandbox, which cannot grow; make a new pod"
    )]
    Memory { wanted: i64, mib: u32 },
    #[error(
        "a limit of {quota} of every {period} µs is more than the {vcpus} CPUs of its pod sandbox, which cannot grow; make a new pod"
    )]
    Cpu { quota: i64, period: u64, vcpus: u8 },
}

/// Refuses limits that a box of this size cannot keep.
pub(crate) fn fit(limits: &Limits, size: &BoxSize) -> Result<(), BeyondBox> {
    if let Some(wanted) = limits.memory_bytes
        && wanted > i64::from(size.memory_mib) << 20
    {
        return Err(BeyondBox::Memory { wanted, mib: size.memory_mib });
    }
    let period = limits.cpu_period_us.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD_US);
    match limits.cpu_quota_us.and_then(|quota| u64::try_from(quota).ok().zip(Some(quota))) {
        Some((wanted, quota)) if wanted > period.saturating_mul(size.vcpus.into()) => {
            Err(BeyondBox::Cpu { quota, period, vcpus: size.vcpus })
        }
        Some(_) | None => Ok(()),
    }
}

/// Limits after a change: what it does not give stays. Negative figures take a limit away.
pub(crate) fn changed(limits: &Limits, given: Limits) -> Limits {
    let mut unified = limits.unified.clone();
    unified.extend(given.unified);
    let text = |given: String, kept: &String| if given.is_empty() { kept.clone() } else { given };
    Limits {
        cpu_shares: given.cpu_shares.or(limits.cpu_shares),
        cpu_quota_us: given.cpu_quota_us.or(limits.cpu_quota_us),
        cpu_period_us: given.cpu_period_us.or(limits.cpu_period_us),
        cpuset_cpus: text(given.cpuset_cpus, &limits.cpuset_cpus),
        cpuset_mems: text(given.cpuset_mems, &limits.cpuset_mems),
        memory_bytes: given.memory_bytes.or(limits.memory_bytes),
        memory_swap_bytes: given.memory_swap_bytes.or(limits.memory_swap_bytes),
        pids: given.pids.or(limits.pids),
        unified,
    }
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
    fn a_change_keeps_what_it_does_not_give() {
        let limits = Limits {
            cpu_shares: Some(512),
            cpu_quota_us: Some(50_000),
            cpu_period_us: Some(50_000),
            memory_bytes: Some(1 << 20),
            unified: [("memory.high".to_owned(), "5".to_owned())].into(),
            ..Limits::default()
        };
        let given = Limits {
            cpu_quota_us: Some(-1),
            memory_bytes: Some(2 << 20),
            unified: [("pids.max".to_owned(), "9".to_owned())].into(),
            ..Limits::default()
        };
        let after = changed(&limits, given);
        assert_eq!(
            lines(&after),
            ["cpu.weight=59", "cpu.max=max 50000", "memory.max=2097152", "memory.high=5", "pids.max=9"]
        );
        assert_eq!(changed(&limits, Limits::default()), limits);
    }

    #[test]
    fn a_box_gives_no_more_than_it_has() {
        let size = BoxSize { vcpus: 2, memory_mib: 256, ..BoxSize::default() };
        let memory = |bytes| Limits { memory_bytes: Some(bytes), ..Limits::default() };
        let cpu =
            |quota, period| Limits { cpu_quota_us: Some(quota), cpu_period_us: period, ..Limits::default() };
        for fits in
            [memory(256 << 20), memory(-1), cpu(200_000, None), cpu(-1, Some(1000)), Limits::default()]
        {
            assert_eq!(fit(&fits, &size), Ok(()), "{fits:?}");
        }
        assert_eq!(
            fit(&memory((256 << 20) + 1), &size),
            Err(BeyondBox::Memory { wanted: (256 << 20) + 1, mib: 256 })
        );
        assert_eq!(
            fit(&cpu(2001, Some(1000)), &size),
            Err(BeyondBox::Cpu { quota: 2001, period: 1000, vcpus: 2 })
        );
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
