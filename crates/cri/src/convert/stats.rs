//! What sessions use, as CRI's statistics show it.

use a3s_box_runtime::{SessionStatus, SessionUsage, WritableLayerUsage};

use super::status::container_metadata;
use super::unsorted;
use crate::proto;

/// A session's figures as ContainerStats shows them. Figures that kubelet would take for a limit are absent where there
/// is none; pressure is not measured yet and absent too.
pub fn container_stats(state: &SessionStatus, usage: &SessionUsage) -> proto::ContainerStats {
    let (timestamp, cpu, memory) = (usage.at_ns, &usage.cpu, &usage.memory);
    proto::ContainerStats {
        attributes: Some(proto::ContainerAttributes {
            id: state.id.to_string(),
            metadata: Some(container_metadata(state)),
            labels: unsorted(&state.spec.labels),
            annotations: unsorted(&state.spec.annotations),
        }),
        cpu: Some(proto::CpuUsage {
            timestamp,
            usage_core_nano_seconds: some(cpu.usage_ns),
            usage_nano_cores: cpu.nano_cores.and_then(some),
            psi: None,
        }),
        memory: Some(proto::MemoryUsage {
            timestamp,
            working_set_bytes: some(memory.working_set_bytes),
            available_bytes: memory.available_bytes.and_then(some),
            usage_bytes: some(memory.usage_bytes),
            rss_bytes: some(memory.rss_bytes),
            page_faults: some(memory.page_faults),
            major_page_faults: some(memory.major_page_faults),
            psi: None,
        }),
        writable_layer: usage.writable_layer.as_ref().map(|layer| writable_layer(timestamp, layer)),
        swap: Some(proto::SwapUsage {
            timestamp,
            swap_available_bytes: memory.swap_available_bytes.and_then(some),
            swap_usage_bytes: some(memory.swap_bytes),
        }),
        // All that CRI says of it is pressure.
        io: None,
    }
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
    use a3s_box_core::lifecycle::SessionPhase;
    use a3s_box_core::spec::SessionSpec;
    use a3s_box_core::{BoxId, SessionId};
    use a3s_box_runtime::{CpuUsage, IoUsage, MemoryUsage};

    use super::*;

    fn state() -> SessionStatus {
        SessionStatus {
            id: SessionId::from_random([9; 32]),
            box_id: BoxId::from_random([7; 32]),
            spec: SessionSpec {
                name: "app".to_owned(),
                attempt: 2,
                labels: [("a".to_owned(), "b".to_owned())].into(),
                annotations: [("c".to_owned(), "d".to_owned())].into(),
                ..Default::default()
            },
            image_id: String::new(),
            image_digest_ref: String::new(),
            phase: SessionPhase::Running { started_at_ns: 1 },
            created_at_ns: 1,
            log_path: None,
            user: None,
            pid: None,
            info: Default::default(),
        }
    }

    fn usage() -> SessionUsage {
        SessionUsage {
            id: SessionId::from_random([9; 32]),
            at_ns: 77,
            cpu: CpuUsage { usage_ns: 10, user_ns: 6, system_ns: 4, nano_cores: Some(3) },
            memory: MemoryUsage {
                usage_bytes: 100,
                working_set_bytes: 90,
                rss_bytes: 80,
                available_bytes: Some(70),
                page_faults: 60,
                major_page_faults: 50,
                swap_bytes: 40,
                swap_available_bytes: Some(30),
            },
            pids: 1,
            io: IoUsage::default(),
            writable_layer: Some(WritableLayerUsage {
                disk: "/x/scratch.img".into(),
                used_bytes: 20,
                inodes: 5,
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
        assert_eq!((stats.writable_layer, stats.io), (None, None));
    }
}
