//! The counters of a cgroup (v2), as its files have them.
//!
//! Formats: the kernel's Documentation/admin-guide/cgroup-v2.rst. A key that is missing counts zero: which there are
//! depends on the kernel's configuration and on the controllers in use.

use std::io;
use std::os::fd::BorrowedFd;

use a3s_box_protocol::proto::{CpuStats, IoStats, MemoryStats, Pressure, PressureStats};
use rustix::fs::{Mode, OFlags};

/// No file of a cgroup that is read here gets near to this.
const MAX_FILE: usize = 64 * 1024;

/// A file of a cgroup, as text of bounded length.
pub fn read(cgroup: BorrowedFd<'_>, file: &str) -> io::Result<String> {
    let file = rustix::fs::openat(cgroup, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut text = String::new();
    let limit = u64::try_from(MAX_FILE).unwrap_or(u64::MAX);
    io::Read::read_to_string(&mut io::Read::take(std::fs::File::from(file), limit), &mut text)?;
    Ok(text)
}

/// A file that is one number. `max`, the word for no limit, is none.
pub fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The value in a line `key value`.
fn value(text: &str, key: &str) -> u64 {
    let of_line = |line: &str| line.strip_prefix(key)?.strip_prefix(' ').and_then(number);
    text.lines().find_map(of_line).unwrap_or(0)
}

/// Of `cpu.stat`, which counts microseconds.
pub fn cpu(text: &str) -> CpuStats {
    let ns = |key| value(text, key).saturating_mul(1_000);
    CpuStats {
        usage_ns: ns("usage_usec"),
        user_ns: ns("user_usec"),
        system_ns: ns("system_usec"),
        periods: value(text, "nr_periods"),
        throttled_periods: value(text, "nr_throttled"),
        throttled_ns: ns("throttled_usec"),
    }
}

/// Of the files `memory.*`; none if the cgroup does not count memory.
pub fn memory(read: impl Fn(&str) -> Option<String>) -> Option<MemoryStats> {
    let one = |file: &str| number(&read(file)?);
    let usage_bytes = one("memory.current")?;
    let stat = read("memory.stat").unwrap_or_default();
    let working_set_bytes = usage_bytes.saturating_sub(value(&stat, "inactive_file"));
    let swap = one("memory.swap.current");
    let swap_limit = one("memory.swap.max");
    let events = read("memory.events").unwrap_or_default();
    Some(MemoryStats {
        usage_bytes,
        working_set_bytes,
        rss_bytes: value(&stat, "anon"),
        available_bytes: one("memory.max").map(|limit| limit.saturating_sub(working_set_bytes)),
        page_faults: value(&stat, "pgfault"),
        major_page_faults: value(&stat, "pgmajfault"),
        swap_bytes: swap.unwrap_or(0),
        swap_available_bytes: swap_limit.zip(swap).map(|(limit, used)| limit.saturating_sub(used)),
        peak_bytes: one("memory.peak").unwrap_or(usage_bytes),
        file_bytes: value(&stat, "file"),
        mapped_file_bytes: value(&stat, "file_mapped"),
        active_file_bytes: value(&stat, "active_file"),
        inactive_file_bytes: value(&stat, "inactive_file"),
        kernel_bytes: value(&stat, "kernel"),
        limit_hits: value(&events, "max"),
        oom_kills: value(&events, "oom_kill"),
    })
}

/// Of `io.stat`: a line of `key=value` for each device.
pub fn io(text: &str) -> IoStats {
    let sum = |key: &str| {
        let fields = text.split_whitespace().filter_map(|f| f.strip_prefix(key)?.strip_prefix('='));
        fields.filter_map(number).fold(0, u64::saturating_add)
    };
    IoStats {
        read_bytes: sum("rbytes"),
        written_bytes: sum("wbytes"),
        reads: sum("rios"),
        writes: sum("wios"),
    }
}

/// Of `*.pressure`: a line `some` and a line `full` with averages in percent and a total in microseconds.
pub fn pressure(text: &str) -> PressureStats {
    let of = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
        let field =
            |key: &str| line.split_whitespace().find_map(|field| field.strip_prefix(key)?.strip_prefix('='));
        let average = |key| field(key).map_or(0, hundredths);
        Some(Pressure {
            total_us: field("total").and_then(number).unwrap_or(0),
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
        })
    };
    PressureStats { some: of("some"), full: of("full") }
}

/// A number with two decimals; the kernel always writes both.
fn hundredths(text: &str) -> u32 {
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "00"));
    number(whole).saturating_mul(100).saturating_add(number(decimals).min(99))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;

    fn files(entries: &'static [(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        |file| entries.iter().find(|(name, _)| *name == file).map(|(_, text)| (*text).to_owned())
    }

    #[test]
    fn processor_time_is_given_in_nanoseconds() {
        let text = "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnice_usec 0\nnr_periods 7\nnr_throttled 2\nthrottled_usec 30\n";
        let expected = CpuStats {
            usage_ns: 1_500_000,
            user_ns: 1_000_000,
            system_ns: 500_000,
            periods: 7,
            throttled_periods: 2,
            throttled_ns: 30_000,
        };
        assert_eq!(cpu(text), expected);
    }

    #[test]
    fn the_working_set_is_usage_without_inactive_file_pages() {
        let stats = memory(files(&[
            ("memory.current", "1000\n"),
            ("memory.max", "5000\n"),
            (
                "memory.stat",
                "anon 300\nanon_thp 7\nfile 450\nkernel 20\nfile_mapped 5\ninactive_file 400\nactive_file 50\npgfault 12\npgmajfault 3\n",
            ),
            ("memory.peak", "1100\n"),
            ("memory.events", "low 0\nhigh 0\nmax 4\noom 2\noom_kill 1\noom_group_kill 0\n"),
            ("memory.swap.current", "50\n"),
            ("memory.swap.max", "80\n"),
        ]));
        let expected = MemoryStats {
            usage_bytes: 1000,
            working_set_bytes: 600,
            rss_bytes: 300,
            available_bytes: Some(4400),
            page_faults: 12,
            major_page_faults: 3,
            swap_bytes: 50,
            swap_available_bytes: Some(30),
            peak_bytes: 1100,
            file_bytes: 450,
            mapped_file_bytes: 5,
            active_file_bytes: 50,
            inactive_file_bytes: 400,
            kernel_bytes: 20,
            limit_hits: 4,
            oom_kills: 1,
        };
        assert_eq!(stats, Some(expected));
    }

    #[test]
    fn figures_read_at_different_moments_never_get_below_zero() {
        let stats = memory(files(&[
            ("memory.current", "100\n"),
            ("memory.max", "50\n"),
            ("memory.stat", "inactive_file 10\n"),
        ]));
        assert_eq!(stats.unwrap().available_bytes, Some(0));
        let stats = memory(files(&[("memory.current", "100\n"), ("memory.stat", "inactive_file 101\n")]));
        assert_eq!(stats.unwrap().working_set_bytes, 0);
    }

    #[test]
    fn without_a_limit_nothing_is_said_to_be_available() {
        let stats = memory(files(&[("memory.current", "1\n"), ("memory.max", "max\n")])).unwrap();
        assert_eq!((stats.available_bytes, stats.swap_available_bytes), (None, None));
        assert_eq!(memory(files(&[("memory.max", "max\n")])), None);
    }

    #[test]
    fn traffic_is_summed_over_devices() {
        let text = "254:0 rbytes=4096 wbytes=10 rios=1 wios=2 dbytes=0 dios=0\n254:16 rbytes=1 wbytes=2 rios=3 wios=4\n8:0\n";
        assert_eq!(io(text), IoStats { read_bytes: 4097, written_bytes: 12, reads: 4, writes: 6 });
    }

    #[test]
    fn pressure_is_given_in_hundredths_of_a_percent_and_microseconds() {
        let text = "some avg10=1.05 avg60=20.50 avg300=100.00 total=123\nfull avg10=0.00 avg60=0.07 avg300=0.00 total=4\n";
        let some = Pressure { total_us: 123, avg10: 105, avg60: 2050, avg300: 10_000 };
        let full = Pressure { total_us: 4, avg10: 0, avg60: 7, avg300: 0 };
        assert_eq!(pressure(text), PressureStats { some: Some(some), full: Some(full) });
        assert_eq!(pressure(""), PressureStats { some: None, full: None });
    }

    #[test]
    fn a_file_is_read_up_to_a_bound() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("memory.stat"), "x".repeat(MAX_FILE + 1)).unwrap();
        let opened = std::fs::File::open(directory.path()).unwrap();
        assert_eq!(read(opened.as_fd(), "memory.stat").unwrap().len(), MAX_FILE);
        assert!(read(opened.as_fd(), "cpu.stat").is_err());
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in "(usage_usec|anon|inactive_file|rbytes=|max|\\PC| |\n|[0-9]{1,22}){0,40}") {
            cpu(&text);
            io(&text);
            pressure(&text);
            memory(|_| Some(text.clone()));
        }
    }
}
