//! Sizes of boxes on the command line.

use a3s_box_core::spec::{Limits, RlimitSpec};
use a3s_box_host::config::parse_size;

const LEAST_MIB: u64 = 128;
const MOST_MIB: u64 = 1 << 20;

/// `64M`, `4096`: bytes, at least one.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    match parse_size(text) {
        Some(size) if size > 0 => Ok(size),
        Some(_) | None => Err(format!("{text:?} is not a size such as 64M")),
    }
}

/// `512M`, `2G`: whole MiB, at least what a guest needs to boot.
pub(crate) fn parse_memory_mib(text: &str) -> Result<u32, String> {
    // Docker's users write a bare number of bytes; nobody means 512 of them.
    let bytes = parse_size(text).ok_or_else(|| format!("{text:?} is not a size such as 512M or 2G"))?;
    let mib = bytes.div_ceil(1 << 20);
    match u32::try_from(mib) {
        Ok(fitting) if (LEAST_MIB..=MOST_MIB).contains(&mib) => Ok(fitting),
        Ok(_) | Err(_) => Err(format!("{text:?} is out of range: a box has between {LEAST_MIB}M and 1T")),
    }
}

/// The names that `--ulimit` has for the limits of setrlimit(2), without `RLIMIT_`.
const LIMITS: [&str; 15] = [
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// `nofile=1024`, `nofile=1024:2048`, `core=-1`: a number, of bytes where the limit counts bytes; -1 is no limit.
pub(crate) fn parse_ulimit(text: &str) -> Result<RlimitSpec, String> {
    let wrong = || format!("{text:?} is not NAME=SOFT[:HARD] with one of {}", LIMITS.join(", "));
    let (name, values) = text.split_once('=').ok_or_else(wrong)?;
    if !LIMITS.contains(&name) {
        return Err(wrong());
    }
    let value = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        number => number.parse().map_err(|_| wrong()),
    };
    let (soft, hard) = match values.split_once(':') {
        None => (value(values)?, value(values)?),
        Some((soft, hard)) => (value(soft)?, value(hard)?),
    };
    if soft > hard {
        return Err(format!("{text:?}: the soft limit is above the hard one"));
    }
    Ok(RlimitSpec { name: format!("RLIMIT_{}", name.to_uppercase()), soft, hard })
}

/// 1 to 64; fractions belong to limits inside a box, a virtual machine has whole CPUs.
pub(crate) fn parse_vcpus(text: &str) -> Result<u8, String> {
    match text.parse() {
        Ok(count) if (1..=64).contains(&count) => Ok(count),
        Ok(_) | Err(_) => Err(format!("{text:?} is not a whole number from 1 to 64")),
    }
}

/// Processors as docker counts them: hundredths, of which a box of whole processors may use so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cpus {
    hundredths: u32,
}

impl Cpus {
    /// `0.5`, `2`: at least a hundredth.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a number of processors from 0.01 to 64, such as 1.5");
        let number: f64 = text.parse().map_err(|_| wrong())?;
        if !(0.01..=64.0).contains(&number) {
            return Err(wrong());
        }
        Ok(Self { hundredths: (number * 100.0).round() as u32 })
    }

    /// What a box needs for it.
    pub(crate) fn whole(self) -> u8 {
        u8::try_from(self.hundredths.div_ceil(100)).unwrap_or(u8::MAX)
    }

    /// The bound within that box.
    pub(crate) fn limits(self) -> Limits {
        Limits {
            cpu_period_us: Some(PERIOD_US),
            cpu_quota_us: Some(i64::from(self.hundredths) * PERIOD_US as i64 / 100),
            ..Limits::default()
        }
    }
}

/// cgroups' own default.
pub(crate) const PERIOD_US: u64 = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_processors_are_a_bound_in_a_box_of_whole_ones() {
        let seen = |text: &str| {
            let cpus = Cpus::parse(text).unwrap();
            (cpus.whole(), cpus.limits().cpu_quota_us)
        };
        assert_eq!(seen("0.5"), (1, Some(50_000)));
        assert_eq!(seen("1.25"), (2, Some(125_000)));
        assert_eq!(seen("2"), (2, Some(200_000)));
        for bad in ["0", "0.001", "-1", "65", "NaN", "all", ""] {
            assert!(Cpus::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn limits_of_a_process_have_dockers_names() {
        let limit = |name: &str, soft, hard| Ok(RlimitSpec { name: name.to_owned(), soft, hard });
        assert_eq!(parse_ulimit("nofile=100"), limit("RLIMIT_NOFILE", 100, 100));
        assert_eq!(parse_ulimit("core=0:-1"), limit("RLIMIT_CORE", 0, u64::MAX));
        assert_eq!(parse_ulimit("memlock=unlimited"), limit("RLIMIT_MEMLOCK", u64::MAX, u64::MAX));
        for bad in ["nofile", "nofile=", "nofile=a", "nofile=2:1", "as=1", "nofile=-1:5", "=1"] {
            assert!(parse_ulimit(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_is_whole_mebibytes_within_bounds() {
        assert_eq!(parse_memory_mib("512M"), Ok(512));
        assert_eq!(parse_memory_mib("2G"), Ok(2048));
        assert_eq!(parse_memory_mib("536870913"), Ok(513));
        for bad in ["512", "64M", "2T", "much", "-1G"] {
            assert!(parse_memory_mib(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_box_has_at_least_one_cpu() {
        assert_eq!(parse_vcpus("4"), Ok(4));
        for bad in ["0", "65", "1.5", ""] {
            assert!(parse_vcpus(bad).is_err(), "{bad}");
        }
    }
}
