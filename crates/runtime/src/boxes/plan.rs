//! What a box's record means to its VMM and to its agent.

use std::path::PathBuf;

use a3s_box_core::network::{Address, Interface, PodNamespace};
use a3s_box_core::spec::{IdRange, UserNamespace};
use a3s_box_protocol::AGENT_IMAGE_PORT;
use a3s_box_protocol::proto;
use a3s_box_vmm::{BoxPlan, PlanNetwork, PlanNic};

use crate::clock::now_ns;
use crate::config::RuntimeConfig;
use crate::records::BoxRecord;
use crate::scratch::disk_of;

/// What a VM of a box is. Without a namespace it has no network.
pub(super) fn plan(
    config: &RuntimeConfig,
    record: &BoxRecord,
    cgroups: Vec<PathBuf>,
    namespace: Option<&PodNamespace>,
) -> BoxPlan {
    BoxPlan {
        id: record.id.clone(),
        dir: record.dir.clone(),
        vcpus: record.spec.size.vcpus,
        memory_mib: record.spec.size.memory_mib,
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        cmdline: config.cmdline.clone(),
        scratch: disk_of(&config.state_dir, &record.id),
        network: namespace
            .map(|PodNamespace { netns, taps }| PlanNetwork { netns: netns.clone(), nics: nics(taps) }),
        cgroups,
        guest_ports: vec![AGENT_IMAGE_PORT],
    }
}

/// A NIC for each tap.
pub(super) fn nics<'a>(taps: impl IntoIterator<Item = &'a String>) -> Vec<PlanNic> {
    (0..=u8::MAX).zip(taps).map(|(place, tap)| PlanNic::new(place, tap.clone())).collect()
}

/// What a box's agent is told of its sandbox.
pub(super) fn configuration(record: &BoxRecord) -> proto::ConfigureSandboxRequest {
    let interfaces = record.network.iter().flat_map(|network| &network.interfaces);
    let nics = record.plan.iter().flat_map(|plan| &plan.network).flat_map(|network| &network.nics);
    proto::ConfigureSandboxRequest {
        hostname: record.hostname().to_owned(),
        sysctls: record.spec.sysctls.clone().into_iter().collect(),
        interfaces: interfaces.zip(nics).map(interface).collect(),
        shm_bytes: 0,
        unix_time_ns: now_ns().unsigned_abs(),
        user_namespace: record.spec.user_namespace.as_ref().map(user_namespace),
    }
}

fn user_namespace(users: &UserNamespace) -> proto::UserNamespace {
    let range = |ids: IdRange| Some(proto::IdRange { start: ids.start, count: ids.count });
    proto::UserNamespace { uids: range(users.uids), gids: range(users.gids) }
}

fn interface((interface, nic): (&Interface, &PlanNic)) -> proto::NetworkInterface {
    proto::NetworkInterface {
        name: interface.name.clone(),
        mac: interface.mac.to_vec(),
        device_mac: nic.mac.to_vec(),
        mtu: interface.mtu,
        addresses: interface.addresses.iter().map(ip_network).collect(),
        routes: interface
            .routes
            .iter()
            .map(|route| proto::Route {
                destination: Some(ip_network(&route.destination)),
                gateway: route.gateway.map(octets).unwrap_or_default(),
            })
            .collect(),
    }
}

fn ip_network(address: &Address) -> proto::IpNetwork {
    proto::IpNetwork { ip: octets(address.ip), prefix: u32::from(address.prefix) }
}

fn octets(ip: std::net::IpAddr) -> Vec<u8> {
    match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
