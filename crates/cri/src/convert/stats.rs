//! What sessions use, as CRI's statistics show it.

use std::collections::HashMap;

use a3s_box_core::network::InterfaceUsage;
use a3s_box_runtime::{
    BoxStatus, BoxUsage, Pressure, SessionStatus, SessionUsage, Stall, Usage, WritableLayerUsage,
};

use super::status::{container_metadata, metadata};
use super::unsorted;
use crate::proto;

/// A session's figures as ContainerStats shows them. Figures that kubelet would take for a limit are absent where there
/// is none.
pub fn container_stats(state: &SessionStatus, usage: &SessionUsage) -> proto::ContainerStats {
    let (timestamp, memory) = (usage.at_ns, &usage.memory);
    proto::ContainerStats {
        attributes: Some(proto::ContainerAttributes {
            id: state.id.to_string(),
            metadata: Some(container_metadata(state)),
            labels: unsorted(&state.spec.labels),
            annotations: unsorted(&state.spec.annotations),
        }),
        cpu: Some(cpu_usage(usage)),
        memory: Some(memory_usage(usage)),
        writable_layer: usage.writable_layer.as_ref().map(|layer| writable_layer(timestamp, layer)),
        swap: Some(proto::SwapUsage {
            timestamp,
            swap_available_bytes: memory.swap_available_bytes.and_then(some),
            swap_usage_bytes: some(memory.swap_bytes),
        }),
        io: Some(io_usage(usage)),
    }
}

/// A box's figures as PodSandboxStats shows them, with those of the containers in `states` of which something is known.
pub fn pod_sandbox_stats(
    state: &BoxStatus,
    states: &[SessionStatus],
    usage: &BoxUsage,
) -> proto::PodSandboxStats {
    let by_id: HashMap<_, _> = usage.sessions.iter().map(|usage| (&usage.id, usage)).collect();
    let container = |state: &SessionStatus| Some(container_stats(state, by_id.get(&state.id)?));
    let total = usage.total.as_ref();
    proto::PodSandboxStats {
        attributes: Some(proto::PodSandboxAttributes {
            id: state.id.to_string(),
            metadata: Some(metadata(&state.spec.identity)),
            labels: unsorted(&state.spec.labels),
            annotations: unsorted(&state.spec.annotations),
        }),
        linux: Some(proto::LinuxPodSandboxStats {
            cpu: total.map(cpu_usage),
            memory: total.map(memory_usage),
            network: network_usage(usage.at_ns, &usage.network),
            process: Some(proto::ProcessUsage {
                timestamp: usage.at_ns,
                process_count: some(usage.sessions.iter().map(|session| session.processes).sum()),
            }),
            containers: states.iter().filter_map(container).collect(),
            io: total.map(io_usage),
        }),
        windows: None,
    }
}

fn cpu_usage<Id>(usage: &Usage<Id>) -> proto::CpuUsage {
    proto::CpuUsage {
        timestamp: usage.at_ns,
        usage_core_nano_seconds: some(usage.cpu.usage_ns),
        usage_nano_cores: usage.cpu.nano_cores.and_then(some),
        psi: usage.pressure.cpu.as_ref().map(psi),
    }
}

fn memory_usage<Id>(usage: &Usage<Id>) -> proto::MemoryUsage {
    let memory = &usage.memory;
    proto::MemoryUsage {
        timestamp: usage.at_ns,
        working_set_bytes: some(memory.working_set_bytes),
        available_bytes: memory.available_bytes.and_then(some),
        usage_bytes: some(memory.usage_bytes),
        rss_bytes: some(memory.rss_bytes),
        page_faults: some(memory.page_faults),
        major_page_faults: some(memory.major_page_faults),
        psi: usage.pressure.memory.as_ref().map(psi),
    }
}

/// All that CRI says of it is pressure.
fn io_usage<Id>(usage: &Usage<Id>) -> proto::IoUsage {
    proto::IoUsage { timestamp: usage.at_ns, psi: usage.pressure.io.as_ref().map(psi) }
}

fn psi(pressure: &Pressure) -> proto::PsiStats {
    let percent = |hundredths: u32| f64::from(hundredths) / 100.0;
    let data = |stall: &Stall| proto::PsiData {
        total: stall.total_us,
        avg10: percent(stall.avg10),
        avg60: percent(stall.avg60),
        avg300: percent(stall.avg300),
    };
    proto::PsiStats { full: Some(data(&pressure.full)), some: Some(data(&pressure.some)) }
}

/// The primary interface is apart from the others. Without any there is no network to tell of.
fn network_usage(timestamp: i64, interfaces: &[InterfaceUsage]) -> Option<proto::NetworkUsage> {
    let mut interfaces = interfaces.iter().map(|interface| proto::NetworkInterfaceUsage {
        name: interface.name.clone(),
        rx_bytes: some(interface.received.bytes),
        rx_errors: some(interface.received.errors),
        tx_bytes: some(interface.sent.bytes),
        tx_errors: some(interface.sent.errors),
    });
    let default_interface = Some(interfaces.next()?);
    Some(proto::NetworkUsage { timestamp, default_interface, interfaces: interfaces.collect() })
}

/// On the host a writable layer lies in its box's scratch disk.
fn writable_layer(timestamp: i64, layer: &WritableLayerUsage) -> proto::FilesystemUsage {
    proto::FilesystemUsage {
        timestamp,
        fs_id: Some(proto::FilesystemIdentifier { mountpoint: layer.disk.display().to_string() }),
        used_bytes: some(layer.used_bytes),
        inodes_used: some(layer.inodes),
    }
}

fn some(value: u64) -> Option<proto::UInt64Value> {
    Some(proto::UInt64Value { value })
}

#[cfg(test)]
mod tests {
    use a3s_box_core::lifecycle::{BoxPhase, SessionPhase};
    use a3s_box_core::network::Traffic;
    use a3s_box_core::spec::BoxSpec;
    use a3s_box_core::spec::SessionSpec;
    use a3s_box_core::{BoxId, SessionId};
    use a3s_box_runtime::{CpuUsage, IoUsage, MemoryUsage, Pressures};

    use super::super::status::tests::{a_box, a_session};
    use super::*;

    fn state() -> SessionStatus {
        let spec = SessionSpec {
            name: "app".to_owned(),
            attempt: 2,
            labels: [("a".to_owned(), "b".to_owned())].into(),
            annotations: [("c".to_owned(), "d".to_owned())].into(),
            ..Default::default()
        };
        SessionStatus { spec, ..a_session(SessionPhase::Running { started_at_ns: 1 }) }
    }

    fn usage() -> SessionUsage {
        SessionUsage {
            id: SessionId::from_random([9; 32]),
            at_ns: 77,
            cpu: CpuUsage {
                usage_ns: 10,
                user_ns: 6,
                system_ns: 4,
                nano_cores: Some(3),
                ..CpuUsage::default()
            },
            memory: MemoryUsage {
                usage_bytes: 100,
                working_set_bytes: 90,
                rss_bytes: 80,
                available_bytes: Some(70),
                page_faults: 60,
                major_page_faults: 50,
                swap_bytes: 40,
                swap_available_bytes: Some(30),
                ..MemoryUsage::default()
            },
            processes: 1,
            threads: 2,
            threads_max: 0,
            file_descriptors: 3,
            sockets: 1,
            io: IoUsage::default(),
            pressure: Pressures {
                io: Some(Pressure {
                    some: Stall { total_us: 9, avg10: 150, avg60: 25, avg300: 0 },
                    full: Stall::default(),
                }),
                ..Pressures::default()
            },
            writable_layer: Some(WritableLayerUsage {
                disk: "/x/scratch.img".into(),
                used_bytes: 20,
                inodes: 5,
                limit_bytes: 50,
                inodes_total: 9,
                inodes_free: 4,
            }),
        }
    }

    fn number(value: Option<proto::UInt64Value>) -> Option<u64> {
        value.map(|value| value.value)
    }

    #[test]
    fn every_figure_is_in_its_place_and_has_the_time_of_its_reading() {
        let stats = container_stats(&state(), &usage());
        let attributes = stats.attributes.unwrap();
        assert_eq!(attributes.id, state().id.to_string());
        assert_eq!(attributes.metadata.unwrap().attempt, 2);
        assert_eq!(
            (&attributes.labels["a"], &attributes.annotations["c"]),
            (&"b".to_owned(), &"d".to_owned())
        );
        let cpu = stats.cpu.unwrap();
        assert_eq!((number(cpu.usage_core_nano_seconds), number(cpu.usage_nano_cores)), (Some(10), Some(3)));
        let memory = stats.memory.unwrap();
        let told = [
            memory.usage_bytes,
            memory.working_set_bytes,
            memory.rss_bytes,
            memory.available_bytes,
            memory.page_faults,
            memory.major_page_faults,
        ];
        assert_eq!(told.map(number), [100, 90, 80, 70, 60, 50].map(Some));
        let swap = stats.swap.unwrap();
        assert_eq!((number(swap.swap_usage_bytes), number(swap.swap_available_bytes)), (Some(40), Some(30)));
        let layer = stats.writable_layer.unwrap();
        assert_eq!(layer.fs_id.unwrap().mountpoint, "/x/scratch.img");
        assert_eq!((number(layer.used_bytes), number(layer.inodes_used)), (Some(20), Some(5)));
        let waited = stats.io.unwrap().psi.unwrap().some.unwrap();
        assert_eq!((waited.total, waited.avg10, waited.avg60, waited.avg300), (9, 1.5, 0.25, 0.0));
        assert_eq!((cpu.psi, memory.psi), (None, None));
        assert_eq!([cpu.timestamp, memory.timestamp, swap.timestamp, layer.timestamp], [77; 4]);
    }

    #[test]
    fn what_is_not_known_is_absent_and_not_zero() {
        let mut usage = usage();
        usage.cpu.nano_cores = None;
        usage.memory.available_bytes = None;
        usage.memory.swap_available_bytes = None;
        usage.writable_layer = None;
        let stats = container_stats(&state(), &usage);
        assert_eq!(stats.cpu.unwrap().usage_nano_cores, None);
        assert_eq!(stats.memory.unwrap().available_bytes, None);
        assert_eq!(stats.swap.unwrap().swap_available_bytes, None);
        assert_eq!(stats.writable_layer, None);
    }

    #[test]
    fn a_pods_figures_are_its_total_its_containers_and_its_interfaces() {
        let id = BoxId::from_random([7; 32]);
        let spec = BoxSpec { labels: [("x".to_owned(), "y".to_owned())].into(), ..BoxSpec::default() };
        let boxed = BoxStatus { spec, ..a_box(BoxPhase::Ready) };
        let interface = |name: &str, bytes| InterfaceUsage {
            name: name.to_owned(),
            received: Traffic { bytes, errors: 1, ..Traffic::default() },
            sent: Traffic { bytes: bytes + 1, errors: 2, ..Traffic::default() },
        };
        let session = usage();
        let total = Usage {
            id: id.clone(),
            at_ns: 78,
            cpu: session.cpu.clone(),
            memory: session.memory.clone(),
            processes: 0,
            threads: 0,
            threads_max: 0,
            file_descriptors: 0,
            sockets: 0,
            io: session.io.clone(),
            pressure: session.pressure.clone(),
            writable_layer: None,
        };
        let usage = BoxUsage {
            id,
            at_ns: 78,
            total: Some(total),
            network: vec![interface("eth0", 5), interface("net1", 50)],
            host: None,
            sessions: vec![session],
        };
        let other = SessionStatus { id: SessionId::from_random([1; 32]), ..state() };
        let stats = pod_sandbox_stats(&boxed, &[other, state()], &usage);
        assert_eq!(stats.attributes.unwrap().labels["x"], "y");
        let linux = stats.linux.unwrap();
        assert_eq!(number(linux.cpu.unwrap().usage_core_nano_seconds), Some(10));
        assert_eq!(number(linux.memory.unwrap().working_set_bytes), Some(90));
        assert_eq!(number(linux.process.unwrap().process_count), Some(1));
        assert_eq!(linux.io.unwrap().psi.unwrap().some.unwrap().total, 9);
        assert_eq!(linux.containers.len(), 1, "only what is known is told");
        let network = linux.network.unwrap();
        let first = network.default_interface.unwrap();
        assert_eq!(
            (first.name.as_str(), number(first.rx_bytes), number(first.tx_errors)),
            ("eth0", Some(5), Some(2))
        );
        assert_eq!((network.interfaces.len(), network.interfaces[0].name.as_str()), (1, "net1"));

        let bare = BoxUsage { total: None, network: Vec::new(), sessions: Vec::new(), ..usage };
        let linux = pod_sandbox_stats(&boxed, &[state()], &bare).linux.unwrap();
        assert_eq!((linux.cpu, linux.memory, linux.network), (None, None, None));
    }
}
