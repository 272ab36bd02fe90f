//! Resources: the size of a box and the limits of a session.

use a3s_box_core::spec::{BoxSize, Limits};

use super::{InvalidRequest, sorted};
use crate::proto::LinuxContainerResources;

const MIB: i64 = 1024 * 1024;

/// The kernel's default period, which a quota without one refers to.
const DEFAULT_PERIOD_US: i64 = 100_000;
/// What the kernel takes as the shortest quota and period, and as the longest period.
const MIN_QUOTA_US: i64 = 1_000;
const MAX_PERIOD_US: i64 = 1_000_000;

/// How a box is sized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizePolicy {
    /// What a pod without limits gets.
    pub default: BoxSize,
    /// No box gets more virtual CPUs: more than the node has only cost time.
    pub max_vcpus: u8,
    /// No box gets less memory: a kernel and the agent must fit.
    pub min_memory_mib: u32,
    /// Added to the pod's limit for the guest's kernel and agent where the RuntimeClass states no
    /// overhead, so that the containers can use what they were promised.
    pub guest_memory_mib: u32,
}

impl Default for SizePolicy {
    fn default() -> Self {
        Self { default: BoxSize::default(), max_vcpus: u8::MAX, min_memory_mib: 192, guest_memory_mib: 96 }
    }
}

/// The box for the sum of a pod's limits and the overhead of its RuntimeClass. CPU and memory are
/// decided apart: a pod may limit one and not the other.
pub fn box_size(
    resources: Option<&LinuxContainerResources>,
    overhead: Option<&LinuxContainerResources>,
    policy: &SizePolicy,
) -> BoxSize {
    let vcpus = resources.and_then(millicpus).map(|pod| {
        let millis = pod + overhead.and_then(millicpus).unwrap_or(0);
        u8::try_from(millis.div_ceil(1000)).unwrap_or(u8::MAX)
    });
    let memory_mib = resources.and_then(memory).map(|pod| {
        let extra = overhead.and_then(memory).unwrap_or(i64::from(policy.guest_memory_mib) * MIB);
        let bytes = pod.saturating_add(extra).cast_unsigned();
        u32::try_from(bytes.div_ceil(MIB.cast_unsigned())).unwrap_or(u32::MAX)
    });
    BoxSize {
        vcpus: vcpus.unwrap_or(policy.default.vcpus).clamp(1, policy.max_vcpus.max(1)),
        memory_mib: memory_mib.unwrap_or(policy.default.memory_mib).max(policy.min_memory_mib),
        scratch_mib: policy.default.scratch_mib,
    }
}

fn millicpus(resources: &LinuxContainerResources) -> Option<u64> {
    let quota = u64::try_from(resources.cpu_quota).ok().filter(|quota| *quota > 0)?;
    let period = if resources.cpu_period > 0 { resources.cpu_period } else { DEFAULT_PERIOD_US };
    Some(quota.saturating_mul(1000).div_ceil(period.cast_unsigned()))
}

fn memory(resources: &LinuxContainerResources) -> Option<i64> {
    Some(resources.memory_limit_in_bytes).filter(|bytes| *bytes > 0)
}

/// The limits of one session. Zero and negative values mean "no limit", as in cgroup v1, except for a
/// swap limit of -1, which is stated.
pub fn limits(resources: &LinuxContainerResources, field: &str) -> Result<Limits, InvalidRequest> {
    check_ranges(resources, field)?;
    for (index, page) in resources.hugepage_limits.iter().enumerate() {
        // Kubelet lists every page size of the node with a limit of 0.
        if page.limit > 0 {
            let problem =
                format!("huge pages ({}) cannot be given to a box; remove the limit", page.page_size);
            return Err(InvalidRequest::new(format!("{field}.hugepage_limits[{index}]"), problem));
        }
    }
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    Ok(Limits {
        cpu_shares: positive(resources.cpu_shares),
        cpu_quota_us: Some(resources.cpu_quota).filter(|quota| *quota > 0),
        cpu_period_us: positive(resources.cpu_period),
        // CPU and node numbers are the host's; a box has its own few, so pinning to them means nothing.
        cpuset_cpus: String::new(),
        cpuset_mems: String::new(),
        memory_bytes: memory(resources),
        memory_swap_bytes: Some(resources.memory_swap_limit_in_bytes)
            .filter(|bytes| *bytes > 0 || *bytes == -1),
        pids: None,
        unified: sorted(resources.unified.clone()),
    })
}

/// A change of limits: zero says nothing, -1 takes a limit away.
pub fn changes(resources: &LinuxContainerResources, field: &str) -> Result<Limits, InvalidRequest> {
    let given = |value: i64| Some(value).filter(|value| *value != 0);
    Ok(Limits {
        cpu_quota_us: given(resources.cpu_quota),
        memory_bytes: given(resources.memory_limit_in_bytes),
        memory_swap_bytes: given(resources.memory_swap_limit_in_bytes),
        ..limits(resources, field)?
    })
}

/// Refuses what the kernel's scheduler takes for no quota, and numbers that mean nothing. -1 is how "no limit" is
/// written where 0 means the same.
fn check_ranges(resources: &LinuxContainerResources, field: &str) -> Result<(), InvalidRequest> {
    let refused = |name: &str, value: i64, expected: &str| {
        Err(InvalidRequest::new(format!("{field}.{name}"), format!("{value} is not {expected}")))
    };
    let (quota, period) = (resources.cpu_quota, resources.cpu_period);
    if quota < -1 || (1..MIN_QUOTA_US).contains(&quota) {
        return refused("cpu_quota", quota, "a quota: give at least 1000 µs, or 0 for none");
    }
    if period != 0 && !(MIN_QUOTA_US..=MAX_PERIOD_US).contains(&period) {
        return refused("cpu_period", period, "a period: give 1000 to 1000000 µs, or 0 for the default");
    }
    if resources.cpu_shares < 0 {
        return refused(
            "cpu_shares",
            resources.cpu_shares,
            "a weight: give 2 to 262144, or 0 for the default",
        );
    }
    for (name, bytes) in [
        ("memory_limit_in_bytes", resources.memory_limit_in_bytes),
        ("memory_swap_limit_in_bytes", resources.memory_swap_limit_in_bytes),
    ] {
        if bytes < -1 {
            return refused(name, bytes, "a number of bytes: give 0 for no limit");
        }
    }
    Ok(())
}

/// `oom_score_adj` of a session's processes; CRI has no way of not giving it.
pub fn oom_score_adj(resources: &LinuxContainerResources, field: &str) -> Result<i32, InvalidRequest> {
    i32::try_from(resources.oom_score_adj).ok().filter(|adj| (-1000..=1000).contains(adj)).ok_or_else(|| {
        let problem = format!("{} is not between -1000 and 1000", resources.oom_score_adj);
        InvalidRequest::new(format!("{field}.oom_score_adj"), problem)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::HugepageLimit;

    fn resources(quota: i64, period: i64, memory: i64) -> LinuxContainerResources {
        LinuxContainerResources {
            cpu_quota: quota,
            cpu_period: period,
            memory_limit_in_bytes: memory,
            ..Default::default()
        }
    }

    #[test]
    fn a_change_tells_no_limit_from_nothing() {
        let taken_away = changes(&resources(-1, 0, -1), "linux").unwrap();
        assert_eq!((taken_away.cpu_quota_us, taken_away.memory_bytes), (Some(-1), Some(-1)));
        assert_eq!(changes(&resources(0, 0, 0), "linux").unwrap(), Limits::default());
        assert_eq!(changes(&resources(5, 0, 0), "linux").unwrap_err().field, "linux.cpu_quota");
    }

    #[test]
    fn a_pod_without_limits_gets_the_default_size() {
        let policy = SizePolicy::default();
        assert_eq!(box_size(None, None, &policy), policy.default);
        assert_eq!(box_size(Some(&resources(-1, 100_000, 0)), None, &policy), policy.default);
    }

    #[test]
    fn limits_and_overhead_add_up_and_round_up() {
        let policy = SizePolicy::default();
        let pod = resources(250_000, 100_000, 512 * MIB + 1);
        let size = box_size(Some(&pod), Some(&resources(60_000, 100_000, 128 * MIB)), &policy);
        assert_eq!((size.vcpus, size.memory_mib), (4, 641));
    }

    #[test]
    fn without_overhead_the_guest_gets_memory_of_its_own() {
        let size = box_size(Some(&resources(0, 0, 512 * MIB)), None, &SizePolicy::default());
        assert_eq!((size.vcpus, size.memory_mib), (2, 608));
    }

    #[test]
    fn extreme_limits_are_brought_into_what_a_box_can_be() {
        let policy = SizePolicy { max_vcpus: 2, ..Default::default() };
        let size = box_size(Some(&resources(i64::MAX, 1, MIB)), None, &policy);
        assert_eq!((size.vcpus, size.memory_mib), (2, 192));
        let size = box_size(Some(&resources(1, i64::MAX, i64::MAX)), None, &policy);
        assert_eq!((size.vcpus, size.memory_mib), (1, u32::MAX));
    }

    #[test]
    fn no_limit_is_said_by_zero_and_by_minus_one() {
        let limits = limits(&resources(-1, 0, 0), "r").unwrap();
        assert_eq!(limits, Limits::default());
    }

    #[test]
    fn huge_pages_are_refused_only_if_some_are_asked_for() {
        let page = |limit| LinuxContainerResources {
            hugepage_limits: vec![HugepageLimit { page_size: "2MB".to_owned(), limit }],
            ..Default::default()
        };
        assert!(limits(&page(0), "r").is_ok());
        assert_eq!(limits(&page(1), "r").unwrap_err().field, "r.hugepage_limits[0]");
    }

    #[test]
    fn an_oom_score_outside_of_the_kernels_range_is_refused() {
        let with = |oom_score_adj| LinuxContainerResources { oom_score_adj, ..Default::default() };
        assert_eq!(oom_score_adj(&with(-997), "r"), Ok(-997));
        assert_eq!(oom_score_adj(&with(1001), "r").unwrap_err().field, "r.oom_score_adj");
    }

    #[test]
    fn limits_that_mean_nothing_are_refused_by_field() {
        let refused = |given: LinuxContainerResources| limits(&given, "r").unwrap_err().field;
        assert_eq!(refused(resources(-2, 0, 0)), "r.cpu_quota");
        assert_eq!(refused(resources(999, 100_000, 0)), "r.cpu_quota");
        assert_eq!(refused(resources(0, -1, 0)), "r.cpu_period");
        assert_eq!(refused(resources(0, 1_000_001, 0)), "r.cpu_period");
        assert_eq!(refused(resources(0, 0, i64::MIN)), "r.memory_limit_in_bytes");
        let swap = LinuxContainerResources { memory_swap_limit_in_bytes: -7, ..Default::default() };
        assert_eq!(refused(swap), "r.memory_swap_limit_in_bytes");
        let shares = LinuxContainerResources { cpu_shares: -1, ..Default::default() };
        assert_eq!(refused(shares), "r.cpu_shares");
        for fine in [resources(-1, 100_000, -1), resources(1_000, 1_000, 0), resources(0, 0, i64::MAX)] {
            assert!(limits(&fine, "r").is_ok(), "{fine:?}");
        }
    }
}
