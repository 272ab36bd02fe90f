//! What pods and containers use, as ListPodSandboxMetrics shows it: the names, labels and meanings of cAdvisor, which
//! kubelet passes on at /metrics/cadvisor (KEP-2371).
//!
//! A value is a whole number, so that seconds are whole ones too. What is not known has no metric.

use a3s_box_core::BoxId;
use a3s_box_core::lifecycle::SessionPhase;
use a3s_box_core::network::InterfaceUsage;
use a3s_box_core::spec::{Limits, PodIdentity};
use a3s_box_runtime::{
    BoxStatus, BoxUsage, CpuUsage, HostUsage, IoUsage, MemoryUsage, Pressure, Pressures, SessionStatus,
    SessionUsage, Usage, WritableLayerUsage,
};

use crate::proto::{ContainerMetrics, Metric, MetricDescriptor, MetricType, PodSandboxMetrics, UInt64Value};

/// The labels of every metric.
const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

/// What stands for the pod itself where a container's name would be.
const POD: &str = "POD";

const SECOND: u64 = 1_000_000_000;

/// What is known of a pod or a container.
struct Source<'a> {
    figures: Option<Figures<'a>>,
    network: &'a [InterfaceUsage],
    /// Of pods only.
    host: Option<HostUsage>,
    started_at_ns: Option<i64>,
    limits: Option<&'a Limits>,
}

/// Its figures, whosever they are.
struct Figures<'a> {
    at_ns: i64,
    cpu: &'a CpuUsage,
    memory: &'a MemoryUsage,
    io: &'a IoUsage,
    pressure: &'a Pressures,
    processes: u64,
    threads: u64,
    threads_max: u64,
    file_descriptors: u64,
    sockets: u64,
    layer: Option<&'a WritableLayerUsage>,
}

impl<'a> Figures<'a> {
    fn of<Id>(usage: &'a Usage<Id>) -> Self {
        Self {
            at_ns: usage.at_ns,
            cpu: &usage.cpu,
            memory: &usage.memory,
            io: &usage.io,
            pressure: &usage.pressure,
            processes: usage.processes,
            threads: usage.threads,
            threads_max: usage.threads_max,
            file_descriptors: usage.file_descriptors,
            sockets: usage.sockets,
            layer: usage.writable_layer.as_ref(),
        }
    }

    /// What is counted by process has to be summed over a pod's containers.
    fn of_pod(total: &'a Usage<BoxId>, sessions: &[SessionUsage]) -> Self {
        let sum = |of: fn(&SessionUsage) -> u64| sessions.iter().map(of).sum();
        Self {
            processes: sum(|session| session.processes),
            file_descriptors: sum(|session| session.file_descriptors),
            sockets: sum(|session| session.sockets),
            ..Self::of(total)
        }
    }
}

/// Values of labels beyond [`LABELS`], and what was counted for them.
type Value = (Vec<String>, u64);

/// Where the values of a metric come from.
#[derive(Clone, Copy)]
enum Origin {
    Cpu(fn(&CpuUsage) -> u64),
    Memory(fn(&MemoryUsage) -> u64),
    Io(fn(&IoUsage) -> u64),
    /// Whole seconds that somebody waited.
    Pressure(fn(&Pressures) -> Option<&Pressure>, fn(&Pressure) -> u64),
    Figures(fn(&Figures<'_>) -> u64),
    Limit(fn(&Limits) -> Option<u64>),
    /// One for each interface, with its name.
    Interface(fn(&InterfaceUsage) -> u64),
    All(fn(&Source<'_>) -> Vec<Value>),
}

impl Origin {
    fn values(self, source: &Source<'_>) -> Vec<Value> {
        let figures = source.figures.as_ref();
        let one = match self {
            Self::Cpu(of) => figures.map(|figures| of(figures.cpu)),
            Self::Memory(of) => figures.map(|figures| of(figures.memory)),
            Self::Io(of) => figures.map(|figures| of(figures.io)),
            Self::Pressure(of, part) => {
                figures.and_then(|figures| of(figures.pressure)).map(|pressure| part(pressure) / 1_000_000)
            }
            Self::Figures(of) => figures.map(of),
            Self::Limit(of) => source.limits.and_then(of),
            Self::Interface(of) => {
                let value = |interface: &InterfaceUsage| (vec![interface.name.clone()], of(interface));
                return source.network.iter().map(value).collect();
            }
            Self::All(of) => return of(source),
        };
        one.map(|value| (Vec::new(), value)).into_iter().collect()
    }
}

struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    labels: &'static [&'static str],
    from: Origin,
}

const fn counter(name: &'static str, help: &'static str, from: Origin) -> Family {
    Family { name, help, kind: MetricType::Counter, labels: &[], from }
}

const fn gauge(name: &'static str, help: &'static str, from: Origin) -> Family {
    Family { name, help, kind: MetricType::Gauge, labels: &[], from }
}

const fn traffic(name: &'static str, help: &'static str, of: fn(&InterfaceUsage) -> u64) -> Family {
    Family { labels: &["interface"], ..counter(name, help, Origin::Interface(of)) }
}

const FAMILIES: &[Family] = &[
    counter(
        "container_cpu_usage_seconds_total",
        "Processor time used.",
        Origin::Cpu(|cpu| cpu.usage_ns / SECOND),
    ),
    counter(
        "container_cpu_user_seconds_total",
        "Processor time used in programs.",
        Origin::Cpu(|cpu| cpu.user_ns / SECOND),
    ),
    counter(
        "container_cpu_system_seconds_total",
        "Processor time used in the kernel.",
        Origin::Cpu(|cpu| cpu.system_ns / SECOND),
    ),
    counter(
        "container_cpu_cfs_periods_total",
        "Periods of the CPU limit in which something ran.",
        Origin::Cpu(|cpu| cpu.periods),
    ),
    counter(
        "container_cpu_cfs_throttled_periods_total",
        "Periods in which the CPU limit was used up.",
        Origin::Cpu(|cpu| cpu.throttled_periods),
    ),
    counter(
        "container_cpu_cfs_throttled_seconds_total",
        "Time waited because of the CPU limit.",
        Origin::Cpu(|cpu| cpu.throttled_ns / SECOND),
    ),
    gauge(
        "container_memory_usage_bytes",
        "Memory in use, with pages of files.",
        Origin::Memory(|memory| memory.usage_bytes),
    ),
    gauge(
        "container_memory_working_set_bytes",
        "Memory in use without pages of files that were not used of late.",
        Origin::Memory(|memory| memory.working_set_bytes),
    ),
    gauge("container_memory_rss", "Anonymous memory in bytes.", Origin::Memory(|memory| memory.rss_bytes)),
    gauge("container_memory_cache", "Pages of files in bytes.", Origin::Memory(|memory| memory.file_bytes)),
    gauge(
        "container_memory_mapped_file",
        "Pages of files that are mapped, in bytes.",
        Origin::Memory(|memory| memory.mapped_file_bytes),
    ),
    gauge(
        "container_memory_total_active_file_bytes",
        "Pages of files that were used of late.",
        Origin::Memory(|memory| memory.active_file_bytes),
    ),
    gauge(
        "container_memory_total_inactive_file_bytes",
        "Pages of files that were not used of late.",
        Origin::Memory(|memory| memory.inactive_file_bytes),
    ),
    gauge(
        "container_memory_kernel_usage",
        "Memory of the kernel in bytes.",
        Origin::Memory(|memory| memory.kernel_bytes),
    ),
    gauge("container_memory_swap", "Swap in use in bytes.", Origin::Memory(|memory| memory.swap_bytes)),
    gauge(
        "container_memory_max_usage_bytes",
        "The most memory that was ever in use.",
        Origin::Memory(|memory| memory.peak_bytes),
    ),
    counter(
        "container_memory_failcnt",
        "How often the memory limit was met.",
        Origin::Memory(|memory| memory.limit_hits),
    ),
    Family {
        labels: &["failure_type", "scope"],
        ..counter("container_memory_failures_total", "Page faults.", Origin::All(faults))
    },
    counter(
        "container_oom_events_total",
        "How often a process was killed for want of memory.",
        Origin::Memory(|memory| memory.oom_kills),
    ),
    counter(
        "container_pressure_cpu_waiting_seconds_total",
        "Time in which somebody waited for a processor.",
        Origin::Pressure(|all| all.cpu.as_ref(), |pressure| pressure.some.total_us),
    ),
    counter(
        "container_pressure_cpu_stalled_seconds_total",
        "Time in which everybody waited for a processor.",
        Origin::Pressure(|all| all.cpu.as_ref(), |pressure| pressure.full.total_us),
    ),
    counter(
        "container_pressure_memory_waiting_seconds_total",
        "Time in which somebody waited for memory.",
        Origin::Pressure(|all| all.memory.as_ref(), |pressure| pressure.some.total_us),
    ),
    counter(
        "container_pressure_memory_stalled_seconds_total",
        "Time in which everybody waited for memory.",
        Origin::Pressure(|all| all.memory.as_ref(), |pressure| pressure.full.total_us),
    ),
    counter(
        "container_pressure_io_waiting_seconds_total",
        "Time in which somebody waited for a disk.",
        Origin::Pressure(|all| all.io.as_ref(), |pressure| pressure.some.total_us),
    ),
    counter(
        "container_pressure_io_stalled_seconds_total",
        "Time in which everybody waited for a disk.",
        Origin::Pressure(|all| all.io.as_ref(), |pressure| pressure.full.total_us),
    ),
    traffic("container_network_receive_bytes_total", "Bytes received.", |interface| interface.received.bytes),
    traffic("container_network_receive_packets_total", "Packets received.", |interface| {
        interface.received.packets
    }),
    traffic("container_network_receive_errors_total", "Broken packets received.", |interface| {
        interface.received.errors
    }),
    traffic(
        "container_network_receive_packets_dropped_total",
        "Packets dropped while receiving.",
        |interface| interface.received.dropped,
    ),
    traffic("container_network_transmit_bytes_total", "Bytes sent.", |interface| interface.sent.bytes),
    traffic("container_network_transmit_packets_total", "Packets sent.", |interface| interface.sent.packets),
    traffic("container_network_transmit_errors_total", "Packets that could not be sent.", |interface| {
        interface.sent.errors
    }),
    traffic(
        "container_network_transmit_packets_dropped_total",
        "Packets dropped while sending.",
        |interface| interface.sent.dropped,
    ),
    Family {
        labels: &["device"],
        ..gauge(
            "container_fs_usage_bytes",
            "Bytes of the writable layer.",
            Origin::All(|source| layer(source, |layer| layer.used_bytes)),
        )
    },
    Family {
        labels: &["device"],
        ..gauge(
            "container_fs_inodes_used",
            "Files of the writable layer.",
            Origin::All(|source| layer(source, |layer| layer.inodes)),
        )
    },
    counter("container_fs_reads_total", "Reads of block devices.", Origin::Io(|io| io.reads)),
    counter(
        "container_fs_reads_bytes_total",
        "Bytes read from block devices.",
        Origin::Io(|io| io.read_bytes),
    ),
    counter("container_fs_writes_total", "Writes of block devices.", Origin::Io(|io| io.writes)),
    counter(
        "container_fs_writes_bytes_total",
        "Bytes written to block devices.",
        Origin::Io(|io| io.written_bytes),
    ),
    gauge("container_processes", "Processes.", Origin::Figures(|figures| figures.processes)),
    gauge("container_threads", "Threads of all processes.", Origin::Figures(|figures| figures.threads)),
    gauge(
        "container_threads_max",
        "The limit of threads; 0 without one.",
        Origin::Figures(|figures| figures.threads_max),
    ),
    gauge("container_file_descriptors", "Open files.", Origin::Figures(|figures| figures.file_descriptors)),
    gauge("container_sockets", "Open sockets.", Origin::Figures(|figures| figures.sockets)),
    Family {
        labels: &["device"],
        ..gauge(
            "container_fs_limit_bytes",
            "Bytes of the disk with the writable layers of the pod.",
            Origin::All(|source| layer(source, |layer| layer.limit_bytes)),
        )
    },
    Family {
        labels: &["device"],
        ..gauge(
            "container_fs_inodes_total",
            "Inodes of that disk.",
            Origin::All(|source| layer(source, |layer| layer.inodes_total)),
        )
    },
    Family {
        labels: &["device"],
        ..gauge(
            "container_fs_inodes_free",
            "Free inodes of that disk.",
            Origin::All(|source| layer(source, |layer| layer.inodes_free)),
        )
    },
    Family {
        labels: &["device", "major", "minor", "operation"],
        ..counter(
            "container_blkio_device_usage_total",
            "Bytes read from and written to all block devices together.",
            Origin::All(blkio),
        )
    },
    gauge(
        "container_spec_cpu_shares",
        "The weight of its CPU use.",
        Origin::Limit(|limits| limits.cpu_shares),
    ),
    gauge(
        "container_spec_cpu_quota",
        "The CPU limit in microseconds of each period.",
        Origin::Limit(|limits| positive(limits.cpu_quota_us)),
    ),
    gauge(
        "container_spec_cpu_period",
        "The period of the CPU limit in microseconds.",
        Origin::Limit(|limits| limits.cpu_period_us),
    ),
    gauge(
        "container_spec_memory_limit_bytes",
        "The memory limit.",
        Origin::Limit(|limits| positive(limits.memory_bytes)),
    ),
    gauge(
        "container_spec_memory_swap_limit_bytes",
        "The limit of memory and swap together.",
        Origin::Limit(|limits| positive(limits.memory_swap_bytes)),
    ),
    gauge(
        "container_start_time_seconds",
        "When it was started: seconds since 1970.",
        Origin::All(|source| seconds(source.started_at_ns)),
    ),
    gauge(
        "container_last_seen",
        "When these figures were read: seconds since 1970.",
        Origin::All(|source| seconds(source.figures.as_ref().map(|figures| figures.at_ns))),
    ),
    counter(
        "a3s_box_vmm_cpu_usage_seconds_total",
        "Processor time of the host that the pod's virtual machine took, its containers' included.",
        Origin::All(|source| vmm(source, |host| host.cpu.as_secs())),
    ),
    gauge(
        "a3s_box_vmm_memory_bytes",
        "Memory of the host that the pod's virtual machine takes, its containers' included.",
        Origin::All(|source| vmm(source, |host| host.memory_bytes)),
    ),
];

fn vmm(source: &Source<'_>, of: fn(&HostUsage) -> u64) -> Vec<Value> {
    source.host.iter().map(|host| (Vec::new(), of(host))).collect()
}

fn faults(source: &Source<'_>) -> Vec<Value> {
    let Some(figures) = &source.figures else { return Vec::new() };
    let of = |kind: &str, count| (vec![kind.to_owned(), "container".to_owned()], count);
    vec![of("pgfault", figures.memory.page_faults), of("pgmajfault", figures.memory.major_page_faults)]
}

/// The devices are the guest's, whose names say nothing here.
fn blkio(source: &Source<'_>) -> Vec<Value> {
    let Some(figures) = &source.figures else { return Vec::new() };
    let of = |operation: &str, bytes| (["", "", "", operation].map(str::to_owned).into(), bytes);
    vec![of("Read", figures.io.read_bytes), of("Write", figures.io.written_bytes)]
}

/// The host's file below a writable layer is its device.
fn layer(source: &Source<'_>, of: fn(&WritableLayerUsage) -> u64) -> Vec<Value> {
    let layer = source.figures.as_ref().and_then(|figures| figures.layer);
    layer.map(|layer| (vec![layer.disk.display().to_string()], of(layer))).into_iter().collect()
}

fn seconds(at_ns: Option<i64>) -> Vec<Value> {
    let seconds = at_ns.and_then(|at| u64::try_from(at).ok()).map(|at| at / SECOND);
    seconds.map(|seconds| (Vec::new(), seconds)).into_iter().collect()
}

/// Zero and less mean that there is no limit.
fn positive(limit: Option<i64>) -> Option<u64> {
    limit.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0)
}

/// All metrics that there can be.
pub fn descriptors() -> Vec<MetricDescriptor> {
    let descriptor = |family: &Family| MetricDescriptor {
        name: family.name.to_owned(),
        help: family.help.to_owned(),
        label_keys: LABELS.iter().chain(family.labels).map(|label| (*label).to_owned()).collect(),
    };
    FAMILIES.iter().map(descriptor).collect()
}

/// The metrics of a pod, and of those of its containers of which something is known.
pub fn of_pod(state: &BoxStatus, states: &[SessionStatus], usage: &BoxUsage) -> PodSandboxMetrics {
    let identity = &state.spec.identity;
    let pod = Source {
        figures: usage.total.as_ref().map(|total| Figures::of_pod(total, &usage.sessions)),
        network: &usage.network,
        host: usage.host,
        started_at_ns: Some(state.created_at_ns),
        limits: None,
    };
    let container_metrics = states.iter().filter_map(|state| {
        let usage = usage.sessions.iter().find(|usage| usage.id == state.id)?;
        let container = Source {
            figures: Some(Figures::of(usage)),
            // Its pod's.
            network: &[],
            host: None,
            started_at_ns: started_at(&state.phase),
            limits: Some(&state.spec.limits),
        };
        let labels = labels(&state.spec.name, state.id.as_str(), &state.spec.image_ref, identity);
        Some(ContainerMetrics {
            container_id: state.id.to_string(),
            metrics: metrics(&container, &labels, usage.at_ns),
        })
    });
    PodSandboxMetrics {
        pod_sandbox_id: state.id.to_string(),
        metrics: metrics(&pod, &labels(POD, state.id.as_str(), "", identity), usage.at_ns),
        container_metrics: container_metrics.collect(),
    }
}

fn started_at(phase: &SessionPhase) -> Option<i64> {
    match phase {
        SessionPhase::Running { started_at_ns } => Some(*started_at_ns),
        _ => None,
    }
}

/// In the order of [`LABELS`].
fn labels(container: &str, id: &str, image: &str, pod: &PodIdentity) -> [String; 6] {
    [container, id, image, id, &pod.namespace, &pod.name].map(str::to_owned)
}

fn metrics(source: &Source<'_>, labels: &[String; 6], timestamp: i64) -> Vec<Metric> {
    let of_family = |family: &Family| {
        let kind = family.kind;
        let metric = move |(further, value): Value| Metric {
            name: family.name.to_owned(),
            timestamp,
            metric_type: kind.into(),
            label_values: labels.iter().cloned().chain(further).collect(),
            value: Some(UInt64Value { value }),
        };
        family.from.values(source).into_iter().map(metric).collect::<Vec<_>>()
    };
    FAMILIES.iter().flat_map(of_family).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};
    use std::time::Duration;

    use a3s_box_core::lifecycle::BoxPhase;
    use a3s_box_core::network::Traffic;
    use a3s_box_core::spec::{BoxSpec, SessionSpec};
    use a3s_box_runtime::Stall;

    use super::super::status::tests::{a_box, a_session};
    use super::*;

    fn figures<Id>(id: Id) -> Usage<Id> {
        Usage {
            id,
            at_ns: 90_000_000_000,
            cpu: CpuUsage { usage_ns: 3_999_999_999, throttled_periods: 4, ..CpuUsage::default() },
            memory: MemoryUsage {
                rss_bytes: 80,
                major_page_faults: 5,
                oom_kills: 1,
                ..MemoryUsage::default()
            },
            processes: 2,
            threads: 7,
            threads_max: 0,
            file_descriptors: 13,
            sockets: 2,
            io: IoUsage { reads: 6, ..IoUsage::default() },
            pressure: Pressures {
                cpu: Some(Pressure {
                    some: Stall { total_us: 2_500_000, ..Stall::default() },
                    full: Stall::default(),
                }),
                ..Pressures::default()
            },
            writable_layer: None,
        }
    }

    fn told() -> PodSandboxMetrics {
        let identity =
            PodIdentity { name: "p".to_owned(), namespace: "ns".to_owned(), ..PodIdentity::default() };
        let state = BoxStatus {
            spec: BoxSpec { identity, ..BoxSpec::default() },
            created_at_ns: 1_000_000_000,
            ..a_box(BoxPhase::Ready)
        };
        let limits = Limits { memory_bytes: Some(4096), cpu_quota_us: Some(-1), ..Limits::default() };
        let spec = SessionSpec {
            name: "app".to_owned(),
            image_ref: "img:1".to_owned(),
            limits,
            ..SessionSpec::default()
        };
        let session =
            SessionStatus { spec, ..a_session(SessionPhase::Running { started_at_ns: 5_000_000_000 }) };
        let (box_id, id) = (state.id.clone(), session.id.clone());
        let layer = WritableLayerUsage {
            disk: "/scratch.img".into(),
            used_bytes: 20,
            inodes: 3,
            limit_bytes: 100,
            inodes_total: 50,
            inodes_free: 40,
        };
        let usage = BoxUsage {
            id: box_id.clone(),
            at_ns: 90_000_000_000,
            total: Some(figures(box_id)),
            network: vec![InterfaceUsage {
                name: "eth0".to_owned(),
                received: Traffic { bytes: 11, ..Traffic::default() },
                sent: Traffic { dropped: 12, ..Traffic::default() },
            }],
            host: Some(HostUsage { cpu: Duration::from_millis(9900), memory_bytes: 77 }),
            sessions: vec![Usage { writable_layer: Some(layer), ..figures(id) }],
        };
        of_pod(&state, &[session], &usage)
    }

    /// By name, with the values of the labels beyond those that all have.
    fn values(metrics: &[Metric]) -> HashMap<(&str, Vec<&str>), u64> {
        let mut values = HashMap::new();
        for metric in metrics {
            let further = metric.label_values[LABELS.len()..].iter().map(String::as_str).collect();
            values.insert((metric.name.as_str(), further), metric.value.unwrap().value);
        }
        values
    }

    #[test]
    fn every_metric_is_described_and_has_a_value_for_every_label() {
        let described: HashMap<String, usize> = descriptors()
            .into_iter()
            .map(|descriptor| (descriptor.name, descriptor.label_keys.len()))
            .collect();
        assert_eq!(described.len(), FAMILIES.len(), "no name twice");
        let told = told();
        for metric in told.metrics.iter().chain(&told.container_metrics[0].metrics) {
            assert_eq!(described[&metric.name], metric.label_values.len(), "{metric:?}");
        }
    }

    #[test]
    fn figures_are_told_of_containers_and_pods_and_traffic_of_pods_only() {
        let told = told();
        let container = &told.container_metrics[0].metrics;
        assert_eq!(
            container[0].label_values[..],
            [
                "app",
                &told.container_metrics[0].container_id,
                "img:1",
                &told.container_metrics[0].container_id,
                "ns",
                "p"
            ]
        );
        let of_container = values(container);
        let one = |name| of_container.get(&(name, Vec::new())).copied();
        assert_eq!(one("container_cpu_usage_seconds_total"), Some(3));
        assert_eq!(one("container_cpu_cfs_throttled_periods_total"), Some(4));
        assert_eq!(one("container_memory_rss"), Some(80));
        assert_eq!(one("container_oom_events_total"), Some(1));
        assert_eq!(one("container_pressure_cpu_waiting_seconds_total"), Some(2));
        assert_eq!(one("container_pressure_io_waiting_seconds_total"), None, "it is not measured");
        assert_eq!((one("container_processes"), one("container_threads")), (Some(2), Some(7)));
        assert_eq!(one("container_spec_memory_limit_bytes"), Some(4096));
        assert_eq!(one("container_spec_cpu_quota"), None, "there is no limit");
        assert_eq!((one("container_start_time_seconds"), one("container_last_seen")), (Some(5), Some(90)));
        assert_eq!(of_container[&("container_memory_failures_total", vec!["pgmajfault", "container"])], 5);
        assert_eq!(of_container[&("container_fs_usage_bytes", vec!["/scratch.img"])], 20);
        assert_eq!(of_container[&("container_fs_inodes_free", vec!["/scratch.img"])], 40);
        assert_eq!((one("container_file_descriptors"), one("container_sockets")), (Some(13), Some(2)));
        assert_eq!(one("container_threads_max"), Some(0), "there is no limit");
        let names: BTreeSet<&str> = container.iter().map(|metric| metric.name.as_str()).collect();
        let of_pods = ["container_network", "a3s_box_vmm"];
        assert!(!names.iter().any(|name| of_pods.iter().any(|prefix| name.starts_with(prefix))));

        assert_eq!(told.metrics[0].label_values[0], "POD");
        let of_pod = values(&told.metrics);
        assert_eq!(of_pod[&("container_network_receive_bytes_total", vec!["eth0"])], 11);
        assert_eq!(of_pod[&("container_network_transmit_packets_dropped_total", vec!["eth0"])], 12);
        assert_eq!(of_pod[&("container_cpu_usage_seconds_total", vec![])], 3);
        assert_eq!(of_pod[&("container_start_time_seconds", vec![])], 1);
        assert_eq!(of_pod[&("a3s_box_vmm_cpu_usage_seconds_total", vec![])], 9);
        assert_eq!(of_pod[&("a3s_box_vmm_memory_bytes", vec![])], 77);
    }
}
