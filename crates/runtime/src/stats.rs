//! What sessions use, and what is remembered of it.
//!
//! Figures come from the guest and are believed no further than this: a session's own counters never go backwards,
//! whatever its guest says, and times are the host's. The last figures stay until the session is removed, so that they can
//! be told when its box no longer can.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use a3s_box_protocol::proto;

use crate::api::{CpuUsage, IoUsage, MemoryUsage, Pressure, Pressures, Stall, Usage, WritableLayerUsage};

/// A rate over less time than this says little.
const WINDOW: Duration = Duration::from_secs(1);

/// The last figures of each session, or of each box.
#[derive(Debug)]
pub(crate) struct Figures<Id>(Mutex<HashMap<Id, Kept<Id>>>);

impl<Id> Default for Figures<Id> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

#[derive(Debug)]
struct Kept<Id> {
    usage: Usage<Id>,
    /// Where the current window began: when, and the processor time used by then.
    window: (Instant, u64),
    /// Of the last window that is complete.
    nano_cores: Option<u64>,
}

impl<Id: Clone + Eq + Hash> Figures<Id> {
    fn kept(&self) -> MutexGuard<'_, HashMap<Id, Kept<Id>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up what a guest says, read at `now`; what is to be told of it.
    pub(crate) fn update(&self, mut usage: Usage<Id>, now: Instant) -> Usage<Id> {
        let mut kept = self.kept();
        let (window, nano_cores) = match kept.get(&usage.id) {
            Some(last) => {
                keep_counting(&mut usage, &last.usage);
                advance(last, usage.cpu.usage_ns, now)
            }
            None => ((now, usage.cpu.usage_ns), None),
        };
        usage.cpu.nano_cores = nano_cores;
        kept.insert(usage.id.clone(), Kept { usage: usage.clone(), window, nano_cores });
        usage
    }

    /// What was told last.
    pub(crate) fn last(&self, id: &Id) -> Option<Usage<Id>> {
        self.kept().get(id).map(|kept| kept.usage.clone())
    }

    /// Forgets what no longer exists.
    pub(crate) fn retain(&self, existing: &HashSet<Id>) {
        self.kept().retain(|id, _| existing.contains(id));
    }
}

fn advance<Id>(last: &Kept<Id>, usage_ns: u64, now: Instant) -> ((Instant, u64), Option<u64>) {
    let (began, used) = last.window;
    let span = now.saturating_duration_since(began);
    if span < WINDOW {
        return (last.window, last.nano_cores);
    }
    let rate = u128::from(usage_ns.saturating_sub(used)) * 1_000_000_000 / span.as_nanos();
    ((now, usage_ns), Some(u64::try_from(rate).unwrap_or(u64::MAX)))
}

/// Lifts every counter to where it was.
fn keep_counting<Id>(usage: &mut Usage<Id>, last: &Usage<Id>) {
    let lift = |value: &mut u64, last: u64| *value = (*value).max(last);
    lift(&mut usage.cpu.usage_ns, last.cpu.usage_ns);
    lift(&mut usage.cpu.user_ns, last.cpu.user_ns);
    lift(&mut usage.cpu.system_ns, last.cpu.system_ns);
    lift(&mut usage.cpu.periods, last.cpu.periods);
    lift(&mut usage.cpu.throttled_periods, last.cpu.throttled_periods);
    lift(&mut usage.cpu.throttled_ns, last.cpu.throttled_ns);
    lift(&mut usage.memory.page_faults, last.memory.page_faults);
    lift(&mut usage.memory.major_page_faults, last.memory.major_page_faults);
    lift(&mut usage.memory.peak_bytes, last.memory.peak_bytes);
    lift(&mut usage.memory.limit_hits, last.memory.limit_hits);
    lift(&mut usage.memory.oom_kills, last.memory.oom_kills);
    lift(&mut usage.io.read_bytes, last.io.read_bytes);
    lift(&mut usage.io.written_bytes, last.io.written_bytes);
    lift(&mut usage.io.reads, last.io.reads);
    lift(&mut usage.io.writes, last.io.writes);
    for (now, last) in [
        (&mut usage.pressure.cpu, &last.pressure.cpu),
        (&mut usage.pressure.memory, &last.pressure.memory),
        (&mut usage.pressure.io, &last.pressure.io),
    ] {
        if let (Some(now), Some(last)) = (now, last) {
            lift(&mut now.some.total_us, last.some.total_us);
            lift(&mut now.full.total_us, last.full.total_us);
        }
    }
}

/// A guest's words as ours, at the host's time. A file that the guest could not read is the last figure, or zero.
pub(crate) fn from_wire<Id>(
    id: Id,
    at_ns: i64,
    stats: &proto::SessionStats,
    last: Option<Usage<Id>>,
    writable_layer_on: std::path::PathBuf,
) -> Usage<Id> {
    let (cpu, memory, io, layer) = match last {
        Some(last) => (last.cpu, last.memory, last.io, last.writable_layer),
        None => Default::default(),
    };
    Usage {
        id,
        at_ns,
        cpu: stats.cpu.map_or(cpu, |cpu| CpuUsage {
            usage_ns: cpu.usage_ns,
            user_ns: cpu.user_ns,
            system_ns: cpu.system_ns,
            periods: cpu.periods,
            throttled_periods: cpu.throttled_periods,
            throttled_ns: cpu.throttled_ns,
            nano_cores: None,
        }),
        memory: stats.memory.map_or(memory, |memory| MemoryUsage {
            usage_bytes: memory.usage_bytes,
            working_set_bytes: memory.working_set_bytes,
            rss_bytes: memory.rss_bytes,
            available_bytes: memory.available_bytes,
            page_faults: memory.page_faults,
            major_page_faults: memory.major_page_faults,
            swap_bytes: memory.swap_bytes,
            swap_available_bytes: memory.swap_available_bytes,
            peak_bytes: memory.peak_bytes,
            file_bytes: memory.file_bytes,
            mapped_file_bytes: memory.mapped_file_bytes,
            active_file_bytes: memory.active_file_bytes,
            inactive_file_bytes: memory.inactive_file_bytes,
            kernel_bytes: memory.kernel_bytes,
            limit_hits: memory.limit_hits,
            oom_kills: memory.oom_kills,
        }),
        processes: stats.processes,
        threads: stats.pids,
        threads_max: stats.threads_max,
        file_descriptors: stats.file_descriptors,
        sockets: stats.sockets,
        io: stats.io.map_or(io, |io| IoUsage {
            read_bytes: io.read_bytes,
            written_bytes: io.written_bytes,
            reads: io.reads,
            writes: io.writes,
        }),
        pressure: Pressures {
            cpu: stats.cpu_pressure.map(pressure),
            memory: stats.memory_pressure.map(pressure),
            io: stats.io_pressure.map(pressure),
        },
        writable_layer: stats.writable_layer.map_or(layer, |layer| {
            Some(WritableLayerUsage {
                disk: writable_layer_on,
                used_bytes: layer.used_bytes,
                inodes: layer.inodes,
                limit_bytes: layer.limit_bytes,
                inodes_total: layer.inodes_total,
                inodes_free: layer.inodes_free,
            })
        }),
    }
}

fn pressure(stats: proto::PressureStats) -> Pressure {
    // More than all of the time cannot be.
    let share = |hundredths: u32| hundredths.min(10_000);
    let stall = |said: Option<proto::Pressure>| {
        let said = said.unwrap_or_default();
        Stall {
            total_us: said.total_us,
            avg10: share(said.avg10),
            avg60: share(said.avg60),
            avg300: share(said.avg300),
        }
    };
    Pressure { some: stall(stats.some), full: stall(stats.full) }
}

#[cfg(test)]
mod tests {
    use a3s_box_core::SessionId;

    use super::*;
    use crate::api::SessionUsage;

    fn id() -> SessionId {
        SessionId::from_random([3; 32])
    }

    fn usage(cpu_ns: u64) -> SessionUsage {
        let stats = proto::SessionStats {
            cpu: Some(proto::CpuStats { usage_ns: cpu_ns, ..Default::default() }),
            memory: Some(proto::MemoryStats {
                usage_bytes: cpu_ns,
                page_faults: cpu_ns,
                ..Default::default()
            }),
            io: Some(proto::IoStats { read_bytes: cpu_ns, ..Default::default() }),
            io_pressure: Some(proto::PressureStats {
                some: Some(proto::Pressure { total_us: cpu_ns, avg10: u32::MAX, avg60: 5, avg300: 0 }),
                full: None,
            }),
            ..Default::default()
        };
        from_wire(id(), 1, &stats, None, "/scratch.img".into())
    }

    #[test]
    fn counters_never_go_backwards_and_gauges_do() {
        let (figures, now) = (Figures::default(), Instant::now());
        figures.update(usage(100), now);
        let told = figures.update(usage(40), now);
        assert_eq!((told.cpu.usage_ns, told.memory.page_faults, told.io.read_bytes), (100, 100, 100));
        assert_eq!(told.memory.usage_bytes, 40);
        let waited = told.pressure.io.as_ref().unwrap().some;
        assert_eq!(waited, Stall { total_us: 100, avg10: 10_000, avg60: 5, avg300: 0 });
        assert_eq!(told.pressure.cpu, None);
        assert_eq!(figures.last(&id()), Some(told));
    }

    #[test]
    fn a_rate_needs_two_samples_with_time_between_them() {
        let (figures, start) = (Figures::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(figures.update(usage(0), at(0)).cpu.nano_cores, None);
        assert_eq!(figures.update(usage(1_000_000), at(10)).cpu.nano_cores, None);
        // Half a core over two seconds.
        assert_eq!(figures.update(usage(1_000_000_000), at(2_000)).cpu.nano_cores, Some(500_000_000));
        // A further look soon after tells the rate of the last window again.
        assert_eq!(figures.update(usage(1_000_000_001), at(2_001)).cpu.nano_cores, Some(500_000_000));
        assert_eq!(figures.update(usage(1_000_000_001), at(4_000)).cpu.nano_cores, Some(0));
    }

    #[test]
    fn absurd_figures_of_a_guest_overflow_nothing() {
        let (figures, start) = (Figures::default(), Instant::now());
        figures.update(usage(0), start);
        let told = figures.update(usage(u64::MAX), start + WINDOW);
        assert_eq!(told.cpu.nano_cores, Some(u64::MAX));
    }

    #[test]
    fn what_a_guest_does_not_say_stays_as_it_was() {
        let last = SessionUsage {
            writable_layer: Some(WritableLayerUsage {
                disk: "/scratch.img".into(),
                used_bytes: 5,
                inodes: 1,
                limit_bytes: 9,
                inodes_total: 8,
                inodes_free: 7,
            }),
            ..usage(7)
        };
        let said = proto::SessionStats::default();
        let now = from_wire(id(), 2, &said, Some(last.clone()), "/scratch.img".into());
        assert_eq!((now.at_ns, &now.cpu, &now.memory, &now.io), (2, &last.cpu, &last.memory, &last.io));
        assert_eq!(now.writable_layer, last.writable_layer);
        assert_eq!(from_wire(id(), 2, &said, None, "/scratch.img".into()).cpu.usage_ns, 0);
    }

    #[test]
    fn a_session_that_is_gone_is_forgotten() {
        let figures = Figures::default();
        figures.update(usage(1), Instant::now());
        figures.retain(&HashSet::from([id()]));
        assert!(figures.last(&id()).is_some());
        figures.retain(&HashSet::new());
        assert_eq!(figures.last(&id()), None);
    }
}
